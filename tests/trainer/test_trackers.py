"""A run's numbers where people look: real event files, a real scrape, and what happens when one of them fails."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pacenote.trainer import trackers
from pacenote.trainer.trackers import TrackConfig, Trackers, flat

ROW = {
    "step": 3, "reward_mean": 0.5, "reward_std": None, "loss": float("nan"), "exact": True,
    "gap_by": {"role": {"assistant": {"k3_kl": 1e-3}}}, "layers": [0.25, 0.75],
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_flat() -> None:
    assert dict(flat(ROW)) == {
        "step": 3, "reward_mean": 0.5, "gap_by/role/assistant/k3_kl": 1e-3, "layers/0": 0.25, "layers/1": 0.75,
    }  # fmt: skip


def test_tensorboard(tmp_path: Path) -> None:
    with Trackers(TrackConfig(tensorboard=True), tmp_path) as tracked:
        tracked.log(3, ROW)
        tracked.log(4, {**ROW, "reward_mean": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward_mean")] == [(3, 0.5), (4, 0.75)]
    assert "gap_by/role/assistant/k3_kl" in events.Tags()["scalars"]
    assert "loss" not in events.Tags()["scalars"]


def test_prometheus(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/metrics"
    with Trackers(TrackConfig(prometheus_port=port), tmp_path) as tracked:
        tracked.log(3, ROW)
        tracked.log(4, {**ROW, "reward_mean": 0.75})
        said = httpx.get(url).text
    assert "pacenote_train_reward_mean 0.75" in said
    assert "pacenote_train_step 4.0" in said
    assert "pacenote_train_gap_by_role_assistant_k3_kl 0.001" in said
    with pytest.raises(httpx.HTTPError):
        httpx.get(url)
    with Trackers(TrackConfig(prometheus_port=port), tmp_path):
        assert httpx.get(url).status_code == 200, "the port was freed"


def test_a_taken_port_is_said_before_the_run(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"--track\.prometheus-port: it did not start \(OSError: .*in use"):
            Trackers(TrackConfig(prometheus_port=taken.getsockname()[1]), tmp_path)


class Wandb(ModuleType):
    """Weights & Biases, as its documentation describes init and log; its own service is not here."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.said: list[Any] = []

    def init(self, **words: Any) -> Wandb:
        self.said.append(words)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if step == 5:
            raise ConnectionError("gone")
        self.said.append((step, numbers["reward_mean"]))

    def finish(self) -> None:
        self.said.append("finished")


def test_one_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with Trackers(TrackConfig(wandb="moe", tensorboard=True), tmp_path / "a-run") as tracked:
        tracked.log(4, ROW)
        with pytest.warns(UserWarning, match=r"--track\.wandb failed at step 5 and is left out: gone"):
            tracked.log(5, ROW)
        tracked.log(6, ROW)
    assert wandb.said == [
        {"project": "moe", "id": "a-run", "dir": str(tmp_path / "a-run"), "resume": "allow"}, (4, 0.5), "finished",
    ]  # fmt: skip
    events = EventAccumulator(str(tmp_path / "a-run" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("reward_mean")] == [4, 5, 6]


def test_what_is_not_installed_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--track\.wandb expects wandb, which is not installed: pip install wandb"):
        trackers.check(TrackConfig(wandb="moe"))
    with pytest.raises(ValueError, match="pip install tensorboard"):
        trackers.check(TrackConfig(tensorboard=True))
    trackers.check(TrackConfig())
