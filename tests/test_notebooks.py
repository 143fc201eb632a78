"""The notebooks run, and hold what they gave."""

from __future__ import annotations

import json
import re

import matplotlib
import pytest

from tests.helpers.commands import FEW, ROOT

NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
# Small enough for a test: fewer steps, texts and draws.
_SMALLER = ((r'("max_steps"|"val_check_interval"): \d+', r"\1: 4"), (r"(max_steps|val_check_interval)=\d+", r"\1=4"),
            (r"(num_warmup_steps\W+)\d+", r"\g<1>1"), (r"num_train_per_class=\d+", "num_train_per_class=60"),
            (r"\(4, 16, 64\)", "(2, 4)"), (r"draws=16", "draws=2"), (r"\(2, 8, 64\)", "(2, 3)"),
            (r'"(data.max_valid_texts)": \d+', r'"\1": 8'))  # fmt: skip


def cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict[str, object] = {}
    for cell in cells(path):
        source = "".join(cell["source"])
        for pattern, replacement in _SMALLER:
            source = re.sub(pattern, replacement, source)
        few = dict(word.split("=") for word in FEW)
        source = source.replace('data="reviews",', f'data="reviews", **{few},')
        source = source.replace('"data": "reviews",', f'"data": "reviews", **{few},')
        exec(compile(source, path.name, "exec"), names)  # noqa: S102 - a notebook of ours
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_what_it_gave(path):
    outputs = [output for cell in cells(path) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs), "a picture"
    assert not any(output["output_type"] == "error" for output in outputs)
    assert all(cell["execution_count"] for cell in cells(path))
