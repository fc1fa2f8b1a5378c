"""Attention that gives a token the same numbers packed, padded, alone and over a cache."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pacenote.kernels.invariant_attention import KEYS, QUERIES, invariant_attention

SHAPES = {"MLA": (4, 4, 24, 16), "GQA": (6, 2, 16, 16), "MQA": (4, 1, 7, 5)}  # H, G, D, E
SCALE = 0.3


@dataclass(frozen=True)
class Sequence:
    """query [H, S, D], key [G, S, D], value [G, S, E]."""

    query: Tensor
    key: Tensor
    value: Tensor

    @property
    def length(self) -> int:
        return self.query.shape[1]


def sequence(seed: int, shape: str, length: int, dtype: torch.dtype = torch.float32) -> Sequence:
    heads, groups, dim, out = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, dim), (groups, dim), (groups, out))
    return Sequence(*(torch.randn(n, length, d, generator=generator).to(dtype) for n, d in sizes))


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def alone(one: Sequence) -> Tensor:
    """[S, H, E]."""
    return invariant_attention(one.query[None], one.key[None], one.value[None], causal(one.length)[None, None], SCALE)[
        0
    ]


def packed(many: list[Sequence]) -> Tensor:
    """All in one row, [sum of S, H, E]."""
    query, key, value = (torch.cat([getattr(one, name) for one in many], 1)[None] for name in ("query", "key", "value"))
    visible = torch.block_diag(*(causal(one.length) for one in many)).bool()[None, None]  # type: ignore[no-untyped-call]
    return invariant_attention(query, key, value, visible, SCALE)[0]


def decoded(many: list[Sequence], poison: float) -> list[Tensor]:
    """The last token of each, over a cache whose rows are longer than the sequences: [H, E] each."""
    width = max(one.length for one in many) + 3
    key, value = (
        torch.stack(
            [torch.nn.functional.pad(getattr(one, name), (0, 0, 0, width - one.length), value=poison) for one in many]
        )
        for name in ("key", "value")
    )
    query = torch.stack([one.query[:, -1:] for one in many])
    lengths = torch.tensor([one.length for one in many])
    visible = (torch.arange(width) < lengths[:, None])[:, None, None]
    return list(invariant_attention(query, key, value, visible, SCALE)[:, 0])


LENGTHS = st.lists(st.integers(1, 2 * KEYS + 5), min_size=1, max_size=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), lengths=LENGTHS, poison=st.sampled_from([0.0, 1e4, float("nan")]))
def test_a_token_gets_the_same_numbers_everywhere(
    shape: str, dtype: torch.dtype, seed: int, lengths: list[int], poison: float
) -> None:
    many = [sequence(seed + number, shape, length, dtype) for number, length in enumerate(lengths)]
    expected = [alone(one) for one in many]
    assert torch.equal(packed(many), torch.cat(expected))
    assert torch.equal(packed(many[::-1]), torch.cat(expected[::-1]))
    for last, whole in zip(decoded(many, poison), expected, strict=True):
        assert torch.equal(last, whole[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, QUERIES, KEYS, KEYS + 1, 3 * KEYS + 7])
def test_it_is_attention(shape: str, length: int) -> None:
    one = sequence(0, shape, length)
    heads, groups, *_ = SHAPES[shape]
    query, key, value = (x.double() for x in (one.query, one.key, one.value))
    scores = query @ key.repeat_interleave(heads // groups, 0).mT * SCALE
    gold = scores.masked_fill(~causal(length), -torch.inf).softmax(-1) @ value.repeat_interleave(heads // groups, 0)
    torch.testing.assert_close(alone(one).double(), gold.transpose(0, 1), atol=2e-6, rtol=1e-5)


def test_chunks_of_a_prompt_give_what_the_whole_gives() -> None:
    one = sequence(1, "GQA", 70)
    whole, start = alone(one), 0
    for end in (1, 9, 40, 41, 70):
        seen = causal(70)[start:end, :end][None, None]
        part = invariant_attention(
            one.query[None, :, start:end], one.key[None, :, :end], one.value[None, :, :end], seen, SCALE
        )
        assert torch.equal(part[0], whole[start:end])
        start = end


def test_padding_sees_and_does_what_it_likes() -> None:
    """Padding that sees a sequence's keys, or nothing, or a window: the sequence's tokens do not notice."""
    one = sequence(2, "MLA", 40)
    whole = alone(one)
    visible = causal(40)
    visible[10:] = False  # tokens 0..9 are real; then some see them all, some nothing, some a window
    visible[10:20, :10] = True
    visible[30:, 5:9] = True
    out = invariant_attention(one.query[None], one.key[None], one.value[None], visible[None, None], SCALE)[0]
    assert torch.equal(out[:10], whole[:10])
    assert not out[20:30].any()
    assert out[10:20].isfinite().all()


def test_it_has_its_gradient() -> None:
    one = sequence(3, "MQA", 6)
    inputs = [x.double()[None].requires_grad_() for x in (one.query, one.key, one.value)]
    visible = torch.block_diag(causal(4), causal(2)).bool()[None, None]  # type: ignore[no-untyped-call]
    visible[..., 3, :] = False  # a query that sees nothing
    assert torch.autograd.gradcheck(
        lambda q, k, v: invariant_attention(q, k, v, visible, SCALE), inputs, fast_mode=True
    )


def test_what_does_not_fit_is_refused() -> None:
    one = sequence(4, "GQA", 6)
    holes = causal(6)
    holes[5, 2] = False
    inputs = (one.query[None], one.key[None], one.value[None])
    with pytest.raises(ValueError, match="side by side, got one with holes"):
        invariant_attention(*inputs, holes[None, None], SCALE)
    with pytest.raises(ValueError, match=r"expected visible \[1, 1, 6, 6\] of bool"):
        invariant_attention(*inputs, causal(5)[None, None], SCALE)
    with pytest.raises(ValueError, match="multiple of the 2 key heads, got 5"):
        invariant_attention(one.query[None, :5], *inputs[1:], causal(6)[None, None], SCALE)
