"""Gradient checkpointing: memory for time. Of each of a network's repeated blocks only the input is kept, and the block
is computed again in the backward pass (Chen et al., arXiv 1604.06174), with the same dropout."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.utils.checkpoint import checkpoint

from palimpsest.models.backbone import Backbone


def recompute_blocks(backbone: Backbone) -> None:
    """Let `backbone` do so from now on, in training only.

    Raises:
        ValueError: it can not.
    """
    if not backbone.recomputes:
        raise ValueError(
            f"training.gradient_checkpointing=true: {type(backbone).__name__} can not compute its blocks again; leave "
            "it out"
        )
    backbone.recompute_blocks()


class Recomputing(nn.Module):
    """What networks with repeated blocks inherit: the switch, and `through`, which runs a block under it."""

    recomputes = True
    recomputing = False

    def recompute_blocks(self) -> None:
        self.recomputing = True

    def through(self, block: Callable, *args: object) -> object:
        """block(*args), whose inner activations are not kept where the switch is on and gradients are wanted."""
        if self.recomputing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)
