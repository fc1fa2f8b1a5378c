"""The models that recipes start from: a directory with config, weights and tokenizer, as `from_pretrained` reads it."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM
from transformers.core_model_loading import revert_weight_conversion

TOKENIZER = Path(__file__).resolve().parent / "assets" / "tiny_tokenizer"
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")  # GLM-4.7's generation_config.json


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyShape:
    """Shape of a GLM-4.7-Flash in miniature; names and meanings as in `Glm4MoeLiteConfig`.

    The first layer is dense and the others are sparse. `initializer_range` is far above the usual 0.02: it keeps the
    router's scores apart, so that a random init routes as decidedly as a trained model does.
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    moe_intermediate_size: int = 32
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    n_routed_experts: int = 16
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    q_lora_rank: int = 32
    kv_lora_rank: int = 16
    qk_rope_head_dim: int = 8
    qk_nope_head_dim: int = 16
    v_head_dim: int = 16
    max_position_embeddings: int = 512
    initializer_range: float = 0.15


def tiny_config(shape: TinyShape) -> Glm4MoeLiteConfig:
    """The config of such a model, with the tiny tokenizer's vocabulary."""
    tokens = _token_ids()
    fields: dict[str, Any] = {name: getattr(shape, name) for name in TinyShape.__slots__}
    return Glm4MoeLiteConfig(
        vocab_size=len(tokens),
        num_key_value_heads=shape.num_attention_heads,
        pad_token_id=tokens["<|endoftext|>"],
        bos_token_id=None,
        eos_token_id=[tokens[name] for name in STOP_TOKENS],
        first_k_dense_replace=1,  # SGLang reads this where transformers reads mlp_layer_types
        **fields,
    )


def build_tiny(out: Path, *, seed: int, shape: TinyShape | None = None) -> Path:
    """Write a randomly initialised `Glm4MoeLiteForCausalLM` with the tiny GLM-4.7-format tokenizer.

    Args:
        out: directory to create: config.json, generation_config.json, model.safetensors and the tokenizer files.
        seed: seed of the initial weights; the caller's generator is left as it was.
        shape: the model's shape.

    Returns:
        `out`. Weights are float32; the routers' score-correction bias [E] is drawn too, so that selection and weight
        really use different scores, as in a trained model.
    """
    config = tiny_config(shape or TinyShape())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Glm4MoeLiteForCausalLM(config)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.02)
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    out.mkdir(parents=True, exist_ok=True)
    save(model, out)
    return out


def save(
    model: torch.nn.Module,
    out: Path,
    *,
    tokenizer_from: Path = TOKENIZER,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights, config and tokenizer files to the directory `out` (overwriting), ready for an engine to load.

    Args:
        model: what is written.
        out: the directory.
        tokenizer_from: a model directory.
        state: the model's state dict, tensors [...], where its own is in pieces, or another's.

    Raises:
        OSError: it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(out, state_dict=state)  # type: ignore[operator]
    except SafetensorError as error:  # which says so of a full disk
        raise OSError(errno.EIO, str(error), str(out)) from error
    copy_files(tokenizer_from, out, configs=False)


def copy_files(model: Path, out: Path, *, configs: bool = True) -> None:
    """Copy a model directory's tokenizer to another one, and its configs."""
    named = [model / name for name in ("config.json", "generation_config.json") if configs and (model / name).is_file()]
    for file in (*tokenizer_files(model), *named):
        if file.parent.resolve() != out.resolve():
            shutil.copyfile(file, out / file.name)


def disk_tensors(model: Any, state: dict[str, torch.Tensor] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers [...] under the names that `save` gives them, which engines know: one for each expert.
    Those of `state`, where the model's own state dict is another's."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    whole = model.state_dict() if state is None else state
    kept = {name: tensor for name, tensor in whole.items() if name not in tied}
    yield from revert_weight_conversion(model, kept).items()


def tokenizer_files(directory: Path) -> list[Path]:
    """The tokenizer's own files in a model directory."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "vocab.json",
             "merges.txt", "added_tokens.json", "tokenizer.model")  # fmt: skip
    return [directory / name for name in names if (directory / name).is_file()]


def load(directory: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Load a causal language model for training; eager experts, which are the fastest for small shapes on a CPU.

    Raises:
        ValueError: the directory is not a saved model.
    """
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"expected a model directory with config.json, got {directory}: give the path of a saved model"
        )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    if device == "cpu":
        model.set_experts_implementation("eager")
    return model.to(device)


def _token_ids() -> dict[str, int]:
    table = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    ids = dict(table["model"]["vocab"])
    ids.update({entry["content"]: entry["id"] for entry in table["added_tokens"]})
    return ids
