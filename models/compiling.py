"""torch.compile for a network: the embedding, all blocks and the last norm are one graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from palimpsest.models.backbone import Backbone
from palimpsest.models.block_attention import allow_recompilation
from palimpsest.models.transformer import TransformerBlock

_BACKEND = "inductor"
# One graph is recorded for each shape, so only shapes that stay the same are worth it.
_CUDA_GRAPHS = {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}


def compile_encoder(backbone: Backbone) -> None:
    """Compile `encode` and, for block diffusion, `encode_blocks` at their first use. Parameter names stay as they are.
    Raises ValueError for attention that cannot be compiled.

    The compiled network computes the hidden states of all positions, so that every training step on wrapped rows has
    the same shapes; padded rows get a second graph, for any length. This costs little: the last block alone could leave
    positions out, and times are spread over a batch, so that in one of its rows almost every token is masked. The
    projection onto the vocabulary is still of the needed positions only. Without gradients, as in sampling, a GPU
    replays `encode` as a CUDA graph where shapes stay the same: its kernels are launched at once. Block sampling with a
    cache of keys and values stays as it is.
    """
    blocks = [layer for layer in backbone.modules() if isinstance(layer, TransformerBlock)]
    if any(block.attn_backend == "flash_attn" for block in blocks):
        raise ValueError(
            "trainer.compile=true compiles torch's own attention, and model.attn_backend=flash_attn is not part of it; "
            "use model.attn_backend=sdpa"
        )
    allow_recompilation()  # rows of one shape or any, one row, with and without padding, class and gradients
    backbone.encodes_positions = False
    compiled = torch.compile(backbone.encode, backend=_BACKEND)
    replayed = torch.compile(backbone.encode, backend=_BACKEND, options=_CUDA_GRAPHS)
    backbone.encode = _replaying(compiled, replayed)
    backbone.encode_blocks = torch.compile(backbone.encode_blocks, backend=_BACKEND)


def _replaying(compiled: Callable[..., Tensor], replayed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that runs `replayed` on a GPU without gradients, and `compiled` elsewhere."""

    def encode(x_BL: Tensor, *args: Tensor | None, **conditioning: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() or not x_BL.is_cuda:
            return compiled(x_BL, *args, **conditioning)
        # A copy, because the next replay writes to the same memory, and guidance needs the states of two of them.
        return replayed(x_BL, *args, **conditioning).clone()

    return encode
