"""How a network is told the class of a text: an embedding for its trunk, an output bias of its own for its head.

Shape suffixes: B batch, L length, V vocabulary, D width, C classes, E embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNTOLD = -1


class ClassEmbedding(nn.Module):
    """class_id (B,) -> (B, E); zero for UNTOLD, the class that label dropout leaves."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_classes, dim))

    def forward(self, class_id_B: Tensor) -> Tensor:
        return F.embedding(class_id_B.clamp(min=0), self.embedding) * (class_id_B >= 0)[:, None]


def with_class(hidden_BLD: Tensor, class_id_B: Tensor, num_classes: int) -> Tensor:
    """Hidden states with the class as one-hot columns, (B, L, D + C): the head's last C columns then are the classes'
    own output biases, and whatever projects the hidden states needs to know nothing of classes."""
    one_hot_BC = (class_id_B[:, None] == torch.arange(num_classes, device=class_id_B.device)).to(hidden_BLD.dtype)
    return torch.cat([hidden_BLD, one_hot_BC[:, None].expand(-1, hidden_BLD.shape[1], -1)], dim=-1)


def untold(tokens_BL: Tensor) -> Tensor:
    """class_id of rows whose class is not said, (B,)."""
    return torch.full((len(tokens_BL),), UNTOLD, device=tokens_BL.device)


@torch.no_grad()
def start_from_counts(head: nn.Linear, counts_CV: Tensor, before_V: Tensor | None = None) -> None:
    """Begin a training at token frequencies: an output layer that starts at zero then predicts the unigram law of its
    training texts (of each class, where the head has their columns) instead of having to learn it first.

    counts_CV: tokens of the training texts, by class (one row where there are none). before_V: those of the texts that
    the weights were trained on already, whose law is exchanged for the new one; None for new weights. Frequencies are
    smoothed by adding one.
    """

    def log_law(counts: Tensor) -> Tensor:
        smoothed = counts.double() + 1
        return smoothed.log() - smoothed.sum(-1, keepdim=True).log()

    all_V = log_law(counts_CV.sum(0))
    head.bias += (all_V if before_V is None else all_V - log_law(before_V)).to(head.bias)
    if len(counts_CV) > 1:
        head.weight[:, -len(counts_CV) :] = (log_law(counts_CV) - all_V).T.to(head.weight)
