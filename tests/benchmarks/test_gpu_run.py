"""What `make gpu` does with its stages, with commands that stand in for the real ones."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

gpu, stage, sanitizer = (importlib.import_module(name) for name in ("gpu", "stage", "sanitizer"))
ROOT = Path(__file__).resolve().parents[2]


def step(name: str, code: str, **given: Any) -> Any:
    """A stage that runs a line of Python."""
    return stage.Stage(**{"name": name, "command": lambda _: stage.python("-c", code), "most": 20, "least": 1, **given})


# --- stages ----------------------------------------------------------------------------------------------------------


def test_a_failed_stage_stops_nothing() -> None:
    reports = list[int]()
    plan = [
        step("one", "print('=== 3 passed ===')"),
        step("two", "print('oh'); raise SystemExit(3)"),
        stage.Outcome(name="three", status="absent", why="not here"),
        step(
            "four", "import os; print(os.environ['WORD'], 'TRITON_INTERPRET' in os.environ)", environment={"WORD": "hi"}
        ),
    ]
    outcomes = stage.follow(plan, 60, lambda outcomes: reports.append(len(outcomes)))
    assert [(o.name, o.status, o.why, o.fatal) for o in outcomes] == [
        ("one", "held", "3 passed", False),
        ("two", "failed", "exit status 3", True),
        ("three", "absent", "not here", False),
        ("four", "held", "hi False", False),
    ]
    assert outcomes[1].tail == ("oh",)
    assert reports == [1, 2, 3, 4]


def test_out_of_time_ends_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    for may_stop in (False, True):
        outcome = stage.run(step("slow", code, may_stop=may_stop), 3)
        assert (outcome.status, outcome.why, outcome.fatal) == ("stopped", "out of time", not may_stop)
        assert outcome.tail == ("begun",)
        assert outcome.seconds < 30
        time.sleep(0.2)
        status = Path(f"/proc/{note.read_text()}/stat")
        assert not status.exists() or ") Z " in status.read_text()  # gone, or nobody has asked after it


def test_a_command_that_is_not_there() -> None:
    outcome = stage.run(step("lost", "", command=lambda _: ["/no/such/command"]), 5)
    assert (outcome.status, outcome.fatal) == ("failed", True)
    assert "/no/such/command" in outcome.why


def test_limits_leave_time_to_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[float]()

    def record(stage_: Any, seconds: float) -> Any:
        given.append(seconds)
        return stage.Outcome(name=stage_.name, status="held", why="")

    monkeypatch.setattr(stage, "run", record)
    plan = [step("a", "", most=200, least=10), step("b", "", most=500, least=30), step("c", "", most=500, least=50)]
    stage.follow(plan, 100, lambda _: None)
    assert given == pytest.approx([20, 50, 100], abs=1)  # a takes no time here, so what it left goes to b and c
    given.clear()
    stage.follow(plan, -5, lambda _: None)
    assert given == [1.0, 1.0, 1.0]


def test_grace() -> None:
    asked = list[float]()

    def command(seconds: float) -> list[str]:
        asked.append(seconds)
        return [sys.executable, "-c", ""]

    stage.run(step("x", "", command=command, grace=4), 30)
    assert asked == [26]


# --- what is run -----------------------------------------------------------------------------------------------------


def test_tests_of_a_full_python() -> None:
    tests, graphs = gpu.tests()
    words = tests.command(100)
    assert words[words.index("-m", 2) :][:1] == ["-m"]
    assert "not gpu" in words
    assert graphs.command(100)[-2:] == ["-m", "gpu"]
    assert any(word.endswith("test_aot.py") for word in words)
    assert not tests.may_stop
    assert graphs.judge(0, ["4 passed, 475 deselected in 1.47s"]) == ""
    assert graphs.judge(0, ["4 skipped, 475 deselected in 1.47s"]) == "no test ran"
    assert graphs.judge(5, ["475 deselected in 1.47s"]) == "exit status 5"


def test_tests_of_a_bare_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "has", lambda module: False)
    tests, graphs = gpu.tests()
    assert tests.command(100)[1:] == ["scripts/checks.py"]
    assert graphs.status == "absent"
    monkeypatch.setattr(gpu, "has", lambda module: module == "pytest")
    tests, _ = gpu.tests()
    assert "--ignore=tests/kernels/test_route_random.py" in tests.command(100)
    assert "-n" not in tests.command(100)


def test_everything_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: Path("/tool"))
    plan = gpu.stages(tmp_path)
    names = [part.name for part in plan]
    assert names == [
        "tests", "graphs", "races", "planted fault", "memcheck", "racecheck", "synccheck", "initcheck",
        "route", "permute", "pack", "logprob", "policy", "step",
    ]  # fmt: skip
    assert sum(part.least for part in plan) < gpu.SECONDS
    for part in plan[-6:]:
        assert part.command(50)[-4:] == ["--out", str(tmp_path), "--seconds", "50"]


def test_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PROBE", "print('NVIDIA H100 80GB HBM3 | torch 2.11.0 | triton 3.6.0')")
    plan = [step("good", "print('fine')"), stage.Outcome(name="gone", status="absent", why="not here")]
    monkeypatch.setattr(gpu, "stages", lambda out: plan)
    assert gpu.main(["--out", str(tmp_path)]) == 0
    [path] = tmp_path.glob("gpu-nvidia-h100-80gb-hbm3-*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert [part["status"] for part in data["stages"]] == ["held", "absent"]
    plan.append(step("bad", "raise SystemExit(1)"))
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert gpu.main(["--out", str(tmp_path), "--only", "good"]) == 0


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "PROBE", "import sys; sys.exit('expected a GPU, torch 2.11 sees none')")
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "expected a GPU, torch 2.11 sees none; nothing was run" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_named_checks() -> None:
    command = [sys.executable, "scripts/checks.py", "--seconds", "100", "--only", "no_tokens"]
    done = subprocess.run(command, cwd=ROOT, env=stage.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "route: no_tokens: " in done.stdout
    assert sanitizer.clean(0, done.stdout.splitlines()) == ""


# --- compute-sanitizer -----------------------------------------------------------------------------------------------

HELD = ["route: sizes: 0.31 s", "41 of 67 checks ran on cuda, 41 held"]
OURS = [
    "========= Invalid __global__ write of size 4 bytes",
    "=========     at _planted_kernel+0x1b0 in planted.py:9",
    "=========     by thread (100,0,0) in block (0,0,0)",
]
THEIRS = ["=========     at void at::native::_scatter_gather_elementwise_kernel<128, 8>(int, T3)+0x90"]


def test_complaints() -> None:
    assert sanitizer.blamed(OURS) == {"_planted_kernel"}
    assert sanitizer.blamed(THEIRS) == set()
    assert sanitizer.blamed([line.removeprefix("=") for line in OURS]) == set()
    assert sanitizer.caught(9, OURS) == ""
    assert "not seen" in sanitizer.caught(0, HELD)
    assert sanitizer.clean(0, HELD) == ""
    assert sanitizer.clean(9, [*OURS, *HELD]) == "complaints about _planted_kernel"
    assert sanitizer.kept(9, [*THEIRS, *HELD]) == ""
    assert sanitizer.clean(9, [*THEIRS, *HELD]) == "complaints that name no kernel"
    assert sanitizer.clean(1, ["41 of 67 checks ran on cuda, 40 held"]) == "checks failed"
    assert sanitizer.clean(0, ["0 of 67 checks ran on cuda, 0 held"]) == "no check ran"
    assert "did not end" in sanitizer.clean(255, ["========= Error: Target application terminated"])


def test_the_tool_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for folder in ("bin", "compute-sanitizer"):
        home = tmp_path / folder
        tool = home / folder / "compute-sanitizer"
        tool.parent.mkdir(parents=True)
        tool.write_text("#!/bin/sh\n")
        monkeypatch.setenv("CUDA_HOME", str(home))
        assert sanitizer.find() != tool  # nobody may run it
        tool.chmod(0o755)
        assert sanitizer.find() == tool


def test_without_the_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find", lambda: None)
    [outcome] = sanitizer.stages()
    assert (outcome.status, outcome.fatal) == ("absent", False)


def test_commands() -> None:
    for check in sanitizer.TOOLS:
        command = sanitizer.command(Path("/tool"), check, "x.py")
        assert command[:3] == ["/tool", "--tool", check]
        assert command[-2:] == [sys.executable, "x.py"]
        assert ("--kernel-name" in command) == (check != "initcheck")
