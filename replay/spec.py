"""From a Hugging Face config to what replay must know: where the routers sit and how they turn logits into weights.

`replay.families` has the table; what is read from it is checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pacenote.kernels.spec import RouterSpec
from pacenote.replay.errors import UnsupportedModel
from pacenote.replay.families import FAMILIES, REFUSED, Config, Family, integer


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingGeometry:
    """Where a model routes.

    Attributes:
        num_layers: all hidden layers, dense ones included, multi-token-prediction layers not.
        layers: global ids of the mixture-of-experts layers, ascending.
        num_experts: E, routed experts a layer (shared ones not counted).
        top_k: K, routed experts a token.

    Raises:
        UnsupportedModel: numbers that fit no model.
    """

    num_layers: int
    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= 65536 or not 1 <= self.top_k <= self.num_experts:
            raise UnsupportedModel(
                f"expected 1 <= experts a token <= experts <= 65536, got {self.top_k} of {self.num_experts}"
            )
        if not self.layers:
            raise UnsupportedModel(f"expected mixture-of-experts layers, got none among {self.num_layers} layers")
        if list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0 or self.layers[-1] >= self.num_layers:
            raise UnsupportedModel(f"expected ascending layer ids below {self.num_layers}, got {self.layers}")


def geometry_from_config(config: Config) -> RoutingGeometry:
    """The routing geometry of a `config.json`.

    Args:
        config: the parsed file, or `model.config.to_dict()`. Of a multimodal config the text part is used.

    Raises:
        UnsupportedModel: no known mixture-of-experts family, or a field that is needed is missing or no integer.
    """
    family, fields = _family(config)
    sparse = family.layers(fields)
    return RoutingGeometry(
        num_layers=len(sparse),
        layers=tuple(layer for layer, is_sparse in enumerate(sparse) if is_sparse),
        num_experts=_num_experts(fields),
        top_k=integer(fields, "num_experts_per_tok"),
    )


def router_spec(config: Config) -> RouterSpec:
    """How the routers of a `config.json` weigh experts; the same for every layer of a model.

    Raises:
        UnsupportedModel: as `geometry_from_config`, or routing that no spec describes.
    """
    family, fields = _family(config)
    return family.router(fields)


def families() -> tuple[str, ...]:
    """The `model_type`s that can be replayed."""
    return tuple(sorted(FAMILIES))


def text_config(config: Config) -> Config:
    """The language model's part of a config: itself, or its `text_config`, or that of its `thinker_config`."""
    if config.get("model_type") in FAMILIES:
        return config
    for name in ("text_config", "thinker_config"):
        inner = config.get(name)
        if isinstance(inner, Mapping):
            return text_config(inner)
    return config


def refusal(config: Config) -> str | None:
    """Why the config's family cannot be replayed, if that is known; None for families that can, and unknown ones."""
    return REFUSED.get(str(text_config(config).get("model_type")))


def _family(config: Config) -> tuple[Family, Config]:
    """The family, and the fields under common names."""
    if not isinstance(config, Mapping):
        raise UnsupportedModel(f"expected a config as a mapping, got {type(config).__name__}: use config.to_dict()")
    if why := refusal(config):
        kind = text_config(config)["model_type"]
        raise UnsupportedModel(f"expected routers that a spec describes, not {kind}'s: {why}")
    config = text_config(config)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise UnsupportedModel(
            f"expected a model_type whose routers are known ({', '.join(families())}), got {config.get('model_type')!r}"
        )
    return family, family.fields(config)


def _num_experts(fields: Config) -> int:
    """E under any of its names; transformers writes some families' `num_experts` as `num_local_experts`."""
    names = [name for name in ("n_routed_experts", "num_local_experts", "num_experts") if name in fields]
    counts = {integer(fields, name) for name in names}
    if len(counts) != 1:
        raise UnsupportedModel(
            f"expected one number of experts in the config of {fields['model_type']}, "
            f"got {({name: fields[name] for name in names}) or 'none'}"
        )
    return counts.pop()
