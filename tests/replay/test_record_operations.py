"""Operations on records against a plain list of rows: any order of them gives what the list gives."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pacenote.replay.binary import decode_record, encode_record
from pacenote.replay.errors import RecordError
from pacenote.replay.record import CACHED, DECODE, MISSING, PREFILL, RoutingRecord
from pacenote.replay.spec import RoutingGeometry
from pacenote.replay.vllm import decode_vllm, encode_vllm
from pacenote.replay.wire import decode_sglang, encode_sglang

GEOMETRY = RoutingGeometry(num_layers=4, layers=(1, 3), num_experts=300, top_k=2)
Row = tuple[Any, int, int]
"""Experts [L][K], provenance, version."""


def made(rows: list[Row]) -> RoutingRecord:
    experts = np.array([row[0] for row in rows], dtype=np.uint16).reshape(-1, 2, 2)
    provenance, version = (np.array([row[i] for row in rows], dtype=np.int64) for i in (1, 2))
    return RoutingRecord.of(experts, GEOMETRY, provenance=provenance, version=version)


def token(place: int, version: int) -> Row:
    """The routing of the token at a place under a version: the same whenever it is asked for."""
    base = (37 * place + 11 * version) % 290
    return [[base, base + 1], [base + 2, base + 3]], (PREFILL, DECODE, CACHED)[place % 3], version


class Conversation(RuleBasedStateMachine):
    """A record that turns extend, overlap, cut and lose rows of, beside a list that says what it must be."""

    @initialize()
    def begin(self) -> None:
        self.record, self.rows, self.version = RoutingRecord.empty(GEOMETRY), list[Row](), 0

    @rule(count=st.integers(0, 4), back=st.integers(0, 3))
    def turn(self, count: int, back: int) -> None:
        """An engine's answer, from up to `back` rows before the end."""
        start = max(0, len(self.rows) - back)
        new = [token(place, self.version) for place in range(start, len(self.rows) + count)]
        self.record = self.record.append(made(new), start=start)
        for place, row in enumerate(new, start):
            if place == len(self.rows):
                self.rows.append(row)
            elif self.rows[place][1] == MISSING:
                self.rows[place] = row

    @rule(count=st.integers(0, 2))
    def hole(self, count: int) -> None:
        """Tokens whose rows the engine did not send."""
        self.record = self.record.append(RoutingRecord.empty(GEOMETRY, count))
        self.rows += [([[0, 0], [0, 0]], MISSING, -1)] * count

    @rule()
    def update(self) -> None:
        """New weights: rows that are held stay as they are."""
        self.version += 1

    @rule(rows=st.integers(0, 12))
    def cut(self, rows: int) -> None:
        self.record, self.rows = self.record.truncate(rows), self.rows[:rows]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def clash(self, data: st.DataObject) -> None:
        """Rows of another prefix under the same weights are refused, and nothing changes."""
        place = data.draw(st.integers(0, len(self.rows) - 1))
        experts, provenance, version = self.rows[place]
        if provenance == MISSING:
            return
        other = made([([[experts[0][0] + 5, experts[0][1] + 5], experts[1]], DECODE, version)])
        with pytest.raises(RecordError, match=f"row {place} differs"):
            self.record.append(other, start=place)

    @invariant()
    def same(self) -> None:
        expected = made(self.rows)
        assert self.record == expected
        assert self.record.rows == len(self.rows)
        assert decode_record(encode_record(self.record)) == expected
        spans = self.record.version_spans()
        assert [v for v, start, stop in spans for _ in range(start, stop)] == [row[2] for row in self.rows]
        assert all(a[0] != b[0] and a[2] == b[1] for a, b in itertools.pairwise(spans))


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


@settings(max_examples=60, deadline=None)
@given(total=st.integers(0, 14), cuts=st.lists(st.integers(0, 14), max_size=5), back=st.integers(0, 3))
def test_any_split_into_turns_through_any_wire_is_the_whole(total: int, cuts: list[int], back: int) -> None:
    """A session asks each turn from `routed_experts_start_len` on, which overlaps with what it holds."""
    rows = [(token(place, 0)[0], DECODE, 0) for place in range(total)]
    whole = made(rows)
    held = RoutingRecord.empty(GEOMETRY)
    for stop in sorted({min(cut, total) for cut in cuts} | {total}):
        start = max(0, held.rows - back)
        turn = whole.slice(start, stop) if stop >= start else None
        if turn is None:
            continue
        one = decode_sglang(encode_sglang(turn, GEOMETRY), GEOMETRY, rows=turn.rows, provenance=DECODE, version=0)
        two = decode_vllm(encode_vllm(turn, GEOMETRY), GEOMETRY, rows=turn.rows, provenance=DECODE, version=0)
        assert one == two == turn == decode_record(encode_record(turn))
        held = held.append(one, start=start, prove=min(back, held.rows, turn.rows))
    assert held == whole


def test_a_turn_proves_its_prefix_by_the_rows_that_overlap() -> None:
    held = made([token(place, 0) for place in range(6)])
    turn = made([token(place, 0) for place in range(4, 9)])
    assert held.append(turn, start=4, prove=2) == made([token(place, 0) for place in range(9)])
    with pytest.raises(RecordError, match=r"at least 3 rows .* got 2 in 2 overlapping .* routed_experts_start_len"):
        held.append(turn, start=4, prove=3)
    with pytest.raises(RecordError, match=r"at least 1 rows .* got 0 in 0"):
        held.append(turn, prove=1)
    other = made([token(place, 1) for place in range(4, 9)])
    with pytest.raises(RecordError, match=r"under one weight version, got 0 in 2"):
        held.append(other, start=4, prove=1)
    shifted = made([token(place, 0) for place in range(5, 9)])
    with pytest.raises(RecordError, match="row 4 differs"):
        held.append(shifted, start=4, prove=1)


def test_whole_prefixes_of_each_turn_do_not_double() -> None:
    """Engines without a start send every row each turn."""
    held = RoutingRecord.empty(GEOMETRY)
    for stop in (3, 5, 9):
        held = held.append(made([token(place, 0) for place in range(stop)]), start=0)
    assert held == made([token(place, 0) for place in range(9)])


def test_a_later_turn_does_not_overwrite_an_earlier_one() -> None:
    held = made([token(place, 0) for place in range(4)])
    grown = held.append(made([token(place, 1) for place in range(6)]), start=0)
    assert grown.truncate(4) == held
    assert grown.version_spans() == ((0, 0, 4), (1, 4, 6))


def test_prefill_rows_that_a_decode_worker_does_not_have_stand_out() -> None:
    """The decode half of a pair sends zeros for the prompt; both are valid ids."""
    zero = ([[0, 0], [0, 0]], PREFILL, 0)
    decode = made([zero] * 4 + [token(place, 0) for place in range(4, 7)])
    report = decode.validate()
    assert (report.all_zero, report.zero_tail, report.ok) == (4, 0, False)
    prefill = made([token(place, 0) for place in range(4)])
    merged = RoutingRecord.concatenate([prefill, decode.slice(4, 7)])
    assert merged.validate().ok
    assert merged == made([token(place, 0) for place in range(7)])


def test_the_report_can_be_read() -> None:
    good = made([token(place, 0) for place in range(3)])
    text = good.validate().table()
    assert text == (
        "3 rows of 2 layers: 0 missing, 0 zero in every layer, 0 of them at the end; every known row can be replayed"
    )
    bad = made([token(0, 0), ([[1, 2], [0, 0]], DECODE, 0), ([[0, 0], [0, 0]], DECODE, 0)]).append(
        RoutingRecord.empty(GEOMETRY, 1)
    )
    first, head, *lines = bad.validate().table().splitlines()
    assert first.startswith("4 rows of 2 layers: 1 missing, 1 zero in every layer, 0 of them at the end; some rows")
    assert head.split("  ")[-1] == "zero tail"
    assert [line.split() for line in lines] == [["1", "0", "1", "1", "0"], ["3", "0", "2", "2", "0"]]
    tail = bad.truncate(3).validate()
    assert (tail.zero_tail, tail.zero_tail_by_layer.tolist()) == (1, [1, 2])
