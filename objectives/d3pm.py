"""D3PM with an absorbing state (Austin et al., arXiv 2107.03006): the discrete-time bound of a network that may answer
[MASK] itself.

Shape suffixes: B batch, L length, N masked positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palimpsest.common.values import Natural
from palimpsest.noise_schedule import EndsMasked, NoiseSchedule
from palimpsest.objectives.base import (
    Backbone,
    Batch,
    TokenDiffusion,
    TokenLoss,
    context,
    counted_mask,
    encode_at,
    masked_positions,
    per_position,
    scored_mask,
    spread,
)
from palimpsest.objectives.noising import Noising
from palimpsest.objectives.projection import log_probs, picked_logits
from palimpsest.process import Absorbing, unmask_chance


class D3PM(TokenDiffusion):
    """p(x_s | x_t) is proportional to sum over x_0 of q(x_s, x_t | x_0) p(x_0 | x_t) (eq. 4), T steps.

    The chain must end in masks only, so alpha is rescaled to vanish at t = 1; for the log-linear schedule that makes it
    1 - t, the paper's own choice (section 3.1). subs_masking: no mass on [MASK].
    """

    encodes = 2
    clean_text_costs_nothing = False  # L_0

    def __init__(
        self,
        schedule: NoiseSchedule,
        process: Absorbing,
        noising: Noising | None = None,
        T: Natural = 1000,  # noqa: N803
        subs_masking: bool = False,
    ) -> None:
        if T < 1:
            raise ValueError(f"parameterization=d3pm with T={T}: its loss has discrete time steps; set e.g. T=1000")
        self._refuse_limits(schedule, noising, T)
        super().__init__(EndsMasked(schedule.whole), process, noising, T)
        self.noise_shown = schedule.whole  # sigma of the rescaled schedule is infinite at t = 1
        self.banned_id = process.mask_id if subs_masking else None

    def loss_at(self, backbone: Backbone, batch: Batch, xt_BL: Tensor, t_B: Tensor) -> TokenLoss:
        """T times the KL term of a step (eq. 1, L_t-1), plus the reconstruction term L_0 of the clean text."""
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        masked_BL = masked_positions(batch, xt_BL, self.process)
        hidden_BLD = backbone.encode(xt_BL, self.conditioning(t_B), **context(batch))
        log_p_N, log_m_N = self._log_p_and_m(hidden_BLD[masked_BL], backbone, x0_BL[masked_BL])
        at, alpha_t, alpha_s = masked_BL, self.schedule(t_B).alpha, self.schedule((t_B - 1 / self.T).clamp(min=0)).alpha
        kl_N = self._step_kl(log_p_N, log_m_N, per_position(alpha_t, at), per_position(alpha_s, at))
        clean_BLD = backbone.encode(x0_BL, self.conditioning(torch.zeros_like(t_B)), **context(batch))
        log_p0_N, _ = self._log_p_and_m(clean_BLD[scored_BL], backbone, x0_BL[scored_BL])
        logs = {"cross_entropy": -spread(log_p_N.detach(), at).sum(-1), "num_masked": masked_BL.sum(-1)}
        return TokenLoss(self.T * spread(kl_N, at) - spread(log_p0_N, scored_BL), counted_mask(batch), logs)

    def conditioning(self, t_B: Tensor) -> Tensor:
        return self.noise_shown(t_B).sigma.float()

    def _log_p_and_m(self, hidden_ND: Tensor, backbone: Backbone, target_N: Tensor) -> tuple[Tensor, Tensor]:
        ids_N2 = torch.stack([target_N, torch.full_like(target_N, self.process.mask_id)], dim=1)
        log_z_N, picked_N2 = picked_logits(hidden_ND, backbone.head, ids_N2, self.banned_id)
        log_p_N2 = picked_N2 - log_z_N[:, None]
        return log_p_N2.unbind(1)

    def _step_kl(self, log_p_N: Tensor, log_m_N: Tensor, alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) at masked positions, in nats, with m = p([MASK])."""
        chance, m = unmask_chance(alpha_t, alpha_s), log_m_N.exp()
        lost_t = torch.log1p(m * (alpha_t / (1 - alpha_t)))
        at_end = alpha_s >= 1  # nothing stays masked at s = 0
        odds_s = torch.where(at_end, 0.0, alpha_s / (1 - torch.where(at_end, 0.0, alpha_s)))
        stay = torch.where(at_end, 0.0, 1 - chance)
        kl = chance * (lost_t - log_p_N) + stay * (lost_t - torch.log1p(m * odds_s))
        return kl.to(log_p_N.dtype)

    def answer(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at_BL: Tensor | None = None, **cond: Tensor
    ) -> Tensor:
        """The network's own distribution as log-probabilities, with its mass on [MASK]; (B, L, V) or (N, V)."""
        hidden_ND = encode_at(backbone, x_BL, self.conditioning(t_B), at_BL, **cond)
        log_p_NV = log_probs(hidden_ND, backbone.head, self.banned_id)
        return log_p_NV.unflatten(0, x_BL.shape) if at_BL is None else log_p_NV

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at_BL: Tensor | None = None, **cond: Tensor
    ) -> Tensor:
        """The answer among real tokens: a text has no [MASK] in it."""
        log_p = self.answer(backbone, x_BL, t_B, at_BL, **cond)
        log_p[..., self.process.mask_id] = -torch.inf
        return log_p.log_softmax(-1)

    def reverse(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at_BL: Tensor, **cond: Tensor
    ) -> Tensor:
        log_p_NV = self.answer(backbone, x_BL, t_B, at_BL, **cond).double()
        alpha_t, alpha_s = (per_position(self.schedule(t).alpha, at_BL) for t in (t_B, s_B))
        m_N = log_p_NV[:, self.process.mask_id].exp()
        log_q_NV = log_p_NV + (alpha_s - alpha_t).log()[:, None]
        log_q_NV[:, self.process.mask_id] = torch.log1p(-(1 - m_N) * alpha_s)
        return log_q_NV - torch.log1p(-(1 - m_N) * alpha_t)[:, None]
