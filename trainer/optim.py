"""The optimizer's knobs, and how a step's samples reach it: the same for every back end."""

from __future__ import annotations

from dataclasses import dataclass, field

from pacenote.kernels.spec import Provenance
from pacenote.trainer.guard import GuardConfig


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
    """Positions that go through the model at once, on each data-parallel rank."""
    recompute: bool = False
    """Compute every layer again in backward, instead of keeping what it made."""
    max_len: int | None = None
    """Longest sample in tokens; the tail of a longer one is cut."""
    replay_provenance: tuple[Provenance, ...] = ("prefill", "decode", "cached")
    """Rows that an update may replay of the engine's, by where they are known from; the others are routed freely."""
    mask_provenance: tuple[Provenance, ...] = ()
    """Rows whose next token does not train, by where they are known from; samples of nothing else are left out."""
    guard: GuardConfig = field(default_factory=GuardConfig)

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a training step of a run of `steps`."""
        rise = (step + 1) / max(1, self.warmup)
        fall = (steps - step) / (steps * self.decay) if self.decay else 1.0
        return self.lr * min(1.0, rise, fall)
