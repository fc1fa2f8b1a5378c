"""The run folder: where everything that a run leaves behind has its place."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pacenote.trainer import config as configs
from pacenote.trainer.config import RunConfig
from pacenote.trainer.episode import Episode


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of a run: config.json, metrics.jsonl, samples/, checkpoints/, weights/, logs/, report.html."""

    root: Path

    @property
    def config(self) -> Path:
        """The run's configuration."""
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Conversations as readable text."""
        return self.root / "samples"

    @property
    def checkpoints(self) -> Path:
        """Whole states of the run."""
        return self.root / "checkpoints"

    @property
    def weights(self) -> Path:
        """Model directories that engines load, the last two versions."""
        return self.root / "weights"

    @property
    def logs(self) -> Path:
        """What the engine and the session server wrote."""
        return self.root / "logs"

    @property
    def report(self) -> Path:
        """The page to look at."""
        return self.root / "report.html"

    @classmethod
    def create(cls, config: RunConfig) -> RunDir:
        """Make the folder of a new run. Only `begin` makes it a run.

        Raises:
            ValueError: the folder already holds a run, or cannot be made.
        """
        root = config.out or Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        run = cls(root.resolve())
        if run.config.exists():
            raise ValueError(f"--out {root} already holds a run; choose another folder, or go on with --resume {root}")
        try:
            for path in (run.root, run.samples, run.checkpoints, run.weights, run.logs):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {root}: cannot make the run folder ({error.strerror})") from error
        return run

    def begin(self, config: RunConfig) -> RunDir:
        """Write the configuration, once all that it names was found to be there."""
        self.config.write_text(configs.dump(config), encoding="utf-8")
        return self

    @classmethod
    def open(cls, root: Path) -> tuple[RunDir, RunConfig]:
        """The folder of an earlier run and its configuration.

        Raises:
            ValueError: there is no run in it.
        """
        run = cls(root.resolve())
        if not run.config.is_file():
            raise ValueError(f"{root} is not a run folder: it has no config.json")
        return run, configs.parse(run.config.read_text(encoding="utf-8"))

    def write_environment(self, *, device: str, moe_layers: tuple[int, ...]) -> None:
        """Write what the run ran on: device, versions, and the global ids of the model's MoE layers."""
        facts = {
            "device": device,
            "pacenote": version("pacenote"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        }
        text = json.dumps({"facts": facts, "moe_layers": list(moe_layers)}, indent=2)
        (self.root / "environment.json").write_text(text + "\n", encoding="utf-8")

    def environment(self) -> dict[str, str]:
        """Device and versions; empty before the run wrote them."""
        facts: dict[str, str] = self._environment().get("facts", {})
        return facts

    def moe_layers(self) -> list[int]:
        """Global ids of the MoE layers; empty before the run wrote them."""
        layers: list[int] = self._environment().get("moe_layers", [])
        return layers

    def _environment(self) -> dict[str, Any]:
        path = self.root / "environment.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def write_samples(self, step: int, episodes: list[Episode], count: int = 8) -> None:
        """Write about `count` conversations of a step as text, spread over its prompts."""
        parts = [f"step {step}\n"]
        for number in range(0, len(episodes), max(1, len(episodes) // count)):
            episode = episodes[number]
            worth = "none" if episode.reward is None else f"{episode.reward:.3f}"
            parts.append(f"--- {number}  reward {worth}" + (f"  ({episode.error})" if episode.error else ""))
            for message in episode.messages:
                parts.append(f"{message['role']:>10}: {message.get('content') or ''!s}{_calls(message)}")
            parts.append("")
        path = self.samples / f"step_{step:06d}.txt"
        path.write_text("\n".join(parts), encoding="utf-8", errors="backslashreplace")


def _calls(message: dict[str, object]) -> str:
    calls = message.get("tool_calls")
    return f"  {calls}" if calls else ""
