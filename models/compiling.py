"""torch.compile for the blocks of a network, one graph per block, which all blocks share."""

from __future__ import annotations

import torch

from palimpsest.models.backbone import Backbone

_BACKEND = "inductor"


def compile_blocks(backbone: Backbone) -> None:
    """Compile every block of `backbone` at its first use. Parameter names stay as they are.

    The number of positions that the last block computes differs from step to step, so it is a symbol in the graph.
    Block sampling with a cache of keys and values does not run through these methods and stays as it is.

    Raises:
        ValueError: the network does not support it.
    """
    if not backbone.compiles:
        raise ValueError(f"trainer.compile=true: {type(backbone).__name__} does not support it; leave it out")
    for block in dict.fromkeys(backbone.blocks):
        block.compile(backend=_BACKEND)
        for name in block.forward_methods:
            setattr(block, name, torch.compile(getattr(block, name), backend=_BACKEND))
