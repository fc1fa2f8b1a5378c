"""The workers of a pool, each changed only by whoever saw it last.

A `Worker` is a value; the roster holds the newest one of each URL. `swap` puts a new one in the place of the one that
was seen, and refuses if that is not there any more: so an answer that took its time, about an earlier life of an engine
or about weights that are no longer wanted, changes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from pacenote.rollout.worker import State, Worker, worker_url
from pacenote.rollout.worker_errors import Superseded

Listener = Callable[[Worker], None]
_log = logging.getLogger(__name__)


class Roster:
    """Thread-safe.

    Args:
        listener: called after each change of state or incarnation, outside the lock, in the thread that made it.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self._listener = listener
        self._lock = threading.Lock()
        self._workers: dict[str, Worker] = {}
        self._born = 0

    def add(self, worker: Worker) -> Worker:
        """Take in a worker; it gets an incarnation.

        Raises:
            ValueError: there is one of this URL.
        """
        with self._lock:
            if worker.url in self._workers:
                raise ValueError(f"{worker.url} is in the pool already, as {self._workers[worker.url].state}")
            self._born += 1
            worker = self._workers[worker.url] = replace(worker, incarnation=self._born)
        self._tell(worker)
        return worker

    def swap(self, old: Worker, new: Worker, *, reborn: bool = False) -> Worker:
        """Put `new` in the place of `old`; a worker that is gone leaves the roster.

        Args:
            reborn: give it a new incarnation.

        Raises:
            Superseded: `old` is not what stands there.
        """
        with self._lock:
            if self._workers.get(old.url) is not old:
                raise Superseded(f"{old.url} was changed meanwhile")
            if reborn:
                self._born += 1
                new = replace(new, incarnation=self._born)
            if new.state is State.GONE:
                del self._workers[old.url]
            else:
                self._workers[old.url] = new
        if (old.state, old.incarnation) != (new.state, new.incarnation):
            self._tell(new)
        return new

    def swap_all(self, change: Callable[[Worker], Worker]) -> None:
        """Change all workers at once: nobody sees some of them changed and others not."""
        with self._lock:
            before = dict(self._workers)
            self._workers = {url: change(worker) for url, worker in before.items()}
            after = list(self._workers.values())
        for worker in after:
            if before[worker.url].state is not worker.state:
                self._tell(worker)

    def find(self, url: str) -> Worker | None:
        """The worker of a URL."""
        with self._lock:
            return self._workers.get(worker_url(url))

    def all(self) -> tuple[Worker, ...]:
        """All of them, in the order in which they were added."""
        with self._lock:
            return tuple(self._workers.values())

    def _tell(self, worker: Worker) -> None:
        if self._listener is not None:
            try:
                self._listener(worker)
            except Exception:  # somebody else's code must not stop a worker half way
                _log.exception("the listener failed on %s", worker.url)
