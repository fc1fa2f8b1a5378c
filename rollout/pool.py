"""A pool of workers behind one router: add, remove, watch, exchange weights, leave nothing behind.

    with WorkerPool("http://router:30000", weight_version="7", restart=start_engine) as pool:
        pool.add("http://node1:30001", role="prefill", bootstrap_port=8998)
        pool.add("http://node2:30001", role="decode")
        pool.watch()
        for worker in pool.serving(): ...
        with pool.updating("8"):
            push(...)  # to all of pool.workers()

A worker is at the router only while it was seen to serve the weights that it should.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType

from pacenote.rollout.farewell import Farewell
from pacenote.rollout.lifecycle import Lifecycle, PoolConfig, Restart
from pacenote.rollout.registration import Router, RouterConfig
from pacenote.rollout.roster import Listener, Roster
from pacenote.rollout.worker import State, Worker, worker_url
from pacenote.rollout.worker_errors import IncompletePool, Superseded, WorkerError
from pacenote.rollout.worker_probe import Probe

_log = logging.getLogger(__name__)


class WorkerPool:
    """Threads may share it.

    Args:
        router: its configuration or base URL; None for workers that are asked directly, without a router.
        weight_version: what the workers should serve.
        config: see `PoolConfig`.
        restart: see `lifecycle.Restart`.
        listener: called after each change of a worker's state or incarnation.
        leave: deregister what was added when the process or the `with` block ends.

    Raises:
        ValueError: see `RouterConfig`.
    """

    def __init__(
        self,
        router: RouterConfig | str | None,
        *,
        weight_version: str,
        config: PoolConfig | None = None,
        restart: Restart | None = None,
        listener: Listener | None = None,
        leave: bool = True,
    ) -> None:
        self.config = config or PoolConfig()
        self.router = None if router is None else Router(router)
        self._version = weight_version
        self._roster = Roster(listener)
        self._probe = Probe(timeout=self.config.timeout, generate_timeout=self.config.generate_timeout)
        self._lifecycle = Lifecycle(self._roster, self.router, self._probe, self.config, restart)
        self._turns: dict[str, threading.Lock] = {}
        self._updating = threading.Lock()
        self._stop = threading.Event()
        self._watching: set[str] | None = None
        self._watch_lock = threading.Lock()
        self._farewell = Farewell(self._deregister, timeout=self.config.exit_timeout) if leave else None

    @property
    def weight_version(self) -> str:
        """What the workers should serve."""
        return self._version

    def add(self, url: str, role: str = "regular", bootstrap_port: int | None = None, *, keep: bool = False) -> Worker:
        """Verify a running engine's weights, register it and wait until it is current.

        Args:
            keep: if it does not become current keep it in the pool, quarantined, and return it: checks bring it up
                when it is well, or restart it.

        Raises:
            ValueError: arguments that do not fit (a prefill worker without its bootstrap port, for example), or a URL
                that is in the pool.
            WorkerError: it did not become current, and `keep` is off; it is not in the pool, and off the router.
        """
        if self._stop.is_set():
            raise ValueError(f"expected an open pool to add {url} to, this one is closed: make a new one")
        worker = Worker(url=url, role=role, bootstrap_port=bootstrap_port, wanted=self._version)
        if self._farewell is not None:
            self._farewell.arm()
        with self._turn(worker.url):
            worker = self._roster.add(worker)
            try:
                if worker.wanted != self._version:  # weights were exchanged in this moment
                    worker = self._roster.swap(worker, replace(worker, wanted=self._version))
                worker = self._lifecycle.bring_up(worker)
            except BaseException as error:
                if not (keep and isinstance(error, WorkerError)):
                    self._forget(worker.url)
                    raise
                worker = self._find(worker.url)
        self._watch_one(worker.url)
        return worker

    def remove(self, url: str, *, drain: float = 0.0) -> None:
        """Give a worker no more work, take it off the router, confirm that, and forget it.

        Args:
            drain: seconds to wait after that for its running requests to end.

        Raises:
            ValueError: it is not in the pool.
            WorkerError: the router did not remove it, or the requests did not end in time (it is forgotten then). The
                first leaves it `draining`: it gets no work, and `remove` may be called again.
        """
        while True:
            worker = self._find(url)
            if worker.state is State.DRAINING:
                break
            try:
                worker = self._roster.swap(worker, worker.to(State.DRAINING, reason="removed"))
                break
            except Superseded:
                continue
        if self.router is not None:
            self.router.remove(worker.url)
        try:
            self._drained(worker, drain)
        finally:
            self._forget(worker.url)

    def workers(self) -> tuple[Worker, ...]:
        """All workers, in the order in which they were added."""
        return self._roster.all()

    def is_current(self, url: str, incarnation: int) -> bool:
        """Whether the worker is current and still in this incarnation: an answer that it was asked for in another one
        is late, and not to be trusted."""
        worker = self._roster.find(url)
        return worker is not None and worker.state is State.CURRENT and worker.incarnation == incarnation

    @property
    def missing(self) -> str | None:
        """What the pool lacks to serve; None if nothing.

        Prefill and decode serve only together. Regular workers serve beside an incomplete pair.
        """
        here = [worker for worker in self.workers() if worker.state is State.CURRENT]
        roles = {worker.role for worker in here}
        for role, other in (("prefill", "decode"), ("decode", "prefill")):
            if role in roles and other not in roles:
                return f"there is a {role} worker and no current {other} worker: add one with role {other}"
        if not roles:
            known = ", ".join(f"{w.url} {w.state}{f' ({w.reason})' if w.reason else ''}" for w in self.workers())
            return f"no worker is current: {known or 'the pool is empty'}"
        return None

    def serving(self, role: str | None = None) -> tuple[Worker, ...]:
        """The workers that may be given work, of one role if asked for; never empty.

        Raises:
            IncompletePool: there are none; the text says what is missing.
        """
        here = [worker for worker in self.workers() if worker.state is State.CURRENT]
        roles = {worker.role for worker in here}
        paired = {"prefill", "decode"} <= roles
        found = tuple(w for w in here if (w.role == "regular" or paired) and role in (None, w.role))
        if not found:
            raise IncompletePool(self.missing or f"no {role} worker is current")
        return found

    def check(self, url: str) -> Worker | None:
        """Look at a worker once, as `watch` does all the time. Returns it; None if it is gone.

        Does nothing while weights are being exchanged: a paused engine passes no health check.

        Raises:
            ValueError: it is not in the pool.
        """
        self._find(url)
        with self._turn(worker_url(url)):
            worker = self._roster.find(url)
            if worker is not None and not self._updating.locked():
                self._lifecycle.check(worker)
        return self._roster.find(url)

    def check_router(self) -> tuple[str, ...]:
        """Compare the router's listing with the pool once, as `watch` does: a worker that a restarted router has
        forgotten is brought up again by its next check; one that it still has, and should not, is removed.

        Returns:
            URLs of both kinds.

        Raises:
            WorkerError: the router did not answer, or refused.
        """
        if self.router is None:
            return ()
        before = self._roster.all()
        listed = {entry.url for entry in self.router.listing() if not entry.draining}
        odd = [w for w in before if w.at_router != (w.url in listed)]
        return tuple(worker.url for worker in odd if self._reconcile(worker))

    @contextmanager
    def updating(self, version: str) -> Iterator[None]:
        """Around the exchange of weights. On the way out, error or not, `version` is what is wanted: whoever serves it
        stays, whoever does not is off the router when this returns. Nobody is checked meanwhile.

        Raises:
            WorkerError: another exchange is going on.
        """
        if not self._updating.acquire(blocking=False):
            raise WorkerError("the pool's weights are being exchanged already")
        try:
            try:
                yield
            finally:
                self._judge_all(version)
        finally:
            self._updating.release()

    def watch(self) -> None:
        """From now on check every worker, and the router, in background threads; returns at once."""
        with self._watch_lock:
            if self._watching is not None:
                return
            self._watching = set()
        if self.router is not None:
            threading.Thread(target=self._watch_router, name="pacenote-router", daemon=True).start()
        for worker in self.workers():
            self._watch_one(worker.url)

    def close(self) -> None:
        """Stop watching; deregister everything unless `leave` is off. Takes at most `exit_timeout` seconds. Safe to
        call twice."""
        self._stop.set()
        if self._farewell is not None:
            self._farewell.say()

    def __enter__(self) -> WorkerPool:
        """The pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _turn(self, url: str) -> threading.Lock:
        """Held by whoever works on the worker."""
        return self._turns.setdefault(url, threading.Lock())

    def _find(self, url: str) -> Worker:
        worker = self._roster.find(url)
        if worker is None:
            known = ", ".join(w.url for w in self.workers()) or "none"
            raise ValueError(f"{url} is not in the pool; its workers are: {known}")
        return worker

    def _forget(self, url: str) -> None:
        """Drop a worker that is not at the router."""
        while (worker := self._roster.find(url)) is not None:
            try:
                if worker.state is not State.DRAINING:
                    worker = self._roster.swap(worker, worker.to(State.DRAINING))
                self._roster.swap(worker, worker.to(State.GONE))
            except Superseded:
                continue

    def _drained(self, worker: Worker, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while seconds > 0 and (running := self._probe.running(worker.url)):
            if time.monotonic() > deadline:
                raise WorkerError(f"{worker.url} still has {running} requests after {seconds:g} s; it was removed")
            time.sleep(0.1)

    def _judge_all(self, version: str) -> None:
        before = self._roster.all()
        with ThreadPoolExecutor(max_workers=max(1, min(32, len(before)))) as threads:
            found = list(threads.map(lambda worker: self._lifecycle.judge(worker, version), before))
        judged = {id(worker): after for worker, after in zip(before, found, strict=True)}
        self._version = version
        # One that changed meanwhile was not judged: what was seen of it is forgotten, and it has to prove itself.
        self._roster.swap_all(lambda worker: judged.get(id(worker)) or _unproven(worker, version))
        stale = [w.url for w in self._roster.all() if not w.at_router]
        if self.router is not None and stale:
            try:
                self.router.remove(*stale)
            except WorkerError as error:
                _log.warning("the router may still list %s: %s", ", ".join(stale), error)

    def _reconcile(self, worker: Worker) -> bool:
        """Act on a difference, unless the worker is being worked on or has changed since it was seen."""
        turn = self._turn(worker.url)
        if not turn.acquire(blocking=False):
            return False
        try:
            if worker.at_router:
                self._roster.swap(worker, worker.to(State.STARTING, reason="the router had forgotten it"))
            elif self.router is not None and self._roster.find(worker.url) is worker:
                self.router.remove(worker.url)
            return True
        except Superseded:
            return False
        finally:
            turn.release()

    def _watch_one(self, url: str) -> None:
        with self._watch_lock:
            if self._watching is None or url in self._watching:
                return
            self._watching.add(url)
        threading.Thread(target=self._watch_worker, args=(url,), name=f"pacenote-{url}", daemon=True).start()

    def _watch_worker(self, url: str) -> None:
        while not self._stop.wait(self.config.health_every):
            try:
                if self.check(url) is None:
                    break
            except ValueError:
                break  # it was removed
            except Exception:  # a bug must not end the watch over an engine
                _log.exception("checking %s failed", url)
        with self._watch_lock:
            if self._watching is not None:
                self._watching.discard(url)
        if not self._stop.is_set() and self._roster.find(url) is not None:
            self._watch_one(url)  # it was added again in this moment

    def _watch_router(self) -> None:
        while not self._stop.wait(self.config.health_every):
            try:
                for url in self.check_router():
                    _log.warning("the router's listing and the pool differed about %s", url)
            except WorkerError as error:
                _log.warning("%s", error)
            except Exception:
                _log.exception("checking the router failed")

    def _deregister(self) -> None:
        """Take everything off the router: runs in the farewell's own thread."""
        self._roster.swap_all(lambda w: w if w.state is State.DRAINING else w.to(State.DRAINING, reason="closed"))
        urls = [worker.url for worker in self._roster.all()]
        if self.router is None or not urls:
            return
        try:
            self.router.remove(*urls, timeout=self.config.exit_timeout)
        except WorkerError as error:
            _log.warning("the router may still list %s: %s", ", ".join(urls), error)


def _unproven(worker: Worker, version: str) -> Worker:
    if worker.at_router:
        return worker.to(State.QUARANTINED, wanted=version, seen=None, reason="it changed while weights were exchanged")
    return replace(worker, wanted=version, seen=None)
