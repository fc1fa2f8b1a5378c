"""Findings, plots and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pacenote.trainer import findings, groups, metrics, recipes
from pacenote.trainer.config import RunConfig
from pacenote.trainer.display import Display, cells
from pacenote.trainer.report import write_report
from pacenote.trainer.rundir import RunDir


def row(step: int, **changes: Any) -> dict[str, Any]:
    """A plausible row of metrics."""
    base: dict[str, Any] = {
        "step": step, "reward": 0.5 + 0.01 * step, "reward_std": 0.2, "abs_delta_logp": 0.015,
        "abs_delta_logp_native": 0.05, "k3_kl": 3e-4, "k3_kl_native": 1.4e-2, "flipped": 0.03,
        "flipped_by_layer": [0.02, 0.03, 0.04], "rows_missing": 0, "rows_invalid": 0, "tokens": 4000,
        "tokens_per_second": 1500.0, "seconds": 2.5, "seconds_rollout": 1.5, "seconds_measure": 0.4,
        "seconds_update": 0.6, "length_mean": 7.5, "length_max": 8, "entropy": 4.0, "episodes_failed": 0,
        "episodes_unrewarded": 0,
        "gap_by": {"role": {"prompt": group(0, None, 30, 0.5),
                            "response": group(10 + step, 0.01 * (step + 1), 10, 0.25)},
                   "turn": {f"turn {turn}": group(5, 0.02, 20, 0.1) for turn in range(1 + step % 2)}},
    }  # fmt: skip
    return {**base, **changes}


def group(tokens: int, delta: float | None, compared: int, flipped: float | None) -> dict[str, Any]:
    """One label's figures of a step."""
    columns = ("abs_delta_logp", "abs_delta_logp_native", "k3_kl", "k3_kl_native", "f_tau", "f_tau_native")
    return {"tokens": tokens, **dict.fromkeys(columns, delta), "compared": compared, "flipped_tokens": flipped}


def run_with(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> RunDir:
    """A run folder with these rows."""
    config = RunConfig(recipe="tiny", out=tmp_path / "run", **changes)
    run = RunDir.create(config).begin(config)
    with metrics.MetricsLog(run.metrics) as log:
        for item in rows:
            log.append(item)
    return run


def texts(rows: list[dict[str, Any]], replay: str = "rollout") -> str:
    """All findings as one text."""
    return "\n".join(f"{f.kind}: {f.text}" for f in findings.findings(rows, replay))


def test_findings_say_what_was_measured() -> None:
    said = texts([row(i) for i in range(20)])
    assert "from 0.520 (first 5 steps) to 0.670 (last 5), over 20 steps" in said
    assert "0.0500 with the trainer's own routing and 0.0150 with replay (30%)" in said
    assert "warning" not in said


def test_steps_without_a_comparison_are_left_out_of_it() -> None:
    """Of every third step the trainer's own routing was measured, and there replay left more."""
    unknown = dict.fromkeys(("abs_delta_logp_native", "k3_kl_native", "flipped", "flipped_by_layer"))
    said = texts([row(i, abs_delta_logp=0.02) if i % 3 == 0 else row(i, **unknown) for i in range(9)])
    assert "0.0500 with the trainer's own routing and 0.0200 with replay (40%)" in said
    never = texts([row(i, **unknown) for i in range(3)])
    assert "0.0150 with replay, k3 KL 3.0e-04; the trainer's own routing was not measured (--gap-every 0)" in never
    assert "warning" not in said + never


def test_what_was_not_measured_is_a_dash_on_the_screen() -> None:
    whole, part = cells(row(0, entropy=4.0)), cells(row(0, entropy=4.0, abs_delta_logp_native=math.nan, flipped=None))
    assert "-" not in whole
    assert part.count("-") == 2
    assert "nan" not in part


def test_collapsed_routing_is_reported() -> None:
    rows = [row(i, flipped=0.03 if i < 8 else 0.0) for i in range(20)]
    assert findings.collapsed(rows)
    assert "warning: Routing has collapsed" in texts(rows)
    assert not findings.collapsed([row(i, flipped=0.001 if i == 15 else 0.0) for i in range(20)])
    assert not findings.collapsed([])


def test_trouble_is_reported() -> None:
    assert "Replay did not bring engine and trainer closer" in texts([row(0, abs_delta_logp=0.9)])
    assert "7 tokens had no row" in texts([row(0, rows_missing=3), row(1, rows_missing=4)])
    assert "2 rows (once a layer)" in texts([row(0, rows_invalid=2)])
    assert "1 episodes failed" in texts([row(0, episodes_failed=1, episodes_unrewarded=1)])
    assert "3 optimizer steps were skipped" in texts([row(0, skipped_spike=1), row(1, skipped_not_finite=2)])
    refused = [row(0, groups_refused_zero_std=3, groups_refused_stale=0), row(1, groups_refused_stale=1)]
    assert "4 groups were refused and others played in their place: 3 zero_std, 1 stale" in texts(refused)
    nothing = texts([row(0, reward=None, abs_delta_logp=None, abs_delta_logp_native=None, k3_kl=None)])
    assert "warning: Nothing countable was earned in 1 steps" in nothing
    assert "No token was trained on" in nothing
    assert "nan" not in nothing
    assert "Replay was off" in texts([row(0)], "off")
    assert "does not close the gap" in texts([row(0)], "trainer")
    assert texts([]) == "warning: No step was finished."


def test_groups_are_weighted_by_their_tokens() -> None:
    prompt, response, *turns = groups.over_run([row(0), row(1), row(2, gap_by=None)])
    assert (prompt.kind, prompt.name, prompt.tokens, prompt.compared) == ("role", "prompt", 0, 60)
    assert prompt.cells() == ["0", "", "", "", "", "60", "50.00%"]
    assert response.tokens == 21
    assert response.means["abs_delta_logp"] == pytest.approx((10 * 0.01 + 11 * 0.02) / 21)
    assert [(turn.name, turn.tokens) for turn in turns] == [("turn 0", 10), ("turn 1", 5)]
    assert groups.over_run([]) == []


def test_page_stands_alone(tmp_path: Path) -> None:
    run = run_with(tmp_path, [row(i) for i in range(12)])
    (run.samples / "step_000000.txt").write_text("user: <script>alert(1)</script> \ufffd", encoding="utf-8")
    page = write_report(run.root).read_text(encoding="utf-8")
    assert page.count("<svg") == 8
    assert "<td>turn</td><td>turn 1</td><td>30</td><td>0.0200</td>" in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    for outside in ("<link", "src=", "url(http"):
        assert outside not in page


@pytest.mark.parametrize(
    "rows",
    [[], [row(0)], [row(0, reward=None, reward_std=None, flipped=None, flipped_by_layer=None, entropy=None)],
     [row(i, abs_delta_logp_native=None, flipped=None, flipped_by_layer=None, eval_reward=0.5) for i in range(3)],
     [row(i, k3_kl=0.0, k3_kl_native=0.0, abs_delta_logp=0.0, abs_delta_logp_native=0.0) for i in range(3)]],
)  # fmt: skip
def test_thin_runs_still_get_a_page(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert write_report(run_with(tmp_path, rows).root).stat().st_size > 3000


def test_metrics_are_json_whatever_comes(tmp_path: Path) -> None:
    run = run_with(tmp_path, [row(0, reward=math.nan, k3_kl=math.inf)])
    (line,) = run.metrics.read_text(encoding="utf-8").splitlines()
    assert json.loads(line, parse_constant=lambda text: pytest.fail(text))["reward"] is None


def test_metrics_of_a_resumed_run(tmp_path: Path) -> None:
    """Rows of steps that are run again are dropped, and so is a line that a crash cut short."""
    run = run_with(tmp_path, [row(i) for i in range(5)])
    with run.metrics.open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "rew')
    with metrics.MetricsLog(run.metrics, first_step=3) as log:
        log.append(row(3, reward=9.0))
    assert [(r["step"], r["reward"]) for r in metrics.read(run.metrics)][-2:] == [(2, 0.52), (3, 9.0)]


def test_report_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(tmp_path)
    run = run_with(tmp_path, [])
    with pytest.raises(ValueError, match="already holds a run"):
        RunDir.create(RunConfig(recipe="tiny", out=run.root))


@pytest.mark.parametrize("terminal", [True, False])
def test_display(tmp_path: Path, terminal: bool) -> None:
    config = recipes.tiny()
    console = Console(
        force_terminal=terminal, width=120, record=True, file=(tmp_path / "out").open("w", encoding="utf-8")
    )
    with Display(config, RunDir(tmp_path), console) as display:
        display.show(row(0))
        display.show(row(1, reward=None))
    shown = console.export_text()
    assert "0.500" in shown
    assert "3.00%" in shown
    assert "-" in shown
