"""The autoregressive likelihood: the baseline that every bound is held against.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, n new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import CausalDenoiser
from palimpsest.objectives.base import Backbone, Batch, BoundTo, Objective, TokenLoss, context, spread
from palimpsest.objectives.noising import Noising
from palimpsest.objectives.projection import cross_entropy, log_probs
from palimpsest.process import Absorbing


class CausalModel(BoundTo, CausalDenoiser):
    """The autoregressive objective bound to a causal network."""

    def new_cache(self, batch_size: int, length: int) -> object:
        return self.backbone.new_cache(batch_size, length)

    def next_token(self, new_Bn: Tensor, cache: object, **cond: Tensor) -> Tensor:
        return self.objective.next_token(self.backbone, new_Bn, cache, **cond)


class AR(Objective):
    """-log p(x) = -sum over i of log p(x_i | x_<i), exact. The first token of a row (BOS) and a given beginning (a
    prompt) are context, not scored; an EOS is scored, since a causal network can not have seen it, and the fill behind
    it is not, since the text has ended there. The mask token has no mass."""

    binds_to = CausalModel
    exact = causal = first_given = True
    clean_text_costs_nothing = False

    def __init__(self, process: Absorbing) -> None:
        self.process = process

    def bound(self, noising: Noising | None) -> AR:
        """Itself: there is nothing to draw.

        Raises:
            ValueError: a noising is asked for.
        """
        if noising is not None:
            raise ValueError(
                f"eval.estimator with masks by {noising.label} and parameterization=ar contradict each other: its "
                "likelihood is exact; use eval.estimator=auto"
            )
        return self

    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss:
        x_BL, mask_BL = batch["input_ids"], batch.get("attention_mask")
        scored_BL = torch.ones_like(x_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool().clone()
        scored_BL[:, 0] = False
        if "given" in batch:
            scored_BL &= ~batch["given"].cumprod(dim=1).bool()
        if "fill" in batch:
            scored_BL &= ~batch["fill"]
        before_BL = scored_BL.roll(-1, dims=1)  # True where the next token is scored
        hidden_BLD = backbone.encode(x_BL, torch.zeros(len(x_BL), device=x_BL.device), **context(batch))
        nll_N = cross_entropy(hidden_BLD[before_BL], backbone.head, x_BL[scored_BL], self.process.mask_id)
        return TokenLoss(spread(nll_N, scored_BL), scored_BL)

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor | None = None, at_BL: Tensor | None = None, **cond: Tensor
    ) -> Tensor:
        """log p(x_i | x_<i): (B, L - 1, V) for i = 1, ..., L - 1, or (N, V) at the positions of `at_BL`."""
        hidden_BLD = backbone.encode(x_BL, torch.zeros(len(x_BL), device=x_BL.device), **cond)
        if at_BL is not None:
            assert not at_BL[:, 0].any(), "the first token has nothing before it"
            return log_probs(hidden_BLD[at_BL.roll(-1, dims=1)], backbone.head, self.process.mask_id)
        flat_NV = log_probs(hidden_BLD[:, :-1].flatten(0, 1), backbone.head, self.process.mask_id)
        return flat_NV.unflatten(0, (len(x_BL), x_BL.shape[1] - 1))

    def next_token(self, backbone: Backbone, new_Bn: Tensor, cache: object, **cond: Tensor) -> Tensor:
        """log p of the token after `new_Bn`, which continue what `cache` holds, (B, V)."""
        hidden_BnD = backbone.encode(new_Bn, None, cache=cache, **cond)
        return log_probs(hidden_BnD[:, -1], backbone.head, self.process.mask_id)
