"""SEDD with an absorbing state (Lou et al., arXiv 2310.16834): the network gives the log of the concrete score.

Shape suffixes: B batch, L length, N masked positions, V vocabulary.
"""

import math

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.models.backbone import Backbone
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.objectives.base import MAX_SIGMA, Batch, TokenDiffusion, TokenLoss, context, counted_mask, scored_mask
from palimpsest.objectives.mask_sampling import Draw, MaskSampler
from palimpsest.objectives.projection import logits, losses
from palimpsest.process import Absorbing


class SEDD(TokenDiffusion):
    """Score entropy: at a masked position the network gives the score of token y, p_t(x with y) / p_t(x).

    It is parameterised as exp(logit_y) / ((e^sigma - 1) (V - 1)) (appendix C). The scale of the scores depends on t,
    which the network must see.
    """

    needs_time = True

    def __init__(self, schedule: NoiseSchedule, process: Absorbing, noising: MaskSampler | None = None) -> None:
        super().__init__(schedule, process, noising)  # in continuous time only

    def loss_at(self, backbone: Backbone, batch: Batch, draw: Draw) -> TokenLoss:
        """Return the denoising score entropy (theorem 3.4, weighted as in theorem 3.6).

        It is sigma' (sum_y s_y - q log s_x0 + q (log q - 1)) with the target q = p_t(x_0) / p_t(mask).
        """
        masked = Positions(self.process.is_corrupted(draw.xt_BL) & scored_mask(batch))
        hidden_BLD = backbone.encode(draw.xt_BL, self.conditioning(draw.t_B), **context(batch))
        level = self.schedule(draw.t_B)
        rate_B = -level.dalpha / level.alpha.clamp(min=math.exp(-MAX_SIGMA))
        entropy_N, nll_N = losses(
            _entropy_and_nll,
            masked.take(hidden_BLD),
            backbone.head,
            masked.take(batch["input_ids"]),
            masked.of_rows(self._log_shift(draw.t_B, backbone.head.out_features)),
            masked.of_rows(_log_ratio(level.alpha)),
            banned_id=self.process.mask_id,
            weight_N=masked.of_rows(rate_B * draw.scale_B),
        )
        logs = {"cross_entropy": masked.spread(nll_N).sum(-1), "num_masked": masked.mask_BL.sum(-1)}
        return TokenLoss(rate_B.float()[:, None] * masked.spread(entropy_N.float()), counted_mask(batch), logs)

    def _log_shift(self, t_B: Tensor, vocab_size: int) -> Tensor:
        return -_log_ratio(self.schedule(t_B).alpha) + math.log(vocab_size - 1)

    def log_score(self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at: Positions, **cond: Tensor) -> Tensor:
        """Return log s(x_t) at the N masked positions `at`, float64 (N, V); -inf at the mask."""
        hidden_ND = self.encode_at(backbone, x_BL, t_B, at, **cond)
        logits_NV = logits(hidden_ND, backbone.head, self.process.mask_id).double()
        return logits_NV - at.of_rows(self._log_shift(t_B, backbone.head.out_features))[:, None]

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at: Positions | None = None, **cond: Tensor
    ) -> Tensor:
        """Return the scores as probabilities: s_y is proportional to p(x_0 = y | x_t); unmasked tokens are copied."""
        chosen = Positions.everywhere(x_BL) if at is None else at
        log_p_NV = self.log_score(backbone, x_BL, t_B, chosen, **cond).log_softmax(-1)
        log_p_NV = self.process.keep_visible(log_p_NV, chosen.take(x_BL))
        return log_p_NV.unflatten(0, x_BL.shape) if at is None else log_p_NV

    def reverse(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at: Positions, **cond: Tensor
    ) -> Tensor:
        """Return the analytic (Tweedie) step of theorem 4.1: P(y) = (e^(sigma_t - sigma_s) - 1) s_y, else the mask."""
        log_s_NV = self.log_score(backbone, x_BL, t_B, at, **cond)
        growth_B = self.schedule(s_B).alpha / self.schedule(t_B).alpha.clamp(min=math.exp(-MAX_SIGMA)) - 1
        log_q_NV = log_s_NV + at.of_rows(growth_B.log())[:, None]
        leaving_N = log_q_NV.exp().sum(-1)
        # Scores of a network may sum to more than 1; then they are normalised, and nothing stays masked.
        log_q_NV = log_q_NV - leaving_N.clamp(min=1).log()[:, None]
        log_q_NV[:, self.process.mask_id] = torch.log1p(-leaving_N.clamp(max=1))
        return log_q_NV


def _entropy_and_nll(logits_CV: Tensor, x0_C: Tensor, shift_C: Tensor, log_q_C: Tensor) -> Tensor:
    """Return the score entropy without its rate, and -log p(x_0) of the normalised scores, float64 (C, 2)."""
    log_z_C, logit_C = logits_CV.logsumexp(1), logits_CV.gather(1, x0_C[:, None]).squeeze(1)
    q_C, log_s_C = log_q_C.exp(), logit_C - shift_C
    entropy_C = (log_z_C - shift_C).exp() - q_C * log_s_C + q_C * (log_q_C - 1)
    return torch.stack([entropy_C, (log_z_C - logit_C).double()], dim=1)


def _log_ratio(alpha: Tensor) -> Tensor:
    """Return log(alpha / (1 - alpha)), which is -log(e^sigma - 1)."""
    alpha = alpha.clamp(min=math.exp(-MAX_SIGMA))
    return torch.log(alpha) - torch.log1p(-alpha)
