"""What the tiny recipe does over seeds and replay modes: reward, and the mismatch with and without replay.

    python -m benchmarks.tiny_road --seeds 0 1 2 --replay rollout off --out benchmarks/results

Each run is the `pacenote train tiny` of a user, in a folder of its own. Writes one JSON row a run; timings are of this
machine's CPU and say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pacenote.trainer import findings, metrics


def run(seed: int, replay: str, steps: int, folder: Path) -> dict[str, Any]:
    """One run of the recipe; returns its row."""
    command = [sys.executable, "-m", "pacenote", "train", "tiny", "--seed", str(seed), "--replay", replay,
               "--steps", str(steps), "--out", str(folder)]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return summary(folder, seed, replay, time.perf_counter() - began)


def summary(folder: Path, seed: int, replay: str, seconds: float | None) -> dict[str, Any]:
    """The row of a finished run's folder."""
    rows = metrics.read(folder / "metrics.jsonl")
    first, last, _ = findings.ends(rows, "reward")
    trained, native = findings.mean(rows, "abs_delta_logp"), findings.mean(rows, "abs_delta_logp_native")
    return {
        "seed": seed,
        "replay": replay,
        "steps": len(rows),
        "reward_first": first,
        "reward_last": last,
        "abs_delta_logp": trained,
        "abs_delta_logp_native": native,
        "ratio": trained / native,
        "k3_kl": findings.mean(rows, "k3_kl"),
        "k3_kl_native": findings.mean(rows, "k3_kl_native"),
        "flipped": findings.mean(rows, "flipped"),
        "rows_missing": findings.total(rows, "rows_missing"),
        "rows_invalid": findings.total(rows, "rows_invalid"),
        "seconds": seconds,
    }


def machine() -> dict[str, Any]:
    """What the rows were measured on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "device": "cpu",
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": commit.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Run every seed in every mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--replay", nargs="+", default=["rollout"], choices=["off", "rollout", "trainer"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for replay in asked.replay:
            for seed in asked.seeds:
                rows.append(run(seed, replay, asked.steps, Path(scratch) / f"{replay}-{seed}"))
                print(json.dumps(rows[-1]), flush=True)
    asked.out.mkdir(parents=True, exist_ok=True)
    target = asked.out / f"tiny_road-cpu-{time.strftime('%Y%m%d')}.json"
    target.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {target}")


if __name__ == "__main__":
    main()
