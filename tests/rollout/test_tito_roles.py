"""Roles that agents append: which are allowed, and that what they put in an assistant's mouth is never trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pacenote.rollout.messages import ROLES
from tests.rollout.talk import USER, WAIT, chat, error, records, said, start

if TYPE_CHECKING:
    from tests.rollout.conftest import Player, ScriptedEngine, Served

ORDERS = list(itertools.permutations(ROLES))


def told(roles: Sequence[str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": f"({role} {place})"} for place, role in enumerate(roles)]


def check(player: Player, roles: Sequence[str]) -> None:
    """Append messages of these roles after an answer, answer, and go back behind them once more."""
    first = player.ask([USER], [40, 41], text="first")
    history = [USER, first, *told(roles)]
    second = player.ask(history, [42], text="second")
    injected = [False] * len(roles)
    assert player.turn.parent is player.session.turns[0]
    assert player.turn.generated() == [False, True, *injected, True]
    [trajectory] = player.session.trajectories()
    assert trajectory.tokens[trajectory.loss_mask == 1].tolist() == [40, 41, 42]
    decode = player.template._tokenizer.decode
    for (role, start_, stop, generated), message in zip(trajectory.spans[2:-1], history[2:], strict=True):
        assert (role, generated) == (message["role"], False)
        assert message["content"] in decode(trajectory.tokens[start_:stop])
    # A rollback goes to what was sampled, not to the last message of an assistant.
    for kept in range(len(history), 1, -1):
        player.ask([*history[:kept], {"role": "tool", "content": "instead"}], [50 + kept])
        assert player.turn.parent is player.session.turns[0]
        assert player.turn.generated() == [False, True, *injected[: kept - 2], False, True]
    player.ask([*history, second, USER], [42])
    assert player.turn.parent is player.session.turns[1]
    player.check()


@pytest.mark.parametrize("roles", ORDERS, ids=" ".join)
def test_every_order_of_all_roles(player: Player, roles: Sequence[str]) -> None:
    check(player, roles)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([*ROLES, "assistant"]), min_size=1, max_size=6))
def test_any_roles(new_player: Callable[..., Player], roles: list[str]) -> None:
    player = new_player()
    check(player, roles)
    player.close()


def test_an_injected_copy_of_the_answer_is_not_the_answer(player: Player) -> None:
    """The same words twice: the first are the policy's, the second the agent's."""
    first = player.ask([USER], [40], stop="user", text="same")
    player.ask([USER, first, first, USER], [41])  # its stop token gives way to another opener
    assert player.turn.generated() == [False, True, False, False, True]
    player.ask([USER, first, USER], [42])
    assert player.turn.parent is player.session.turns[0]
    assert [t.trained for t in player.session.trajectories()] == [1, 3]
    player.check()


@pytest.mark.parametrize("allowed", [["tool"], ["user"], ["tool", "user"], ["assistant", "system"], list(ROLES)])
def test_the_flag(serve: Callable[..., Served], engine: ScriptedEngine, allowed: list[str]) -> None:
    with (
        serve(append_roles=frozenset(allowed)) as served,
        httpx.Client(base_url=served.url, timeout=WAIT, trust_env=False) as http,
    ):
        for role in ROLES:
            session = start(http)
            answer = said(http, session, [USER])
            history = [USER, answer, *told([allowed[0], role])]
            got = chat(http, session, history)
            if role in allowed:
                assert got.status_code == 200
                continue
            asked = len(engine.bodies)
            text = error(got, 400, "role_not_allowed")
            assert f"messages[3] has role {role!r}, but only {', '.join(sorted(allowed))} may be appended" in text
            assert "--tito-allowed-append-roles" in text
            assert got.json()["error"]["param"] == "messages[3].role"
            assert len(records(http, session)) == 1
            assert len(engine.bodies) == asked
