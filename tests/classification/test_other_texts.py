"""Detection of texts from elsewhere: planted likelihoods, and files of other texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palimpsest.classification.other_texts import SPLIT, detect, with_other_texts
from palimpsest.classification.scoring import ClassScores
from palimpsest.classification.typical import nats_per_token
from tests.helpers.commands import FEW, TINY, experiment
from tests.helpers.networks import EVEN


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def scores_of(nats_per_token_M: np.ndarray, margin_M: np.ndarray) -> ClassScores:
    """Scores of texts of ten tokens with this likelihood under the first class, and this much less under the second."""
    number = len(nats_per_token_M)
    nats_MC = np.stack([10 * nats_per_token_M, 10 * nats_per_token_M + margin_M], axis=1)
    ids_M = np.arange(number)
    return ClassScores(ids_M, 0 * ids_M, nats_MC[:, :, None], np.full((number, 1), 0.5), 1, np.full(number, 10.0),
                       ids_M, 0.0, "", "", False)  # fmt: skip


def test_unlikely_and_too_simple_texts_are_told_apart_each_in_its_way():
    rng = np.random.default_rng(0)
    own, validation = (scores_of(rng.normal(3, 0.1, 400), rng.exponential(9, 400)) for _ in range(2))
    unlikely, simple, same = (
        detect(own, scores_of(rng.normal(middle, 0.1, 300), rng.exponential(9, 300)), validation, EVEN)
        for middle in (3.3, 2.7, 3.0)
    )
    separation = 0.983  # of normal distributions that are three standard deviations apart
    assert unlikely.by_likelihood.value == pytest.approx(separation, abs=0.01)
    assert simple.by_likelihood.value == pytest.approx(1 - separation, abs=0.01), "simple texts fool p(text)"
    assert min(unlikely.by_typicality.value, simple.by_typicality.value) > 0.9
    for one in (same.by_likelihood, same.by_typicality, unlikely.by_posterior, simple.by_posterior):
        assert abs(one.value - 0.5) < 4 * one.se
    assert unlikely.typical == np.median(nats_per_token(validation, EVEN)) and len(unlikely.other_M) == 300
    torn = detect(own, replace(own, nats_MCP=own.nats_MCP[:, :1].repeat(2, 1)), validation, EVEN)
    assert torn.by_posterior.value == 1, "a posterior of one half is the least certain"


def test_files_of_other_texts_become_a_split():
    data = experiment(*TINY, *FEW).build.data()
    pq.write_table(pa.table({"text": [f"The film number {i}" for i in range(20)]}), "other.parquet")
    Path("few.txt").write_text("One text.\nAnother text.\n")
    many, again = (with_other_texts(data, "other.parquet", "test") for _ in range(2))
    assert len(many.split(SPLIT)) == len(data.split("test")) == 8, "as many as the split has"
    rows = zip(many.split(SPLIT)["input_ids"][:], again.split(SPLIT)["input_ids"][:], strict=True)
    assert all(np.array_equal(a, b) for a, b in rows), "always the same choice"
    assert len(with_other_texts(data, "few.txt", "test").split(SPLIT)) == 2
    Path("long.txt").write_text("One text.\n" + "Another text. " * 200 + "\n")
    long = with_other_texts(data, "long.txt", "test").split(SPLIT)["length"][:]
    assert data.packing("test").long_texts == "error" and max(long) == data.length, "cut, as nobody could lengthen it"


@pytest.mark.parametrize(
    ("path", "split", "error", "message"),
    [
        ("nowhere.txt", "test", FileNotFoundError, "classify.other_texts=nowhere.txt"),
        ("few.txt", "validation", ValueError, "classify.split=validation"),
        ("empty.txt", "test", ValueError, "classify.other_texts=empty.txt holds no text"),
        ("few.txt", "test", ValueError, "classify.other_texts=few.txt holds one text"),
        ("columns.csv", "test", ValueError, "classify.other_texts=columns.csv"),
    ],
)
def test_files_that_cannot_be_compared_with_are_refused(path, split, error, message):
    Path("few.txt").write_text("One text.\n")
    Path("empty.txt").write_text("\n")
    Path("columns.csv").write_text("words,label\na,1\n")
    with pytest.raises(error, match=message):
        with_other_texts(experiment(*TINY, *FEW).build.data(), path, split)
