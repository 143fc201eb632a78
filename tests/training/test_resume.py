"""The engine, by killing it: a run that was killed and started again ends with the weights of one that never was."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from palimpsest.models.checkpoints import load_inert
from tests.helpers.commands import RUN, run, start_main, trained
from tests.helpers.networks import same_weights


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return trained(*RUN, f"checkpointing.save_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}")


def test_kill_9_and_start_again_gives_the_weights_of_an_uninterrupted_run(tmp_path, uninterrupted):
    """By the command itself; tests/training/test_faults.py does it several times."""
    folder = tmp_path / "run"
    last = folder / "checkpoints" / "last.ckpt"
    process = start_main(*RUN, f"checkpointing.save_dir={folder}", cwd=tmp_path, stdout=subprocess.PIPE)
    while process.poll() is None:
        if last.exists() and load_inert(last)["global_step"] >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    assert load_inert(last)["global_step"] < 24, "it was killed too late to test anything"
    process = start_main(*RUN, f"checkpointing.save_dir={folder}", cwd=tmp_path, stdout=subprocess.PIPE)
    said = process.communicate()[0].decode()
    assert process.returncode == 0 and "resuming from" in said
    assert same_weights(last, uninterrupted)


def test_a_finished_run_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [*RUN, "checkpointing.save_dir=run", "trainer.max_steps=4"]
    trained(*few)
    before = load_inert(tmp_path / "run/checkpoints/last.ckpt")["state_dict"]
    monkeypatch.setattr("palimpsest.diffusion.Diffusion.training_step", lambda *_: pytest.fail("it trained again"))
    run(*few)
    after = load_inert(tmp_path / "run/checkpoints/last.ckpt")["state_dict"]
    assert "complete: " in capsys.readouterr().out
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path, monkeypatch, uninterrupted):
    monkeypatch.chdir(tmp_path)
    assert same_weights(trained(*RUN, "checkpointing.save_dir=again"), uninterrupted)
    assert not same_weights(trained(*RUN, "checkpointing.save_dir=other", "seed=2"), uninterrupted)


def test_going_on_with_more_steps_equals_having_asked_for_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    constant = [*RUN, "lr_scheduler=constant_warmup", "lr_scheduler.num_warmup_steps=1"]
    trained(*constant, "checkpointing.save_dir=a", "trainer.max_steps=7")
    in_parts = trained(*constant, "checkpointing.save_dir=a", "trainer.max_steps=12")
    assert same_weights(in_parts, trained(*constant, "checkpointing.save_dir=b", "trainer.max_steps=12"))


def test_micro_batches_do_not_change_the_run_but_for_rounding(tmp_path, monkeypatch):
    """Noise and order are keyed by place in the stream, so the size of a micro-batch is invisible (without dropout).
    Micro-batches weigh their tokens alike only where they hold equally many, hence the wrapped data."""
    monkeypatch.chdir(tmp_path)
    same = [*RUN, "model.dropout=0", "trainer.max_steps=6", "data.wrap=true", "data.max_train_texts=500", "optim=adamw"]
    cut = (trained(*same, f"loader.batch_size={size}", f"checkpointing.save_dir=b{size}") for size in (4, 1))
    a, b = (load_inert(path)["state_dict"] for path in cut)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-3, atol=1e-5, msg=name)
