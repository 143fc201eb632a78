"""The multimodal diffusion transformer: a stream of text tokens and one of latent tokens, each with layers of its own,
that attend to both in one softmax (MMDiT; Esser et al., arXiv 2403.03206, section 4).

The text stream is the DiT of models/dit.py, parameter names and shapes included: `text_stream` is that network.
Shape suffixes: B batch, L length, Q queried positions, N selected positions, V vocabulary, D width of the text stream,
K latent tokens, E width of the latent stream, C conditioning width, H heads, W width of a head, S numbers of a latent
token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.common.values import FREE, BelowOne, Size
from palimpsest.models.attention import head_width, resolve_backend, rotary_angles
from palimpsest.models.backbone import Backbone
from palimpsest.models.class_conditioning import ClassEmbedding, untold, with_class
from palimpsest.models.dit import DiT, OutputLayer
from palimpsest.models.layers import RotaryFrequencies, SigmaEmbedding, TokenEmbedding
from palimpsest.models.mmdit_layers import JointBlock, LatentInput, LatentOutput, Times
from palimpsest.models.recompute import Recomputing
from palimpsest.models.transformer import Rotary, queried

# What only a network with latents has, as its parameters' names say it.
_OF_LATENTS = ("latent_input.", "latent_output.", "times.")


class MMDiT(Recomputing, Backbone):
    """Tokens with their noise level, latents with theirs -> what is behind both, in one pass.

    Text: rotary positions, padding hidden as in the DiT. Latents: K tokens of S numbers without a place in the text:
    rotary angles are the text's alone, and K > 1 of them are told apart by a learned vector each. Queries and keys of
    every head are RMS-normed in both streams. A latent of which nothing is known (its time is 1) is shown as zeros,
    whatever was given.

    The two times have embedders of their own (times 1000: models/mmdit_layers.py), mixed into what modulates the latent
    stream; into the text's they enter through a layer that starts at zero, beside the sigma of the DiT. Without
    `time_conditioning` the text's time is hidden from both streams, as in the DiT; the latent's never is.

    `text_as_dit`: the text stream begins as the very function that the DiT of its weights is, whatever the latents, so
    that `training.from_pretrained` can name a text-only model. Two things give way: its queries and keys are not
    normed (no text-only model's are), and what latents change in its attention passes a gate for each head that starts
    closed, which takes a second attention over the text alone.

    Args:
        latent_shape: (K, S).
        latent_size: width E of the latent stream; None: that of the text. Its heads are as wide as the text's.
        The others are the DiT's.

    Raises:
        ValueError: there are no latents, or widths that do not fit.
    """

    encodes_positions = takes_classes = reads_latents = True

    def __init__(
        self,
        vocab_size: int,
        hidden_size: Size,
        cond_dim: Size,
        n_blocks: Size,
        n_heads: Size,
        latent_shape: tuple[int, int] | None = None,
        latent_size: Size | None = None,
        dropout: BelowOne = 0.1,
        time_conditioning: bool = True,
        mask_padding: bool = True,
        text_as_dit: bool = False,
        attn_backend: Annotated[Literal["sdpa", "flash_attn", "flex"], FREE] = "sdpa",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        _check(latent_shape)
        head_dim, backend = head_width(hidden_size, n_heads), resolve_backend(attn_backend)
        self.latent_shape, self.latent_size = tuple(latent_shape), latent_size or hidden_size
        self.time_conditioning, self.mask_padding, self.text_as_dit = time_conditioning, mask_padding, text_as_dit
        self.cond_dim, self.n_heads, self.dropout, self.num_classes = cond_dim, n_heads, dropout, num_classes
        self.vocab_embed = TokenEmbedding(vocab_size, hidden_size)
        self.sigma_map = SigmaEmbedding(cond_dim)
        self.rotary_emb = RotaryFrequencies(head_dim)
        self.blocks = nn.ModuleList(
            JointBlock(hidden_size, self.latent_size, cond_dim, n_heads, dropout, backend, gated=text_as_dit)
            for _ in range(n_blocks)
        )
        self.output_layer = OutputLayer(hidden_size, vocab_size, cond_dim, num_classes)
        if num_classes:
            self.class_embed = ClassEmbedding(num_classes, cond_dim)
        numbers = self.latent_shape[1]
        self.times = Times(cond_dim)
        self.latent_input = LatentInput(numbers, self.latent_size, self.latent_shape[0])
        self.latent_output = LatentOutput(self.latent_size, numbers, cond_dim, dropout)

    @property
    def vocab_size(self) -> int:
        return self.output_layer.linear.out_features

    @property
    def settings(self) -> dict[str, object]:
        """What the network was built with, keys as on the command line."""
        return {**self.text_stream.settings, "model.latent_size": self.latent_size,
                "backbone.text_as_dit": self.text_as_dit}  # fmt: skip

    @property
    def head(self) -> nn.Linear:
        """The vocabulary projection: hidden (..., D) -> logits (..., V)."""
        return self.output_layer.linear

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """What training.freeze can name. `text` is what a text-only network has, `latent` everything else: its layers
        in the blocks, its ends, the times, and the gates through which the text sees it."""
        latent = [self.latent_input, self.latent_output, self.times]
        latent += [block.latent for block in self.blocks]
        latent += [block.adaLN_gate for block in self.blocks if self.text_as_dit]
        text = [child for block in self.blocks for child in block.children() if child not in latent]
        return {
            **self.text_stream.parts, "embeddings": [self.vocab_embed, self.latent_input],
            "blocks": [self.blocks], "latent_head": [self.latent_output], "latent": latent,
            "text": [*self.text_stream.parts["conditioning"], self.vocab_embed, *text, self.output_layer],
        }  # fmt: skip

    @property
    def text_stream(self) -> DiT:
        """The text stream as a network of its own: a DiT that has these very parameters, not copies."""
        with torch.device("meta"):
            alone = DiT(
                self.vocab_size, self.vocab_embed.embedding.shape[1], self.cond_dim, len(self.blocks), self.n_heads,
                self.dropout, self.time_conditioning, self.mask_padding, self.blocks[0].attn_backend, self.num_classes,
            )  # fmt: skip
        for name, module in alone.named_modules():
            own = self.get_submodule(name)
            for key in [*module._parameters]:
                module.register_parameter(key, getattr(own, key))
            module._buffers.update({key: getattr(own, key) for key in module._buffers})
        return alone.train(self.training)

    def part_of(self, state: Mapping[str, Tensor]) -> nn.Module:
        """What of the network the weights `state` are of: all of it or, of a text-only model, the text stream.

        Raises:
            ValueError: they are a text-only model's, and the text stream computes something else.
        """
        if any(name.startswith(_OF_LATENTS) for name in state):
            return self
        if not self.text_as_dit:
            raise ValueError(
                "training.from_pretrained names a text-only model, whose attention norms no queries and keys and knows "
                "no latents; for a text stream that begins as that model add backbone.text_as_dit=true"
            )
        return self.text_stream

    def encode(
        self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None = None, **context: Tensor | None
    ) -> Tensor:
        """Hidden states of the text as those of the DiT, (B, L, D) or (N, D). context: what the DiT is told, and
        `latent` (B, K, S) at its time `latent_t` (B,): 0, which is meant without one, says that it is clean, 1 that
        nothing is known of it. No latent is one of which nothing is known."""
        return self._pass(tokens_BL, sigma_B, attention_mask, both=False, **context)[0]

    def encode_both(
        self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None = None, **context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `encode`, and beside it what the network says of the latents, (B, K, S), float32 under autocast."""
        return self._pass(tokens_BL, sigma_B, attention_mask, both=True, **context)

    def _pass(
        self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None, *, both: bool,
        at_BL: Tensor | None = None, class_id: Tensor | None = None, latent: Tensor | None = None,
        latent_t: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        class_id = untold(tokens_BL) if class_id is None and self.num_classes else class_id
        latent_BKS, latent_t_B = self._shown(tokens_BL, latent, latent_t)
        c_BC, e_BC = self.conditioning(sigma_B, latent_t_B, class_id)
        rotary = rotary_angles(self.rotary_emb.inv_freq, tokens_BL.shape[1])
        key_mask_BL = attention_mask if self.mask_padding else None
        x_BLD, z_BKE = self.vocab_embed(tokens_BL), self.latent_input(latent_BKS)
        for block in self.blocks[:-1]:
            x_BLD, z_BKE = self.through(block, x_BLD, z_BKE, c_BC, e_BC, rotary, key_mask_BL)
        x_BLD, z_BKE, here_BQ = self._last(x_BLD, z_BKE, c_BC, e_BC, rotary, key_mask_BL, at_BL, both)
        hidden_BQD = self.output_layer.normed(x_BLD, c_BC)
        hidden_BQD = with_class(hidden_BQD, class_id, self.num_classes) if self.num_classes else hidden_BQD
        hidden = hidden_BQD if here_BQ is None else hidden_BQD[here_BQ]
        return hidden, self.latent_output(z_BKE, e_BC) if both else None

    def _last(
        self, x_BLD: Tensor, z_BKE: Tensor, c_BC: Tensor, e_BC: Tensor, rotary: Rotary, key_mask_BL: Tensor | None,
        at_BL: Tensor | None, both: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The last block, for the positions that are asked for alone: (B, Q, D), and which of these Q are meant."""
        block = self.blocks[-1]
        if at_BL is None:
            return *self.through(block, x_BLD, z_BKE, c_BC, e_BC, rotary, key_mask_BL, None, both), None
        at_BQ, here_BQ = queried(at_BL)
        return *self.through(block, x_BLD, z_BKE, c_BC, e_BC, rotary, key_mask_BL, at_BQ, both), here_BQ

    def _shown(self, tokens_BL: Tensor, latent: Tensor | None, latent_t: Tensor | None) -> tuple[Tensor, Tensor]:
        """The latents that are shown and their times, float64 (B,)."""
        weight = self.latent_input.skip.weight
        if latent is None:
            latent = weight.new_zeros((len(tokens_BL), *self.latent_shape))
            latent_t = torch.ones(len(tokens_BL), dtype=torch.float64, device=tokens_BL.device)
        elif latent.shape[1:] != self.latent_shape:
            raise ValueError(f"latents of shape {tuple(latent.shape[1:])}, where the network has {self.latent_shape}")
        elif latent_t is None:
            latent_t = torch.zeros(len(tokens_BL), dtype=torch.float64, device=tokens_BL.device)
        return latent.to(weight.dtype).masked_fill((latent_t >= 1)[:, None, None], 0.0), latent_t

    def conditioning(
        self, sigma_B: Tensor, latent_t_B: Tensor, class_id: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What adaLN sees in the text stream, and in the latent stream, (B, C) each."""
        sigma_B = sigma_B if self.time_conditioning else torch.zeros_like(sigma_B)
        mixed_BC = self.times(-torch.expm1(-sigma_B.float()), latent_t_B)
        embedded_BC = self.sigma_map(sigma_B) + self.times.to_text(mixed_BC)
        embedded_BC = embedded_BC if class_id is None else embedded_BC + self.class_embed(class_id)
        return F.silu(embedded_BC), F.silu(mixed_BC)

    def forward(self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, L, V), without a latent."""
        return self.head(self.encode(tokens_BL, sigma_B, attention_mask))


def _check(latent_shape: tuple[int, int] | None) -> None:
    if latent_shape is None:
        raise ValueError(
            "backbone=mmdit is a network of texts and their latents, and there are none; choose latents= and add "
            "algo=mmldlm, or use backbone=dit"
        )
    if min(latent_shape) < 1 or len(latent_shape) != 2:
        raise ValueError(f"latents of shape {tuple(latent_shape)} must be K >= 1 tokens of D >= 1 numbers")
