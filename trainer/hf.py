"""The transformers back end: one model, one optimizer, routes replayed by hooks; over many ranks sharded by FSDP2."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pacenote.kernels.logprob import linear_logprob
from pacenote.kernels.pack import PackedBatch, Routes
from pacenote.kernels.policy import PolicyConfig, PolicyOutput, policy_loss
from pacenote.kernels.policy_hidden import policy_loss_from_hidden
from pacenote.replay.audit import Audit
from pacenote.replay.exact import Exact
from pacenote.replay.hf import attach
from pacenote.replay.packing import check_packing
from pacenote.trainer import fsdp
from pacenote.trainer import model as models
from pacenote.trainer.backend import Divisor, Native, Prepared
from pacenote.trainer.batch import Microbatch, Sample, Step, pack_step
from pacenote.trainer.guard import Guard, Reason
from pacenote.trainer.lora import ALL_WEIGHTS, Adapters, LoraConfig
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.phases import DeviceTime
from pacenote.trainer.world import ALONE, Place, World


class HfBackend:
    """A causal language model in training; a `backend.Backend`. State: weights, optimizer moments, and the hooks of the
    replay."""

    def __init__(
        self,
        directory: Path,
        config: OptimConfig,
        *,
        device: str,
        temperature: float,
        exact: bool = False,
        lora: LoraConfig = ALL_WEIGHTS,
        seed: int = 0,
        world: World = ALONE,
    ) -> None:
        """Load the model directory, attach the replay, shard the weights over the ranks, make the optimizer.

        Args:
            directory: of the saved model.
            config: of the optimizer.
            device: where the model trains.
            temperature: that the rollout samples at.
            exact: compute logprobs in the form in which an exact engine does; see `replay.exact`.
            lora: adapters that train in place of the model's own weights.
            seed: of the adapters' initial weights.
            world: the ranks; more than one shard weights, gradients and moments, experts among them.

        Raises:
            ValueError: the directory is not a saved mixture-of-experts model whose routers can be replayed, or the
                model lets packed sequences see each other, or is to be exact, sharded or adapted and cannot be.
        """
        self.config, self.device, self.temperature, self.world = config, device, temperature, world
        self.tokenizer_from = directory
        self.model = models.load(directory, device=device).train()
        self.adapters = Adapters(self.model, lora, seed=seed) if lora.rank else None
        self.replay = attach(self.model)
        check_packing(self.replay, self.model)
        self.replay.audit(reset=True)  # the check's rows are nobody's
        self.exact = Exact(self.model) if exact else None
        if config.recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if world.size > 1:
            fsdp.shard(self.model, world, device)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.guard = Guard(config.guard)
        self._forward = DeviceTime(device)
        self._row_dtype = torch.uint8 if self.replay.geometry.num_experts <= 256 else torch.uint16

    @property
    def place(self) -> Place:
        """Every rank has a share of the samples of its own."""
        return Place(data_rank=self.world.rank, data_size=self.world.size)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Global ids of the model's MoE layers."""
        return tuple(self.replay.layers)

    def close(self) -> None:
        """Take the hooks off the model."""
        self.replay.detach()

    def pack(self, step: Step, spare: Sample | None) -> list[Microbatch]:
        """This rank's share of an optimizer step, on the device."""
        return pack_step(step, spare, self.config, self.device, lockstep=self.world.size > 1)

    def scores(self, items: Sequence[Microbatch], routes: Sequence[Routes | None]) -> list[Tensor]:
        """Logprobs [T] float32 of each microbatch's targets under the routes given, or the model's own."""
        return [self.score(item.batch, given) for item, given in zip(items, routes, strict=True)]

    def scores_native(self, items: Sequence[Microbatch]) -> list[Native]:
        """Logprobs under the model's own routing, and that routing."""
        found = [self.score_native(item.batch) for item in items]
        return [Native(logprobs, routes, routes) for logprobs, routes in found]

    def accumulate(
        self, items: Sequence[Prepared], divisors: Sequence[Divisor], config: PolicyConfig
    ) -> list[dict[str, float]]:
        """Add up the gradients of these microbatches; the loss's metrics of each."""
        parts = []
        for item, divisor in zip(items, divisors, strict=True):
            with self.routed(item.routes):
                with self._forward():
                    out = self.loss(
                        item.batch,
                        config,
                        reference=item.reference,
                        group_tokens=divisor.group_tokens,
                        denominator=divisor.denominator,
                    )
                out.backward()
            parts.append(out.read())
        return parts

    def forward_seconds(self) -> float:
        """What the forward passes of `accumulate` took since the last call; waits for the device."""
        return self._forward.take()

    def logprobs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Logprob and entropy [T] float32 of each target; gradients flow if autograd is on.

        Must run inside `self.routed(routes)`, which a backward pass must not outlive.
        """
        hidden = self._hidden(batch)
        if self.exact is not None:
            return self.exact.logprobs(hidden, batch.targets, self.temperature, batch.loss_mask)
        weight, bias = self._head()
        return linear_logprob(
            hidden, weight, batch.targets, temperature=self.temperature, bias=bias, mask=batch.loss_mask
        )

    def loss(
        self,
        batch: PackedBatch,
        config: PolicyConfig,
        *,
        reference: Tensor | None = None,
        group_tokens: Tensor | None = None,
        denominator: float | None = None,
    ) -> PolicyOutput:
        """The policy loss of a batch with old logprobs, through the head and back, chunk by chunk.

        Must run inside `self.routed(...)`, and so must its backward. Arguments as `policy_loss`: reference [T],
        group_tokens [S].
        """
        if self.exact is not None:
            logprob, entropy = self.logprobs(batch)
            return policy_loss(
                logprob,
                batch,
                config,
                entropy=entropy,
                reference=reference,
                group_tokens=group_tokens,
                denominator=denominator,
            )
        hidden, (weight, bias) = self._hidden(batch), self._head()
        return policy_loss_from_hidden(
            hidden,
            weight,
            batch,
            config,
            temperature=self.temperature,
            bias=bias,
            reference=reference,
            group_tokens=group_tokens,
            denominator=denominator,
        )

    def _head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] of the head."""
        head = self.model.get_output_embeddings()
        return fsdp.whole(head.weight), None if head.bias is None else fsdp.whole(head.bias)

    def _hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states [1, T, D] that the head reads."""
        with self.exact.forward() if self.exact is not None else contextlib.nullcontext():
            hidden: Tensor = self.model.base_model(**batch.inputs).last_hidden_state
        return hidden

    @contextlib.contextmanager
    def routed(self, routes: Routes | None) -> Iterator[None]:
        """Replay `routes` in every router for forward and backward; None leaves the routers to themselves."""
        if routes is None:
            yield
            return
        with self.replay.rows(routes):
            yield

    @torch.no_grad()
    def score(self, batch: PackedBatch, routes: Routes | None) -> Tensor:
        """Logprob [T] float32 of each target with the routes given, or the model's own."""
        with self.routed(routes):
            return self.logprobs(batch)[0]

    @torch.no_grad()
    def score_native(self, batch: PackedBatch) -> tuple[Tensor, Routes]:
        """Logprob [T] float32 under the model's own routing, and that routing."""
        with self.replay.record() as record:
            logprob = self.logprobs(batch)[0]
        rows = record.rows().reshape(batch.num_tokens, len(self.replay.layers), -1).to(self._row_dtype)
        return logprob, Routes(rows=rows, state=torch.ones_like(batch.tokens, dtype=torch.uint8), num_experts=None)

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
                clipped = torch.nn.utils.clip_grad_norm_(self.trained, self.config.grad_clip)
                norm = float(fsdp.whole(clipped))
            reason = self.guard.judge(norm)
            if reason is None:
                self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
        return norm, reason

    def save_weights(self, out: Path) -> None:
        """Write a model directory that an engine can load; adapters are merged into copies of their weights."""
        state = fsdp.whole_state(self.model) if self.world.size > 1 else None
        self.world.lead(
            lambda: models.save(self.model, out, tokenizer_from=self.tokenizer_from, state=self._merged(state))
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, [...] each, under the names that `save_weights` gives them."""
        return models.disk_tensors(self.model, self._merged(None))

    def _merged(self, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """A state dict [...] (None: the model's) without adapters, each in its weight."""
        if self.adapters is None:
            return state
        return self.adapters.merged(self.model.state_dict() if state is None else state)

    def _apart(self) -> dict[str, Tensor]:
        """What of the model's own tensors [...] cannot be had from its merged weights."""
        return {} if self.adapters is None else self.adapters.apart(self.model.state_dict())

    def save_state(self, out: Path) -> None:
        """Write the optimizer's moments and the guard's norms; adapters, and the weights that they belong to, as they
        are before they are merged."""
        guard, apart = self.guard.state(), self._apart()
        if self.world.size > 1:
            fsdp.save_optimizer(self.model, self.optimizer, out / "optimizer")
            if apart:
                fsdp.save_tensors(apart, out / "adapters")
            self.world.lead(lambda: torch.save({"guard": guard}, out / "guard.pt"))
        else:
            state = {"optimizer": self.optimizer.state_dict(), "guard": guard, **({"adapters": apart} if apart else {})}
            torch.save(state, out / "optimizer.pt")

    def load_state(self, path: Path) -> None:
        """Take back what `save_state` wrote.

        Raises:
            ValueError: it was written by one rank and is read by many, or the other way round.
        """
        if (path / "optimizer").is_dir() != (self.world.size > 1):
            raise ValueError(
                f"{path} is of a run on {'one rank' if self.world.size > 1 else 'many ranks'}, this one has "
                f"{self.world.size}: resume as it was started, with or without torchrun"
            )
        apart = self._apart()
        if self.world.size > 1:
            if apart:
                fsdp.load_tensors(apart, path / "adapters")
            fsdp.load_optimizer(self.model, self.optimizer, path / "optimizer")
            state = torch.load(path / "guard.pt", weights_only=True)
        else:
            state = torch.load(path / "optimizer.pt", weights_only=True)
            if apart:  # not strict: the other weights are there
                self.model.load_state_dict({name: state["adapters"][name] for name in apart}, strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state(state["guard"])

    def audit(self) -> Audit:
        """Counts by layer since the last call; waits for the device."""
        return self.replay.audit(reset=True)
