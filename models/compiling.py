"""torch.compile for a network: the embedding, all blocks and the last norm are one graph."""

import torch

from palimpsest.models.backbone import Backbone
from palimpsest.models.transformer import TransformerBlock

_BACKEND = "inductor"


def compile_encoder(backbone: Backbone) -> None:
    """Compile `encode` and, for block diffusion, `encode_blocks` at their first use. Parameter names stay as they are.
    Raises ValueError for attention that cannot be compiled.

    The compiled network computes the hidden states of all positions, so that every training step has the same shapes
    and nothing is compiled again. This costs little: the last block alone could leave positions out, and times are
    spread over a batch, so that in one of its rows almost every token is masked. The projection onto the vocabulary is
    still of the needed positions only. Block sampling with a cache of keys and values stays as it is.
    """
    blocks = [layer for layer in backbone.modules() if isinstance(layer, TransformerBlock)]
    if any(block.attn_backend == "flash_attn" for block in blocks):
        raise ValueError(
            "trainer.compile=true compiles torch's own attention, and model.attn_backend=flash_attn is not part of it; "
            "use model.attn_backend=sdpa"
        )
    backbone.encodes_positions = False
    for name in ("encode", "encode_blocks"):
        setattr(backbone, name, torch.compile(getattr(backbone, name), backend=_BACKEND))
