"""Diffusion with masks and random words: GIDD (von Rütte et al., arXiv 2503.04482).

Shape suffixes: B batch, L length, N scored positions, C positions of a chunk, V vocabulary, D width.
"""

import torch
from torch import Tensor

from palimpsest.objectives.udlm import LeaveOneOut
from palimpsest.process import Hybrid

_SMALLEST = 1e-20  # probability of one random word, by which the bound divides


class GIDD(LeaveOneOut):
    """Diffusion whose noise is the mask or a random word; the network gives the mask no probability."""

    processes = (Hybrid,)
    process: Hybrid

    @property
    def banned_id(self) -> int:
        return self.process.mask_id

    def integrand(self, logits_CV: Tensor, ids_C2: Tensor, alpha_C: Tensor) -> Tensor:
        """Return the integrand of the continuous-time NELBO (GIDD, theorem 3.5)."""
        kept_C, word_C = self._kept_and_word(alpha_C)
        return self.divergence(_picked_and_summed(logits_CV, ids_C2, kept_C / word_C).double(), ids_C2, alpha_C)

    def _kept_and_word(self, alpha_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probability that a token is kept, and that of each single word as noise, (N,) each."""
        level = self.process.level(alpha_N)
        return level.kept, (level.word / (self.process.vocab_size - 1)).clamp(min=_SMALLEST)

    def divergence(self, picked_N3: Tensor, ids_N2: Tensor, alpha_N: Tensor) -> Tensor:
        """Return the integrand per unit of -alpha.

        It is the rate at which tokens become x_t over q(x_t | x_0), times the sum of two divergences: the
        Kullback-Leibler divergence between q(. | x_0) and q(. | prediction), and the Itakura-Saito divergence at x_t.

        Args:
            picked_N3: the prediction's log p(x_0), log p(x_t), and sum over the words v of log(1 + kept p(v) / word).
        """
        level, (kept_N, word_N) = self.process.level(alpha_N), self._kept_and_word(alpha_N)
        log_p0_N, log_pt_N, log_sum_N = picked_N3.unbind(1)
        odds_N, masked_N = kept_N / word_N, ids_N2[:, 1] == self.process.mask_id
        same_N = (ids_N2[:, 0] == ids_N2[:, 1]).double()
        found_0_N = (odds_N * log_p0_N.exp()).log1p()
        kl_N = (kept_N + word_N) * (odds_N.log1p() - found_0_N) - word_N * (log_sum_N - found_0_N)
        log_ratio_N = (odds_N * same_N).log1p() - (odds_N * log_pt_N.exp()).log1p()
        itakura_saito_N = torch.where(masked_N, 0.0, log_ratio_N.expm1() - log_ratio_N)
        rate_N = torch.where(masked_N, level.mask_rate, level.word_rate / (self.process.vocab_size - 1))
        true_N = torch.where(masked_N, level.mask.clamp(min=_SMALLEST), word_N + kept_N * same_N)
        return rate_N / true_N * (kl_N + itakura_saito_N)


def _picked_and_summed(logits_CV: Tensor, ids_C2: Tensor, odds_C: Tensor) -> Tensor:
    """Return log p of x_0 and of x_t, and the sum over the vocabulary of log(1 + odds p), (C, 3)."""
    log_p_CV = logits_CV.log_softmax(-1)
    grown_CV = (odds_C.to(logits_CV.dtype)[:, None] * log_p_CV.exp()).log1p()
    return torch.cat([log_p_CV.gather(1, ids_C2), grown_CV.sum(-1, keepdim=True)], dim=1)
