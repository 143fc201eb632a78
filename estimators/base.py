"""The interface of likelihood estimators and the type of their results.

Shape suffixes: B batch, K independent draws, P network passes with masks.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from palimpsest.denoisers import BlockDenoiser, CausalDenoiser
from palimpsest.objectives.base import Batch, BoundModel, Objective
from palimpsest.process import Absorbing, Process


@dataclass(frozen=True)
class LikelihoodEstimate:
    """-log p of a batch of rows, in nats.

    Attributes:
        nll_BK: float64, one column per draw; their mean is the estimate. The draws are strata of one another.
        tokens_B: scored tokens, without EOS padding.
        evaluations_B: network evaluations spent on each row.
        logs: for every pass with masks, (B, P): `cross_entropy` (nats) and `num_masked`, summed over the masked tokens,
            and `nats`, the estimate of -log p from that pass alone.
    """

    nll_BK: Tensor
    tokens_B: Tensor
    evaluations_B: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Estimator(Protocol):
    """An estimator of the likelihood of rows.

    Attributes:
        kind: what is estimated; numbers of different kinds are never compared.
        in_parts: the draws may be taken a few at a time; the estimate is the mean of the parts.
    """

    kind: str
    in_parts: bool

    def check(self, objective: Objective) -> None:
        """Raise ValueError if the estimator does not fit the objective."""

    def label(self, model: BoundModel, num_draws: int) -> str:
        """Return the name of the estimate for the results."""

    def exact(self, model: BoundModel) -> bool:
        """Return True if the estimate has no Monte Carlo error."""

    def passes(self, model: BoundModel) -> int:
        """Return the network evaluations of one draw."""
        return 1

    def __call__(
        self, model: BoundModel, batch: Batch, seed: int, num_draws: int, start: int = 0, of: int | None = None
    ) -> LikelihoodEstimate:
        """Estimate by the draws `start` to `start + num_draws` of `of` (None: of `num_draws`), one evaluation each."""


def require_mask_filling(process: Process, kind: type, name: str) -> None:
    """Raise ValueError for models of the class `kind` on `process` that cannot unmask tokens in any order."""
    if not isinstance(process, Absorbing):
        raise ValueError(
            f"eval.estimator={name} unmasks tokens, and here any token may be noise; use eval.estimator=auto"
        )
    if issubclass(kind, CausalDenoiser):
        raise ValueError(
            f"eval.estimator={name} unmasks tokens in many orders, and parameterization=ar has one, with an exact "
            "likelihood; use eval.estimator=auto"
        )
    if issubclass(kind, BlockDenoiser):
        raise ValueError(
            f"eval.estimator={name} unmasks tokens anywhere in a text, and parameterization=bd3lm block after block; "
            "use eval.estimator=auto"
        )
