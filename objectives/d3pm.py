"""D3PM with an absorbing state (Austin et al., arXiv 2107.03006): a discrete-time bound.

The network may give the mask token probability.

Shape suffixes: B batch, L length, N masked positions, V vocabulary.
"""

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.values import Natural
from palimpsest.models.backbone import Backbone
from palimpsest.noise_schedule import FullRange, NoiseSchedule
from palimpsest.objectives.base import Batch, TokenDiffusion, TokenLoss, context, counted_mask, scored_mask
from palimpsest.objectives.mask_sampling import Draw, MaskSampler
from palimpsest.objectives.projection import cross_entropy, log_probs, losses
from palimpsest.process import Absorbing, unmask_prob


class D3PM(TokenDiffusion):
    """A chain of T steps: p(x_s | x_t) is proportional to sum over x_0 of q(x_s, x_t | x_0) p(x_0 | x_t) (eq. 4).

    The chain must end in masks only, so alpha is rescaled to vanish at t = 1. For the log-linear schedule alpha becomes
    1 - t, the paper's choice (section 3.1).

    Args:
        subs_masking: the network gives [MASK] no probability.
    """

    encodes = 2
    zero_loss_on_clean_text = False  # L_0

    def __init__(
        self,
        schedule: NoiseSchedule,
        process: Absorbing,
        noising: MaskSampler | None = None,
        T: Natural = 1000,  # noqa: N803
        subs_masking: bool = False,
    ) -> None:
        if T < 1:
            raise ValueError(f"parameterization=d3pm with T={T}: its loss has discrete time steps; set e.g. T=1000")
        self._check_clipping(schedule, noising, T)
        super().__init__(FullRange(schedule.unclipped), process, noising, T)
        self._shown_schedule = schedule.unclipped  # sigma of the rescaled schedule is infinite at t = 1
        self._banned_id = process.mask_id if subs_masking else None

    def loss_at(self, backbone: Backbone, batch: Batch, draw: Draw) -> TokenLoss:
        """Return T times the KL term of a step (eq. 1, L_t-1) plus the reconstruction term L_0 of the clean text."""
        x0_BL, xt_BL, t_B, scored_BL = batch["input_ids"], draw.xt_BL, draw.t_B, scored_mask(batch)
        masked, scored = Positions.of_each(self.process.is_corrupted(xt_BL) & scored_BL, scored_BL)
        alpha_t_B = self.schedule(t_B).alpha
        alpha_s_B = self.schedule((t_B - 1 / self.T).clamp(min=0)).alpha
        hidden_BLD = backbone.encode(xt_BL, self.conditioning(t_B), **context(batch))
        target_N = masked.take(x0_BL)
        kl_N, nll_N = losses(
            _kl_and_nll,
            masked.take(hidden_BLD),
            backbone.head,
            torch.stack([target_N, torch.full_like(target_N, self.process.mask_id)], dim=1),
            masked.of_rows(torch.stack([alpha_t_B, alpha_s_B], dim=1)),
            banned_id=self._banned_id,
            weight_N=masked.of_rows(draw.scale_B),
        )
        clean_BLD = backbone.encode(x0_BL, self.conditioning(torch.zeros_like(t_B)), **context(batch))
        nll0_N = cross_entropy(
            scored.take(clean_BLD), backbone.head, scored.take(x0_BL), self._banned_id, scored.of_rows(draw.scale_B)
        )
        logs = {"cross_entropy": masked.spread(nll_N).sum(-1), "num_masked": masked.mask_BL.sum(-1)}
        return TokenLoss(self.T * masked.spread(kl_N) + scored.spread(nll0_N), counted_mask(batch), logs)

    def conditioning(self, t_B: Tensor) -> Tensor:
        return self._shown_schedule(t_B).sigma.float()

    def network_log_probs(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at: Positions | None = None, **cond: Tensor
    ) -> Tensor:
        """Return the network's log-probabilities, including that of [MASK], (B, L, V) or (N, V)."""
        hidden_ND = self.encode_at(backbone, x_BL, t_B, at, **cond)
        log_p_NV = log_probs(hidden_ND, backbone.head, self._banned_id)
        return log_p_NV.unflatten(0, x_BL.shape) if at is None else log_p_NV

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at: Positions | None = None, **cond: Tensor
    ) -> Tensor:
        """Return the prediction normalised over real tokens, because a clean text has no [MASK]."""
        log_p = self.network_log_probs(backbone, x_BL, t_B, at, **cond)
        log_p[..., self.process.mask_id] = -torch.inf
        return log_p.log_softmax(-1)

    def reverse(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at: Positions, **cond: Tensor
    ) -> Tensor:
        log_p_NV = self.network_log_probs(backbone, x_BL, t_B, at, **cond).double()
        alpha_t, alpha_s = (at.of_rows(self.schedule(t).alpha) for t in (t_B, s_B))
        m_N = log_p_NV[:, self.process.mask_id].exp()
        log_q_NV = log_p_NV + (alpha_s - alpha_t).log()[:, None]
        log_q_NV[:, self.process.mask_id] = torch.log1p(-(1 - m_N) * alpha_s)
        return log_q_NV - torch.log1p(-(1 - m_N) * alpha_t)[:, None]


def _kl_and_nll(logits_CV: Tensor, ids_C2: Tensor, alpha_C2: Tensor) -> Tensor:
    """Return the KL term of a step and -log p(x_0), (C, 2); `ids_C2` are x_0 and [MASK], `alpha_C2` that of t and s."""
    log_p_C, log_m_C = (logits_CV.gather(1, ids_C2) - logits_CV.logsumexp(1, keepdim=True)).unbind(1)
    return torch.stack([_step_kl(log_p_C, log_m_C, *alpha_C2.unbind(1)), -log_p_C], dim=1)


def _step_kl(log_p_N: Tensor, log_m_N: Tensor, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """Return KL(q(x_s | x_t, x_0) || p(x_s | x_t)) at masked positions, in nats, with m = p([MASK])."""
    unmask, m = unmask_prob(alpha_t, alpha_s), log_m_N.exp()
    lost_t = torch.log1p(m * (alpha_t / (1 - alpha_t)))
    at_end = alpha_s >= 1  # nothing stays masked at s = 0
    odds_s = torch.where(at_end, 0.0, alpha_s / (1 - torch.where(at_end, 0.0, alpha_s)))
    stay = torch.where(at_end, 0.0, 1 - unmask)
    kl = unmask * (lost_t - log_p_N) + stay * (lost_t - torch.log1p(m * odds_s))
    return kl.to(log_p_N.dtype)
