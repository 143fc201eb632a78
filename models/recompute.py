"""Gradient checkpointing (Chen et al., arXiv 1604.06174): only the input of each block is kept, and the block is
computed again in the backward pass, with the same dropout."""

from collections.abc import Callable

from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """A network whose blocks can be run under gradient checkpointing."""

    recomputing = False

    def recompute_blocks(self) -> None:
        self.recomputing = True

    def through(self, block: Callable, *args: object) -> object:
        """Return block(*args), under gradient checkpointing if it is switched on and the network is training."""
        if self.recomputing and self.training:
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)
