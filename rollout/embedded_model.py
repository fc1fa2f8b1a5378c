"""The model behind the embedded engine: loading, ragged prefill, one-token decode, routes, new weights in place.

Legend: B rows, W padded prompt length (tokens), D hidden size, V vocabulary, L MoE layers, K experts a token.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from pacenote.replay.exact import Exact
from pacenote.replay.hf import Replay, attach
from pacenote.replay.spec import RoutingGeometry, geometry_from_config
from pacenote.rollout.slot_cache import SlotCache, decode_mask, prefill_mask

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


class ModelError(ValueError):
    """A model directory that the engine cannot serve or load weights from, in one sentence."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a forward pass gives.

    Attributes:
        logits: [B, V] of each row's last token.
        routes: B routing rows [tokens, L, K] if they were recorded, else none.
        hidden: [B, D] that the logits come from, if the engine is exact.
    """

    logits: torch.Tensor
    routes: list[NDArray[Any]]
    hidden: torch.Tensor | None = None


class Runner:
    """A mixture-of-experts causal language model with a slot cache.

    Args:
        path: directory with config.json, weights and tokenizer.
        dtype: "bfloat16", "float32" or "float16".
        device: torch device.
        slots: requests that can run at once.
        context_length: longest request in tokens; None takes the model's own limit.
        experts: experts implementation of transformers, or "auto": grouped_mm for prompts, batched_mm for single
            tokens on a CPU (measured fastest there), grouped_mm throughout on a GPU.
        exact: compute in a form in which no number depends on the batch; see `replay.exact`.

    Raises:
        ModelError: no model there, not a mixture of experts, or layers that the slot cache does not know.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        slots: int = 64,
        context_length: int | None = None,
        experts: str = "auto",
        exact: bool = False,
    ) -> None:
        fields = read_config(path)
        self.geometry = _geometry(fields, path)
        _refuse_windows(fields, path)
        self.path = path
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device)
        self.model: Any = _load(path, self.dtype).to(self.device).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.fields = fields
        self.vocab_size = int(self.model.config.get_text_config().vocab_size)
        limit = int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 4096))
        self.context_length = min(context_length or limit, limit)
        self.stop_ids = _stop_ids(path, fields, self.tokenizer)
        self.cache = SlotCache(num_layers=self.geometry.num_layers, slots=slots, max_len=self.context_length)
        self._replay = _attach(self.model, path)
        self._cache_name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        self._exact = _exact(self.model, path) if exact else None
        self._experts = ("eager", "eager") if exact else _experts_by_phase(experts, self.device.type)
        self._phase = -1

    def prefill(self, first: int, sequences: Sequence[Sequence[int]], *, record: bool) -> Step:
        """Run B whole sequences into the slots first..first+B-1; the step's rows are [a sequence's length, L, K].

        Padding never shows in the result.
        """
        lengths = [len(tokens) for tokens in sequences]
        rows, width = len(lengths), max(lengths)
        padded = np.zeros((rows, width), dtype=np.int64)
        for row, tokens in enumerate(sequences):
            padded[row, : lengths[row]] = tokens
        self.cache.begin_prefill(first, width)
        step = self._forward(
            torch.from_numpy(padded),
            torch.arange(width, device=self.device).expand(rows, width),
            prefill_mask(width, rows, dtype=self.dtype, device=self.device),
            ends=np.asarray(lengths) - 1,
            phase=0,
            record=record,
        )
        return replace(step, routes=[rows[:length] for rows, length in zip(step.routes, lengths, strict=False)])

    def decode(self, tokens: Sequence[int], positions: Sequence[int], *, record: bool) -> Step:
        """Run one token a row at its position through the slots 0..B-1; the step's rows are [1, L, K]."""
        places = torch.tensor(positions, device=self.device)
        self.cache.begin_decode(places)
        return self._forward(
            torch.tensor(tokens)[:, None],
            places[:, None],
            decode_mask(places, dtype=self.dtype),
            ends=np.zeros(len(tokens), dtype=np.int64),
            phase=1,
            record=record,
        )

    def logprobs(self, step: Step, tokens: Sequence[int], temperatures: Sequence[float]) -> list[float] | None:
        """The trainer's own logprobs of `tokens` [B] after an exact step; None if the engine is not exact."""
        if self._exact is None or step.hidden is None:
            return None
        heat = torch.tensor(temperatures, device=self.device)
        with torch.no_grad():
            logprob, _ = self._exact.logprobs(step.hidden, torch.tensor(tokens, device=self.device), heat)
        values: list[float] = logprob.tolist()
        return values

    def no_rows(self, count: int) -> NDArray[Any]:
        """Zeros [count, L, K], of tokens that this engine never computed."""
        geometry = self.geometry
        dtype = np.uint8 if geometry.num_experts <= 256 else np.uint16
        return np.zeros((count, len(geometry.layers), geometry.top_k), dtype)

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        *,
        ends: NDArray[np.int64],
        phase: int,
        record: bool,
    ) -> Step:
        """One step; `ends` [B] is the place in a row of the token whose logits are wanted."""
        if phase != self._phase:
            self._phase = phase
            self.model.set_experts_implementation(self._experts[phase])
        arguments: dict[str, Any] = {
            "input_ids": ids.to(self.device),
            "position_ids": positions,
            "attention_mask": mask,
            "use_cache": True,
            self._cache_name: self.cache,
        }
        # An exact step without inference_mode, under which every operation arrives whole and is taken apart in Python.
        mode = torch.inference_mode() if self._exact is None else torch.no_grad()
        with mode, self._replay.record() if record else contextlib.nullcontext() as recorded:
            if self._exact is None:
                logits, hidden = self._logits(arguments, ends), None
            else:
                hidden = self._hidden(self._exact, arguments, ends)
                logits = self._exact.logits(hidden)
            rows = [] if recorded is None else list(_narrow(recorded.rows(), ids, self.geometry))
        return Step(logits, rows, hidden)

    def _logits(self, arguments: dict[str, Any], ends: NDArray[np.int64]) -> torch.Tensor:
        places, which = (torch.from_numpy(part).to(self.device) for part in np.unique(ends, return_inverse=True))
        logits = self.model(**arguments, logits_to_keep=places).logits
        picked: torch.Tensor = logits[torch.arange(len(ends), device=self.device), which]
        return picked

    def _hidden(self, exact: Exact, arguments: dict[str, Any], ends: NDArray[np.int64]) -> torch.Tensor:
        with exact.forward():
            hidden = self.model.base_model(**arguments).last_hidden_state
        picked: torch.Tensor = hidden[torch.arange(len(ends), device=self.device), torch.from_numpy(ends)]
        return picked

    def load_weights(self, path: Path) -> None:
        """Copy the weights saved in `path` over the present ones, all or none.

        Raises:
            ModelError: the directory cannot be read or holds another model; the present weights stay.
        """
        if read_config(path).get("model_type") != self.fields.get("model_type"):
            raise ModelError(f"expected a {self.fields.get('model_type')} model, got another one in {path}")
        self._take(_load(path, self.dtype), f"the weights in {path}")
        self.path = path

    def load_tensors(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Copy tensors over the present ones, all or none.

        Args:
            tensors: names as `save_pretrained` writes them, of the whole model or a part.

        Raises:
            ModelError: a name or a shape that the model does not have; the present weights stay.
        """
        saved = revert_weight_conversion(self.model, self.model.state_dict())
        for name, tensor in tensors:
            if name not in saved or saved[name].shape != tensor.shape:
                known = f"of shape {list(saved[name].shape)}" if name in saved else "to be one of the model's tensors"
                raise ModelError(f"expected {name} {known}, got {list(tensor.shape)}")
            saved[name] = tensor
        whole = {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor for name, tensor in saved.items()
        }
        made = type(self.model).from_pretrained(None, config=self.model.config, state_dict=whole, dtype=self.dtype)
        self._take(made, "the tensors")

    def _take(self, other: Any, what: str) -> None:
        """Copy the other model's parameters and buffers."""
        fresh, present = other.state_dict(), self.model.state_dict()
        if fresh.keys() != present.keys():
            names = sorted(fresh.keys() ^ present.keys())
            raise ModelError(f"expected the parameters of the running model, {what} differ in {names[0]}")
        for name, tensor in present.items():
            if fresh[name].shape != tensor.shape:
                raise ModelError(
                    f"expected {name} of shape {list(tensor.shape)}, got {list(fresh[name].shape)} in {what}"
                )
        with torch.no_grad():
            for name, tensor in present.items():
                tensor.copy_(fresh[name])


def read_config(path: Path) -> dict[str, Any]:
    """The directory's config.json.

    Raises:
        ModelError: no directory, no config.json or not a JSON object.
    """
    if not path.is_dir():
        raise ModelError(f"no directory {path}: give the path of a saved model")
    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path / 'config.json'}: give the path of a saved model ({error})") from error
    if not isinstance(fields, dict):
        raise ModelError(f"expected a JSON object in {path / 'config.json'}, got {type(fields).__name__}")
    return fields


def _geometry(fields: dict[str, Any], path: Path) -> RoutingGeometry:
    try:
        return geometry_from_config(fields)
    except ValueError as error:
        raise ModelError(f"{path} is not a mixture-of-experts model that routes can be recorded of: {error}") from error


def _attach(model: torch.nn.Module, path: Path) -> Replay:
    try:
        return attach(model)
    except ValueError as error:
        raise ModelError(f"cannot record the routes of {path}: {str(error).splitlines()[0]}") from error


def _exact(model: torch.nn.Module, path: Path) -> Exact:
    try:
        return Exact(model)
    except ValueError as error:
        raise ModelError(f"cannot serve {path} exactly: {error}") from error


def _refuse_windows(fields: dict[str, Any], path: Path) -> None:
    """The engine passes one causal mask to every layer, so layers with another mask or no cache are refused."""
    others = sorted(set(fields.get("layer_types") or ()) - {"full_attention"})
    if others or (fields.get("sliding_window") and fields.get("use_sliding_window", True)):
        kinds = ", ".join(others) or "sliding_attention"
        raise ModelError(f"{path} has {kinds} layers; the embedded engine serves full attention only")


def _load(path: Path, dtype: torch.dtype) -> Any:
    """A model from disk; every parameter must be in the files, because transformers would draw a missing one."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise ModelError(f"cannot load the weights in {path}: {str(error).splitlines()[0]}") from error
    for kind in ("missing_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            raise ModelError(
                f"the weights in {path} do not fit its config: {kind} {sorted(map(str, report[kind]))[:3]}"
            )
    return model


def _stop_ids(path: Path, fields: dict[str, Any], tokenizer: Any) -> frozenset[int]:
    """End tokens of config.json, generation_config.json and the tokenizer together, as SGLang collects them."""
    sources: list[Any] = [fields.get("eos_token_id"), tokenizer.eos_token_id]
    if (path / "generation_config.json").is_file():
        sources.append(GenerationConfig.from_pretrained(path).eos_token_id)
    ids: set[int] = set()
    for source in sources:
        ids.update([source] if isinstance(source, int) else source or ())
    return frozenset(ids)


def _experts_by_phase(name: str, device: str) -> tuple[str, str]:
    if name != "auto":
        return name, name
    return ("grouped_mm", "batched_mm") if device == "cpu" else ("grouped_mm", "grouped_mm")


def _narrow(rows: torch.Tensor, ids: torch.Tensor, geometry: RoutingGeometry) -> NDArray[Any]:
    """Recorded experts [B, W, L, K] on the host, uint8 if the model has at most 256 experts, else uint16."""
    shape = (*ids.shape, len(geometry.layers), geometry.top_k)
    dtype = np.uint8 if geometry.num_experts <= 256 else np.uint16
    return rows.reshape(shape).cpu().numpy().astype(dtype)
