"""Trajectories: arrays that cannot fall apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pacenote.kernels.pack import pack
from pacenote.replay.record import CACHED, DECODE, MISSING, PREFILL, RECOMPUTED
from pacenote.rollout.trajectory import Trajectory

if TYPE_CHECKING:
    from tests.rollout.conftest import Player

Named = Callable[[NDArray[Any]], tuple[list[int], list[int]]]


def made(count: int = 4, **parts: Any) -> Trajectory:
    usual: dict[str, Any] = {
        "tokens": np.arange(count, dtype=np.int32),
        "loss_mask": np.array([0] + [1] * (count - 1), dtype=np.uint8),
        "logprobs": np.zeros(count, dtype=np.float32),
        "experts": np.zeros((count - 1, 2, 3), dtype=np.uint8),
        "provenance": np.full(count - 1, PREFILL, dtype=np.uint8),
        "version": np.zeros(count, dtype=np.int32),
        "layers": (1, 2),
        "num_experts": 16,
        "spans": (("user", 0, 1, False), ("assistant", 1, count, True)),
    }
    return Trajectory(**(usual | parts))


def test_a_sound_one() -> None:
    trajectory = made()
    assert len(trajectory) == 4
    assert trajectory.trained == 3
    assert trajectory.status == "completed"
    assert len(made(1, spans=())) == 1
    assert made(num_experts=300, experts=np.zeros((3, 2, 3), dtype=np.uint16)).experts is not None


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"tokens": np.zeros(0, dtype=np.int32)}, "at least one token, got none"),
        ({"tokens": np.zeros(4, dtype=np.int64)}, r"tokens of shape \[4\] and int32 for 4 tokens, got \[4\] int64"),
        ({"logprobs": np.zeros(3, dtype=np.float32)}, r"logprobs of shape \[4\] and float32.*got \[3\] float32"),
        ({"loss_mask": np.zeros(4, dtype=bool)}, "loss_mask of shape"),
        ({"loss_mask": np.array([1, 0, 0, 0], dtype=np.uint8)}, "the first token has no logprob"),
        ({"loss_mask": np.array([0, 2, 0, 0], dtype=np.uint8)}, "loss_mask of 0 and 1"),
        ({"logprobs": np.array([0, np.nan, -np.inf, 0], dtype=np.float32)}, "finite logprobs, got 2 that are not"),
        ({"provenance": np.ones(4, dtype=np.uint8)}, r"provenance of shape \[3\]"),
        ({"version": np.zeros(3, dtype=np.int32)}, r"version of shape \[4\]"),
        ({"experts": np.zeros((4, 2, 3), dtype=np.uint8)}, r"experts of shape \[3, 2, K\] and uint8 for 4 tokens"),
        ({"experts": np.zeros((3, 3, 3), dtype=np.uint8)}, r"got \[3, 3, 3\] uint8"),
        ({"experts": np.zeros((3, 2), dtype=np.uint8)}, r"got \[3, 2\] uint8"),
        ({"experts": np.zeros((3, 2, 3), dtype=np.uint16)}, r"got \[3, 2, 3\] uint16"),
        ({"num_experts": 257}, "and uint16 for 4 tokens"),
        ({"num_experts": None}, "experts and num_experts, or neither"),
        ({"experts": None}, "experts and num_experts, or neither"),
        ({"experts": None, "num_experts": None}, "no layers and provenance MISSING"),
        ({"experts": None, "num_experts": None, "layers": ()}, "no layers and provenance MISSING"),
        ({"status": "done"}, "a status of .* got 'done'"),
        ({"spans": (("user", 0, 3, False),)}, "spans up to 4, got 3"),
        ({"spans": (("user", 1, 4, False),)}, r"one after the other, got user 1\.\.4"),
        ({"spans": (("user", 0, 2, False), ("user", 2, 1, False))}, r"got user 2\.\.1"),
    ],
)
def test_parts_that_do_not_fit(parts: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        made(**parts)


@settings(max_examples=40, deadline=None)
@given(
    stops=st.lists(st.sampled_from([None, "text", "user", "observation", "end"]), min_size=1, max_size=3),
    versions=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    data=st.data(),
)
def test_truncation_cuts_everything_alike(
    new_player: Callable[..., Player],
    identity: Named,
    stops: list[str | None],
    versions: list[int],
    data: st.DataObject,
) -> None:
    player = new_player()
    history: list[dict[str, Any]] = []
    for number, (stop, version) in enumerate(zip(stops, versions, strict=False)):
        history.append({"role": "user", "content": f"q{number}"})
        history.append(player.ask(history, [40 + number, 50], stop=stop, version=version))
    [whole] = player.session.trajectories()
    player.close()
    keep = data.draw(st.integers(1, len(whole) + 1))
    cut = whole.truncate(keep)
    if keep >= len(whole):
        assert cut is whole
        return
    assert cut.status == "length"
    assert cut.tokens.tolist() == whole.tokens[:keep].tolist()
    assert cut.experts is not None
    assert identity(cut.experts) == (cut.tokens[:-1].tolist(), list(range(keep - 1)))
    for name in ("loss_mask", "logprobs", "version"):
        assert getattr(cut, name).tolist() == getattr(whole, name)[:keep].tolist()
    assert cut.provenance.tolist() == whole.provenance[: keep - 1].tolist()
    assert cut.spans[-1][2] == keep
    assert cut.spans == tuple((r, a, min(b, keep), g) for r, a, b, g in whole.spans if a < keep)


@pytest.mark.parametrize("keep", [0, -1])
def test_truncating_to_nothing_is_refused(keep: int) -> None:
    with pytest.raises(ValueError, match=f"at least one token, got {keep}"):
        made().truncate(keep)


def test_rows_of_other_weights_than_the_token_are_marked(player: Player) -> None:
    """Token 50 was sampled under version 1; its row was written when it was read again, under version 2."""
    answer = player.ask([{"role": "user", "content": "a"}], [40, 50], version=1)
    player.ask([{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}], [60, 61], version=2)
    [trajectory] = player.session.trajectories()
    prompt = len(player.sent[0].body["input_ids"])
    assert trajectory.tokens[[prompt, prompt + 1]].tolist() == [40, 50]
    assert trajectory.provenance[[prompt - 1, prompt, prompt + 1, prompt + 2]].tolist() == [
        PREFILL,
        DECODE,
        RECOMPUTED,
        PREFILL,
    ]
    assert trajectory.version[[prompt - 1, prompt, prompt + 1, prompt + 2, -1]].tolist() == [1, 1, 1, 2, 2]
    player.check()


def test_an_update_in_the_middle_of_an_answer(player: Player) -> None:
    """`weight_versions`: each token has its own version, and so has the row that was written with the next token."""
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 4}]
    player.ask([{"role": "user", "content": "a"}], [40, 41, 42, 43], weight_versions=spans, cached_tokens=2)
    [trajectory] = player.session.trajectories()
    prompt = len(player.sent[0].body["input_ids"])
    assert trajectory.version.tolist() == [3] * (prompt + 2) + [4, 4]
    assert trajectory.provenance.tolist() == (
        [CACHED, CACHED] + [PREFILL] * (prompt - 2) + [DECODE, RECOMPUTED, DECODE]
    )  # the second token was read under version 4


def test_without_routes(new_player: Callable[..., Player]) -> None:
    player = new_player(geometry=None)
    answer = player.ask([{"role": "user", "content": "a"}], [40], stop="user", version=1)
    player.ask([{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}], [41], version=2)
    assert "routed_experts_start_len" not in player.sent[1].body
    assert player.sent[1].body["return_routed_experts"] is False
    [trajectory] = player.session.trajectories()
    assert trajectory.experts is None
    assert trajectory.layers == ()
    assert set(trajectory.provenance.tolist()) == {MISSING}
    first = len(player.sent[0].body["input_ids"]) + 2
    assert trajectory.version.tolist() == [1] * first + [2] * (len(trajectory) - first)
    assert trajectory.trained == 3


def test_it_fits_the_packer(player: Player) -> None:
    """A trajectory goes into a training batch as it is: its masked tokens are the targets, its rows the routes."""
    answer = player.ask([{"role": "user", "content": "a"}], [40, 41], stop="user")
    player.ask([{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}], [42])
    [trajectory] = player.session.trajectories()
    batch = pack([trajectory], max_len=64)
    trained = batch.targets[batch.loss_mask.bool()].tolist()
    assert trained == trajectory.tokens[trajectory.loss_mask == 1].tolist() == [40, 41, player.token("<|user|>"), 42]
