"""What latents say of their texts: the likelihood with the true ones, with others' and with none, on the same masks.

Shape suffixes: B batch, M texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import lightning
import numpy as np
import torch

from diffusion import Diffusion
from estimators.base import Estimator
from metrics import Estimate, NLLMeter
from objectives.base import Batch
from reporting.report import Metric, Report
from tasks.base import row_numbers
from tasks.latent_measures import partners
from tasks.scoring import Precision, Scores, score


@dataclass(frozen=True)
class LatentGain:
    """Nats per token of the texts of a split, as each is told something else: true, shuffled (the latent of another of
    its texts), none. gain: shuffled minus true, over_none: none minus true, text by text, so that the noise of texts
    and masks that they share is not in their errors."""

    true: Estimate
    shuffled: Estimate
    none: Estimate
    gain: Estimate
    over_none: Estimate

    def results(self) -> dict[str, object]:
        """For results.json."""
        return {"nll_true_latents": self.true, "nll_shuffled_latents": self.shuffled, "nll_no_latents": self.none,
                "latent_gain": self.gain, "latent_gain_over_none": self.over_none}  # fmt: skip

    def report(self, report: Report, facts: dict[str, object]) -> None:
        """A section. facts: of the encoder."""
        report.section("What the latents say", _ABOUT)
        rows = [("their own", self.true), ("those of other texts", self.shuffled), ("none", self.none)]
        cells = [(name, Metric("", found.value, found.se)) for name, found in rows]
        report.table(["latents", "nats/token"], cells, ", ".join(f"{key}: {value}" for key, value in facts.items()))
        report.metrics([Metric("latent gain", self.gain.value, self.gain.se, "nats/token", "others' minus their own"),
                        Metric("over none", self.over_none.value, self.over_none.se, "nats/token")])  # fmt: skip

    def __str__(self) -> str:
        """A line for a terminal."""
        return (f"latents: their own {self.true}, others' {self.shuffled}, none {self.none} nats/token | "
                f"latent gain {self.gain}, over none {self.over_none} (paired)")  # fmt: skip


_ABOUT = (
    "The bound of each text given its own latent, given that of another text and given none, on the same masks. The "
    "latent gain, others' minus their own, is above zero where the network reads its latents; its error is that of the "
    "difference, text by text."
)


def untrained_marginal(objective: object) -> str:
    """What to know of the likelihood of texts alone, where the network learned texts only from their latents, or none;
    empty where it learned them without, or next to without, as in mode joint."""
    modes = getattr(objective, "shares", None)
    if modes is None or {"text", "joint"} & set(modes):
        return ""
    return (f"The modes of this training ({', '.join(modes)}) never hide a text's latent, so that the likelihood of "
            "texts alone is that of something which was not learned.")  # fmt: skip


def latent_gain(
    trainer: lightning.Trainer, diffusion: Diffusion, data: object, split: str, estimator: Estimator,
    precision: Precision, seed: int, none: Scores,
) -> LatentGain:  # fmt: skip
    """Measure `split` with true and shuffled latents under the masks of `none`, which was measured with hidden ones."""
    rows, latents, rounds = data.split(split), data.latents.of(split), int(none.round_K[-1]) + 1
    partner_M = partners(len(rows), seed)

    def shuffled(batch: Batch) -> Batch:
        own_B = row_numbers(rows, batch["sample_id"].cpu().numpy())
        return {**batch, "latent": torch.from_numpy(latents[partner_M[own_B]]).to(batch["latent"].device)}

    def measured(told: object) -> Scores:
        loader = data.eval_dataloader(split, trainer=trainer)
        return score(trainer, diffusion, loader, estimator, precision, seed, told, rounds)

    true, other = measured(lambda batch: batch), measured(shuffled)
    difference = [_per_token(a.nll_M - true.nll_M, true.tokens_M) for a in (other, none)]
    return LatentGain(true.per_token(), other.per_token(), none.per_token(), *difference)


def _per_token(nats_M: np.ndarray, tokens_M: np.ndarray) -> Estimate:
    meter = NLLMeter()
    meter.update(torch.from_numpy(nats_M), torch.from_numpy(tokens_M))
    return meter.estimate()
