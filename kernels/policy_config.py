"""What a policy loss is made of. The algorithms of the field are values of one dataclass: see docs/kernels.md."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

Algorithm = Literal["ppo", "cispo", "reinforce"]
Ratio = Literal["token", "sequence", "sequence-token"]
Level = Literal["token", "sequence", "geometric"]
Estimator = Literal["k1", "k2", "k3"]
Normalize = Literal["token", "sequence", "group", "constant"]
Band = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """The loss. Every number is dimensionless; 0 or None switches a term off.

    Raises:
        ValueError: a value that makes no loss, or one that the rest of the configuration leaves without effect.
    """

    algorithm: Algorithm = "ppo"
    """ppo: the clipped surrogate. cispo: clipped ratio without gradient, times the logprob (arXiv 2506.13585).
    reinforce: the logprob alone, without a ratio."""
    ratio: Ratio = "token"
    """Of policy to old policy: a token's own; sequence: the geometric mean over the sample (GSPO, arXiv 2507.18071);
    sequence-token: that value with each token's own gradient (GSPO-token, the same paper)."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low; 1: never."""
    clip_high: float = 0.28
    """The ratio is clipped at 1 + clip_high (clip-higher, arXiv 2503.14476); infinity: never."""
    dual_clip: float | None = None
    """ppo: for negative advantages the loss is at most this times |A|; above 1 (arXiv 1912.09729)."""
    tis_cap: float | None = 2.0
    """Importance weights exp(old - rollout) are truncated here; infinity: never. None: no importance weights unless
    icepop asks."""
    tis_level: Level = "token"
    """Whose weight: the token's own, the whole sample's (the product of its tokens'), or their geometric mean."""
    icepop: Band | None = None
    """Tokens whose own importance weight is outside this band, edges inside, get weight 0; inside they keep it."""
    mis: Band | None = None
    """Tokens get weight 0 where the importance weight of `mis_level` is outside this band, edges inside; inside, this
    asks for no weight: `tis_cap` does."""
    mis_level: Level = "geometric"
    """Whose weight masks: the token's own, the whole sample's product, or their geometric mean."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference policy."""
    kl_type: Estimator = "k3"
    """Its estimator."""
    kl_unbiased: bool = False
    """Multiply the estimator by the token's ratio to the old policy, which drew it (arXiv 2512.02556)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    normalize: Normalize = "token"
    """Mean over trained tokens; over samples of their means; over groups of samples of their tokens' means; or a sum
    over a denominator that is given."""

    def __post_init__(self) -> None:
        """Refuse what makes no loss."""
        for name, kind in (
            ("algorithm", Algorithm),
            ("ratio", Ratio),
            ("tis_level", Level),
            ("mis_level", Level),
            ("kl_type", Estimator),
            ("normalize", Normalize),
        ):
            if getattr(self, name) not in (known := get_args(kind)):
                raise ValueError(f"expected {name} as one of {known}, got {getattr(self, name)!r}")
        if not (0 <= self.clip_low <= 1 and self.clip_high >= 0):
            raise ValueError(f"expected 0 <= clip_low <= 1 and clip_high >= 0, got {self.clip_low}, {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"expected dual_clip above 1, got {self.dual_clip}")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ValueError(f"expected tis_cap above 0, got {self.tis_cap}")
        for name, band in (("an icepop", self.icepop), ("a mis", self.mis)):
            if band is not None and not 0 <= band[0] <= 1 <= band[1]:
                raise ValueError(f"expected {name} band around 1, got {band}")
        inf = float("inf")
        if not (0 <= self.kl_coef < inf and 0 <= self.entropy_coef < inf):
            raise ValueError(f"expected coefficients >= 0, got kl {self.kl_coef}, entropy {self.entropy_coef}")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Refuse what would have no effect: whoever set it expects one."""
        if self.dual_clip is not None and self.algorithm != "ppo":
            raise ValueError(f'expected dual_clip=None with algorithm="{self.algorithm}": only "ppo" has that clip')
        if self.ratio != "token" and self.algorithm == "reinforce":
            raise ValueError(f'expected ratio="token" with algorithm="reinforce", which has none, got {self.ratio!r}')
        if self.tis_level != "token" and self.tis_cap is None:
            raise ValueError(
                f"expected tis_cap with tis_level={self.tis_level!r}, got None: infinity truncates nothing"
            )

    @property
    def weighs(self) -> bool:
        """Whether the surrogate is multiplied by importance weights."""
        return self.tis_cap is not None or self.icepop is not None

    @property
    def shares_gradient(self) -> bool:
        """Whether the ratio is one number with one gradient for all tokens of a sample."""
        return self.ratio == "sequence" and self.algorithm == "ppo"

    @property
    def by_sample(self) -> bool:
        """Whether a token's terms need sums over its whole sample."""
        levels = {self.tis_level if self.weighs else "token", self.mis_level if self.mis is not None else "token"}
        return self.ratio != "token" or levels != {"token"}


NAMES: tuple[str, ...] = tuple(PolicyConfig.__dataclass_fields__)
"""Fields of a configuration, in order."""


def plain_values(config: PolicyConfig) -> tuple[Any, ...]:
    """A configuration as an op's arguments: ops take plain values."""
    return tuple(getattr(config, name) for name in NAMES)


def from_values(values: tuple[Any, ...]) -> PolicyConfig:
    """The configuration back from `plain_values`; an op makes lists of tuples."""
    return _build(tuple(tuple(value) if isinstance(value, list) else value for value in values))


@cache
def _build(values: tuple[Any, ...]) -> PolicyConfig:
    """Checked once, not with every call of the op."""
    return PolicyConfig(**dict(zip(NAMES, values, strict=True)))
