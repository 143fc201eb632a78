"""Forward processes: how clean tokens become noise, and the distribution of one step back.

A process says what noise is; a noise schedule (noise_schedule.py) says how much of it there is at time t. So the
methods here take alpha, the probability that a token is kept, and never t.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, S times of a grid.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import IF_SET, InsideOne


class Process(ABC):
    """A Markov chain that corrupts every token independently: x_t is x_0 with probability alpha, otherwise noise.

    Attributes:
        blank_id: marks the tokens that a sampler is to write.
        vocab_size: number of tokens that a network scores, noise included.
    """

    blank_id: int
    vocab_size: int | None

    @classmethod
    @abstractmethod
    def of(cls, vocab_size: int, own_size: int, mask_id: int) -> Self:
        """Build the process for a tokenizer with `own_size` ids, `vocab_size` with its mask."""

    @abstractmethod
    def prior(self, x_BL: Tensor, noise: KeyedNoise, where_BL: Tensor) -> Tensor:
        """Return `x_BL` with pure noise, a draw of x_1, at the True positions of `where_BL`."""

    @abstractmethod
    def corrupt(self, x0_BL: Tensor, alpha_B: Tensor, noise: KeyedNoise, where_BL: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t | x_0) at the True positions of `where_BL`; the other tokens are kept."""

    @abstractmethod
    def posterior(self, xt_N: Tensor, log_p_x0_NV: Tensor, alpha_t_N: Tensor, alpha_s_N: Tensor) -> Tensor:
        """Return log p(x_s | x_t) for s < t, (N, V) in the precision of alpha.

        It is the mean of q(x_s | x_t, x_0) over the prediction of x_0, `log_p_x0_NV`.
        """


class Absorbing(Process):
    """Noise is the mask token, and a masked token stays masked (MDLM, arXiv 2406.07524, eq. 5)."""

    def __init__(self, mask_id: int, vocab_size: int | None = None) -> None:
        self.mask_id = self.blank_id = mask_id
        self.vocab_size = vocab_size

    @classmethod
    def of(cls, vocab_size: int, own_size: int, mask_id: int) -> Self:
        return cls(mask_id, vocab_size)

    def is_corrupted(self, x: Tensor) -> Tensor:
        """Return True where a token is the mask."""
        return x == self.mask_id

    def mask(self, x_BL: Tensor, where_BL: Tensor) -> Tensor:
        """Return `x_BL` with masks at the True positions of `where_BL`."""
        return torch.where(where_BL, self.mask_id, x_BL)

    def prior(self, x_BL: Tensor, noise: KeyedNoise, where_BL: Tensor) -> Tensor:
        return self.mask(x_BL, where_BL)

    def corrupt(self, x0_BL: Tensor, alpha_B: Tensor, noise: KeyedNoise, where_BL: Tensor) -> Tensor:
        return self.mask(x0_BL, (noise.uniform(x0_BL.shape[1]) < (1 - alpha_B)[:, None]) & where_BL)

    def posterior(self, xt_N: Tensor, log_p_x0_NV: Tensor, alpha_t_N: Tensor, alpha_s_N: Tensor) -> Tensor:
        """Return eq. 7 of MDLM: a mask becomes a predicted token with `unmask_prob`; other tokens stay."""
        unmask_N = unmask_prob(alpha_t_N, alpha_s_N)
        out_NV = log_p_x0_NV + unmask_N.log()[:, None]
        out_NV[:, self.mask_id] = torch.log1p(-unmask_N)
        return self.keep_visible(out_NV, xt_N)

    def keep_visible(self, log_p_NV: Tensor, x_N: Tensor) -> Tensor:
        """Put all probability on each unmasked token, in place ("carry-over unmasking")."""
        x_N1 = x_N[:, None]
        visible_N1 = ~self.is_corrupted(x_N1)
        own_N1 = log_p_NV.gather(1, x_N1).masked_fill(visible_N1, 0.0)
        return log_p_NV.masked_fill_(visible_N1, -torch.inf).scatter_(1, x_N1, own_N1)


class Resampling(Process):
    """A process whose noise is other tokens, so a noised text does not show which of its tokens are noise.

    Its reverse step uses the leave-one-out posterior, log p(x_0 | the other tokens of x_t) (arXiv 2605.22765).
    """

    @abstractmethod
    def keep_prob(self, alpha: Tensor) -> Tensor:
        """Return the probability that x_t is x_0 itself."""

    @abstractmethod
    def noise_prob(self, alpha_N: Tensor) -> Tensor:
        """Return the probability of each token as noise, (N, V); with `keep_prob` they sum to 1."""

    def posterior(self, xt_N: Tensor, log_p_x0_NV: Tensor, alpha_t_N: Tensor, alpha_s_N: Tensor) -> Tensor:
        """Average q(x_s | x_t, x_0) = q(x_t | x_s) q(x_s | x_0) / q(x_t | x_0) over the prediction of x_0."""
        others_NV = self.without_own_token(xt_N, log_p_x0_NV, alpha_t_N).exp()
        before_NV = self.keep_prob(alpha_s_N)[:, None] * others_NV + self.noise_prob(alpha_s_N)
        return (before_NV.log() + self._log_step(xt_N, alpha_t_N, alpha_s_N)).log_softmax(-1)

    def conditional(self, xt_N: Tensor, log_p_x0_NV: Tensor, alpha_N: Tensor) -> Tensor:
        """Return log p(x_t at a position | the other tokens of x_t), (N, V), for Gibbs sampling (arXiv 2605.22765)."""
        others_NV = self.without_own_token(xt_N, log_p_x0_NV, alpha_N).exp()
        return (self.keep_prob(alpha_N)[:, None] * others_NV + self.noise_prob(alpha_N)).log()

    def given_others(
        self, ids_N: Tensor, xt_N: Tensor, log_p_NV: Tensor, alpha_t_N: Tensor, alpha_s_N: Tensor
    ) -> Tensor:
        """Return log p(x_0 = ids | the other tokens of x_t), float64 (N,), from log p(x_s | x_t): the inverse of
        `posterior`."""
        log_q_NV = self._log_step(xt_N, alpha_t_N, alpha_s_N)  # -inf where log p is
        before_NV = (log_p_NV.double() - log_q_NV.clamp(min=torch.finfo(torch.float64).min)).softmax(-1)
        own_N1, noise_N1 = (part.gather(1, ids_N[:, None]) for part in (before_NV, self.noise_prob(alpha_s_N)))
        return ((own_N1.squeeze(1) - noise_N1.squeeze(1)) / self.keep_prob(alpha_s_N)).clamp(min=0).log()

    def without_own_token(self, xt_N: Tensor, log_p_x0_NV: Tensor, alpha_N: Tensor) -> Tensor:
        """Return the leave-one-out posterior, (N, V) in the precision of alpha, from log p(x_0 | x_t)."""
        log_q_NV = self._log_step(xt_N, alpha_N, torch.ones_like(alpha_N))
        return (log_p_x0_NV.to(alpha_N.dtype) - log_q_NV).log_softmax(-1)

    def with_own_token(self, xt_N: Tensor, log_others_NV: Tensor, alpha_N: Tensor) -> Tensor:
        """Return log p(x_0 | x_t) from the leave-one-out posterior: the inverse of `without_own_token`."""
        log_q_NV = self._log_step(xt_N, alpha_N, torch.ones_like(alpha_N))
        return (log_others_NV.to(alpha_N.dtype) + log_q_NV).log_softmax(-1)

    def _log_step(self, xt_N: Tensor, alpha_t_N: Tensor, alpha_s_N: Tensor) -> Tensor:
        """Return log q(x_t | x_s = v) for every v, (N, V): from s to t > s a token stays or becomes the added noise."""
        here_N1, kept_N = xt_N[:, None], self.keep_prob(alpha_t_N) / self.keep_prob(alpha_s_N)
        new_NV = self.noise_prob(alpha_t_N) - kept_N[:, None] * self.noise_prob(alpha_s_N)
        arriving_N1 = new_NV.gather(1, here_N1).clamp(min=0)
        return arriving_N1.expand(new_NV.shape).scatter(1, here_N1, arriving_N1 + kept_N[:, None]).log()


class Uniform(Resampling):
    """Noise is a uniform random token (D3PM, arXiv 2107.03006, appendix A.2.1; UDLM, arXiv 2412.10193)."""

    blank_id = -1  # no token, because any of them may occur in a text

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @classmethod
    def of(cls, vocab_size: int, own_size: int, mask_id: int) -> Self:
        return cls(own_size)

    def keep_prob(self, alpha: Tensor) -> Tensor:
        return alpha

    def noise_prob(self, alpha_N: Tensor) -> Tensor:
        return ((1 - alpha_N) / self.vocab_size)[:, None].expand(-1, self.vocab_size)

    def prior(self, x_BL: Tensor, noise: KeyedNoise, where_BL: Tensor) -> Tensor:
        return torch.where(where_BL, (noise.uniform(x_BL.shape[1]) * self.vocab_size).long(), x_BL)

    def corrupt(self, x0_BL: Tensor, alpha_B: Tensor, noise: KeyedNoise, where_BL: Tensor) -> Tensor:
        resampled_BL = noise.uniform(x0_BL.shape[1]) < (1 - alpha_B)[:, None]
        return self.prior(x0_BL, noise, resampled_BL & where_BL)


@dataclass(frozen=True)
class HybridLevel:
    """Probabilities that a token is kept, a random word, or the mask, which sum to 1.

    word_rate and mask_rate are the rates at which tokens become words and masks, per unit of -alpha.
    """

    kept: Tensor
    word: Tensor
    mask: Tensor
    word_rate: Tensor
    mask_rate: Tensor


class Hybrid(Resampling):
    """Noise is the mask or a random word (GIDD, von Rütte et al., arXiv 2503.04482, section 4.2, with gamma = 1).

    A token is kept, is the mask, or is a random word in the proportion alpha : 1 - alpha : c, with
    c = B sqrt(alpha (1 - alpha)). So texts begin clean and end in masks.

    Args:
        mask_id: id of the mask.
        vocab_size: number of tokens, the mask included.
        word_share: probability of a random word at alpha = 1/2, its maximum; the paper's p_u, in (0, 1).
    """

    def __init__(self, mask_id: int, vocab_size: int, word_share: InsideOne = 0.1) -> None:
        self.mask_id = self.blank_id = mask_id
        self.vocab_size = vocab_size
        self._scale = 2 * word_share / (1 - word_share)

    @classmethod
    def of(cls, vocab_size: int, own_size: int, mask_id: int, word_share: Annotated[InsideOne, IF_SET]) -> Self:
        return cls(mask_id, vocab_size, word_share)

    def level(self, alpha: Tensor) -> HybridLevel:
        """Return the probabilities and rates at alpha."""
        alpha = alpha.double()
        root = (alpha * (1 - alpha)).clamp(min=1e-24).sqrt()
        words = self._scale * root
        total = 1 + words
        word_rate, mask_rate = self._scale / (2 * total * root), 1 / (total * alpha.clamp(min=1e-24))
        return HybridLevel(alpha / total, words / total, (1 - alpha) / total, word_rate, mask_rate)

    def keep_prob(self, alpha: Tensor) -> Tensor:
        return self.level(alpha).kept

    def noise_prob(self, alpha_N: Tensor) -> Tensor:
        level = self.level(alpha_N)
        noise_NV = (level.word / (self.vocab_size - 1))[:, None].repeat(1, self.vocab_size)
        noise_NV[:, self.mask_id] = level.mask
        return noise_NV

    def prior(self, x_BL: Tensor, noise: KeyedNoise, where_BL: Tensor) -> Tensor:
        return torch.where(where_BL, self.mask_id, x_BL)

    def corrupt(self, x0_BL: Tensor, alpha_B: Tensor, noise: KeyedNoise, where_BL: Tensor) -> Tensor:
        level, u_BL = self.level(alpha_B), noise.uniform(x0_BL.shape[1])
        word_BL = (noise.uniform(x0_BL.shape[1]) * (self.vocab_size - 1)).long()
        word_BL = word_BL + (word_BL >= self.mask_id)
        noised_BL = torch.where(u_BL < (level.kept + level.mask)[:, None], self.mask_id, word_BL)
        return torch.where(where_BL & (u_BL >= level.kept[:, None]), noised_BL, x0_BL)


def unmask_prob(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """Return P(x_s is not masked | x_t is masked) = (alpha_s - alpha_t) / (1 - alpha_t) for s < t (MDLM, eq. 7)."""
    return (alpha_s - alpha_t) / (1 - alpha_t)


def unmask_step(u_BL: Tensor, alpha_S: Tensor) -> Tensor:
    """Draw the step at which the ancestral sampler unmasks each position, (B, L) in 0..S-1.

    A masked position stays masked from t_i to t_(i+1) with probability (1 - alpha_(i+1)) / (1 - alpha_i), whatever the
    tokens are. The product telescopes to P(masked at t_i) = (1 - alpha_i) / (1 - alpha_0), which one look-up inverts.

    Args:
        u_BL: uniform numbers in [0, 1).
        alpha_S: alpha(t_0) < alpha(t_1) < ... of S times from noise to data; (B, S) if rows have their own times.

    Returns:
        i for a step from t_i to t_(i+1); S - 1 for a position that stays masked.
    """
    survived_S = (1 - alpha_S.double()) / (1 - alpha_S[..., :1].double())
    unmasked_by_S = (1 - survived_S[..., 1:]).contiguous()
    return torch.searchsorted(unmasked_by_S, u_BL, right=True)


def draw_categorical(log_p_NV: Tensor, u_N: Tensor) -> Tensor:
    """Draw one token id per row, (N,), by inversion of the cumulative distribution in float64.

    float32 Gumbel noise cannot reach probabilities below 2^-24, which sharpens the distribution (Zheng et al., arXiv
    2409.02908, section 4); one float64 number per row can.
    """
    cumulative_NV = log_p_NV.double().exp().cumsum(-1)
    total_N = cumulative_NV[:, -1]
    # Rounding may lift u * total to the total itself, beyond every possible token.
    threshold_N = torch.minimum(u_N.double() * total_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    return torch.searchsorted(cumulative_NV, threshold_N[:, None], right=True).squeeze(-1)
