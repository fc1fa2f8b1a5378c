"""The benchmark and the soak of the session server, small: real processes, every check of the soak."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sessions, soak
from benchmarks.scripted_engine import DENSE, EXPERTS, LAYERS, TOP_K, Script
from benchmarks.sessions import Case
from pacenote.rollout.trajectory import Trajectory


def test_a_small_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Case(sessions=6, turns=3, tokens=1200, store="sqlite", workers=2)
    monkeypatch.setattr(sessions, "CASES", (small,))
    assert sessions.main(["--out", str(tmp_path)]) == 0
    [path] = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert {"device", "processor", "cores", "commit", "date"} <= set(found["machine"])
    [row] = found["rows"]
    assert (row["sessions"], row["turns"], row["store"], row["workers"]) == (6, 3, "sqlite", 2)
    assert 900 < row["tokens_per_session"] < 1500
    assert row["held_mb"] * 1e6 > 6 * row["tokens_per_session"] * (LAYERS - DENSE) * TOP_K
    assert row["samples_bytes"] > row["tokens_per_session"] * (LAYERS - DENSE) * TOP_K
    measured = ("turns_per_s", "cpu_ms_per_turn", "own_ms_mean", "turn_ms_p99", "health_ms_p99", "rss_mb_peak")
    assert all(row[name] > 0 for name in measured)


def test_a_short_soak(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--minutes", "0.1", "--sessions", "8", "--tokens", "2000", "--turns", "8", "--kill-every", "1.5"]
    if request.config.getoption("--long"):
        words = ["--minutes", "20", "--sessions", "300", "--tokens", "32768", "--workers", "2"]
    # Too few sessions end in a short one to tell growth from noise.
    assert soak.main([*words, *([] if "300" in words else ["--growth", "1e9"])]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (row["wrong"], row["kills"] > 0, row["sessions_ended"] > 20) == (0, True, True)


def sample(script: Script, length: int, starts: list[int]) -> Trajectory:
    """Answers at these places, as the scripted engine gives them."""
    mask, logprobs, tokens = np.zeros(length, np.uint8), np.zeros(length, np.float32), np.zeros(length, np.int32)
    for start in starts:
        stop = start + script.generated
        mask[start:stop], logprobs[start:stop], tokens[start:stop] = 1, script.logprobs(start), script.ids(start)
    return Trajectory(
        tokens=tokens,
        loss_mask=mask,
        logprobs=logprobs,
        experts=script.rows[: length - 1, DENSE:].astype(np.uint8),
        provenance=np.ones(length - 1, np.uint8),
        version=np.zeros(length, np.int32),
        layers=tuple(range(DENSE, LAYERS)),
        num_experts=EXPERTS,
        spans=(("user", 0, length, False),),
        status="completed",
    )


def test_what_the_soak_finds() -> None:
    script = Script()
    good = sample(script, 700, [50, 300])
    whole = good.tokens.tolist()
    assert soak.faulty([good], [50, 300], whole) == []
    assert soak.faulty([good], [50, 300, 500], whole) == ["the answer at 500 is there 0 times"]
    assert soak.faulty([good, good], [50], whole) == ["the answer at 50 is there 2 times"]
    assert soak.faulty([good], [50], whole[:-1]) == ["its last answer is in no sample"]
    for name in ("logprobs", "tokens", "experts"):
        bad = sample(script, 700, [50, 300])
        array = getattr(bad, name).copy()
        array[60] += 1
        object.__setattr__(bad, name, array)
        assert len(soak.faulty([bad], [50, 300], bad.tokens.tolist())) == 1
