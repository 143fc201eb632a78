"""Uniform-state diffusion: UDLM (Schiff et al., arXiv 2412.10193); DUO (arXiv 2506.10892) has the same bound.

Shape suffixes: B batch, L length, N scored positions, C positions of a chunk, V vocabulary.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.models.backbone import Backbone
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.objectives.base import Batch, TokenDiffusion, TokenLoss, context, counted_mask, scored_mask
from palimpsest.objectives.mask_sampling import Bernoulli, Draw, MaskSampler, TiltedNoise
from palimpsest.objectives.projection import log_probs, losses
from palimpsest.process import Resampling, Uniform

_SMALLEST = 1e-12  # alpha, by which the weight divides; the integrand vanishes with it


class LeaveOneOut(TokenDiffusion):
    """The base of objectives in which any token may be noise.

    The network predicts each clean token from the other tokens of x_t, log p(x_0 at a position | the others): the
    leave-one-out posterior (arXiv 2605.22765). The reverse step adds the position's own token by Bayes' rule.

    The loss is over all positions. A training step projects each of them onto the vocabulary; a masked objective
    projects half of them on average.
    """

    zero_loss_on_clean_text = False
    needs_time = True
    banned_id: int | None = None  # token that the network gives no probability

    def __init__(self, schedule: NoiseSchedule, process: Resampling, noising: MaskSampler | None = None) -> None:
        if isinstance(noising, Bernoulli) and noising.resample:
            raise ValueError(f"training.resample=true means nothing to parameterization={self.name}; leave it out")
        super().__init__(schedule, process, noising)  # in continuous time only

    @property
    def best_mask_sampler(self) -> MaskSampler:
        return TiltedNoise()

    def loss_at(self, backbone: Backbone, batch: Batch, draw: Draw) -> TokenLoss:
        scored = Positions(scored_mask(batch))
        hidden_ND = self.encode_at(backbone, draw.xt_BL, draw.t_B, scored, **context(batch))
        level = self.schedule(draw.t_B)
        ids_N2 = torch.stack([scored.take(batch["input_ids"]), scored.take(draw.xt_BL)], dim=1)
        (integrand_N,) = losses(
            lambda *chunk: self.integrand(*chunk)[:, None],
            hidden_ND,
            backbone.head,
            ids_N2,
            scored.of_rows(level.alpha),
            banned_id=self.banned_id,
            weight_N=scored.of_rows(-level.dalpha * draw.scale_B),
        )
        rate_N = -scored.of_rows(level.dalpha) * integrand_N
        return TokenLoss(scored.spread(rate_N.float()), counted_mask(batch), {})

    @abstractmethod
    def integrand(self, logits_CV: Tensor, ids_C2: Tensor, alpha_C: Tensor) -> Tensor:
        """Return the integrand of the NELBO per unit of -alpha, float64 (C,); `ids_C2` are x_0 and x_t."""

    def leave_one_out(self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at: Positions, **cond: Tensor) -> Tensor:
        """Return the network's prediction at the N positions `at`, (N, V)."""
        hidden_ND = self.encode_at(backbone, x_BL, t_B, at, **cond)
        return log_probs(hidden_ND, backbone.head, self.banned_id)

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at: Positions | None = None, **cond: Tensor
    ) -> Tensor:
        chosen = Positions.everywhere(x_BL) if at is None else at
        log_others_NV = self.leave_one_out(backbone, x_BL, t_B, chosen, **cond)
        alpha_N = chosen.of_rows(self.schedule(t_B).alpha)
        log_p_NV = self.process.with_own_token(chosen.take(x_BL), log_others_NV, alpha_N)
        return log_p_NV.unflatten(0, x_BL.shape) if at is None else log_p_NV


class UDLM(LeaveOneOut):
    """Diffusion whose noise is a random token; its bound is the continuous-time NELBO of UDLM."""

    processes = (Uniform,)
    process: Uniform

    def integrand(self, logits_CV: Tensor, ids_C2: Tensor, alpha_C: Tensor) -> Tensor:
        """Return the rate of the KL divergence between the reverse step given x_0 and the predicted one (eq. 16)."""
        alpha_C = alpha_C.clamp(min=_SMALLEST)
        picked_C3 = _picked_and_summed(logits_CV, ids_C2, alpha_C)
        return _divergence(picked_C3.double(), ids_C2, alpha_C, self.process.vocab_size)


def _picked_and_summed(logits_CV: Tensor, ids_C2: Tensor, alpha_C: Tensor) -> Tensor:
    """Return log p of x_0 and of x_t, and the sum over the vocabulary of log(1 + alpha (V p - 1)), (C, 3).

    The summands of the last are the logs of V q(x_t = v). At alpha = 1 in float32 they would be -inf where p = 0; there
    the weight 1 - alpha is 0.
    """
    log_p_CV, alpha_C1 = logits_CV.log_softmax(-1), alpha_C.to(logits_CV.dtype)[:, None]
    excess_CV = (alpha_C1 * (logits_CV.shape[1] * log_p_CV.exp() - 1)).clamp(min=-(1 - 1e-7))
    return torch.cat([log_p_CV.gather(1, ids_C2), excess_CV.log1p().sum(-1, keepdim=True)], dim=1)


def _divergence(picked_N3: Tensor, ids_N2: Tensor, alpha_N: Tensor, size: int) -> Tensor:
    """Return the bracket of eq. 16 divided by -V alpha.

    With true(v) = V q(x_t = v | x_0) and found(v) the same for the prediction it is

    sum over v of true(v) / true(x_t) log(found(x_t) true(v) / (found(v) true(x_t))) - V / true(x_t) + V / found(x_t)

    Its terms of first order in alpha cancel, so each is computed as a difference from 1, with log1p.
    """
    log_p0_N, log_pt_N, log_found_sum_N = picked_N3.unbind(1)
    same_N = (ids_N2[:, 0] == ids_N2[:, 1]).double()

    def excess(p_N: Tensor) -> Tensor:
        return (alpha_N * (size * p_N - 1)).clamp(min=-(1 - 1e-15))

    found_0_N = excess(log_p0_N.exp())
    found_t_N = excess(log_pt_N.exp())
    true_t_N = excess(same_N)
    difference_N = size * size * alpha_N * (log_pt_N.exp() - same_N) / ((1 + true_t_N) * (1 + found_t_N))
    log_ratio_N = size * (found_t_N.log1p() - true_t_N.log1p())
    noise_N = (-alpha_N).clamp(min=-(1 - 1e-15))
    at_x0_N = excess(torch.ones_like(alpha_N))
    true_log_true_N = (1 + at_x0_N) * at_x0_N.log1p() + (size - 1) * (1 - alpha_N) * noise_N.log1p()
    true_log_found_N = size * alpha_N * found_0_N.log1p() + (1 - alpha_N) * log_found_sum_N
    divergence_N = (log_ratio_N + true_log_true_N - true_log_found_N) / (1 + true_t_N) - difference_N
    return divergence_N / (size * alpha_N)
