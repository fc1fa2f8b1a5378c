"""The same command line under torchrun: both back ends on two ranks, with servers, killed and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pacenote.trainer import checkpoint, metrics

pytestmark = [pytest.mark.road, pytest.mark.timeout(600)]
SMALL = ["--rollout.prompts", "4", "--rollout.group", "4", "--steps", "3", "--checkpoint.every", "1"]


def started(log: Path, *words: str) -> subprocess.Popen[bytes]:
    """`pacenote train` on two ranks, in a session of its own."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("ab") as out:
        return subprocess.Popen(
            [*run, "-m", "pacenote", "train", *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )


def finished(log: Path, *words: str) -> None:
    process = started(log, *words)
    try:
        assert process.wait(200) == 0, log.read_text()[-6000:]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def rank_of(process: subprocess.Popen[bytes], rank: int) -> int:
    """Process id of a rank, by its environment."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rsplit(")", 1)[1].split()[1]) != process.pid:
                continue
            words = (path / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if f"RANK={rank}".encode() in words:
            return int(path.name)
    raise AssertionError("no such rank")


def check(out: Path) -> list[dict[str, Any]]:
    rows = metrics.read(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["steps_taken"] == 4
        assert row["abs_delta_logp"] < row["abs_delta_logp_native"]
        # A count for each trained row and layer of the tiny shape's five, on both ranks together: fillers add a few.
        assert row["rows_replayed"] >= (row["tokens"] - row["episodes"]) * 5
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
    return rows


def test_sharded(tmp_path: Path) -> None:
    """transformers under FSDP2, with a reference policy, ahead of itself."""
    words = ["--loss.kl-coef", "0.01", "--rollout.ahead", "1", "--rollout.max-staleness", "1"]
    finished(tmp_path / "log", "tiny", *SMALL, *words, "--out", str(tmp_path / "run"))
    assert all(row["kl_reference"] >= 0 for row in check(tmp_path / "run"))


def test_megatron_killed_and_resumed(tmp_path: Path) -> None:
    """SIGKILL of a rank stops all of them, servers included; the run goes on from its checkpoint."""
    pytest.importorskip("megatron.core", reason="megatron-core is missing: run make install, or see scripts/install.py")
    out, log = tmp_path / "run", tmp_path / "log"
    layout = ["--backend", "megatron", "--megatron.expert", "2", "--sync.method", "tensor", "--sync.pause", "retract"]
    process = started(log, "tiny", *SMALL, *layout, "--out", str(out))
    while not (out / "checkpoints").is_dir() or not checkpoint.list_steps(out / "checkpoints"):
        assert process.poll() is None, log.read_text()[-6000:]
        time.sleep(0.05)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    assert process.wait(100) != 0
    assert checkpoint.latest(out / "checkpoints")[0] < 3
    finished(log, "--resume", str(out))
    check(out)
