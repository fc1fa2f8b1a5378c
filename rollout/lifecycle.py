"""What moves a worker from one state to the next: looking at its engine, and telling the router.

Each step works on the worker that it was given and swaps in its successor; whoever changed the worker meanwhile wins,
and what the step did at the router is undone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pacenote.rollout.registration import Router
from pacenote.rollout.roster import Roster
from pacenote.rollout.worker import State, Worker
from pacenote.rollout.worker_errors import EngineError, EngineGone, Superseded, WorkerError, WrongWeights
from pacenote.rollout.worker_probe import Probe, Sight

Restart = Callable[[Worker], None]
"""Makes the engine of a worker serve `worker.wanted`: starts it again if it is dead, gives it its weights if it lives.
Called in the thread that watches this worker; may take minutes, and returns once the engine answers. The pool checks
the result; an exception counts as a restart that failed."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """How a pool keeps its workers.

    Attributes:
        health_every: seconds between two checks of a worker: /health and /model_info.
        generate_every: seconds between two thorough ones: /health_generate and /server_info, too. Also after every
            failure.
        fail_after: checks in a row that fail before a worker is taken off the router.
        return_after: checks in a row that go well, weights included, before it comes back.
        restarts: how often an engine is restarted without becoming current before that is given up.
        timeout: seconds for /health and the infos.
        generate_timeout: seconds for /health_generate.
        exit_timeout: seconds that deregistration may take when the process ends.

    Raises:
        ValueError: a number that cannot be.
    """

    health_every: float = 5.0
    generate_every: float = 60.0
    fail_after: int = 3
    return_after: int = 2
    restarts: int = 3
    timeout: float = 5.0
    generate_timeout: float = 30.0
    exit_timeout: float = 5.0

    def __post_init__(self) -> None:
        seconds = (self.health_every, self.generate_every, self.timeout, self.generate_timeout, self.exit_timeout)
        if min(seconds) <= 0 or min(self.fail_after, self.return_after) < 1 or self.restarts < 0:
            raise ValueError(
                f"expected seconds above 0, fail_after and return_after of at least 1 and restarts >= 0, got {self}"
            )


class Lifecycle:
    """Moves workers. At most one call for a worker at a time; calls for others may run beside it.

    Args:
        roster: where workers stand.
        router: where they are registered; None for a pool without one, whose workers are asked directly.
        probe: asks their engines.
        config: see `PoolConfig`.
        restart: see `Restart`; None leaves dead engines to somebody else.
    """

    def __init__(
        self, roster: Roster, router: Router | None, probe: Probe, config: PoolConfig, restart: Restart | None
    ) -> None:
        self._roster = roster
        self._router = router
        self._probe = probe
        self._config = config
        self._restart = restart
        self._thorough: dict[str, float] = {}  # URL -> when it was last looked at thoroughly

    def bring_up(self, worker: Worker) -> Worker:
        """From `starting` to `current`: verify the weights, register, confirm, verify again.

        Raises:
            WorkerError: it did not get there; it is quarantined and off the router.
        """
        swap = self._roster.swap
        try:
            sight = self._verified(worker)
            known = replace(worker, seen=sight.version, instance=sight.instance)
            worker = swap(worker, known, reborn=worker.restarted(sight.instance))
            if self._router is not None:
                self._router.add(worker)
            worker = swap(worker, worker.to(State.REGISTERED))
            if self._router is not None:
                self._router.confirm(worker)
            worker = swap(worker, worker.to(State.CONFIRMED))
            again = self._probe.look(worker.url)
            again.check(worker)
            if worker.restarted(again.instance):
                raise EngineError(f"{worker.url} was started again while it was being registered")
            clean = worker.to(State.CURRENT, failures=0, successes=0, restarts=0, reason="")
            return swap(worker, clean)
        except Superseded:
            self._undo(worker.url)
            raise
        except BaseException as error:  # also Ctrl-C: nothing may stay registered half way
            self._quarantine(worker, str(error) or type(error).__name__)
            raise

    def check(self, worker: Worker) -> None:
        """Look at a worker once and do what follows from it. What goes wrong is in its `reason`, and in the log."""
        try:
            if worker.state is State.CURRENT:
                self._check_current(worker)
            elif worker.state is State.QUARANTINED:
                self._check_quarantined(worker)
            elif worker.state is not State.DRAINING:
                if worker.state is not State.STARTING:  # a step that was interrupted
                    worker = self._roster.swap(worker, worker.to(State.STARTING))
                self.bring_up(worker)
        except Superseded:
            pass
        except WorkerError as error:
            _log.info("%s: %s", worker.url, error)

    def judge(self, worker: Worker, version: str) -> Worker:
        """What becomes of a worker when `version` is wanted from now on. Asks the engine; changes nothing.

        A worker that does not serve it, or does not say, comes back quarantined.
        """
        try:
            seen = self._probe.version(worker.url)
        except EngineError as error:
            seen, reason = None, f"it did not say that it serves weight version {version!r}: {error}"
        else:
            reason = f"expected it to serve weight version {version!r}, it serves {seen!r}"
        if seen == version or not worker.at_router:
            return replace(worker, wanted=version, seen=seen)
        return worker.to(State.QUARANTINED, wanted=version, seen=seen, reason=reason, successes=0)

    def take_off(self, worker: Worker, reason: str, *, instance: Mapping[str, str] | None = None) -> None:
        """Quarantine a worker and take it off the router.

        Args:
            instance: what its engine says about its start, if that is another one than before; {} if its life ended.
        """
        changes = {} if instance is None else {"instance": instance, "seen": None}
        gone = worker.to(State.QUARANTINED, reason=reason, successes=0, **changes)
        self._roster.swap(worker, gone, reborn=instance is not None)
        _log.warning("%s is quarantined: %s", worker.url, reason)
        self._undo(worker.url)

    def _verified(self, worker: Worker) -> Sight:
        self._probe.health(worker.url)
        sight = self._probe.look(worker.url)
        sight.check(worker)
        self._probe.health(worker.url, generate=True)
        self._thorough[worker.url] = time.monotonic()
        return sight

    def _check_current(self, worker: Worker) -> None:
        overdue = time.monotonic() - self._thorough.get(worker.url, 0.0) >= self._config.generate_every
        try:
            self._probe.health(worker.url)
            if overdue or worker.failures:
                self._look_thoroughly(worker)
            else:
                self._check_version(worker, self._probe.version(worker.url))
        except Superseded:
            raise
        except WorkerError as error:
            if self._roster.find(worker.url) is not worker:
                return  # it was dealt with
            failures = worker.failures + 1
            if failures < self._config.fail_after:
                self._roster.swap(worker, replace(worker, failures=failures))
                return
            self.take_off(
                self._roster.swap(worker, replace(worker, failures=failures)),
                f"{failures} health checks in a row failed, the last one: {error}",
                instance={} if isinstance(error, EngineGone) else None,
            )
            return
        if worker.failures:
            self._roster.swap(worker, replace(worker, failures=0))

    def _look_thoroughly(self, worker: Worker) -> None:
        sight = self._probe.look(worker.url)
        if worker.restarted(sight.instance):
            self.take_off(worker, "its engine was started again behind our back", instance=sight.instance)
            raise EngineError(f"{worker.url} is in another life")
        self._check_version(worker, sight.version)
        self._probe.health(worker.url, generate=True)
        self._thorough[worker.url] = time.monotonic()

    def _check_version(self, worker: Worker, version: str) -> None:
        if version != worker.wanted:
            text = f"expected it to serve weight version {worker.wanted!r}, it serves {version!r}"
            self.take_off(worker, text)
            raise WrongWeights(f"{worker.url}: {text}")

    def _check_quarantined(self, worker: Worker) -> None:
        try:
            self._probe.health(worker.url)
            sight = self._probe.look(worker.url)
            known = replace(worker, instance=sight.instance, seen=sight.version)
            worker = self._roster.swap(worker, known, reborn=worker.restarted(sight.instance))
            sight.check(worker)
            self._probe.health(worker.url, generate=True)
        except Superseded:
            raise
        except WorkerError as error:
            failures = worker.failures + 1
            if isinstance(error, EngineGone) and worker.seen is not None:  # its life has ended
                worker = self._roster.swap(worker, replace(worker, seen=None, instance={}), reborn=True)
            worker = self._roster.swap(worker, replace(worker, failures=failures, successes=0, reason=str(error)))
            dead = isinstance(error, EngineGone) or failures >= 2 * self._config.fail_after
            if dead or isinstance(error, WrongWeights):
                self._start_again(worker)
            return
        well = replace(worker, failures=0, successes=worker.successes + 1)
        worker = self._roster.swap(worker, well)
        if worker.successes >= self._config.return_after:
            self.bring_up(self._roster.swap(worker, worker.to(State.STARTING)))

    def _start_again(self, worker: Worker) -> None:
        if self._restart is None or worker.restarts >= self._config.restarts:
            return
        number = worker.restarts + 1
        worker = self._roster.swap(worker, replace(worker, restarts=number, seen=None, instance={}), reborn=True)
        _log.warning("%s: restart %d of %d: %s", worker.url, number, self._config.restarts, worker.reason)
        try:
            self._restart(worker)
        except Exception as error:  # somebody else's code: whatever it raises, this worker stays quarantined
            reason = f"restart {number} of {self._config.restarts} failed: {type(error).__name__}: {error}"
            self._roster.swap(worker, replace(worker, reason=reason))
            return
        self._roster.swap(worker, replace(worker, failures=0, reason="restarted; it has to prove itself"))

    def _quarantine(self, worker: Worker, reason: str) -> None:
        try:
            self.take_off(worker, reason)
        except Superseded:
            self._undo(worker.url)

    def _undo(self, url: str) -> None:
        """Take a worker off the router that should not be there, as far as the router lets us.

        What stays is removed by `WorkerPool.check_router` later.
        """
        now = self._roster.find(url)
        if self._router is None or (now is not None and now.at_router):
            return
        try:
            self._router.remove(url)
        except WorkerError as error:
            _log.warning("the router may still list %s: %s", url, error)
