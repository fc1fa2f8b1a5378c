"""Runs somebody else's program so that nothing of it outlives us: `python -m pacenote.rollout.keeper COMMAND ...`

The program ends, with all that it has started, when this process gets SIGTERM or SIGINT, when the process that started
this one is gone, even killed, and when the program itself ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from types import FrameType

from pacenote.rollout import tree
from pacenote.rollout.launch import PARENT_VARIABLE, exit_with_parent

GRACE = 3.0  # seconds; `exit_with_parent` gives this process five


def main(command: list[str]) -> int:
    """Run it; returns its exit code, or 128 and the signal's number."""
    if not command:
        print("usage: python -m pacenote.rollout.keeper COMMAND ...", file=sys.stderr)
        return 2
    mark = uuid.uuid4().hex
    try:
        own = {tree.MARK: mark, PARENT_VARIABLE: str(os.getpid())}
        child = subprocess.Popen(command, env=os.environ | own, start_new_session=True)
    except OSError as error:
        print(f"error: cannot start {command[0]}: {error}", file=sys.stderr)
        return 127

    def stop(number: int, frame: FrameType | None) -> None:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE)
        tree.end(mark)
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    exit_with_parent()
    code = child.wait()
    tree.end(mark)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
