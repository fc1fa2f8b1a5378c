"""Anthropic's SDK against sessions: streams, stop sequences, thinking that comes back, refusals in its own errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.responses import JSONResponse

from tests.rollout.clients.policy import ANSWER, CALL, THOUGHT, TOOL

if TYPE_CHECKING:
    from tests.rollout.clients.conftest import Seat
    from tests.rollout.conftest import ScriptedEngine

anthropic = pytest.importorskip("anthropic", reason="anthropic is missing: run make install")
WAIT = 30  # seconds after which something that should come is taken not to come
SAY = f"{THOUGHT}</think>{ANSWER}<|user|>"
USER: Any = {"role": "user", "content": "Roll a die."}
MORE: Any = {"role": "user", "content": "And again."}
FUNCTION: Any = TOOL["function"]
ROLL: Any = {"name": "roll", "description": "Roll a die.", "input_schema": FUNCTION["parameters"]}
IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


@pytest.fixture
def client(scripted_seat: Seat) -> Iterator[Any]:
    """The SDK's client at the scripted seat."""
    with anthropic.Anthropic(base_url=scripted_seat.url.removesuffix("/v1"), api_key="x", max_retries=0) as client:
        yield client


def ask(client: Any, *messages: Any, **options: Any) -> Any:
    """The Message that answers these."""
    return client.messages.create(model="m", max_tokens=64, messages=[*messages], **options)


def test_a_message(client: Any, scripted_seat: Seat, engine: ScriptedEngine) -> None:
    """Each field where it belongs, there and back."""
    scripted_seat.play(f"{THOUGHT}</think>Look.{CALL}<|observation|>")
    message = ask(
        client, USER, system=[{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}], tools=[ROLL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True}, output_config={"effort": "low"},
        metadata={"user_id": "u"}, extra_body={"temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 3},
    )  # fmt: skip
    thinking, said, call = message.content
    assert (thinking.type, thinking.thinking) == ("thinking", THOUGHT)
    assert (said.type, said.text) == ("text", "Look.")
    assert (call.type, call.name, call.input) == ("tool_use", "roll", {"sides": 6})
    assert (message.stop_reason, message.stop_sequence, message.model) == ("tool_use", None, "m")
    [body], [record] = engine.bodies, scripted_seat.records()
    assert [(said["role"], said["content"]) for said in body["messages"]] == [
        ("system", "Be brief."), ("user", "Roll a die."),
    ]  # fmt: skip
    kept = ("temperature", "top_k", "top_p", "max_tokens", "seed", "tool_choice", "reasoning_effort")
    assert [body[name] for name in kept] == [0.5, 7, 0.9, 64, 3, "required", "low"]
    assert body["parallel_tool_calls"] is False
    assert body["tools"] == [TOOL]
    assert message.id == f"msg_{record['id'].removeprefix('chatcmpl-')}"
    scripted_seat.check_script(scripted_seat.check())


def test_a_stream_says_what_the_message_says(client: Any, scripted_seat: Seat) -> None:
    scripted_seat.play(*[f"{THOUGHT}</think>Look.{CALL}{CALL}<|observation|>"] * 2)
    whole = ask(client, USER, tools=[ROLL])
    with client.messages.stream(model="m", max_tokens=64, messages=[USER], tools=[ROLL]) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    differ = {"id", "content"}
    assert streamed.model_dump(exclude=differ) == whole.model_dump(exclude=differ)
    shown = [[block.model_dump(exclude={"id"}) for block in message.content] for message in (streamed, whole)]
    assert shown[0] == shown[1]


def test_how_it_ends(client: Any, scripted_seat: Seat, engine: ScriptedEngine) -> None:
    scripted_seat.play("It is", SAY, "</think><|user|>")
    assert ask(client, USER).stop_reason == "max_tokens"
    assert ask(client, USER, stop_sequences=["END"]).stop_reason == "end_turn"
    silent = ask(client, MORE)
    assert (silent.stop_reason, silent.content) == ("end_turn", [])
    assert engine.bodies[1]["stop"] == ["END"]


def test_a_stop_sequence_is_named(client: Any, scripted_seat: Seat, engine: ScriptedEngine, answer: Any) -> None:
    """The engine trims it from the text; its tokens are what was sampled, and name it."""
    ids = scripted_seat.tokenizer.encode("One, two", add_special_tokens=False)
    engine.write = lambda body: answer(body, ids, text="One, ", matched="two")
    message = ask(client, USER, stop_sequences=["three", "two"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "two")
    assert message.content[0].text == "One, "


@pytest.mark.parametrize("kept", ["all", "no thinking", "no signature"])
def test_thinking_comes_back_or_not(client: Any, scripted_seat: Seat, kept: str) -> None:
    scripted_seat.play(f"{THOUGHT}</think>{CALL}<|observation|>", SAY)
    message = ask(client, USER, tools=[ROLL])
    blocks = [block.model_dump(exclude_none=True) for block in message.content]
    if kept == "no thinking":
        blocks = blocks[1:]
    elif kept == "no signature":
        blocks[0]["signature"] = ""
    result = {"type": "tool_result", "tool_use_id": blocks[-1]["id"], "content": [{"type": "text", "text": "6"}]}
    cached = result | {"cache_control": {"type": "ephemeral"}, "is_error": False}
    last = {"role": "user", "content": [cached, {"type": "text", "text": "Well?"}]}
    assert ask(client, USER, {"role": "assistant", "content": blocks}, last, tools=[ROLL]).content[1].text == ANSWER
    assert scripted_seat.parents() == [None, 0]
    appended = [(said["role"], said["content"]) for said in scripted_seat.records()[1]["messages"]]
    assert appended == [("tool", "6"), ("user", "Well?")]
    scripted_seat.check()


def test_numbers_of_any_size_come_back(client: Any, scripted_seat: Seat) -> None:
    large = 10**40
    move = f"</think><tool_call>roll<arg_key>sides</arg_key><arg_value>{large}</arg_value></tool_call><|observation|>"
    scripted_seat.play(move, SAY)
    message = ask(client, USER, tools=[ROLL])
    assert message.content[0].input == {"sides": large}
    result = {"type": "tool_result", "tool_use_id": message.content[0].id}
    history = [USER, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    ask(client, *history, tools=[ROLL])
    assert scripted_seat.parents() == [None, 0]


def test_tokens_are_counted_as_they_will_be_sent(client: Any, scripted_seat: Seat, engine: ScriptedEngine) -> None:
    """Also on top of an answer, whose tokens are counted as sampled; and a count starts nothing."""

    def counted(*messages: Any) -> int:
        count: int = client.messages.count_tokens(model="m", messages=[*messages]).input_tokens
        return count

    scripted_seat.play(SAY, SAY)
    first = counted(USER)
    assert scripted_seat.records() == []
    message = ask(client, USER)
    history = (USER, {"role": "assistant", "content": message.content[1:]}, MORE)
    assert first == message.usage.input_tokens
    assert counted(*history) == ask(client, *history).usage.input_tokens
    assert len(engine.bodies) == 2
    assert scripted_seat.parents() == [None, 0]


@pytest.mark.parametrize(
    ("messages", "options", "named"),
    [
        ([{"role": "user", "content": [IMAGE]}], {}, "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}]}], {},
         "messages[0].content[0].content[0].type"),
        ([USER, {"role": "assistant", "content": "It is"}], {}, "messages[1].role"),
        ([USER], {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ([USER], {"extra_body": {"mcp_servers": [{"type": "url"}]}}, "mcp_servers"),
        ([USER], {"extra_body": {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}},
         "context_management.edits[0]"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(
    client: Any, scripted_seat: Seat, engine: ScriptedEngine, messages: Any, options: Any, named: str
) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(client, *messages, **options)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert named in caught.value.body["error"]["message"]
    assert engine.bodies == []
    assert scripted_seat.records() == []


def test_errors_are_its_own(client: Any, scripted_seat: Seat) -> None:
    long = "Input length (9000 tokens) exceeds the maximum allowed length (4096 tokens). Use a shorter input."
    scripted_seat.play(JSONResponse({"message": long}, 400), JSONResponse({"message": "no"}, 500))
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: 9000 tokens > 4096 maximum"):
        ask(client, USER)
    with pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(model="m", max_tokens=8, messages=[USER], stream=True)
    assert (caught.value.status_code, caught.value.body["error"]["type"]) == (502, "api_error")
    assert httpx.delete(scripted_seat.url.removesuffix("/v1"), trust_env=False).status_code == 204
    with pytest.raises(anthropic.APIStatusError) as gone:
        ask(client, USER)
    assert (gone.value.status_code, gone.value.body["error"]["type"]) == (410, "not_found_error")


def test_a_cancelled_task_aborts(scripted_seat: Seat, engine: ScriptedEngine) -> None:
    async def go() -> None:
        url = scripted_seat.url.removesuffix("/v1")
        async with anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0) as client:
            engine.hold()
            task = asyncio.ensure_future(client.messages.create(model="m", max_tokens=8, messages=[USER]))
            assert await asyncio.to_thread(engine.arrived.acquire, timeout=WAIT)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(engine.aborted.acquire, timeout=WAIT)
            engine.release()
            await client.messages.create(model="m", max_tokens=8, messages=[USER])

    scripted_seat.play(SAY)
    asyncio.run(go())
    assert scripted_seat.parents() == [None]
    scripted_seat.check_script(scripted_seat.check())
