"""OpenAI's SDK in front of a session."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from starlette.responses import JSONResponse

from tests.rollout.talk import CALLS, USER, records, start

if TYPE_CHECKING:
    from tests.rollout.conftest import ScriptedEngine, Served

Make = Callable[..., dict[str, Any]]


def test_openai_sync(http: httpx.Client, served: Served, engine: ScriptedEngine, answer: Make) -> None:
    engine.write = lambda body: answer(body, [40, 500], matched=500, message={"content": "t", "tool_calls": CALLS})
    session = start(http)
    with openai.OpenAI(base_url=f"{served.url}{session}/v1", api_key="x", max_retries=0) as client:
        got = client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "a"}])
        assert got.choices[0].message.content == "t"
        assert got.choices[0].message.tool_calls is not None
        assert got.choices[0].message.tool_calls[0].id == "c"
        assert got.choices[0].finish_reason == "tool_calls"
        assert got.choices[0].logprobs is not None
        assert got.choices[0].logprobs.content is not None
        assert len(got.choices[0].logprobs.content) == 2
        assert got.usage is not None
        assert got.usage.completion_tokens == 2
        history: list[Any] = [{"role": "user", "content": "a"}, got.choices[0].message.model_dump()]
        history.append({"role": "tool", "content": "r", "tool_call_id": "c"})
        client.chat.completions.create(model="policy", messages=history)
        assert [record["parent"] for record in records(http, session)] == [None, 0]
        many = client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "b"}], n=3)
        assert [choice.index for choice in many.choices] == [0, 1, 2]
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "a"}], n=0)
        assert (refused.value.code, refused.value.param) == ("bad_request", "n")
        assert [model.id for model in client.models.list()] == ["tiny"]


def test_openai_stream(http: httpx.Client, served: Served, engine: ScriptedEngine, answer: Make) -> None:
    engine.write = lambda body: answer(body, [40, 491], matched=491)
    client = openai.OpenAI(base_url=f"{served.url}{start(http)}/v1", api_key="x", max_retries=0)
    asked: list[Any] = [USER]
    usage: Any = {"include_usage": True}
    with client, client.chat.completions.stream(model="m", messages=asked, stream_options=usage) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "ok"
    assert final.usage is not None
    assert final.usage.completion_tokens == 2


def test_openai_async(http: httpx.Client, served: Served) -> None:
    session = start(http)

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}{session}/v1", api_key="x", max_retries=0) as client:
            asked = [
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": str(number)}])
                for number in range(8)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == ["ok"] * 8
    assert sorted(record["messages"][0]["content"] for record in records(http, session)) == list("01234567")


def test_overflow_is_what_agents_look_for(http: httpx.Client, served: Served, engine: ScriptedEngine) -> None:
    text = {"message": "Requested token count exceeds the model's maximum context length of 8 tokens."}
    engine.write = lambda _: JSONResponse(text, 400)
    client = openai.OpenAI(base_url=f"{served.url}{start(http)}/v1", api_key="x", max_retries=0)
    with client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
    assert (caught.value.status_code, caught.value.code) == (400, "context_length_exceeded")
