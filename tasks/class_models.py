"""The models of generative classification: one per class, or one that is told the class; what is missing is trained.

Shape suffixes: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from palimpsest.diffusion import Diffusion
from palimpsest.objectives.base import Batch, latent_hidden
from palimpsest.tasks.base import Experiment
from palimpsest.tasks.fitting import fit


@dataclass(frozen=True)
class Hypothesis:
    """That a text is of one class: the model of that class, or (`class_id`) what to tell the model of all."""

    diffusion: Diffusion
    class_id: int | None = None

    def told(self, batch: Batch) -> Batch:
        """`batch` with every row said to be of this class, where the model takes that; its latent, which may say as
        much, is hidden."""
        batch = latent_hidden(batch)
        if self.class_id is None:
            return batch
        return {**batch, "class_id": torch.full_like(batch["input_ids"][:, 0], self.class_id)}


def class_models(experiment: Experiment, data: object, checkpoint_path: str, disable_ema: bool) -> list[Hypothesis]:
    """One hypothesis per class, in their order, from trained models ready to measure.

    data: all classes. checkpoint_path: files with {label} for the number of the class (one file for a conditional
    model); empty: this configuration's own models, of which the missing ones are trained.

    Raises:
        ValueError: `checkpoint_path` is one file where there are models per class, or {label} where there is one.
    """
    classes = range(len(data.label_names))
    if checkpoint_path and experiment.build.choices.conditional == ("{label}" in checkpoint_path):
        raise ValueError(_wrong_number(checkpoint_path, experiment.build.choices.conditional, len(classes)))
    if experiment.build.choices.conditional:
        return told_the_class(experiment, data, checkpoint_path or str(fit(experiment)), disable_ema)
    return one_per_class(experiment, [checkpoint_path or str(fit(experiment, label)) for label in classes], disable_ema)


def one_per_class(experiment: Experiment, paths: Sequence[str], disable_ema: bool) -> list[Hypothesis]:
    """One hypothesis per class from the model of each, at `paths` in the order of the classes."""
    return [Hypothesis(experiment.weights.trained(experiment.build.data(label), path, disable_ema))
            for label, path in enumerate(paths)]  # fmt: skip


def told_the_class(experiment: Experiment, data: object, path: str, disable_ema: bool) -> list[Hypothesis]:
    """One hypothesis per class from the one model at `path`, which is told it."""
    diffusion = experiment.weights.trained(data, path, disable_ema)
    return [Hypothesis(diffusion, label) for label in range(len(data.label_names))]


def _wrong_number(checkpoint_path: str, conditional: bool, num_classes: int) -> str:
    if conditional:
        return (
            f"eval.checkpoint_path={checkpoint_path} is one model per class, and classify.sharing=conditional is one "
            "for all: name its file, or set classify.sharing=per_class"
        )
    return (
        f"eval.checkpoint_path={checkpoint_path} is one model, but mode=classify needs one for each of the "
        f"{num_classes} classes: write {{label}} where the number of the class stands, as in "
        "runs/label={label}/checkpoints/last.ckpt, or leave it empty to train them (from the weights of "
        "training.from_pretrained, if it is set)"
    )


def pretraining_splits(pretrain: str, splits: Sequence[str]) -> list[str]:
    """The splits of the source whose texts classify.pretrain names: all, <split>, or all+<split>.

    Raises:
        ValueError: it is none of these, or a split that is not there or that results are measured on.
    """
    others = [split for split in splits if split not in ("train", "validation", "test")]
    names = str(pretrain).split("+")
    extra = names[1:] if names[0] == "all" else names
    if len(extra) > 1 or not set(extra) <= set(others):
        choices = ["all", *others, *(f"all+{split}" for split in others)]
        raise ValueError(
            f"classify.pretrain={pretrain} is none of {', '.join(choices)} (the splits of these data: "
            f"{', '.join(splits)}; validation and test are measured on); choose one, or null"
        )
    return ["train", *extra] if names[0] == "all" else extra
