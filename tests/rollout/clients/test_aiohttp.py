"""aiohttp, which is strict about HTTP: one connection for everything, chunked bodies, events line by line, leaving."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.rollout.clients.policy import ANSWER, LOOK, THOUGHT, only

if TYPE_CHECKING:
    from tests.rollout.clients.conftest import Seat
    from tests.rollout.conftest import ScriptedEngine

aiohttp: Any = pytest.importorskip("aiohttp", reason="aiohttp is missing: run make install")
WAIT = 30  # seconds after which something that should come is taken not to come
SAY = f"{THOUGHT}</think>{ANSWER}<|user|>"
USER = {"role": "user", "content": "Roll a die."}


async def events(answer: Any) -> list[str]:
    """The data of server-sent events, read line by line as they come."""
    assert answer.content_type == "text/event-stream"
    lines = [line.decode() async for line in answer.content]
    assert lines[1::2] == ["\n"] * (len(lines) // 2)
    return [line.removeprefix("data: ").rstrip("\n") for line in lines[::2]]


def test_one_connection_for_everything(scripted_seat: Seat) -> None:
    """Plain answers, streams, errors and GETs in turn; each leaves the connection fit for the next."""
    turns = 6

    async def go() -> list[str]:
        texts: list[str] = []
        history: list[dict[str, Any]] = []
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as http:
            for turn in range(turns):
                history.append({"role": "user", "content": str(turn)})
                body = {"messages": history, "stream": turn % 2 == 1}
                async with http.post(f"{scripted_seat.url}/chat/completions", json=body) as answer:
                    assert answer.status == 200
                    assert len(answer.headers.getall("content-type")) == 1
                    if turn % 2:
                        chunk, done = await events(answer)
                        assert done == "[DONE]"
                        message = json.loads(chunk)["choices"][0]["delta"]
                    else:
                        message = (await answer.json())["choices"][0]["message"]
                history.append(message)
                texts.append(message["content"])
                async with http.post(f"{scripted_seat.url}/chat/completions", json={"messages": []}) as refused:
                    assert refused.status == 400
                async with http.get(f"{scripted_seat.url}/models") as models:
                    assert [model["id"] for model in (await models.json())["data"]] == ["tiny"]
        return texts

    scripted_seat.play(*[SAY] * turns)
    assert asyncio.run(go()) == [ANSWER] * turns
    assert scripted_seat.parents() == [None, *range(turns - 1)]
    scripted_seat.check_script(scripted_seat.check())


def test_a_body_in_chunks_without_a_type(scripted_seat: Seat) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for byte in json.dumps({"messages": [USER]}).encode():
            yield bytes([byte])

    async def go() -> int:
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{scripted_seat.url}/chat/completions", data=pieces()) as answer,
        ):
            return int(answer.status)

    scripted_seat.play(SAY)
    assert asyncio.run(go()) == 200
    scripted_seat.check_script(scripted_seat.check())


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_aborts(scripted_seat: Seat, engine: ScriptedEngine, stream: bool) -> None:
    async def go() -> None:
        body = {"messages": [USER], "stream": stream}
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=1.0)) as http:
            with pytest.raises(asyncio.TimeoutError):
                await http.post(f"{scripted_seat.url}/chat/completions", json=body)

    scripted_seat.play(SAY)
    engine.hold()
    asyncio.run(go())
    assert engine.aborted.acquire(timeout=WAIT)
    engine.release()
    assert scripted_seat.records() == []
    assert scripted_seat.script is not None
    assert len(scripted_seat.script.moves) == 1  # it was never answered


def test_many_agents_on_one_session(embedded_seat: Seat, tokenizer: Any) -> None:
    """Subagents with prompts of their own at once, two turns each, behind one URL: each is a line of its own."""
    agents = 6

    async def agent(http: Any, number: int) -> None:
        history: list[dict[str, Any]] = []
        for turn in range(2):
            history.append({"role": "user", "content": f"agent {number}, turn {turn}"})
            body = {"messages": history, "logit_bias": only(tokenizer, ANSWER, LOOK)}
            async with http.post(f"{embedded_seat.url}/chat/completions", json=body) as answer:
                assert answer.status == 200, await answer.text()
                history.append((await answer.json())["choices"][0]["message"])

    async def go() -> None:
        async with aiohttp.ClientSession() as http:
            await asyncio.gather(*[agent(http, number) for number in range(agents)])

    asyncio.run(go())
    records = embedded_seat.records()
    for record in records:
        number, turn = record["messages"][-1]["content"].removeprefix("agent ").split(", turn ")
        before = None if turn == "0" else records[record["parent"]]["messages"][-1]["content"]
        assert before == (None if turn == "0" else f"agent {number}, turn 0")
    assert len(embedded_seat.check()) == agents
