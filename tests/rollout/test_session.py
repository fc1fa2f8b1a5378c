"""The tree of a session: any conversation that agents can have, and the books that are kept of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pacenote.rollout.messages import ROLES, parse_messages
from pacenote.rollout.session import Session

if TYPE_CHECKING:
    from tests.rollout.conftest import Player

Message = dict[str, Any]
WORDS = st.sampled_from(["", "hi", "a b", "é\n", " x ", "</think>y", "<think>z", "[gMASK]", "7"])
ACTIONS = st.fixed_dictionaries(
    {
        "do": st.sampled_from(["open", "go", "go", "go", "retry", "rewrite", "graft", "again"]),
        "of": st.integers(0, 9),
        "at": st.integers(0, 9),
        "roles": st.lists(st.sampled_from([*ROLES, "tool", "user"]), min_size=1, max_size=3),
        "words": st.lists(WORDS, min_size=3, max_size=3),
        "garble": st.booleans(),
        "sampled": st.lists(st.integers(0, 490), max_size=3),
        "stop": st.sampled_from([None, "text", "user", "observation", "end", "<|assistant|>"]),
        "thought": st.sampled_from([None, None, "t", " t\n"]),
        "call": st.sampled_from([None, None, '{"a": 1}', '{"a": "<|user|>"}', "broken {"]),
        "version": st.integers(0, 2),
    }
)


def garbled(messages: list[Message]) -> list[Message]:
    """The same messages, as clients print them anew."""
    made = copy.deepcopy(messages)
    for message in made:
        message |= {"refusal": None, "provider_specific_fields": {"x": 1}}
        if message.get("content"):
            half = len(message["content"]) // 2
            message["content"] = [
                {"type": "text", "text": message["content"][:half]},
                {"type": "text", "text": message["content"][half:]},
            ]
    return made


class Agent:
    """Acts on a session, keeping conversations as clients do: lists of messages."""

    def __init__(self, player: Player) -> None:
        self.player = player
        self.asked: list[list[Message]] = []  # requests, by number of turn
        self.said: list[list[Message]] = []  # the same with their answers

    def act(self, action: dict[str, Any]) -> None:
        words = action["words"]
        told = [{"role": role, "content": word} for role, word in zip(action["roles"], words, strict=False)]
        if action["do"] == "open" or not self.said:
            return self.ask([{"role": "user", "content": words[0]}, *told], action)
        place = action["of"] % len(self.said)
        history = self.said[place]
        if action["do"] == "go":
            self.ask([*history, *told], action, parent=place)
        elif action["do"] == "again":  # another answer right after the answer
            self.ask(history, action, parent=place)
        elif action["do"] == "retry":
            turn = self.player.session.turns[place]
            self.ask(self.asked[place], action, parent=turn.parent.number if turn.parent else None)
        elif action["do"] == "rewrite":
            changed = copy.deepcopy(history)
            changed[action["at"] % len(changed)]["content"] = f"rewritten {words[1]}"
            self.ask([*changed, *told], action)
        else:  # an answer of one branch, after the first message of another
            other = self.said[action["at"] % len(self.said)]
            self.ask([history[0], other[-1], *told], action)
        return None

    def ask(self, messages: list[Message], action: dict[str, Any], *, parent: int | None = None) -> None:
        number = len(self.said)
        # The answers are told apart by their number, so that a request extends exactly one of them.
        digits = self.player.template.encode(str(number))[0]
        answer: Message = {"content": f"{number}{action['words'][2]}"}
        if action["thought"]:
            answer["reasoning_content"] = action["thought"]
        if action["call"]:
            answer["tool_calls"] = [
                {"id": f"c{number}", "type": "function", "function": {"name": "f", "arguments": action["call"]}}
            ]
        if action["garble"]:  # a client that leaves reasoning out does so for good
            messages = [{name: m[name] for name in m if name != "reasoning_content"} for m in messages]
        sent = garbled(messages) if action["garble"] else messages
        reply = self.player.ask(
            sent, [*digits, *action["sampled"]], stop=action["stop"], message=answer, version=action["version"]
        )
        turn = self.player.turn
        assert turn.number == number
        assert turn.prompt.note is None
        if parent is not None:
            assert turn.parent is self.player.session.turns[parent]
        self.asked.append(messages)
        self.said.append([*messages, reply])


def act(**fields: Any) -> dict[str, Any]:
    usual = {"do": "go", "of": 0, "at": 0, "roles": ["user"], "words": ["a", "b", "c"], "garble": False}
    return usual | {"sampled": [40], "stop": "user", "thought": None, "call": None, "version": 0} | fields


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions=st.lists(ACTIONS, min_size=1, max_size=7))
@example([act(), act(stop="observation"), act(of=1), act(of=1, roles=["tool"])])  # dropped here, kept there
@example([act(), act(do="retry", version=1), act(of=0, version=2)])  # superseded, and then gone on from
@example([act(), act(), act(do="graft", of=1, at=1), act(of=2, roles=["assistant", "user"])])
def test_any_conversation(new_player: Callable[..., Player], actions: list[dict[str, Any]]) -> None:
    player = new_player()
    try:
        agent = Agent(player)
        for action in actions:
            agent.act(action)
        player.check()
        last = player.turn
        assert player.session.accumulated_token_ids() == [*last.prompt.token_ids(), *last.answer.ids]
        records = player.session.records()
        assert [record["index"] for record in records] == list(range(len(actions)))
        for record, turn in zip(records, player.session.turns, strict=True):
            whole = [*record["messages"], record["response"]]
            if record["parent"] is not None:
                whole = [m.raw for m in player.session.turns[record["parent"]].history()] + whole
            assert whole == [message.raw for message in turn.history()]
    finally:
        player.close()


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def test_an_empty_session() -> None:
    session = Session("s")
    assert session.turns == ()
    books = [session.accumulated_token_ids(), session.records(), session.trajectories(), session.leaves()]
    assert books == [[], [], [], []]
    assert session.newest() == ()
    assert session.recovered_from is None
    assert session.find(parse_messages([user("a")])) is None


def test_asking_and_failing_changes_nothing(player: Player) -> None:
    first = [user("a")]
    player.ask(first)
    pending = player.session.begin(player.turn.prompt)
    assert pending.rivals == player.session.turns
    assert len(player.session.turns) == 1
    assert not player.session.superseded(player.turn)


def test_two_that_wait_together_are_both_kept_and_a_later_one_supersedes_both(player: Player) -> None:
    player.ask([user("a")])
    [turn] = player.session.turns
    other = Session("t")
    one, two = other.begin(turn.prompt), other.begin(turn.prompt)
    kept = [other.commit(one, turn.answer, id="1"), other.commit(two, turn.answer, id="2")]
    assert not any(other.superseded(turn) for turn in kept)
    assert len(other.trajectories()) == 2
    late = other.commit(other.begin(turn.prompt), turn.answer, id="3")
    assert [other.superseded(turn) for turn in (*kept, late)] == [True, True, False]
    assert [leaf.number for leaf in other.leaves()] == [0, 1, 2]
    assert [t.status for t in other.trajectories(include_superseded=True)] == ["superseded", "superseded", "length"]


def test_the_first_turn_can_be_asked_again(player: Player) -> None:
    player.ask([user("a")], [40], stop="end")
    player.ask([user("a")], [41], stop="end")
    assert [turn.parent for turn in player.session.turns] == [None, None]
    [trajectory] = player.session.trajectories()
    assert trajectory.tokens[-2] == 41
    player.check()


def test_a_superseded_answer_that_is_gone_on_from_stands_again(player: Player) -> None:
    old = player.ask([user("a")], [40], text="old")
    new = player.ask([user("a")], [41], text="new")
    assert [player.session.superseded(turn) for turn in player.session.turns] == [True, False]
    player.ask([user("a"), old, user("b")])
    assert [player.session.superseded(turn) for turn in player.session.turns] == [False, False, False]
    assert new["content"] == "new"
    player.check()


def test_of_equal_answers_the_newest_that_stands_is_extended(player: Player) -> None:
    player.ask([user("a")], [40], text="same")
    player.ask([user("a")], [41], text="same")  # supersedes the first
    same = {"role": "assistant", "content": "same"}
    player.ask([user("a"), same, user("b")])
    assert player.turn.parent is player.session.turns[1]
    player.check()


def test_reasoning_that_comes_back_must_be_the_branchs_own(player: Player) -> None:
    for number, thought in enumerate(("first", "second")):
        player.ask([user("a")], [40 + number], message={"content": "same", "reasoning_content": thought})
    answer: Message = {"role": "assistant", "content": "same", "reasoning_content": "first"}
    player.ask([user("a"), answer, user("b")])
    player.ask([user("a"), answer | {"reasoning_content": "third"}, user("b")])  # nobody thought that: context
    assert player.turn.generated() == [False, False, False, True]
    del answer["reasoning_content"]
    player.ask([user("a"), answer, user("c")])  # both fit and both stand: the newer
    assert [turn.parent and turn.parent.number for turn in player.session.turns] == [None, None, 0, None, 1]
    player.check()


def test_an_answer_grafted_elsewhere_is_context(player: Player) -> None:
    one = player.ask([user("a")], [40, 42], text="one")
    two = player.ask([user("a"), one, user("b")], [43], text="two")
    player.ask([user("a"), two, user("c")])
    assert player.turn.parent is None
    assert player.turn.generated() == [False, False, False, True]
    trained = [t.tokens[t.loss_mask == 1].tolist() for t in player.session.trajectories()]
    assert trained == [[40, 42, 43], [40, 41]]
    player.check()


def test_an_assistant_message_that_the_agent_appended_is_not_trained(player: Player) -> None:
    answer = player.ask([user("a")], [40], stop="user")
    told = {"role": "assistant", "content": "inserted"}
    player.ask([user("a"), answer, told, user("b")], [41], stop="user")
    assert player.turn.parent is player.session.turns[0]
    assert player.turn.generated() == [False, True, False, False, True]
    [trajectory] = player.session.trajectories()
    text = player.template._tokenizer.decode(trajectory.tokens)
    assert "<|assistant|></think>inserted<|user|>b" in text
    assert trajectory.tokens[trajectory.loss_mask == 1].tolist() == [40, 41, player.token("<|user|>")]
    player.check()


def test_a_whole_answer_is_preferred_to_one_without_its_stop_token(player: Player) -> None:
    answer = player.ask([user("a")], [40], stop="observation")
    player.ask([user("a"), answer, user("b")])  # the stop token gives way here
    player.ask([user("a"), answer, {"role": "tool", "content": "b"}])  # and stays here
    assert [branch.trained for branch in player.session.branches()] == [{1}, {0, 2}]
    player.check()


def test_records_say_what_was_said(player: Player) -> None:
    answer = player.ask([user("a")], [40], stop="end", text="x", version=7)
    player.ask([user("a"), answer, user("b")], [41, 42], text="y")
    player.ask([user("a"), answer, user("b")], [43], text="z")
    first, second, third = player.session.records()
    assert first | {"created": 0, "id": ""} == {
        "index": 0,
        "id": "",
        "choice": 0,
        "rows_compared": 0,
        "rows_differing": 0,
        "parent": None,
        "created": 0,
        "messages": [user("a")],
        "response": {"role": "assistant", "content": "x"},
        "finish_reason": "stop",
        "status": "completed",
        "weight_version": "7",
        "prompt_tokens": len(player.session.turns[0].prompt.ids),
        "completion_tokens": 2,
        "note": None,
    }
    assert (second["parent"], second["messages"], second["status"]) == (0, [user("b")], "superseded")
    assert (third["status"], third["finish_reason"], third["completion_tokens"]) == ("completed", "length", 1)
    np.testing.assert_array_equal(player.session.turns[2].answer.ids, [43])
