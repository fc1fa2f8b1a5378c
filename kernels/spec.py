"""How a router turns scores into experts, and the codes that travel with rows. No torch: servers import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

FREE, REPLAY, PAD = 0, 1, 2
"""State of a row, uint8: the trainer's own top-k, the recorded experts, or padding."""

MISSING, PREFILL, DECODE, CACHED, RECOMPUTED = 0, 1, 2, 3, 4
"""Provenance of a recorded row, uint8: where the engine's routing of that token is known from."""

Provenance = Literal["missing", "prefill", "decode", "cached", "recomputed"]
PROVENANCES: tuple[Provenance, ...] = get_args(Provenance)
"""Names of these codes: a code is its name's place."""

MAX_EXPERTS, MAX_TOP_K = 1024, 32
"""Largest E and K that the kernels are built for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """What a router does between its logits [T, E] and (weights [T, K], experts [T, K]).

    Attributes:
        score: "softmax" over all E, "sigmoid", "softmax_topk": softmax over the K chosen logits only, or "sparsemixer":
            softmax over the logits near each chosen one, see kernels/sparsemixer.py.
        renormalize: divide the chosen scores by their sum plus `eps`; for K = 1 as well, since the flag says so.
        eps: added to that sum (1e-20 in the DeepSeek-V3 family).
        scale: factor on the weights (`routed_scaling_factor`).
        groups: expert groups for group-limited selection; 1 is none.
        topk_groups: groups that stay open.
        group_score: score of a group: "top2" sum of its best two, "topk_share" sum of its best K/topk_groups, "max".
        score_dtype: arithmetic from scores to weights: "float32", or "logits": each step rounded to the logits' dtype.
        weight_dtype: dtype of the weights returned: "float32", or "logits".
        jitter: of sparsemixer alone: logits are near that are at most 2 `jitter` below the chosen one, as a part of it.

    Raises:
        ValueError: a value outside of these.
    """

    score: Literal["softmax", "sigmoid", "softmax_topk", "sparsemixer"]
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0
    groups: int = 1
    topk_groups: int = 1
    group_score: Literal["top2", "topk_share", "max"] = "top2"
    score_dtype: Literal["float32", "logits"] = "float32"
    weight_dtype: Literal["float32", "logits"] = "float32"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        for name, value, known in (
            ("score", self.score, ("softmax", "sigmoid", "softmax_topk", "sparsemixer")),
            ("group_score", self.group_score, ("top2", "topk_share", "max")),
            ("score_dtype", self.score_dtype, ("float32", "logits")),
            ("weight_dtype", self.weight_dtype, ("float32", "logits")),
        ):
            if value not in known:
                raise ValueError(f"RouterSpec.{name} expects one of {known}, got {value!r}")
        if not 1 <= self.topk_groups <= self.groups:
            raise ValueError(
                f"RouterSpec expects 1 <= topk_groups <= groups, got topk_groups={self.topk_groups}, "
                f"groups={self.groups}"
            )
        if not (self.eps >= 0 and self.scale > 0):
            raise ValueError(f"RouterSpec expects eps >= 0 and scale > 0, got eps={self.eps}, scale={self.scale}")
        if not (self.jitter == 0 or (self.score == "sparsemixer" and 0 < self.jitter < float("inf"))):
            raise ValueError(
                f"RouterSpec expects jitter >= 0, and 0 unless the score is sparsemixer, got jitter={self.jitter}, "
                f"score={self.score!r}"
            )
