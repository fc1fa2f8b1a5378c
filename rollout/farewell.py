"""Something to be done when the process ends, that never keeps it from ending.

A daemon thread waits for the word, so that nothing has to be started while the interpreter goes down, and whoever gives
the word waits for it for a bounded time, whatever it hangs on. A process that is killed says no farewell.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Farewell:
    """Done once, when `say` is called or the process ends, whichever comes first.

    Args:
        work: what is to be done, in a thread of its own.
        timeout: seconds that are waited for it.
    """

    def __init__(self, work: Callable[[], None], *, timeout: float) -> None:
        self._work = work
        self._timeout = timeout
        self._word, self._done = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._owner: int | None = None  # the process that armed it: a fork must not say its parent's farewell

    def arm(self) -> None:
        """From now on there is something to be done. Safe to call again."""
        with self._lock:
            if self._owner is not None:
                return
            self._owner = os.getpid()
        threading.Thread(target=self._wait, name="pacenote-farewell", daemon=True).start()
        atexit.register(self.say)

    def say(self) -> bool:
        """Do it now; returns whether it was done in time. Nothing is done if `arm` was never called."""
        if self._owner != os.getpid():
            return True
        self._word.set()
        done = self._done.wait(self._timeout)
        if not done:
            _log.warning("gave up on deregistering workers after %g s", self._timeout)
        atexit.unregister(self.say)
        return done

    def _wait(self) -> None:
        self._word.wait()
        try:
            self._work()
        finally:
            self._done.set()
