"""A megatron-core model's weights in from a transformers checkpoint, and out into one: a weight at a time, each rank
its own part.

Nobody holds the whole model: in, a rank reads what its weights are made of; out, tensor-parallel ranks put a weight
together and one rank of each stage and each set of experts writes files of its own, which an index lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pacenote.trainer.megatron_names import Source, source
from pacenote.trainer.world import World

SHARD = 4 << 30  # bytes of a file
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")  # rows beyond the vocabulary


@dataclass(frozen=True, slots=True)
class Shape:
    """What the config says that no weight shows: groups of heads and channels a head (of grouped attention), whether
    attention is latent, and rows of the vocabulary."""

    groups: int
    channels: int
    mla: bool
    vocab: int

    @classmethod
    def of(cls, hf: Any) -> Shape:
        """Of a transformers config."""
        mla = getattr(hf, "kv_lora_rank", None) is not None
        return cls(hf.num_key_value_heads, 0 if mla else hf.head_dim, mla, hf.vocab_size)


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of this rank.

    Attributes:
        name: with the global numbers of its layer and expert.
        tensor: this rank's part.
        axis: along which tensor-parallel ranks cut it; -1: they all have all of it.
        expert: whether those are the ranks that cut experts.
    """

    name: str
    tensor: Tensor
    axis: int
    expert: bool

    @property
    def group(self) -> Any:
        """The ranks that have the other parts."""
        if self.expert:
            return parallel_state.get_expert_tensor_parallel_group()
        return parallel_state.get_tensor_model_parallel_group()


def weights(chunks: Sequence[Any]) -> Iterator[Weight]:
    """All of this rank, in the order of its chunks."""
    for model in chunks:
        for name, tensor in model.named_parameters():
            expert = "local_experts" in name
            axis = int(getattr(tensor, "partition_dim", -1))
            if not (expert or getattr(tensor, "tensor_model_parallel", False)):
                axis = -1
            yield Weight(_global(model, name), tensor, axis if tensor.ndim > 1 else -1, expert)
        for name, tensor in model.named_buffers():
            if name.endswith("expert_bias"):
                yield Weight(_global(model, name), tensor, -1, False)


def _global(model: Any, name: str) -> str:
    if layer := re.match(r"decoder\.layers\.(\d+)\.", name):
        number = model.decoder.layers[int(layer[1])].layer_number - 1
        name = f"decoder.layers.{number}.{name[layer.end() :]}"
    here = model.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * here
    return re.sub(r"local_experts\.(\d+)", lambda found: f"local_experts.{int(found[1]) + first}", name)


@torch.no_grad()
def load(chunks: Sequence[Any], directory: Path, shape: Shape) -> None:
    """Fill this rank's chunks from a model directory.

    Raises:
        ValueError: it lacks a tensor, or has one of another shape or of eight bits.
    """
    checkpoint = _Checkpoint(directory)
    for weight in weights(chunks):
        origin = source(weight.name, mla=shape.mla)
        whole = origin.whole([checkpoint.read(name) for name in origin.names], shape.groups)
        rank, size = (weight.group.rank(), weight.group.size()) if weight.axis >= 0 else (0, 1)
        if weight.name in PADDED:
            rows = weight.tensor.shape[0] * size
            whole = torch.cat([whole, whole.new_zeros(rows - len(whole), whole.shape[1])])
        part = origin.cut(whole, weight.axis, rank, size)
        if part.shape != weight.tensor.shape:
            raise ValueError(
                f"expected {list(weight.tensor.shape)} of {', '.join(origin.names)} in {directory}, got "
                f"{list(part.shape)}: weights and config.json are of different models"
            )
        weight.tensor.copy_(part)


class _Checkpoint:
    """Tensors of a model directory by name; a file is opened when it is first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._where: dict[str, str] = {}
        for file in sorted(directory.glob("*.safetensors")):
            self._where |= dict.fromkeys(self._opened(file.name).keys(), file.name)

    def _opened(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self._directory / file, framework="pt")
        return self._files[file]

    def read(self, name: str) -> Tensor:
        if name not in self._where:
            raise ValueError(f"expected {name} in the safetensors files of {self._directory}, got none of that name")
        found: Tensor = self._opened(self._where[name]).get_tensor(name)
        if found.element_size() == 1:
            raise ValueError(
                f"expected {name} in {self._directory} as float32, bfloat16 or float16, got {found.dtype}: its scales "
                "are not read, so convert the folder to bfloat16 first"
            )
        return found


@torch.no_grad()
def entries(chunks: Sequence[Any], shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """This rank's stage and experts under their names in a checkpoint, [...] each, on the host. All ranks call it; a
    tensor comes from one rank of those that have it."""
    mine = {
        False: parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0,
        True: parallel_state.get_expert_data_parallel_rank() == 0,
    }
    for weight in weights(chunks):
        origin, group = source(weight.name, mla=shape.mla), weight.group
        whole = _whole(weight, origin) if weight.axis >= 0 and group.size() > 1 else weight.tensor.detach()
        if group.rank() or not mine[weight.expert]:
            continue
        if weight.name in PADDED:
            whole = whole[: shape.vocab]
        for name, part in zip(origin.names, origin.parts(whole, shape.groups, shape.channels), strict=True):
            yield name, part.to("cpu", copy=True).contiguous()


def _whole(weight: Weight, origin: Source) -> Tensor:
    parts = [torch.empty_like(weight.tensor) for _ in range(weight.group.size())]
    dist.all_gather(parts, weight.tensor.detach().contiguous(), group=weight.group)
    return origin.joined(parts, weight.axis)


def save(chunks: Sequence[Any], out: Path, shape: Shape, world: World) -> None:
    """Write safetensors files and their index into the directory `out`, which all ranks see.

    Raises:
        OSError: a rank could not write.
    """
    world.alone(lambda: out.mkdir(parents=True, exist_ok=True))
    held: dict[str, Tensor] = {}
    files: dict[str, str] = {}
    failed: str | None = None

    def flush() -> None:
        nonlocal failed
        if held and failed is None:
            file = f"model-{world.rank:05d}-{len(set(files.values())):05d}.safetensors"
            try:
                save_file(held, out / file, {"format": "pt"})
            except Exception as error:  # the others wait for this rank's parts of weights to come
                failed = f"rank {world.rank}: {type(error).__name__}: {error}"
            files.update(dict.fromkeys(held, file))
        held.clear()

    for name, tensor in entries(chunks, shape):
        held[name] = tensor
        if sum(t.numel() * t.element_size() for t in held.values()) >= SHARD:
            flush()
    flush()
    said = world.gather((files, failed))
    if errors := [text for _, text in said if text]:
        raise OSError(errors[0])
    where = {name: file for found, _ in said for name, file in found.items()}
    index = json.dumps({"metadata": {}, "weight_map": dict(sorted(where.items()))}, indent=1)
    world.alone(lambda: (out / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8"))
