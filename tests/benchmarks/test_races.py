"""Races: results that differ are seen, and so are those that are not written at all."""

from __future__ import annotations

import sys
from itertools import count

import pytest
import torch

from benchmarks import races

CPU, NAN = torch.device("cpu"), float("nan")


def test_the_same_bits() -> None:
    assert races.race(lambda: (torch.tensor([NAN, -0.0]), torch.tensor([True])), CPU, 4) == (4, 0)


def test_differences_are_counted() -> None:
    turn, sign = count(), count()
    assert races.race(lambda: (torch.tensor(next(turn) == 3),), CPU, 5) == (5, 1)
    assert races.race(lambda: (torch.tensor([0.0 if next(sign) % 2 else -0.0]),), CPU, 4) == (4, 2)


def test_what_is_not_written_is_seen() -> None:
    memory = torch.arange(4)
    assert races.race(lambda: (memory.view(4),), CPU, 3) == (3, 3)


def test_time_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races, "SECONDS", -1.0)
    assert races.race(lambda: (torch.zeros(1),), CPU, 5) == (0, 0)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--only", "glm-4.7-flash", "--tokens", "9", "--repeats", "2"], 0, "13 raced on cpu with 9 tokens; 0 differ"),
        (["--only", "nothing of the sort"], 1, "0 raced"),
        (["--seconds", "-1"], 1, "0 raced"),
    ],
)
def test_main(
    words: list[str], status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["races", *words])
    assert races.main() == status
    assert said in capsys.readouterr().out


def test_every_subject_runs() -> None:
    names = [name for name, make in races.subjects(CPU, 5) if all(x.numel() for x in make()())]
    assert {name.split()[0] for name in names} == {
        "logprob", "permute", "pack", "segment", "route", "policy", "step",
    }  # fmt: skip
    assert len(names) == len(set(names)) > 40
