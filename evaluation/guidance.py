"""Guidance of samplers towards a class."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np

from palimpsest.common.values import AtLeastOne, Name, Natural, Needs, NotNegative
from palimpsest.dataloader import TextData
from palimpsest.denoisers import ClassGuided, ClassifierGuided
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.drawing import Drawing
from palimpsest.evaluation.editing import class_number
from palimpsest.evaluation.likelihood import GroundTruth
from palimpsest.evaluation.noised_classifier import noised_classifier
from palimpsest.samplers.base import with_model


@dataclass(frozen=True)
class Guidance:
    """The class that texts are sampled from, and how strongly.

    Attributes:
        to_class: number or name of the class; None for no class.
        weight: 1 samples the conditional distribution, 0 the unconditional one; more goes beyond the conditional one.
        by: `network` conditions the network on the class (classifier-free guidance, D-CFG). `classifier` trains a
            classifier of noised texts first (classifier-based guidance, D-CBG), for networks that know no classes.
        steps: optimizer steps of that classifier.
    """

    to_class: Natural | Name | None = None
    weight: NotNegative = 1.0
    by: Literal["network", "classifier"] = "network"
    steps: Annotated[AtLeastOne, Needs("by", ("classifier",))] = 2000

    def number(self, data: TextData) -> int | None:
        """Return the number of the class in `data`, or None. Raises ValueError if the data have no such class."""
        if self.to_class is not None and not data.label_names:
            raise ValueError(f"classify.class={self.to_class}: the texts of data={data.name} have no classes")
        return class_number(self.to_class, data.label_names or (), "classify.class")

    def of(self, drawing: Drawing, diffusion: Diffusion, data: TextData, seed: int) -> Drawing:
        """Return `drawing` with guidance; `data` has the texts of all classes. seed: that of a classifier's training.

        Raises ValueError if the network has no class conditioning.
        """
        number = self.number(data)
        if number is None:
            return drawing
        if self.by == "network" and not diffusion.backbone.num_classes:
            raise ValueError(
                f"classify.class={self.to_class} needs a network with class conditioning, and this one has none; train "
                "it with classify.sharing=conditional, set data.label for the model of one class, or set "
                "sampling.guidance_by=classifier"
            )
        known = {"class": data.label_names[number], "guidance": self.weight, "guidance_by": self.by}
        if self.by == "network":
            guide = lambda model: ClassGuided(model, number, self.weight)
        else:
            classifier, accuracy = noised_classifier(diffusion, data, self.steps, seed)
            print(f"the classifier is right on {accuracy:.1%} of noised validation texts, at times drawn evenly")
            guide = lambda model: ClassifierGuided(model, number, self.weight, classifier)
            known |= {"guidance_steps": self.steps, "guide_accuracy": accuracy}
        return replace(drawing, sampler=with_model(drawing.sampler, guide), protocol={**drawing.protocol, **known})


def class_shares(truth: GroundTruth | None, texts: list[str], number: int) -> dict[str, float]:
    """Return the share of texts that the corpus can produce, and the share of these that belong to the class `number`.

    truth: the exact distribution of the corpus; None if it is not known, then the result is empty.
    """
    if truth is None:
        return {}
    posterior_MC = truth.posterior(texts)
    possible_M = np.isfinite(posterior_MC).all(1)
    wanted_M = posterior_MC[possible_M, number] > 0.5
    return {"possible": float(possible_M.mean()), "of_the_class": float(wanted_M.mean()) if len(wanted_M) else math.nan}
