"""The models of generative classification: one per class, or one that is told the class; what is missing is trained.

Shape suffixes: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.experiment import Experiment
from palimpsest.objectives.base import Batch, drop_latent


@dataclass(frozen=True)
class ClassModel:
    """The model of texts of one class: one of its own, or one of all classes that is conditioned on `class_id`."""

    diffusion: Diffusion
    class_id: int | None = None

    def with_conditioning(self, batch: Batch) -> Batch:
        """Return `batch` conditioned on this class, if the model takes that, without its latents, which may say as
        much."""
        batch = drop_latent(batch)
        if self.class_id is None:
            return batch
        return {**batch, "class_id": torch.full_like(batch["input_ids"][:, 0], self.class_id)}


def labelled_data(experiment: Experiment, split: str) -> TextData:
    """Return the data, with every split that will be read already read.

    Raises:
        ValueError: there is no such split, or a class without texts.
    """
    data = experiment.build.data()
    check_classes(data)
    if split not in data.splits:
        raise ValueError(f"classify.split={split} is none of the splits of data={data.name}: {', '.join(data.splits)}")
    for name in ("train", "validation", split):
        data.split(name)
    for label in range(len(data.label_names)):
        for name in ("train", "validation"):
            experiment.build.data(label).texts(name)  # refuses a class without texts
    return data


def check_classes(data: TextData) -> None:
    """Raise ValueError for data whose texts cannot be classified."""
    if data.label_names is None or len(data.label_names) < 2:
        raise ValueError(f"mode=classify needs labelled data with two classes or more; data={data.name} has none")
    if data.label is not None:
        raise ValueError(f"mode=classify scores every class: leave out data.label={data.label}")
    if data.wrap:
        raise ValueError("mode=classify needs one text per row (or window): set data.wrap=false")


def class_models(experiment: Experiment, data: TextData, checkpoint_path: str, disable_ema: bool) -> list[ClassModel]:
    """Return the models of the classes, in their order, trained and ready to measure.

    data: all classes. checkpoint_path: files with {label} for the number of the class (one file for a conditional
    model); empty: this configuration's own models, of which the missing ones are trained.

    Raises:
        ValueError: `checkpoint_path` is one file where there are models per class, or {label} where there is one.
    """
    classes = range(len(data.label_names))
    if checkpoint_path and experiment.build.choices.conditional == ("{label}" in checkpoint_path):
        raise ValueError(_wrong_number(checkpoint_path, experiment.build.choices.conditional, len(classes)))
    if experiment.build.choices.conditional:
        return told_the_class(experiment, data, checkpoint_path or str(experiment.fit()), disable_ema)
    return one_per_class(experiment, [checkpoint_path or str(experiment.fit(label)) for label in classes], disable_ema)


def one_per_class(experiment: Experiment, paths: Sequence[str], disable_ema: bool) -> list[ClassModel]:
    """Return the model of each class, at `paths` in the order of the classes."""
    return [ClassModel(experiment.weights.trained(experiment.build.data(label), path, disable_ema))
            for label, path in enumerate(paths)]  # fmt: skip


def told_the_class(experiment: Experiment, data: TextData, path: str, disable_ema: bool) -> list[ClassModel]:
    """Return the one model at `path` as that of each class, on which it is conditioned."""
    diffusion = experiment.weights.trained(data, path, disable_ema)
    return [ClassModel(diffusion, label) for label in range(len(data.label_names))]


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
    """Return the splits of the source whose texts classify.pretrain names: all, <split>, or all+<split>.

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
