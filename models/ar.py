"""The autoregressive transformer of the references: the DiT's block without conditioning, causal.

Parameter names and shapes are those of the reference checkpoints (kuleshov-group/mdlm, bd3lms).
Shape suffixes: B batch, L length, V vocabulary, D width, H heads.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from palimpsest.common.values import FREE, BelowOne, Size
from palimpsest.models.attention import head_width, resolve_backend, rotary_angles
from palimpsest.models.backbone import Backbone
from palimpsest.models.class_conditioning import ClassEmbedding, untold, with_class
from palimpsest.models.kv_cache import KVCache
from palimpsest.models.layers import RotaryFrequencies, TokenEmbedding
from palimpsest.models.recompute import Recomputing
from palimpsest.models.transformer import Head, Remember, Rotary, TransformerBlock


class ARBlock(TransformerBlock):
    """Causal attention and MLP, each normalised and added to the residual stream."""

    def forward(self, x_BLD: Tensor, rotary: Rotary, remember: Remember | None) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), rotary, remember=remember)
        return x_BLD + self.transform(self.norm2(x_BLD))


class AR(Recomputing, Backbone):
    """tokens -> logits of the token after each, in two steps: `encode(tokens_BL)`, then `head(hidden)` where needed.

    The noise level and the padding mask are taken because every backbone is called with them, and change nothing:
    there is no noise, and causal attention never looks at padding, which stands on the right. With `num_classes` the
    network can be told the class of each text (`class_id`, -1 for none): it is added to every token's embedding, and
    has an output bias.
    """

    causal = takes_classes = True

    def __init__(
        self,
        vocab_size: int,
        hidden_size: Size,
        n_blocks: Size,
        n_heads: Size,
        dropout: BelowOne = 0.1,
        attn_backend: Annotated[Literal["sdpa", "flash_attn", "flex"], FREE] = "sdpa",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.n_heads, head_dim, backend = n_heads, head_width(hidden_size, n_heads), resolve_backend(attn_backend)
        self.num_classes = num_classes
        self.vocab_embed = TokenEmbedding(vocab_size, hidden_size)
        self.rotary_emb = RotaryFrequencies(head_dim)
        self.blocks = nn.ModuleList(
            ARBlock(hidden_size, n_heads, dropout, backend, causal=True) for _ in range(n_blocks)
        )
        self.output_layer = Head(hidden_size, vocab_size, num_classes)
        if num_classes:
            self.class_embed = ClassEmbedding(num_classes, hidden_size)

    @property
    def vocab_size(self) -> int:
        return self.output_layer.linear.out_features

    @property
    def head(self) -> nn.Linear:
        """The vocabulary projection: hidden (..., D) -> logits (..., V)."""
        return self.output_layer.linear

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What training.freeze can name."""
        embeddings = [self.vocab_embed, *([self.class_embed] if self.num_classes else [])]
        return {"embeddings": embeddings, "blocks": [self.blocks], "head": [self.output_layer]}

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache for `length` positions, in the precision in which attention will run."""
        embedding = self.vocab_embed.embedding
        device = embedding.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else embedding.dtype
        head_dim = embedding.shape[1] // self.n_heads
        return KVCache(len(self.blocks), batch_size, length, self.n_heads, head_dim, embedding.device, dtype)

    def encode(
        self,
        tokens_BL: Tensor,
        sigma_B: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        class_id: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, L, D), ready for `head`: position i has seen the tokens up to i.

        With `cache`, `tokens_BL` follow the `cache.length` tokens that went before; they are added to it. The result
        is that of one pass over all tokens, at the new ones.

        Raises:
            ValueError: the cache has no room for the tokens, or was made for another batch size.
        """
        start = 0
        if cache is not None:
            cache.check_room(tokens_BL)
            start = cache.length
        rotary = rotary_angles(self.rotary_emb.inv_freq, tokens_BL.shape[1], start)
        x_BLD = self.vocab_embed(tokens_BL)
        if self.num_classes:
            class_id = untold(tokens_BL) if class_id is None else class_id
            x_BLD = x_BLD + self.class_embed(class_id)[:, None]
        for number, block in enumerate(self.blocks):
            remember = None if cache is None else partial(cache.append, number)
            x_BLD = self.through(block, x_BLD, rotary, remember)
        if cache is not None:
            cache.advance(tokens_BL.shape[1])
        hidden_BLD = self.output_layer.normed(x_BLD)
        return with_class(hidden_BLD, class_id, self.num_classes) if self.num_classes else hidden_BLD

    def forward(self, tokens_BL: Tensor, sigma_B: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, V)."""
        return self.head(self.encode(tokens_BL, sigma_B, attention_mask))
