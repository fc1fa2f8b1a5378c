"""A session stays with the engine that has its prefix: behind a real gateway, and with pairs."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pacenote.rollout.launch import Service, free_port
from pacenote.rollout.pairs import SLACK, Pair, Pairs, known
from pacenote.rollout.sglang import STICKY
from tests.rollout.gateways import SMG, gateway, register

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

USER = {"role": "user", "content": "a"}
PAIRS = [Pair(prefill=f"http://p{n}:1", bootstrap_port=8998, decode=f"http://d{n}:1") for n in range(3)]


def test_the_header_names_the_session_and_nothing_else(http: httpx.Client, engine: ScriptedEngine) -> None:
    for name in ("one", "one", "two", "naïve\u2028"):
        assert http.post(f"/sessions/{name}/v1/chat/completions", json={"messages": [USER]}).status_code == 200
    keys = [headers[STICKY] for headers in engine.headers]
    assert keys[0] == keys[1]
    assert len({*keys}) == 3
    assert all(len(key) == 32 and int(key, 16) for key in keys)


def test_pairs_keep_their_sessions_until_one_is_far_busier() -> None:
    async def play() -> None:
        pairs = Pairs(partial(known, *PAIRS), timeout=1.0)
        first = {name: await pairs._pick(name) for name in map(str, range(60))}
        assert len(Counter(first.values())) == 3
        assert {name: await pairs._pick(name) for name in first} == first
        home = first["0"]
        pairs._busy[home.decode] = SLACK
        assert await pairs._pick("0") == home
        pairs._busy[home.decode] = SLACK + 1
        assert await pairs._pick("0") != home
        assert await pairs._pick("") != home
        await pairs.close()

    asyncio.run(play())


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[list[Service]]:
    """Two that answer with weight versions 1 and 2, by which they are told apart."""
    with ExitStack() as stack:
        made = []
        for version in "12":
            port = free_port()
            command = [sys.executable, "-m", "benchmarks.scripted_engine", "--port", str(port), "--version", version]
            log = tmp_path / f"{version}.log"
            made.append(stack.enter_context(Service("engine", command, url=f"http://127.0.0.1:{port}", log=log)))
            made[-1].wait_healthy(30)
        yield made


@pytest.mark.parametrize(("policy", "apart"), [("consistent_hashing", True), ("round_robin", False)])
def test_a_gateway_keeps_each_session_on_one_engine(
    engines: list[Service], serve: Callable[..., Served], policy: str, apart: bool
) -> None:
    with gateway(SMG, policy=policy) as router:
        for engine in engines:
            register(router, {"url": engine.url, "worker_type": "regular"})
        options = {
            "upstream": router.url,
            "served_model": "m",
            "routing_replay": False,
            "append_roles": frozenset({"user"}),
        }
        with serve(**options) as served, httpx.Client(base_url=served.url, timeout=60, trust_env=False) as http:
            seen = [versions(http, f"session-{number}") for number in range(12)]
    assert all(len(found) == 1 for found in seen) == apart
    assert set().union(*seen) == {"1", "2"}


def versions(http: httpx.Client, session: str) -> set[str]:
    """Of the engines that answered a session's three turns."""
    messages: list[dict[str, Any]] = []
    for number in range(3):
        messages.append({"role": "user", "content": str(number)})
        answer = http.post(f"/sessions/{session}/v1/chat/completions", json={"messages": messages})
        assert answer.status_code == 200, answer.text
        messages.append(answer.json()["choices"][0]["message"])
    return {record["weight_version"] for record in http.get(f"/sessions/{session}").json()["records"]}
