"""A transformers model sharded by FSDP2: weights, gradients and moments over the ranks, experts among them.

Gradients are summed over ranks and not averaged: each rank's loss is its part of the whole step's, whose denominator it
was given. The head is apart from the other groups, since logprobs take its weight and never call it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from pacenote.trainer.world import World


def shard(model: Any, world: World, device: str) -> None:
    """Shard a causal language model over all ranks, a decoder layer a group.

    Raises:
        ValueError: its head is its embedding.
    """
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        raise ValueError(
            "expected a model whose head has weights of its own to train on several ranks, got one that ties them to "
            "its embedding: train it on one rank"
        )
    mesh = init_device_mesh(torch.device(device).type, (world.size,))
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.base_model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
    for name, parameter in list(head.named_parameters()):
        cut = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
        setattr(head, name, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def whole(tensor: Tensor) -> Tensor:
    """A sharded weight [...] in one piece, whose gradient is the sum of all ranks'; another tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    found: Tensor = tensor.full_tensor(grad_placements=[Partial()])
    return found


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, each tensor [...] in one piece, on the host."""
    return {name: whole(tensor.detach()).cpu() for name, tensor in model.state_dict().items()}


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, out: Path) -> None:
    """Each rank writes its part of the moments, as a distributed checkpoint in the folder `out`."""
    save(get_optimizer_state_dict(model, optimizer), checkpoint_id=out)


def save_tensors(tensors: dict[str, Tensor], out: Path) -> None:
    """Each rank writes its part of tensors [...], as a distributed checkpoint in the folder `out`."""
    save(dict(tensors), checkpoint_id=out)


def load_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Overwrite tensors [...] with what was saved of them; over another number of ranks, too."""
    load(dict(tensors), checkpoint_id=path)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Take the moments back; over another number of ranks, too."""
    state = get_optimizer_state_dict(model, optimizer)
    load(state, checkpoint_id=path)
    set_optimizer_state_dict(model, optimizer, state)
