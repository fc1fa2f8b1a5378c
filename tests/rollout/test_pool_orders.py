"""Whatever happens to engines, router and weights in whatever order: what is at the router serves what it should."""

from __future__ import annotations

from contextlib import suppress

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pacenote.rollout.lifecycle import PoolConfig
from pacenote.rollout.pool import WorkerPool
from pacenote.rollout.registration import RouterConfig
from pacenote.rollout.worker import State, Worker
from pacenote.rollout.worker_errors import IncompletePool, WorkerError
from tests.rollout.stand_in import StandIn
from tests.rollout.stand_in_router import StandInRouter

ROLES = {"regular": None, "prefill": 8998, "decode": None}
CONFIG = PoolConfig(generate_every=1e-6, fail_after=2, return_after=2, timeout=5.0)
engines = st.sampled_from(list(ROLES))


class Orders(RuleBasedStateMachine):
    """Three engines of three roles. `lives`: for each incarnation that was ever current, the engine's life then."""

    def __init__(self) -> None:
        super().__init__()
        self.engines = {role: StandIn(role) for role in ROLES}
        self.down: set[str] = set()
        self.router = StandInRouter()
        self.lives: dict[int, int] = {}
        self.fresh: set[str] = set()  # roles that were looked at since anything happened to them
        self.wrong: list[str] = []
        self.excused = False  # the router has been hindered since it was last compared with the pool
        config = RouterConfig(url=self.router.url, retries=0, confirm=0.05)
        self.pool = WorkerPool(
            config, weight_version="1", config=CONFIG, restart=self.restart, listener=self.note, leave=False
        )

    def note(self, worker: Worker) -> None:
        if worker.state is State.CURRENT:
            life = self.engines[worker.role].life
            if self.lives.setdefault(worker.incarnation, life) != life:
                self.wrong.append(f"incarnation {worker.incarnation} has two lives")

    def restart(self, worker: Worker) -> None:
        if worker.url in self.router.workers and not self.excused:
            self.wrong.append(f"{worker.url} was restarted while it was at the router")
        if worker.role in self.down:
            self.engines[worker.role].start()
            self.down.discard(worker.role)
        self.engines[worker.role].version = worker.wanted

    @initialize()
    def begin(self) -> None:
        for role in ROLES:
            self.add(role)
        assert len(self.pool.serving()) == 3

    @rule(role=engines)
    def add(self, role: str) -> None:
        with suppress(WorkerError, ValueError):
            self.pool.add(self.engines[role].url, role, ROLES[role])
            self.fresh.add(role)

    @rule(role=engines)
    def remove(self, role: str) -> None:
        with suppress(WorkerError, ValueError):
            self.pool.remove(self.engines[role].url)

    @rule(role=engines)
    def check(self, role: str) -> None:
        with suppress(ValueError):
            self.pool.check(self.engines[role].url)
            self.fresh.add(role)

    @rule()
    def check_all(self) -> None:
        for role in ROLES:
            self.check(role)

    @rule()
    def check_router(self) -> None:
        with suppress(WorkerError):
            self.pool.check_router()

    @rule(role=engines)
    def die(self, role: str) -> None:
        if role not in self.down:
            self.engines[role].stop()
            self.down.add(role)
            self.fresh.discard(role)

    @rule(role=engines, version=st.sampled_from([None, None, "1", "default"]))
    def start_behind_our_back(self, role: str, version: str | None) -> None:
        self.die(role)
        self.engines[role].version = version or self.pool.weight_version
        self.engines[role].start()
        self.down.discard(role)

    @rule(role=engines, sick=st.booleans())
    def fall_sick_or_recover(self, role: str, sick: bool) -> None:
        self.engines[role].sick = sick

    @rule(version=st.sampled_from(["1", "2"]), who=st.sets(engines))
    def exchange(self, version: str, who: set[str]) -> None:
        with self.pool.updating(version):
            for role in who:
                self.engines[role].version = version

    @rule()
    def router_forgets(self) -> None:
        self.router.workers.clear()

    @rule(calls=st.integers(0, 4))
    def hinder_the_router(self, calls: int) -> None:
        self.router.busy, self.router.sticky, self.excused = calls, not calls, True

    @invariant()
    def work_goes_only_to_verified_workers(self) -> None:
        assert not self.wrong
        workers = self.pool.workers()
        for worker in workers:
            assert not worker.at_router or worker.seen == worker.wanted
            assert worker.wanted == self.pool.weight_version
            assert self.pool.is_current(worker.url, worker.incarnation) == (worker.state is State.CURRENT)
            assert not any(self.pool.is_current(worker.url, old) for old in self.lives if old != worker.incarnation)
            if worker.state is State.CURRENT and worker.role in self.fresh and not worker.failures:
                engine = self.engines[worker.role]
                assert self.lives[worker.incarnation] == engine.life
        try:
            serving = self.pool.serving()
        except IncompletePool:
            serving = ()
        current = {worker.role for worker in workers if worker.state is State.CURRENT}
        assert {w.role for w in serving} == (current if {"prefill", "decode"} <= current else current & {"regular"})

    @invariant()
    @precondition(lambda self: not self.excused)
    def the_router_has_no_others(self) -> None:
        at_router = {worker.url for worker in self.pool.workers() if worker.at_router}
        known = {worker.url for worker in self.pool.workers()}
        assert {url for url in self.router.workers if url in known} <= at_router

    @rule()
    @precondition(lambda self: self.excused)
    def router_recovers(self) -> None:
        self.router.busy, self.router.sticky = 0, False
        self.pool.check_router()
        self.excused = False

    def teardown(self) -> None:
        """Left alone, everything comes right."""
        self.router.busy, self.router.sticky = 0, False
        for engine in self.engines.values():
            engine.sick = False
        for worker in self.pool.workers():
            if worker.state is State.DRAINING:
                self.pool.remove(worker.url)
        for _ in range(8):
            self.pool.check_router()
            for worker in self.pool.workers():
                self.pool.check(worker.url)
        stuck = [w for w in self.pool.workers() if w.state is not State.CURRENT and w.restarts < CONFIG.restarts]
        assert not stuck
        assert {w.url for w in self.pool.workers() if w.at_router} == set(self.router.workers) & {
            w.url for w in self.pool.workers()
        }
        for role, engine in self.engines.items():
            if role not in self.down:
                engine.stop()
        self.router.stop()


TestOrders = Orders.TestCase
TestOrders.settings = settings(
    max_examples=20,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
