"""Weights, gradients and optimizer state sharded over all devices (FSDP, arXiv 2304.11277), for large models.

Trained parameters are DTensors, one shard per device, gathered block by block for forward and backward.
"""

import logging
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tasks.training.methods import Trainable

log = logging.getLogger(__name__)


def init_process_group(device: torch.device) -> None:
    """Initialize torch.distributed: the result of a finished run is written without the Trainer that would do it."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def shard(trainable: Trainable, device: torch.device) -> None:
    """Apply `fully_shard` to the trained modules block by block, and update the parameter groups."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # By identity, while groups hold the original parameters.
    names = {id(parameter): name for name, parameter in trainable.modules.named_parameters()}
    for module in trainable.modules.values():
        # The blocks that diffusers and transformers never split across devices are the units of gathering.
        kinds = set(getattr(module, "_no_split_modules", None) or ())
        for block in reversed(list(module.modules())):  # inner blocks first
            if block is not module and type(block).__name__ in kinds and has_parameters(block):
                fully_shard(block, mesh=mesh)
        # By default the root stays unsharded after its forward; its parameters then aren't those of the optimizer.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # `fully_shard` replaces every Parameter by a new DTensor one of the same name.
    sharded_parameters = dict(trainable.modules.named_parameters())
    num_sharded = sum(isinstance(parameter, DTensor) for parameter in sharded_parameters.values())
    log.info("%d parameters are sharded over %d ranks", num_sharded, mesh.size())
    trainable.groups = [
        replace(group, parameters=[sharded_parameters[names[id(parameter)]] for parameter in group.parameters])
        for group in trainable.groups
    ]


def has_parameters(block: nn.Module) -> bool:
    """Whether there is any parameter to shard."""
    return next(block.parameters(), None) is not None


def unshard(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, a collective over all ranks; return other tensors unchanged."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def shard_like(tensor: Tensor, *, like: Tensor) -> Tensor:
    """Return a tensor on the device of another one, sharded like it."""
    tensor = tensor.to(like.device)
    # Scalars of the optimizer, such as AdamW's `step`, stay unsharded.
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        # Every rank has read the same file, so no broadcast is needed.
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor
