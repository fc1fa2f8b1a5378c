"""A run's numbers in the tools that people watch: TensorBoard, Weights & Biases, Prometheus. metrics.jsonl is the
record; these follow it, and one that fails is left out and said once, since a week's run must not end for a picture.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackConfig:
    """Where numbers go beside metrics.jsonl."""

    tensorboard: bool = False
    """Event files in the run's folder, tensorboard/."""
    wandb: str | None = None
    """Project of Weights & Biases; its own environment variables say the rest, WANDB_MODE=offline among them."""
    prometheus_port: int | None = None
    """Port of 127.0.0.1 that Prometheus may read the last step's numbers at, as pacenote_train_<name>."""


class Tracker(Protocol):
    """Takes a step's numbers."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Of one step."""
        ...

    def close(self) -> None:
        """The run is over."""
        ...


class TensorBoard:
    """Event files. Steps that are run again after a resume stand twice in them; TensorBoard shows the later."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """A scalar for each number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, of the name of the run's folder: a resumed run goes on in it."""

    def __init__(self, project: str, root: Path) -> None:
        import wandb

        self._run: Any = wandb.init(project=project, id=root.name, dir=str(root), resume="allow")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """A step's numbers."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Prometheus:
    """Gauges of the last step at http://127.0.0.1:PORT/metrics."""

    def __init__(self, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._registry = CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        self._server, self._thread = start_http_server(port, "127.0.0.1", self._registry)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Set the gauges."""
        from prometheus_client import Gauge

        for name, value in {**numbers, "step": step}.items():
            plain = "".join(letter if letter.isalnum() else "_" for letter in name)
            if plain not in self._gauges:
                self._gauges[plain] = Gauge(f"pacenote_train_{plain}", name, registry=self._registry)
            self._gauges[plain].set(value)

    def close(self) -> None:
        """Free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Trackers:
    """All that are asked for. A context manager."""

    def __init__(self, config: TrackConfig, root: Path) -> None:
        """Open them.

        Raises:
            ValueError: one is not installed, or cannot start.
        """
        self._open: dict[str, Tracker] = {}
        with ExitStack() as stack:
            stack.callback(self.close)
            for name, start in _wanted(config, root):
                try:
                    self._open[name] = start()
                except Exception as error:
                    raise ValueError(f"--track.{name}: it did not start ({type(error).__name__}: {error})") from error
            stack.pop_all()

    def log(self, step: int, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl, in flat numbers."""
        numbers = dict(flat(row))
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(step, numbers)
            except Exception as error:
                del self._open[name]
                with contextlib.suppress(Exception):
                    tracker.close()
                warnings.warn(f"--track.{name} failed at step {step} and is left out: {error}", stacklevel=2)

    def close(self) -> None:
        """Close them."""
        for name, tracker in self._open.items():
            try:
                tracker.close()
            except Exception as error:
                warnings.warn(f"--track.{name} did not close: {error}", stacklevel=2)
        self._open = {}

    def __enter__(self) -> Trackers:
        """The trackers themselves."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close them."""
        self.close()


def check(config: TrackConfig) -> None:
    """Before anything is started.

    Raises:
        ValueError: something is asked for that is not installed.
    """
    for flag, asked, module in (
        ("tensorboard", config.tensorboard, "tensorboard"),
        ("wandb", config.wandb is not None, "wandb"),
    ):
        if asked and importlib.util.find_spec(module) is None:
            raise ValueError(f"--track.{flag} expects {module}, which is not installed: pip install {module}")


def _wanted(config: TrackConfig, root: Path) -> Iterator[tuple[str, Callable[[], Tracker]]]:
    project, port = config.wandb, config.prometheus_port
    if config.tensorboard:
        yield "tensorboard", lambda: TensorBoard(root / "tensorboard")
    if project is not None:
        yield "wandb", lambda: WandB(project, root)
    if port is not None:
        yield "prometheus-port", lambda: Prometheus(port)


def flat(row: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Names and finite numbers of a row; what is nested has its path for a name: gap_by/role/assistant/k3_kl."""
    for name, value in row.items():
        path = f"{above}{name}"
        if isinstance(value, dict):
            yield from flat(value, f"{path}/")
        elif isinstance(value, list):
            yield from flat({str(number): item for number, item in enumerate(value)}, f"{path}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield path, value
