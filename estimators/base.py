"""What an estimator of the likelihood is, and what it gives.

Shape suffixes: B batch, K independent draws, P network passes that masked something.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from palimpsest.denoisers import BlockDenoiser, CausalDenoiser
from palimpsest.objectives.base import Batch, BoundTo, Objective
from palimpsest.process import Absorbing, Process


@dataclass(frozen=True)
class Measured:
    """-log p of a batch of rows, in nats.

    nll_BK: float64, one column per draw; their mean is the estimate (the draws are strata of one another).
    tokens_B: scored tokens, fill left out.
    evaluations_B: network evaluations spent on each row. logs: for every pass, where there were masks, cross_entropy
    and num_masked (B, P), summed over the masked tokens (nats) and their number, and nats (B, P), what the pass alone
    says of -log p: their mean is the estimate.
    """

    nll_BK: Tensor
    tokens_B: Tensor
    evaluations_B: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Estimator(Protocol):
    """Measures rows. `kind` says what is estimated: numbers of different kinds are never compared. `in_parts`: the
    draws may be taken a few at a time; the estimate is the mean of what the parts give."""

    kind: str
    in_parts: bool

    def check(self, objective: Objective) -> None:
        """Raise ValueError if the objective cannot be measured so."""

    def label(self, model: BoundTo, num_draws: int) -> str:
        """For the protocol of a result."""

    def exact(self, model: BoundTo) -> bool:
        """Whether a measurement has no Monte Carlo error."""

    def passes(self, model: BoundTo) -> int:
        """Network evaluations of a single draw."""

    def __call__(
        self, model: BoundTo, batch: Batch, seed: int, num_draws: int, start: int = 0, of: int | None = None
    ) -> Measured:
        """`num_draws` network evaluations of each row, from number `start` of the `of` (None: just these) on."""


def refuse_causal(process: Process, kind: type, name: str) -> None:
    """Raise ValueError for models of the class `kind` on `process` that cannot fill in anywhere."""
    if not isinstance(process, Absorbing):
        raise ValueError(f"eval.estimator={name} fills masks, and here any token may be noise; use eval.estimator=auto")
    if issubclass(kind, CausalDenoiser):
        raise ValueError(
            f"eval.estimator={name} fills masks in many orders, and parameterization=ar knows one, with an exact "
            "likelihood; use eval.estimator=auto"
        )
    if issubclass(kind, BlockDenoiser):
        raise ValueError(
            f"eval.estimator={name} fills masks anywhere in a text, and parameterization=bd3lm block after block; use "
            "eval.estimator=auto"
        )
