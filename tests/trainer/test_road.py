"""The whole road with real processes: rollout -> routes -> replay -> step -> new weights, and what goes wrong on it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pacenote.trainer import metrics
from pacenote.trainer.cli import main

pytestmark = [pytest.mark.road, pytest.mark.timeout(600)]
SMALL = ["--rollout.prompts", "8", "--rollout.group", "4"]
REQUIRED = {"step", "reward", "abs_delta_logp", "abs_delta_logp_native", "k3_kl", "flipped", "rows_missing",
            "rows_invalid", "tokens", "seconds"}  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pacenote", *words]


def pacenote(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, with `path` on PYTHONPATH."""
    known = [str(path)] if path else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*known, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=240, check=False, env=env)


def mean(rows: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def replay_works(rows: list[dict[str, Any]]) -> bool:
    """The claim of the road: on the same tokens replay at least halves the mismatch, and k3 far more."""
    return (
        mean(rows, "abs_delta_logp") <= 0.5 * mean(rows, "abs_delta_logp_native")
        and mean(rows, "k3_kl") <= 0.2 * mean(rows, "k3_kl_native")
        and mean(rows, "flipped") > 0
        and all(row["rows_replayed"] > 0 and row["rows_missing"] == row["rows_invalid"] == 0 for row in rows)
    )


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that replays the rollout's routes, is evaluated, and watched."""
    out = tmp_path_factory.mktemp("road") / "run"
    watched = ["--eval.every", "2", "--eval.prompts", "4", "--track.tensorboard"]
    done = pacenote("train", "tiny", "--steps", "4", "--out", str(out), *SMALL, *watched)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"open {out / 'report.html'}" in done.stdout.splitlines()[-1]
    return out


def test_road_leaves_everything_behind(road: Path) -> None:
    rows = metrics.read(road / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(set(row) >= REQUIRED for row in rows)
    assert all(0 <= row["reward"] <= 1 and row["episodes_failed"] == 0 for row in rows)
    assert "<svg" in (road / "report.html").read_text(encoding="utf-8")
    assert json.loads((road / "config.json").read_text())["recipe"] == "tiny"
    sample = (road / "samples" / "step_000000.txt").read_text(encoding="utf-8")
    assert re.search(r"user: .*(letters|signs)", sample)
    assert re.search(r"tool: .*(letters|signs)", sample)
    assert [path.name for path in (road / "checkpoints").iterdir()] == ["step_000004"]


def test_road_is_evaluated_and_watched(road: Path) -> None:
    rows = metrics.read(road / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2, 3]
    assert all(row["eval_episodes"] == 4 and 0 <= row["eval_reward"] <= 1 for row in rows if "eval_reward" in row)
    parts = ("sync", "rollout", "pack", "measure", "update")
    for row in rows:
        assert all(row[f"seconds_{name}"] > 0 for name in (*parts, "learn", "forward", "backward", "optimizer"))
        spent = sum(row[f"seconds_{name}"] for name in parts) + row.get("seconds_eval", 0.0)
        assert 0.5 * row["seconds"] < spent <= row["seconds"]
        assert row["seconds_learn"] == pytest.approx(row["seconds_forward"] + row["seconds_backward"])
        assert row["host_gib"] > 0 < row["model_tflops"]
    events = EventAccumulator(str(road / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("reward")] == pytest.approx([row["reward"] for row in rows])


def test_replay_halves_the_mismatch(road: Path) -> None:
    rows = metrics.read(road / "metrics.jsonl")
    assert replay_works(rows), [
        {name: row[name] for name in ("abs_delta_logp", "abs_delta_logp_native")} for row in rows
    ]


@pytest.mark.parametrize("mode", ["off", "trainer"])
def test_other_modes_show_the_whole_gap(tmp_path: Path, mode: str) -> None:
    """Without the engine's routes the gap stays, so a road whose replay is silently off fails the claim above."""
    done = pacenote("train", "tiny", "--steps", "2", "--replay", mode, "--out", str(tmp_path / "run"), *SMALL)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert all(row["abs_delta_logp"] == row["abs_delta_logp_native"] for row in rows)
    assert all((row["rows_replayed"] > 0) == (mode == "trainer") for row in rows)
    assert not replay_works(rows)


def test_own_prompts(tmp_path: Path) -> None:
    """--data with a reward by import path; the gap is compared at every other step."""
    data = tmp_path / "data.jsonl"
    prompts = [{"messages": [{"role": "user", "content": f"Say {word}"}], "label": word} for word in ("a", "b", "c")]
    data.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (tmp_path / "mine.py").write_text(
        "def reward(messages, label):\n    return len(messages[-1]['content'] or '') / 9\n"
    )
    words = [
        "train",
        "tiny",
        "--data",
        str(data),
        "--reward",
        "mine:reward",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    done = pacenote(*words, *SMALL, "--gap-every", "2", path=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    first, second = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert first["reward"] > 0 < second["reward"]
    assert first["abs_delta_logp"] < first["abs_delta_logp_native"]
    assert (second["abs_delta_logp_native"], second["flipped"]) == (None, None)
    assert second["abs_delta_logp"] > 0
    assert "Say " in (tmp_path / "run" / "samples" / "step_000000.txt").read_text(encoding="utf-8")


class Running:
    """A run in the background."""

    def __init__(self, out: Path, *words: str) -> None:
        self.out = out
        self.log = out.with_suffix(".log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command(*words), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for_steps(self, count: int) -> None:
        deadline = time.monotonic() + 180
        while len(metrics.read(self.out / "metrics.jsonl")) < count:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def engine(self) -> int:
        """Process id of the run's engine."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            if b"pacenote.rollout.embedded" in words and parent == self.process.pid:
                return int(path.name)
        raise AssertionError("no engine found")

    def finish(self) -> int:
        return self.process.wait(timeout=240)


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Any]:
    """Start runs that are killed with the test."""
    started: list[Running] = []

    def start(*words: str) -> Running:
        out = tmp_path / "run"
        started.append(Running(out, *(word.replace("OUT", str(out)) for word in words)))
        return started[-1]

    yield start
    for run in started:
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dead", "stuck"])
def test_a_dead_or_stuck_engine_is_restarted(background: Any, number: signal.Signals, long: bool) -> None:
    if number == signal.SIGSTOP and not long:
        pytest.skip("waits for one time limit after the other: --long")
    run = background(
        "train", "tiny", "--steps", "5", "--out", "OUT", "--rollout.patience", "20", "--sync.timeout", "20", *SMALL
    )
    run.wait_for_steps(2)
    stuck = run.engine()
    os.kill(stuck, number)
    assert run.finish() == 0, run.log.read_text()
    assert not Path(f"/proc/{stuck}").exists()
    rows = metrics.read(run.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert replay_works(rows)


def test_an_engine_that_dies_too_often_stops_the_run_with_its_state_saved(background: Any) -> None:
    run = background("train", "tiny", "--steps", "5", "--out", "OUT", "--rollout.restarts", "0", *SMALL)
    run.wait_for_steps(1)
    os.kill(run.engine(), signal.SIGKILL)
    assert run.finish() == 1
    said = run.log.read_text().strip().splitlines()[-1]
    assert re.match(r"pacenote: the engine.* it was started again 0 times, which is the limit", said)
    assert f"--resume {run.out}" in said
    done = [row["step"] for row in metrics.read(run.out / "metrics.jsonl")]
    assert [path.name for path in (run.out / "checkpoints").iterdir()] == [f"step_{len(done):06d}"]


def test_ctrl_c_leaves_a_run_that_goes_on(background: Any) -> None:
    run = background("train", "tiny", "--steps", "5", "--out", "OUT", *SMALL)
    run.wait_for_steps(2)
    run.process.send_signal(signal.SIGINT)
    assert run.finish() == 130
    said = run.log.read_text()
    assert "Traceback" not in said
    assert f"--resume {run.out}" in said
    assert (run.out / "report.html").is_file()
    done = pacenote("train", "--resume", str(run.out))
    assert done.returncode == 0, done.stderr + done.stdout
    rows = metrics.read(run.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert replay_works(rows)


def test_nan_loss_stops_with_one_sentence(tmp_path: Path) -> None:
    words = [
        "train",
        "tiny",
        "--steps",
        "6",
        "--out",
        str(tmp_path / "run"),
        "--optim.lr",
        "1e30",
        "--optim.warmup",
        "1",
        "--optim.guard.max-skips",
        "2",
    ]
    done = pacenote(*words, *SMALL)
    assert done.returncode == 1, done.stdout
    assert re.match(
        r"pacenote: 3 optimizer steps in a row were skipped, .* of (nan|inf) \(not_finite\)", one_line(done.stderr)
    )


def one_line(text: str) -> str:
    """The one sentence of an error output."""
    assert "Traceback" not in text
    (line,) = text.strip().splitlines()
    assert line.startswith("pacenote: ")
    return line


def test_wrong_input_gives_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(list(words)) == 2
        return one_line(capsys.readouterr().err)

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"messages": 3}\n')
    assert "no such file" in refused("train", "tiny", "--data", str(tmp_path / "none.jsonl"))
    assert "line 2" in refused("train", "tiny", "--data", str(bad))
    assert "unknown recipe 'huge'; the recipes are: " in refused("train", "huge")
    assert "expects a recipe" in refused("train")
    assert "is not a run folder" in refused("train", "--resume", str(tmp_path))
    assert "cannot import 'nowhere'" in refused("train", "tiny", "--reward", "nowhere:reward")
    assert "unknown command 'trian'" in refused("trian")
    out = ["--out", str(tmp_path / "run")]
    for _ in range(2):  # what was refused is not a run yet, so the folder can be used again
        assert "expected a model directory" in refused("train", "tiny", "--model", str(tmp_path), *out)


def test_real_sglang_needs_its_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is done: no run folder is left behind."""
    monkeypatch.setenv("PACENOTE_SGLANG", str(tmp_path / "nowhere"))
    assert main(["train", "tiny", "--engine", "sglang-cpu", "--out", str(tmp_path / "run")]) == 2
    assert "run `python scripts/install_sglang.py`" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words", [["--rollout.upstream", "http://x"], ["--exact"], ["--rollout.engine-device", "cuda"]]
)
def test_what_real_sglang_on_a_cpu_does_not_go_with(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "tiny", "--engine", "sglang-cpu", *words])
    assert end.value.code == 2
    assert "sglang-cpu" in re.sub(r"[\s│]+", " ", capsys.readouterr().err)


@pytest.mark.parametrize("words", [["--steps", "0"], ["--stepz", "3"], ["--replay", "always"]])
def test_wrong_flags_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "tiny", *words])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert words[0] in said
    assert "Traceback" not in said


def test_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = pacenote("train", "tiny", "--rollout.engine-port", port, "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    said = one_line(done.stderr)
    assert port in said
    assert "in use" in said


def test_a_reward_that_raises_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(messages, label):\n    return label['price']\n")
    done = pacenote(
        "train", "tiny", "--reward", "mine:reward", "--out", str(tmp_path / "run"), *SMALL, path=tmp_path
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    said = one_line(done.stderr)
    assert "environment or reward raised KeyError: 'price' (mine.py, line 2: return label['price'])" in said
    assert f"--resume {tmp_path / 'run'}" in said


def test_help_reads_well() -> None:
    top = pacenote("--help")
    assert top.returncode == 0
    assert "train RECIPE" in top.stdout
    flags = pacenote("train", "tiny", "--help")
    assert flags.returncode == 0
    for flag in ("--replay", "--data", "--steps", "--out", "--rollout.upstream", "--optim.lr"):
        assert flag in flags.stdout
    assert "Whose experts the update uses" in re.sub(r"[\s│]+", " ", flags.stdout)
