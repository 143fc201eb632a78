"""palimpsest compare: several runs in one table."""

from __future__ import annotations

import csv
import json

import pytest

from palimpsest.evaluation.comparison import compare, read_runs
from palimpsest.report.comparison import comparison_lines
from palimpsest.scripts.compare import main, say_how
from tests.helpers.commands import FEW, TINY, run

FAST = [*TINY, *FEW, "trainer.max_steps=2", "data.cache_dir=cache", "eval.num_draws=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two likelihoods of the same texts, one of others, and a classification twice."""
    here = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        classify = [
            *FAST,
            "mode=classify",
            "classify.num_draws=4",
            "classify.baselines=false",
            "checkpointing.save_dir=c",
        ]
        run(*classify)
        run(*classify, "classify.split=validation")
        for name, seed, more in (("a", 1, []), ("b", 2, []), ("other", 1, ["eval.split=test"])):
            model = "eval.checkpoint_path=c/label=0/checkpoints/last.ckpt"
            run(*FAST, "mode=ppl_eval", "data.label=0", model, f"seed={seed}", f"checkpointing.save_dir={name}", *more)
    return here


def test_likelihoods_of_the_same_texts_are_paired(runs, monkeypatch):
    monkeypatch.chdir(runs)
    found = compare(read_runs(["a", "b", "other"]))
    assert found.unlike == [[], [], ["split"]]
    paired = found.differences["nll_nats_per_token"]
    assert paired[0] is None and paired[2] is None
    a, b = (one.figures["nll_nats_per_token"] for one in found.runs[:2])
    assert paired[1].value == pytest.approx(b.value - a.value) and paired[1].se > 0


def test_the_command_writes_a_page_and_a_table(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    main(["c", "a", "other"])
    out = capsys.readouterr().out
    assert "accuracy" in out and "NLL, nats/token" in out and "comparison/comparison.html" in out
    assert "nats/token" in (runs / "comparison/comparison.html").read_text()
    with (runs / "comparison/comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 4 and float(rows[0]["accuracy"]) >= 0
    with pytest.raises(SystemExit):
        main(["nowhere"])
    assert "nowhere: there is no results.json" in capsys.readouterr().err


def test_texts_are_compared_by_perplexity_and_entropy_and_a_figure_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [*TINY, *FEW, "mode=sample_eval", "sampling.num_samples=2"]
    run(*TINY, *FEW)
    written = run(*small)
    assert "unigram_entropy_nats" in written
    for name, perplexity in (("a", 20.0), ("b", None)):
        (tmp_path / name).mkdir()
        found = {"generative_perplexity": {"value": perplexity, "se": None}, "exact_match": {"value": 0.5, "se": 0.1}}
        entropy = {"unigram_entropy_nats": {"value": 2.0, "se": 0.5}}
        (tmp_path / name / "results.json").write_text(json.dumps(found | entropy))
    found = compare(read_runs(["a", "b"]))
    assert found.figures == ["generative_perplexity", "unigram_entropy_nats", "exact_match"]
    assert [run.figures.get("generative_perplexity") for run in found.runs][1] is None
    assert "unigram entropy, nats" in comparison_lines(found)


def test_a_sweep_ends_with_the_command(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    for place in (f"{runs}", f"{runs}/${{seed}}", f"{runs}/a${{seed}}", f"{runs / 'none'},{runs}"):
        word = f"checkpointing.save_dir={place}"
        say_how(0.0, ["-m", "seed=1,2", word])
        assert "compare them: python main.py compare" in capsys.readouterr().out, word
    say_how(1e12, [f"output_dir={runs}"])
    assert not capsys.readouterr().out
