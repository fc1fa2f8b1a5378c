"""The megatron-core back end: tensor, sequence, expert, context and pipeline parallel, under its own schedules.

The head is taken from the model: logprobs come of hidden states, vocabulary-parallel, and every context-parallel rank
gets those of all positions, so that the loss is that of whole samples whatever cuts them. Gradients are summed over
ranks, since the loss brings the whole step's denominator.

Legend: T positions of a microbatch (whole), T' those of this rank, D hidden size, L MoE layers, K experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from pacenote.kernels.logprob import linear_logprob
from pacenote.kernels.pack import PackedBatch, Routes
from pacenote.kernels.policy import PolicyConfig, PolicyOutput, policy_loss
from pacenote.kernels.spec import PAD, REPLAY
from pacenote.replay.audit import Audit
from pacenote.replay.megatron import attach_megatron
from pacenote.trainer import model as models
from pacenote.trainer.backend import Divisor, Native, Prepared
from pacenote.trainer.batch import Cut, Microbatch, Sample, Step, pack_step
from pacenote.trainer.guard import Guard, Reason
from pacenote.trainer.megatron_config import MegatronConfig
from pacenote.trainer.megatron_cpu import shim
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.phases import DeviceTime
from pacenote.trainer.world import ALONE, Place, World

Output = Callable[[int, Tensor], Tensor]


class MegatronBackend:
    """A causal language model in training; a `backend.Backend`."""

    def __init__(
        self,
        directory: Path,
        config: OptimConfig,
        layout: MegatronConfig,
        *,
        device: str,
        temperature: float,
        world: World = ALONE,
    ) -> None:
        """Build this rank's chunks, load their weights, attach the replay, make the optimizer.

        Args:
            directory: of the saved model, as transformers reads it.
            config: of the optimizer.
            layout: parallel sizes and number format.
            device: cuda:N, or cpu to try things out.
            temperature: that the rollout samples at.
            world: the ranks.

        Raises:
            ValueError: megatron-core is not installed, or cannot train this model in this layout.
        """
        self.config, self.layout, self.device = config, layout, device
        self.temperature, self.world, self.tokenizer_from = temperature, world, directory
        self.hf = AutoConfig.from_pretrained(directory)
        with ExitStack() as stack:
            if device == "cpu":
                stack.enter_context(shim())
            try:
                from pacenote.trainer import megatron_model, megatron_optimizer, megatron_weights
            except ImportError as error:
                raise ValueError(
                    f"--backend megatron expects megatron-core, which cannot be imported ({error}): install "
                    "pacenote[megatron]"
                ) from error
            self._weights, self._optimizers = megatron_weights, megatron_optimizer
            stack.enter_context(megatron_model.process_groups(layout))
            self.shape = megatron_weights.Shape.of(self.hf)
            self.models, self.wrapped = megatron_model.build(
                self.hf, layout, self.hf.max_position_embeddings, recompute=config.recompute
            )
            megatron_weights.load(self.models, directory, self.shape)
            self.replay = attach_megatron(self.models)
            self.optimizer = megatron_optimizer.build(self.wrapped, config, layout)
            self._stack = stack.pop_all()
        self.guard = Guard(config.guard)
        self._forward = DeviceTime(device)
        self.ranks = megatron_model.Ranks.here()

    @property
    def place(self) -> Place:
        """Model-parallel ranks share a share of the samples; the first of the last stage speaks for it."""
        ranks = self.ranks
        return Place(
            data_rank=ranks.data.rank(),
            data_size=ranks.data.size(),
            speaks=ranks.last and ranks.tensor.rank() == 0 and ranks.context.rank() == 0,
            multiple=self.layout.pipeline if self.layout.virtual_pipeline else 1,
        )

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Global ids of the model's MoE layers, on all stages."""
        return tuple(layer for layer, sparse in enumerate(self.models[0].config.moe_layer_freq) if sparse)

    def close(self) -> None:
        """Take the replay off the model, and leave the process groups."""
        self.replay.detach()
        self._stack.close()

    def pack(self, step: Step, spare: Sample | None) -> list[Microbatch]:
        """This rank's share of an optimizer step: whole for the loss, cut for the model."""
        cut = Cut(layers=self.replay.places(self.moe_layers), layout=self.replay.layout)
        lockstep = self.place.data_size > 1 or self.place.multiple > 1
        return pack_step(step, spare, self.config, self.device, cut=cut, lockstep=lockstep)

    @torch.no_grad()
    def scores(self, items: Sequence[Microbatch], routes: Sequence[Routes | None]) -> list[Tensor]:
        """Logprobs [T] float32 of each microbatch's targets; zeros on stages that have no head."""
        found: dict[int, Tensor] = {}

        def keep(number: int, output: Tensor) -> Tensor:
            found[number] = output[0].detach().clone()
            return output.sum() * 0.0

        self._run([item.batch for item in items], [item.seen for item in items], routes, keep, forward_only=True)
        return [found.get(number, torch.zeros_like(item.batch.logprobs)) for number, item in enumerate(items)]

    @torch.no_grad()
    def scores_native(self, items: Sequence[Microbatch]) -> list[Native]:
        """Logprobs under the model's own routing, and that routing of all layers and positions."""
        with self.replay.record() as record:
            logprobs = self.scores(items, [None] * len(items))
        natives = []
        for number, (item, logprob) in enumerate(zip(items, logprobs, strict=True)):
            rows = record.rows(number)
            state = self._state(item)
            whole = Routes(
                rows=self._everywhere(rows, item),
                state=torch.ones_like(item.batch.tokens, dtype=torch.uint8),
                num_experts=None,
            )
            natives.append(Native(logprob, whole, Routes(rows=rows, state=state, num_experts=None)))
        return natives

    def accumulate(
        self, items: Sequence[Prepared], divisors: Sequence[Divisor], config: PolicyConfig
    ) -> list[dict[str, float]]:
        """Add up the gradients of these microbatches; the loss's metrics of each, on the last stage."""
        outputs: dict[int, PolicyOutput] = {}

        def loss(number: int, output: Tensor) -> Tensor:
            item, divisor = items[number], divisors[number]
            out = policy_loss(
                output[0],
                item.batch,
                config,
                entropy=output[1],
                reference=item.reference,
                group_tokens=divisor.group_tokens,
                denominator=divisor.denominator,
            )
            outputs[number] = out
            return out.loss

        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        seen = [item.batch if item.seen is None else item.seen for item in items]
        self._run([item.batch for item in items], seen, [item.routes for item in items], loss, forward_only=False)
        self._optimizers.finalize(self.wrapped)
        return [outputs[number].read() for number in sorted(outputs)]

    def forward_seconds(self) -> float:
        """What the forward passes of `accumulate` took since the last call; waits for the device."""
        return self._forward.take()

    def set_lr(self, step: int, steps: int) -> float:
        """Learning rate of a training step of a run of `steps`; set on the optimizer and returned."""
        lr = self.config.rate(step, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def apply_gradients(self, *, loss: float = 0.0) -> tuple[float, Reason | None]:
        """Clip, step, clear; see `Backend.apply_gradients`."""
        try:
            norm = loss
            if math.isfinite(loss):
                self.optimizer.prepare_grads()
                norm = float(self.optimizer.get_grad_norm())
            reason = self.guard.judge(norm)
            if reason is None:
                self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
        return norm, reason

    def audit(self) -> Audit:
        """Counts by layer since the last call: each rank sees positions, or layers, of its own."""
        return self.replay.audit(reset=True)

    def save_weights(self, out: Path) -> None:
        """Write a model directory that an engine can load, each rank its part."""
        self._weights.save(self.models, out, self.shape, self.world)
        self.world.alone(lambda: models.copy_files(self.tokenizer_from, out))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights [...] under the names that `save_weights` gives them; of one rank that holds all."""
        return self._weights.entries(self.models, self.shape)

    def save_state(self, out: Path) -> None:
        """Write this rank's part of moments and master weights, and the guard's norms."""
        state = {"optimizer": self._optimizers.state(self.optimizer), "guard": self.guard.state()}
        torch.save({**state, "layout": repr(self.layout), "ranks": self.world.size}, out / self._file)

    def load_state(self, path: Path) -> None:
        """Take back what `save_state` wrote.

        Raises:
            ValueError: it was written in another layout.
        """
        wanted = (repr(self.layout), self.world.size)
        state = torch.load(path / self._file, weights_only=True)
        if (found := (state["layout"], state["ranks"])) != wanted:
            raise ValueError(
                f"{path} was written by {found[1]} ranks of {found[0]}, these are {wanted[1]} of {wanted[0]}: resume "
                "as it was started"
            )
        self._optimizers.load_state(self.optimizer, state["optimizer"])
        self.guard.load_state(state["guard"])

    @property
    def _file(self) -> str:
        return f"optimizer_{self.world.rank}.pt"

    def _run(
        self,
        batches: Sequence[PackedBatch],
        seen: Sequence[PackedBatch],
        routes: Sequence[Routes | None],
        output: Output,
        *,
        forward_only: bool,
    ) -> None:
        """Megatron's schedule over these microbatches; `output` makes a loss of number and [2, T], see `_head`."""
        if not batches:
            return
        replayed = [given for given in routes if given is not None]
        scope: Any = self.replay.rows(replayed) if replayed else nullcontext()
        with scope:
            self._optimizers.schedule(
                self.wrapped,
                len(batches),
                lambda number: self._inputs(seen[number], batches[number]),
                output,
                timed=nullcontext if forward_only else self._forward,
                forward_only=forward_only,
            )

    def _inputs(self, seen: PackedBatch, whole: PackedBatch) -> dict[str, Any]:
        from pacenote.trainer.megatron_optimizer import packed_seq_params

        return {
            "input_ids": seen.tokens.long()[None],
            "position_ids": seen.positions[None],
            "attention_mask": None,
            "packed_seq_params": packed_seq_params(seen),
            "output_processor": self._head,
            "output_processor_context": (seen, whole),
        }

    def _head(self, *, hidden_states: Tensor, output_layer: Any, context: Any, **_: Any) -> Tensor:
        """[2, T] logprob and entropy of all positions, of this rank's hidden states [T', 1, D]."""
        seen, whole = context
        hidden = self.ranks.gather_positions(hidden_states) if self.layout.sequence_parallel else hidden_states
        group = self.ranks.tensor if self.ranks.tensor.size() > 1 else None
        logprob, entropy = linear_logprob(
            hidden.squeeze(1),
            output_layer.weight,
            seen.targets,
            temperature=self.temperature,
            mask=seen.loss_mask,
            vocab_bound=self.shape.vocab,
            group=group,
        )
        both = torch.stack([logprob, entropy], 1)
        return self._whole(both, seen, whole).T

    def _whole(self, values: Tensor, seen: PackedBatch, whole: PackedBatch) -> Tensor:
        """[T, C] in the order of the whole batch of [T', C] of this context-parallel rank."""
        places = _places(seen, whole)
        if self.ranks.context.size() > 1:
            values, places = self.ranks.gather_context(values), self.ranks.gather_context(places)
        real = places >= 0
        out = values.new_zeros(whole.num_tokens, *values.shape[1:])
        return out.index_copy(0, places[real], values[real])

    def _state(self, item: Microbatch) -> Tensor:
        """What to do with each position of this rank's routers: replay, or pad."""
        pad = _places(item.seen, item.batch) < 0
        layout = self.replay.layout
        mine = pad.chunk(layout.sp_size)[layout.sp_rank] if layout.sp_size > 1 else pad
        return torch.where(mine, PAD, REPLAY).to(torch.uint8)

    def _everywhere(self, rows: Tensor, item: Microbatch) -> Tensor:
        """[T, L, K] of all layers and positions, of this rank's [T'', L', K]."""
        if self.layout.sequence_parallel:
            rows = self.ranks.gather(rows, self.ranks.tensor)
        rows = self._whole(rows, item.seen, item.batch)
        stages: list[Any] = [(self.replay.layers, rows)]
        if self.ranks.pipeline.size() > 1:
            stages = [None] * self.ranks.pipeline.size()
            dist.all_gather_object(stages, (self.replay.layers, rows.cpu()), group=self.ranks.pipeline)
        layers = [layer for held, _ in stages for layer in held]
        joined = torch.cat([part.to(rows.device) for _, part in stages], 1)
        return joined[:, torch.tensor(sorted(range(len(layers)), key=layers.__getitem__), device=rows.device)]


def _places(seen: PackedBatch, whole: PackedBatch) -> Tensor:
    """Where each of this rank's positions stands in the whole batch, [T'] int64; -1 for padding."""
    segment = seen.segment_ids.clamp(min=0).long()
    real = (seen.segment_ids >= 0) & (seen.positions < whole.cu_seqlens.diff()[segment])
    return torch.where(real, whole.cu_seqlens[segment] + seen.positions, -1)
