"""Harbor's terminus-2, unmodified, in a shell of this machine instead of a container: for tests, it is no sandbox.

Imports Harbor, which declares Python 3.12; what terminus-2 needs of it runs on 3.11 but for two names in `typing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typing_extensions

os.environ.setdefault("HARBOR_TELEMETRY", "0")


@contextlib.contextmanager
def _typing_of_312() -> Iterator[None]:
    """`typing` has Python 3.12's `override` and `TypedDict` inside, from typing_extensions."""
    if sys.version_info >= (3, 12):
        yield
        return
    before = typing.TypedDict
    setattr(typing, "override", typing_extensions.override)  # noqa: B010  (mypy knows better)
    setattr(typing, "TypedDict", typing_extensions.TypedDict)  # noqa: B010
    try:
        yield
    finally:
        setattr(typing, "TypedDict", before)  # noqa: B010
        delattr(typing, "override")


with _typing_of_312():
    from harbor.agents.terminus_2.terminus_2 import Terminus2
    from harbor.environments.base import BaseEnvironment, ExecResult
    from harbor.models.agent.context import AgentContext
    from harbor.models.task.config import EnvironmentConfig
    from harbor.models.trial.paths import TrialPaths

TASK = "Say hi in hello.txt."
MOUNTED = ("/logs/", "/tests")  # where Harbor mounts its folders in a container


class Shell(BaseEnvironment):  # type: ignore[misc]
    """A directory with a home, a working directory and a tmux server of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._root = Path(self.trial_paths.trial_dir).absolute() / "root"
        self.work = self._root / "work"
        self._sockets = tempfile.TemporaryDirectory(prefix="tmux-")  # a socket's path may have 107 characters

    @staticmethod
    def type() -> str:
        """Harbor's name of the kind."""
        return "shell"

    def _validate_definition(self) -> None:
        """There is no image to look for."""

    async def start(self, force_build: bool = False) -> None:
        """Make the directories."""
        for name in ("home", "work", "logs/agent", "logs/verifier", "logs/artifacts", "tests"):
            (self._root / name).mkdir(parents=True)
        (self._root / "home" / ".bash_profile").write_text("PS1='$ '\n")

    async def stop(self, delete: bool = True) -> None:
        """End the tmux server."""
        await self.exec("tmux kill-server")
        self._sockets.cleanup()

    async def exec(
        self,
        command: str,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_sec: int | None = None,
        user: str | int | None = None,
    ) -> Any:
        """Run a command to its end."""
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(self._root / "home"),
            "TMUX_TMPDIR": self._sockets.name,
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
        }
        process = await asyncio.create_subprocess_exec(
            "bash", "-c", self._here(command), cwd=cwd or self.work, env=variables | (env or {}),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), timeout_sec)
        return ExecResult(stdout=out.decode(), stderr=err.decode(), return_code=process.returncode)

    async def upload_file(self, source_path: Path | str, target_path: str) -> None:
        """Copy a file in."""
        shutil.copy(source_path, self._here(target_path))

    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None:
        """Copy a directory in."""
        shutil.copytree(source_dir, self._here(target_dir), dirs_exist_ok=True)

    async def download_file(self, source_path: str, target_path: Path | str) -> None:
        """Copy a file out."""
        shutil.copy(self._here(source_path), target_path)

    async def download_dir(self, source_dir: str, target_dir: Path | str) -> None:
        """Copy a directory out."""
        shutil.copytree(self._here(source_dir), target_dir, dirs_exist_ok=True)

    def _here(self, text: str) -> str:
        """A command or path with the container's mount points replaced."""
        for place in MOUNTED:
            text = text.replace(place, f"{self._root}{place}")
        return text


def run_trial(directory: Path, url: str, **options: Any) -> tuple[Any, Path]:
    """One run of terminus-2 on TASK.

    Args:
        directory: empty; the run's files.
        url: a session's `/v1`.
        options: further arguments of Terminus2.

    Returns:
        Harbor's AgentContext, and the directory that the commands ran in.
    """
    paths = TrialPaths(trial_dir=directory)
    paths.mkdir()
    shell = Shell(
        environment_dir=directory,
        environment_name="shell",
        session_id=directory.name,
        trial_paths=paths,
        task_env_config=EnvironmentConfig(),
    )
    defaults: dict[str, Any] = {
        "model_name": "openai/policy",
        "api_base": url,
        "llm_kwargs": {"api_key": "unused"},
        "record_terminal_session": False,
        "suppress_max_turns_warning": True,
        "max_turns": 8,
    }
    agent = Terminus2(logs_dir=paths.agent_dir, **(defaults | options))
    context = AgentContext()

    async def go() -> None:
        await shell.start()
        try:
            await agent.setup(shell)
            await agent.run(TASK, shell, context)
        finally:
            await shell.stop()

    asyncio.run(go())
    return context, shell.work
