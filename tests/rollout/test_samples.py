"""Trajectories as safetensors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load, save

from pacenote.rollout.samples import decode_samples, encode_samples
from pacenote.rollout.trajectory import STATUSES, Trajectory

if TYPE_CHECKING:
    from tests.rollout.conftest import Player


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    count = draw(st.integers(1, 6))
    experts = draw(st.sampled_from([None, 16, 256, 257, 60000]))
    layers = draw(st.sampled_from([(), (0,), (1, 2, 7)])) if experts else ()
    mask = draw(arrays.arrays(np.uint8, count, elements=st.integers(0, 1)))
    mask[0] = 0
    cut = draw(st.integers(0, count))
    ids: Any = None
    if experts:
        dtype = np.uint8 if experts <= 256 else np.uint16
        ids = draw(arrays.arrays(dtype, (count - 1, len(layers), 2), elements=st.integers(0, min(experts, 65535) - 1)))
    return Trajectory(
        tokens=draw(arrays.arrays(np.int32, count, elements=st.integers(0, 2**31 - 1))),
        loss_mask=mask,
        logprobs=draw(arrays.arrays(np.float32, count, elements=st.floats(-100, 0, width=32))),
        experts=ids,
        provenance=draw(arrays.arrays(np.uint8, count - 1, elements=st.integers(0, 4 if experts else 0))),
        version=draw(arrays.arrays(np.int32, count, elements=st.integers(-1, 2**31 - 1))),
        layers=layers,
        num_experts=experts,
        spans=draw(st.sampled_from([(), (("user", 0, cut, False), ("assistant", cut, count, True))])),
        status=draw(st.sampled_from(STATUSES)),
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(trajectories(), max_size=4))
def test_what_goes_in_comes_out(given_: list[Trajectory]) -> None:
    back = decode_samples(encode_samples(given_))
    assert len(back) == len(given_)
    for one, other in zip(given_, back, strict=True):
        for name in ("tokens", "loss_mask", "logprobs", "experts", "provenance", "version"):
            left, right = getattr(one, name), getattr(other, name)
            assert (left is None) == (right is None)
            if left is not None:
                assert left.dtype == right.dtype
                np.testing.assert_array_equal(left, right)
        for name in ("layers", "num_experts", "spans", "status"):
            assert getattr(one, name) == getattr(other, name)


def test_the_wire_form(player: Player) -> None:
    """Names, dtypes and shapes that another program may rely on."""
    answer = player.ask([{"role": "user", "content": "a"}], [40], stop="user")
    player.ask([{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}], [41])
    [trajectory] = player.session.trajectories()
    data = encode_samples([trajectory, trajectory.truncate(3)])
    count = len(trajectory)
    found = {name: (array.dtype.name, array.shape) for name, array in load(data).items()}
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for index, length in enumerate((count, 3)):
        expected |= {
            f"{index}.tokens": ("int32", (length,)),
            f"{index}.loss_mask": ("uint8", (length,)),
            f"{index}.logprobs": ("float32", (length,)),
            f"{index}.experts": ("uint8", (length - 1, 5, 2)),
            f"{index}.provenance": ("uint8", (length - 1,)),
            f"{index}.version": ("int32", (length,)),
        }
    assert found == expected
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    notes = json.loads(header["__metadata__"]["pacenote"])
    assert notes["count"] == 2
    assert notes["samples"][0] == {
        "status": "length",
        "layers": [1, 2, 3, 4, 5],
        "num_experts": 16,
        "spans": [list(span) for span in trajectory.spans],
    }


def test_no_samples_are_a_file_too() -> None:
    assert decode_samples(encode_samples([])) == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not safetensors at all",
        save({"x": np.zeros(1)}),
        save({"x": np.zeros(1)}, {"other": "1"}),
        save({}, {"pacenote": "not json"}),
        save({}, {"pacenote": "[]"}),
        save({}, {"pacenote": json.dumps({"count": 1, "samples": [{"status": "completed"}]})}),
    ],
    ids=["empty", "noise", "nobody's", "another's", "no json", "a list", "no arrays"],
)
def test_what_is_not_such_a_file(data: bytes) -> None:
    with pytest.raises(ValueError):
        decode_samples(data)


def test_a_sample_that_was_cut_is_refused(player: Player) -> None:
    player.ask([{"role": "user", "content": "a"}], [40, 41])
    data = encode_samples(player.session.trajectories())
    arrays_, size = load(data), 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:size])["__metadata__"]["pacenote"]
    arrays_["0.experts"] = arrays_["0.experts"][:-1].copy()
    with pytest.raises(ValueError, match="expected experts of shape"):
        decode_samples(save(arrays_, {"pacenote": entry}))
    with pytest.raises(ValueError, match="written by a pacenote session server"):
        decode_samples(data[:-1])
