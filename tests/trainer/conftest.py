"""Fixtures that the tests of the trainer share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pacenote.rollout.trajectory import Trajectory
from tests.trainer import recorded


@pytest.fixture(scope="session")
def trajectories(tiny_dir: Path) -> list[Trajectory]:
    """See `recorded.record`."""
    return recorded.record(tiny_dir)
