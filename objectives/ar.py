"""The autoregressive likelihood: the exact baseline for every bound.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, n new tokens.
"""

from typing import Self

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import CausalDenoiser
from palimpsest.objectives.base import Backbone, Batch, BoundModel, Objective, TokenLoss, context
from palimpsest.objectives.mask_sampling import MaskSampler
from palimpsest.objectives.projection import cross_entropy, log_probs
from palimpsest.process import Absorbing


class CausalModel(BoundModel, CausalDenoiser):
    """The autoregressive objective bound to a causal network."""

    def new_cache(self, batch_size: int, length: int) -> object:
        return self.backbone.new_cache(batch_size, length)

    def next_token(self, new_Bn: Tensor, cache: object, **cond: Tensor) -> Tensor:
        hidden_BnD = self.backbone.encode(new_Bn, None, cache=cache, **cond)
        return log_probs(hidden_BnD[:, -1], self.backbone.head, self.process.mask_id)


class AR(Objective):
    """The exact autoregressive loss, -log p(x) = -sum over i of log p(x_i | x_<i).

    The first token of a row (BOS) and a prompt are context and not scored. The EOS of a text is scored, and EOS padding
    after it is not. The mask token has no mass.
    """

    model_class = CausalModel
    exact = causal = first_given = True
    zero_loss_on_clean_text = False

    def __init__(self, process: Absorbing) -> None:
        self.process = process

    def bound(self, mask_sampler: MaskSampler | None) -> Self:
        """Return the objective itself, whose likelihood is exact. Raises ValueError if a mask sampler is given."""
        if mask_sampler is not None:
            raise ValueError(
                f"eval.estimator with masks by {mask_sampler.label} and parameterization=ar contradict each other: its "
                "likelihood is exact; use eval.estimator=auto"
            )
        return self

    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss:
        x_BL, mask_BL = batch["input_ids"], batch.get("attention_mask")
        scored_BL = torch.ones_like(x_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool().clone()
        scored_BL[:, 0] = False
        if "observed" in batch:
            scored_BL &= ~batch["observed"].cumprod(dim=1).bool()
        if "eos_padding" in batch:
            scored_BL &= ~batch["eos_padding"]
        scored = Positions(scored_BL)
        cond = context(batch)
        if "document" in cond:  # a token reads what its successor may read: the end of a document begins the next one
            cond["document"] = torch.cat([cond["document"][:, 1:], cond["document"][:, -1:]], dim=1)
        hidden_BLD = backbone.encode(x_BL, torch.zeros(len(x_BL), device=x_BL.device), **cond)
        one_N = torch.ones(len(scored), device=x_BL.device)  # every token counts once
        hidden_ND, target_N = _before(scored).take(hidden_BLD), scored.take(x_BL)
        nll_N = cross_entropy(hidden_ND, backbone.head, target_N, self.process.mask_id, one_N)
        return TokenLoss(scored.spread(nll_N), scored_BL)

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor | None = None, at: Positions | None = None, **cond: Tensor
    ) -> Tensor:
        """Return log p(x_i | x_<i): (B, L - 1, V) for i = 1, ..., L - 1, or (N, V) at the positions `at`."""
        hidden_BLD = backbone.encode(x_BL, torch.zeros(len(x_BL), device=x_BL.device), **cond)
        if at is not None:
            torch._assert_async(~at.mask_BL[:, 0].any(), "the first token has nothing before it")
            return log_probs(_before(at).take(hidden_BLD), backbone.head, self.process.mask_id)
        flat_NV = log_probs(hidden_BLD[:, :-1].flatten(0, 1), backbone.head, self.process.mask_id)
        return flat_NV.unflatten(0, (len(x_BL), x_BL.shape[1] - 1))


def _before(at: Positions) -> Positions:
    """Return the position before each of `at`."""
    return Positions(at.mask_BL.roll(-1, dims=1), at.counts)
