"""benchmarks/gpu.py in its small form: every check and every measurement, on this machine's device."""

from __future__ import annotations

import json

import pytest
import torch

from palimpsest.benchmarks import gpu
from palimpsest.models import compiling


@pytest.fixture(autouse=True)
def graphs_are_run_by_python(monkeypatch):
    monkeypatch.setattr(compiling, "_BACKEND", "eager")
    yield
    torch._dynamo.reset()


def test_the_small_form_measures_everything(tmp_path):
    assert gpu.main(["--small", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["name"] for row in found["measurements"]] == list(gpu.MEASUREMENTS)
    assert len(found["checks"]) >= 9 and all(deviation <= limit for _, deviation, limit in found["checks"])
    written = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in written for name in gpu.MEASUREMENTS) and "failed" not in written


def test_a_failed_check_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "checks", lambda *_: iter([("a sum, relative", float("nan"), 0.1)]))
    assert gpu.main(["--small", "--output", str(tmp_path)]) == 1
    assert "a sum, relative: nan is above 0.1" in capsys.readouterr().err
    assert "| a sum, relative | nan | 0.1 |" in (tmp_path / "gpu.md").read_text()
    assert json.loads((tmp_path / "gpu.json").read_text())["measurements"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_whole_form_is_refused(capsys):
    assert gpu.main([]) == 2 and "--small runs anywhere" in capsys.readouterr().err
