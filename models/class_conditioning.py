"""Class-conditional networks: the class is an input of the trunk, and has output biases in the head.

A network with adaLN reads it in columns of its own of every adaLN, others in an embedding that is added to the tokens'.

Shape suffixes: B batch, L length, V vocabulary, D width, C classes, E embedding width.
"""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNCONDITIONAL = -1
# Of a DiT: the matrix has a column for each number of the bias, and then one for each class.
_SIGMA_BIAS, _ADALN_WEIGHT = "sigma_map.mlp.2.bias", "output_layer.adaLN_modulation.weight"


class ClassEmbedding(nn.Module):
    """class_id (B,) -> (B, E); zero for UNCONDITIONAL, which label dropout assigns."""

    def __init__(self, num_classes: int, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.embedding = nn.Parameter(scale * torch.randn(num_classes, dim))

    def forward(self, class_id_B: Tensor) -> Tensor:
        return F.embedding(class_id_B.clamp(min=0), self.embedding) * (class_id_B >= 0)[:, None]


def check_names(theirs: Collection[str], ours: Collection[str], file: str) -> None:
    """Refuse weights of a network that read the class in another way. Raises ValueError."""
    embedded = {"class_embed.embedding", "class_shift.embedding"} & {*theirs}
    if embedded and _SIGMA_BIAS in theirs and _SIGMA_BIAS in ours:
        raise ValueError(
            f"{file} was trained when a DiT read the class as an embedding, added to that of the noise level (until "
            "2026-11-30); its network would compute something else now: train it again, in another folder"
        )


def num_classes_of(state: Mapping[str, Tensor]) -> int:
    """Return the number of classes of the network that these weights are of, 0 without classes."""
    if "class_embed.embedding" in state:
        embedding = state["class_embed.embedding"]
        return len(embedding) if embedding.ndim else 0
    bias = state.get(_SIGMA_BIAS)
    weight = state.get(_ADALN_WEIGHT)
    if bias is None or weight is None or (bias.ndim, weight.ndim) != (1, 2):
        return 0
    return weight.shape[1] - len(bias)


class ClassHead(nn.Module):
    """A vocabulary projection with an output bias for each class, around one whose matrix is another layer's too.

    `weight` has the classes' biases as its last columns, as the head of a network built for classes.
    """

    def __init__(self, linear: nn.Linear, num_classes: int) -> None:
        super().__init__()
        self.linear = linear
        self.class_bias = nn.Parameter(linear.weight.new_zeros(linear.out_features, num_classes))
        self.out_features = linear.out_features

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.linear.weight, self.class_bias], dim=1)

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        return F.linear(hidden_BLD, self.weight, self.bias)


def class_columns(head: nn.Module, num_classes: int) -> tuple[nn.Parameter, slice]:
    """Return the parameter that holds the output biases of the classes, and its columns."""
    if isinstance(head, ClassHead):
        return head.class_bias, slice(None)
    return head.weight, slice(-num_classes, None)


def under_class(batch: Mapping[str, Tensor], class_id_B: Tensor, backbone: nn.Module) -> dict[str, Tensor]:
    """Return `batch` under these classes, for a comparison of classes.

    It has the entries `class_id` (B,), `class_bias` (B, L), the output bias of each token in the class, and, if the
    network has biases of token pairs, `pair_bias` (B, L), that of each token and the one before it, nats. Both are 0
    for UNCONDITIONAL.
    """
    parameter, _ = class_columns(backbone.head, backbone.num_classes)
    first = parameter.shape[1] - backbone.num_classes
    known_B1, class_B = (class_id_B >= 0)[:, None], class_id_B.clamp(min=0)
    bias_BL = parameter[batch["input_ids"], first + class_B[:, None]] * known_B1
    pairs = {}
    if backbone.bigrams is not None:
        bias_of_pair_BL = backbone.bigrams.of_text(batch["input_ids"], class_B) * known_B1
        pairs["pair_bias"] = bias_of_pair_BL * batch["attention_mask"] if "attention_mask" in batch else bias_of_pair_BL
    return {**batch, "class_id": class_id_B, "class_bias": bias_BL, **pairs}


def with_class(x: Tensor, class_id_B: Tensor, num_classes: int) -> Tensor:
    """Append the class as one-hot columns to x, (B, D) or (B, L, D); without classes, return it unchanged.

    The last C columns of a matrix that reads it are then a bias for each class. UNCONDITIONAL has none.
    """
    if not num_classes:
        return x
    one_hot = (class_id_B[:, None] == torch.arange(num_classes, device=class_id_B.device)).to(x.dtype)
    if x.ndim > one_hot.ndim:
        one_hot = one_hot[:, None].expand(-1, x.shape[1], -1)
    return torch.cat([x, one_hot], dim=-1)


def unconditional(tokens_BL: Tensor) -> Tensor:
    """Return the class_id (B,) of rows without a class."""
    return torch.full((len(tokens_BL),), UNCONDITIONAL, device=tokens_BL.device)


@torch.no_grad()
def start_from_counts(
    head: nn.Linear, counts_CV: Tensor, before_V: Tensor | None = None, bias_CV: Tensor | None = None
) -> None:
    """Set the output layer so that training starts from the unigram distribution of its texts (of each class).

    Args:
        counts_CV: tokens of the training texts by class; one row without classes.
        before_V: tokens of the texts that the weights were trained on before; their distribution is replaced. None for
            new weights. Frequencies are smoothed by adding one.
        bias_CV: nats by which the output biases of the classes differ from those of all texts; None takes them from
            the counts.
    """

    def log_frequencies(counts: Tensor) -> Tensor:
        smoothed = counts.double() + 1
        return smoothed.log() - smoothed.sum(-1, keepdim=True).log()

    all_V = log_frequencies(counts_CV.sum(0))
    head.bias.add_((all_V if before_V is None else all_V - log_frequencies(before_V)).to(head.bias))
    if len(counts_CV) > 1:
        bias_CV = log_frequencies(counts_CV) - all_V if bias_CV is None else bias_CV
        parameter, columns = class_columns(head, len(counts_CV))
        parameter[:, columns] = bias_CV.T.to(parameter)
