"""SUBS: the continuous-time masked diffusion objective of MDLM (Sahoo et al., arXiv 2406.07524).

Shape suffixes: B batch, L length, N masked positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forward_process import mask_tokens
from noise_schedule import NoiseSchedule
from objectives.base import Backbone, Batch, TokenLoss, fresh_noise, sample_times, scored_mask
from objectives.projection import cross_entropy, log_probs
from randomness import KeyedNoise


class Subs:
    """Substitution parameterisation (section 3.2.3): the network's distribution has no mass on [MASK] ("zero masking
    probabilities") and visible tokens are copied ("carry-over unmasking")."""

    def __init__(
        self, schedule: NoiseSchedule, mask_id: int, antithetic_sampling: bool = True, sampling_eps: float = 1e-3
    ) -> None:
        self.schedule, self.mask_id = schedule, mask_id
        self.antithetic_sampling, self.sampling_eps = antithetic_sampling, sampling_eps

    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss:
        """One Monte Carlo draw of the NELBO (eq. 11): E_t,x_t of weight(t) times the masked tokens' cross-entropy."""
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        noise = generator or fresh_noise(x0_BL)
        t_B = sample_times(noise, self.antithetic_sampling, self.sampling_eps)
        level = self.schedule(t_B)
        u_BL = noise.uniform(x0_BL.shape[1])
        xt_BL = mask_tokens(x0_BL, level.move_chance, self.mask_id, scored_BL, u_BL)
        return self.loss_at(backbone, batch, xt_BL, t_B)

    def loss_at(self, backbone: Backbone, batch: Batch, xt_BL: Tensor, t_B: Tensor) -> TokenLoss:
        """The NELBO's integrand (eq. 11) for a given x_t and t."""
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        level = self.schedule(t_B)
        masked_BL = (xt_BL == self.mask_id) & scored_BL
        hidden_BLD = backbone.encode(xt_BL, level.sigma.float(), batch.get("attention_mask"))
        ce_N = cross_entropy(hidden_BLD[masked_BL], backbone.head, x0_BL[masked_BL], self.mask_id)
        ce_BL = torch.zeros_like(x0_BL, dtype=ce_N.dtype).masked_scatter(masked_BL, ce_N)
        nll_BL = level.elbo_weight.float()[:, None] * ce_BL
        logs = {"cross_entropy": ce_BL.detach().sum(-1), "num_masked": masked_BL.sum(-1), "t": t_B}
        return TokenLoss(nll_BL, scored_BL, logs)

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at_BL: Tensor | None = None, **cond: Tensor
    ) -> Tensor:
        """log p(x_0 | x_t): (B, L, V), or (N, V) for the N positions where `at_BL` is True, in row-major order."""
        hidden_BLD = backbone.encode(x_BL, self.schedule(t_B).sigma.float(), **cond)
        if at_BL is not None:
            return self._carry_over(log_probs(hidden_BLD[at_BL], backbone.head, self.mask_id), x_BL[at_BL])
        flat_NV = log_probs(hidden_BLD.flatten(0, 1), backbone.head, self.mask_id)
        return self._carry_over(flat_NV, x_BL.flatten()).unflatten(0, x_BL.shape)

    def _carry_over(self, log_p_NV: Tensor, x_N: Tensor) -> Tensor:
        visible_N = x_N != self.mask_id
        log_p_NV[visible_N] = -torch.inf
        log_p_NV[visible_N, x_N[visible_N]] = 0.0
        return log_p_NV
