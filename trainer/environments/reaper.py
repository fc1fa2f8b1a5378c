"""A program of its own: run a command, and leave nothing of it behind. Standard library only; `leash` starts it.

    python -I -S reaper.py SECONDS SOCKET COMMAND...

It ends the command when the time is over or the other end of the socket (an inherited file descriptor) is closed, by
whatever cause. Whatever the command started is killed then, and also when it ends by itself: this process is the
subreaper (prctl(2)), so that a child which leaves its session or loses its parent becomes a child of this one.
Says on the socket what happened: `exit CODE`, `signal NUMBER`, `time`, `gone` or `cannot start: REASON`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import select
import signal
import socket
import sys
import time

PR_SET_CHILD_SUBREAPER = 36


def main(words: list[str]) -> None:
    """Run the command in `words[2:]` as the module says."""
    seconds, line = float(words[0]), socket.socket(fileno=int(words[1]))
    line.set_inheritable(False)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        child = os.posix_spawnp(words[2], words[2:], os.environ, setsid=True)
    except OSError as error:
        line.sendall(f"cannot start: {error}".encode())
        return
    watch = select.poll()
    ended = os.pidfd_open(child)
    watch.register(ended, select.POLLIN)
    watch.register(line, select.POLLIN | select.POLLHUP)
    ready = {number for number, _ in watch.poll(None if math.isinf(seconds) else seconds * 1000)}
    if ended in ready:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        word = f"exit {code}" if code >= 0 else f"signal {-code}"
    else:
        word = "gone" if ready else "time"
    kill_descendants()
    with contextlib.suppress(OSError):
        line.sendall(word.encode())


def kill_descendants() -> None:
    """Kill until this process has no child left; what loses its parent on the way becomes a child of this process."""
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if not sum(_kill(pid) for pid in _descendants(os.getpid())):
            return  # what is left runs under another user's id
        time.sleep(0.001)


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])  # a program's name may hold spaces
                children.setdefault(parent, []).append(int(name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
