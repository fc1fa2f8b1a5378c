"""Packing ragged samples with their routes: on the device, and from host memory to a batch on the device.

    python -m benchmarks.pack --out benchmarks/results

On the device `pacenote` is the op, one launch; `pacenote-call` is `pack_ragged` as a trainer calls it. `careful` is
plain torch that knows this case: no padding, every sample with rows. From the host `numpy` is the way of trainers that
keep rows as int32; `numpy-narrow` keeps them as recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from benchmarks import harness
from benchmarks.case import OURS, Absent, Case, Floor, Implementation
from benchmarks.models import MODELS, Model
from pacenote.kernels import reference
from pacenote.kernels.pack import PackedBatch, Ragged, pack, pack_ragged
from pacenote.kernels.spec import CACHED, DECODE, FREE, PREFILL, REPLAY

SHORTEST, LONGEST = 256, 16384
"""Tokens of a sample, and in a small batch fewer. What is longer than half of the longest is cut."""
CODES = 1 << PREFILL | 1 << DECODE | 1 << CACHED
FIELDS = ("tokens", "targets", "loss_mask", "logprobs", "advantages", "positions", "segment_ids", "rows", "state")
"""What packing writes, in the order of `reference.Packed`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A sample in host memory, as `ragged.Sample` describes it."""

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    logprobs: NDArray[np.float32]
    experts: NDArray[Any]
    provenance: NDArray[np.uint8]
    version: NDArray[np.int32]
    num_experts: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """Samples and what is taken of them.

    Attributes:
        samples: on the host, longer than `max_len` some of them.
        advantages: a number a sample.
        max_len: tokens of a sample that stay.
        ragged: the same on the device.
        table: [4, S+1] int64 on the device, see `reference.pack_index`.
        layers: [L] int64 on the device, all of them.
        total: T.
    """

    samples: list[Rollout]
    advantages: list[float]
    max_len: int
    ragged: Ragged
    table: Tensor
    layers: Tensor
    total: int

    @property
    def sources(self) -> tuple[Tensor | None, ...]:
        """The arrays that are packed."""
        r = self.ragged
        return r.tokens, r.loss_mask, r.logprobs, r.advantages, r.experts, r.provenance, r.fresh


# --- inputs and what is right ----------------------------------------------------------------------------------------


def lengths(positions: int, rng: np.random.Generator) -> tuple[list[int], int]:
    """Tokens of samples, short ones more often, and how many of each stay so that there are so many positions."""
    shortest, longest = min(SHORTEST, max(2, positions // 16)), min(LONGEST, max(8, positions // 2))
    sizes, left, max_len = list[int](), positions, longest // 2
    while left:
        size = int(np.exp(rng.uniform(np.log(shortest), np.log(longest))))
        sizes.append(size if min(size, max_len) - 1 <= left else left + 1)
        left -= min(sizes[-1], max_len) - 1
    return sizes, max_len


def rollout(model: Model, size: int, rng: np.random.Generator) -> Rollout:
    """A sample of `size` tokens, of which the first third is its prompt."""
    trained = np.arange(size) >= max(1, size // 3)
    return Rollout(
        tokens=rng.integers(0, 150_000, size, np.int32),
        loss_mask=trained.astype(np.uint8),
        logprobs=np.where(trained, -rng.random(size, np.float32), np.float32(0)),
        experts=rng.integers(0, model.experts, (size - 1, model.layers, model.k), _numpy(model.ids)),
        provenance=np.where(trained[:-1], DECODE, PREFILL).astype(np.uint8),
        version=np.zeros(size, np.int32),
        num_experts=model.experts,
    )


def make(model: Model, tokens: int, device: torch.device, seed: int) -> Inputs:
    """Samples with T positions together; of the same lengths for every seed, as torch.compile is for one shape."""
    sizes, max_len = lengths(tokens, np.random.default_rng(0))
    rng = np.random.default_rng(seed)
    samples = [rollout(model, size, rng) for size in sizes]
    advantages = rng.standard_normal(len(samples)).tolist()
    counts = np.array([min(size, max_len) - 1 for size in sizes])
    rows = np.array(sizes) - 1
    table = np.zeros((4, len(samples) + 1), np.int64)
    table[0, 1:] = np.cumsum(counts)
    table[1, :-1] = np.cumsum(sizes) - sizes
    table[2, :-1] = np.cumsum(rows) - rows
    table[3, :-1] = counts
    return Inputs(
        samples=samples,
        advantages=advantages,
        max_len=max_len,
        ragged=Ragged.of(samples, max_len=max_len, advantages=advantages, num_experts=model.experts, device=device),
        table=torch.from_numpy(table).to(device),
        layers=torch.arange(model.layers, device=device),
        total=tokens,
    )


def floor(model: Model, tokens: int, from_host: bool) -> Floor:
    """Rows read once and written once, the rest as the launcher of `pack_triton` counts it; and the upload."""
    rows = model.layers * model.k * model.ids.itemsize
    upload = tokens * (rows + 10) if from_host else 0  # a token, a mask, a logprob, a provenance
    return Floor(bytes=tokens * (2 * rows + 48), upload=upload)


def check(inputs: Inputs, result: Any) -> None:
    """Every array is the definition's.

    Raises:
        AssertionError: one is not.
    """
    expected = plain(inputs.table, inputs.layers, inputs.sources, inputs.total, inputs.ragged.num_experts or 0)
    for name, mine, theirs in zip(FIELDS, fields(result), expected, strict=True):
        assert mine.shape == theirs.shape, f"{name} {list(mine.shape)}, expected {list(theirs.shape)}"
        assert torch.equal(_comparable(mine), _comparable(theirs)), f"{name} differ"


def fields(result: Any) -> Sequence[Tensor]:
    """The arrays of a result, [T] and rows [L, T, K]."""
    if not isinstance(result, PackedBatch):
        return tuple(result)
    assert result.routes is not None
    return *(getattr(result, name) for name in FIELDS[:-2]), result.routes.rows.transpose(0, 1), result.routes.state


def _comparable(x: Tensor) -> Tensor:
    """As numbers that every device compares, and that are the same whatever their dtype is."""
    x = x.view(torch.int16).int() & 0xFFFF if x.dtype == torch.uint16 else x
    return x if x.is_floating_point() else x.int()


def _numpy(dtype: torch.dtype) -> type[np.unsignedinteger[Any]]:
    return np.uint8 if dtype == torch.uint8 else np.uint16


# --- who does it -----------------------------------------------------------------------------------------------------


def ours(inputs: Inputs) -> tuple[Tensor, ...]:
    """The op."""
    table, layers, total, num = inputs.table, inputs.layers, inputs.total, inputs.ragged.num_experts
    packed: tuple[Tensor, ...] = torch.ops.pacenote.pack(
        table, *inputs.sources, layers, 0, total, 1, 0, 0, total, num, CODES
    )
    return packed


def ours_from_host(inputs: Inputs) -> PackedBatch:
    """`pack`: checks, one pinned copy, one launch."""
    return pack(
        inputs.samples,
        max_len=inputs.max_len,
        device=inputs.table.device,
        advantages=inputs.advantages,
        num_experts=inputs.ragged.num_experts,
    )


def plain(
    table: Tensor, layers: Tensor, sources: tuple[Tensor | None, ...], total: int, num_experts: int
) -> tuple[Tensor, ...]:
    """The definition, from a table [4, S+1] and layers [L] to the arrays [T] and rows [L, T, K]."""
    given: Any = sources
    packed = reference.pack(
        reference.pack_index(table, total, 1, 0),
        *given,
        layers=layers,
        routed=slice(0, total),
        num_experts=num_experts,
        codes=CODES,
    )
    return tuple(getattr(packed, name) for name in FIELDS)


def careful(inputs: Inputs) -> tuple[Tensor, ...]:
    """Rows as few wide words, taken by one index_select and turned round by one copy."""
    given: Any = inputs.sources
    tokens, loss_mask, logprobs, advantages, experts, provenance, _ = given
    start, first_token, first_row, counts = inputs.table[:, :-1]
    here = torch.arange(inputs.total, device=start.device)
    number = torch.arange(len(start), device=start.device)
    segment = torch.repeat_interleave(number, counts, output_size=inputs.total)
    source, row = here + (first_token - start)[segment], here + (first_row - start)[segment]
    target = source + 1
    mask = loss_mask.index_select(0, target)
    words = experts.view(torch.int64 if experts.shape[2] * experts.itemsize % 8 == 0 else torch.int32)
    rows = words.index_select(0, row).transpose(0, 1).contiguous().view(experts.dtype)
    known = (CODES >> provenance.index_select(0, row).int()) & 1 > 0
    return (
        tokens.index_select(0, source),
        tokens.index_select(0, target).long(),
        mask,
        logprobs.index_select(0, target) * mask,
        advantages.index_select(0, target) * mask,
        here - start[segment],
        segment.int(),
        rows,
        torch.where(known, REPLAY, FREE).to(torch.uint8),
    )


def by_numpy(inputs: Inputs, dtype: DTypeLike | None = None) -> tuple[Tensor, ...]:
    """Cut, concatenate, index, turn round, and send every array by itself; rows in `dtype`, None: as recorded."""
    cut = [min(len(sample.tokens), inputs.max_len) for sample in inputs.samples]
    counts = np.array(cut) - 1
    segment = np.repeat(np.arange(len(cut)), counts)
    source = np.arange(len(segment)) + segment  # a sample has one token more than positions

    def joined(name: str, less: int) -> NDArray[Any]:
        arrays = (getattr(sample, name)[: n - less] for sample, n in zip(inputs.samples, cut, strict=True))
        return np.concatenate([*arrays])

    tokens, mask, experts = joined("tokens", 0), joined("loss_mask", 0)[source + 1].astype(bool), joined("experts", 1)
    rows = np.ascontiguousarray((experts if dtype is None else experts.astype(dtype)).transpose(1, 0, 2))
    advantages = np.repeat(np.array(inputs.advantages, np.float32), counts)
    arrays = (
        tokens[source],
        tokens[source + 1].astype(np.int64),
        mask,
        np.where(mask, joined("logprobs", 0)[source + 1], np.float32(0)),
        np.where(mask, advantages, np.float32(0)),
        np.arange(len(segment)) - (np.cumsum(counts) - counts)[segment],
        segment.astype(np.int32),
        rows,
        np.where(np.isin(joined("provenance", 1), (PREFILL, DECODE, CACHED)), REPLAY, FREE).astype(np.uint8),
    )
    return tuple(torch.from_numpy(array).to(inputs.table.device) for array in arrays)


def implementation(function: Callable[[Inputs], Any], note: str = "", on_host: bool = False) -> Implementation[Inputs]:
    """A function of inputs, called on them."""
    return Implementation(bind=lambda inputs: partial(function, inputs), note=note, on_host=on_host)


def compiled(setting: harness.Setting) -> Implementation[Inputs] | Absent:
    """The definition, compiled."""
    found = setting.compile(plain)
    if isinstance(found, Absent):
        return found
    return implementation(lambda i: found(i.table, i.layers, i.sources, i.total, i.ragged.num_experts))


def cases(name: str, tokens: int, setting: harness.Setting) -> Iterator[Case[Inputs]]:
    """Both works at one shape."""
    model = MODELS[name]
    table = "with its table of 32 bytes a sample, from Python"
    absent = {
        "megatron": Absent("megatron-core packs no routes: its RouterReplay is given rows by layer, as int64"),
        "liger": Absent("liger-kernel packs nothing"),
        "torch": Absent("torch has no such op"),
    }
    works: dict[str, dict[str, Implementation[Inputs] | Absent]] = {
        "on the device": {
            OURS: implementation(ours),
            "pacenote-call": implementation(lambda i: pack_ragged(i.ragged), table, on_host=True),
            "plain": implementation(lambda i: plain(i.table, i.layers, i.sources, i.total, i.ragged.num_experts or 0)),
            "compiled": compiled(setting),
            "careful": implementation(careful, "knows that nothing is padded and every sample has rows"),
            **absent,
        },
        "from the host": {
            OURS: implementation(ours_from_host, on_host=True),
            "numpy": implementation(partial(by_numpy, dtype=np.int32), "rows int32", on_host=True),
            "numpy-narrow": implementation(by_numpy, "rows as recorded", on_host=True),
            **absent,
        },
    }
    for work, implementations in works.items():
        yield Case(
            model=name,
            tokens=tokens,
            work=work,
            shape={"layers": model.layers, "experts": model.experts, "k": model.k, "rows": str(model.ids)[6:]},
            floor=floor(model, tokens, work == "from the host"),
            make=partial(make, model, tokens, setting.device),
            check=check,
            implementations=implementations,
        )


if __name__ == "__main__":
    sys.exit(harness.main("pack", __doc__.splitlines()[0], cases))
