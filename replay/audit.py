"""How far trainer and engine disagree: counts of replayed rows, flipped choices, logprob mismatch. No verdicts.

Legend: T tokens, L MoE layers, K experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pacenote.kernels.spec import PROVENANCES


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Counts of rows by layer, each array [L] int64, and margins, as `kernels.route.RouteStats` defines them.

    A row counts once a forward pass and layer in one of replayed, free, duplicate, out_of_range, pad; recomputation
    under gradient checkpointing is not counted again. `flipped` are replayed rows whose recorded set of experts is not
    the set the trainer would have chosen; `overlap` sums the size of their intersection over replayed rows. `missing`
    are the free rows that were to be replayed and had no experts.

    `margin` [L] float64 is the mean, over flipped rows, of how far the trainer's choice is from the recorded one, in
    units of what selects: logits, or scores plus bias. NaN where no row is flipped.
    """

    layers: tuple[int, ...]
    replayed: NDArray[np.int64]
    free: NDArray[np.int64]
    duplicate: NDArray[np.int64]
    out_of_range: NDArray[np.int64]
    pad: NDArray[np.int64]
    flipped: NDArray[np.int64]
    overlap: NDArray[np.int64]
    missing: NDArray[np.int64]
    margin: NDArray[np.float64]

    def __getitem__(self, name: str) -> NDArray[np.int64]:
        """The counter [L] of that name.

        Raises:
            KeyError: no such counter.
        """
        if name not in COUNTERS:
            raise KeyError(f"expected one of {', '.join(COUNTERS)}, got {name!r}")
        counts: NDArray[np.int64] = getattr(self, name)
        return counts

    def total(self, name: str) -> int:
        """The counter's sum over layers.

        Raises:
            KeyError: no such counter.
        """
        return int(self[name].sum())

    def mean_margin(self) -> float:
        """The mean margin of the flipped rows of all layers; NaN if there is none."""
        flipped = self.flipped > 0
        return float(np.average(self.margin[flipped], weights=self.flipped[flipped])) if flipped.any() else np.nan

    def table(self) -> str:
        """A text table: a line a layer, and a line of sums and of the mean margin."""
        lines = [("layer", *COUNTERS, "margin")]
        for i, layer in enumerate(self.layers):
            lines.append((str(layer), *(str(self[name][i]) for name in COUNTERS), f"{self.margin[i]:.3g}"))
        lines.append(("sum", *(str(self.total(name)) for name in COUNTERS), f"{self.mean_margin():.3g}"))
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        )


COUNTERS = tuple(field.name for field in fields(Audit) if field.name not in ("layers", "margin"))
"""Names of the counters, in the order of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Train/rollout mismatch over tokens, with delta = logp_train - logp_rollout (nats). NaN where there are no tokens.

    Attributes:
        tokens: tokens measured.
        nan: tokens left out because a logprob or their difference is not a number.
        mean_abs: mean |delta|.
        max_abs: largest |delta|.
        k3: mean of exp(delta) - delta - 1, the k3 estimate of KL(rollout || train); tokens were drawn by the rollout.
        f_tau: share of tokens whose probability ratio exp(|delta|) exceeds tau (F(tau) of arXiv 2510.11370).
        tau: that bound.
    """

    tokens: int
    nan: int
    mean_abs: float
    max_abs: float
    k3: float
    f_tau: float
    tau: float


def mismatch(logp_train: ArrayLike, logp_rollout: ArrayLike, mask: ArrayLike, *, tau: float = 2.0) -> Mismatch:
    """Measure how two engines' logprobs of the same tokens differ.

    Args:
        logp_train: [T] float, the trainer's.
        logp_rollout: [T] float, the rollout's.
        mask: [T], non-zero where a token counts.
        tau: ratio above which a token counts as extreme.

    Raises:
        ValueError: arrays of different shapes, or tau <= 0. Content never raises.
    """
    train, rollout = np.asarray(logp_train, dtype=np.float64), np.asarray(logp_rollout, dtype=np.float64)
    chosen = np.asarray(mask).astype(bool)
    if not train.shape == rollout.shape == chosen.shape:
        raise ValueError(f"expected arrays of one shape, got {train.shape}, {rollout.shape} and mask {chosen.shape}")
    if not tau > 0:
        raise ValueError(f"expected tau > 0, got {tau}")
    with np.errstate(all="ignore"):
        delta = train[chosen] - rollout[chosen]
        delta = delta[~np.isnan(delta)]
        size = np.abs(delta)
        nan = int(chosen.sum()) - len(delta)
        if not len(delta):
            none = float("nan")
            return Mismatch(tokens=0, nan=nan, mean_abs=none, max_abs=none, k3=none, f_tau=none, tau=tau)
        return Mismatch(
            tokens=len(delta),
            nan=nan,
            mean_abs=float(size.mean()),
            max_abs=float(size.max()),
            k3=float(np.where(delta == np.inf, np.inf, np.expm1(delta) - delta).mean()),
            f_tau=float((size > np.log(tau)).mean()),
            tau=tau,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """How two routings of the same tokens differ. NaN where there are no tokens.

    Attributes:
        tokens: tokens compared.
        flipped_by_layer: [L] float64, share of tokens whose sets of experts differ.
        overlap_by_layer: [L] float64, mean share of the K experts that both name.
        flipped: share of (token, layer) pairs whose sets differ.
        any_layer: share of tokens that differ in at least one layer.
    """

    tokens: int
    flipped_by_layer: NDArray[np.float64]
    overlap_by_layer: NDArray[np.float64]
    flipped: float
    any_layer: float


def flips(a: ArrayLike, b: ArrayLike, mask: ArrayLike) -> Flips:
    """Compare two routings as sets: the order of a row does not matter.

    Args:
        a: expert ids [T, L, K] of any integer dtype.
        b: the same of the other side.
        mask: [T], non-zero where a token counts.

    Raises:
        ValueError: shapes that do not match. Content never raises.
    """
    left, right, chosen = _routings(a, b, mask)
    left, right = left[chosen], right[chosen]
    tokens, layers, top_k = left.shape
    if not left.size:
        none = np.full(layers, np.nan)
        return Flips(tokens=tokens, flipped_by_layer=none, overlap_by_layer=none, flipped=np.nan, any_layer=np.nan)
    differs = (left != right).any(axis=2)
    return Flips(
        tokens=tokens,
        flipped_by_layer=differs.mean(axis=0),
        overlap_by_layer=_shared(left, right).mean(axis=0) / top_k,
        flipped=float(differs.mean()),
        any_layer=float(differs.any(axis=1).mean()),
    )


def _routings(
    a: ArrayLike, b: ArrayLike, mask: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Two routings [T, L, K], each row's experts in ascending order, and the mask [T]."""
    left, right, chosen = np.asarray(a), np.asarray(b), np.asarray(mask).astype(bool)
    if left.ndim != 3 or left.shape != right.shape or chosen.shape != left.shape[:1]:
        raise ValueError(f"expected two arrays [T, L, K] and mask [T], got {left.shape}, {right.shape}, {chosen.shape}")
    return np.sort(left.astype(np.int64), axis=2), np.sort(right.astype(np.int64), axis=2), chosen


def _shared(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[Any]:
    """[T, L] slots of `left` whose expert is anywhere in the row of `right`."""
    shared = np.zeros(left.shape[:2], dtype=np.int64)
    for slot in range(left.shape[2]):
        shared += (left[:, :, slot, None] == right).any(axis=2)
    return shared


# --- by groups of tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """A group for each of T tokens: `group` [T] int64 is the place of its name in `names`, or -1 for none."""

    group: NDArray[np.int64]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check the groups.

        Raises:
            ValueError: a group without a name, or two of one name.
        """
        if self.group.ndim != 1 or self.group.dtype.kind not in "iu":
            raise ValueError(f"expected groups [T] of integers, got {list(self.group.shape)} of {self.group.dtype}")
        if self.group.size and not -1 <= self.group.min() <= self.group.max() < len(self.names):
            raise ValueError(
                f"expected groups within -1..{len(self.names) - 1}, the places of {len(self.names)} names, "
                f"got {self.group.min()}..{self.group.max()}"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"expected a name for each group, got {self.names}: merge groups of one name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What engine and trainer disagree on over the tokens of one label.

    Attributes:
        mismatch: over the tokens that the mask takes.
        compared: tokens whose routes were compared.
        flipped: share of these that differ in at least one layer; NaN if there are none.
    """

    mismatch: Mismatch
    compared: int
    flipped: float


def split(
    logp_train: ArrayLike,
    logp_rollout: ArrayLike,
    mask: ArrayLike,
    labels: Labels,
    *,
    flipped: ArrayLike | None = None,
    tau: float = 2.0,
) -> dict[str, Group]:
    """Measure mismatch and flips of each group apart, in the order of the names; groups without tokens are there too.

    Args:
        logp_train: [T] float, the trainer's.
        logp_rollout: [T] float, the rollout's.
        mask: [T], non-zero where a logprob counts.
        labels: of the T tokens.
        flipped: [T], as `token_flips` gives it: NaN where routes were not compared. It does not heed `mask`, since
            prompts have routes, but no logprobs of a rollout.
        tau: ratio above which a token counts as extreme.

    Raises:
        ValueError: arrays of different shapes, or tau <= 0. Content never raises.
    """
    train, rollout, chosen = np.asarray(logp_train), np.asarray(logp_rollout), np.asarray(mask).astype(bool)
    differs = np.full(chosen.shape, np.nan) if flipped is None else np.asarray(flipped, dtype=np.float64)
    shapes = {"trainer": train.shape, "rollout": rollout.shape, "mask": chosen.shape, "flipped": differs.shape}
    if set(shapes.values()) != {labels.group.shape}:
        raise ValueError(f"expected arrays {list(labels.group.shape)} as labels have, got {shapes}")
    found = {}
    for place, name in enumerate(labels.names):
        here = labels.group == place
        known = differs[here & ~np.isnan(differs)]
        found[name] = Group(
            mismatch=mismatch(train, rollout, chosen & here, tau=tau),
            compared=len(known),
            flipped=float(known.mean()) if len(known) else np.nan,
        )
    return found


def token_flips(a: ArrayLike, b: ArrayLike, mask: ArrayLike) -> NDArray[np.float64]:
    """[T] float64: 1 where the sets of experts of `a` and `b` [T, L, K] differ in any layer, NaN where `mask` [T] is 0.

    Its mean over the mask is `Flips.any_layer`.

    Raises:
        ValueError: shapes that do not match. Content never raises.
    """
    left, right, chosen = _routings(a, b, mask)
    return np.where(chosen, (left != right).any(axis=(1, 2)), np.nan)


# A trajectory's tokens 1..N-1 have the logprobs, and the rows before them the routes: its labels are those of
# loss_mask[1:], version[1:] and provenance, each [N-1], as its positions in a packed batch are.


def by_role(loss_mask: ArrayLike) -> Labels:
    """Prompt or response, by the loss mask [T]."""
    return Labels(group=np.asarray(loss_mask).astype(bool).astype(np.int64), names=("prompt", "response"))


def by_turn(loss_mask: ArrayLike, segment_ids: ArrayLike | None = None) -> Labels:
    """The turn, from 0 in each segment: context and the run of the loss mask [T] that answers it.

    What follows an answer opens the next turn, answered or not. Two answers without context between them are one run.

    Args:
        loss_mask: [T], non-zero in answers.
        segment_ids: [T], the sample of each token, those of one sample side by side; negative in padding, which has no
            group. None: all tokens are of one.

    Raises:
        ValueError: arrays of different shapes.
    """
    mask = np.asarray(loss_mask).astype(bool)
    segment = np.zeros(mask.shape, np.int64) if segment_ids is None else np.asarray(segment_ids)
    if mask.ndim != 1 or segment.shape != mask.shape:
        raise ValueError(f"expected a mask [T] and segments [T], got {list(mask.shape)} and {list(segment.shape)}")
    if not len(mask):
        return Labels(group=np.zeros(0, np.int64), names=())
    starts = np.concatenate([[True], segment[1:] != segment[:-1]])
    opened = np.cumsum(np.concatenate([[False], mask[:-1] & ~mask[1:]]))
    turn = opened - opened[starts][np.cumsum(starts) - 1]  # less those up to the start of its segment
    turn = np.where(segment < 0, -1, turn)
    return Labels(group=turn, names=tuple(f"turn {number}" for number in range(int(turn.max()) + 1)))


def by_staleness(version: ArrayLike, current: int) -> Labels:
    """How many weight updates lie between the weights of each token, version [T], and the `current` ones.

    Versions below 0 are unknown. Only the lags that occur have a name, the smallest first, "unknown" last.
    """
    versions = np.asarray(version, dtype=np.int64)
    known = versions >= 0
    lags = np.unique(current - versions[known])
    group = np.where(known, np.searchsorted(lags, current - versions), len(lags))
    unknown = () if known.all() else ("unknown",)
    return Labels(group=group.astype(np.int64), names=(*(f"lag {lag}" for lag in lags), *unknown))


def by_provenance(provenance: ArrayLike) -> Labels:
    """Where each row is known from: codes [T] of `kernels.spec`, under their names.

    Raises:
        ValueError: another code.
    """
    return Labels(group=np.asarray(provenance).astype(np.int64), names=PROVENANCES)
