"""Properties of tasks, and writers of their results."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.common.files import write_atomically
from palimpsest.common.metrics import Estimate, Share
from palimpsest.diffusion import Provenance
from palimpsest.evaluation.experiment import Experiment
from palimpsest.report.report import Report


@dataclass(frozen=True)
class Mode:
    """Properties of a task that other parts depend on."""

    trains: bool = False  # may train models
    compares: bool = False  # compares classes
    writes: bool = False  # samples texts
    measures: bool = False  # uses trained weights; a published model's settings come from its file


def mode(**properties: bool) -> Callable[[Callable], Callable]:
    """Declare the properties of a task (`Mode`), as `task.mode`."""

    def declared(task: Callable) -> Callable:
        task.mode = Mode(**properties)
        return task

    return declared


@rank_zero_only
def write_results(folder: Path, results: Mapping[str, object]) -> None:
    """Write results.json: the measurements and their protocol."""
    plain = json.loads(json.dumps(results, default=_plain), parse_constant=lambda name: None)  # JSON has no NaN
    path = folder / "results.json"
    before = json.loads(path.read_text(encoding="utf-8")).get("command") if path.exists() else None
    if before not in (None, plain.get("command")):
        print(f"{path} held the results of: {before}")
    write_atomically(path, (json.dumps(plain, indent=2) + "\n").encode())


@rank_zero_only
def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write one JSON object per line."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode("utf-8"))


@rank_zero_only
def write_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write a Parquet file."""
    table = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), table)
    write_atomically(path, table.getvalue())


@rank_zero_only
def write_latents(path: Path, latents: np.ndarray) -> None:
    """Write latents as a NumPy file."""
    content = io.BytesIO()
    np.save(content, latents.astype(np.float32))
    write_atomically(path, content.getvalue())


def write_report(experiment: Experiment, report: Report, folder: Path) -> Path:
    """Write report.html, with the configuration at its end; return its path."""
    report.code(experiment.build.settings, "configuration")
    report.write(folder / "report.html")
    return folder / "report.html"


def _plain(value: object) -> object:
    if isinstance(value, Estimate):
        return {"value": value.value, "se": value.se}
    if isinstance(value, Share):
        return {name: number for name, number in asdict(value).items() if name != "chance"}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Provenance):
        return asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be written to results.json")
