"""The model behind the embedded engine: loading, ragged prefill, one-token decode, routes, new weights in place.

Legend: B rows, W padded prompt length (tokens), V vocabulary, L MoE layers, K experts a token.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pacenote.replay.hf import Replay, attach
from pacenote.replay.spec import RoutingGeometry, geometry_from_config
from pacenote.rollout.slot_cache import SlotCache, decode_mask, prefill_mask

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


class ModelError(ValueError):
    """A model directory that the engine cannot serve or load weights from, in one sentence."""


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
        self._experts = _experts_by_phase(experts, self.device.type)
        self._phase = -1

    def prefill(
        self, first: int, sequences: Sequence[Sequence[int]], *, record: bool
    ) -> tuple[torch.Tensor, list[NDArray[Any]]]:
        """Run B whole sequences into the slots first..first+B-1.

        Returns:
            Logits [B, V] of each sequence's last token, and the sequences' routing rows, each [its length, L, K]
            (an empty list without `record`). Padding never shows in either.
        """
        lengths = [len(tokens) for tokens in sequences]
        rows, width = len(lengths), max(lengths)
        padded = np.zeros((rows, width), dtype=np.int64)
        for row, tokens in enumerate(sequences):
            padded[row, : lengths[row]] = tokens
        ends, which = np.unique(np.asarray(lengths) - 1, return_inverse=True)
        self.cache.begin_prefill(first, width)
        logits, routes = self._forward(
            torch.from_numpy(padded),
            torch.arange(width, device=self.device).expand(rows, width),
            prefill_mask(width, rows, dtype=self.dtype, device=self.device),
            keep=torch.from_numpy(ends).to(self.device),
            phase=0,
            record=record,
        )
        picked = logits[torch.arange(rows, device=self.device), torch.from_numpy(which).to(self.device)]
        return picked, [] if routes is None else [routes[row, :length] for row, length in enumerate(lengths)]

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], *, record: bool
    ) -> tuple[torch.Tensor, list[NDArray[Any]]]:
        """Run one token a row at its position through the slots 0..B-1.

        Returns:
            Logits [B, V] and B routing rows [1, L, K] (an empty list without `record`).
        """
        places = torch.tensor(positions, device=self.device)
        self.cache.begin_decode(places)
        logits, routes = self._forward(
            torch.tensor(tokens)[:, None],
            places[:, None],
            decode_mask(places, dtype=self.dtype),
            keep=1,
            phase=1,
            record=record,
        )
        return logits[:, -1], [] if routes is None else list(routes)

    def _forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        *,
        keep: int | torch.Tensor,
        phase: int,
        record: bool,
    ) -> tuple[torch.Tensor, NDArray[Any] | None]:
        if phase != self._phase:
            self._phase = phase
            self.model.set_experts_implementation(self._experts[phase])
        arguments: dict[str, Any] = {self._cache_name: self.cache}
        with torch.inference_mode(), self._replay.record() if record else contextlib.nullcontext() as recorded:
            output = self.model(
                input_ids=ids.to(self.device),
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                logits_to_keep=keep,
                **arguments,
            )
            rows = None if recorded is None else _narrow(recorded.rows(), ids, self.geometry)
        return output.logits, rows

    def load_weights(self, path: Path) -> None:
        """Copy the weights saved in `path` over the present ones, all or none.

        Raises:
            ModelError: the directory cannot be read or holds another model; the present weights stay.
        """
        if read_config(path).get("model_type") != self.fields.get("model_type"):
            raise ModelError(f"expected a {self.fields.get('model_type')} model, got another one in {path}")
        fresh = _load(path, self.dtype).state_dict()
        present = self.model.state_dict()
        if fresh.keys() != present.keys():
            names = sorted(fresh.keys() ^ present.keys())
            raise ModelError(f"expected the parameters of the running model, {path} differs in {names[0]}")
        for name, tensor in present.items():
            if fresh[name].shape != tensor.shape:
                raise ModelError(
                    f"expected {name} of shape {list(tensor.shape)}, got {list(fresh[name].shape)} in {path}"
                )
        with torch.no_grad():
            for name, tensor in present.items():
                tensor.copy_(fresh[name])
        self.path = path


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
