"""SUBS: the masked diffusion objective of MDLM (Sahoo et al., arXiv 2406.07524).

Shape suffixes: B batch, L length, N masked positions, V vocabulary.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.values import Natural
from palimpsest.models.backbone import Backbone
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.objectives.base import Batch, TokenDiffusion, TokenLoss, context, counted_mask, scored_mask
from palimpsest.objectives.mask_sampling import Draw, MaskSampler, log_move_range
from palimpsest.objectives.projection import Biases, cross_entropy, log_probs
from palimpsest.process import Absorbing, unmask_prob


class Subs(TokenDiffusion):
    """The substitution parameterisation (section 3.2.3): zero masking probabilities and carry-over unmasking.

    The network gives [MASK] no probability, and unmasked tokens are copied.

    Args:
        loss_weight: "elbo", or "uniform" for the plain cross-entropy of the masked tokens.
        change_of_variables: show the network log(1 - alpha), rescaled to [0, 1], instead of sigma (VDM, arXiv
            2107.00630, appendix I).
    """

    independent_unmasking = limits_rates = reads_bigrams = True

    def __init__(
        self,
        schedule: NoiseSchedule,
        process: Absorbing,
        noising: MaskSampler | None = None,
        T: Natural = 0,  # noqa: N803
        loss_weight: Literal["elbo", "uniform"] = "elbo",
        change_of_variables: bool = False,
    ) -> None:
        self.loss_weight = loss_weight
        self.change_of_variables = change_of_variables
        super().__init__(schedule, process, noising, T)

    def loss_at(self, backbone: Backbone, batch: Batch, draw: Draw) -> TokenLoss:
        masked = Positions(self.process.is_corrupted(draw.xt_BL) & scored_mask(batch))
        hidden_ND = self.encode_at(backbone, draw.xt_BL, draw.t_B, masked, **context(batch))
        weight_B = torch.ones_like(draw.t_B) if self.loss_weight == "uniform" else self.weight(draw.t_B) * draw.scale_B
        target_N, weight_N = masked.take(batch["input_ids"]), masked.of_rows(weight_B)
        biases = self._biases(backbone, draw.xt_BL, masked, batch)
        ce_N = cross_entropy(hidden_ND, backbone.head, target_N, self.process.mask_id, weight_N, biases)
        ce_BL = masked.spread(ce_N)
        logs = {"cross_entropy": ce_BL.detach().sum(-1), "num_masked": masked.mask_BL.sum(-1)}
        if self.loss_weight == "uniform":
            return TokenLoss(ce_BL, masked.mask_BL, logs)
        weight_BL = self.weight(draw.t_B).float()[:, None] * masked.mask_BL
        return TokenLoss(weight_BL * ce_BL, counted_mask(batch), logs, weight_BL=weight_BL)

    def _biases(
        self, backbone: Backbone, x_BL: Tensor, at: Positions | None, cond: Mapping[str, Tensor]
    ) -> Biases | None:
        """Return the biases of token pairs in the rows' classes, if the network has any."""
        if "class_id" not in cond or backbone.bigrams is None:
            return None
        visible_BL = ~self.process.is_corrupted(x_BL)
        if "attention_mask" in cond:
            visible_BL = visible_BL & cond["attention_mask"].bool()
        at = Positions.everywhere(x_BL) if at is None else at
        return Biases(backbone.bigrams.add, backbone.bigrams.neighbours(x_BL, visible_BL, at, cond["class_id"]))

    def weight(self, t_B: Tensor) -> Tensor:
        """Return the weight of a masked token in continuous time (eq. 11) or with T steps, float64 (B,)."""
        if self.T:
            return self.T * unmask_prob(self.schedule(t_B).alpha, self.schedule(t_B - 1 / self.T).alpha)
        return self.schedule(t_B).elbo_weight

    def conditioning(self, t_B: Tensor) -> Tensor:
        if not self.change_of_variables:
            return super().conditioning(t_B)
        low, high = log_move_range(self.trained_schedule)
        return ((self.schedule(t_B).move_chance.log() - low) / (high - low)).clamp(0.0, 1.0).float()

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at: Positions | None = None, **cond: Tensor
    ) -> Tensor:
        hidden_ND = self.encode_at(backbone, x_BL, t_B, at, **cond)
        x_N = x_BL.flatten() if at is None else at.take(x_BL)
        biases = self._biases(backbone, x_BL, at, cond)
        log_p_NV = log_probs(hidden_ND, backbone.head, self.process.mask_id, biases)
        log_p_NV = self.process.keep_visible(log_p_NV, x_N)
        return log_p_NV.unflatten(0, x_BL.shape) if at is None else log_p_NV
