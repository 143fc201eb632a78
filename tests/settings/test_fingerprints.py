"""Fingerprints survive changes of names and schema, so that old runs are found again and resumed."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil

import pytest
import torch

from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.checkpoints import read_progress
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from tests.helpers.commands import ROOT

# Command -> the first letters of its fingerprint, as they were before there was a package.
GOLDEN = json.loads((ROOT / "tests" / "golden" / "fingerprints.json").read_text())
# What trained tests/golden/before_package/last.ckpt, at the last version whose modules were imported by bare names.
OLD = ["data=reviews", "model=micro", "model.hidden_size=16", "model.cond_dim=8", "model.n_blocks=1", "model.n_heads=2",
       "model.length=64", "loader.global_batch_size=16", "data.source.num_train_per_class=100",
       "data.source.num_validation_per_class=20", "data.source.num_test_per_class=20", "trainer.max_steps=6",
       "trainer.val_check_interval=6", "trainer.accelerator=cpu"]  # fmt: skip


@pytest.mark.parametrize("part", range(6))
def test_every_command_finds_the_runs_of_before(part):
    wrong = {}
    for command, known in list(GOLDEN.items())[part::6]:
        content = json.dumps(identity(compose_config(shlex.split(command))), sort_keys=True)
        found = hashlib.sha256(content.encode()).hexdigest()[:8]
        wrong |= {} if found == known else {command: found}
    assert not wrong


def test_a_run_of_before_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs/reviews/micro-59b2ef83/checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests/golden/before_package/last.ckpt", folder)
    old = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
    assert fit(Experiment(compose_config(OLD), "a test")).name == "last.ckpt"
    assert "complete" in capsys.readouterr().out
    # Longer than before: the schedule has another end, the training is the same one.
    path = fit(Experiment(compose_config([*OLD[:-3], "trainer.max_steps=8", *OLD[-2:]]), "a test"))
    assert "resuming from" in capsys.readouterr().out
    assert read_progress(path).step == 8
    new = torch.load(path, weights_only=False)["state_dict"]
    assert old.keys() == new.keys() and any(not torch.equal(old[name], new[name]) for name in old)


def test_fewer_steps_than_are_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs/reviews/micro-59b2ef83/checkpoints"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests/golden/before_package/last.ckpt", folder)
    fit(Experiment(compose_config([*OLD[:-3], "trainer.max_steps=2", *OLD[-2:]]), "a test"))
    assert "6 steps are complete; 2 were requested" in capsys.readouterr().out
