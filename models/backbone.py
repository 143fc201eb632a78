"""The base class of networks: `encode`, `head`, and declarations of what a network can do."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn


class Backbone(nn.Module):
    """A network in two parts, `encode` and `head`, so that logits are computed only where they are needed.

    A subclass has `head`, a linear layer, and encode(tokens_BL, sigma_B, attention_mask) -> hidden states (B, L, D). It
    declares its other abilities by these attributes.

    Attributes:
        causal: each position attends only to the left; the network has `new_cache`, and `encode` takes `cache`.
        encodes_positions: `encode` takes `at` (common/positions.py) and returns the hidden states there only.
        takes_classes: the constructor takes `num_classes`, and `encode` then takes `class_id`.
        num_classes: number of classes that it was built for; 0 for none.
        class_parameters: with classes, the matrices by which the trunk is told the class, and their columns for it.
        bigrams: output biases of token pairs in each class (models/class_bigrams.py), if it has any.
        reads_blocks: it has the methods of models/blocks.py, which block diffusion needs.
        reads_mixtures: `encode` also takes mixtures of tokens, weights (B, L, V).
        reads_latents: it has `encode_both` and `latent_shape`, for texts with latents.
        separates_documents: `encode` takes `document` (B, L), the number of each token's document, and tokens attend to
            their own document only.
        compiles: trainer.compile=true may compile `encode` and `encode_blocks`.
        mask_padding: no position attends to padding.
        knows_its_mask: its pretrained weights have a mask token, which the data must use.
        blocks: the repeated layers, which strategy=fsdp shards one by one.
        parts: name in training.freeze -> modules.
        settings: constructor arguments, by their keys on the command line.
    """

    causal = encodes_positions = takes_classes = compiles = knows_its_mask = False
    reads_blocks = reads_mixtures = reads_latents = separates_documents = False
    num_classes = 0
    bigrams: nn.Module | None
    mask_padding = True
    class_parameters: Iterable[tuple[nn.Parameter, slice]]
    blocks: Iterable[nn.Module]
    parts: Mapping[str, Iterable[nn.Module]] = {}
    settings: Mapping[str, object] = {}

    def __init__(self) -> None:
        super().__init__()
        self.register_module("bigrams", None)

    @property
    def vocab_size(self) -> int:
        return self.head.out_features

    def forward(self, tokens_BL: Tensor, sigma_B: Tensor | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """Return logits (B, L, V)."""
        return self.head(self.encode(tokens_BL, sigma_B, attention_mask))

    def pretrained(self) -> object | None:
        """Return the published weights that a new training starts from, or None."""
        return None

    def recompute_blocks(self) -> None:
        """Switch gradient checkpointing on (models/recompute.py). Raises ValueError if the network does not support
        it."""
        raise ValueError(
            f"training.gradient_checkpointing=true: {type(self).__name__} does not support it; leave it out"
        )

    def part_of(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Return the part of the network that the weights `state` belong to."""
        return self
