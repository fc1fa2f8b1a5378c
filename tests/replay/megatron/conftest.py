"""One process that runs megatron-core on the CPU, for the length of a test file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """megatron-core with one process in every group; gives a directory for what the tests write."""
    pytest.importorskip("megatron.core", reason="megatron-core is missing: run make install, or see scripts/install.py")
    from tests.replay.megatron import cpu

    directory = tmp_path_factory.mktemp("megatron")
    with cpu.shim(), cpu.processes(str(directory / "store")), cpu.parallel():
        yield directory
