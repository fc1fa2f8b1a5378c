"""Run a program that nobody has read, with limits, and keep what it wrote.

Each run has a session and an empty working folder of its own, no environment variables, no inherited file descriptors,
limits on CPU time, memory, output, open files and processes (setrlimit(2)), and a wall-clock limit after which
everything that it started is killed, also what has left its session. Where the kernel gives namespaces to this user,
there is no network, no other process in sight, and nothing outside the folder can be written; `Outcome.walls` says
which of these stood. Files that this user can read can be read: this holds accidents, and is no wall against somebody
who looks for a way out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pacenote.trainer.environments.leash import Leash

_INIT = Path(__file__).with_name("sandbox_init.py")


class SandboxError(RuntimeError):
    """The sandbox itself failed; the program never ran, or what became of it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """From its start to its end, the sandbox's own start (some hundredths) within."""
    cpu: int = 10
    """Seconds of CPU time of each process."""
    memory: int = 1 << 30
    """Bytes of address space of each process."""
    output: int = 1 << 20
    """Bytes of standard output, of standard error, and of each file."""
    disk: int = 16 << 20
    """Bytes of the working folder, where the "files" wall stands; they are memory."""
    processes: int = 32
    """Processes and threads at once."""
    open_files: int = 64
    """File descriptors of each process."""

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run."""
        for name in ("seconds", "cpu", "memory", "output", "disk", "processes", "open_files"):
            if not getattr(self, name) > 0:
                raise ValueError(f"a sandbox's {name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a program.

    Attributes:
        code: exit code; minus the signal's number if one ended it; None if the time was over.
        stdout, stderr: what it wrote, up to `Limits.output`; empty if the time was over.
        truncated: one of them reached that limit.
        walls: of "network", "processes", "files" and "user", those that stood; "user" means nobody's id instead of
            root's.
    """

    code: int | None
    stdout: str = ""
    stderr: str = ""
    truncated: bool = False
    walls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """Runs programs, at most `at_once` at a time; safe to share between threads; `namespaces`: with walls."""

    limits: Limits = field(default_factory=Limits)
    at_once: int = field(default_factory=lambda: os.cpu_count() or 1)
    namespaces: bool = True
    _room: threading.BoundedSemaphore = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make room."""
        if self.at_once < 1:
            raise ValueError(f"a sandbox's at_once must be at least 1, got {self.at_once}")
        object.__setattr__(self, "_room", threading.BoundedSemaphore(self.at_once))

    def python(self, source: str, *, stdin: str = "") -> Outcome:
        """Run a Python program with this interpreter, isolated (`-I`); see `run`."""
        return self.run([sys.executable, "-I", "program.py"], {"program.py": source}, stdin=stdin)

    def run(self, command: Sequence[str], files: Mapping[str, str], *, stdin: str = "") -> Outcome:
        """Run a command to its end; waits for room first, which the time limit does not count.

        Args:
            command: absolute path of a program, and its arguments.
            files: texts by name, written into the working folder first.

        Raises:
            SandboxError: the sandbox could not be built.
        """
        limits = self.limits
        spec = {
            "command": list(command), "files": dict(files), "stdin": stdin, "cpu": limits.cpu, "memory": limits.memory,
            "output": limits.output, "disk": limits.disk, "processes": limits.processes,
            "open_files": limits.open_files, "namespaces": self.namespaces,
        }  # fmt: skip
        with self._room, tempfile.TemporaryDirectory(prefix="pacenote-sandbox-") as folder, Leash() as leash:
            words = [sys.executable, "-I", "-S", str(_INIT), folder]
            done = subprocess.run(
                leash.command(words, seconds=limits.seconds),
                input=json.dumps(spec).encode(),
                capture_output=True,
                pass_fds=[leash.fd],
                env={},
                check=False,
            )
            word = leash.word()
        if word == "time":
            return Outcome(code=None)
        if word != "exit 0" or not done.stdout:
            raise SandboxError(f"the sandbox ended with {word!r}: {done.stderr.decode(errors='replace')[-1000:]}")
        report = json.loads(done.stdout)
        return Outcome(**{**report, "walls": tuple(report["walls"])})
