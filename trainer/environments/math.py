"""Mathematics, compared by math-verify in processes of its own. Needs `pip install 'pacenote[math]'`.

A comparison may take forever or all memory, and cannot be interrupted from within: the process that overruns is ended,
and another one started for the next.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from typing import Any

from pacenote.trainer.tasks import Message, answer_text

SECONDS = 5.0  # of one comparison
_WORKER = Path(__file__).with_name("math_worker.py")


class Verifier:
    """Compares, at most `at_once` at a time; safe to share between threads. Processes start when first needed."""

    def __init__(self, *, seconds: float = SECONDS, at_once: int | None = None) -> None:
        self.seconds = seconds
        self._room = threading.BoundedSemaphore(at_once or os.cpu_count() or 1)
        self._idle: deque[subprocess.Popen[str]] = deque()
        atexit.register(self.close)

    def equal(self, label: str, answer: str | None) -> bool | None:
        """Whether `answer` equals `label` (None: whether there is a label). None: the label cannot be parsed.

        False as well if the time was over or the process died of it.

        Raises:
            RuntimeError: math-verify is not installed.
        """
        with self._room:
            worker = self._take()
            assert worker.stdin is not None
            assert worker.stdout is not None
            try:
                print(json.dumps([label, answer, self.seconds]), file=worker.stdin, flush=True)
                line = worker.stdout.readline()
            except BrokenPipeError:
                line = ""
            if not line.endswith("\n"):
                _end(worker)
                return False
            self._idle.append(worker)
            verdict: bool | None = json.loads(line)
            return verdict

    def close(self) -> None:
        """End the processes that wait for work. Others start if more is asked."""
        while self._idle:
            _end(self._idle.pop())

    def _take(self) -> subprocess.Popen[str]:
        try:
            return self._idle.pop()
        except IndexError:
            # -P: this folder's names are not those of the standard library
            worker = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        assert worker.stdout is not None
        if worker.stdout.readline() != "ready\n":
            _end(worker)
            raise RuntimeError("cannot start math-verify; install it with: pip install 'pacenote[math]'")
        return worker


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    assert worker.stdout is not None
    assert worker.stdin is not None
    worker.stdout.close()
    try:
        worker.stdin.close()
    except BrokenPipeError:  # what it did not read any more
        pass
    finally:
        worker.wait()


VERIFIER = Verifier()


def verified(messages: list[Message], label: Any) -> float | None:
    """Reward: 1 if the last answer equals the label mathematically, else 0, also where that took too long.

    None if the label cannot be parsed, which `check_label` says before a run.
    """
    worth = VERIFIER.equal(str(label), answer_text(messages))
    return None if worth is None else float(worth)


def check_label(label: Any) -> None:
    """Refuse a label that is no mathematics.

    Raises:
        ValueError: math-verify finds none in it.
    """
    if label is None or not VERIFIER.equal(str(label), None):
        raise ValueError(f"math expects a number or an expression, in LaTeX or plain, got {label!r}")
