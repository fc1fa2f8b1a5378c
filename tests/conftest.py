"""Fixtures that every floor's tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # for `tests.*` and `benchmarks.*`, which pytest alone does not put there
    sys.path.append(str(ROOT))

# Workers share the cores. And on several threads attention's backward pass does not repeat its own bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The long forms by command, the short ones otherwise."""
    parser.addoption("--long", action="store_true", help="crash, fuzz and soak tests in their long form; hours in all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that no worker is left with them at the end."""
    items.sort(key=lambda item: "road" not in item.keywords)


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long forms were asked for."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny GLM-4.7-Flash-shaped model with its tokenizer."""
    from pacenote.trainer.model import build_tiny

    return build_tiny(tmp_path_factory.mktemp("tiny"), seed=0)
