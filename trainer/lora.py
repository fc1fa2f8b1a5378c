"""LoRA (arXiv 2106.09685) through peft: frozen weights, and beside each a product of two thin matrices that is trained.

    y = W x + s B A x,   s = alpha / rank,   A [r, I] random and B [O, r] zero at first

What leaves the trainer is merged, W + s B A under the model's own names: an engine knows nothing of adapters. Merging
rounds, so it is done on copies, and a checkpoint keeps W, A and B apart beside the merged model.

Legend: r rank, I inputs, O outputs, E experts.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROJECTIONS = (
    "q_proj", "k_proj", "v_proj", "o_proj",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "in_proj_qkv", "in_proj_qkvz", "in_proj_z", "out_proj",
    "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
"""Of attention, latent attention, linear attention, and MLPs; a model has some of them."""
_IN_LAYERS = re.compile(r"(?:^|\.)layers\.\d+\.")
_NAME = "default"  # peft's word for the one set of adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters in place of all weights; routers stay as they are."""

    rank: int = 0
    """Rank of the adapters; 0: none, and all weights are trained."""
    alpha: float | None = None
    """What an adapter adds is scaled by alpha / rank; none: twice the rank, a common choice: the scale is then 2 at
    every rank, a factor that rounds nothing."""
    targets: tuple[str, ...] = PROJECTIONS
    """Ends of the names of linear layers that get one, by default attention's, dense MLPs' and shared experts', as far
    as the model has them. Routed experts are asked for by name: experts.gate_up_proj experts.down_proj."""

    def __post_init__(self) -> None:
        """Refuse values that could only fail later."""
        if self.rank < 0:
            raise ValueError(f"--lora.rank expects at least 0, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"--lora.alpha expects a number above 0, got {self.alpha}")
        if not self.targets:
            raise ValueError("--lora.targets expects at least one name, got none")

    @property
    def scale(self) -> float:
        """What B A is multiplied by; of a rank above 0."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


ALL_WEIGHTS = LoraConfig()
"""No adapters."""


def check(config: LoraConfig) -> None:
    """Before anything is started.

    Raises:
        ValueError: adapters are asked for, and peft is not installed.
    """
    if config.rank and importlib.util.find_spec("peft") is None:
        raise ValueError("--lora.rank expects peft, which is not installed: pip install pacenote[lora]")


@dataclass(frozen=True, slots=True)
class Adapter:
    """Names in the model's state dict: of a weight, of its factors, and of the same weight in a model without adapters.

    Attributes:
        experts: E of a weight [E, ...] of experts; None for a linear layer's [O, I].
        transposed: whether such a weight is [E, I, O] and not [E, O, I].
    """

    weight: str
    plain: str
    a: str
    b: str
    experts: int | None = None
    transposed: bool = False

    def merged(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """The weight [O, I] with the adapter's part, of A [r, I] and B [O, r]; of experts [E, O, I] or [E, I, O], of A
        [E r, I] and B [O, r E], as peft lays them out."""
        if self.experts is None:
            return weight + scale * (b @ a)
        left = b.reshape(len(b), -1, self.experts).permute(2, 0, 1)
        added = scale * (left @ a.reshape(self.experts, -1, a.shape[-1]))
        return weight + (added.mT if self.transposed else added)


class Adapters:
    """The adapters that were put into a model. State: none of its own; all of it is in the model's state dict."""

    def __init__(self, model: Any, config: LoraConfig, *, seed: int) -> None:
        """Freeze the model and put adapters in; what it computes stays the same until they learn.

        Args:
            model: transformers causal language model, in one piece.
            config: of a rank above 0.
            seed: of A, the same on all ranks; the caller's generator is left as it was.

        Raises:
            ValueError: peft is not installed, or a target is not of the model, or is no weight that can have one.
        """
        check(config)
        import peft

        self.scale = config.scale
        linear, experts = _chosen(model, config.targets)
        # What an older transformers called a layer, peft translates where it sees a model's config: `gate_proj` would
        # become all routed experts, and `gate` the router. Behind a list it does not, and names are what they say.
        holder = nn.ModuleList([model])
        wanted = peft.LoraConfig(
            r=config.rank,
            lora_alpha=2 * config.rank if config.alpha is None else config.alpha,
            lora_dropout=0.0,  # old logprobs and the update's must come from one function
            target_modules=[f"0.{name}" for name in linear],
            target_parameters=[f"0.{name}" for name in experts],
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(wanted, holder, _NAME)
        self.all = tuple(_found(model))
        assert sorted(adapter.plain for adapter in self.all) == sorted(
            [*(f"{name}.weight" for name in linear), *experts]
        )

    def merged(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict [...] of the model without adapters, each in its weight; other tensors are the given ones."""
        factors = {name for adapter in self.all for name in (adapter.a, adapter.b)}
        found = {_plain(name): tensor for name, tensor in state.items() if name not in factors}
        with torch.no_grad():
            for adapter in self.all:
                weight, a, b = (state[name] for name in (adapter.weight, adapter.a, adapter.b))
                found[adapter.plain] = adapter.merged(weight, a, b, self.scale)
        return found

    def apart(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the state dict: the factors, and the frozen weights [...] they belong to, which a merged model lacks."""
        names = [name for adapter in self.all for name in (adapter.weight, adapter.a, adapter.b)]
        return {name: state[name] for name in names}


def _chosen(model: nn.Module, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of linear layers, and of experts' weights, that the targets are the ends of.

    Raises:
        ValueError: a target is the end of no name, of a router's, or of something else's.
    """
    modules = {name: module for name, module in model.named_modules() if _IN_LAYERS.search(name)}
    parameters = {name: parameter for name, parameter in model.named_parameters() if _IN_LAYERS.search(name)}
    routers = tuple(name for name, module in modules.items() if type(module).__name__.lower().endswith("router"))
    linear: dict[str, None] = {}
    experts: dict[str, None] = {}
    for target in targets:
        hits = [name for name in modules if f".{name}".endswith(f".{target}")]
        # Of weights only by two words: a bare down_proj is a layer's name, and not meant to be all routed experts.
        weights = [name for name in parameters if "." in target and f".{name}".endswith(f".{target}")]
        for name in (*hits, *weights):
            if f"{name}.".startswith(tuple(f"{router}." for router in routers)):
                raise ValueError(
                    f"--lora.targets expects no router, got {target!r}, the name of {name}: routers stay as they are"
                )
        odd = [name for name in hits if not isinstance(modules[name], nn.Linear)]
        odd += [name for name in weights if parameters[name].ndim != 3]
        if odd or not (hits or weights or target in PROJECTIONS):
            raise ValueError(
                f"--lora.targets expects linear layers of the decoder, here {', '.join(_ends(modules))}, or weights of "
                f"experts such as experts.down_proj, got {target!r}" + (f", the name of {odd[0]}" if odd else "")
            )
        linear |= dict.fromkeys(hits)
        experts |= dict.fromkeys(weights)
    if not (linear or experts):
        raise ValueError(
            f"--lora.targets expects linear layers of the decoder, here {', '.join(_ends(modules))}, got none of them"
        )
    return list(linear), list(experts)


def _ends(modules: dict[str, nn.Module]) -> list[str]:
    """Last words of the names of linear layers."""
    return sorted({name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)})


def _found(model: nn.Module) -> list[Adapter]:
    """Where peft has put adapters."""
    from peft.tuners.lora import LoraLayer, ParamWrapper

    found = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        owner, base = f"{name}.base_layer", module.base_layer
        while isinstance(base, LoraLayer):  # two weights of one module: one wrapped in the other
            owner, base = f"{owner}.base_layer", base.base_layer
        wrapper = isinstance(module, ParamWrapper)
        weight = f"{owner}.{module.parameter_name if wrapper else 'weight'}"
        found.append(
            Adapter(
                weight=weight,
                plain=_plain(weight),
                a=f"{name}.lora_A.{_NAME}.weight",
                b=f"{name}.lora_B.{_NAME}.weight",
                experts=len(getattr(base, module.parameter_name)) if wrapper else None,
                transposed=bool(getattr(base, "is_transposed", False)),
            )
        )
    return found


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")
