"""Weights shared out over devices (FSDP2, torch's fully_shard): every device keeps a part of each tensor, and puts a
block together for the time it is needed. Tensors so shared are DTensors; those of a checkpoint are always whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def share_out(module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, entrances: Iterable[str]) -> None:
    """Share out the parameters of `module`: those of each of its `blocks` together, the others together. They are whole
    within the methods named `entrances`, and within the blocks' forward pass and their own `entrances`.

    What stands outside of the blocks is put away after the forward pass too (it is brought back for the backward pass),
    so that between two calls every parameter is a shared one, whatever was called last.
    """
    if isinstance(module, FSDPModule):
        return
    for block in blocks:
        fully_shard(block, mesh=mesh)
        for name in getattr(block, "entrances", ()):
            register_fsdp_forward_method(block, name)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for name in entrances:
        register_fsdp_forward_method(module, name)


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every device has, shared out as `like` is; as it is where `like` is not shared out. Each
    device keeps its part, and nothing is sent."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh = like.device_mesh
    return distribute_tensor(tensor.detach().to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def whole(state: object) -> object:
    """`state` (tensors in dicts, lists and tuples) with every shared tensor put together, on the CPU of the first
    process; None in its place on the others, which must call it all the same, in the same order."""
    if isinstance(state, DTensor):
        together = state.full_tensor()
        return together.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole(value) for value in state)
    return state


def load_shared(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state of whole tensors into a module whose parameters are shared out.

    Raises:
        RuntimeError: names or shapes differ, as torch's load_state_dict says it.
    """
    ours = module.state_dict()
    shared = {name: shared_like(tensor, ours[name]) if name in ours else tensor for name, tensor in state.items()}
    with torch.no_grad():
        module.load_state_dict(shared)
