"""When two messages are the same, by mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from pacenote.rollout.errors import MatchFailed, StartupError
from pacenote.rollout.matching import MODES, Match
from pacenote.rollout.messages import parse_message
from tests.rollout.talk import USER, WAIT, chat, error, records, said, start

if TYPE_CHECKING:
    from tests.rollout.conftest import Player, ScriptedEngine, Served

HERE = "tests.rollout.test_matching"


def by_length(message: dict[str, Any]) -> object:
    """Messages of one role and length are the same; "boom" is one that this function cannot take."""
    if message["content"] == "boom":
        raise KeyError("no boom")
    return {"role": message["role"], "length": len(message["content"])}


def shouting(message: dict[str, Any]) -> object:
    """Changes what it was given."""
    message["content"] = message["content"].upper()
    message.get("tool_calls", []).clear()
    return message


def no_json(message: dict[str, Any]) -> object:
    """What cannot be compared as JSON."""
    return {message["role"]}


COUNT = iter(range(1000))


def unsettled(message: dict[str, Any]) -> object:
    """Another value every time."""
    return next(COUNT)


class Keys:
    """A holder of functions."""

    role = staticmethod(lambda message: message["role"])


NOT_CALLABLE = 3


def call(name: str, arguments: str, id: str = "c") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def key(mode: str, **fields: Any) -> bytes:
    [message] = Match.load(mode).keyed([parse_message({"role": "assistant", **fields}, "m")])
    return message.key


Fields = dict[str, Any]
SAME: dict[str, tuple[Fields, Fields, set[str]]] = {
    "nothing changed": ({"content": "x"}, {"content": "x"}, {"strict", "loose-tool-call", "role-content"}),
    "another text": ({"content": "x"}, {"content": "y"}, set()),
    "another id and spelling": (
        {"tool_calls": [call("f", '{"a": 1}')]},
        {"tool_calls": [call("f", '{ "a":1 }', "d")]},
        {"strict", "loose-tool-call", "role-content"},
    ),
    "other arguments": (
        {"tool_calls": [call("f", '{"a": 1}')]},
        {"tool_calls": [call("f", '{"a": 2}')]},
        {"loose-tool-call", "role-content"},
    ),
    "another function": ({"tool_calls": [call("f", "{}")]}, {"tool_calls": [call("g", "{}")]}, {"role-content"}),
    "a call less": ({"tool_calls": [call("f", "{}")] * 2}, {"tool_calls": [call("f", "{}")]}, {"role-content"}),
    "no call": ({"content": "x", "tool_calls": [call("f", "{}")]}, {"content": "x"}, {"role-content"}),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_the_same(mode: str, name: str) -> None:
    one, two, modes = SAME[name]
    assert (key(mode, **one) == key(mode, **two)) == (mode in modes)


@pytest.mark.parametrize("mode", MODES)
def test_roles_are_never_the_same(mode: str) -> None:
    keys = {Match.load(mode).keyed([parse_message({"role": role}, "m")])[0].key for role in ("user", "assistant")}
    assert len(keys) == 2


@pytest.mark.parametrize("mode", MODES)
def test_stored_spelling_wins_and_reasoning_is_its_own_question(new_player: Callable[..., Player], mode: str) -> None:
    player = new_player(match=mode)
    answer = {"content": "t", "reasoning_content": "r", "tool_calls": [call("f", '{"a":  1}')]}
    player.ask([USER], [40], stop="observation", message=answer)
    tool = {"role": "tool", "content": "b"}
    for changed in ({"tool_calls": [call("f", '{"a": 2}')]}, {"reasoning_content": "other"}):
        told = {"role": "assistant", **answer, **changed}
        player.ask([USER, told, tool])
        extended = mode == "role-content" or (mode == "loose-tool-call" and "tool_calls" in changed)
        assert (player.turn.parent is player.session.turns[0]) == extended
        if extended:
            assert player.sent[player.turn.number].body["messages"][1]["tool_calls"] == answer["tool_calls"]
            assert player.sent[player.turn.number].body["messages"][1]["reasoning_content"] == "r"
    player.check()


def test_a_function_of_the_users(new_player: Callable[..., Player]) -> None:
    player = new_player(match=f"{HERE}:by_length")
    player.ask([{"role": "user", "content": "abc"}], [40], stop="user", text="two")
    player.ask([{"role": "user", "content": "xyz"}, {"role": "assistant", "content": "owt"}, USER], [41])
    assert player.turn.parent is player.session.turns[0]
    assert [message["content"] for message in player.sent[1].body["messages"]] == ["abc", "two", "a"]
    player.check()


def test_a_function_cannot_change_messages() -> None:
    message = parse_message({"role": "assistant", "content": "a", "tool_calls": [call("f", "{}")]}, "m")
    [keyed] = Match.load(f"{HERE}:shouting").keyed([message])
    assert keyed.plain == message.plain
    assert message.plain["content"] == "a"
    assert len(message.plain["tool_calls"]) == 1
    assert keyed.key != message.key


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("loose", "expected match as strict, loose-tool-call, role-content or package.module:function, got 'loose'"),
        ("a.b:", "got 'a.b:'"),
        ("os;x:y", "got 'os;x:y'"),
        ("no_such_module:f", "cannot import no_such_module:f: ModuleNotFoundError"),
        (f"{HERE}:nothing", "cannot import .*: AttributeError"),
        (f"{HERE}:NOT_CALLABLE", "to be a function, got int"),
        (f"{HERE}:no_json", r"for every role: --match .*:no_json failed on messages\[0\] of role 'system': TypeError"),
        (f"{HERE}:unsettled", "return the same for the same message"),
    ],
)
def test_what_is_no_match(name: str, text: str) -> None:
    with pytest.raises(StartupError, match=text):
        Match.load(name)
    assert Match.load(f"{HERE}:Keys.role").function is Keys.role


def test_a_function_that_fails_is_a_400_with_its_name(serve: Callable[..., Served], engine: ScriptedEngine) -> None:
    with (
        serve(match=f"{HERE}:by_length", append_roles=frozenset({"user"})) as served,
        httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http,
    ):
        session = start(http)
        answer = said(http, session, [USER])
        text = error(chat(http, session, [USER, answer, {"role": "user", "content": "boom"}]), 400, "match_failed")
        assert f"--match {HERE}:by_length failed on messages[2] of role 'user': KeyError: 'no boom'" in text
        assert len(engine.bodies) == 1
        assert len(records(http, session)) == 1


def test_a_function_that_fails_on_the_answer_records_nothing(new_player: Callable[..., Player]) -> None:
    player = new_player(match=f"{HERE}:by_length")
    with pytest.raises(MatchFailed, match="of role 'assistant'"):
        player.ask([USER], [40], text="boom")
    assert player.session.turns == ()
