"""What a task is handed, and how it writes down what it found."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import lightning
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.common.files import Place, write_whole
from palimpsest.common.metrics import Estimate
from palimpsest.corpora.judging import Judge
from palimpsest.diffusion import Diffusion, Provenance
from palimpsest.estimators.base import Estimator
from palimpsest.evaluation.drawing import Drawing
from palimpsest.evaluation.likelihood import GroundTruth, Precision
from palimpsest.report.report import Report


class Experiment(Protocol):
    """Builds what the configuration names, when it is asked for. `label` None means the configuration's own choice."""

    seed: int
    command: str
    settings: str  # the resolved configuration as YAML
    facts: Mapping[str, object]
    protocol: Mapping[str, object]  # which law, weights and random numbers a result belongs to
    drawing: Drawing
    estimator: Estimator
    precision: Precision
    truth: GroundTruth | None
    judge: Judge  # of completed prompts
    conditional: bool  # one network is told the class, else one model per class
    start_from_counts: bool  # new weights begin at token frequencies
    pretraining: Experiment | None  # the training of the weights that the models of all classes start from

    def folder(self, label: int | None = None) -> Path: ...
    def checkpoints(self, label: int | None = None) -> Place: ...
    def data(self, label: int | None = None) -> object: ...
    def diffusion(self, data: object) -> Diffusion: ...
    def start_from_pretrained(self, diffusion: Diffusion, data: object, shared: Place | None) -> Place | None: ...
    def alone(self, label: int | None = None) -> AbstractContextManager[None]: ...
    def patience(self, label: int | None = None) -> int | None: ...
    def finished(self, label: int | None = None) -> Place | None: ...
    def model_path(self, label: int | None = None) -> Place: ...
    def trained(self, data: object, checkpoint_path: str, disable_ema: bool) -> Diffusion: ...
    def trainer(self, title: str, label: int | None = None) -> lightning.Trainer: ...
    def resume_path(self, label: int | None = None) -> Place | None: ...


@rank_zero_only
def write_results(folder: Path, results: Mapping[str, object]) -> None:
    """Write results.json: what was measured and under which protocol, for programs to read."""
    plain = json.loads(json.dumps(results, default=_plain), parse_constant=lambda name: None)  # JSON has no NaN
    write_whole(folder / "results.json", (json.dumps(plain, indent=2) + "\n").encode())


@rank_zero_only
def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write one JSON object a line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, text.encode("utf-8"))


@rank_zero_only
def write_latents(path: Path, latents: np.ndarray) -> None:
    """Write latents as a file of numpy."""
    content = io.BytesIO()
    np.save(content, latents.astype(np.float32))
    write_whole(path, content.getvalue())


def write_report(experiment: Experiment, report: Report, folder: Path) -> Path:
    """Write report.html, with the configuration at its end; returns its path."""
    report.code(experiment.settings, "configuration")
    report.write(folder / "report.html")
    return folder / "report.html"


def _plain(value: object) -> object:
    if isinstance(value, Estimate):
        return {"value": value.value, "se": value.se}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Provenance):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} has no place in results.json")
