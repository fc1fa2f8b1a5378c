"""A pool's workers: verified before they are routable, quarantined, restarted, exchanged weights, and deregistered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import pacenote
from pacenote.rollout.lifecycle import PoolConfig
from pacenote.rollout.pool import WorkerPool
from pacenote.rollout.registration import RouterConfig
from pacenote.rollout.worker import State, Worker
from pacenote.rollout.worker_errors import (
    EngineError,
    IncompletePool,
    NotConfirmed,
    RoleMismatch,
    WorkerError,
    WrongWeights,
)
from tests.rollout.gateways import ROUTER_032, SMG, gateway
from tests.rollout.stand_in import StandIn
from tests.rollout.stand_in_router import StandInRouter

NOW = PoolConfig(health_every=0.05, generate_every=1e-6, fail_after=2, return_after=2, timeout=2.0)
"""Every check is a thorough one."""
RARE = PoolConfig(health_every=0.05, generate_every=1000.0, fail_after=2, return_after=2, timeout=2.0)


def lacking(pool: WorkerPool) -> str | None:
    """What it lacks to serve."""
    return pool.missing


@pytest.fixture
def router() -> Iterator[StandInRouter]:
    with StandInRouter() as router:
        yield router


@pytest.fixture
def engine() -> Iterator[StandIn]:
    with StandIn() as engine:
        yield engine


def quick(router: StandInRouter, **options: object) -> RouterConfig:
    return RouterConfig(**{"url": router.url, "backoff": 0.01, "confirm": 2.0, **options})  # type: ignore[arg-type]


def states(pool: WorkerPool) -> list[str]:
    return [str(worker.state) for worker in pool.workers()]


def wait(what: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if what():
            return True
        time.sleep(0.01)
    return False


def test_a_life_at_a_real_gateway() -> None:
    """Added, current, restarted behind our back, returned in another incarnation, removed; the gateway agrees."""
    seen: list[tuple[str, int]] = []
    with gateway(ROUTER_032) as service, StandIn() as engine:
        note = lambda worker: seen.append((str(worker.state), worker.incarnation))  # noqa: E731
        with pacenote.WorkerPool(service.url, weight_version="1", config=NOW, listener=note) as pool:
            assert pool.router is not None
            first = pool.add(engine.url)
            assert seen == [("starting", 1), ("registered", 1), ("confirmed", 1), ("current", 1)]
            assert [entry.url for entry in pool.router.listing()] == [engine.url]
            assert pool.is_current(engine.url, first.incarnation)
            engine.stop()
            engine.start()
            after = pool.check(engine.url)
            assert after is not None
            assert (after.state, "behind our back" in after.reason) == (State.QUARANTINED, True)
            assert pool.router.listing() == ()
            assert not pool.is_current(engine.url, first.incarnation)
            pool.check(engine.url)
            again = pool.check(engine.url)
            assert again is not None
            assert again.state is State.CURRENT
            assert pool.is_current(engine.url, again.incarnation)
            assert not pool.is_current(engine.url, first.incarnation)  # a late answer is recognised as one
            assert [entry.url for entry in pool.router.listing()] == [engine.url]
            pool.remove(engine.url)
            assert (pool.router.listing(), pool.workers()) == ((), ())
            assert seen[-2:] == [("draining", again.incarnation), ("gone", again.incarnation)]
            third = pool.add(engine.url)
            assert third.incarnation > again.incarnation
        assert pool.router.listing() == ()  # what was left is deregistered on the way out


def test_wrong_weights_are_never_registered(router: StandInRouter, engine: StandIn) -> None:
    with WorkerPool(quick(router), weight_version="2") as pool:
        with pytest.raises(WrongWeights, match=r"expected .* to serve weight version '2', it serves '1'"):
            pool.add(engine.url)
        assert (pool.workers(), router.workers) == ((), {})
        assert "POST /workers" not in router.seen
        engine.version = "2"
        pool.add(engine.url)
        assert list(router.workers) == [engine.url]


def test_weights_that_change_while_it_is_registered(router: StandInRouter, engine: StandIn) -> None:
    """They are verified once more after the router has it: an engine that restarted in between has others."""
    router.after_add = lambda url: setattr(engine, "version", "default")
    with WorkerPool(quick(router), weight_version="1") as pool:
        with pytest.raises(WrongWeights, match="'default'"):
            pool.add(engine.url)
        assert (pool.workers(), router.workers) == ((), {})
        engine.version = "1"

        def reborn(url: str) -> None:
            engine.life += 100

        router.after_add = reborn
        with pytest.raises(EngineError, match="started again while it was being registered"):
            pool.add(engine.url)
        assert (pool.workers(), router.workers) == ((), {})


def test_an_engine_in_another_role(router: StandInRouter) -> None:
    with WorkerPool(quick(router), weight_version="1") as pool, StandIn("decode") as decode:
        with pytest.raises(RoleMismatch, match="start it with --disaggregation-mode null, or give --role decode"):
            pool.add(decode.url)
        with StandIn("prefill", bootstrap_port=9001) as prefill:
            with pytest.raises(RoleMismatch, match="was given bootstrap port 8998, but the engine's own is 9001"):
                pool.add(prefill.url, "prefill", 8998)
            with pytest.raises(ValueError, match="needs its bootstrap port"):
                pool.add(prefill.url, "prefill")
        assert (pool.workers(), router.workers) == ((), {})


def test_half_a_pair_serves_nothing(router: StandInRouter) -> None:
    with (
        WorkerPool(quick(router), weight_version="1", config=NOW) as pool,
        StandIn("prefill") as prefill,
        StandIn("decode") as decode,
        StandIn() as regular,
    ):
        with pytest.raises(IncompletePool, match="the pool is empty"):
            pool.serving()
        pool.add(prefill.url, "prefill", 8998)
        assert lacking(pool) == "there is a prefill worker and no current decode worker: add one with role decode"
        with pytest.raises(IncompletePool, match="no current decode worker"):
            pool.serving()
        pool.add(decode.url, "decode")
        assert lacking(pool) is None
        assert [w.role for w in pool.serving()] == ["prefill", "decode"]
        assert [w.url for w in pool.serving("decode")] == [decode.url]
        prefill.sick = True
        for _ in range(2):
            pool.check(prefill.url)
        assert lacking(pool) == "there is a decode worker and no current prefill worker: add one with role prefill"
        with pytest.raises(IncompletePool):
            pool.serving("decode")
        pool.add(regular.url)
        assert [w.role for w in pool.serving()] == ["regular"]


def test_quarantine_and_return(router: StandInRouter, engine: StandIn) -> None:
    with WorkerPool(quick(router), weight_version="1", config=RARE) as pool:
        life = pool.add(engine.url).incarnation
        engine.sick = True
        pool.check(engine.url)
        assert states(pool) == ["current"]  # once is not yet often enough
        assert list(router.workers) == [engine.url]
        pool.check(engine.url)
        assert (states(pool), router.workers) == (["quarantined"], {})
        with pytest.raises(IncompletePool, match=r"quarantined \(2 health checks in a row failed.* 503"):
            pool.serving()
        engine.sick = False
        pool.check(engine.url)
        assert (states(pool), router.workers) == (["quarantined"], {})
        engine.version = "0"  # well, but with other weights: nothing for traffic
        pool.check(engine.url)
        engine.version = "1"
        pool.check(engine.url)
        assert (states(pool), router.workers) == (["quarantined"], {})
        pool.check(engine.url)
        assert (states(pool), list(router.workers)) == (["current"], [engine.url])
        assert pool.is_current(engine.url, life)  # the same life: it was never started again


def test_a_failure_that_passes_is_forgotten(router: StandInRouter, engine: StandIn) -> None:
    with WorkerPool(quick(router), weight_version="1", config=RARE) as pool:
        pool.add(engine.url)
        for sick in (True, False) * 4:
            engine.sick = sick
            pool.check(engine.url)
        assert states(pool) == ["current"]


def test_generation_is_asked_for_rarely(router: StandInRouter, engine: StandIn) -> None:
    with WorkerPool(quick(router), weight_version="1", config=RARE) as pool:
        pool.add(engine.url)
        engine.asked.clear()
        for _ in range(5):
            pool.check(engine.url)
        assert engine.asked == {"/health": 5, "/model_info": 5}


def test_other_weights_leave_the_router_at_once(router: StandInRouter, engine: StandIn) -> None:
    with WorkerPool(quick(router), weight_version="1", config=RARE) as pool:
        pool.add(engine.url)
        engine.version = "default"
        pool.check(engine.url)
        assert (states(pool), router.workers) == (["quarantined"], {})


def test_a_dead_engine_is_restarted_with_its_weights_before_traffic(router: StandInRouter, engine: StandIn) -> None:
    asked: list[Worker] = []

    def restart(worker: Worker) -> None:
        assert router.workers == {}
        asked.append(worker)
        if len(asked) == 1:
            raise OSError("no such machine")
        if len(asked) == 2:  # it starts with what it was built with
            engine.version = "default"
            engine.start()
        else:
            engine.version = worker.wanted

    with WorkerPool(quick(router), weight_version="1", config=NOW, restart=restart) as pool:
        life = pool.add(engine.url).incarnation
        engine.stop()
        for _ in range(3):
            pool.check(engine.url)
        [worker] = pool.workers()
        assert worker.reason == "restart 1 of 3 failed: OSError: no such machine"
        for _ in range(3):
            pool.check(engine.url)
            assert states(pool) == ["quarantined"]
            assert router.workers == {}
        assert [w.wanted for w in asked] == ["1", "1", "1"]
        pool.check(engine.url)
        assert (states(pool), list(router.workers)) == (["current"], [engine.url])
        assert not pool.is_current(engine.url, life)
        assert pool.workers()[0].restarts == 0


def test_restarts_have_an_end(router: StandInRouter, engine: StandIn) -> None:
    asked: list[Worker] = []
    with WorkerPool(quick(router), weight_version="1", config=NOW, restart=asked.append) as pool:
        pool.add(engine.url)
        engine.stop()
        for _ in range(12):
            pool.check(engine.url)
        assert (len(asked), states(pool)) == (3, ["quarantined"])
        assert len({worker.incarnation for worker in asked}) == 3
        engine.start()  # by somebody else
        for _ in range(2):
            pool.check(engine.url)
        assert states(pool) == ["current"]


def test_kept_though_it_is_not_there_yet(router: StandInRouter, engine: StandIn) -> None:
    engine.stop()
    with WorkerPool(quick(router), weight_version="1", config=NOW, restart=lambda _: engine.start()) as pool:
        with pytest.raises(EngineError, match="nobody listens"):
            pool.add(engine.url)
        assert pool.add(engine.url, keep=True).state is State.QUARANTINED
        with pytest.raises(ValueError, match="is in the pool already, as quarantined"):
            pool.add(engine.url)
        pool.watch()
        assert wait(lambda: states(pool) == ["current"])
        assert list(router.workers) == [engine.url]


def test_the_watch(router: StandInRouter, engine: StandIn) -> None:
    """Threads do it all: death, restart, a router that forgot, one that kept what it should not."""
    with WorkerPool(quick(router), weight_version="1", config=NOW, restart=lambda _: engine.start()) as pool:
        pool.watch()
        pool.watch()
        first = pool.add(engine.url).incarnation
        engine.stop()
        assert wait(lambda: states(pool) == ["current"] and not pool.is_current(engine.url, first))
        router.workers.clear()
        assert wait(lambda: list(router.workers) == [engine.url] and states(pool) == ["current"])
        engine.sick = router.sticky = True
        assert wait(lambda: states(pool) == ["quarantined"])
        assert list(router.workers) == [engine.url]  # the router would not let go
        router.sticky = False
        assert wait(lambda: not router.workers)
        pool.remove(engine.url)
        assert wait(lambda: f"pacenote-{engine.url}" not in {thread.name for thread in threading.enumerate()})


def test_the_router_forgot(router: StandInRouter, engine: StandIn) -> None:
    with WorkerPool(quick(router), weight_version="1", config=RARE) as pool:
        pool.add(engine.url)
        assert pool.check_router() == ()
        router.workers.clear()
        router.workers["http://somebody:1"] = {"url": "http://somebody:1", "worker_type": "regular"}
        assert pool.check_router() == (engine.url,)
        assert lacking(pool) == f"no worker is current: {engine.url} starting (the router had forgotten it)"
        pool.check(engine.url)
        assert set(router.workers) == {engine.url, "http://somebody:1"}  # what is not ours is left alone
        router.stop()
        with pytest.raises(WorkerError):
            pool.check_router()
        assert states(pool) == ["current"]
        router.start()


def test_exchanging_weights(router: StandInRouter) -> None:
    """Whoever did not take the new weights is off the router when the block ends, and returns once it has them."""
    with (
        WorkerPool(quick(router), weight_version="1", config=RARE) as pool,
        StandIn() as good,
        StandIn() as stale,
        StandIn() as dead,
    ):
        for one in (good, stale, dead):
            pool.add(one.url)
        with pool.updating("2"):
            good.version = "2"
            good.sick = True  # paused
            for _ in range(5):
                pool.check(good.url)
            with pytest.raises(WorkerError, match="exchanged already"), pool.updating("3"):
                pass
            good.sick = False
            dead.stop()
        assert pool.weight_version == "2"
        assert states(pool) == ["current", "quarantined", "quarantined"]
        assert list(router.workers) == [good.url]
        assert pool.workers()[1].reason == "expected it to serve weight version '2', it serves '1'"
        stale.version = "2"
        for _ in range(2):
            pool.check(stale.url)
        assert states(pool) == ["current", "current", "quarantined"]
        dead.start()


def test_an_exchange_that_fails_half_way(router: StandInRouter) -> None:
    with WorkerPool(quick(router), weight_version="1", config=RARE) as pool, StandIn() as took, StandIn() as did_not:
        for one in (took, did_not):
            pool.add(one.url)

        def push() -> None:
            with pool.updating("2"):
                took.version = "2"
                raise OSError("broken pipe")

        with pytest.raises(OSError, match="broken pipe"):
            push()
        assert list(router.workers) == [took.url]
        assert states(pool) == ["current", "quarantined"]


def test_a_look_that_took_longer_than_the_exchange(router: StandInRouter, engine: StandIn) -> None:
    """What was seen before the exchange says nothing about what is wanted after it."""
    with WorkerPool(quick(router), weight_version="1", config=RARE) as pool:
        pool.add(engine.url)
        held, go = threading.Event(), threading.Event()

        def hold(path: str) -> None:
            if path == "/health":
                held.set()
                go.wait(10)

        engine.on = hold
        look = threading.Thread(target=pool.check, args=(engine.url,))
        look.start()
        held.wait(10)
        engine.on = lambda path: None
        with pool.updating("2"):
            engine.version = "2"
        go.set()
        look.join(10)
        assert (states(pool), list(router.workers)) == (["current"], [engine.url])


def test_removed_while_it_is_being_brought_up(router: StandInRouter, engine: StandIn) -> None:
    """`remove` does not wait for it, and what comes after undoes itself."""
    with WorkerPool(quick(router), weight_version="1", config=RARE) as pool:
        router.after_add = lambda url: pool.remove(url)
        with pytest.raises(WorkerError, match="changed meanwhile"):
            pool.add(engine.url)
        assert (pool.workers(), router.workers) == ((), {})


def test_removal_that_the_router_does_not_carry_out(router: StandInRouter, engine: StandIn) -> None:
    with WorkerPool(quick(router, confirm=0.2), weight_version="1", config=RARE) as pool:
        life = pool.add(engine.url).incarnation
        router.sticky = True
        with pytest.raises(NotConfirmed, match="still lists"):
            pool.remove(engine.url)
        assert states(pool) == ["draining"]  # it gets no work
        assert not pool.is_current(engine.url, life)
        router.sticky = False
        pool.remove(engine.url)
        assert (pool.workers(), router.workers) == ((), {})
        with pytest.raises(ValueError, match=r"is not in the pool; its workers are: none"):
            pool.remove(engine.url)


def test_draining(router: StandInRouter, engine: StandIn) -> None:
    with WorkerPool(quick(router), weight_version="1", config=RARE) as pool:
        pool.add(engine.url)
        engine.running = 2
        threading.Timer(0.3, setattr, (engine, "running", 0)).start()
        pool.remove(engine.url, drain=20)
        assert engine.running == 0
        pool.add(engine.url)
        engine.running = 1
        with pytest.raises(WorkerError, match="still has 1 requests"):
            pool.remove(engine.url, drain=0.2)
        assert (pool.workers(), router.workers) == ((), {})


def test_without_a_router(engine: StandIn) -> None:
    """For workers that are asked directly."""
    with WorkerPool(None, weight_version="1", config=NOW) as pool:
        pool.add(engine.url)
        assert pool.check_router() == ()
        engine.version = "0"
        pool.check(engine.url)
        assert states(pool) == ["quarantined"]
        pool.remove(engine.url)
    with pytest.raises(ValueError, match="this one is closed"):
        pool.add(engine.url)


EXIT = """
import sys
from pacenote.rollout.lifecycle import PoolConfig
from pacenote.rollout.pool import WorkerPool
from pacenote.rollout.registration import RouterConfig
router, engine, seconds = sys.argv[1:]
config = PoolConfig(exit_timeout=float(seconds), health_every=0.05)
pool = WorkerPool(RouterConfig(url=router, timeout=1000), weight_version="1", config=config)
pool.add(engine)
pool.watch()
print("added", flush=True)
sys.stdin.read()
"""


def leave(router: str, engine: str, seconds: float, before: Callable[[], None] = lambda: None) -> int:
    """A process that adds a worker and ends in the usual way; how it ended."""
    command = [sys.executable, "-c", EXIT, router, engine, str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "added\n"
        before()
        process.stdin.close()
        try:
            return process.wait(60)
        finally:
            process.kill()


def test_a_process_that_ends_deregisters(router: StandInRouter, engine: StandIn) -> None:
    assert leave(router.url, engine.url, 20.0) == 0
    assert router.workers == {}


@pytest.mark.parametrize("trouble", ["drops", "stopped"])
def test_deregistration_keeps_no_process_alive(router: StandInRouter, engine: StandIn, trouble: str) -> None:
    """The router answers for ever, under a timeout of 1000 s; or its process is stopped and answers nothing."""
    if trouble == "drops":
        assert leave(router.url, engine.url, 0.3, lambda: setattr(router, "drops", True)) == 0
        router.drops = False
        return
    with gateway(ROUTER_032) as service:
        assert service.pid is not None
        stop = lambda: os.kill(service.pid or 0, signal.SIGSTOP)  # noqa: E731
        try:
            assert leave(service.url, engine.url, 0.3, stop) == 0
        finally:
            os.kill(service.pid, signal.SIGCONT)


def test_a_fork_says_no_farewell(router: StandInRouter, engine: StandIn) -> None:
    with WorkerPool(quick(router), weight_version="1", config=RARE) as pool:
        pool.add(engine.url)
        child = os.fork()
        if not child:
            pool.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert list(router.workers) == [engine.url]
    assert router.workers == {}


def test_smg_takes_back_a_quarantined_pair() -> None:
    with gateway(SMG, "--pd-disaggregation") as service, StandIn("prefill") as prefill, StandIn("decode") as decode:
        with WorkerPool(service.url, weight_version="1", config=RARE) as pool:
            pool.add(prefill.url, "prefill", 8998)
            pool.add(decode.url, "decode")
            decode.sick = True
            for _ in range(2):
                pool.check(decode.url)
            assert pool.router is not None
            assert [w.url for w in pool.router.listing() if not w.draining] == [prefill.url]
            decode.sick = False
            for _ in range(2):
                pool.check(decode.url)
            assert [w.role for w in pool.serving()] == ["prefill", "decode"]
        assert all(w.draining for w in pool.router.listing())
