"""The linear policy: extend the newest answer, or take it back; nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.errors import NotLinear
from pacenote.rollout.messages import ROLES
from tests.rollout.talk import MORE, USER, WAIT, chat, error, records, said, samples, start

if TYPE_CHECKING:
    from tests.rollout.conftest import Player, ScriptedEngine, Served

Message = dict[str, Any]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


@pytest.fixture
def linear(new_player: Callable[..., Player]) -> Player:
    """A player under the linear policy."""
    return new_player(policy="linear")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def talk(player: Player, turns: int) -> list[Message]:
    """A conversation of so many answers, each with a text of its own."""
    history: list[Message] = []
    for number in range(turns):
        history.append(user(f"q{number}"))
        history.append(player.ask(history, [40 + number], stop="user", text=f"a{number}"))
    return history


def books(player: Player) -> Any:
    return player.session.records(), [t.tokens.tolist() for t in player.session.trajectories()]


def refused(player: Player, messages: list[Message], **fields: Any) -> str:
    """The refusal of a request that must leave the session as it was."""
    before = books(player)
    with pytest.raises(NotLinear) as caught:
        player.ask(messages, **fields)
    assert books(player) == before
    assert (caught.value.status, caught.value.code) == (400, "not_linear")
    assert "serve with --policy tree" in str(caught.value)
    return str(caught.value)


def test_going_on(linear: Player) -> None:
    talk(linear, 4)
    assert [turn.parent and turn.parent.number for turn in linear.session.turns] == [None, 0, 1, 2]
    linear.check()


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("changed", [False, True])
def test_one_step_back(linear: Player, turns: int, changed: bool) -> None:
    """The newest answer is taken back, whether its prompt is asked again or another one is; twice in a row, too."""
    history = talk(linear, turns)
    asked = [*history[:-2], user("other") if changed else history[-2]]
    for again in range(2):
        linear.ask(asked, [60 + again], stop="user", text=f"again {again}")
        assert linear.turn.parent is (linear.session.turns[turns - 2] if turns > 1 else None)
    [trajectory] = linear.session.trajectories()
    assert trajectory.trained == 2 * turns
    assert 61 in trajectory.tokens
    assert 60 not in trajectory.tokens
    assert [record["status"] for record in linear.session.records()] == (
        ["completed"] * (turns - 1) + ["superseded"] * 2 + ["completed"]
    )
    linear.ask([*asked, {"role": "assistant", "content": "again 1"}, user("on")], [62])
    assert linear.turn.parent is linear.session.turns[turns + 1]


def test_an_injected_assistant_message_is_no_answer_to_roll_back_to(linear: Player) -> None:
    """A rollback goes back by one answer that was sampled, however many assistant messages were put in between."""
    history = talk(linear, 2)
    told = {"role": "assistant", "content": "told"}
    history += [told, user("q2"), told, user("q3")]
    history.append(linear.ask(history, [50], stop="user", text="a2"))
    linear.ask([*history[:-3], user("instead")], [51], stop="user")  # cuts behind the first of the two injected ones
    assert linear.turn.parent is linear.session.turns[1]
    assert linear.turn.generated() == [False, True, False, True, False, False, False, True]
    [trajectory] = linear.session.trajectories()
    trained = trajectory.tokens[trajectory.loss_mask == 1].tolist()
    assert trained == [40, linear.token("<|user|>"), 41, 51, linear.token("<|user|>")]


def test_more_than_one_step_back_is_refused(linear: Player) -> None:
    history = talk(linear, 3)
    text = refused(linear, history[:1])
    assert "the request ends before messages[1], where this session has role 'assistant' with 'a0'" in text
    assert "takes back more than one answer" in text
    text = refused(linear, [*history[:2], user("other")])
    assert text.startswith(
        "messages[2] has role 'user' with 'other' where this session has role 'user' with 'q1' (from character 0). "
    )
    linear.ask([*history, user("q3")], [50])  # and the session goes on


def test_the_first_difference_is_shown_where_it_is(linear: Player) -> None:
    long = "x" * 300
    history: list[Message] = [user(f"{long}yes")]
    for number in range(2):
        history += [linear.ask(history, [40 + number], stop="user", text=f"a{number}"), user("more")]
    history[0] = user(f"{long}no")
    text = refused(linear, history)
    assert f"messages[0] has role 'user' with '{'x' * 20}no'" in text
    assert f"with '{'x' * 20}yes' (from character 280)" in text
    assert len(text) < 600


def test_calls_and_reasoning_that_differ_are_shown(linear: Player) -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    first = linear.ask([user("a")], [40], message={"content": "t", "tool_calls": calls, "reasoning_content": "why"})
    history = [user("a"), first, user("b")]
    history += [linear.ask(history, [41], text="x"), user("c")]
    other = [calls[0] | {"function": {"name": "f", "arguments": '{"a": 2}'}}]
    text = refused(linear, [user("a"), first | {"tool_calls": other}, *history[2:]])
    assert '"a": 2' in text
    assert '"a": 1' in text
    text = refused(linear, [user("a"), first | {"reasoning_content": "how"}, *history[2:]])
    assert "messages[1] has role 'assistant' with 'how' where this session has role 'assistant' with 'why'" in text


def test_an_answer_that_was_taken_back_is_gone(linear: Player) -> None:
    history = talk(linear, 2)
    linear.ask(history[:3], [60], stop="user", text="new")
    linear.ask([*history, user("q")], [61])  # its text may be put in as a message, which is not trained
    assert linear.turn.parent is linear.session.turns[0]
    assert linear.turn.generated() == [False, True, False, False, False, True]


def test_tools_that_change_are_refused(linear: Player) -> None:
    answer = linear.ask([user("a")], [40], stop="user", request={"tools": TOOLS})
    text = refused(linear, [user("a"), answer, user("b")])
    assert "the tools rewrite history: at character" in text
    linear.ask([user("a"), answer, user("b")], request={"tools": TOOLS})
    assert linear.turn.parent is linear.session.turns[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["on", "on", "again", "instead", "far", "stale"]), st.integers(0, 9)), max_size=8
    )
)
def test_any_order_leaves_one_line(new_player: Callable[..., Player], actions: list[tuple[str, int]]) -> None:
    """Whatever is asked: accepted requests leave one line that is trained whole, refused ones change nothing."""
    player = new_player(policy="linear")
    lines: list[list[Message]] = [talk(player, 1)]  # the conversation as the agent knows it, after each accepted step
    depth = 1
    for number, (action, at) in enumerate(actions):
        current = lines[-1]
        if action == "on":
            asked, deeper = [*current, user(f"n{number}")], 1
        elif action == "again":
            asked, deeper = current[:-1], 0
        elif action == "instead":
            asked, deeper = [*current[:-2], user(f"i{number}")], 0
        else:
            asked = [*current[: 2 * (at % max(1, depth - 1))], user(f"f{number}")] if action == "far" else lines[0][:1]
            kept = len(asked) // 2
            if kept < depth - 1:
                refused(player, asked)
                continue
            deeper = kept + 1 - depth
        depth += deeper
        lines.append([*asked, player.ask(asked, [60 + number], stop="user", text=f"r{number}")])
        [trajectory] = player.session.trajectories()
        assert trajectory.trained == 2 * depth
        assert len(trajectory.spans) == len(lines[-1])
    player.close()


def test_over_http(serve: Callable[..., Served], engine: ScriptedEngine) -> None:
    with (
        serve(policy="linear", append_roles=frozenset(ROLES)) as served,
        httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http,
    ):
        session = start(http)
        history: list[Message] = [USER]
        for _ in range(2):
            history += [said(http, session, history), MORE]
        answer = chat(http, session, [MORE, *history[1:]])
        assert "messages[0] has role 'user' with 'b'" in error(answer, 400, "not_linear")
        assert answer.json()["error"]["param"] == "messages"
        assert len(engine.bodies) == len(records(http, session)) == 2
        assert chat(http, session, history, n=3).status_code == 200  # choices stand side by side
        assert [record["parent"] for record in records(http, session)] == [None, 0, 1, 1, 1]
        assert len(samples(http, session)) == 3
        said(http, session, history)  # and are taken back together
        assert len(samples(http, session)) == 1
