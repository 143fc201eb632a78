"""What an estimator of the likelihood is, and what it gives.

Shape suffixes: B batch, K independent draws, P network passes that masked something.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from objectives.base import Batch, Model


@dataclass(frozen=True)
class Measured:
    """-log p of a batch of rows, in nats.

    nll_BK: float64, one column per draw; their mean is the estimate (the draws are strata of one another).
    tokens_B: scored tokens.
    evaluations_B: network evaluations spent on each row. cross_entropy_BP, num_masked_BP: summed cross-entropy (nats)
    and number of the masked tokens of every pass, where there were masks.
    """

    nll_BK: Tensor
    tokens_B: Tensor
    evaluations_B: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Estimator(Protocol):
    """Measures rows. `kind` says what is estimated: numbers of different kinds are never compared."""

    kind: str

    def label(self, model: Model, num_draws: int) -> str:
        """For the protocol of a result."""

    def exact(self, model: Model) -> bool:
        """Whether a measurement has no Monte Carlo error."""

    def __call__(self, model: Model, batch: Batch, seed: int, num_draws: int) -> Measured: ...


def refuse_causal(model: Model, name: str) -> None:
    """Raises ValueError for models that know one order only."""
    if model.objective.exact:
        raise ValueError(
            f"eval.estimator={name} fills masks in many orders, and parameterization=ar knows one, with an exact "
            "likelihood; use eval.estimator=auto"
        )
