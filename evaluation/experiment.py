"""What measuring, classifying and the tasks are handed: an experiment."""

from __future__ import annotations

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
    """What a configuration chooses that is no object of its own.

    Attributes:
        conditional: one network is conditioned on the class; else there is one model per class.
    """

    conditional: bool


class Builds(Protocol):
    """Builds what the configuration names (experiment/building.py).

    `label` None means the class that the configuration chooses, or all.

    Attributes:
        settings: the resolved configuration as YAML.
        truth: the exact distribution of the corpus, if it is known.
        judge: of completed prompts.
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
    """Knows where runs are (experiment/runs.py)."""

    def folder(self, label: int | None = None) -> Path: ...


class Loads(Protocol):
    """Makes a checkpoint into a ready model (experiment/weights.py)."""

    def trained(self, data: TextData, checkpoint_path: str, disable_ema: bool) -> Diffusion: ...


class Experiment(Protocol):
    """An experiment (experiment/experiment.py).

    Attributes:
        command: what was typed.
        facts: what stands at the top of a report.
        protocol: which distribution, weights and random numbers a result belongs to.
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
