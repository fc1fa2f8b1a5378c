"""What a run needs, before it is started: parameters, memory of a rank, bytes of routes and weights.

Parameters are counted on a model of the very config that has no storage, so they are exact; how they are cut over ranks
is this file's to know, and held against both back ends by tests. Activations are estimated, see `activation_bytes`.

Legend: T positions of a microbatch on a rank, D hidden size, I inner size, E experts, K experts a token, V vocabulary,
L MoE layers, H heads.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from pacenote.replay.spec import geometry_from_config
from pacenote.trainer.config import RunConfig

Kind = Literal["attention", "dense MLP", "experts", "shared experts", "routers", "norms", "embedding", "head"]
_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"\.mlp\.experts\.", "experts"),
    (r"\.mlp\.shared_experts\.", "shared experts"),
    (r"\.mlp\.gate\.", "routers"),
    (r"norm", "norms"),
    (r"\.mlp\.", "dense MLP"),
    (r"\.self_attn\.", "attention"),
    (r"embed_tokens", "embedding"),
    (r"lm_head", "head"),
)
# Of attention, what each tensor-parallel rank has whole: projections down to what all heads share.
_WHOLE = re.compile(r"q_a_proj|kv_a_proj")
WORDS = 4  # bytes of a float32
ADAM = 2 * WORDS  # first and second moment


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of the model: its kind, layer (None: outside of layers), numbers, and whether tensor ranks cut it."""

    kind: Kind
    layer: int | None
    numel: int
    cut: bool


def weights(hf: Any) -> list[Weight]:
    """All weights of a model, by its transformers config. Multi-token-prediction layers are not among them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    found = []
    for name, parameter in model.named_parameters():
        kind = next(kind for pattern, kind in _KINDS if re.search(pattern, name))
        layer = re.search(r"\.layers\.(\d+)\.", name)
        cut = kind not in ("routers", "norms") and not _WHOLE.search(name)
        found.append(Weight(kind, int(layer[1]) if layer else None, parameter.numel(), cut))
    return found


def weight_bytes(config: RunConfig) -> int:
    """Bytes of a number in the passes, and on its way to engines: of bfloat16 two, of float32 four."""
    return 2 if config.backend == "megatron" and config.megatron.dtype == "bfloat16" else WORDS


def by_kind(found: list[Weight]) -> dict[str, int]:
    """Parameters of each kind."""
    counts = Counter[str]()
    for weight in found:
        counts[weight.kind] += weight.numel
    return dict(counts)


def active(hf: Any, found: list[Weight]) -> int:
    """Parameters that a token passes: of the experts, K of E; of the embedding, a row."""
    geometry = geometry_from_config(hf.to_dict())
    counts = by_kind(found)
    idle = counts["experts"] * (geometry.num_experts - geometry.top_k) // geometry.num_experts
    return int(sum(counts.values()) - idle - counts["embedding"] + hf.hidden_size)


@dataclass(frozen=True, slots=True)
class Held:
    """Numbers that the fullest rank holds: weights outside of experts, weights of experts, and how many ranks hold the
    same (which share moments and masters, if the optimizer is distributed)."""

    dense: int
    experts: int
    dense_copies: int
    expert_copies: int

    @property
    def total(self) -> int:
        """All weights of the rank."""
        return self.dense + self.experts


def held(hf: Any, config: RunConfig, world: int) -> Held:
    """The fullest rank of `world`.

    Raises:
        ValueError: the layout does not fit the number of ranks.
    """
    found = weights(hf)
    if config.backend == "hf":
        experts = sum(weight.numel for weight in found if weight.kind == "experts")
        dense = sum(weight.numel for weight in found) - experts
        return Held(math.ceil(dense / world), math.ceil(experts / world), 1, 1)
    layout = config.megatron
    cutting = (layout.expert_tensor or layout.tensor) * layout.expert
    if world % (layout.tensor * layout.context * layout.pipeline) or world % (cutting * layout.pipeline):
        raise ValueError(f"expected --world that the --megatron.* sizes divide, got {world} for {layout}")
    stages = [
        Held(
            sum(_part(weight, hf, layout.tensor) for weight in mine if weight.kind != "experts"),
            sum(weight.numel for weight in mine if weight.kind == "experts") // cutting,
            world // (layout.tensor * layout.pipeline),
            world // (cutting * layout.pipeline),
        )
        for mine in _stages(found, hf.num_hidden_layers, layout.pipeline, layout.virtual_pipeline or 1)
    ]
    return max(stages, key=lambda stage: stage.total)


def _part(weight: Weight, hf: Any, tensor: int) -> int:
    if not weight.cut:
        return weight.numel
    if weight.kind in ("embedding", "head"):
        return int(math.ceil(hf.vocab_size / tensor) * hf.hidden_size)
    return weight.numel // tensor


def _stages(found: list[Weight], layers: int, pipeline: int, virtual: int) -> list[list[Weight]]:
    run = layers // (pipeline * virtual)
    stages: list[list[Weight]] = [[] for _ in range(pipeline)]
    for weight in found:
        outside = 0 if weight.kind == "embedding" else pipeline - 1
        stages[outside if weight.layer is None else weight.layer // run % pipeline].append(weight)
    return stages


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a rank, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int
    routes: int

    @property
    def total(self) -> int:
        """Of all of them."""
        return sum(getattr(self, name) for name in self.__slots__)


def memory(hf: Any, config: RunConfig, world: int, tokens: int) -> Memory:
    """A rank's memory while it learns.

    Args:
        hf: the model's config.
        config: back end and layout.
        world: ranks of the trainer.
        tokens: T, positions of a microbatch.
    """
    mine, found = held(hf, config, world), weights(hf)
    layout, routes = config.megatron, route_bytes(hf)
    passes = weight_bytes(config)
    shared = config.backend == "megatron" and layout.distributed_optimizer
    masters = WORDS if passes == 2 else 0
    dense = mine.dense / (mine.dense_copies if shared else 1)
    experts = mine.experts / (mine.expert_copies if shared else 1)
    gathered = 0
    if config.backend == "hf" and world > 1:
        layers = Counter[int]()
        for weight in found:
            if weight.layer is not None:
                layers[weight.layer] += weight.numel
        head = sum(weight.numel for weight in found if weight.kind == "head")
        # A layer's weights and gradients in one piece, and the next layer's weights on their way; the head's likewise.
        gathered = WORDS * (3 * max(layers.values()) + 2 * head)
    cut = layout.tensor * layout.context if config.backend == "megatron" else 1
    stage = layout.pipeline if config.backend == "megatron" else 1
    alive = activation_bytes(hf, tokens, bytes_each=passes, recompute=config.optim.recompute) // cut
    return Memory(
        weights=mine.total * passes,
        gradients=mine.total * WORDS,
        optimizer=math.ceil((dense + experts) * (ADAM + masters)),
        gathered=gathered,
        activations=alive,  # a stage has fewer layers, and as many more microbatches under way
        logits=min(tokens, 4096) * hf.vocab_size * WORDS // (layout.tensor if config.backend == "megatron" else 1),
        routes=tokens * routes // (cut * stage),
    )


def activation_bytes(hf: Any, tokens: int, *, bytes_each: int, recompute: bool) -> int:
    """What autograd keeps of a microbatch of T tokens, all layers, on one rank; an estimate.

    Counted are the inputs of products, norms, activation functions and attention, as in Korthikanti et al. (arXiv
    2205.05198, section 4) with K experts a token for one MLP and latent attention's own tensors; attention is taken to
    keep no weights. This is 0.83 of what transformers' modules keep of the tiny model in float32. With recomputation a
    layer keeps its input, and one layer is whole while it is computed again.
    """
    layers = [_layer_numbers(hf, sparse=sparse) for sparse in _sparse_layers(hf)]
    if recompute:
        return int(tokens * bytes_each * (len(layers) * hf.hidden_size + max(layers)))
    return tokens * bytes_each * sum(layers)


def _sparse_layers(hf: Any) -> list[bool]:
    moe = set(geometry_from_config(hf.to_dict()).layers)
    return [layer in moe for layer in range(hf.num_hidden_layers)]


def _layer_numbers(hf: Any, *, sparse: bool) -> int:
    """Numbers a token and layer: norms and residuals 4 D, attention, MLP."""
    width, heads = hf.hidden_size, hf.num_attention_heads
    norms = 4 * width
    if getattr(hf, "kv_lora_rank", None):
        query = heads * (hf.qk_nope_head_dim + hf.qk_rope_head_dim)
        attention = 2 * (hf.q_lora_rank or 0) + 2 * hf.kv_lora_rank + hf.qk_rope_head_dim
        attention += 3 * query + 2 * heads * hf.v_head_dim  # keys of all heads are made of the latent
    else:
        attention = 3 * heads * hf.head_dim + 4 * hf.num_key_value_heads * hf.head_dim
    if not sparse:
        return int(norms + attention + 4 * hf.intermediate_size)
    geometry = geometry_from_config(hf.to_dict())
    shared = getattr(hf, "n_shared_experts", 0) or 0
    experts = geometry.top_k * (2 * width + 4 * hf.moe_intermediate_size)
    return int(norms + attention + experts + 4 * shared * hf.moe_intermediate_size + 2 * geometry.num_experts)


def route_bytes(hf: Any) -> int:
    """Bytes of a token's routes in a record and on the device: L x K ids of one byte, or two beyond 256 experts."""
    geometry = geometry_from_config(hf.to_dict())
    return len(geometry.layers) * geometry.top_k * (1 if geometry.num_experts <= 256 else 2)


def engine_route_bytes(hf: Any) -> int:
    """Bytes of a token's routes in SGLang's answer: int32 as base64."""
    geometry = geometry_from_config(hf.to_dict())
    return math.ceil(len(geometry.layers) * geometry.top_k * 4 * 4 / 3)


def cache_bytes(hf: Any) -> int:
    """Bytes of a token in an engine's key-value cache, bfloat16: the latent where attention is latent."""
    if getattr(hf, "kv_lora_rank", None):
        return int(hf.num_hidden_layers * (hf.kv_lora_rank + hf.qk_rope_head_dim) * 2)
    return int(hf.num_hidden_layers * 2 * hf.num_key_value_heads * hf.head_dim * 2)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `pacenote plan` says.

    Attributes:
        parameters: by kind.
        active: parameters that a token passes.
        world: ranks of the trainer.
        tokens: T, positions of a microbatch.
        memory: of the fullest rank.
        step: bytes of a training step: routes as engines send them, and as the trainer fetches them; new weights.
        cache: bytes of a token in an engine's cache.
    """

    parameters: Mapping[str, int]
    active: int
    world: int
    tokens: int
    memory: Memory
    step: Mapping[str, int]
    cache: int


def plan(hf: Any, config: RunConfig, *, world: int, tokens: int | None = None, length: int = 8192) -> Plan:
    """Of a run.

    Args:
        hf: the model's config.
        config: of the run.
        world: ranks of the trainer.
        tokens: positions of a microbatch; None: `--optim.microbatch-tokens`.
        length: tokens of a sample, on average.

    Raises:
        ValueError: the layout does not fit, or the run trains adapters.
    """
    if config.lora.rank:
        raise ValueError(
            "pacenote plan counts a run that trains all weights: leave out --lora.rank, whose run needs less"
        )
    size = tokens or config.optim.microbatch_tokens
    found = weights(hf)
    sampled = config.rollout.prompts * config.rollout.group * length
    return Plan(
        parameters=by_kind(found),
        active=active(hf, found),
        world=world,
        tokens=size,
        memory=memory(hf, config, world, size),
        step={
            "routes from engines": sampled * engine_route_bytes(hf),
            "routes to the trainer": sampled * route_bytes(hf),
            "new weights": sum(weight.numel for weight in found) * weight_bytes(config),
        },
        cache=cache_bytes(hf),
    )
