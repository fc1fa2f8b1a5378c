"""Models attached, then sharded by FSDP2 over two processes, replay as exactly as whole ones."""

from __future__ import annotations

import pytest
import torch

from tests.replay.fsdp_ranks import CASES, SIZE, Outcome, run
from tests.replay.spawn import spawn

FLOAT32 = tuple(name for name, case in CASES.items() if case.dtype == torch.float32)
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Both ranks' outcomes of every case."""
    return spawn("tests.replay.fsdp_ranks", SIZE, tmp_path_factory.mktemp("ranks"), CASES)


def same(a: tuple[torch.Tensor, dict[str, torch.Tensor]], b: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> bool:
    """Loss and gradients are equal to the last bit."""
    return torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


@pytest.mark.parametrize("name", CASES)
def test_own_rows_change_no_bit_of_loss_and_gradients(ranks: list[Outcome], name: str) -> None:
    for rank in ranks:
        result = rank[name]
        again = result["again"]
        assert any("gate" in parameter and gradient.any() for parameter, gradient in result["own"][1].items())
        assert same((again["loss"], again["grads"]), result["own"])


@pytest.mark.parametrize("name", CASES)
def test_attached_and_detached_models_are_the_bare_ones(ranks: list[Outcome], name: str) -> None:
    for rank in ranks:
        assert same(rank[name]["own"], rank[name]["bare"])
        assert same(rank[name]["detached"], rank[name]["bare"])


@pytest.mark.parametrize("name", CASES)
def test_foreign_rows_reach_the_experts_of_their_rank(ranks: list[Outcome], name: str) -> None:
    """And once more where their layer is recomputed, which begins at the last layer."""
    for rank in ranks:
        result = rank[name]["foreign"]
        rows = rank[name]["rows"].long()
        wanted = torch.cat([rows, rows.flip(2)], dim=2) if CASES[name].recompute else rows
        assert torch.equal(result["reached"].long(), wanted)
        assert not torch.equal(result["loss"], rank[name]["own"][0])


@pytest.mark.parametrize("name", FLOAT32)
def test_ranks_together_are_one_process(ranks: list[Outcome], name: str) -> None:
    """Under foreign rows: their mean loss, the gradients, and the sums of their counts are those of the whole batch."""
    one = run(CASES[name], None)["foreign"]
    both = [rank[name]["foreign"] for rank in ranks]
    torch.testing.assert_close(sum(result["loss"] for result in both) / SIZE, one["loss"], rtol=1e-5, atol=0)
    assert torch.equal(sum(result["counts"] for result in both), one["counts"])
    for result in both:
        assert result["grads"].keys() == one["grads"].keys()
        for parameter, gradient in result["grads"].items():
            torch.testing.assert_close(gradient, one["grads"][parameter], rtol=1e-4, atol=2e-6)


def test_a_model_that_is_sharded_already_is_refused(ranks: list[Outcome]) -> None:
    for rank in ranks:
        assert rank["refusal"].startswith("expected the router of layer 1 (Glm4MoeLiteTopkRouter) to run alone")
        assert rank["refusal"].endswith("attach before the model is sharded")
