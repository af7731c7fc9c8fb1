"""Weights, gradients and optimizer state sharded over all devices (FSDP, arXiv 2304.11277), for large models.

What is trained lies in slices, one per device, and is put together layer by layer when it is needed.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tasks.training.methods import Trainable


def init_process_group(device: torch.device) -> None:
    """Let the processes meet; Lightning would do it only after the weights have to be sharded."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def shard(trainable: Trainable, device: torch.device) -> None:
    """Shard the trained modules, block by block, and name their new parameters in the groups."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    names = {id(parameter): name for name, parameter in trainable.modules.named_parameters()}
    for module in trainable.modules.values():
        kinds = set(getattr(module, "_no_split_modules", None) or ())
        for block in reversed(list(module.modules())):  # inner blocks first
            if block is not module and type(block).__name__ in kinds and has_parameters(block):
                fully_shard(block, mesh=mesh)
        # By default a root stays whole after its forward, and then its parameters aren't those of the optimizer.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    sharded_parameters = dict(trainable.modules.named_parameters())
    trainable.groups = [
        replace(group, parameters=[sharded_parameters[names[id(parameter)]] for parameter in group.parameters])
        for group in trainable.groups
    ]


def has_parameters(block: nn.Module) -> bool:
    """Whether there is anything to shard."""
    return next(block.parameters(), None) is not None


def unshard(tensor: Tensor) -> Tensor:
    """Return a whole tensor from its slices; every rank has to ask. Others are returned as they are."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def shard_like(tensor: Tensor, *, like: Tensor) -> Tensor:
    """Return a tensor on the device of another one, and in slices where that one is."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        # Every rank has read the same file, so nothing needs to be sent.
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor
