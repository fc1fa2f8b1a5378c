"""What replay can do for a model: which layers route, by which spec, and whether recorded routes replay exactly.

The question is answered by trying: a small random model of the same architecture records its routes and replays them,
and logits and gradients must be the same to the last bit. Other routes must arrive, and change the output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pacenote.kernels.spec import RouterSpec
from pacenote.replay.errors import ReplayError, UnsupportedModel
from pacenote.replay.families import FAMILIES, Config
from pacenote.replay.hf import Replay, attach
from pacenote.replay.spec import RoutingGeometry, geometry_from_config, refusal, router_spec, text_config
from pacenote.replay.tiny import tiny_model, to_dtype

Verdict = Literal["exact", "not exact", "cannot tell"]
STATUS: dict[Verdict, int] = {"exact": 0, "not exact": 1, "cannot tell": 2}
"""Exit status of `pacenote doctor`."""

_BATCH, _LENGTH = 2, 8
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One try.

    Attributes:
        subject: "a small random model" or "the model", and its dtype.
        logits: largest absolute difference between recording and replaying; None if it did not come so far.
        gradients: the same; None where no backward pass was run.
        why: what went wrong; None if it is exact.
    """

    subject: str
    logits: float | None
    gradients: float | None
    why: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What `diagnose` found. `geometry` and `spec` are None where the config does not say; `why` None if exact.

    `training`: what the model does in training that no engine does; None if nothing is known.
    """

    model: str
    family: str
    verdict: Verdict
    why: str | None
    geometry: RoutingGeometry | None = None
    spec: RouterSpec | None = None
    training: str | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def status(self) -> int:
        """0 exact, 1 not, 2 cannot tell."""
        return STATUS[self.verdict]

    def json(self) -> str:
        """One JSON object, with the same parts."""
        return json.dumps({**asdict(self), "status": self.status}, allow_nan=False)

    def text(self) -> str:
        """Some lines to read."""
        lines = [("model", f"{self.model} ({self.family})")]
        if self.geometry is not None:
            lines += [("routes in", where(self.geometry)), ("experts", how_many(self.geometry))]
        if self.spec is not None:
            lines.append(("weights", how(self.spec)))
        if self.training is not None:
            lines.append(("training", self.training))
        for trial in self.trials:
            lines.append(("tried", f"{trial.subject}: {_said(trial)}"))
        lines.append(("replay", self.verdict if self.why is None else f"{self.verdict}: {self.why}"))
        return "\n".join(f"{name:<10} {value}" for name, value in lines)


def diagnose(model: Path, *, weights: bool = False) -> Diagnosis:
    """Examine a model.

    Args:
        model: a folder with a `config.json`, or such a file.
        weights: load the model's own weights too, and try it with them. Without, no weight is read.

    Raises:
        ValueError: there is no such file, or it is no JSON object.
    """
    config = read_config(model)
    family, name = str(text_config(config).get("model_type")), str(model)
    try:
        geometry, spec = geometry_from_config(config), router_spec(config)
    except UnsupportedModel as error:
        if known := refusal(config):
            return Diagnosis(model=name, family=family, verdict="not exact", why=known)
        unknown = f"no router of {family} is known: it has no experts, or stands in no line of replay/families.py"
        why = str(error) if family in FAMILIES else unknown
        return Diagnosis(model=name, family=family, verdict="cannot tell", why=why)
    trials: list[Trial] = []

    def found(verdict: Verdict, why: str | None) -> Diagnosis:
        return Diagnosis(
            model=name,
            family=family,
            verdict=verdict,
            why=why,
            geometry=geometry,
            spec=spec,
            training=in_training(config, spec),
            trials=tuple(trials),
        )

    with _quiet():
        for dtype in _DTYPES:
            try:
                small = to_dtype(tiny_model(config), dtype)
            except UnsupportedModel as error:
                return found("cannot tell", str(error))
            trials.append(attempt(small, f"a small random model, {_name(dtype)}"))
        if weights:
            try:
                whole = _load(model if model.is_dir() else model.parent, config)
            except Exception as error:  # whatever keeps it from loading, the answer is the same
                return found("cannot tell", f"the model does not load: {type(error).__name__}: {error}")
            trials.append(attempt(whole, f"the model, {_name(next(whole.parameters()).dtype)}", backward=False))
    failed = [trial for trial in trials if trial.why is not None]
    return found("not exact", f"{failed[0].subject}: {failed[0].why}") if failed else found("exact", None)


def read_config(model: Path) -> Config:
    """The parsed `config.json` of a folder, or of the file itself.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    path = model / "config.json" if model.is_dir() else model
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"expected a model folder or its config.json, got {model}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got text that is not: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(config).__name__}")
    return config


def attempt(model: nn.Module, subject: str, *, backward: bool = True) -> Trial:
    """Record routes, replay them, then replay others, which must arrive and change the output. Never raises."""
    try:
        replay = attach(model)
    except ReplayError as error:
        return Trial(subject=subject, logits=None, gradients=None, why=str(error))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on several, attention's backward pass does not repeat its own bits
    try:
        return _attempt(model, replay, subject, backward)
    except Exception as error:  # a model that cannot run is an answer, too
        why = f"{type(error).__name__}: {error}"
        return Trial(subject=subject, logits=None, gradients=None, why=why)
    finally:
        torch.set_num_threads(threads)
        replay.detach()


def _attempt(model: nn.Module, replay: Replay, subject: str, backward: bool) -> Trial:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 64, (_BATCH, _LENGTH), generator=generator).to(next(model.parameters()).device)
    with replay.record() as recording:
        logits, grads = _step(model, tokens, backward)
    own = recording.rows()
    with replay.rows(own):
        again, grads_again = _step(model, tokens, backward)
    off, off_grads = _largest([logits], [again]), _largest(grads, grads_again) if backward else None
    experts = replay.geometry.num_experts
    other = (own + 1) % experts
    with replay.rows(other), replay.record() as replayed:
        moved, _ = _step(model, tokens, False)
    why = None
    if off or off_grads:
        why = "replaying the recorded routes gives another output"
    elif not torch.equal(replayed.rows(), other):
        why = "other routes do not arrive at the routers"
    elif replay.geometry.top_k < experts and torch.equal(moved, logits):
        why = "other routes change nothing: the experts do not follow the router's output"
    return Trial(subject=subject, logits=off, gradients=off_grads, why=why)


def _step(model: nn.Module, tokens: Tensor, backward: bool) -> tuple[Tensor, list[Tensor]]:
    """First output of the model, and gradients of every parameter that has one."""
    model.zero_grad()
    with torch.set_grad_enabled(backward):
        out = model(input_ids=tokens, use_cache=False)[0]
    if backward:
        out.float().square().mean().backward()
    return out.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def _largest(a: list[Tensor], b: list[Tensor]) -> float:
    return max((float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0)


def _load(folder: Path, config: Config) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForCausalLM if text_config(config) is config else AutoModelForImageTextToText
    model: nn.Module = kind.from_pretrained(folder, dtype="auto").eval()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that transformers writes about small or unusual configs."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def where(geometry: RoutingGeometry) -> str:
    """The MoE layers in words, runs of ids joined: "46 of 47 layers: 1-46"."""
    ids = geometry.layers
    edges = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(ids)) if b != a + 1), len(ids)]
    spans = [(ids[start], ids[stop - 1]) for start, stop in pairwise(edges)]
    listed = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"{len(ids)} of {geometry.num_layers} layers: {listed}"


def how_many(geometry: RoutingGeometry) -> str:
    """Experts in words, and what a recorded token weighs."""
    size = len(geometry.layers) * geometry.top_k * (1 if geometry.num_experts <= 256 else 2)
    return f"{geometry.top_k} of {geometry.num_experts} a token; its routes are {size} bytes"


def how(spec: RouterSpec) -> str:
    """A spec in words."""
    words = {
        "softmax": "softmax over all",
        "sigmoid": "sigmoid",
        "softmax_topk": "softmax over the chosen",
        "sparsemixer": f"softmax over what is within {2 * spec.jitter:.3g} of each chosen (sparsemixer)",
    }
    parts = [words[spec.score], "renormalised" if spec.renormalize else "as they are"]
    if spec.scale != 1:
        parts.append(f"times {spec.scale:g}")
    if spec.groups > 1:
        parts.append(f"from {spec.topk_groups} of {spec.groups} groups by {spec.group_score}")
    arithmetic = "in float32" if spec.score_dtype == "float32" else "in the dtype of the logits"
    return ", ".join([*parts, arithmetic])


def in_training(config: Config, spec: RouterSpec) -> str | None:
    """What a model of the config does in training that no engine does, and what becomes of it; None: nothing known."""
    drawn = spec.score == "sparsemixer"
    parts = []
    if drawn:
        parts.append("experts are drawn at random, but inside rows() and record() all rows are routed as in evaluation")
    name = "input_jitter_noise" if drawn else "router_jitter_noise"  # which is sparsemixer's threshold
    noise = text_config(config).get(name)
    if isinstance(noise, int | float) and noise > 0:
        parts.append(f"hidden states are multiplied by noise, replayed or not: set {name} to 0 before loading")
    return "; ".join(parts) or None


def _said(trial: Trial) -> str:
    if trial.logits is None:
        return "refused" if trial.why else "not reached"
    parts = [f"logits differ by {trial.logits:g}"]
    if trial.gradients is not None:
        parts.append(f"gradients by {trial.gradients:g}")
    return ", ".join(parts)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
