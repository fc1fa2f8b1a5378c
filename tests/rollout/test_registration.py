"""Registration at the published routers, and at one that misbehaves."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from pacenote.rollout.launch import free_port
from pacenote.rollout.registration import Router, RouterConfig
from pacenote.rollout.router_dialects import DIALECTS
from pacenote.rollout.worker import Worker
from pacenote.rollout.worker_errors import NotConfirmed, RoleMismatch, RouterError, RouterRefused, UnknownDialect
from tests.rollout.gateways import GATEWAYS, ROUTER_019, ROUTER_021, ROUTER_032, SMG, gateway
from tests.rollout.stand_in import StandIn
from tests.rollout.stand_in_router import StandInRouter

Start = Callable[[str], str]
QUICK: dict[str, Any] = {"confirm": 10.0, "backoff": 0.01}


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts a gateway in regular mode, once, and gives its URL."""
    running: dict[str, str] = {}
    with contextlib.ExitStack() as stack:

        def url(release: str) -> str:
            if release not in running:
                running[release] = stack.enter_context(gateway(release)).url
            return running[release]

        yield url


def worker(engine: StandIn, role: str = "regular", port: int | None = None) -> Worker:
    return Worker(url=engine.url, role=role, bootstrap_port=port, wanted="1", seen="1")


def listed(router: Router) -> list[tuple[str, str | None]]:
    return [(entry.url, entry.role) for entry in router.listing() if not entry.draining]


@pytest.mark.parametrize("release", GATEWAYS)
def test_regular_workers(start: Start, release: str) -> None:
    """Every published router: find its dialect, add, add again, list, remove by URL, remove again."""
    router = Router(RouterConfig(url=start(release), **QUICK))
    assert router.dialect.name == ("add_worker" if release == ROUTER_019 else "workers")
    with StandIn() as engine:
        mine = worker(engine)
        router.add(mine)
        assert router.confirm(mine).healthy in (True, None)
        router.add(mine)  # a duplicate of the same worker is fine
        assert router.confirm(mine).url == engine.url
        assert listed(router) == [(engine.url, None if release == ROUTER_019 else "regular")]
        assert router.remove(engine.url + "/") == (engine.url,)
        assert listed(router) == []
        assert router.remove(engine.url) in ((), (engine.url,))  # one that smg drains is listed a while longer


@pytest.mark.parametrize("release", [SMG, ROUTER_032, ROUTER_021])
def test_pairs_at_gateways(start: Start, release: str) -> None:
    router = Router(RouterConfig(url=start(release), **QUICK))
    with StandIn("prefill") as prefill, StandIn("decode") as decode:
        pair = [worker(prefill, "prefill", 8998), worker(decode, "decode")]
        for mine in pair:
            router.add(mine)
        ports = [router.confirm(mine).bootstrap_port for mine in pair]
        assert ports == [8998, None]
        assert sorted(listed(router)) == sorted([(prefill.url, "prefill"), (decode.url, "decode")])
        with pytest.raises(RoleMismatch, match=r"is a regular worker, but .* lists it as prefill: remove it there fi"):
            router.add(worker(prefill))
        with pytest.raises(RoleMismatch, match=r"bootstrap port 9000, but .* lists it with 8998"):
            router.add(worker(prefill, "prefill", 9000))
        assert len(listed(router)) == 2  # what was refused changed nothing
        assert set(router.remove(prefill.url, decode.url)) == {prefill.url, decode.url}
        assert listed(router) == []


def test_a_role_that_was_ignored_is_reported_and_undone(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """sglang-router 0.2.1 answers 200 to /add_worker with worker_type=prefill, and registers a regular worker."""
    router = Router(RouterConfig(url=start(ROUTER_021), dialect="add_worker", **QUICK))
    with StandIn("prefill") as prefill, caplog.at_level(logging.WARNING):
        mine = worker(prefill, "prefill", 8998)
        router.add(mine)
        assert "a router that ignores worker_type registers it as a regular one" in caplog.text
        assert httpx.get(f"{router.url}/workers", trust_env=False).json()["stats"]["regular_count"] == 1
        with pytest.raises(RoleMismatch, match=r"cannot be told .* it was removed again"):
            router.confirm(mine)
        assert listed(router) == []


def test_a_role_that_was_ignored_shows_in_a_listing_with_roles(start: Start) -> None:
    """The same router and mistake, made by somebody else, seen through its other listing."""
    router = Router(RouterConfig(url=start(ROUTER_021), **QUICK))
    with StandIn("decode") as decode:
        asked = DIALECTS["add_worker"].add(worker(decode, "decode"), {})
        assert httpx.post(router.url + asked.path, trust_env=False, timeout=10).status_code == 200
        with pytest.raises(RoleMismatch, match=r"is a decode worker, but .* lists it as regular"):
            router.add(worker(decode, "decode"))
        router.remove(decode.url)


def test_extras_are_percent_encoded() -> None:
    call = DIALECTS["add_worker"].add(
        Worker(url="http://n:1", role="prefill", bootstrap_port=8998, wanted="1"), {"k": "a b&c"}
    )
    assert call.path == "/add_worker?url=http%3A%2F%2Fn%3A1&worker_type=prefill&bootstrap_port=8998&k=a%20b%26c"


def test_unlisted_roles_can_be_accepted(start: Start) -> None:
    url = start(ROUTER_019)
    with StandIn("decode") as decode:
        mine = worker(decode, "decode")
        strict, trusting = (
            Router(RouterConfig(url=url, accept_unlisted_role=accept, **QUICK)) for accept in (False, True)
        )
        strict.add(mine)
        with pytest.raises(RoleMismatch, match="--accept-unlisted-role"):
            strict.confirm(mine)
        assert listed(strict) == []
        trusting.add(mine)
        trusting.confirm(mine)
        trusting.remove(decode.url)


def test_a_router_in_pd_mode_that_refuses(start: Start) -> None:
    """sglang-router 0.1.9 takes its pairs at its start only, and says so with a 400."""
    with StandIn("prefill") as prefill, StandIn("decode") as decode, StandIn("prefill") as third:
        pair = ["--pd-disaggregation", "--prefill", prefill.url, "8998", "--decode", decode.url]
        with gateway(ROUTER_019, *pair) as service:
            router = Router(RouterConfig(url=service.url, **QUICK))
            with pytest.raises(RouterRefused, match=r"answered 400 .PD router requires specific") as caught:
                router.add(worker(third, "prefill", 8998))
            assert caught.value.status == 400


@pytest.mark.parametrize(
    ("release", "dialect"), [(ROUTER_032, "add_worker"), (SMG, "add_worker"), (ROUTER_019, "workers")]
)
def test_the_wrong_dialect(start: Start, release: str, dialect: str) -> None:
    router = Router(RouterConfig(url=start(release), dialect=dialect, **QUICK))
    with StandIn() as engine, pytest.raises(RouterError, match=f"expected a listing of the dialect {dialect}.*got 404"):
        router.add(worker(engine))


def test_not_a_router() -> None:
    said = r"GET /workers answered 404 .* and GET /list_workers answered 404"
    with StandIn() as engine, pytest.raises(UnknownDialect, match=said):
        Router(RouterConfig(url=engine.url, **QUICK)).listing()


def test_a_worker_that_never_gets_healthy_is_not_confirmed(start: Start) -> None:
    """202 is not yet registered; what is queued is called off, too."""
    router = Router(RouterConfig(url=start(ROUTER_032), confirm=0.3))
    nobody = Worker(url=f"http://127.0.0.1:{free_port()}", wanted="1", seen="1")
    router.add(nobody)
    with pytest.raises(NotConfirmed, match=r"did not show it healthy within 0\.3 s \(it is not there\)"):
        router.confirm(nobody)
    router.remove(nobody.url)
    assert nobody.url not in dict(listed(router))


def test_no_router() -> None:
    router = Router(RouterConfig(url=f"http://127.0.0.1:{free_port()}", retries=1, backoff=0.01))
    with pytest.raises(RouterError, match="no answer from the router to GET"):
        router.listing()


def test_a_router_that_comes_back_while_we_try() -> None:
    with StandInRouter() as there, StandIn() as engine:
        router = Router(RouterConfig(url=there.url, backoff=0.01))
        there.busy = 3
        router.add(worker(engine))
        there.busy = 2
        router.confirm(worker(engine))
        assert list(there.workers) == [engine.url]
        there.busy = 100
        with pytest.raises(RouterError, match="got 503"):
            router.listing()


def test_an_answer_that_was_lost_is_no_second_registration() -> None:
    """The router lists the worker but its answer is an error: the listing decides."""
    with StandInRouter() as there, StandIn() as engine:
        router = Router(RouterConfig(url=there.url, backoff=0.01))
        there.after_add = lambda url: setattr(there, "busy", 1)
        router.add(worker(engine))
        assert there.seen.count("POST /workers") == 1
        assert list(there.workers) == [engine.url]


@pytest.mark.parametrize(
    "nonsense", [b"<html>", b"", b"[]", b'{"workers": 3}', b'{"workers": [{"url": 3}]}', b"\xff\xfe"]
)
def test_nonsense(nonsense: bytes) -> None:
    with StandInRouter() as there:
        there.nonsense = nonsense
        with pytest.raises(UnknownDialect, match="check the URL and the API key"):
            Router(there.url).listing()
        with pytest.raises(RouterError, match="is this the router, and does it speak this dialect"):
            Router(RouterConfig(url=there.url, dialect="workers")).listing()


def test_an_answer_in_drops_is_cut_off() -> None:
    with StandInRouter() as there:
        there.drops = True
        router = Router(RouterConfig(url=there.url, timeout=0.3, retries=0))
        with pytest.raises(RouterError, match=r"not complete after 0\.3 s"):
            router.listing()
        there.drops = False


def test_a_router_that_does_not_answer() -> None:
    """Something listens and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RouterError, match=r"did not answer GET .* within 0\.2 s"):
            Router(RouterConfig(url=url, timeout=0.2, retries=0)).listing()


def test_a_router_that_keeps_what_was_removed() -> None:
    with StandInRouter() as there, StandIn() as engine:
        router = Router(RouterConfig(url=there.url, confirm=0.2))
        router.add(worker(engine))
        there.sticky = True
        with pytest.raises(NotConfirmed, match="still lists"):
            router.remove(engine.url)


def test_the_key_goes_along() -> None:
    with StandInRouter() as there:
        config = RouterConfig(url=there.url, api_key="secret")
        Router(config).listing()
        assert there.auth == {"Bearer secret"}
        assert "secret" not in repr(config)


@pytest.mark.parametrize(
    "wrong", [{"dialect": "other"}, {"timeout": 0.0}, {"retries": -1}, {"url": "router:30000"}, {"confirm": 0.0}]
)
def test_configurations_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        RouterConfig(**{"url": "http://r", **wrong})  # type: ignore[arg-type]


def test_draining_is_waited_for_before_the_next_life(start: Start) -> None:
    """smg drains a removed worker for seconds, and refuses it meanwhile as a duplicate."""
    router = Router(RouterConfig(url=start(SMG), **QUICK))
    with StandIn() as engine:
        router.add(worker(engine))
        router.confirm(worker(engine))
        router.remove(engine.url)
        [entry] = [entry for entry in router.listing() if entry.url == engine.url]
        assert entry.draining
        router.add(worker(engine))
        assert router.confirm(worker(engine)).healthy
        router.remove(engine.url)
