"""The diffusion transformer of MDLM: a bidirectional transformer with rotary attention and adaLN conditioning.

Parameter names and shapes are those of the reference checkpoints (kuleshov-group/mdlm, bd3lms, s-sahoo/duo).
Shape suffixes: B batch, L length, N selected positions, V vocabulary, D width, C conditioning width, H heads.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.common.positions import Positions
from palimpsest.common.values import FREE, AttentionBackend, BelowOne, Size
from palimpsest.models.attention import SeenKeys, head_width, resolve_backend, rotary_angles, seen_keys
from palimpsest.models.backbone import Backbone
from palimpsest.models.blocks import BlockStreams, TwoStreams
from palimpsest.models.class_conditioning import unconditional, with_class
from palimpsest.models.layers import RotaryFrequencies, SigmaEmbedding, TokenEmbedding, modulate, zero_linear
from palimpsest.models.recompute import Recomputing
from palimpsest.models.transformer import Head, Modulation, Rotary, TransformerBlock, take_positions


class DiTBlock(TwoStreams, TransformerBlock):
    """Attention and MLP, each normalised, modulated by the conditioning and gated into the residual stream."""

    def __init__(self, dim: int, cond_dim: int, n_heads: int, dropout: float, attn_backend: str) -> None:
        super().__init__(dim, n_heads, dropout, attn_backend)
        self.adaLN_modulation = zero_linear(cond_dim, 6 * dim)

    def forward(
        self, x_BLD: Tensor, c_BC: Tensor, rotary: Rotary, seen: SeenKeys | None, at_BQ: Tensor | None = None
    ) -> Tensor:
        """Return the block's output, (B, L, D), or only at the positions `at_BQ`, (B, Q, D)."""
        by = Modulation.of(self, c_BC)
        attended = self.attention(by.before_attention(self, x_BLD), rotary, seen, at_BQ)
        return by.after_attention(self, take_positions(x_BLD, at_BQ), attended)


class OutputLayer(Head):
    """The head whose normed hidden states are modulated by the conditioning."""

    def __init__(self, dim: int, vocab_size: int, cond_dim: int, num_classes: int = 0) -> None:
        super().__init__(dim, vocab_size, num_classes)
        self.adaLN_modulation = zero_linear(cond_dim, 2 * dim)

    def normed(self, x_BLD: Tensor, c_BC: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BC).chunk(2, dim=-1)
        return modulate(self.norm_final(x_BLD), shift, scale)


class DiT(BlockStreams, Recomputing, Backbone):
    """The diffusion transformer: `encode(tokens_BL, sigma_B)` gives normed hidden states, `head(hidden)` logits.

    Without `time_conditioning` sigma is replaced by zero, not skipped: adaLN then acts with a learned constant, as in
    the reference. `mask_padding` hides padding from attention, so that an output does not depend on how far its batch
    was padded; the reference attends to padding (`mask_padding=False`). With `num_classes` it takes the class of each
    text (`class_id`, -1 for none) through adaLN and an output bias.
    """

    encodes_positions = takes_classes = reads_blocks = reads_mixtures = compiles = separates_documents = True

    def __init__(
        self,
        vocab_size: int,
        hidden_size: Size,
        cond_dim: Size,
        n_blocks: Size,
        n_heads: Size,
        dropout: BelowOne = 0.1,
        time_conditioning: bool = False,
        mask_padding: bool = True,
        attn_backend: Annotated[AttentionBackend, FREE] = "auto",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        head_dim, backend = head_width(hidden_size, n_heads), resolve_backend(attn_backend)
        self.time_conditioning, self.mask_padding = time_conditioning, mask_padding
        self.cond_dim, self.n_heads = cond_dim, n_heads
        self.dropout, self.num_classes = dropout, num_classes
        self.vocab_embed = TokenEmbedding(vocab_size, hidden_size)
        self.sigma_map = SigmaEmbedding(cond_dim)
        self.rotary_emb = RotaryFrequencies(head_dim)
        width = cond_dim + num_classes
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, width, n_heads, dropout, backend) for _ in range(n_blocks))
        self.output_layer = OutputLayer(hidden_size, vocab_size, width, num_classes)

    @property
    def class_parameters(self) -> list[tuple[nn.Parameter, slice]]:
        """Return the matrices of adaLN, and their columns for the classes."""
        layers = (*self.blocks, self.output_layer)
        return [(layer.adaLN_modulation.weight, slice(self.cond_dim, None)) for layer in layers]

    @property
    def settings(self) -> dict[str, object]:
        """Return the constructor arguments, by their keys on the command line."""
        return {
            "model.hidden_size": self.vocab_embed.embedding.shape[1], "model.cond_dim": self.cond_dim,
            "model.n_blocks": len(self.blocks), "model.n_heads": self.n_heads, "model.dropout": self.dropout,
            "model.mask_padding": self.mask_padding, "time_conditioning": self.time_conditioning,
        }  # fmt: skip

    @property
    def head(self) -> nn.Linear:
        """Return the vocabulary projection: hidden (..., D) -> logits (..., V)."""
        return self.output_layer.linear

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """Return the modules that training.freeze can name."""
        return {"embeddings": [self.vocab_embed], "conditioning": [self.sigma_map], "blocks": [self.blocks],
                "head": [self.output_layer]}  # fmt: skip

    @property
    def order(self) -> Sequence[nn.Module]:
        """Return the blocks in the order of the forward pass. A block may appear more than once."""
        return self.blocks

    def encode(
        self,
        tokens_BL: Tensor,
        sigma_B: Tensor,
        attention_mask: Tensor | None = None,
        at: Positions | None = None,
        class_id: Tensor | None = None,
        document: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states (B, L, D), ready for `head`, or only those of the positions `at`, (N, D).

        With `at` the last block computes only those positions. `attention_mask` (B, L) is False on padding. With
        `document` (B, L) tokens attend to those of the same document.
        """
        class_id = unconditional(tokens_BL) if class_id is None and self.num_classes else class_id
        c_BC = self.conditioning(sigma_B, class_id)
        rotary = rotary_angles(self.rotary_emb.inv_freq, tokens_BL.shape[1])
        padding = attention_mask if self.mask_padding else None
        seen = seen_keys(padding, document, self.blocks[0].attn_backend)
        x_BLD = self.vocab_embed(tokens_BL)
        for block in self.order[:-1]:
            x_BLD = self.through(block, x_BLD, c_BC, rotary, seen)
        at_BQ = None if at is None else at.table_BQ
        last_BQD = self.through(self.order[-1], x_BLD, c_BC, rotary, seen, at_BQ)
        hidden_BQD = with_class(self.output_layer.normed(last_BQD, c_BC), class_id, self.num_classes)
        return hidden_BQD if at is None else at.from_table(hidden_BQD)

    def conditioning(self, sigma_B: Tensor, class_id: Tensor | None = None) -> Tensor:
        """Return the input of adaLN: silu of the embedded sigma, and the class in columns of its own, (B, C).

        An embedding added to sigma's would move all modulations along the few directions that sigma has too.
        """
        embedded_BC = F.silu(self.sigma_map(sigma_B if self.time_conditioning else torch.zeros_like(sigma_B)))
        return with_class(embedded_BC, class_id, self.num_classes)
