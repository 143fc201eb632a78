"""Sweeps: a search by Optuna, and what a sweeper minimises."""

from __future__ import annotations

import pytest

from palimpsest.common.metrics import Estimate
from palimpsest.experiment.running import objective_value
from tests.helpers.commands import FEW, TINY, run_main

OPTUNA = "needs Optuna: pip install hydra-optuna-sweeper==1.3.0"


def test_what_is_minimised():
    assert objective_value({"nll_nats_per_token": Estimate(1.5, 0.1)}) == 1.5
    assert objective_value({"nll_nats_per_token": Estimate(1.5, 0.1), "log_loss_nats": Estimate(0.2, 0.1)}) == 0.2
    assert objective_value({"unigram_entropy": 3.0}) is None


def test_optuna_searches_and_says_how_to_compare(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason=OPTUNA)
    search = ["experiment=optuna_reviews", "hydra.sweeper.n_trials=2", "trainer.val_check_interval=2", "-m"]
    done = run_main(*TINY, *FEW, *search, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Best value" in done.stdout + done.stderr
    assert "compare them: python main.py compare outputs/" in done.stdout
    assert len(list(tmp_path.rglob("report.html"))) == 2
