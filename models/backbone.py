"""What a network of texts offers, with the answers of one that offers no more than it must."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn


class Backbone(nn.Module):
    """A network in two parts, so that the vocabulary is paid for only where it is needed: `encode`, then `head`.

    A subclass has `head`, a linear layer, and encode(tokens_BL, sigma_B, attention_mask) -> hidden states (B, L, D).
    What else it can do it declares by these attributes.

    Attributes:
        causal: a position sees the left side only; then it has `new_cache`, and `encode` takes `cache`.
        encodes_positions: `encode` takes `at_BL` and gives the hidden states of those positions alone, for less.
        takes_classes: it can be built with `num_classes`, and `encode` then takes `class_id`.
        num_classes: that it was built for; 0 for none.
        reads_blocks: it has what models/blocks.py has, for block diffusion.
        reads_mixtures: `encode` also takes mixtures of tokens, weights (B, L, V).
        reads_latents: it has `encode_both` and `latent_shape`, for texts with latents.
        recomputes: it has `recompute_blocks`, gradient checkpointing.
        mask_padding: padding is hidden from the others.
        knows_its_mask: its weights have seen a mask already, so that the data's must be that one.
        blocks: the repeated part, which strategy=fsdp shares out piece by piece.
        parts: what training.freeze can name -> modules.
        settings: what it was built with, keys as on the command line.
    """

    causal = encodes_positions = takes_classes = recomputes = knows_its_mask = False
    reads_blocks = reads_mixtures = reads_latents = False
    num_classes = 0
    mask_padding = True
    blocks: Iterable[nn.Module]
    parts: Mapping[str, Iterable[nn.Module]] = {}
    settings: Mapping[str, object] = {}

    def pretrained(self) -> object | None:
        """Return the published weights that a new training starts from, if the network comes with such."""
        return None

    def part_of(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return the part of the network that the weights `state` are of: all of it, or a text stream."""
        return self
