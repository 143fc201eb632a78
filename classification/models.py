"""Class models: one model per class, or one conditioned on the class; missing ones are trained.

Shape suffixes: B batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.experiment import Experiment
from palimpsest.models.class_conditioning import under_class
from palimpsest.objectives.base import Batch, drop_latent


@dataclass(frozen=True)
class ClassModel:
    """The model of one class: its own, or one of all classes conditioned on `class_id`."""

    diffusion: Diffusion
    class_id: int | None = None

    def with_conditioning(self, batch: Batch) -> Batch:
        """Return `batch` conditioned on this class if the model is conditional; without latents, which reveal it."""
        batch = drop_latent(batch)
        if self.class_id is None:
            return batch
        return under_class(batch, torch.full_like(batch["input_ids"][:, 0], self.class_id), self.diffusion.backbone)


def labelled_data(experiment: Experiment, split: str) -> TextData:
    """Return the data, with every split read that will be needed.

    Raises:
        ValueError: there is no such split, or a class without texts.
    """
    data = experiment.build.data()
    check_classes(data)
    if split not in data.splits:
        raise ValueError(f"classify.split={split} is none of the splits of data={data.name}: {', '.join(data.splits)}")
    for name in ("train", "validation", split):
        data.split(name)
    present = np.unique(data.texts("train")["label"][:])
    if absent := [name for number, name in enumerate(data.label_names) if number not in present]:
        raise ValueError(
            f"there is no training text of class {', '.join(absent)}; use more training texts (data.max_train_texts, "
            "data.texts_per_class), or data without this class"
        )
    for label in range(len(data.label_names)):
        experiment.build.data(label).texts("validation")  # with a model per class: refuses a class without texts
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
    """Return the trained models of the classes, in order.

    Args:
        data: all classes.
        checkpoint_path: files with {label} for the number of the class (one file for a conditional model); empty: this
            configuration's own models, of which missing ones are trained.

    Raises:
        ValueError: `checkpoint_path` is one file for several models, or has {label} for one model.
    """
    classes = range(len(data.label_names))
    conditional = experiment.build.choices.conditional
    per_class = "{label}" in checkpoint_path
    if conditional and per_class:
        raise ValueError(
            f"eval.checkpoint_path={checkpoint_path} is one model per class, but classify.sharing=conditional needs "
            "one for all: name its file, or set classify.sharing=per_class"
        )
    if checkpoint_path and not conditional and not per_class:
        raise ValueError(
            f"eval.checkpoint_path={checkpoint_path} is one model, but mode=classify needs one for each of the "
            f"{len(classes)} classes: write {{label}} where the number of the class stands, as in "
            "runs/label={label}/checkpoints/last.ckpt, or leave it empty to train them (from the weights of "
            "training.from_pretrained, if it is set)"
        )
    if conditional:
        return conditional_models(experiment, data, checkpoint_path or str(experiment.fit()), disable_ema)
    return one_per_class(experiment, [checkpoint_path or str(experiment.fit(label)) for label in classes], disable_ema)


def one_per_class(experiment: Experiment, paths: Sequence[str], disable_ema: bool) -> list[ClassModel]:
    """Load the model of each class from `paths`, in the order of the classes."""
    return [ClassModel(experiment.weights.trained(experiment.build.data(label), path, disable_ema))
            for label, path in enumerate(paths)]  # fmt: skip


def conditional_models(experiment: Experiment, data: TextData, path: str, disable_ema: bool) -> list[ClassModel]:
    """Load the one model at `path`, conditioned on each class."""
    diffusion = experiment.weights.trained(data, path, disable_ema)
    return [ClassModel(diffusion, label) for label in range(len(data.label_names))]


def pretraining_splits(pretrain: str, splits: Sequence[str]) -> list[str]:
    """Return the splits of the source whose texts classify.pretrain names: all, <split>, or all+<split>.

    Raises:
        ValueError: it is none of these, or a split that does not exist or that results are measured on.
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
