"""Anthropic's Messages <-> chat: an answer that comes back is the stored one, and no body breaks the translation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.anthropic import answer, chat_request, error_body, events
from pacenote.rollout.errors import (
    BadRequest,
    ContextOverflow,
    SessionError,
    SessionGone,
    UnknownSession,
    UpstreamError,
    UpstreamTimeout,
)
from pacenote.rollout.messages import Message, parse_message

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3).map(json.dumps) | st.text(max_size=8)
CALLS = st.lists(
    st.builds(
        lambda name, arguments, id: {"type": "function", "function": {"name": name, "arguments": arguments}} | id,
        st.sampled_from(["roll", "look"]),
        ARGUMENTS,
        st.sampled_from([{"id": "call_1"}, {}]),
    ),
    max_size=3,
)
SAID = st.builds(
    lambda content, reasoning, calls: (
        {"role": "assistant", "content": content}
        | ({"reasoning_content": reasoning} if reasoning else {})
        | ({"tool_calls": calls} if calls else {})
    ),
    st.none() | st.text(max_size=10),
    st.text(max_size=10),
    CALLS,
)
USER = {"role": "user", "content": "Roll a die."}
WORDS = [
    "messages",
    "user",
    "assistant",
    "system",
    "text",
    "thinking",
    "tool_use",
    "tool_result",
    "auto",
    "tool",
    "none",
]
NAMES = [
    "role",
    "content",
    "type",
    "text",
    "thinking",
    "id",
    "tool_use_id",
    "name",
    "input",
    "input_schema",
    "format",
    "edits",
]
NEAR = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)
FIELDS = (
    "messages", "system", "max_tokens", "tools", "tool_choice", "thinking", "output_config", "stop_sequences",
    "context_management", "mcp_servers", "chat_template_kwargs",
)  # fmt: skip


def completion(message: dict[str, Any], finish: str = "stop") -> dict[str, Any]:
    """A `chat.completion` with this message."""
    return {
        "id": "chatcmpl-1",
        "created": 0,
        "model": "m",
        "choices": [{"message": message, "finish_reason": finish, "token_ids": [1, 2]}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def decode(ids: Any) -> str:
    """A word for each token."""
    return "".join(f" t{token}" for token in ids)


def ask(*messages: Any, **fields: Any) -> dict[str, Any]:
    """The chat body of these."""
    return chat_request({"max_tokens": 8, "messages": [*messages], **fields})


def back(said: dict[str, Any]) -> Message:
    """A chat answer, sent to the client and back as JSON."""
    message = json.loads(json.dumps(answer(completion(said), {}, decode)))
    turn = {"role": "assistant", "content": message["content"]}
    return parse_message(ask(USER, turn, USER)["messages"][1], "back")


@settings(max_examples=50)
@given(SAID)
def test_an_answer_that_comes_back_is_the_stored_one(said: dict[str, Any]) -> None:
    stored, returned = parse_message(said, "stored"), back(said)
    assert returned.key == stored.key
    assert returned.reasoning == stored.reasoning


@settings(max_examples=50)
@given(SAID, st.sampled_from(["stop", "length", "tool_calls"]))
def test_a_stream_adds_up_to_the_message(said: dict[str, Any], finish: str) -> None:
    message = answer(completion(said, finish), {}, decode)
    blocks: list[Any] = []
    names = []
    for name, data in events(message):
        names.append(name)
        assert data["type"] == name
        if name == "message_start":
            begun = data["message"]
        elif name == "content_block_start":
            assert data["index"] == len(blocks)
            blocks.append({**data["content_block"]})
        elif name == "content_block_delta":
            delta, block = data["delta"], blocks[data["index"]]
            if delta["type"] == "input_json_delta":
                block["input"] = json.loads(delta["partial_json"])
            else:
                field = delta["type"].removesuffix("_delta")
                block[field] += delta[field]
        elif name == "message_delta":
            ended = data
    assert begun["stop_reason"] is None
    assert begun["usage"]["input_tokens"] == 3
    assert {**begun, "content": blocks, **ended["delta"], "usage": ended["usage"]} == message
    assert names[-1] == "message_stop"


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(FIELDS), NEAR, max_size=5), NEAR)
def test_any_body_is_translated_or_refused(fields: dict[str, Any], content: Any) -> None:
    for body in (fields, {"max_tokens": 8, "messages": [{"role": "user", "content": content}], **fields}):
        refused = None
        try:
            assert chat_request(body)["messages"] is not None
        except BadRequest as error:
            refused = error
        assert refused is None or (refused.param and refused.param in str(refused))


def test_blocks_keep_their_order() -> None:
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "6"}]}
    failed = {"type": "tool_result", "tool_use_id": "b", "is_error": True}
    texts = [{"type": "text", "text": "Now "}, {"type": "text", "text": "this."}]
    assert ask({"role": "user", "content": [result, failed, *texts]})["messages"] == [
        {"role": "tool", "tool_call_id": "a", "content": "6"},
        {"role": "tool", "tool_call_id": "b", "content": "error"},
        {"role": "user", "content": "Now this."},
    ]


@pytest.mark.parametrize(
    ("fields", "chat"),
    [
        ({"tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        ({"tool_choice": {"type": "tool", "name": "roll"}},
         {"tool_choice": {"type": "function", "function": {"name": "roll"}}}),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, {}),
        ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": True, "a": 1}},
         {"chat_template_kwargs": {"enable_thinking": True, "a": 1}}),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"a": 1}}}},
         {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"a": 1}}}}),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}}, {}),
        ({"stop_sequences": []}, {}),
        ({"mcp_servers": [], "container": None, "service_tier": "auto"}, {}),
    ],
)  # fmt: skip
def test_fields(fields: dict[str, Any], chat: dict[str, Any]) -> None:
    assert ask(USER, **fields) == {"messages": [USER], "max_tokens": 8} | chat


@pytest.mark.parametrize(
    ("ids", "stops", "named"),
    [
        ([1, 2], ["t3", "t2"], "t2"),
        ([1, 2], ["2", "t1 t2", "t2"], "t1 t2"),
        ([1, 2], ["t3"], None),
        ([2, 2], ["t2"], None),  # met earlier: the engine would have ended there, so something else ended this
        ([1, 2], [], None),
    ],
)
def test_the_stop_sequence_is_the_one_that_ended_it(ids: list[int], stops: list[str], named: str | None) -> None:
    chat = completion({"role": "assistant", "content": "x"})
    chat["choices"][0]["token_ids"] = ids
    message = answer(chat, {"stop_sequences": stops}, decode)
    assert (message["stop_sequence"], message["stop_reason"]) == (named, "stop_sequence" if named else "end_turn")


def test_arguments_that_are_no_json_go_out_as_text() -> None:
    call = {"type": "function", "function": {"name": "roll", "arguments": '{"sides": NaN}'}}
    message = answer(completion({"role": "assistant", "content": "", "tool_calls": [call]}), {}, decode)
    assert message["content"][0]["input"] == {"arguments": '{"sides": NaN}'}
    json.dumps(message, allow_nan=False)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadRequest("x"), "invalid_request_error"),
        (UnknownSession("x"), "not_found_error"),
        (SessionGone("x"), "not_found_error"),
        (UpstreamError("x"), "api_error"),
        (UpstreamTimeout("x"), "timeout_error"),
        (SessionError("x"), "api_error"),
    ],
)
def test_errors(error: SessionError, kind: str) -> None:
    assert error_body(error) == {"type": "error", "error": {"type": kind, "message": "x"}, "request_id": None}


def test_an_overflow_reads_as_clients_expect() -> None:
    counted = error_body(ContextOverflow("Input length (9 tokens) exceeds the maximum allowed length (4 tokens)."))
    assert counted["error"]["message"].startswith("prompt is too long: 9 tokens > 4 maximum. Input length")
    assert error_body(ContextOverflow("too many"))["error"]["message"] == "prompt is too long: too many"
