"""Compare runs: what was set differently, and what they measured, paired where the texts are the same.

Shape suffix: M rows (a text, or a window of one).
"""

import csv
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from palimpsest.common.metrics import Estimate, Units, ratio

LIKELIHOODS = "likelihoods.parquet"  # one row per text of a split: sample_id, nats, tokens, unit_first, unit_last
_PREDICTIONS = "predictions.parquet"
# What must be equal for two likelihoods to be comparable.
_PROTOCOL = ("kind", "data", "data_protocol", "split", "label", "tokenizer", "detokenizer", "length", "wrap", "packing",
             "prompted", "prefix_length", "score_special", "fill", "latents", "distribution")  # fmt: skip
_FIGURES = ("accuracy", "log_loss_nats", "ece", "nll_nats_per_token",
            "nll_of_own_class_nats_per_token", "perplexity", "generative_perplexity",
            "unigram_entropy_nats", "exact_match", "network_evaluations_per_text",
            "network_evaluations_per_sample")  # fmt: skip
_SPEED = "train/tokens_per_s"


@dataclass(frozen=True)
class Run:
    """The results of one command in one folder.

    Attributes:
        folder: where its results.json is.
        settings: what was typed, by key.
        figures: what was measured, by name; numbers without an error have nan.
        protocol: what a likelihood depends on.
        speed: training tokens per second, the median of what was logged; None if nothing was.
    """

    folder: Path
    settings: Mapping[str, str]
    figures: Mapping[str, Estimate]
    protocol: Mapping[str, object]
    speed: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Several runs beside each other.

    Attributes:
        names: of the runs, short.
        differing: keys that were not typed alike.
        figures: names of what at least one run measured.
        differences: figure minus that of the first run, paired over the same texts, by figure: one per run, None where
            the texts are not the same. Of accuracy and of nats per token.
        unlike: for each run, the parts of the protocol in which its likelihood differs from that of the first.
    """

    runs: Sequence[Run]
    names: list[str]
    differing: list[str]
    figures: list[str]
    differences: dict[str, list[Estimate | None]]
    unlike: list[list[str]]


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Return the results that lie in or below `paths`, in that order. Raises FileNotFoundError if a path has none."""
    runs = []
    for path in map(Path, paths):
        files = [path] if path.name == "results.json" else sorted(path.rglob("results.json"))
        if not files or not files[0].exists():
            raise FileNotFoundError(f"{path}: there is no results.json in it or below it; name the folder of a run")
        runs += [_read(file) for file in files]
    return list({run.folder.resolve(): run for run in runs}.values())


def _read(file: Path) -> Run:
    results = json.loads(file.read_text(encoding="utf-8"))
    words = shlex.split(results.get("command", ""))
    typed = [word.lstrip("+").partition("=") for word in words if "=" in word]
    found = {}
    for name in _FIGURES:
        value = results.get(name)
        if isinstance(value, Mapping) and value["value"] is not None:
            found[name] = Estimate(value["value"], float("nan") if value["se"] is None else value["se"])
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = Estimate(float(value), float("nan"))
    settings = {key: value for key, _, value in typed}
    protocol = results.get("protocol", {})
    if protocol.get("steps") and "trainer.max_steps" in settings:  # of the model, which may have been there before
        settings["trainer.max_steps"] = str(protocol["steps"])
    if "law" in protocol:  # its name in older results
        protocol["distribution"] = protocol.pop("law")
    return Run(file.parent, settings, found, protocol, _speed(file.parent))


def _speed(folder: Path) -> float | None:
    files = [path.read_text(encoding="utf-8") for path in folder.glob("csv/version_*/metrics.csv")]
    rows = [row for file in files for row in csv.DictReader(file.splitlines())]
    values = [float(row[_SPEED]) for row in rows if row.get(_SPEED) and None not in row.values()]
    return float(np.median(values)) if values else None


def compare(runs: Sequence[Run]) -> Comparison:
    """Put runs beside each other; the first is what others are subtracted from."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]
    figures = [name for name in _FIGURES if any(name in run.figures for run in runs)]
    first = runs[0].protocol
    unlike = [[key for key in _PROTOCOL if run.protocol.get(key) != first.get(key)] for run in runs]
    differences = {}
    if "nll_nats_per_token" in figures:
        pairs = zip(runs, unlike, strict=True)
        differences["nll_nats_per_token"] = [_nll(runs[0], run, not other) for run, other in pairs]
    if "accuracy" in figures:
        differences["accuracy"] = [_accuracy(runs[0], run) for run in runs]
    return Comparison(runs, _names(runs), differing, figures, differences, unlike)


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the folders without what all of them begin with."""
    parts = [run.folder.parts for run in runs]
    common = 0
    while len(runs) > 1 and all(len(one) > common + 1 and one[common] == parts[0][common] for one in parts):
        common += 1
    return ["/".join(one[common:]) for one in parts]


def _nll(a: Run, b: Run, comparable: bool) -> Estimate | None:
    """Return the difference in nats per token over the same rows; None if they are not the same."""
    files = [run.folder / LIKELIHOODS for run in (a, b)]
    if not comparable or a is b or not all(file.exists() for file in files):
        return None
    x, y = (pq.read_table(file).to_pydict() for file in files)
    if x["sample_id"] != y["sample_id"] or x["tokens"] != y["tokens"]:
        return None
    units = Units("units", np.array(x["unit_first"]), np.array(x["unit_last"]))
    return ratio(np.array(y["nats"]) - np.array(x["nats"]), np.array(x["tokens"]), units)


def _accuracy(a: Run, b: Run) -> Estimate | None:
    """Return the difference in accuracy over the same texts; None if they are not the same."""
    files = [run.folder / _PREDICTIONS for run in (a, b)]
    if a is b or not all(file.exists() for file in files):
        return None
    x, y = (pq.read_table(file).to_pydict() for file in files)
    if any(x[name] != y[name] for name in ("text_id", "label", "text") if name in x and name in y):
        return None
    right = [np.array(one["prediction"]) == np.array(one["label"]) for one in (x, y)]
    return ratio(right[1].astype(float) - right[0], np.ones(len(right[0])))
