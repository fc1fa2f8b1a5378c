"""The transformers back end: one model, one optimizer, routes replayed by hooks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pacenote.kernels.logprob import linear_logprob
from pacenote.kernels.pack import PackedBatch, Routes
from pacenote.kernels.policy import PolicyConfig, PolicyOutput, policy_loss
from pacenote.kernels.policy_hidden import policy_loss_from_hidden
from pacenote.kernels.spec import Provenance
from pacenote.replay.audit import Audit
from pacenote.replay.exact import Exact
from pacenote.replay.hf import attach
from pacenote.replay.packing import check_packing
from pacenote.trainer import model as models
from pacenote.trainer.guard import Guard, GuardConfig, Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """The optimizer and how a step's samples reach it."""

    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    warmup: int = 5
    """Steps of linear warm-up."""
    decay: float = 0.0
    """Share of the run, at its end, over which the rate falls to 0 (warm-up, stable, decay: arXiv 2404.06395)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    grad_clip: float = 1.0
    """Largest norm of a gradient; a larger one is scaled down."""
    minibatches: int = 4
    """Optimizer steps a training step: each takes an equal share of the samples, shuffled."""
    microbatch_tokens: int = 768
    """Positions that go through the model at once."""
    max_len: int | None = None
    """Longest sample in tokens; the tail of a longer one is cut."""
    replay_provenance: tuple[Provenance, ...] = ("prefill", "decode", "cached")
    """Rows that an update may replay of the engine's, by where they are known from; the others are routed freely."""
    mask_provenance: tuple[Provenance, ...] = ()
    """Rows whose next token does not train, by where they are known from; samples of nothing else are left out."""
    guard: GuardConfig = field(default_factory=GuardConfig)


RoutesFrom = Literal["native", "rollout"]


class HfBackend:
    """A causal language model in training. State: weights, optimizer moments, and the hooks of the replay."""

    def __init__(
        self, directory: Path, config: OptimConfig, *, device: str, temperature: float, exact: bool = False
    ) -> None:
        """Load the model directory, attach the replay, make the optimizer.

        Args:
            directory: of the saved model.
            config: of the optimizer.
            device: where the model trains.
            temperature: that the rollout samples at.
            exact: compute logprobs in the form in which an exact engine does; see `replay.exact`.

        Raises:
            ValueError: the directory is not a saved mixture-of-experts model whose routers can be replayed, or the
                model lets packed sequences see each other, or is to be exact and cannot be.
        """
        self.config, self.device, self.temperature = config, device, temperature
        self.tokenizer_from = directory
        self.model = models.load(directory, device=device).train()
        self.replay = attach(self.model)
        check_packing(self.replay, self.model)
        self.replay.audit(reset=True)  # the check's rows are nobody's
        self.exact = Exact(self.model) if exact else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), config.lr, betas=config.betas, weight_decay=config.weight_decay
        )

        self.guard = Guard(config.guard)

    def close(self) -> None:
        """Take the hooks off the model."""
        self.replay.detach()

    def logprobs(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Logprob and entropy [T] float32 of each target; gradients flow if autograd is on.

        Must run inside `self.routed(routes)`, which a backward pass must not outlive.
        """
        hidden = self._hidden(batch)
        if self.exact is not None:
            return self.exact.logprobs(hidden, batch.targets, self.temperature, batch.loss_mask)
        head = self.model.get_output_embeddings()
        return linear_logprob(
            hidden, head.weight, batch.targets, temperature=self.temperature, bias=head.bias, mask=batch.loss_mask
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
        head = self.model.get_output_embeddings()
        return policy_loss_from_hidden(
            self._hidden(batch),
            head.weight,
            batch,
            config,
            temperature=self.temperature,
            bias=head.bias,
            reference=reference,
            group_tokens=group_tokens,
            denominator=denominator,
        )

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
        rows = record.rows().reshape(batch.num_tokens, len(self.replay.layers), -1)
        return logprob, Routes(rows=rows, state=torch.ones_like(batch.tokens, dtype=torch.uint8), num_experts=None)

    def set_lr(self, step: int, steps: int) -> float:
        """Learning rate of a training step of a run of `steps`; set on the optimizer and returned."""
        rise = (step + 1) / max(1, self.config.warmup)
        fall = (steps - step) / (steps * self.config.decay) if self.config.decay else 1.0
        lr = self.config.lr * min(1.0, rise, fall)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def apply_gradients(self, *, loss: float = 0.0) -> tuple[float, Reason | None]:
        """Clip, step, clear.

        Args:
            loss: of the step; one that is not finite has no gradient that could be used.

        Returns:
            The norm before clipping, or such a loss; and why nothing was stepped, None if it was.

        Raises:
            NotFinite: too many optimizer steps in a row were not.
        """
        try:
            norm = loss
            if math.isfinite(loss):
                norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))
            reason = self.guard.judge(norm)
            if reason is None:
                self.optimizer.step()
        finally:
            self.optimizer.zero_grad()
        return norm, reason

    def save_weights(self, out: Path) -> None:
        """Write a model directory that an engine can load."""
        models.save(self.model, out, tokenizer_from=self.tokenizer_from)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, [...] each, under the names that `save_weights` gives them."""
        return models.disk_tensors(self.model)

    def state(self) -> dict[str, Any]:
        """Optimizer state, for a checkpoint beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "guard": self.guard.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state(state["guard"])

    def audit(self) -> Audit:
        """Counts by layer since the last call; waits for the device."""
        return self.replay.audit(reset=True)
