"""Idempotency-Key: a request that comes again joins the first, or gets its answer again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from starlette.responses import Response

from pacenote.rollout.completion import Completion
from pacenote.rollout.errors import ClientGone, KeyReused
from pacenote.rollout.flights import Flights, Key
from tests.rollout.talk import MORE, USER, WAIT, error, left_open, records, start

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine

Make = Callable[..., dict[str, Any]]


def ask(http: httpx.Client, session: str, key: str, **body: Any) -> httpx.Response:
    return http.post(
        f"{session}/v1/chat/completions", json={"messages": [USER]} | body, headers={"Idempotency-Key": key}
    )


def test_the_same_key_gets_the_same_answer(http: httpx.Client, engine: ScriptedEngine) -> None:
    session = start(http)
    first = ask(http, session, "k")
    assert first.status_code == 200
    again = ask(http, session, "k")
    assert again.content == first.content
    assert len(engine.bodies) == len(records(http, session)) == 1
    assert ask(http, session, "other").json()["id"] != first.json()["id"]
    assert ask(http, start(http), "k").json()["id"] != first.json()["id"]  # a key is of its session
    stream = [ask(http, session, "s", stream=True) for _ in range(2)]
    assert stream[0].text.endswith("data: [DONE]\n\n")
    assert stream[0].content == stream[1].content
    assert len(engine.bodies) == 4


def test_the_same_key_joins_what_is_in_flight(
    http: httpx.Client, engine: ScriptedEngine, pool: ThreadPoolExecutor
) -> None:
    session = start(http)
    engine.hold()
    first = pool.submit(ask, http, session, "k", n=2)
    for _ in range(2):
        assert engine.arrived.acquire(timeout=WAIT)
    second = pool.submit(ask, http, session, "k", n=2)
    text = error(ask(http, session, "k", n=2, temperature=0.5), 422, "idempotency_key_reused")
    assert "Idempotency-Key 'k' came with another body before: send the same bytes again, or another key" in text
    assert http.get(session).json()["metadata"]["in_flight"] == 1
    engine.release()
    assert first.result(WAIT).content == second.result(WAIT).content
    assert len(engine.bodies) == len(records(http, session)) == 2
    error(ask(http, session, "k", messages=[MORE]), 422, "idempotency_key_reused")


@pytest.mark.parametrize("leave", [1, 2])
def test_one_who_leaves_does_not_abort_for_the_other(leave: int) -> None:
    """Two wait for one flight; it is aborted when the last of them has gone, and then nobody may join it."""

    async def go() -> None:
        flights, started, aborted = Flights(), 0, 0
        answered = asyncio.Event()

        async def chat() -> Completion:
            nonlocal started, aborted
            started += 1
            try:
                await answered.wait()
            except asyncio.CancelledError:
                aborted += 1
                await settle()  # an abort may take a while; nobody may join it meanwhile
                raise
            return Completion(data=b"{}")

        def ask() -> tuple[asyncio.Future[None], asyncio.Task[Completion]]:
            gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            return gone, asyncio.create_task(flights.answer("s", chat, gone=gone, key=Key(name="k", digest=b"")))

        async def settle() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        clients = [ask(), ask()]
        await settle()
        assert (started, flights.count("s")) == (1, 1)
        for gone, waiting in clients[:leave]:
            gone.set_result(None)
            with pytest.raises(ClientGone):
                await waiting
        late = ask()[1]
        await settle()
        assert (started, aborted) == (leave, leave - 1)
        answered.set()
        assert (await late).data == b"{}"
        if leave == 1:
            assert (await clients[1][1]).data == b"{}"

    asyncio.run(go())


def test_what_failed_may_be_asked_again_under_its_key(http: httpx.Client, engine: ScriptedEngine) -> None:
    session = start(http)
    engine.write = lambda _: Response(b"boom", 500)
    error(ask(http, session, "k"), 502, "upstream_error")
    engine.write = None
    assert ask(http, session, "k", temperature=0.5).status_code == 200  # nothing was answered under it, so any body may
    engine.hold()
    with left_open(http, session, {"messages": [MORE]}, key="left"):
        assert engine.arrived.acquire(timeout=WAIT)
        assert engine.arrived.acquire(timeout=WAIT)
        assert engine.arrived.acquire(timeout=WAIT)
    assert engine.aborted.acquire(timeout=WAIT)
    engine.release()
    assert ask(http, session, "left", messages=[MORE]).status_code == 200
    assert len(records(http, session)) == 2


def test_a_deleted_session_has_no_answers_left(http: httpx.Client) -> None:
    session = start(http)
    ask(http, session, "k")
    http.delete(session)
    error(ask(http, session, "k"), 410, "session_deleted")


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_keys_that_cannot_be(http: httpx.Client, engine: ScriptedEngine, key: str) -> None:
    text = error(ask(http, start(http), key), 400, "bad_request")
    assert f"Idempotency-Key must have 1..255 characters, got {len(key)}" in text
    assert engine.bodies == []


def test_through_openais_sdk(http: httpx.Client, engine: ScriptedEngine) -> None:
    session = start(http)
    with openai.OpenAI(base_url=f"{http.base_url}{session}/v1", api_key="x", max_retries=0) as client:
        ids = [
            client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "a"}], extra_headers={"Idempotency-Key": "k"}
            ).id
            for _ in range(2)
        ]
    assert ids[0] == ids[1]
    assert len(engine.bodies) == 1


def test_memory_for_keys_is_bounded() -> None:
    """The oldest answers go; a key whose answer went is asked anew."""

    async def go() -> None:
        flights, asked = Flights(remembered=250), 0

        async def chat() -> Completion:
            nonlocal asked
            asked += 1
            return Completion(data=bytes(100))

        async def ask(name: str, digest: bytes = b"") -> None:
            gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            await flights.answer("s", chat, gone=gone, key=Key(name=name, digest=digest))

        for name in "ababc":
            await ask(name)
        assert asked == 3
        with pytest.raises(KeyReused):
            await ask("c", b"other")
        await ask("a", b"other")  # forgotten
        await ask("c")
        assert asked == 4
        assert flights.sessions() == []

    asyncio.run(go())
