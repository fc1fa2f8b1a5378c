"""Ctrl-C: the first asks the run to stop at the next safe place, the second stops it where it is."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from pacenote.trainer.errors import Interrupted


class Interrupt:
    """While entered, SIGINT and SIGTERM set a flag that `check` turns into `Interrupted`; a second one is immediate."""

    def __init__(self) -> None:
        """Nothing is asked yet."""
        self.asked = False
        self._before: dict[signal.Signals, object] = {}

    def check(self) -> None:
        """Raise if a stop was asked.

        Raises:
            Interrupted: at a place where nothing is half done.
        """
        if self.asked:
            raise Interrupted("stopped as asked")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> Interrupt:
        """Take over the signals; outside the main thread, where Python allows no handlers, the flag stays manual."""
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._before[kind] = signal.signal(kind, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
