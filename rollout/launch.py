"""Local service processes: start, watch, stop. No torch.

A `Service` is a child in a session of its own, so that Ctrl-C in the terminal reaches only the parent, which then stops
its children in order. A child that outlives a killed parent ends itself (`exit_with_parent`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import httpx

PARENT_VARIABLE = "PACENOTE_PARENT_PID"
RESERVED_PORTS = range(15000, 17001)  # Mooncake's RPC


class ServiceError(RuntimeError):
    """A service that did not start, did not become healthy or died; the text ends with its last log lines."""


class Service:
    """One child process that answers HTTP.

    Args:
        name: what to call it in messages.
        command: program and arguments.
        url: base URL that it will answer on.
        log: file for its output; parent folders are made, an old file is appended to.
        env: variables set on top of the caller's environment.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, url: str, log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.command = list(command)
        self.url = url
        self.log = log
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; returns at once.

        Raises:
            ServiceError: it runs already, or the program cannot be started.
        """
        if self.alive:
            raise ServiceError(f"{self.name} already runs as process {self.pid}: stop it before starting it again")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = os.environ | self._env | {PARENT_VARIABLE: str(os.getpid())}
        with self.log.open("ab") as output:
            try:
                self._process = self._spawn(output, env)
            except OSError as error:
                raise ServiceError(f"cannot start {self.name} ({self.command[0]}): {error}") from error

    def _spawn(self, output: IO[bytes], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )

    @property
    def pid(self) -> int | None:
        """Process id, None before the start."""
        return None if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """True while the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit code of a process that has ended (minus the signal's number if one ended it), else None."""
        return None if self._process is None else self._process.poll()

    def wait_healthy(self, timeout: float = 120.0, *, path: str = "/health") -> None:
        """Wait until GET `url + path` answers 200.

        Args:
            timeout: seconds.

        Raises:
            ServiceError: the process ended or the time ran out.
        """
        deadline = time.monotonic() + timeout
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while True:
                if not self.alive:
                    raise ServiceError(f"{self.name} ended with exit code {self.exit_code}{self._last_words()}")
                with contextlib.suppress(httpx.HTTPError):
                    if client.get(self.url + path).status_code == 200:
                        return
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"{self.name} did not answer {self.url + path} in {timeout:g} s{self._last_words()}"
                    )
                time.sleep(0.05)

    def check(self) -> None:
        """Raise ServiceError if the process has ended."""
        if not self.alive:
            raise ServiceError(f"{self.name} ended with exit code {self.exit_code}{self._last_words()}")

    def tail(self, lines: int = 20) -> str:
        """The last lines of the log, at most 16 KiB."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def stop(self, grace: float = 5.0) -> None:
        """Terminate the process and its group; what is left after `grace` seconds is killed. Safe to call twice."""
        process = self._process
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        self._process = None

    def _last_words(self) -> str:
        text = self.tail()
        return f"; the end of {self.log}:\n{text}" if text else f"; {self.log} is empty"


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Signal the group that the child leads (it was started in a session of its own)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now, outside 15000-17000."""
    while True:
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
        if port not in RESERVED_PORTS:
            return port


def engine_command(
    model: Path,
    *,
    port: int,
    host: str = "127.0.0.1",
    dtype: str = "bfloat16",
    device: str = "cpu",
    max_running_requests: int = 64,
    context_length: int | None = None,
    tool_call_parser: str | None = "glm47",
    served_model_name: str | None = None,
    random_seed: int = 0,
    weight_version: str = "default",
    threads: int = 1,
    exact: bool = False,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command line of an embedded engine; see `python -m pacenote.rollout.embedded --help`."""
    options: dict[str, object] = {
        "--model-path": model,
        "--host": host,
        "--port": port,
        "--dtype": dtype,
        "--device": device,
        "--max-running-requests": max_running_requests,
        "--context-length": context_length,
        "--tool-call-parser": tool_call_parser,
        "--served-model-name": served_model_name,
        "--random-seed": random_seed,
        "--weight-version": weight_version,
        "--threads": threads,
    }
    return _command("pacenote.rollout.embedded", options, [*(["--exact"] if exact else []), *extra])


def sessions_command(
    model: Path, *, upstream: str, port: int, host: str | None = None, extra: Sequence[str] = ()
) -> list[str]:
    """The command line of a session server in front of the engine or gateway at `upstream`."""
    options: dict[str, object] = {"--model": model, "--upstream": upstream, "--port": port, "--host": host}
    return _command("pacenote.rollout.server", options, extra)


def _command(module: str, options: Mapping[str, object], extra: Sequence[str]) -> list[str]:
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    return [sys.executable, "-m", module, *given, *extra]


def exit_with_parent(interval: float = 0.5) -> None:
    """For a service's entry point: end this process once the `Service` that started it is gone.

    Watches from a thread whether the parent is still the process named in PACENOTE_PARENT_PID; does nothing without
    that variable (a service started by hand). Ends by SIGTERM, and the hard way if that takes over 5 seconds.
    """
    parent = os.environ.pop(PARENT_VARIABLE, "")  # not for this process's own children
    if not parent.isdigit():
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(interval)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5.0)
        os._exit(1)

    threading.Thread(target=watch, name="exit-with-parent", daemon=True).start()
