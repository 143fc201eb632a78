"""The Mamba backbone of MDLM: bidirectional state-space mixers with adaLN conditioning, without attention.

Parameter names and shapes follow the source of kuleshov-group/mdlm (models/dimamba.py with `temb_strategy: adaln`); no
published checkpoint of this backbone was available for a test. Shape suffixes: B batch, L length, V vocabulary, D
width, C conditioning width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.common.values import BelowOne, Size
from palimpsest.models.backbone import Backbone
from palimpsest.models.layers import RMSNorm, SigmaEmbedding, modulate, zero_linear
from palimpsest.models.mamba import BiMamba
from palimpsest.models.recompute import Recomputing


class DiMambaBlock(nn.Module):
    """A bidirectional mixer, normalised, modulated by the conditioning and gated into the residual stream."""

    def __init__(self, dim: int, cond_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.mixer = BiMamba(dim)
        self.norm = RMSNorm(dim)
        self.adaLN_modulation = zero_linear(cond_dim, 3 * dim)

    def forward(self, x_BLD: Tensor, c_BC: Tensor, padding_BL: Tensor | None) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c_BC).chunk(3, dim=-1)
        mixed_BLD = self.mixer(modulate(self.norm(x_BLD), shift, scale), padding_BL)
        return x_BLD + gate[:, None] * F.dropout(mixed_BLD, self.dropout, self.training)


class Trunk(Recomputing):
    """Embedding, blocks and final norm: tokens and conditioning -> hidden states (B, L, D)."""

    def __init__(self, vocab_size: int, dim: int, cond_dim: int, n_blocks: int, dropout: float) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"word_embeddings": nn.Embedding(vocab_size, dim)})
        self.layers = nn.ModuleList(DiMambaBlock(dim, cond_dim, dropout) for _ in range(n_blocks))
        self.adaLN_modulation_final = zero_linear(cond_dim, 2 * dim)
        self.norm_f = RMSNorm(dim)
        nn.init.normal_(self.embeddings["word_embeddings"].weight, std=0.02)
        with torch.no_grad():
            for layer in self.layers:
                layer.mixer.mamba_fwd.out_proj.weight /= math.sqrt(n_blocks)

    def forward(self, tokens_BL: Tensor, c_BC: Tensor, padding_BL: Tensor | None) -> Tensor:
        x_BLD = self.embeddings["word_embeddings"](tokens_BL)
        for layer in self.layers:
            x_BLD = self.through(layer, x_BLD, c_BC, padding_BL)
        shift, scale = self.adaLN_modulation_final(c_BC).chunk(2, dim=-1)
        return modulate(self.norm_f(x_BLD), shift, scale)


class DiMamba(Backbone):
    """A bidirectional Mamba, used like the DiT: `encode(tokens_BL, sigma_B)`, then `head(hidden)`.

    Without `time_conditioning` sigma is replaced by zero, not skipped. `mask_padding` excludes padding from both
    directions of the scan, so that an output does not depend on how far its batch was padded. In the reference the scan
    from the right reads the padding first, which `mask_padding=False` reproduces. On a GPU the scan uses the kernel of
    mamba_ssm if it is installed.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: Size,
        cond_dim: Size,
        n_blocks: Size,
        dropout: BelowOne = 0.1,
        time_conditioning: bool = False,
        mask_padding: bool = True,
    ) -> None:
        super().__init__()
        self.time_conditioning, self.mask_padding = time_conditioning, mask_padding
        self.sigma_map = SigmaEmbedding(cond_dim)
        trunk = Trunk(vocab_size, hidden_size, cond_dim, n_blocks, dropout)
        # Nested as in the references (a Hub model within a Hub model), because parameter names contain the nesting.
        head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.model = nn.ModuleDict({"bimamba": nn.ModuleDict({"backbone": trunk}), "lm_head": head})

    @property
    def head(self) -> nn.Linear:
        """Return the vocabulary projection, without bias: hidden (..., D) -> logits (..., V)."""
        return self.model["lm_head"]

    @property
    def trunk(self) -> Trunk:
        return self.model["bimamba"]["backbone"]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.trunk.layers

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """Return the modules that training.freeze can name."""
        head = [self.trunk.norm_f, self.trunk.adaLN_modulation_final, self.head]
        embeddings = [self.trunk.embeddings]
        return {"embeddings": embeddings, "conditioning": [self.sigma_map], "blocks": [self.blocks], "head": head}

    def recompute_blocks(self) -> None:
        self.trunk.recompute_blocks()

    def encode(self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return hidden states (B, L, D), ready for `head`. `attention_mask` (B, L) is False on padding."""
        padding_BL = ~attention_mask.bool() if attention_mask is not None and self.mask_padding else None
        # The input of adaLN: silu of the embedded sigma.
        c_BC = F.silu(self.sigma_map(sigma_B if self.time_conditioning else torch.zeros_like(sigma_B)))
        return self.trunk(tokens_BL, c_BC, padding_BL)
