"""Microbatches of any layout, a training step through Megatron's own schedules, and the identity of tokens at routers.

Legend: M microbatches, B sequences, S positions, L MoE layers, K experts a token, E experts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from pacenote.kernels.pack import PackedBatch, pack
from pacenote.kernels.spec import DECODE
from pacenote.replay.align import align
from pacenote.replay.megatron import MegatronReplay
from pacenote.rollout.trajectory import Trajectory
from tests.replay.megatron.model import EXPERTS, TOP_K, VOCAB, named, routers

Encode = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A microbatch of this rank: the model's arguments, weights of its token losses, and what replay.rows takes."""

    inputs: dict[str, Any]
    weights: Tensor
    rows: Any


def encode(tokens: Tensor, layer: int) -> Tensor:
    """Experts [..., K] that name the token (below 56) and the layer: any other token has another set there."""
    first = (tokens + layer) % EXPERTS
    return torch.stack([first, (first + 1 + (tokens // EXPERTS + layer) % (EXPERTS - 1)) % EXPERTS], -1)


def tokens(count: int, batch: int = 2, length: int = 16, seed: int = 0) -> list[Tensor]:
    """M batches of tokens [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (batch, length), generator=generator) for _ in range(count)]


def sbhd(ids: Tensor, replay: MegatronReplay, layers: Sequence[int]) -> Batch:
    """Sequences [B, S], cut for this rank by Megatron itself; rows that name the tokens, cut by `align`."""
    whole = {
        "tokens": ids,
        "labels": ids.roll(-1, 1),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous(),
        "cu_seqlens": None,
    }
    local = get_batch_on_this_cp_rank(whole, False, cp_group=parallel_state.get_context_parallel_group())
    rows = torch.stack([encode(ids, layer) for layer in layers], 2).to(torch.uint8)
    inputs = {
        "input_ids": local["tokens"],
        "position_ids": local["position_ids"],
        "attention_mask": None,
        "labels": local["labels"],
    }
    weights = torch.full_like(local["tokens"], 1.0, dtype=torch.float32) / ids.numel()
    return Batch(inputs=inputs, weights=weights, rows=align(rows, replay.layout, layers=replay.places(layers)))


def thd(ids: Tensor, replay: MegatronReplay, layers: Sequence[int]) -> Batch:
    """The same sequences, cut to different lengths, packed for this rank by `pack`."""
    samples = [trajectory(row[: len(row) - 3 * number], layers) for number, row in enumerate(ids)]
    batch = pack(samples, layers=replay.places(layers), layout=replay.layout, pad_to_multiple=4, num_experts=EXPERTS)
    inputs = {
        "input_ids": batch.tokens.long()[None],
        "position_ids": batch.positions[None],
        "attention_mask": None,
        "labels": batch.targets[None],
        "packed_seq_params": packed_seq_params(batch),
    }
    trained = sum(len(sample.tokens) - 1 for sample in samples)
    return Batch(inputs=inputs, weights=batch.loss_mask.float()[None] / trained, rows=batch)


def trajectory(ids: Tensor, layers: Sequence[int]) -> Trajectory:
    """A sample of tokens [N], all but the first generated, whose rows name them."""
    experts = torch.stack([encode(ids[:-1], layer) for layer in layers], 1)
    mask = (np.arange(len(ids)) > 0).astype(np.uint8)
    return Trajectory(
        tokens=ids.numpy().astype(np.int32),
        loss_mask=mask,
        logprobs=-mask.astype(np.float32),
        experts=experts.numpy().astype(np.uint8),
        provenance=np.full(len(ids) - 1, DECODE, np.uint8),
        version=np.zeros(len(ids), np.int32),
        layers=tuple(layers),
        num_experts=EXPERTS,
    )


def packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    """Bounds of the samples on all ranks together, padding of each included, and that of the end as one more."""
    total = batch.num_tokens * batch.layout.cp_size
    bounds = batch.cu_seqlens_padded
    if int(bounds[-1]) < total:
        bounds = torch.cat([bounds, torch.tensor([total], dtype=bounds.dtype)])
    longest = int(bounds.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=bounds,
        cu_seqlens_kv_padded=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def step(
    models: list[Any], batches: list[Batch], replay: MegatronReplay | None, *, forward_only: bool = False
) -> list[float]:
    """One step of Megatron's schedule for the parallel sizes; the M losses, on the last stage only."""

    def forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)

        def loss(output: Tensor) -> tuple[Tensor, dict[str, float]]:
            value = (output * batch.weights).sum()
            return value, {"loss": value.item()}

        return model(**batch.inputs), loss

    for model in models:
        model.zero_grad()
    ids = batches[0].inputs["input_ids"]
    cp = 1 if replay is None else replay.layout.cp_size
    with nullcontext() if replay is None else replay.rows([batch.rows for batch in batches]):
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in models] if len(models) > 1 else iter(batches),
            model=models if len(models) > 1 else models[0],
            num_microbatches=len(batches),
            seq_length=ids.shape[1] * cp,
            micro_batch_size=ids.shape[0],
            forward_only=forward_only,
        )
    return [report["loss"] for report in reports]


def router_grads(models: list[Any]) -> dict[int, Tensor]:
    """Gradients [E, D] of this rank's routers by global layer id."""
    return {layer: router.weight.grad.clone() for layer, router in routers(models).items()}


def hollow(models: list[Any]) -> None:
    """Take attention and experts out of the residual stream: hidden states stay the embeddings of their tokens."""
    with torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                    parameter.zero_()


class Identity:
    """Which token each router call of hollow models was about, and whether it went to the experts that name it."""

    def __init__(self, scale: float, hidden: int) -> None:
        table = named("embedding.word_embeddings.weight", [VOCAB, hidden], scale)
        self._table = table / table.norm(dim=1, keepdim=True)
        self.compared = 0
        self.wrong = 0
        self.tokens: list[tuple[int, list[int]]] = []

    def __call__(self, router: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        probs, chosen = output
        hidden = args[0].detach().reshape(-1, args[0].shape[-1])
        read = (hidden @ self._table.T).argmax(1)
        layer = router.layer_number - 1
        wanted = torch.zeros_like(chosen).scatter(1, encode(read, layer), True)
        real = probs.detach().sum(1) > 0  # padding has no weight
        self.compared += int(real.sum())
        self.wrong += int((chosen != wanted).any(1)[real].sum())
        self.tokens.append((layer, read[real].tolist()))


@contextmanager
def watched(models: list[Any], *, scale: float = 0.3, hidden: int = 32) -> Iterator[Identity]:
    """Look at every router of the models while the block runs."""
    identity = Identity(scale, hidden)
    handles = [router.register_forward_hook(identity) for router in routers(models).values()]
    try:
        yield identity
    finally:
        for handle in handles:
            handle.remove()


def foreign(count: int, layers: int, *, experts: int = EXPERTS, top_k: int = TOP_K, seed: int = 1) -> Tensor:
    """Valid rows [T, L, K] that no router chose."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, layers, experts, generator=generator).argsort(-1)[..., :top_k]
