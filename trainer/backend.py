"""What a back end of the trainer is: a model that scores, learns and gives its weights away. `hf.py` and `megatron.py`
are two.

On many ranks every method is called by all of them, in the same order: they share collectives.

Legend: T positions of a microbatch, L MoE layers, K experts a token, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pacenote.kernels.pack import PackedBatch, Routes
from pacenote.kernels.policy import PolicyConfig
from pacenote.replay.audit import Audit
from pacenote.trainer.batch import Microbatch, Sample, Step
from pacenote.trainer.guard import Reason
from pacenote.trainer.optim import OptimConfig
from pacenote.trainer.world import Place, World


@dataclass(frozen=True, slots=True)
class Native:
    """A pass under the model's own routing.

    Attributes:
        logprobs: [T] float32 of each target.
        routes: the experts it chose, for all positions and layers, [T, L, K].
        seen: the same for what this rank's part of the model sees; what an update can replay.
    """

    logprobs: Tensor
    routes: Routes
    seen: Routes


@dataclass(frozen=True, slots=True)
class Prepared:
    """A microbatch ready for the optimizer: `routes` are what the update replays (None: the model's own), `groups` the
    numbers of its samples' groups, `reference` [T] the reference policy's logprobs, `seen` this rank's part."""

    batch: PackedBatch
    routes: Routes | None
    groups: tuple[int, ...] = ()
    reference: Tensor | None = None
    seen: PackedBatch | None = None


@dataclass(frozen=True, slots=True)
class Divisor:
    """What a microbatch's loss is divided by: the whole optimizer step's denominator, over all ranks, and of each of
    its samples the tokens [S] of its group, where the loss asks for them."""

    denominator: float
    group_tokens: Tensor | None = None


class Backend(Protocol):
    """A causal language model in training, with its routers replayed."""

    config: OptimConfig
    device: str
    world: World

    @property
    def place(self) -> Place:
        """What this rank is in the layout."""
        ...

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Global ids of the model's MoE layers, on all ranks."""
        ...

    def pack(self, step: Step, spare: Sample | None) -> list[Microbatch]:
        """This rank's share of an optimizer step, on the device; `spare` is what fillers are made of."""
        ...

    def scores(self, items: Sequence[Microbatch], routes: Sequence[Routes | None]) -> list[Tensor]:
        """Logprobs [T] float32 of each microbatch's targets under the routes given, or the model's own; no gradient."""
        ...

    def scores_native(self, items: Sequence[Microbatch]) -> list[Native]:
        """Logprobs under the model's own routing, and that routing."""
        ...

    def accumulate(
        self, items: Sequence[Prepared], divisors: Sequence[Divisor], config: PolicyConfig
    ) -> list[dict[str, float]]:
        """Add up the gradients of these microbatches; the loss's metrics of each."""
        ...

    def forward_seconds(self) -> float:
        """What the forward passes of `accumulate` took since the last call; waits for the device."""
        ...

    def set_lr(self, step: int, steps: int) -> float:
        """Learning rate of a training step of a run of `steps`; set on the optimizer and returned."""
        ...

    def apply_gradients(self, *, loss: float = 0.0) -> tuple[float, Reason | None]:
        """Clip, step, clear.

        Args:
            loss: of the step, over all ranks; one that is not finite has no gradient that could be used.

        Returns:
            The norm before clipping, or such a loss; and why nothing was stepped, None if it was.

        Raises:
            NotFinite: too many optimizer steps in a row were not.
        """
        ...

    def audit(self) -> Audit:
        """Counts by layer since the last call, of what this rank counts for; waits for the device."""
        ...

    def save_weights(self, out: Path) -> None:
        """Write a model directory that an engine can load; the leader does."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights, [...] each, under the names that `save_weights` gives them."""
        ...

    def save_state(self, out: Path) -> None:
        """Write what a checkpoint needs beside the weights into the directory `out`."""
        ...

    def load_state(self, path: Path) -> None:
        """Take back what `save_state` wrote."""
        ...

    def close(self) -> None:
        """Take the replay off the model."""
        ...
