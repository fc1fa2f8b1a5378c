"""The openai SDK's own habits: retries, timeouts, cancelled tasks, streams left early, parsed answers, best of n."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import openai
import pytest
from pydantic import BaseModel
from starlette.responses import JSONResponse

from tests.rollout.clients.policy import ANSWER, THOUGHT

if TYPE_CHECKING:
    from tests.rollout.clients.conftest import Seat
    from tests.rollout.conftest import ScriptedEngine

WAIT = 30  # seconds after which something that should come is taken not to come
SAY = f"{THOUGHT}</think>{ANSWER}<|user|>"
USER: Any = {"role": "user", "content": "Roll a die."}
MORE: Any = {"role": "user", "content": "And again."}


class Die(BaseModel):
    """What is asked for as JSON."""

    sides: int


def test_a_failing_engine_is_asked_again(scripted_seat: Seat, engine: ScriptedEngine) -> None:
    scripted_seat.play(JSONResponse({}, 503), SAY)
    with openai.OpenAI(base_url=scripted_seat.url, api_key="x") as client:
        answer = client.chat.completions.create(model="m", messages=[USER])
    assert answer.choices[0].message.content == ANSWER
    assert len(engine.bodies) == 2
    assert scripted_seat.parents() == [None]
    scripted_seat.check_script(scripted_seat.check())


def test_a_timeout_is_a_retry(scripted_seat: Seat, engine: ScriptedEngine) -> None:
    """The first request is aborted in the engine and leaves nothing; the second is answered."""
    scripted_seat.play(SAY)
    engine.hold()
    with (
        openai.OpenAI(base_url=scripted_seat.url, api_key="x", timeout=1.5, max_retries=5) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(client.chat.completions.create, model="m", messages=[USER])
        assert engine.aborted.acquire(timeout=WAIT)
        engine.release()
        assert answer.result(WAIT).choices[0].message.content == ANSWER
    assert [record["status"] for record in scripted_seat.records()] == ["completed"]
    scripted_seat.check_script(scripted_seat.check())


def test_a_cancelled_task_aborts(scripted_seat: Seat, engine: ScriptedEngine) -> None:
    async def go() -> None:
        async with openai.AsyncOpenAI(base_url=scripted_seat.url, api_key="x", max_retries=0) as client:
            engine.hold()
            task = asyncio.ensure_future(client.chat.completions.create(model="m", messages=[USER]))
            assert await asyncio.to_thread(engine.arrived.acquire, timeout=WAIT)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(engine.aborted.acquire, timeout=WAIT)
            engine.release()
            await client.chat.completions.create(model="m", messages=[USER])

    scripted_seat.play(SAY)
    asyncio.run(go())
    assert scripted_seat.parents() == [None]
    scripted_seat.check_script(scripted_seat.check())


def test_best_of_n_as_requests_at_once(scripted_seat: Seat, engine: ScriptedEngine) -> None:
    """All wait together, so each is a sample, those too that say the same; going on from one makes no other."""

    async def go() -> None:
        async with openai.AsyncOpenAI(base_url=scripted_seat.url, api_key="x", max_retries=0) as client:
            engine.hold()
            asked = [client.chat.completions.create(model="m", messages=[USER]) for _ in range(4)]
            tasks = [asyncio.ensure_future(one) for one in asked]
            for _ in tasks:
                assert await asyncio.to_thread(engine.arrived.acquire, timeout=WAIT)
            engine.release()
            answers = await asyncio.gather(*tasks)
            best: Any = answers[2].choices[0].message
            await client.chat.completions.create(model="m", messages=[USER, best, MORE])

    scripted_seat.play(SAY, f"</think>A one.{SAY[-8:]}", f"</think>A two.{SAY[-8:]}", SAY, SAY)
    asyncio.run(go())
    *first, last = scripted_seat.records()
    assert [record["status"] for record in (*first, last)] == ["completed"] * 5
    assert [record["parent"] for record in first] == [None] * 4
    samples = scripted_seat.check()
    assert len(samples) == 4
    scripted_seat.check_script(samples)


def test_a_stream_that_is_left_early_was_recorded(scripted_seat: Seat) -> None:
    scripted_seat.play(SAY, SAY)
    with openai.OpenAI(base_url=scripted_seat.url, api_key="x", max_retries=0) as client:
        with client.chat.completions.create(model="m", messages=[USER], stream=True) as stream:
            said = next(iter(stream)).choices[0].delta.content
        history: Any = [USER, {"role": "assistant", "content": said}, MORE]
        text = "".join(
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(model="m", messages=history, stream=True)
        )
    assert said == text == ANSWER
    assert scripted_seat.parents() == [None, 0]
    scripted_seat.check_script(scripted_seat.check())


def test_a_parsed_answer_goes_back_as_it_came(scripted_seat: Seat, engine: ScriptedEngine) -> None:
    scripted_seat.play(f'{THOUGHT}</think>{{"sides": 6}}<|user|>', SAY)
    with openai.OpenAI(base_url=scripted_seat.url, api_key="x", max_retries=0) as client:
        answer = client.chat.completions.parse(model="m", messages=[USER], response_format=Die)
        message: Any = answer.choices[0].message
        assert message.parsed == Die(sides=6)
        client.chat.completions.create(model="m", messages=[USER, message, MORE])
    assert engine.bodies[0]["response_format"]["json_schema"]["name"] == "Die"
    assert scripted_seat.parents() == [None, 0]
    scripted_seat.check_script(scripted_seat.check())


def test_logprobs_and_ids_are_the_samples_own(embedded_seat: Seat) -> None:
    """What the SDK shows of tokens and logprobs is what is trained, to the last bit."""
    with openai.OpenAI(base_url=embedded_seat.url, api_key="x", max_retries=0) as client:
        answer: Any = client.chat.completions.create(model="m", messages=[USER], temperature=3.0, max_tokens=12)
    [sample] = embedded_seat.check()
    choice = answer.choices[0]
    trained = sample.loss_mask == 1
    assert sample.tokens.tolist() == choice.prompt_token_ids + choice.token_ids
    assert sample.tokens[trained].tolist() == choice.token_ids
    assert sample.logprobs[trained].tolist() == [entry.logprob for entry in choice.logprobs.content]
