"""The diffusion transformer of MDLM: a bidirectional transformer with rotary attention and adaLN conditioning.

Parameter names and shapes are those of the reference checkpoints (kuleshov-group/mdlm, bd3lms, s-sahoo/duo).
Shape suffixes: B batch, L length, N selected positions, V vocabulary, D width, C conditioning width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.common.values import FREE, BelowOne, Size
from palimpsest.models.attention import head_width, resolve_backend, rotary_angles
from palimpsest.models.backbone import Backbone
from palimpsest.models.blocks import BlockStreams, TwoStreams
from palimpsest.models.class_conditioning import ClassEmbedding, untold, with_class
from palimpsest.models.layers import RotaryFrequencies, SigmaEmbedding, TokenEmbedding, modulate, zero_linear
from palimpsest.models.recompute import Recomputing
from palimpsest.models.transformer import Head, Rotary, TransformerBlock, queried, rows_at


class DiTBlock(TwoStreams, TransformerBlock):
    """Attention and MLP, each normalised, modulated by the conditioning and gated into the residual stream."""

    def __init__(self, dim: int, cond_dim: int, n_heads: int, dropout: float, attn_backend: str) -> None:
        super().__init__(dim, n_heads, dropout, attn_backend)
        self.adaLN_modulation = zero_linear(cond_dim, 6 * dim)

    def forward(
        self, x_BLD: Tensor, c_BC: Tensor, rotary: Rotary, key_mask_BL: Tensor | None, at_BQ: Tensor | None = None
    ) -> Tensor:
        """The whole row (B, L, D), or only its positions `at_BQ`, (B, Q, D)."""
        shift_att, scale_att, gate_att, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c_BC).chunk(6, dim=-1)
        normed_BLD = modulate(self.norm1(x_BLD), shift_att, scale_att)
        if at_BQ is None:
            attended = self.attention(normed_BLD, rotary, key_mask_BL)
        else:
            attended, x_BLD = self.attention_at(normed_BLD, rotary, key_mask_BL, at_BQ), rows_at(x_BLD, at_BQ)
        x_BLD = x_BLD + gate_att[:, None] * attended
        return x_BLD + gate_mlp[:, None] * self.transform(modulate(self.norm2(x_BLD), shift_mlp, scale_mlp))


class OutputLayer(Head):
    """The head, with the normed hidden states modulated by the conditioning."""

    def __init__(self, dim: int, vocab_size: int, cond_dim: int, num_classes: int = 0) -> None:
        super().__init__(dim, vocab_size, num_classes)
        self.adaLN_modulation = zero_linear(cond_dim, 2 * dim)

    def normed(self, x_BLD: Tensor, c_BC: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BC).chunk(2, dim=-1)
        return modulate(self.norm_final(x_BLD), shift, scale)


class DiT(BlockStreams, Recomputing, Backbone):
    """tokens, sigma -> logits, in two steps so that callers pay for the vocabulary only where they need it.

    `encode(tokens_BL, sigma_B)` gives the normed hidden states (B, L, D); `head(hidden)` projects any selection of
    them, (..., D) -> (..., V). `forward` is their composition.

    Without `time_conditioning` sigma is replaced by zero, not skipped: adaLN then acts with a learned constant, as in
    the reference. `mask_padding` hides padding from attention, so that an output does not depend on how far its batch
    was padded; the reference attends to padding, and `mask_padding=False` reproduces that. With `num_classes` the
    network can be told the class of each text (`class_id`, -1 for none) through adaLN and an output bias.
    """

    encodes_positions = takes_classes = reads_blocks = reads_mixtures = True

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
        attn_backend: Annotated[Literal["sdpa", "flash_attn", "flex"], FREE] = "sdpa",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        head_dim, backend = head_width(hidden_size, n_heads), resolve_backend(attn_backend)
        self.time_conditioning, self.mask_padding = time_conditioning, mask_padding
        self.cond_dim, self.n_heads, self.dropout, self.num_classes = cond_dim, n_heads, dropout, num_classes
        self.vocab_embed = TokenEmbedding(vocab_size, hidden_size)
        self.sigma_map = SigmaEmbedding(cond_dim)
        self.rotary_emb = RotaryFrequencies(head_dim)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, cond_dim, n_heads, dropout, backend) for _ in range(n_blocks))
        self.output_layer = OutputLayer(hidden_size, vocab_size, cond_dim, num_classes)
        if num_classes:
            self.class_embed = ClassEmbedding(num_classes, cond_dim)

    @property
    def vocab_size(self) -> int:
        return self.output_layer.linear.out_features

    @property
    def settings(self) -> dict[str, object]:
        """What the network was built with, keys as on the command line."""
        return {
            "model.hidden_size": self.vocab_embed.embedding.shape[1], "model.cond_dim": self.cond_dim,
            "model.n_blocks": len(self.blocks), "model.n_heads": self.n_heads, "model.dropout": self.dropout,
            "model.mask_padding": self.mask_padding, "time_conditioning": self.time_conditioning,
        }  # fmt: skip

    @property
    def head(self) -> nn.Linear:
        """The vocabulary projection: hidden (..., D) -> logits (..., V)."""
        return self.output_layer.linear

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What training.freeze can name."""
        conditioning = [self.sigma_map, *([self.class_embed] if self.num_classes else [])]
        return {"embeddings": [self.vocab_embed], "conditioning": conditioning, "blocks": [self.blocks],
                "head": [self.output_layer]}  # fmt: skip

    @property
    def order(self) -> Sequence[nn.Module]:
        """The blocks in the order of the forward pass, which every pass follows. A block may appear more than once."""
        return self.blocks

    def encode(
        self,
        tokens_BL: Tensor,
        sigma_B: Tensor,
        attention_mask: Tensor | None = None,
        at_BL: Tensor | None = None,
        class_id: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D), ready for `head`; only those of the N positions where `at_BL` is True, (N, D), if it
        is given: the last block then works for these alone. `attention_mask` (B, L) is False on padding."""
        class_id = untold(tokens_BL) if class_id is None and self.num_classes else class_id
        c_BC = self.conditioning(sigma_B, class_id)
        rotary = rotary_angles(self.rotary_emb.inv_freq, tokens_BL.shape[1])
        key_mask_BL = attention_mask if self.mask_padding else None
        x_BLD = self.vocab_embed(tokens_BL)
        for block in self.order[:-1]:
            x_BLD = self.through(block, x_BLD, c_BC, rotary, key_mask_BL)
        if at_BL is None:
            last_BLD = self.through(self.order[-1], x_BLD, c_BC, rotary, key_mask_BL)
            last_BLD = self.output_layer.normed(last_BLD, c_BC)
            return with_class(last_BLD, class_id, self.num_classes) if self.num_classes else last_BLD
        at_BQ, here_BQ = queried(at_BL)
        hidden_BQD = self.through(self.order[-1], x_BLD, c_BC, rotary, key_mask_BL, at_BQ)
        hidden_BQD = self.output_layer.normed(hidden_BQD, c_BC)
        hidden_BQD = with_class(hidden_BQD, class_id, self.num_classes) if self.num_classes else hidden_BQD
        return hidden_BQD[here_BQ]

    def conditioning(self, sigma_B: Tensor, class_id: Tensor | None = None) -> Tensor:
        """What adaLN sees: silu of the embedded sigma, to which the class is added, (B, C)."""
        embedded_BC = self.sigma_map(sigma_B if self.time_conditioning else torch.zeros_like(sigma_B))
        return F.silu(embedded_BC if class_id is None else embedded_BC + self.class_embed(class_id))

    def forward(self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, V)."""
        return self.head(self.encode(tokens_BL, sigma_B, attention_mask))
