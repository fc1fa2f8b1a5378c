"""A replayed transformers step waits for the device no more often than the plain one, and moves its rows there once.

What an op does inside itself is not dispatched and not seen here; the kernels' tests look there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pacenote.kernels.spec import REPLAY
from pacenote.replay.hf import attach
from tests.replay.test_exact import BATCH, LENGTH, foreign, ids, step

Build = Callable[..., Any]
FAMILIES = ("glm4_moe_lite", "qwen3_moe", "gpt_oss")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal")
CASTS = {torch.float32: 0, torch.bfloat16: 2}
"""Casts on the device that replay may add to a layer's pass: of bias [E], or of logits [T, E] and weights [T, K]."""

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts waits and copies by name, and keeps the shapes that copies between devices have."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[str, int] = dict.fromkeys((*WAITS, "_to_copy", "copy_"), 0)
        self.moved: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in self.counts:
            self.counts[name] += 1
            devices = {leaf.device for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)}
            if len(devices) > 1:
                self.moved.append(tuple(out.shape))
        return out


def deep(tiny: Build, family: str, layers: int, recompute: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A model in training mode; GLM's first layer is dense, and Qwen's."""
    kinds = {"mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1)} if family == "glm4_moe_lite" else {}
    kinds |= {"layer_types": ["full_attention"] * layers} if family == "gpt_oss" else {}
    model = tiny(family, dtype=dtype, num_hidden_layers=layers, **kinds).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("layers", [3, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_wait_is_added_to_a_step(tiny: Build, family: str, layers: int, dtype: torch.dtype, recompute: bool) -> None:
    model, tokens = deep(tiny, family, layers, recompute, dtype), ids()
    replay = attach(model)
    step(model, tokens)  # makes what is made once
    with Watch() as plain:
        step(model, tokens)
    with replay.rows(foreign(len(replay.layers)).to(torch.uint8)), replay.record(), Watch() as watch:
        step(model, tokens)
    assert sum(plain.counts.values()) > 0
    casts = watch.counts.pop("_to_copy") - plain.counts.pop("_to_copy")
    assert 0 <= casts <= CASTS[dtype] * len(replay.layers) * (2 if recompute else 1)
    assert watch.counts == plain.counts


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layers", [3, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_move_to_the_device_once_and_nothing_in_a_step(
    tiny: Build, family: str, layers: int, recompute: bool
) -> None:
    """On the meta device: it has memory of its own, and an op that would wait for a value raises there."""
    model = deep(tiny, family, layers, recompute)
    replay = attach(model)
    model.to("meta").set_experts_implementation("batched_mm")  # grouped_mm has no float32 there
    tokens = ids().to("meta")
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool, device="meta")  # made by the model, it would wait
    width = len(replay.layers)
    state = torch.full((BATCH, LENGTH), REPLAY, dtype=torch.uint8)
    scope = replay.rows(foreign(width), state)
    with Watch() as entry:
        scope.__enter__()
    with replay.record(), Watch() as watch:
        model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss.backward()
    with Watch() as leaving:
        scope.__exit__(None, None, None)
    assert sorted(entry.moved) == [(width, BATCH * LENGTH, 2), (BATCH * LENGTH,)]
    assert watch.moved == leaving.moved == []
    assert sum(watch.counts[name] for name in WAITS) == sum(leaving.counts[name] for name in WAITS) == 0
