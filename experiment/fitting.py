"""Training of one model to its end: reuse a complete training, resume an unfinished one, or start.

Shape suffixes: C classes, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf

from palimpsest.classification.class_ngrams import PairCounts, class_biases
from palimpsest.common.files import PathOrUrl
from palimpsest.data.unigram import pairs_by_text, token_counts
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.models.checkpoints import read_progress
from palimpsest.settings.identity import word
from palimpsest.training.callbacks.best import Patience, save_last

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
        print(f"complete: {path}", *_differences_from_training(experiment, path, label), sep="\n")
        return path
    with experiment.runs.lock(label):
        # Another process may have trained it while this one waited.
        return experiment.runs.finished(experiment.build.data(label), label) or _fit(experiment, label)


def _fit(experiment: Experiment, label: int | None) -> PathOrUrl:
    resume = experiment.runs.resume_path(label)
    data = experiment.build.data(label)
    # What is wrong with the classes or pairs is refused before a long shared start, not after it.
    share_C = _shares_of_classes(data) if experiment.build.cfg.classify.discriminative_weight else None
    if experiment.build.choices.bigrams and not resume:
        _pair_counts(data, causal=False).most_frequent(experiment.build.choices.bigrams)
    shared = _fit_shared_start(experiment.pretraining) if experiment.pretraining and not resume else None
    title = "train" if data.label is None else f"train label={data.label}"
    trainer = experiment.trainer(title if data.train_splits is None else "train the shared start", label)
    diffusion = experiment.build.diffusion(data)
    if share_C is not None:
        diffusion.compare_classes(share_C)
    if resume:
        experiment.runs.check_resumable(resume, data)
        print(f"resuming from {resume}")
    else:
        initialise(experiment, diffusion, data, shared)
    try:
        trainer.fit(diffusion, datamodule=data, ckpt_path=resume)
    except MisconfigurationException as error:
        raise ValueError(f"lightning.Trainer refuses a setting of trainer: {error}") from error
    if not trainer.interrupted:
        save_last(trainer, experiment.runs.checkpoints(label))
    if trainer.should_stop:
        patience = experiment.runs.patience(label)
        waited = any(isinstance(callback, Patience) and callback.is_over for callback in trainer.callbacks)
        cause = f"{patience} validations were not better" if waited else "trainer.max_time or a callback ended it"
        print(f"stopped at step {trainer.global_step}: {cause}")
    return experiment.runs.model_path(label)


def _fit_shared_start(pretraining: Experiment) -> PathOrUrl:
    """Train the shared start. Raises ValueError if it ends before its last step."""
    path = fit(pretraining)
    if not pretraining.runs.finished(pretraining.build.data()):
        raise ValueError(
            f"the shared start is unfinished: {path} has {read_progress(path).step} of "
            f"classify.pretrain_steps={pretraining.runs.max_steps} steps; the same command goes on with it"
        )
    return path


def _differences_from_training(experiment: Experiment, path: PathOrUrl, label: int | None) -> list[str]:
    """Return a remark on settings that weights depend on, but not the folder: a run is found again on another machine.

    How often and on what it is validated decides about the learning rate of plateau=cut, the mask rates of bd3lm and
    the best weights of a training with patience.
    """
    theirs, ours = read_progress(path), OmegaConf.create(experiment.build.settings)
    keys = ["trainer.precision", *(["eval.disable_ema"] if ours.training.from_pretrained else [])]
    watched = ours.plateau or OmegaConf.select(ours, "training.clip_search_widths")
    if watched or experiment.runs.patience(label) is not None:
        keys += ["trainer.val_check_interval", "trainer.limit_val_batches", "data.max_valid_texts"]
    before = {key: theirs.typed(key) for key in keys if theirs.configuration}
    other = [f"{key}={word(was)}" for key, was in before.items() if was != OmegaConf.select(ours, key)]
    remark = f"it was trained with {' '.join(other)}; another checkpointing.save_dir= trains with the typed settings"
    return [remark] if other else []


def initialise(experiment: Experiment, diffusion: Diffusion, data: TextData, shared: PathOrUrl | None) -> None:
    """Load the initial weights of a new training, if it has any (`Weights.load_initial`).

    With training.start_from_counts the bias of the output layer then starts from the token frequencies; in a training
    that compares classes their biases start where unigrams classify best.
    """
    if start := experiment.weights.load_initial(diffusion, data, shared):
        print(f"starting from the weights of {start}")
    elif diffusion.compares_classes:
        print(
            "classes are compared from the first step, which can keep the network from learning its texts; "
            "classify.pretrain=all trains a start without classes"
        )
    if shared and diffusion.backbone.num_classes:
        diffusion.forget_classes()
    if experiment.build.choices.start_from_counts:
        causal = diffusion.objective.causal
        by_class = bool(diffusion.backbone.num_classes) and data.train_splits is None
        counts_CV = torch.from_numpy(token_counts(data, causal, by_class))
        before = experiment.pretraining.build.data() if shared else None
        before_V = None if before is None else torch.from_numpy(token_counts(before, causal)[0])
        biases = fitted_biases(diffusion, data) if by_class and diffusion.compares_classes else None
        diffusion.start_from_counts(counts_CV, before_V, biases)


def fitted_biases(diffusion: Diffusion, data: TextData) -> torch.Tensor:
    """Return the output biases of the classes that tell the training texts apart best, nats (C, V).

    The biases of token pairs, if the network has any, are fitted together with them and set.
    """
    bigrams = diffusion.backbone.bigrams
    number = 0 if bigrams is None else len(bigrams.first_P)
    print(f"fitting the classes' biases of tokens{f' and of {number} pairs' if number else ''} to the training texts")
    pairs = _pair_counts(data, diffusion.objective.causal)
    log_prior_C = np.log(np.bincount(pairs.label_M) / len(pairs.label_M))
    if bigrams is None:
        return torch.from_numpy(class_biases(pairs.tokens, log_prior_C)[0])
    biased_F = pairs.most_frequent(number)
    bias_CV, pair_CF = class_biases(pairs, log_prior_C, biased_F)
    bigrams.set(*(torch.from_numpy(found) for found in (pairs.first_P[biased_F], pairs.second_P[biased_F], pair_CF)))
    return torch.from_numpy(bias_CV)


def _pair_counts(data: TextData, causal: bool) -> PairCounts:
    (first_P, second_P), count_MP, label_M = pairs_by_text(data, "train", causal)
    return PairCounts(first_P, second_P, count_MP, label_M, data.vocabulary.size)


def _shares_of_classes(data: TextData) -> torch.Tensor:
    """Return each class's share of the training rows, (C,): of the windows, where long texts are cut into these."""
    if len(data.label_names or ()) < 2:
        raise ValueError(
            f"classify.discriminative_weight compares classes, and data={data.name} has fewer than two; leave it out"
        )
    counts_C = np.bincount(np.asarray(data.split("train")["label"][:]), minlength=len(data.label_names))
    if not counts_C.all():
        absent = ", ".join(data.label_names[k] for k in np.flatnonzero(counts_C == 0))
        raise ValueError(
            f"classify.discriminative_weight compares classes, and there is no training text of {absent}; use more "
            "training texts (data.max_train_texts, data.texts_per_class), or leave it out"
        )
    return torch.from_numpy(counts_C / counts_C.sum())
