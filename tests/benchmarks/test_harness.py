"""Benchmarks on a CPU, at sizes that mean nothing: what they take for right, what they write, what they leave out."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import harness, logprob, pack, peers, permute, plot, policy, route, step
from benchmarks.case import OURS, Absent, Case, Floor, Implementation
from benchmarks.harness import Cases, Setting
from benchmarks.machine import Ceilings
from benchmarks.models import MODELS
from pacenote.kernels.logprob import linear_logprob

CPU = torch.device("cpu")
BENCHMARKS: dict[str, Cases] = {
    "route": route.cases,
    "permute": permute.cases,
    "pack": pack.cases,
    "logprob": logprob.cases,
    "step": step.cases,
}
TINY = ["--tokens", "8", "24", "--models", "glm-4.7-flash", "kimi-k2", "--repeats", "1"]


def run(cases: Cases, out: Path, *words: str, name: str = "some") -> tuple[int, dict[str, Any]]:
    """Exit status, and the JSON."""
    status = harness.main(name, "", cases, ["--out", str(out), *words])
    [path] = out.glob(f"{name}-*.json")
    return status, json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_writes_rows_a_table_and_a_plot(name: str, tmp_path: Path) -> None:
    status, data = run(BENCHMARKS[name], tmp_path, *TINY, name=name)
    assert status == 0
    assert data["benchmark"] == name
    assert "mean nothing" in data["machine"]["note"]
    assert {"device", "driver", "torch", "triton", "commit", "sources", "date"} <= set(data["machine"]) | {"driver"}
    rows = data["rows"]
    assert {(row["model"], row["tokens"]) for row in rows} == {
        (m, t) for m in ("glm-4.7-flash", "kimi-k2") for t in (8, 24)
    }
    for row in rows:
        timed, absent = "median_us" in row, bool(row.get("absent"))
        assert timed != absent, row
        assert timed or row["implementation"] not in (OURS, "plain", "careful"), row
        if timed:
            assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
            assert row["floor_bytes"] > 0
    [table] = tmp_path.glob("*.csv")
    with table.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["implementation"] for line in lines] == [row["implementation"] for row in rows]
    assert {line["device"] for line in lines} == {data["machine"]["device"]}
    [drawn] = tmp_path.glob("*.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*.part"))


def fake(**implementations: Any) -> Cases:
    """Cases whose input is a number, whose right result is twice as much."""

    def check(number: Tensor, result: Tensor) -> None:
        assert torch.equal(result, 2 * number), "not twice"

    def cases(model: str, tokens: int, setting: Setting) -> Iterator[Case[Tensor]]:
        yield Case(
            model=model,
            tokens=tokens,
            work="double",
            shape={"experts": 3},
            floor=Floor(bytes=100),
            make=lambda seed: torch.tensor(seed + 1),
            check=check,
            implementations=implementations,
        )

    return cases


DOUBLE: Implementation[Tensor] = Implementation(bind=lambda x: lambda: x + x, note="adds")
TRIPLE: Implementation[Tensor] = Implementation(bind=lambda x: lambda: 3 * x)


def test_what_is_wrong_or_absent_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = fake(**{OURS: DOUBLE, "other": TRIPLE, "nobody": Absent("has no such op")})
    status, data = run(cases, tmp_path, "--tokens", "8", "9", "--models", "kimi-k2")
    ours, other, nobody = data["rows"][:3]
    assert status == 0
    assert ours["note"] == "adds"
    assert other["failed"] == "AssertionError: not twice"
    assert nobody["absent"] == "has no such op"
    said = capsys.readouterr().out
    assert said.count("FAILED: AssertionError: not twice") == 2
    assert said.count("has no such op") == 1  # the same at every size


def test_a_wrong_result_of_ours_fails(tmp_path: Path) -> None:
    status, data = run(fake(**{OURS: TRIPLE, "other": DOUBLE}), tmp_path, "--tokens", "8", "--models", "kimi-k2")
    assert status == 1
    assert "failed" in data["rows"][0]
    assert "median_us" in data["rows"][1]


def test_out_of_time(tmp_path: Path) -> None:
    status, data = run(fake(**{OURS: DOUBLE}), tmp_path, "--tokens", "8", "--models", "kimi-k2", "--seconds", "-1")
    assert status == 0
    assert data["rows"] == []
    assert data["left_out"] == ["kimi-k2 T=8 double"]
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _ = run(fake(**{OURS: DOUBLE}), tmp_path, "--tokens", "8", "--models", "kimi-k2")
    assert status == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".json"]


def test_redraws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also rows of a GPU, which have floors, and those of one size or one implementation."""
    _, data = run(fake(**{OURS: DOUBLE, "other": DOUBLE}), tmp_path, "--tokens", "8", "--models", "kimi-k2")
    for row in data["rows"]:
        row["floor_us"] = 0.5
    path = tmp_path / "again.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["plot", str(path)])
    assert plot.main() == 0
    assert path.with_suffix(".png").exists()


def test_floors() -> None:
    rates = Ceilings(bytes_per_s=1e12, flop_per_s=1e14, upload_per_s=1e10)
    row = harness.against(Floor(bytes=10**9, flop=10**10), 2000.0, rates)
    assert (row["floor_us"], row["over_floor"], row["gb_per_s"], row["tflop_per_s"]) == pytest.approx(
        (1000.0, 2.0, 500.0, 5.0)
    )
    assert harness.against(Floor(bytes=10**9, upload=10**9), 1e6, rates)["floor_us"] == pytest.approx(1e5)
    assert "floor_us" not in harness.against(Floor(bytes=1), 1.0, None)


def test_peers() -> None:
    assert peers.find("no_such_package.ops", "no-such-package") == Absent("no-such-package is not installed")
    assert isinstance(peers.find("json", "json"), type(json))
    assert isinstance(peers.liger("fused_moe", CPU), Absent)


# --- what a benchmark takes for right --------------------------------------------------------------------------------


@pytest.mark.parametrize("work", route.WORKS, ids=lambda work: work.name)
@pytest.mark.parametrize("model", MODELS)
def test_route_check_sees_what_is_wrong(model: str, work: route.Work) -> None:
    inputs = route.make(MODELS[model], 32, work, CPU, 0)
    result = route.implementation(route.ours, work).bind(inputs)()
    route.check(work, inputs, result)
    if work.backward:
        with pytest.raises(AssertionError, match="gradient is"):
            route.check(work, inputs, (result[0] * 1.1,))
        return
    weights, experts = result
    flipped = experts.flip(1), weights.flip(1)
    route.check_choice(inputs, flipped[1], flipped[0])
    dense = weights.new_zeros(inputs.logits.shape).scatter(1, experts, weights)
    route.check_choice(inputs, dense, torch.zeros_like(dense, dtype=torch.bool).scatter(1, experts, True))
    with pytest.raises(AssertionError, match="weights are"):
        route.check_choice(inputs, weights * 1.1, experts)
    worst = inputs.logits.float().argsort(dim=1)[:, : experts.shape[1]]
    with pytest.raises(AssertionError, match="experts"):
        route.check_choice(inputs, weights, worst)


def test_a_tie_is_broken_as_one_likes() -> None:
    inputs = route.make(MODELS["qwen3-30b-a3b"], 16, route.Work("free", free=True), CPU, 0)
    inputs.logits[:] = 0.0
    inputs.logits[:, 100:] = 1.0
    weights = torch.full((16, 8), 1 / 8, dtype=torch.bfloat16)
    route.check_choice(inputs, weights, torch.arange(120, 128).repeat(16, 1))


def test_logprob_check_sees_what_is_wrong() -> None:
    inputs = logprob.make(16, 50, 6, CPU, 0)
    for ours in (logprob.train(linear_logprob), logprob.train(logprob.chunked)):
        right = ours.bind(inputs)()
        logprob.check(inputs, right)
        found = logprob.errors(inputs, right)
        assert set(found) == {"logprob_error", "entropy_error", "dhidden_error"}
        assert all(0 <= error < 0.05 for error in found.values()), found
    logprob.check(inputs, logprob.at_once(inputs))
    for name in ("logprob", "entropy", "dhidden"):
        wrong = replace(right, **{name: getattr(right, name) + 1})
        with pytest.raises(AssertionError, match=f"{name}_error is"):
            logprob.check(inputs, wrong)


@pytest.mark.parametrize("work", step.WORKS)
def test_step_check_sees_what_is_wrong(work: str) -> None:
    config = step.WORKS[work]
    inputs = step.make(config, 16, 50, 40, CPU, 0)
    for ours in (step.one_pass, step.two_calls, partial(step.with_score, logprob.chunked)):
        right = ours(config, inputs)
        step.check(config, inputs, right)
        assert all(0 <= error < 0.3 for error in step.errors(config, inputs, right).values())
    for name in ("loss", "dhidden", "dweight"):
        wrong = replace(right, **{name: getattr(right, name) * 2})
        with pytest.raises(AssertionError, match=f"{name} is"):
            step.check(config, inputs, wrong)
    twice = replace(right, dhidden=right.dhidden * 2)
    assert work != "grpo" or step.errors(config, inputs, twice)["dhidden_error"] > 0.8


def test_permute_check_sees_what_is_wrong() -> None:
    inputs = permute.make(MODELS["kimi-k2"], 24, torch.int64, CPU, 0)
    order, place, offsets = permute.careful(inputs)
    permute.check(inputs, (order, place, offsets))
    permute.check(inputs, (order // 8, offsets.diff()))
    for wrong, words in (
        ((order.flip(0), place, offsets), "order"),
        ((order, place.flip(0), offsets), "places"),
        ((order, place, offsets + 1), "offsets"),
        ((order, offsets.diff()), "tokens"),
        ((order // 8, offsets[1:]), "counts"),
    ):
        with pytest.raises(AssertionError, match=words):
            permute.check(inputs, wrong)


@pytest.mark.parametrize("tokens", [2, 9, 300, 3000])
def test_pack_samples(tokens: int) -> None:
    """Cut samples are among them, and every implementation packs the same positions."""
    inputs = pack.make(MODELS["kimi-k2"], tokens, CPU, 0)
    for result in (pack.ours(inputs), pack.ours_from_host(inputs), pack.careful(inputs), pack.by_numpy(inputs)):
        pack.check(inputs, result)
        assert len(pack.fields(result)[0]) == tokens
    if tokens == 3000:
        assert max(len(sample.tokens) for sample in inputs.samples) > inputs.max_len
    fields = list(pack.careful(inputs))
    for i, name in enumerate(pack.FIELDS):
        wrong = fields[i] ^ 1 if fields[i].dtype == torch.bool else (fields[i].double() + 1).to(fields[i].dtype)
        with pytest.raises(AssertionError, match=name):
            pack.check(inputs, [*fields[:i], wrong, *fields[i + 1 :]])


@pytest.mark.parametrize("work", policy.WORKS)
def test_policy_check_sees_what_is_wrong(work: str) -> None:
    """And every implementation has the definition's loss and gradient."""
    config = policy.WORKS[work]
    inputs = policy.make(config, 1500, CPU, 0)
    for bind in (policy.ours, policy.per_sample):
        loss, grad, metrics = bind(config, inputs)()
        policy.check(config, inputs, (loss, grad, metrics))
    for wrong, words in (
        ((loss + 1, grad, metrics), "loss"),
        ((loss, grad * 1.1, metrics), "gradient"),
        ((loss, grad, policy.ours(config, inputs)()[2] + 1), "metrics"),
    ):
        with pytest.raises(AssertionError, match=words):
            policy.check(config, inputs, wrong)
