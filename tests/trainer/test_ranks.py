"""Many ranks and both back ends learn the same from the same samples, whatever cuts model and batch.

Two gloo processes each; what they are compared with is transformers on one process. float32 throughout, so what differs
is the order of sums: STATED bounds every number of two training steps, of two optimizer steps each.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from pacenote.trainer import plan
from pacenote.trainer.config import RunConfig
from tests.replay.spawn import spawn
from tests.trainer.ranks import CASES, Case, reference, saved_model

pytestmark = pytest.mark.timeout(600)
STATED = 2e-4
ALIKE = ("loss", "grad_norm", "tokens", "samples", "ratio_max", "gap", "gap_native", "flipped", "compared", "rows")
EXACT = [name for name in CASES if name != "ep2_bf16"]
REFERENCES: dict[Case, str] = {}
for _name, _case in CASES.items():
    REFERENCES.setdefault(reference(_case), _name)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case on two processes."""
    pytest.importorskip("megatron.core", reason="megatron-core is missing: run make install, or see scripts/install.py")
    return spawn("tests.trainer.ranks", 2, tmp_path_factory.mktemp("two"), ["2", *CASES])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What they are compared with."""
    found: dict[str, Any] = spawn(
        "tests.trainer.ranks", 1, tmp_path_factory.mktemp("one"), ["1", *REFERENCES.values()]
    )[0]
    return found


@pytest.mark.parametrize("name", EXACT)
def test_the_curve_is_that_of_one_process(two: list[dict[str, Any]], one: dict[str, Any], name: str) -> None:
    wanted, weights, _ = one[REFERENCES[reference(CASES[name])]]
    for rank in (0, 1):
        rows = two[rank][name][0]
        assert [row["steps_taken"] for row in rows] == [2, 2]
        for got, want in zip(rows, wanted, strict=True):
            bound = {key: pytest.approx(want[key], rel=STATED, abs=1e-6) for key in ALIKE}
            assert {key: got[key] for key in ALIKE} == bound
    found: dict[str, torch.Tensor] = two[0][name][1]
    assert found.keys() == weights.keys()
    # Adam turns a gradient that is nothing but rounding into a whole step, so weights are compared by their mean.
    assert max(float((found[key] - tensor).abs().mean()) for key, tensor in weights.items()) < 2e-5


def test_bfloat16_is_near(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for got, want in zip(two[0]["ep2_bf16"][0], one["hf"][0], strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=0.02)


def test_latent_attention_is_not_cut_by_layers_that_do_it_wrong(two: list[dict[str, Any]]) -> None:
    assert "expected TransformerEngine for latent attention" in two[0]["refusal"]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("hf_resumed", "dp2_resumed")])
def test_a_plan_is_what_torch_holds(two: list[dict[str, Any]], tmp_path: Path, name: str) -> None:
    """Weights of the fullest rank to the last number, and the bytes of its optimizer up to what is padded."""
    case = CASES[name]
    hf = AutoConfig.from_pretrained(saved_model(case.family, tmp_path))
    config = RunConfig(recipe="tiny")
    if case.layout is not None:
        config = replace(config, backend="megatron", megatron=case.layout)
    weights = [two[rank][name][2][0] for rank in (0, 1)]
    optimizer = [two[rank][name][2][1] for rank in (0, 1)]
    assert max(weights) == pytest.approx(plan.held(hf, config, 2).total, rel=1e-3 if case.layout is None else 0)
    assert max(optimizer) == pytest.approx(plan.memory(hf, config, 2, 100).optimizer, rel=0.01)
