"""Environment: an agent of somebody's, which gets a base URL and a working folder, and its verifier.

The agent is a command or a Python coroutine function. A command finds OPENAI_BASE_URL and OPENAI_API_KEY in its
environment, and the task in `task.json` of its folder: `messages`, `tools` and `sampling`, the fields that each of its
requests should carry (temperature and max_tokens among them: the trainer computes with the run's temperature). When it
has ended, all that it started is killed, the conversation is read back from the session server, and the verifier gives
the reward. A command is limited in time; it is not in a sandbox.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pacenote.trainer import limited
from pacenote.trainer.environments.leash import CannotStart, Leash
from pacenote.trainer.tasks import Chat, Message, Task

Agent: TypeAlias = Callable[[str, Path, Task], Awaitable[Any]]
"""Called with (base URL, working folder, task)."""
Verifier: TypeAlias = Callable[[Path, Any], Any]
"""Called with (working folder, label), sync or async; gives the reward."""
VERIFIER_ROLE = "verifier"  # of the message that ends a conversation; it was never sent to the policy


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentLoop:
    """The environment. `verdict` is the reward that belongs to it."""

    agent: Sequence[str] | Agent
    """Command, or coroutine function."""
    verifier: Verifier
    """See `run_tests` for one that runs a command."""
    seconds: float = 600.0
    """Longest run of the agent; what it has done until then is verified all the same."""
    verifier_seconds: float = 120.0
    """Longest run of the verifier; beyond it there is no reward."""
    env: Mapping[str, str] = field(default_factory=dict)
    """More variables for a command; of this process's own it gets PATH alone."""

    async def __call__(self, chat: Chat, task: Task) -> list[Message]:
        """Play a task; the last message is the verifier's and carries `reward`.

        Raises:
            RuntimeError: the agent failed before its first request, which is an error of the setup.
            Exception: what the verifier raised.
        """
        with tempfile.TemporaryDirectory(prefix="pacenote-agent-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            given = {"messages": task.messages, "tools": task.tools, "sampling": dict(chat.defaults)}
            (folder / "task.json").write_text(json.dumps(given), encoding="utf-8")
            word = await self._run(chat, folder, task)
            messages = await read_back(chat)
            if not messages and not word.startswith("exit 0"):
                raise RuntimeError(f"the agent ended with {word!r} before its first request")
            try:
                reward = await limited.call(self.verifier, folder, task.label, timeout=self.verifier_seconds)
                said = f"agent: {word}; reward: {reward}"
            except limited.OutOfTime:
                reward, said = None, f"agent: {word}; the verifier was not done after {self.verifier_seconds:g} s"
        return [*(messages or task.messages), {"role": VERIFIER_ROLE, "content": said, "reward": reward}]

    async def _run(self, chat: Chat, folder: Path, task: Task) -> str:
        """Let the agent do its work; says how it ended."""
        if callable(self.agent):
            try:
                await limited.call(self.agent, chat.base_url, folder, task, timeout=self.seconds)
            except limited.OutOfTime:
                return "time"
            except Exception as error:  # a program's would be an exit code
                return f"{type(error).__name__}: {error}"
            return "exit 0"
        key = chat.client.headers.get("authorization", "Bearer unused").removeprefix("Bearer ")
        env = {
            "PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "LANG": "C.UTF-8",
            "OPENAI_BASE_URL": chat.base_url, "OPENAI_API_KEY": key, **self.env,
        }  # fmt: skip
        with tempfile.TemporaryFile() as output:  # outside of the folder, which is the agent's
            word = await _on_leash(self.agent, folder, env, self.seconds, output.fileno())
            output.seek(max(0, output.seek(0, os.SEEK_END) - 1000))
            return word if word == "exit 0" else f"{word}: {output.read().decode(errors='replace').strip()}"


async def _on_leash(words: Sequence[str], folder: Path, env: Mapping[str, str], seconds: float, output: int) -> str:
    """Run a command, cut off when this coroutine is cancelled."""
    with Leash() as leash:
        process = await asyncio.create_subprocess_exec(
            *leash.command(words, seconds=seconds),
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[leash.fd],
        )
        try:
            await process.wait()
        except asyncio.CancelledError:
            leash.release()
            await process.wait()
            raise
        try:
            return leash.word()
        except CannotStart as error:
            return str(error)


async def read_back(chat: Chat) -> list[Message]:
    """The conversation that ends with the session's newest answer; empty if there was none.

    Raises:
        httpx.HTTPError: the session server did not give it.
    """
    response = await chat.client.get(chat.base_url.removesuffix("/v1"))
    response.raise_for_status()
    records = {record["index"]: record for record in response.json()["records"]}
    place = max(records, default=None)
    messages: list[Message] = []
    while place is not None:
        record = records[place]
        messages = [*record["messages"], record["response"], *messages]
        place = record["parent"]
    return messages


def verdict(messages: list[Message], label: Any) -> Any:
    """Reward: what the verifier said."""
    return messages[-1].get("reward") if messages[-1]["role"] == VERIFIER_ROLE else None


def run_tests(folder: Path, label: Mapping[str, Any]) -> float | None:
    """Verifier: write `label["files"]` (texts by name) into the folder, then run `label["command"]` there.

    The reward is the number in `reward.txt` if the command wrote one, else 1 for exit code 0 and 0 for another; 0 after
    `label["seconds"]` (60 if not said). An agent's own reward.txt is removed first.

    Raises:
        RuntimeError: the command could not be started.
    """
    for name, text in dict(label.get("files") or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    told = folder / "reward.txt"
    told.unlink(missing_ok=True)
    with Leash() as leash:
        subprocess.run(
            leash.command(label["command"], seconds=float(label.get("seconds", 60.0))),
            cwd=folder,
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": str(folder), "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[leash.fd],
            check=False,
        )
        word = leash.word()
    if word == "exit 0" and told.is_file():
        try:
            return float(told.read_text())
        except ValueError:
            return None
    return float(word == "exit 0")
