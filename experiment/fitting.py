"""Training of one model to its end: reuse a complete training, resume an unfinished one, or start.

Shape suffixes: C classes, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from palimpsest.classification.class_unigrams import class_biases
from palimpsest.common.files import PathOrUrl
from palimpsest.data.unigram import counts_by_text, token_counts
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.training.callbacks.best import save_last

if TYPE_CHECKING:
    from palimpsest.experiment.experiment import Experiment


def fit(experiment: Experiment, label: int | None = None) -> PathOrUrl:
    """Train on one class, by default that of the configuration, up to trainer.max_steps or the end of patience.

    A complete training is left as it is. Shared weights (classify.pretrain) that do not exist yet are trained first. If
    another process trains in the same folder, wait for it.

    Returns:
        Path of the weights to use: the best by validation if there is patience, else the last.

    Raises:
        ValueError: the folder holds a training with other settings.
    """
    if path := experiment.runs.finished(experiment.build.data(label), label):
        print(f"complete: {path}")
        return path
    with experiment.runs.lock(label):
        # Another process may have trained it while this one waited.
        return experiment.runs.finished(experiment.build.data(label), label) or _fit(experiment, label)


def _fit(experiment: Experiment, label: int | None) -> PathOrUrl:
    resume = experiment.runs.resume_path(label)
    shared = fit(experiment.pretraining) if experiment.pretraining and not resume else None
    data = experiment.build.data(label)
    title = "train" if data.label is None else f"train label={data.label}"
    trainer = experiment.trainer(title if data.train_splits is None else "train the shared start", label)
    diffusion = experiment.build.diffusion(data)
    if diffusion.discriminative_weight:
        diffusion.compare_classes(_shares_of_classes(data))
    if resume:
        print(f"resuming from {resume}")
    else:
        initialise(experiment, diffusion, data, shared)
    trainer.fit(diffusion, datamodule=data, ckpt_path=resume)
    if not trainer.interrupted:
        save_last(trainer, experiment.runs.checkpoints(label))
    if trainer.should_stop:
        print(f"stopped at step {trainer.global_step}: {experiment.runs.patience(label)} validations were not better")
    return experiment.runs.model_path(label)


def initialise(experiment: Experiment, diffusion: Diffusion, data: TextData, shared: PathOrUrl | None) -> None:
    """Load the initial weights of a new training, if it has any (`Weights.load_initial`).

    With training.start_from_counts the bias of the output layer then starts from the token frequencies; in a training
    that compares classes their biases start where unigrams classify best.
    """
    if start := experiment.weights.load_initial(diffusion, data, shared):
        print(f"starting from the weights of {start}")
    if shared and diffusion.backbone.num_classes:
        diffusion.forget_classes()
    if experiment.build.choices.start_from_counts:
        causal = diffusion.objective.causal
        by_class = bool(diffusion.backbone.num_classes) and data.train_splits is None
        counts_CV = torch.from_numpy(token_counts(data, causal, by_class))
        before = experiment.pretraining.build.data() if shared else None
        before_V = None if before is None else torch.from_numpy(token_counts(before, causal)[0])
        biases = None
        if by_class and diffusion.compares_classes:
            counts_MV, label_M = counts_by_text(data, "train", causal)
            biases = torch.from_numpy(class_biases(counts_MV, label_M, diffusion.log_prior_C.numpy()))
        diffusion.start_from_counts(counts_CV, before_V, biases)


def _shares_of_classes(data: TextData) -> torch.Tensor:
    """Return each class's share of the training texts, (C,)."""
    if data.label_names is None:
        raise ValueError(
            f"classify.discriminative_weight compares classes, and data={data.name} has none; leave it out"
        )
    counts_C = np.bincount(np.asarray(data.texts("train")["label"][:]), minlength=len(data.label_names))
    if not counts_C.all():
        absent = np.flatnonzero(counts_C == 0).tolist()
        raise ValueError(
            f"classify.discriminative_weight compares classes, and there is no training text of {absent}; use more of "
            "data.max_train_texts, or leave it out"
        )
    return torch.from_numpy(counts_C / counts_C.sum())
