"""Where the kernels' tests run: a GPU if there is one, Triton's interpreter under TRITON_INTERPRET=1, else plain torch.

The same tests run in each; a line at the head of the run says in which.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pacenote.kernels import launch

GPU = torch.cuda.is_available() and not launch.INTERPRETED
MODE = "Triton on a GPU" if GPU else "Triton's interpreter" if launch.INTERPRETED else "plain torch, no kernel"

if launch.INTERPRETED:
    from tests.kernels import interpreter

    interpreter.install()


def pytest_report_header() -> str:
    """What the kernels' tests run on."""
    return f"kernels: {MODE}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for a GPU are skipped without one."""
    for item in items:
        if "gpu" in item.keywords and not GPU and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the tests' tensors."""
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest integer, so that an output that is not written is seen.

    torch does this itself among its measures for determinism; the others only warn.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
