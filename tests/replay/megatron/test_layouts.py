"""Two processes in every layout: losses and router gradients are those of one process, tokens meet their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pacenote.kernels.layout import stage_layers
from pacenote.replay.align import places
from tests.replay.megatron.ranks import LAYOUTS, SIZE, run
from tests.replay.spawn import spawn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:megatron", "ignore::UserWarning:megatron")
FAMILIES = {
    "width": tuple(name for name in LAYOUTS if not name.startswith("pp")),
    "depth": tuple(name for name in LAYOUTS if name.startswith("pp")),
}
Outcome = dict[str, Any]


@pytest.fixture(scope="module")
def outcome(one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Outcome]]:
    """`outcome(layout)`: both ranks' outcomes."""
    done: dict[str, list[Outcome]] = {}

    def of(name: str) -> list[Outcome]:
        if name not in done:
            family = next(names for names in FAMILIES.values() if name in names)
            ranks = spawn("tests.replay.megatron.ranks", SIZE, tmp_path_factory.mktemp("ranks"), family)
            done.update({layout: [rank[layout] for rank in ranks] for layout in family})
        return done[name]

    return of


@pytest.fixture(scope="module")
def reference(one_process: Path) -> Callable[[str], Outcome]:
    """`reference(layout)`: the outcome of one process without recomputation."""
    done: dict[str, Outcome] = {}

    def of(name: str) -> Outcome:
        layout = LAYOUTS[name].reference
        if str(layout) not in done:
            done[str(layout)] = run(layout)
        return done[str(layout)]

    return of


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_router_gradients_are_those_of_one_process(
    outcome: Callable[[str], list[Outcome]], reference: Callable[[str], Outcome], name: str
) -> None:
    ranks, one = outcome(name), reference(name)
    if LAYOUTS[name].sizes.get("ep") == 2 and "tp" not in LAYOUTS[name].sizes:
        losses = [loss for pair in zip(*(rank["losses"] for rank in ranks), strict=True) for loss in pair]
    else:
        losses = ranks[-1]["losses"]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(one["losses"]), rtol=1e-5, atol=1e-6)
    grads = {layer: gradient for rank in ranks for layer, gradient in rank["grads"].items()}
    assert grads.keys() == one["grads"].keys()
    for layer, gradient in grads.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(gradient, one["grads"][layer], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_meets_the_row_that_names_it(
    outcome: Callable[[str], list[Outcome]], reference: Callable[[str], Outcome], name: str
) -> None:
    """At each layer all tokens of the step are seen by the ranks together: once, and again where it is recomputed."""
    ranks, one = outcome(name), reference(name)
    assert all(rank["wrong"] == 0 and (rank["compared"] > 0 or not rank["layers"]) for rank in ranks)
    passes = 2 if "recompute_granularity" in LAYOUTS[name].config else 1
    seen, wanted = tokens_by_layer(ranks), tokens_by_layer([one])
    assert seen.keys() == wanted.keys()
    for layer, tokens in wanted.items():
        assert seen[layer] == Counter({token: passes * count for token, count in tokens.items()})


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_row_counts_once(
    outcome: Callable[[str], list[Outcome]], reference: Callable[[str], Outcome], name: str
) -> None:
    ranks, one = outcome(name), reference(name)
    replayed: Counter[int] = Counter()
    for rank in ranks:
        assert rank["others"] == 0
        replayed.update(dict(zip(rank["layers"], rank["replayed"], strict=True)))
    assert replayed == Counter(dict(zip(one["layers"], one["replayed"], strict=True)))


@pytest.mark.parametrize("name", FAMILIES["depth"])
def test_a_stage_holds_the_layers_that_the_arithmetic_says(outcome: Callable[[str], list[Outcome]], name: str) -> None:
    """`places` reads the layers off the chunks, `stage_layers` computes them; dense layers have no place."""
    layout = LAYOUTS[name]
    count, stages = layout.config["num_layers"], layout.sizes.get("vpp", 1)
    sparse = layout.config.get("moe_layer_freq", [0] + [1] * (count - 1))
    moe = [layer for layer in range(count) if sparse[layer]]
    for rank, found in enumerate(outcome(name)):
        wanted = [
            stage_layers(moe, count, pp_size=2, pp_rank=rank, vpp_size=stages, vpp_rank=stage)
            for stage in range(stages)
        ]
        assert places(moe, found["layers"]) == tuple(place for stage in wanted for place in stage)


def tokens_by_layer(ranks: list[Outcome]) -> dict[int, Counter[int]]:
    seen: dict[int, Counter[int]] = {}
    for rank in ranks:
        for layer, tokens in rank["tokens"]:
            seen.setdefault(layer, Counter()).update(tokens)
    return seen
