"""The autoregressive transformer of the references: the block of the DiT, causal and without conditioning.

Parameter names and shapes are those of the reference checkpoints (kuleshov-group/mdlm, bd3lms).
Shape suffixes: B batch, L length, V vocabulary, D width, H heads.
"""

from functools import partial
from typing import Annotated

from torch import Tensor, nn

from palimpsest.common.values import FREE, AttentionBackend, BelowOne, Size
from palimpsest.models.attention import SeenKeys, head_width, resolve_backend, rotary_angles, seen_keys
from palimpsest.models.backbone import Backbone
from palimpsest.models.class_conditioning import ClassEmbedding, unconditional, with_class
from palimpsest.models.kv_cache import KVCache, one_token
from palimpsest.models.layers import RotaryFrequencies, TokenEmbedding
from palimpsest.models.recompute import Recomputing
from palimpsest.models.transformer import CacheAppend, Head, Rotary, TransformerBlock


class ARBlock(TransformerBlock):
    """Causal attention and MLP with pre-norm residual connections."""

    def forward(
        self, x_BLD: Tensor, rotary: Rotary, append: CacheAppend | None, seen: SeenKeys | None = None
    ) -> Tensor:
        x_BLD = x_BLD + self.project(self.attention(self.norm1(x_BLD), rotary, seen, append=append))
        return x_BLD + self.transform(self.norm2(x_BLD))


class AR(Recomputing, Backbone):
    """A causal transformer that predicts the next token: `encode(tokens_BL)`, then `head(hidden)`.

    `encode` ignores the noise level and the padding mask, which every backbone takes: there is no noise, and padding is
    on the right, where causal attention does not look. With `num_classes` it takes the class of each text (`class_id`,
    -1 for none), which is added to each token embedding and has an output bias.
    """

    causal = takes_classes = separates_documents = True

    def __init__(
        self,
        vocab_size: int,
        hidden_size: Size,
        n_blocks: Size,
        n_heads: Size,
        dropout: BelowOne = 0.1,
        attn_backend: Annotated[AttentionBackend, FREE] = "auto",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.n_heads, head_dim = n_heads, head_width(hidden_size, n_heads)
        backend = resolve_backend(attn_backend)
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
    def class_parameters(self) -> list[tuple[nn.Parameter, slice]]:
        """Return the class embedding."""
        return [(self.class_embed.embedding, slice(None))]

    @property
    def head(self) -> nn.Linear:
        """Return the vocabulary projection: hidden (..., D) -> logits (..., V)."""
        return self.output_layer.linear

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """Return the modules that training.freeze can name."""
        embeddings = [self.vocab_embed, *([self.class_embed] if self.num_classes else [])]
        return {"embeddings": embeddings, "blocks": [self.blocks], "head": [self.output_layer]}

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """Return an empty cache for `length` positions, in the precision of the attention."""
        return KVCache(len(self.blocks), batch_size, length, one_token(self.vocab_embed.embedding, self.n_heads))

    def encode(
        self,
        tokens_BL: Tensor,
        sigma_B: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        class_id: Tensor | None = None,
        document: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states (B, L, D), ready for `head`; position i depends on the tokens up to i.

        With `document` (B, L) it depends on those of the same document only.
        With `cache`, `tokens_BL` continue the `cache.length` tokens before them and are added to the cache. Raises
        ValueError if the cache is too small for the tokens, or was made for another batch size.
        """
        start = 0
        if cache is not None:
            cache.check_capacity(tokens_BL)
            start = cache.length
        rotary = rotary_angles(self.rotary_emb.inv_freq, tokens_BL.shape[1], start)
        x_BLD = self.vocab_embed(tokens_BL)
        if self.num_classes:
            class_id = unconditional(tokens_BL) if class_id is None else class_id
            x_BLD = x_BLD + self.class_embed(class_id)[:, None]
        seen = seen_keys(None, document, self.blocks[0].attn_backend)
        for number, block in enumerate(self.blocks):
            append = None if cache is None else partial(cache.append, number)
            x_BLD = self.through(block, x_BLD, rotary, append, seen)
        if cache is not None:
            cache.length += tokens_BL.shape[1]
        return with_class(self.output_layer.normed(x_BLD), class_id, self.num_classes)
