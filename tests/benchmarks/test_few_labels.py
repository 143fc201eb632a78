"""benchmarks/few_labels.py in a tiny form: its lines, its table, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math

import pytest

from palimpsest.benchmarks import few_labels
from tests.helpers.commands import FEW, TINY

SMALL = [word for word in TINY if not word.startswith(("data.max_train", "trainer.max_steps", "sampling"))]


def test_a_tiny_form_measures_all_models_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "found.jsonl"
    words = ["--noise", "0.25", "--seeds", "1", "--steps", "2", "--output", str(path), "--texts"]
    few_labels.main([*words, "8", "--pretrain_steps", "2", "--more", *SMALL, *FEW])
    first = path.read_text()
    lines = [json.loads(line) for line in first.splitlines()]
    assert [line["model"] for line in lines] == ["diffusion", "hybrid diffusion", "left-to-right"]
    assert {"diffusion", "naive Bayes, unigrams"} < lines[0]["methods"].keys()
    assert lines[2]["methods"].keys() == {"left-to-right", "Bayes-optimal"}
    assert "| 0.25 | left-to-right |" in capsys.readouterr().out
    assert path.with_suffix(".svg").exists()
    kept = list((tmp_path / "outputs/few_labels").iterdir())
    assert len(kept) == 2 and all(folder.name.startswith("start-") for folder in kept)

    def measured(cell, folder):
        folder.mkdir(parents=True)
        return {**lines[0], **cell}

    monkeypatch.setattr(few_labels, "measured", measured)
    few_labels.main([*words, "8", "all", "--pretrain_steps", "2", "--more", *SMALL, *FEW])
    assert path.read_text().startswith(first)
    assert [json.loads(line)["texts_per_class"] for line in path.read_text().splitlines()[3:]] == ["all"] * 3


def test_intervals_contain_the_spread_over_texts_and_over_seeds():
    lines = [{"noise": 0.0, "texts_per_class": 8, "methods": {"a": {"accuracy": accuracy, "se": 0.01}}}
             for accuracy in (0.7, 0.8)]  # fmt: skip
    mean, half = few_labels.summary(lines)["a", 0.0][8]
    assert mean == pytest.approx(0.75)
    assert half == pytest.approx(1.96 * math.sqrt(0.01**2 + 0.05**2))
    assert few_labels.summary(lines[:1])["a", 0.0][8] == pytest.approx((0.7, 1.96 * 0.01))
