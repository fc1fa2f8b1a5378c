"""The rows of one training step of a Megatron rank: which microbatch a router is being asked about, and whether every
row was used exactly once.

A chunk's forward passes come in the order of microbatches under every schedule, so they are counted. Recomputation
runs inside backward passes, which interleave with forward passes of later microbatches: there the microbatch is told
by autograd itself, through a hook on the output of each forward pass, which runs before anything below it.

Plain attributes throughout: on CUDA backward runs on another thread, where thread-locals would be empty.

Legend: M microbatches, C chunks of this rank, L MoE layers of this rank (of all its chunks), T tokens at a router,
K experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pacenote.kernels.spec import PAD
from pacenote.replay.errors import ScopeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """This rank's rows of one microbatch: experts [L, T, K] contiguous, state [T] uint8 or None (replay every row)."""

    experts: Tensor
    state: Tensor | None

    def to(self, device: torch.device) -> Microbatch:
        """The same on a device: one copy, from pinned memory where the device is a GPU; nothing waits for it."""
        if self.experts.device == device:
            return self
        if self.state is None:
            return Microbatch(experts=_move(self.experts, device), state=None)
        rows = self.experts.view(torch.uint8).reshape(-1)
        both = _move(torch.cat([rows, self.state]), device)
        experts = both[: len(rows)].view(self.experts.dtype).view(self.experts.shape)
        return Microbatch(experts=experts, state=both[len(rows) :])


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
    return pinned.to(device, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What a router gets: experts [T, K], state [T] uint8 or None, pads [T, 1] bool or None; `again`: recomputation."""

    experts: Tensor
    state: Tensor | None
    pads: Tensor | None
    again: bool


def in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread; torch.utils.checkpoint asks in the same way."""
    return torch._C._current_graph_task_id() != -1


class Passes:
    """The passes of one chunk through M microbatches: forward, and recomputation in backward."""

    def __init__(self, chunk: int, layers: dict[int, int], microbatches: int) -> None:
        """`layers` are the global ids of the chunk's MoE layers, by their place on the L axis."""
        self._where, self._layers, self._total = f"chunk {chunk}", layers, microbatches
        self._begun = 0
        self._running = False
        self._with_grad = False
        self._read: set[int] = set()
        # By microbatch: layers whose forward ran under a checkpoint and is to be run again, and those that have been.
        self._due: list[set[int]] = [set() for _ in range(microbatches)]
        self._again: list[set[int]] = [set() for _ in range(microbatches)]
        self._backward: int | None = None

    def begin(self) -> int:
        """A forward pass starts: the number of its microbatch.

        Raises:
            ScopeError: all microbatches have had theirs.
        """
        if self._begun == self._total:
            raise ScopeError(
                f"expected {self._total} forward passes of {self._where}, one a microbatch, got one more: give rows() "
                "the rows of every microbatch of the step, and open another scope for another pass over them"
            )
        self._begun += 1
        self._running, self._with_grad, self._read = True, torch.is_grad_enabled(), set()
        return self._begun - 1

    def end(self, output: Any) -> None:
        """It is over. Hooks the output, so that the start of its backward pass is seen.

        Raises:
            ScopeError: a router of the chunk was not reached.
        """
        self._running = False
        microbatch = self._begun - 1
        unread = [layer for index, layer in self._layers.items() if index not in self._read]
        if unread:
            raise ScopeError(
                f"expected every router to ask for its rows, got none from {self._where}, microbatch {microbatch}, "
                f"layers {unread}: their rows were not replayed"
            )
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(_BackwardStarts(self, microbatch))  # type: ignore[no-untyped-call]

    def backward_starts(self, microbatch: int) -> None:
        """Gradients have reached the output of a microbatch's forward pass.

        Raises:
            ScopeError: an earlier backward pass has not recomputed all it must: two are mixed up.
        """
        before = self._backward
        if before is not None and before != microbatch and self._due[before] and self._again[before]:
            raise ScopeError(
                f"expected the backward pass of {self._where}, microbatch {before} to end before that of microbatch "
                f"{microbatch} starts, got both at once: call backward for each microbatch"
            )
        self._backward = microbatch

    def read(self, index: int) -> tuple[int, bool]:
        """A router asks: (microbatch, whether this is recomputation).

        Raises:
            ScopeError: it has asked before, or no pass of the chunk is running.
        """
        layer = self._layers[index]
        if self._running:
            microbatch = self._begun - 1
            if index in self._read:
                raise ScopeError(
                    f"expected one read a forward pass, got two: {self._where}, microbatch {microbatch}, layer {layer}"
                )
            self._read.add(index)
            if self._with_grad and not torch.is_grad_enabled():
                self._due[microbatch].add(index)
            return microbatch, False
        if self._backward is None or not in_backward():
            raise ScopeError(
                f"expected {self._where}, layer {layer} to route inside a forward pass of its chunk or its backward "
                "pass, got neither: call the chunk itself, and run backward from its output"
            )
        microbatch = self._backward
        if index in self._again[microbatch]:
            raise ScopeError(
                f"expected one recomputation of {self._where}, microbatch {microbatch}, layer {layer}, got two"
            )
        self._again[microbatch].add(index)
        self._due[microbatch].discard(index)
        return microbatch, True

    def close(self) -> Iterator[str]:
        """What is missing at the end of the step."""
        if self._begun < self._total:
            yield f"{self._where}: forward passes of microbatches {list(range(self._begun, self._total))}"
        for microbatch, due in enumerate(self._due):
            if due:
                layers = sorted(self._layers[index] for index in due)
                yield f"{self._where}, microbatch {microbatch}: recomputation of layers {layers} in backward"


class _BackwardStarts:
    """A hook on an output tensor. Its gradient passes unchanged."""

    __slots__ = ("microbatch", "passes")

    def __init__(self, passes: Passes, microbatch: int) -> None:
        self.passes, self.microbatch = passes, microbatch

    def __call__(self, gradient: Tensor) -> None:
        self.passes.backward_starts(self.microbatch)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of any shape in a chunk's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


class Step:
    """Rows of the M microbatches of a step, each moved to the device once, when its first router asks."""

    def __init__(self, microbatches: Sequence[Microbatch], chunks: Sequence[dict[int, int]]) -> None:
        """`chunks` are the chunks' layers, as `Passes` takes them."""
        self.passes = [Passes(number, layers, len(microbatches)) for number, layers in enumerate(chunks)]
        self._host: list[Microbatch] = list(microbatches)
        self._moved: dict[int, tuple[Microbatch, Tensor | None]] = {}

    def take(self, chunk: int, index: int, scores: Tensor) -> Read:
        """The rows of layer number `index` for scores [T, E] of the microbatch whose pass is running.

        Raises:
            ScopeError: out of order (see `Passes.read`), or the router sees another number of tokens.
        """
        passes = self.passes[chunk]
        number, again = passes.read(index)
        rows, pads = self._on(number, scores.device)
        experts = rows.experts[index]
        if len(experts) != len(scores):
            raise ScopeError(
                f"expected {len(experts)} tokens, one a row, at chunk {chunk}, microbatch {number}, layer "
                f"{passes._layers[index]}, got {len(scores)}: rows must be this rank's part (replay.layout), flattened "
                "as the router sees them: see pacenote.replay.align"
            )
        return Read(experts=experts, state=rows.state, pads=pads, again=again)

    def _on(self, number: int, device: torch.device) -> tuple[Microbatch, Tensor | None]:
        found = self._moved.get(number)
        if found is None or found[0].experts.device != device:
            rows = self._host[number].to(device)
            pads = None if rows.state is None else (rows.state == PAD)[:, None]
            self._moved[number] = found = (rows, pads)
        return found

    def close(self) -> None:
        """The step is over.

        Raises:
            ScopeError: rows that no router asked for; names chunk, microbatch and layers.
        """
        missing = [text for passes in self.passes for text in passes.close()]
        if missing:
            raise ScopeError(
                "expected every row to be used once, forward and again where a layer is recomputed, before the scope "
                f"closes; missing: {'; '.join(missing)}. Run forward and backward of all microbatches inside it, and "
                "passes without backward under torch.no_grad()"
            )
