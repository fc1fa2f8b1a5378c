"""OpenAI's Responses <-> chat: an answer that comes back is the stored message, and no body breaks the translation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.errors import BadRequest
from pacenote.rollout.messages import Message, parse_message
from pacenote.rollout.responses import answer, chat_request, events

CALLS = st.lists(
    st.builds(
        lambda arguments, id: {"type": "function", "function": {"name": "roll", "arguments": arguments}} | id,
        st.sampled_from(["", "{}", '{"sides": 6}', "not json", '{"sides": NaN}']),
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
WORDS = ["message", "user", "assistant", "developer", "input_text", "reasoning", "function_call", "function", "auto"]
NAMES = ["role", "content", "type", "text", "id", "call_id", "name", "arguments", "output", "format", "effort"]
NEAR = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=5),
    max_leaves=12,
)
FIELDS = (
    "input", "instructions", "max_output_tokens", "tools", "tool_choice", "parallel_tool_calls", "reasoning", "text",
    "include", "truncation", "store", "conversation",
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


def back(answers: list[dict[str, Any]]) -> list[Message]:
    """Chat answers with a user's message after each, sent to the client and back as JSON."""
    items: list[Any] = []
    for said in answers:
        response = json.loads(json.dumps(answer(completion(said), {})))
        items += [*response["output"], USER]
    return [parse_message(message, "back") for message in chat_request({"input": items})["messages"]]


@settings(max_examples=50)
@given(st.lists(SAID, min_size=1, max_size=3))
def test_answers_that_come_back_are_the_stored_ones(answers: list[dict[str, Any]]) -> None:
    returned = back(answers)
    assert [message.role for message in returned] == ["assistant", "user"] * len(answers)
    for message, said in zip(returned[::2], answers, strict=True):
        stored = parse_message(said, "stored")
        assert message.key == stored.key
        assert message.reasoning == stored.reasoning


@settings(max_examples=50)
@given(st.lists(SAID, min_size=2, max_size=3))
def test_answers_in_a_row_stay_apart(answers: list[dict[str, Any]]) -> None:
    """Where each starts with its thought, or the one before ended with a call and it says something."""
    answers = [said | {"reasoning_content": "t"} for said in answers]
    items = [item for said in answers for item in answer(completion(said), {})["output"]]
    messages = chat_request({"input": items})["messages"]
    assert [parse_message(message, "back").key for message in messages] == [
        parse_message(said, "stored").key for said in answers
    ]


@settings(max_examples=50)
@given(SAID, st.sampled_from(["stop", "length", "tool_calls"]))
def test_a_stream_adds_up_to_the_response(said: dict[str, Any], finish: str) -> None:
    response = answer(completion(said, finish), {"instructions": "Be brief."})
    assert response["status"] == ("incomplete" if finish == "length" else "completed")
    items: list[Any] = []
    for number, (name, data) in enumerate(events(response)):
        assert (data["type"], data["sequence_number"]) == (name, number)
        if name == "response.output_item.added":
            assert data["output_index"] == len(items)
            items.append(json.loads(json.dumps(data["item"])))
        elif name == "response.content_part.added":
            assert data["content_index"] == len(items[-1]["content"])
            items[-1]["content"].append({**data["part"]})
        elif name == "response.function_call_arguments.delta":
            items[-1]["arguments"] += data["delta"]
        elif name.endswith(".delta"):
            items[-1]["content"][data["content_index"]]["text"] += data["delta"]
        elif name == "response.output_item.done":
            assert items[-1] | {"status": data["item"]["status"]} == data["item"]
            items[-1] = data["item"]
        last = (name, data)
    assert items == response["output"]
    assert last[0] == f"response.{response['status']}"
    assert last[1]["response"] == response


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(FIELDS), NEAR, max_size=5), NEAR)
def test_any_body_is_translated_or_refused(fields: dict[str, Any], content: Any) -> None:
    for body in (fields, {"input": [{"role": "user", "content": content}], **fields}):
        refused = None
        try:
            assert chat_request(body)["messages"]
        except BadRequest as error:
            refused = error
        assert refused is None or (refused.param and refused.param in str(refused))


@pytest.mark.parametrize(
    ("fields", "chat"),
    [
        ({"tool_choice": {"type": "function", "name": "roll"}},
         {"tool_choice": {"type": "function", "function": {"name": "roll"}}}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}),
        ({"store": False, "background": False, "truncation": "disabled", "previous_response_id": None}, {}),
        ({"max_output_tokens": 5, "reasoning": {"effort": "high"}}, {"max_tokens": 5, "reasoning_effort": "high"}),
    ],
)  # fmt: skip
def test_fields(fields: dict[str, Any], chat: dict[str, Any]) -> None:
    assert chat_request({"input": [USER], **fields}) == {"messages": [USER]} | chat


def test_what_an_agent_injects() -> None:
    """Assistant messages of its own stand alone; outputs may be parts."""
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two."},
        {"type": "function_call", "call_id": "a", "name": "roll", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "6"}]},
    ]
    call = {"id": "a", "type": "function", "function": {"name": "roll", "arguments": "{}"}}
    assert chat_request({"input": items})["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "6"},
    ]
