"""All processes that a service has started, however they were started: they carry its mark in their environment.

A server's schedulers may be in process groups and sessions of their own and outlive it; their mark tells them.
Linux (`/proc`); elsewhere only the service's own process group is known.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

MARK = "PACENOTE_TREE"
_PROC = Path("/proc")


def marked(mark: str) -> list[int]:
    """Process ids with this mark, but for this process."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in _PROC.iterdir() if _PROC.is_dir() else ():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):  # it ended, or is somebody else's
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def end(mark: str, *, grace: float = 0.0) -> None:
    """Terminate all of them, and kill what is left after `grace` seconds, until none is."""
    for pid in marked(mark) if grace else ():
        _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(100):  # what is killed may have started another one just before
        if not (left := marked(mark)):
            return
        for pid in left:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.02)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
