"""Networks that know the answer: what every bound and every sampler can be checked against.

Shape suffixes: B batch, L length, N selected positions, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.corpora.exact_denoiser import ExactDenoiser
from palimpsest.corpora.reviews import ReviewGrammar, tokens
from palimpsest.objectives.base import Model
from palimpsest.process import Absorbing
from palimpsest.samplers.trace import Trace

_IMPOSSIBLE = -1e4


class Copies(torch.nn.Module):
    """The exact network of texts that are one of `num_words` tokens, all equally likely, repeated: -log p is
    log(num_words) for every text. `noise_shown`: what it was shown of the noise, one tensor for each evaluation."""

    causal, encodes_positions, num_classes = False, True, 0

    def __init__(self, num_words: int, mask_id: int) -> None:
        super().__init__()
        self.mask_id, self.num_words, self.noise_shown = mask_id, num_words, []
        self.head = identity_head(num_words + 1)

    def encode(
        self, tokens_BL: Tensor, sigma_B: Tensor, attention_mask: Tensor | None = None, at: Positions | None = None
    ) -> Tensor:
        """Log-probabilities, float64 (N, V); (B, L, V) without `at`."""
        self.noise_shown.append(sigma_B)
        return self._answers(tokens_BL.clone(), at)

    def encode_blocks(self, noised_BL: Tensor, clean_BL: Tensor, size: int, sigma_Bb: Tensor, at: Positions) -> Tensor:
        """As `encode`; every block sees the clean tokens of the blocks before it."""
        self.noise_shown.append(sigma_Bb.flatten())
        block_L = torch.arange(clean_BL.shape[1]) // size
        ahead_NL = block_L - block_L[at.place_N][:, None]
        earlier_NL = torch.where(ahead_NL < 0, clean_BL[at.row_N], self.mask_id)
        seen_NL = torch.where(ahead_NL == 0, noised_BL[at.row_N], earlier_NL)
        return self._answers(seen_NL, None)[:, 0]

    def _answers(self, x_BL: Tensor, at: Positions | None) -> Tensor:
        word_B1 = x_BL.masked_fill(x_BL == self.mask_id, -1).max(-1, keepdim=True).values
        id_V = torch.arange(self.num_words + 1)
        possible_BV = ((word_B1 < 0) | (id_V == word_B1)) & (id_V != self.mask_id)
        log_p_BV = torch.where(possible_BV, -possible_BV.sum(-1, keepdim=True).double().log(), _IMPOSSIBLE)
        log_p_BLV = log_p_BV[:, None].expand(*x_BL.shape, -1)
        return log_p_BLV if at is None else at.take(log_p_BLV)


def identity_head(vocab_size: int, bias: float | None = None) -> torch.nn.Linear:
    """An output layer for hidden states that are the logits already, plus `bias`."""
    head = torch.nn.Linear(vocab_size, vocab_size, bias=bias is not None, dtype=torch.float64).requires_grad_(False)
    torch.nn.init.eye_(head.weight)
    if bias is not None:
        head.bias.fill_(bias)
    return head


def for_sedd(network: torch.nn.Module) -> torch.nn.Module:
    """The same network with the logits that SEDD reads as exact scores: log p + log(V - 1)."""
    vocab_size = network.head.out_features
    network.head = identity_head(vocab_size, math.log(vocab_size - 1))
    return network


class ExactModel(Model):
    """An objective over an `ExactDenoiser`, whose own answer in float64 takes the place of the float32 projection."""

    def denoise(self, x_BL: Tensor, t_B: Tensor, at: Positions | None = None, **cond: Tensor) -> Tensor:
        return self.backbone.denoise(x_BL, t_B, at, **cond)


BOS, EOS, PAD, MASK = range(4)


class Reviews:
    """The embedded corpus, its exact denoiser and its exact -log p(text | length), nats."""

    def __init__(self) -> None:
        self.grammar = ReviewGrammar()
        self.id_of_token = {token: 4 + i for i, token in enumerate(self.grammar.vocabulary)}
        self.vocab_size = 4 + len(self.id_of_token)

    def denoiser(self) -> ExactDenoiser:
        return ExactDenoiser(self.grammar.grammars, self.id_of_token, MASK, self.vocab_size)

    def batch(self, texts: list[str]) -> dict[str, Tensor]:
        """Rows of BOS, text, EOS, padding, as data=reviews packs them."""
        rows = [[BOS, *(self.id_of_token[token] for token in tokens(text)), EOS] for text in texts]
        width = max(map(len, rows))
        x_BL = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        return {"input_ids": x_BL, "attention_mask": x_BL != PAD, "observed": x_BL < MASK,
                "sample_id": torch.arange(len(rows))}  # fmt: skip

    def nats(self, texts: list[str]) -> np.ndarray:
        lengths = [len(tokens(text)) for text in texts]
        both = np.logaddexp.reduce([self.grammar.log_prob(texts, label) for label in (0, 1)])
        return np.logaddexp.reduce([self.grammar.log_prob_length(lengths, label) for label in (0, 1)]) - both


def frame(step: int, ids_BL: Tensor, confidence_BL: Tensor, evaluations_B: Tensor | None = None) -> Trace:
    """A trace as somebody who watches a sampler sees it after `step`."""
    seen = Trace(ids_BL, Absorbing(MASK))
    seen.num_steps, seen.confidence_BL = step, confidence_BL
    seen.evaluations_B = torch.zeros(len(ids_BL)) if evaluations_B is None else evaluations_B
    return seen


def written(x_BL: Tensor, ids_BL: Tensor, mask_id: int) -> Trace:
    """Return the trace of a sampler that replaces `x_BL` by `ids_BL` in one step."""
    done = frame(1, ids_BL, torch.ones(ids_BL.shape))
    done.step_BL = (x_BL == mask_id).long()
    return done
