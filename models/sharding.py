"""Sharding of weights over devices (FSDP2, torch's fully_shard).

Every device keeps a part of each tensor, a DTensor, and gathers a block only while it is needed. The tensors of a
checkpoint are always whole.
"""

from collections.abc import Iterable

import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, forward_methods: Iterable[str]) -> None:
    """Shard the parameters of `module`: those of each of its `blocks` as one group, the others as another.

    They are gathered within `forward` and within the methods that `forward_methods` names, for the blocks in their own
    attribute of that name. Parameters outside of the blocks are resharded after the forward pass too, so that between
    two calls every parameter is sharded.
    """
    if isinstance(module, FSDPModule):
        return
    for block in blocks:
        fully_shard(block, mesh=mesh)
        for name in getattr(block, "forward_methods", ()):
            register_fsdp_forward_method(block, name)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for name in forward_methods:
        register_fsdp_forward_method(module, name)


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor, which every device has, as `like` is; return it unchanged if `like` is not sharded. Nothing
    is sent."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    mesh = like.device_mesh
    return distribute_tensor(tensor.detach().to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def gather(state: object) -> object:
    """Return `state` (tensors in dicts, lists and tuples) with each sharded tensor gathered, on the CPU of the first
    process. The other processes get None in its place; all must call it, in the same order."""
    if isinstance(state, DTensor):
        together = state.full_tensor()
        return together.cpu() if torch.distributed.get_rank() == 0 else None
    if isinstance(state, dict):
        return {key: gather(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather(value) for value in state)
    return state


def load_sharded(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a state of whole tensors into a module with sharded parameters. Raises RuntimeError if names or shapes
    differ."""
    ours = module.state_dict()
    shared = {name: sharded_like(tensor, ours[name]) if name in ours else tensor for name, tensor in state.items()}
    module.load_state_dict(shared)
