"""Trajectory: one leaf of a session's tree as aligned arrays, ready to train on.

Legend: N tokens, L MoE layers, K experts a token, E experts a layer.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pacenote.replay.record import RECOMPUTED, expert_dtype
from pacenote.rollout.turn import Turn

STATUSES = ("completed", "length", "aborted", "superseded")
Span = tuple[str, int, int, bool]
"""(role, start, stop, generated): tokens start..stop-1 are one message, headers included; the mask says which of them
were generated."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """N tokens with everything that belongs to them. Fits `pacenote.kernels.pack.Sample`.

    Attributes:
        tokens: [N] int32, N >= 1.
        loss_mask: [N] uint8, 1 where the token is trained; the first token never is.
        logprobs: [N] float32, the engine's; 0 where not generated.
        experts: [N-1, L, K] uint8 | uint16, row i is the routing of token i as an input; None without routes.
        provenance: [N-1] uint8, where a row is known from (`kernels.spec`); RECOMPUTED also for the row of a generated
            token that was written under other weights than the token.
        version: [N] int32, weight version that wrote token i, or read it if it was not generated; -1 unknown.
        layers: global ids of the L layers; empty without routes.
        num_experts: E; None without routes.
        spans: the messages, in order; they cover 0..N.
        status: one of STATUSES, of the last answer.

    Raises:
        ValueError: the parts do not fit together.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]
    logprobs: NDArray[np.float32]
    experts: NDArray[Any] | None
    provenance: NDArray[np.uint8]
    version: NDArray[np.int32]
    layers: tuple[int, ...] = ()
    num_experts: int | None = None
    spans: tuple[Span, ...] = ()
    status: str = "completed"

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if count < 1:
            raise ValueError("expected a trajectory of at least one token, got none")
        for name, length, dtype in (
            ("tokens", count, np.int32),
            ("loss_mask", count, np.uint8),
            ("logprobs", count, np.float32),
            ("provenance", count - 1, np.uint8),
            ("version", count, np.int32),
        ):
            array = getattr(self, name)
            if array.shape != (length,) or array.dtype != dtype:
                raise ValueError(
                    f"expected {name} of shape [{length}] and {np.dtype(dtype)} for {count} tokens, "
                    f"got {list(array.shape)} {array.dtype}"
                )
        if self.loss_mask[0] or self.loss_mask.max() > 1:
            raise ValueError("expected loss_mask of 0 and 1 that starts with 0: the first token has no logprob")
        if not np.isfinite(self.logprobs).all():
            raise ValueError(f"expected finite logprobs, got {int((~np.isfinite(self.logprobs)).sum())} that are not")
        if self.status not in STATUSES:
            raise ValueError(f"expected a status of {STATUSES}, got {self.status!r}")
        self._check_rows(count - 1)
        self._check_spans(count)

    def _check_rows(self, rows: int) -> None:
        if (self.experts is None) != (self.num_experts is None):
            raise ValueError("expected experts and num_experts, or neither")
        if self.experts is None or self.num_experts is None:
            if self.layers or self.provenance.any():
                raise ValueError("expected no layers and provenance MISSING where there are no experts")
            return
        shape, dtype = self.experts.shape, expert_dtype(self.num_experts)
        if len(shape) != 3 or shape[:2] != (rows, len(self.layers)) or self.experts.dtype != dtype:
            raise ValueError(
                f"expected experts of shape [{rows}, {len(self.layers)}, K] and {dtype} for {rows + 1} tokens, "
                f"got {list(shape)} {self.experts.dtype}"
            )

    def _check_spans(self, count: int) -> None:
        position = 0
        for role, start, stop, _ in self.spans:
            if start != position or stop < start:
                raise ValueError(f"expected message spans one after the other, got {role} {start}..{stop}")
            position = stop
        if self.spans and position != count:
            raise ValueError(f"expected message spans up to {count}, got {position}")

    def __len__(self) -> int:
        """N."""
        return len(self.tokens)

    @property
    def trained(self) -> int:
        """Tokens whose mask is 1."""
        return int(self.loss_mask.sum())

    def truncate(self, tokens: int) -> Trajectory:
        """The first `tokens` tokens with their rows, logprobs, mask, versions and spans; itself if it has no more.

        The status becomes "length" if anything was cut.

        Raises:
            ValueError: `tokens` < 1.
        """
        if tokens < 1:
            raise ValueError(f"expected to keep at least one token, got {tokens}")
        if tokens >= len(self.tokens):
            return self
        return replace(
            self,
            tokens=self.tokens[:tokens],
            loss_mask=self.loss_mask[:tokens],
            logprobs=self.logprobs[:tokens],
            experts=None if self.experts is None else self.experts[: tokens - 1],
            provenance=self.provenance[: tokens - 1],
            version=self.version[:tokens],
            spans=tuple(
                (role, start, min(stop, tokens), generated)
                for role, start, stop, generated in self.spans
                if start < tokens
            ),
            status="length",
        )


def join(leaf: Turn, *, trained: Container[int], status: str | None = None) -> Trajectory:
    """The trajectory from the root to `leaf`.

    Args:
        leaf: the last turn.
        trained: numbers of the turns whose generated tokens get mask 1; those of the other turns are context.
        status: None takes it from the leaf's finish.
    """
    line = leaf.line()
    drops = [turn.prompt.drop for turn in line[1:]] + [0]
    kept = [len(turn.answer.ids) - drop for turn, drop in zip(line, drops, strict=True)]
    tokens, generated, mask, logprobs, version = (
        np.concatenate(column) for column in zip(*_columns(line, kept, trained), strict=True)
    )
    record = leaf.rows()
    provenance = np.zeros(len(tokens) - 1, dtype=np.uint8)
    if record is not None:
        version[:-1] = np.where(generated[:-1], version[:-1], record.version)
        rewritten = generated[:-1] & (record.version != version[:-1])
        provenance = np.where(rewritten, np.uint8(RECOMPUTED), record.provenance)
    return Trajectory(
        tokens=tokens,
        loss_mask=mask,
        logprobs=logprobs,
        experts=None if record is None else record.experts,
        provenance=provenance,
        version=version,
        layers=() if record is None else record.layers,
        num_experts=None if record is None else record.num_experts,
        spans=_spans(line, kept),
        status=status or ("length" if leaf.answer.finish == "length" else "completed"),
    )


def _columns(line: Sequence[Turn], kept: Sequence[int], trained: Container[int]) -> Iterator[tuple[NDArray[Any], ...]]:
    """(tokens, generated, mask, logprobs, version) of each turn: appended tokens, then what is kept of the answer."""
    for turn, keep in zip(line, kept, strict=True):
        answer, appended = turn.answer, len(turn.prompt.ids)
        yield (
            np.concatenate([turn.prompt.ids, answer.ids[:keep]]),
            np.repeat([False, True], [appended, keep]),
            np.repeat(np.array([0, turn.number in trained], dtype=np.uint8), [appended, keep]),
            np.concatenate([np.zeros(appended, dtype=np.float32), answer.logprobs[:keep]]),
            np.concatenate([np.repeat(answer.versions[:1], appended), answer.versions[:keep]]),
        )


def _spans(line: Sequence[Turn], kept: Sequence[int]) -> tuple[Span, ...]:
    spans: list[Span] = []
    position = 0
    for turn, keep in zip(line, kept, strict=True):
        *appended, (role, header) = turn.prompt.spans
        for name, tokens in appended:
            spans.append((name, position, position + tokens, False))
            position += tokens
        spans.append((role, position, position + header + keep, True))
        position += header + keep
    return tuple(spans)
