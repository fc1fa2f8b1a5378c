"""A command on a leash: once its holder lets go, or ends in whatever way, nothing of the command is left (`reaper`)."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

_REAPER = Path(__file__).with_name("reaper.py")


class CannotStart(RuntimeError):
    """The command could not be started: no such program, or no room for a process."""


@dataclass(slots=True)
class Leash:
    """Ties a command to this process; leaving the scope ends the command if it still runs.

        with Leash() as leash:
            subprocess.run(leash.command(["sleep", "9"], seconds=1.0), pass_fds=[leash.fd])
            leash.word()  # "time"

    Attributes:
        mine, its: ends of a socket. The command's side holds the second, its holder keeps the first open.
    """

    mine: socket.socket = field(init=False)
    its: socket.socket = field(init=False)

    def __enter__(self) -> Leash:
        self.mine, self.its = socket.socketpair()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mine.close()
        self.its.close()

    @property
    def fd(self) -> int:
        """The file descriptor that the started process has to inherit."""
        return self.its.fileno()

    def command(self, words: Sequence[str], *, seconds: float | None) -> list[str]:
        """The command line that runs `words` for at most `seconds` (None: no limit) and then kills all it started."""
        limit = math.inf if seconds is None else seconds
        return [sys.executable, "-I", "-S", str(_REAPER), repr(float(limit)), str(self.fd), *words]

    def release(self) -> None:
        """Let go: the command is killed, with all that it started. Safe to call twice."""
        self.mine.close()

    def word(self) -> str:
        """What happened: `exit CODE`, `signal NUMBER` or `time`. Call it once the started process has ended.

        Raises:
            CannotStart: the command could not be started.
        """
        self.its.close()
        word = self.mine.recv(1 << 12).decode() or "signal 9"  # killed from outside before it could say anything
        if word.startswith("cannot start"):
            raise CannotStart(word)
        return word
