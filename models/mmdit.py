"""The multimodal diffusion transformer (MMDiT; Esser et al., arXiv 2403.03206, section 4): a stream of text tokens and
one of latent tokens, each with its own layers, that attend to both in one softmax.

The text stream is the DiT of models/dit.py with its parameter names and shapes; `text_stream` returns it. Shape
suffixes: B batch, L length, Q queried positions, N selected positions, V vocabulary, D width of the text stream, K
latent tokens, E width of the latent stream, C conditioning width, H heads, W width of a head, S numbers of a latent
token.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.common.positions import Positions
from palimpsest.common.values import FREE, AttentionBackend, BelowOne, Size
from palimpsest.models.attention import head_width, resolve_backend, rotary_angles
from palimpsest.models.backbone import Backbone
from palimpsest.models.class_conditioning import unconditional, with_class
from palimpsest.models.dit import DiT, OutputLayer
from palimpsest.models.layers import RotaryFrequencies, SigmaEmbedding, TokenEmbedding
from palimpsest.models.mmdit_layers import JointBlock, LatentInput, LatentOutput, Times
from palimpsest.models.recompute import Recomputing

_LATENT_PARAMETERS = ("latent_input.", "latent_output.", "times.")  # prefixes that no text-only network has


class MMDiT(Recomputing, Backbone):
    """A network that predicts clean tokens and clean latents, each from its own noise level, in one pass.

    Text: rotary positions, padding hidden as in the DiT. Latents: K tokens of S numbers without a position in the text;
    rotary angles apply to the text alone, and K > 1 tokens are identified by a learned vector each. Queries and keys of
    every head are RMS-normed in both streams. An unknown latent (time 1) is replaced by zeros.

    The two times have separate embedders (times 1000: models/mmdit_layers.py), mixed into the modulation of the latent
    stream. They enter that of the text through a layer that starts at zero, added to the sigma of the DiT. Without
    `time_conditioning` the text's time is hidden from both streams, as in the DiT; the latent's never is.

    `text_as_dit`: the text stream starts as exactly the function of the DiT with its weights, whatever the latents, so
    that `training.from_pretrained` can name a text-only model. Its queries and keys are then not normed (as in
    text-only models), and the effect of latents on its attention passes a gate for each head that starts closed, at the
    cost of a second attention over the text alone. Raises ValueError if there are no latents, or widths do not fit.

    Args:
        latent_shape: (K, S).
        latent_size: width E of the latent stream; None: that of the text. Its heads are as wide as the text's.
        The others are those of the DiT.
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
        attn_backend: Annotated[AttentionBackend, FREE] = "auto",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        if latent_shape is None:
            raise ValueError(
                "backbone=mmdit reads texts with latents, and these data have none; choose latents= and add "
                "algo=mmldlm, or use backbone=dit"
            )
        if min(latent_shape) < 1 or len(latent_shape) != 2:
            raise ValueError(f"latents of shape {tuple(latent_shape)} must be K >= 1 tokens of D >= 1 numbers")
        head_dim, backend = head_width(hidden_size, n_heads), resolve_backend(attn_backend)
        self.latent_shape, self.latent_size = tuple(latent_shape), latent_size or hidden_size
        self.time_conditioning, self.mask_padding = time_conditioning, mask_padding
        self.text_as_dit = text_as_dit
        self.cond_dim, self.n_heads = cond_dim, n_heads
        self.dropout, self.num_classes = dropout, num_classes
        self.vocab_embed = TokenEmbedding(vocab_size, hidden_size)
        self.sigma_map = SigmaEmbedding(cond_dim)
        self.rotary_emb = RotaryFrequencies(head_dim)
        self.blocks = nn.ModuleList(
            JointBlock(hidden_size, self.latent_size, cond_dim, n_heads, dropout, backend, text_as_dit, num_classes)
            for _ in range(n_blocks)
        )
        self.output_layer = OutputLayer(hidden_size, vocab_size, cond_dim + num_classes, num_classes)
        tokens, numbers = self.latent_shape
        self.times = Times(cond_dim)
        self.latent_input = LatentInput(numbers, self.latent_size, tokens)
        self.latent_output = LatentOutput(self.latent_size, numbers, cond_dim, dropout)

    @property
    def class_parameters(self) -> list[tuple[nn.Parameter, slice]]:
        """Return the matrices of adaLN in the text stream and of the gates, and their columns for the classes."""
        gates = [block.adaLN_gate for block in self.blocks if self.text_as_dit]
        return [*self.text_stream.class_parameters, *((gate.weight, slice(self.cond_dim, None)) for gate in gates)]

    @property
    def settings(self) -> dict[str, object]:
        """Return the constructor arguments, by their keys on the command line."""
        own = {"model.latent_size": self.latent_size, "backbone.text_as_dit": self.text_as_dit}
        return {**self.text_stream.settings, **own}

    @property
    def head(self) -> nn.Linear:
        """Return the vocabulary projection: hidden (..., D) -> logits (..., V)."""
        return self.output_layer.linear

    @property
    def parts(self) -> dict[str, list[nn.Module]]:
        """Return the modules that training.freeze can name: `text` is all that a text-only network has, `latent` all
        else (latent layers of the blocks, input and output, times, and the gates through which the text sees latents).
        """
        latent = [self.latent_input, self.latent_output, self.times, *(block.latent for block in self.blocks)]
        latent += [block.adaLN_gate for block in self.blocks if self.text_as_dit]
        text = [child for block in self.blocks for child in block.children() if child not in latent]
        return {
            **self.text_stream.parts, "embeddings": [self.vocab_embed, self.latent_input],
            "blocks": [self.blocks], "latent_head": [self.latent_output], "latent": latent,
            "text": [*self.text_stream.parts["conditioning"], self.vocab_embed, *text, self.output_layer],
        }  # fmt: skip

    @property
    def text_stream(self) -> DiT:
        """Return the text stream as a DiT that shares its parameters with this network."""
        with torch.device("meta"):
            alone = DiT(
                self.vocab_size,
                self.vocab_embed.embedding.shape[1],
                self.cond_dim,
                len(self.blocks),
                self.n_heads,
                self.dropout,
                self.time_conditioning,
                self.mask_padding,
                self.blocks[0].attn_backend,
                self.num_classes,
            )
        for name, module in alone.named_modules():
            own = self.get_submodule(name)
            for key in [*module._parameters]:
                module.register_parameter(key, getattr(own, key))
            module._buffers.update({key: getattr(own, key) for key in module._buffers})
        return alone.train(self.training)

    def part_of(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return the part that the weights `state` belong to: the network, or the text stream for those of a text-only
        model. Raises ValueError if they are of a text-only model, and the text stream computes another function."""
        if any(name.startswith(_LATENT_PARAMETERS) for name in state):
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
        """Return hidden states of the text as those of the DiT, (B, L, D) or (N, D).

        Args:
            context: the context of the DiT, and `latent` (B, K, S) at time `latent_t` (B,), from 0 (clean, the default)
                to 1 (unknown). Without a latent it is unknown.
        """
        return self._pass(tokens_BL, sigma_B, attention_mask, both=False, **context)[0]

    def encode_both(
        self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None = None, **context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the result of `encode` and the prediction for the latents, (B, K, S), float32 under autocast."""
        return self._pass(tokens_BL, sigma_B, attention_mask, both=True, **context)

    def _pass(
        self,
        tokens_BL: Tensor,
        sigma_B: Tensor,
        attention_mask: Tensor | None,
        *,
        both: bool,
        at: Positions | None = None,
        class_id: Tensor | None = None,
        latent: Tensor | None = None,
        latent_t: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        class_id = unconditional(tokens_BL) if class_id is None and self.num_classes else class_id
        latent_BKS, latent_t_B = self._latent_inputs(tokens_BL, latent, latent_t)
        c_BC, e_BC = self.conditioning(sigma_B, latent_t_B, class_id)
        rotary = rotary_angles(self.rotary_emb.inv_freq, tokens_BL.shape[1])
        key_mask_BL = attention_mask if self.mask_padding else None
        x_BLD, z_BKE = self.vocab_embed(tokens_BL), self.latent_input(latent_BKS)
        for block in self.blocks[:-1]:
            x_BLD, z_BKE = self.through(block, x_BLD, z_BKE, c_BC, e_BC, rotary, key_mask_BL)
        at_BQ = None if at is None else at.table_BQ
        x_BQD, z_BKE = self.through(self.blocks[-1], x_BLD, z_BKE, c_BC, e_BC, rotary, key_mask_BL, at_BQ, both)
        hidden_BQD = with_class(self.output_layer.normed(x_BQD, c_BC), class_id, self.num_classes)
        hidden = hidden_BQD if at is None else at.from_table(hidden_BQD)
        return hidden, self.latent_output(z_BKE, e_BC) if both else None

    def _latent_inputs(
        self, tokens_BL: Tensor, latent: Tensor | None, latent_t: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the latents as the network sees them, and their times, float64 (B,)."""
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
        """Return the inputs of adaLN in the text stream and in the latent stream, (B, C) each."""
        sigma_B = sigma_B if self.time_conditioning else torch.zeros_like(sigma_B)
        mixed_BC = self.times(-torch.expm1(-sigma_B.float()), latent_t_B)
        embedded_BC = F.silu(self.sigma_map(sigma_B) + self.times.to_text(mixed_BC))
        return with_class(embedded_BC, class_id, self.num_classes), F.silu(mixed_BC)
