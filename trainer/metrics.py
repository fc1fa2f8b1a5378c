"""A run's numbers: one JSON object a step, appended and flushed, readable while the run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from pacenote.replay.audit import Audit
from pacenote.trainer.advantage import Advantages
from pacenote.trainer.episode import Episode
from pacenote.trainer.gap import Gap, GroupGap


class MetricsLog:
    """`metrics.jsonl` of a run folder."""

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        """Open for appending; rows of steps from `first_step` on are dropped, since they are about to be run again."""
        kept = [row for row in read(path) if row["step"] < first_step]
        path.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Write one step's object; numbers that are not finite become null, since JSON has none."""
        self._file.write(_line(row))
        self._file.flush()

    def __enter__(self) -> MetricsLog:
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line cut short by a crash is left out, a missing file has no rows."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_plain(row)) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


_COUNTED = ("duplicate", "out_of_range", "replayed", "flipped")


def row(
    step: int,
    episodes: list[Episode],
    earned: Advantages,
    gap: Gap,
    audits: Sequence[Audit],
    learnt: dict[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """One step's object.

    Args:
        audits: counts of the update's forward passes, one count a (row, layer), by rank.
        learnt: metrics of the loss and the optimizer.
        seconds: of the step and its phases, by their columns.
    """
    counts = of_episodes(episodes)
    rows = {name: sum(audit.total(name) for audit in audits) for name in _COUNTED}
    return {
        **learnt,
        "step": step,
        **counts,
        **of_gap(gap),
        "rows_invalid": rows["duplicate"] + rows["out_of_range"],
        "rows_replayed": rows["replayed"],
        "flipped_under_replay": rows["flipped"] / max(1, rows["replayed"]),
        "groups_zero_std": earned.zero_std,
        "episodes_unrewarded": earned.unrewarded,
        **seconds,
        "tokens_per_second": counts["tokens"] / max(seconds["seconds"], 1e-9),
    }


def of_gap(gap: Gap) -> dict[str, Any]:
    """Mismatch columns. `flipped`: share of (token, layer) pairs whose set of experts under the trainer's own routing
    differs from the engine's; the same definition whatever the replay mode. `gap_by`: the same by groups of tokens."""
    share = None if gap.flips is None else [round(float(value), 6) for value in gap.flips.flipped_by_layer]
    return {
        "abs_delta_logp": gap.trained.mean_abs,
        "abs_delta_logp_native": gap.native.mean_abs,
        "max_delta_logp": gap.trained.max_abs,
        "max_delta_logp_native": gap.native.max_abs,
        "k3_kl": gap.trained.k3,
        "k3_kl_native": gap.native.k3,
        "f_tau": gap.trained.f_tau,
        "f_tau_native": gap.native.f_tau,
        "flipped": None if share is None else float(np.mean(share)),
        "flipped_by_layer": share,
        "rows_missing": gap.missing,
        "gap_by": {kind: {name: _of_group(part) for name, part in parts.items()} for kind, parts in gap.groups.items()},
    }


def _of_group(part: GroupGap) -> dict[str, Any]:
    """`flipped_tokens`: share of the `compared` tokens routed elsewhere in at least one layer."""
    return {
        "tokens": part.trained.tokens,
        "abs_delta_logp": part.trained.mean_abs,
        "abs_delta_logp_native": part.native.mean_abs,
        "k3_kl": part.trained.k3,
        "k3_kl_native": part.native.k3,
        "f_tau": part.trained.f_tau,
        "f_tau_native": part.native.f_tau,
        "compared": part.compared,
        "flipped_tokens": part.flipped,
    }


def of_episodes(episodes: list[Episode]) -> dict[str, Any]:
    """Reward and length columns; `reward` is the mean over countable rewards, null where there is none."""
    rewards = [episode.reward for episode in episodes if episode.reward is not None]
    trained = [int(t.loss_mask.sum()) for episode in episodes for t in episode.trajectories]
    tokens = [len(t.tokens) for episode in episodes for t in episode.trajectories]
    return {
        "reward": float(np.mean(rewards)) if rewards else None,
        "reward_std": float(np.std(rewards)) if rewards else None,
        "episodes": len(episodes),
        "episodes_failed": sum(episode.error is not None for episode in episodes),
        "rewards_timed_out": sum(episode.reason == "timeout" for episode in episodes),
        "tokens": int(sum(tokens)),
        "tokens_trained": int(sum(trained)),
        "length_mean": float(np.mean(trained)) if trained else None,
        "length_max": max(trained, default=0),
    }
