"""Protocols: the parts of an experiment that evaluation, classification and tasks use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import lightning

from palimpsest.common.files import PathOrUrl
from palimpsest.corpora.answer_checking import AnswerChecker
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.estimators.base import Estimator
from palimpsest.evaluation.drawing import Drawing
from palimpsest.evaluation.likelihood import GroundTruth, Precision


class Choices(Protocol):
    """Configuration choices that are not objects. conditional: one network is conditioned on the class; else one model
    per class.
    """

    conditional: bool


class Builds(Protocol):
    """Builds the objects that the configuration names (experiment/building.py).

    `label` None means the configured class, or all classes.

    Attributes:
        settings: the resolved configuration as YAML.
        truth: the exact distribution of the corpus, if it is known.
        judge: checks the answers to completed prompts.
    """

    choices: Choices
    settings: str
    estimator: Estimator
    precision: Precision
    truth: GroundTruth | None
    judge: AnswerChecker

    def data(self, label: int | None = None) -> TextData: ...

    def drawing(self, trained_length: int | None = None) -> Drawing: ...


class Folders(Protocol):
    """The folders of runs (experiment/runs.py)."""

    def folder(self, label: int | None = None) -> Path: ...


class Loads(Protocol):
    """Loads checkpoints as ready models (experiment/weights.py)."""

    def trained(self, data: TextData, checkpoint_path: str, disable_ema: bool) -> Diffusion: ...


class Experiment(Protocol):
    """An experiment (experiment/experiment.py).

    Attributes:
        command: the command line.
        facts: the table at the top of a report.
        protocol: the distribution, weights and random numbers that a result belongs to.
    """

    build: Builds
    runs: Folders
    weights: Loads
    seed: int
    command: str
    facts: Mapping[str, object]
    protocol: Mapping[str, object]

    def fit(self, label: int | None = None) -> PathOrUrl: ...

    def trainer(self, title: str, label: int | None = None) -> lightning.Trainer: ...
