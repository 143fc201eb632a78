"""Output biases of token pairs in each class, which correct the sum of the two tokens' own biases.

A network's trunk reads the context as a whole. These biases are a plain table beside it: where the token before or
after a masked position is visible, the logit of each token gets the bias of the pair. The softmax over the vocabulary
comes after it, so p(text | class) stays normalised. If a text is unmasked one token at a time, one of two
adjacent tokens is always unmasked first, so every pair counts exactly once.

Shape suffixes: B batch, L length, N selected positions, C positions of a chunk of logits, E biases to be added,
V vocabulary, P pairs.
"""

import torch
from torch import Tensor, nn

from palimpsest.common.positions import Positions

_NONE = -1  # no visible neighbour


class ClassBigrams(nn.Module):
    """A fixed table of biases, (classes, P), of which `set` receives the values."""

    def __init__(self, vocab_size: int, num_classes: int, num_pairs: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.register_buffer("first_P", torch.full((num_pairs,), vocab_size))  # sorted, then by `second_P`
        self.register_buffer("second_P", torch.full((num_pairs,), vocab_size))
        self.register_buffer("by_second_P", torch.arange(num_pairs))  # the order of the pairs by their second token
        self.register_buffer("bias_CP", torch.zeros(num_classes, num_pairs))

    def set(self, first_P: Tensor, second_P: Tensor, bias_CP: Tensor) -> None:
        """Receive the pairs, sorted by their first and then by their second token, and their biases, nats."""
        self.first_P.copy_(first_P)
        self.second_P.copy_(second_P)
        self.by_second_P.copy_(second_P.argsort(stable=True))
        self.bias_CP.copy_(bias_CP)

    def neighbours(
        self, x_BL: Tensor, visible_BL: Tensor, at: Positions, class_id_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the visible token before and after each position, or -1, and the class of its row, (N,) each."""
        none_B1 = x_BL.new_full((len(x_BL), 1), _NONE)
        token_BL = x_BL.where(visible_BL, _NONE)
        before_BL = torch.cat([none_B1, token_BL[:, :-1]], dim=1)
        after_BL = torch.cat([token_BL[:, 1:], none_B1], dim=1)
        return at.take(before_BL), at.take(after_BL), at.of_rows(class_id_B)

    def add(self, logits_CV: Tensor, before_C: Tensor, after_C: Tensor, class_C: Tensor) -> None:
        """Add the biases of the pairs of each position and its neighbours, in place; none where there is no class."""
        flat = logits_CV.as_strided((logits_CV.numel(),), (1,))  # dense; in the layout (V, C) on a CPU
        by_row, by_token = logits_CV.stride()
        for sorted_P, order_P, other_P, known_C in (
            (self.first_P, None, self.second_P, before_C),
            (self.second_P[self.by_second_P], self.by_second_P, self.first_P, after_C),
        ):
            known_C = known_C.where(class_C >= 0, _NONE)
            start_C = torch.searchsorted(sorted_P, known_C)
            number_C = torch.searchsorted(sorted_P, known_C, right=True) - start_C
            row_E = torch.repeat_interleave(number_C)
            place_E = torch.arange(len(row_E), device=row_E.device) + (start_C - number_C.cumsum(0) + number_C)[row_E]
            pair_E = place_E if order_P is None else order_P[place_E]
            bias_E = self.bias_CP.flatten()[class_C[row_E] * len(sorted_P) + pair_E]
            flat.index_add_(0, row_E * by_row + other_P[pair_E] * by_token, bias_E.to(logits_CV.dtype))

    def of_text(self, tokens_BL: Tensor, class_id_B: Tensor) -> Tensor:
        """Return the bias of each token and the one before it in the row's class, (B, L); 0 for other pairs."""
        key_P = self.first_P * (self.vocab_size + 1) + self.second_P
        key_BL = tokens_BL[:, :-1] * (self.vocab_size + 1) + tokens_BL[:, 1:]
        pair_BL = torch.searchsorted(key_P, key_BL.contiguous()).clamp(max=len(key_P) - 1)
        bias_BL = self.bias_CP[class_id_B[:, None], pair_BL] * (key_P[pair_BL] == key_BL)
        return torch.cat([torch.zeros_like(bias_BL[:, :1]), bias_BL], dim=1)
