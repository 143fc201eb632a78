"""Guidance of samplers towards a class."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from palimpsest.common.metrics import Share, share
from palimpsest.common.values import Name, Natural, NotNegative
from palimpsest.data.unigram import token_counts
from palimpsest.dataloader import TextData
from palimpsest.denoisers import ClassGuided, ClassifierGuided, Denoiser
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.drawing import Drawing
from palimpsest.evaluation.editing import class_number
from palimpsest.evaluation.likelihood import GroundTruth
from palimpsest.samplers.base import with_model


@dataclass(frozen=True)
class Guidance:
    """The class that texts are sampled from, and how strongly.

    Attributes:
        to_class: number or name of the class; None for no class.
        weight: 1 samples the conditional distribution, 0 the unconditional one; more goes beyond the conditional one.
        by: `network` conditions the network on the class (classifier-free guidance, D-CFG). `unigrams` uses naive Bayes
            on the tokens (classifier-based guidance, D-CBG), for networks without class conditioning.
    """

    to_class: Natural | Name | None = None
    weight: NotNegative = 1.0
    by: Literal["network", "unigrams"] = "network"

    def number(self, data: TextData) -> int | None:
        """Return the number of the class in `data`, or None. Raises ValueError if the data have no such class."""
        if self.to_class is not None and not data.label_names:
            raise ValueError(f"classify.class={self.to_class}: the texts of data={data.name} have no classes")
        return class_number(self.to_class, data.label_names or (), "classify.class")

    def of(self, drawing: Drawing, diffusion: Diffusion, data: TextData) -> Drawing:
        """Return `drawing` with guidance; `data` has the texts of all classes.

        Raises ValueError if the network has no class conditioning.
        """
        number = self.number(data)
        if number is None:
            return drawing
        if self.by == "network" and not diffusion.backbone.num_classes:
            raise ValueError(
                f"classify.class={self.to_class} needs a network with class conditioning, and this one has none; train "
                "it with classify.sharing=conditional, set data.label for the model of one class, or set "
                "sampling.guidance_by=unigrams"
            )
        by_network = lambda model: ClassGuided(model, number, self.weight)
        guide = by_network if self.by == "network" else self._by_unigrams(number, data, diffusion)
        known = {"class": data.label_names[number], "guidance": self.weight, "guidance_by": self.by}
        return replace(drawing, sampler=with_model(drawing.sampler, guide), protocol={**drawing.protocol, **known})

    def _by_unigrams(self, number: int, data: TextData, diffusion: Diffusion) -> Callable[[Denoiser], Denoiser]:
        counts_CV = token_counts(data, diffusion.objective.causal, by_class=True) + 1.0
        log_p_CV = torch.from_numpy(np.log(counts_CV / counts_CV.sum(1, keepdims=True))).to(diffusion.device)
        log_p_CV[:, torch.from_numpy(counts_CV.max(0) == 1)] = 0.0  # padding and the like say nothing of the class
        log_p_CV = log_p_CV[:, : diffusion.objective.process.vocab_size]
        prior_C = torch.full((len(counts_CV),), -math.log(len(counts_CV)), device=diffusion.device)
        return lambda model: ClassifierGuided(model, number, self.weight, log_p_CV, prior_C)


def class_shares(truth: GroundTruth | None, texts: list[str], number: int) -> dict[str, Share]:
    """Return the share of texts that the corpus can produce, and the share of these that belong to the class `number`,
    if there are any.

    truth: the exact distribution of the corpus; None if it is not known, then the result is empty.
    """
    if truth is None:
        return {}
    posterior_MC = truth.posterior(texts)
    possible_M = np.isfinite(posterior_MC).all(1)
    wanted_M = posterior_MC[possible_M, number] > 0.5
    return {"possible": share(possible_M), **({"of_the_class": share(wanted_M)} if len(wanted_M) else {})}
