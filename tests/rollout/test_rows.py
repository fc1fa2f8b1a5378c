"""Rows of an answer: only those that the session lacks are kept, and what came twice is held against what was there."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.responses import Response

from pacenote.replay.record import CACHED, DECODE, PREFILL, RoutingRecord
from pacenote.replay.spec import RoutingGeometry
from pacenote.replay.vllm import encode_vllm
from pacenote.rollout.errors import ContextOverflow, UpstreamError
from tests.rollout.talk import MORE, USER, chat, error, records, said, samples, start

if TYPE_CHECKING:
    import httpx

    from tests.rollout.conftest import Player, ScriptedEngine

Make = Callable[..., dict[str, Any]]
Named = Callable[[NDArray[Any]], tuple[list[int], list[int]]]
LAYERS = 6  # of the tiny model, the dense one included
FIRST, SECOND = [40, 41, 42], [50, 51]


class Ignoring:
    """An engine that sends all rows, whatever was asked for.

    Args:
        answer: `sglang_answer`.
        change: what it does to the rows [R, LAYERS, 2] before it sends them.
    """

    def __init__(self, answer: Make, change: Callable[[Any], None] = lambda _: None) -> None:
        self._answer, self._change = answer, change

    def __call__(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a body."""
        made = self._answer(body | {"routed_experts_start_len": 0}, SECOND)
        [choice] = made["choices"]
        rows = np.frombuffer(base64.b64decode(choice["meta_info"]["routed_experts"]), dtype="<i4").copy()
        self._change(rows.reshape(-1, LAYERS, 2))
        choice["meta_info"]["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
        return made


def talk(player: Player, write: Callable[[dict[str, Any]], dict[str, Any]], *, version: int = 0) -> None:
    """Two turns, the second of them answered by `write`."""
    answer = player.ask([USER], FIRST, stop="user", version=version)
    player.ask([USER, answer, MORE], SECOND, write=write)


def test_all_rows_although_fewer_were_asked_for(player: Player, answer: Make, identity: Named) -> None:
    talk(player, Ignoring(answer))
    held = player.session.turns[0].length - 1
    assert player.sent[1].body["routed_experts_start_len"] == held
    record = player.session.records()[1]
    assert (record["rows_compared"], record["rows_differing"]) == (held, 0)
    assert record["note"] == "the engine sent all rows again"
    [trajectory] = player.session.trajectories()
    assert trajectory.experts is not None
    assert identity(trajectory.experts) == (trajectory.tokens[:-1].tolist(), list(range(len(trajectory) - 1)))
    assert trajectory.provenance[held:].tolist() == [PREFILL] * (len(trajectory) - 2 - held) + [DECODE]
    first = player.session.records()[0]
    assert (first["rows_compared"], first["rows_differing"], first["note"]) == (0, 0, None)


def test_rows_that_came_back_otherwise_are_counted_and_not_taken(player: Player, answer: Make, identity: Named) -> None:
    def change(rows: Any) -> None:
        rows[2, 1] = rows[3, 4] = rows[3, 5] = (14, 15)
        rows[4, 2] = rows[4, 2, ::-1].copy()  # another order of the same experts is no difference

    talk(player, Ignoring(answer, change))
    held = player.session.turns[0].length - 1
    record = player.session.records()[1]
    assert (record["rows_compared"], record["rows_differing"]) == (held, 2)
    assert f"2 of {held} rows came back with other experts; those that were held stay" in record["note"]
    [trajectory] = player.session.trajectories()
    assert trajectory.experts is not None
    assert identity(trajectory.experts) == (trajectory.tokens[:-1].tolist(), list(range(len(trajectory) - 1)))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[:, 1:].__iadd__(1),
        lambda rows: rows.__setitem__(slice(None), np.random.default_rng(0).integers(0, 16, rows.shape)),
    ],
)
def test_rows_of_another_prefix_are_refused(player: Player, answer: Make, change: Callable[[Any], None]) -> None:
    def bounded(rows: Any) -> None:
        change(rows)
        rows %= 16

    with pytest.raises(UpstreamError, match="the engine's rows belong to another prefix"):
        talk(player, Ignoring(answer, bounded))
    assert len(player.session.turns) == 1


def test_rows_of_other_weights_are_not_compared(player: Player, answer: Make) -> None:
    """The rows that are held were written under version 7, those that came under version 0: they may differ."""

    def change(rows: Any) -> None:
        rows[:, 1:] = (rows[:, 1:] + 1) % 16

    talk(player, Ignoring(answer, change), version=7)
    record = player.session.records()[1]
    held = player.session.turns[0].length - 1
    assert (record["rows_compared"], record["rows_differing"]) == (0, 0)
    assert f"none of the {held} rows that were held is of the same weight version" in record["note"]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("place", ["choice", "meta_info"])
def test_vllms_rows(
    player: Player, answer: Make, geometry: RoutingGeometry, identity: Named, everything: bool, place: str
) -> None:
    def write(body: dict[str, Any]) -> dict[str, Any]:
        made = answer(body | ({"routed_experts_start_len": 0} if everything else {}), SECOND)
        [choice] = made["choices"]
        ids = np.frombuffer(base64.b64decode(choice["meta_info"].pop("routed_experts")), dtype="<i4")
        record = RoutingRecord.of(ids.reshape(-1, LAYERS, 2)[:, 1:], geometry, provenance=PREFILL, version=0)
        (choice if place == "choice" else choice["meta_info"])["routed_experts"] = encode_vllm(record, geometry)
        return made

    talk(player, write)
    [trajectory] = player.session.trajectories()
    assert trajectory.experts is not None
    assert identity(trajectory.experts) == (trajectory.tokens[:-1].tolist(), list(range(len(trajectory) - 1)))
    assert (player.session.records()[1]["rows_compared"] > 0) == everything


def test_neither_all_rows_nor_those_that_were_asked_for(player: Player, answer: Make) -> None:
    def write(body: dict[str, Any]) -> dict[str, Any]:
        return answer(body | {"routed_experts_start_len": 1}, SECOND)

    with pytest.raises(UpstreamError, match="the engine and the session disagree on tokens"):
        talk(player, write)


@pytest.mark.parametrize("ignoring", [False, True])
def test_memory_grows_with_new_tokens_only(player: Player, answer: Make, ignoring: bool) -> None:
    """Whatever was sent again: each turn owns its own tokens and rows, and no view of more."""
    history: list[dict[str, Any]] = []
    tools = [{"type": "function", "function": {"name": "f", "description": "d" * 1000, "parameters": {}}}]
    engine = Ignoring(answer)
    for number in range(12):
        history.append({"role": "user", "content": f"q{number}"})
        write = engine if ignoring and number else None
        history.append(player.ask(history, SECOND, write=write, request={"tools": tools}))
    [trajectory] = player.session.trajectories()
    turns = player.session.turns
    assert sum(len(turn.prompt.ids) + len(turn.answer.ids) for turn in turns) == len(trajectory)
    rows = [turn.answer.rows for turn in turns if turn.answer.rows is not None]
    assert sum(record.rows for record in rows) == len(trajectory) - 1
    for record in rows:
        for array in (record.experts, record.provenance, record.version):
            owner = array
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            assert owner.nbytes == array.nbytes
    assert sum(len(turn.prompt.appended) for turn in turns) == 12
    assert len({id(turn.prompt.render.tools) for turn in turns}) == 1


LOST = [
    (400, b'{"message": "Rollback failed: no assistant message found in the first 1 matched messages"}'),
    (400, b'{"error": {"message": "ROLLBACK FAILED"}}'),
    (500, b'{"error": null, "detail": "rollback_failed"}'),
    (422, b'{"message": null, "error": {"detail": [{"msg": "rollback failed"}]}}'),
    (503, b"rollback failed"),
]


@pytest.mark.parametrize(("status", "raw"), LOST)
def test_a_failed_rollback_is_asked_once_more_for_everything(
    http: httpx.Client, engine: ScriptedEngine, answer: Make, identity: Named, status: int, raw: bytes
) -> None:
    session = start(http)
    first = said(http, session, [USER])
    failing = iter([Response(raw, status)])
    engine.write = lambda body: next(failing, None) or answer(body, SECOND)
    said(http, session, [USER, first, MORE])
    held = len(engine.bodies[0]["input_ids"]) + 1
    assert [body["routed_experts_start_len"] for body in engine.bodies] == [0, held, 0]
    assert engine.bodies[1] | {"routed_experts_start_len": 0} == engine.bodies[2]
    record = records(http, session)[1]
    assert record["note"] == "the engine lost its prefix (rollback failed) and was asked once more, for all rows"
    assert (record["rows_compared"], record["rows_differing"]) == (held, 0)
    [trajectory] = samples(http, session)
    assert trajectory.experts is not None
    assert identity(trajectory.experts) == (trajectory.tokens[:-1].tolist(), list(range(len(trajectory) - 1)))


def test_a_rollback_that_fails_twice_is_the_engines_failure(http: httpx.Client, engine: ScriptedEngine) -> None:
    session = start(http)
    engine.write = lambda _: Response(b'{"message": "Rollback failed"}', 400)
    assert "Rollback failed" in error(chat(http, session, [USER]), 502, "upstream_error")
    assert len(engine.bodies) == 2
    assert http.get(session).json()["records"] == []


@pytest.mark.parametrize("body", [b"null", b'{"error": null}', b'{"message": null}', b""])
def test_an_error_without_words_is_asked_once(http: httpx.Client, engine: ScriptedEngine, body: bytes) -> None:
    engine.write = lambda _: Response(body, 500)
    error(chat(http, start(http), [USER]), 502, "upstream_error")
    assert len(engine.bodies) == 1


def test_a_rollback_that_fails_in_an_aborted_answer(player: Player, answer: Make) -> None:
    aborts = iter([{"type": "abort", "message": "Rollback Failed"}])

    def write(body: dict[str, Any]) -> dict[str, Any]:
        made = answer(body, SECOND)
        made["choices"][0]["meta_info"]["finish_reason"] = next(aborts, {"type": "length", "length": 2})
        return made

    player.ask([USER], SECOND, write=write)
    assert "asked once more" in player.session.records()[0]["note"]


def test_what_the_scheduler_aborts_as_too_long_is_an_overflow(player: Player, answer: Make) -> None:
    """SGLang in prefill/decode pairs answers 200 and aborts."""
    why = "Request 3 exceeds the maximum number of tokens: 9 > 8"
    with pytest.raises(ContextOverflow, match=why):
        player.ask([USER], SECOND, finish_reason={"type": "abort", "message": why, "status_code": 400})
    assert player.session.turns == ()


def test_cached_rows_are_told_from_others(player: Player, answer: Make) -> None:
    first = player.ask([USER], FIRST, stop="user")
    held = player.turn.length - 1
    player.ask([USER, first, MORE], SECOND, cached_tokens=held + 1)
    [trajectory] = player.session.trajectories()
    assert trajectory.provenance[held] == CACHED
    assert trajectory.provenance[held + 1] == PREFILL


@pytest.mark.parametrize(("places", "side"), [([0], "prompt"), ([0, 1, 2], "prompt"), ([-1], "answer")])
def test_rows_that_were_never_written_are_refused(
    http: httpx.Client, engine: ScriptedEngine, answer: Callable[..., dict[str, Any]], places: list[int], side: str
) -> None:
    """A pair behind a gateway, or a host cache: nothing is recorded, and the way out is named."""

    def zeroed(body: dict[str, Any]) -> dict[str, Any]:
        made = answer(body, [40, 41, 42])
        meta = made["choices"][0]["meta_info"]
        rows = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype="<i4").reshape(-1, 6 * 2).copy()
        rows[places] = 0
        meta["routed_experts"] = base64.b64encode(rows.tobytes()).decode()
        return made

    engine.write = zeroed
    session = start(http)
    message = error(chat(http, session, [USER]), 502, "upstream_error")
    assert f"zeros in every layer for {len(places)} of" in message
    assert f"of the {side}" in message
    assert "--pair" in message
    assert records(http, session) == []
