"""GLM-4.7's text format: what is parsed, and what stays as it was written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.toolcalls import parse_tool_calls, split_reasoning


def _tool(name: str, **properties: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def _call(name: str, **arguments: str) -> str:
    pairs = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in arguments.items())
    return f"<tool_call>{name}{pairs}</tool_call>"


WEATHER = _tool("weather", city={"type": "string"}, days={"type": "integer"}, note={"type": ["string", "null"]})
TOOLS = [WEATHER, _tool("stop")]


def test_values_follow_the_schema() -> None:
    text = "Let me look." + _call("weather", city="12", days="2", note="null", more='{"a": [1, "x"]}')
    parsed = parse_tool_calls(text, TOOLS)
    assert parsed.content == "Let me look."
    [call] = parsed.tool_calls
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {
        "city": "12",
        "days": 2,
        "note": None,
        "more": {"a": [1, "x"]},
    }


def test_several_calls_are_numbered_and_text_around_them_is_kept() -> None:
    text = "a" + _call("stop") + "\n" + _call("weather", city="Oslo") + "b"
    parsed = parse_tool_calls(text, TOOLS)
    assert [(call["index"], call["function"]["name"]) for call in parsed.tool_calls] == [(0, "stop"), (1, "weather")]
    assert parsed.content == "a\nb"
    assert len({call["id"] for call in parsed.tool_calls}) == 2


def test_newlines_between_parts_are_allowed() -> None:
    text = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
    [call] = parse_tool_calls(text, TOOLS).tool_calls
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}


@pytest.mark.parametrize(
    "text",
    [
        "no call at all",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo",
        "<tool_call>weather<arg_key>city</arg_key></tool_call>",
        "<tool_call>weather<arg_key>city</arg_key><arg_value>Oslo</arg_value>trailing</tool_call>",
        "<tool_call>unknown<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>",
        "<tool_call></tool_call>",
        "</tool_call><tool_call>",
    ],
)
def test_malformed_calls_stay_in_the_content(text: str) -> None:
    parsed = parse_tool_calls(text, TOOLS)
    assert parsed.tool_calls == ()
    assert parsed.content == text


def test_a_malformed_call_does_not_take_a_good_one_with_it() -> None:
    bad = "<tool_call>nobody</tool_call>"
    parsed = parse_tool_calls(bad + _call("stop"), TOOLS)
    assert [call["function"]["name"] for call in parsed.tool_calls] == ["stop"]
    assert parsed.content == bad


@pytest.mark.parametrize("value", ["NaN", "1e999", "-Infinity", '"\\ud800"', "{", "[" * 2000, "9" * 6000])
def test_values_that_are_no_json_stay_texts(value: str) -> None:
    [call] = parse_tool_calls(_call("weather", days=value), TOOLS).tool_calls
    arguments = call["function"]["arguments"]
    assert json.loads(arguments) == {"days": value}
    arguments.encode()  # can be sent


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                "<arg_key>",
                "</arg_key>",
                "<arg_value>",
                "</arg_value>",
                "weather",
                "1",
                "\n",
            ]
        ),
        max_size=14,
    ),
    st.lists(st.sampled_from([WEATHER, {}, {"function": None}, {"function": {"name": 3}}]), max_size=3),
)
def test_any_text_is_parsed_without_an_error(parts: list[str], tools: list[dict[str, Any]]) -> None:
    text = "".join(parts)
    parsed = parse_tool_calls(text, tools)
    for call in parsed.tool_calls:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)
    if not parsed.tool_calls:
        assert parsed.content == text


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1), st.text("xyz 12", max_size=5), max_size=3))
def test_string_arguments_survive_a_round_trip(arguments: dict[str, str]) -> None:
    tool = _tool("f", **{name: {"type": "string"} for name in arguments})
    [call] = parse_tool_calls(_call("f", **arguments), [tool]).tool_calls
    assert json.loads(call["function"]["arguments"]) == arguments


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("plain", False, (None, "plain")),
        ("<think>why</think>what", False, ("why", "what")),
        ("why</think>what", True, ("why", "what")),
        ("</think>what", True, (None, "what")),
        ("never ends", True, ("never ends", "")),
        ("\nwhy\n</think>\nwhat", True, ("\nwhy\n", "\nwhat")),
        ("<think><think>why</think>what", False, ("why", "what")),
        ("why<tool_call>f</tool_call>", True, ("why", "<tool_call>f</tool_call>")),
        ("so <think>why</think>what", False, ("so <think>why", "what")),
        ("a</think>b", False, (None, "a</think>b")),
        ("", True, (None, "")),
    ],
)
def test_reasoning(text: str, opened: bool, expected: tuple[str | None, str]) -> None:
    assert split_reasoning(text, opened=opened) == expected
