"""Parsing of chat messages, and when two of them are the same."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.errors import BadRequest
from pacenote.rollout.messages import ROOT, chain, parse_message, parse_messages

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ALMOST = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool", "system"]) | JSON,
        "content": st.text(max_size=8)
        | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": JSON}))
        | JSON,
        "reasoning_content": st.text(max_size=4) | JSON,
        "tool_calls": st.lists(
            st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.text(max_size=3), "arguments": JSON})})
            | JSON,
            max_size=2,
        )
        | JSON,
        "name": JSON,
    },
)


def key(**fields: Any) -> bytes:
    return parse_message({"role": "assistant", **fields}, "m").key


def call(arguments: object, name: str = "f", **more: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}, **more}]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "non-empty list of messages, got NoneType"),
        ([], "got an empty list"),
        ({}, "got dict"),
        ("hi", "got str"),
        ([{"role": "user"}, 3], r"messages\[1\] must be an object, got int"),
        ([{"content": "x"}], r"messages\[0\].role must be one of system, user, assistant, tool, got None"),
        ([{"role": "developer"}], r"got 'developer'"),
        ([{"role": ["user"]}], r"got \['user'\]"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be a string or a list of text parts, got int"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], r"content\[0\].*'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] must be a text part"),
        ([{"role": "assistant", "reasoning_content": 1}], "reasoning_content must be a string"),
        ([{"role": "assistant", "tool_calls": {}}], r"tool_calls must be a list, got dict"),
        ([{"role": "assistant", "tool_calls": [1]}], r"tool_calls\[0\] must be an object with a function"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] must be an object with a function"),
        ([{"role": "assistant", "tool_calls": call("{}", name=None)}], "name must be a string"),  # type: ignore[arg-type]
        ([{"role": "assistant", "tool_calls": call(3)}], "arguments must be a JSON text, got 3"),
    ],
)
def test_what_is_no_message(value: object, text: str) -> None:
    with pytest.raises(BadRequest, match=text) as caught:
        parse_messages(value)
    assert caught.value.param == "messages"
    assert caught.value.status == 400


def test_a_message_keeps_what_came_and_what_templates_want() -> None:
    value = {
        "role": "assistant",
        "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"],
        "reasoning_content": "why",
        "tool_calls": call('{"x": [1]}', id="c1"),
        "refusal": None,
        "annotations": [],
    }
    message = parse_message(value, "m")
    assert message.raw == {name: field for name, field in value.items() if name != "refusal"}
    assert message.plain == {
        "role": "assistant",
        "content": "abc",
        "reasoning_content": "why",
        "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": [1]}}}],
    }
    assert message.reasoning == "why"
    assert parse_message({"role": "tool", "content": "x", "tool_call_id": "c1", "name": "f"}, "m").plain == {
        "role": "tool",
        "content": "x",
        "tool_call_id": "c1",
        "name": "f",
    }


def test_rewriting_on_the_way_back_changes_nothing() -> None:
    assert key(content="ab") == key(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    assert key(content="ab") == key(content="ab", refusal=None, audio=None, provider_specific_fields={"x": 1})
    assert key(content=None) == key(content="") == key() == key(content=[])
    assert key(content="a") == key(content="a", reasoning_content="thought")
    assert key(tool_calls=call('{"b": 1, "a": [2, "ü"]}')) == key(tool_calls=call('{ "a":[2,"\\u00fc"],"b":1 }'))
    assert (
        key(tool_calls=call("{}")) == key(tool_calls=call("")) == key(tool_calls=call(None)) == key(tool_calls=call({}))
    )
    assert key(tool_calls=call("{}", id="1")) == key(tool_calls=call("{}", id="2", index=0))


def test_messages_that_say_other_things_differ() -> None:
    keys = [
        key(content="a"),
        key(content="a "),
        key(content=""),
        key(tool_calls=call("{}")),
        key(tool_calls=call("{}") * 2),
        key(tool_calls=call("{}", name="g")),
        key(tool_calls=call('{"a": 1}')),
        key(tool_calls=call('{"a": "1"}')),
        key(tool_calls=call('{"a": true}')),
        key(tool_calls=call('{"a"')),
        parse_message({"role": "user", "content": "a"}, "m").key,
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "arguments",
    ['{"city": "Par', "not json", "[1, 2]", '"text"', "3", "null", '{"a": NaN}', "{", "[" * 5000, '{"a": "\\ud800"}'],
    ids=list("abcdefghij"),
)
def test_arguments_that_are_no_json_object_are_rendered_as_text(arguments: str) -> None:
    message = parse_message({"role": "assistant", "tool_calls": call(arguments)}, "m")
    assert message.raw["tool_calls"][0]["function"]["arguments"] == arguments
    [made] = message.plain["tool_calls"]
    assert isinstance(made["function"]["arguments"], dict)
    orjson.dumps(message.plain)  # nothing that cannot be text, nothing that is nested beyond measure


@pytest.mark.parametrize("levels", [100, 101, 400, 700, 980, 1200])
def test_arguments_of_a_policy_that_repeats_itself(levels: int) -> None:
    arguments = '{"a":' * levels + "1" + "}" * levels
    [made] = parse_message({"role": "assistant", "tool_calls": call(arguments)}, "m").plain["tool_calls"]
    assert list(made["function"]["arguments"]) == (["a"] if levels == 100 else ["arguments"])


def test_a_text_with_nan_stays_an_object() -> None:
    [made] = parse_message({"role": "assistant", "tool_calls": call('{"a": NaN}')}, "m").plain["tool_calls"]
    assert str(made["function"]["arguments"]) == "{'a': nan}"


def test_arguments_nested_beyond_reason() -> None:
    nested: dict[str, Any] = {}
    for _ in range(2000):
        nested = {"a": nested}
    with pytest.raises(BadRequest, match="nested too deeply"):
        parse_message({"role": "assistant", "tool_calls": call(nested)}, "m")


@settings(max_examples=200, deadline=None)
@given(st.lists(ALMOST | JSON, max_size=3) | JSON)
def test_anything_is_parsed_or_refused(value: object) -> None:
    try:
        wire = orjson.loads(orjson.dumps(value))
    except (TypeError, ValueError):
        return  # not a body that can arrive
    try:
        messages = parse_messages(wire)
    except BadRequest:
        return
    for message, raw in zip(messages, wire, strict=True):
        assert message.role == raw["role"]
        assert isinstance(message.plain["content"], str)
        assert None not in message.raw.values()
        assert parse_message(dict(message.raw), "again").key == message.key


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=16, max_size=16), max_size=6), st.data())
def test_a_chain_can_be_cut_and_continued(keys: list[bytes], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(keys)))
    whole = chain(keys)
    assert whole[0] == ROOT
    assert len(whole) == len(keys) + 1
    assert whole == chain(keys[:cut]) + chain(keys[cut:], whole[cut])[1:]
    assert len(set(whole)) == len(whole)
