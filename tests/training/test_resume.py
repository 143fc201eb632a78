"""Resuming: a killed and restarted run ends with the weights of an uninterrupted one."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from palimpsest.models.checkpoints import load_inert
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from tests.helpers.commands import FIT, RUN, TINY, run, start_main, trained
from tests.helpers.networks import same_weights


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return trained(*RUN, f"checkpointing.save_dir={folder / 'run'}", f"data.cache_dir={folder / 'cache'}")


def test_kill_9_and_start_again_gives_the_weights_of_an_uninterrupted_run(tmp_path, uninterrupted):
    """As a user does it; tests/training/test_faults.py repeats it."""
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
    output = process.communicate()[0].decode()
    assert process.returncode == 0 and "resuming from" in output
    assert same_weights(last, uninterrupted)


def test_a_finished_run_is_not_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [*RUN, "checkpointing.save_dir=run", "trainer.max_steps=4"]
    trained(*few)
    before = load_inert(tmp_path / "run/checkpoints/last.ckpt")["state_dict"]
    monkeypatch.setattr("palimpsest.diffusion.Diffusion.training_step", lambda *_: pytest.fail("it trained again"))
    run(*few)
    after = load_inert(tmp_path / "run/checkpoints/last.ckpt")["state_dict"]
    assert "complete: " in capsys.readouterr().out
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_texts_in_the_same_files_are_refused_by_a_finished_and_by_an_unfinished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"text number {number}" for number in range(200)]
    Path("texts.txt").write_text("\n".join(texts))
    few = ["data=text", "data.path=texts.txt", "data.tokenizer_name_or_path=byte", "model.length=32", *TINY[2:]]
    few += ["checkpointing.save_dir=run", "sampling.num_sample_log=0", "data.max_train_texts=null"]
    trained(*few, "trainer.max_steps=2")
    trained(*few, "trainer.max_steps=3")  # the same texts
    Path("texts.txt").write_text("\n".join([*texts, "one more"]))
    for steps in (3, 4):
        with pytest.raises(ValueError, match="the texts have changed since this training began: 180 texts of"):
            run(*few, f"trainer.max_steps={steps}")


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path, monkeypatch, uninterrupted):
    monkeypatch.chdir(tmp_path)
    assert same_weights(trained(*RUN, "checkpointing.save_dir=again"), uninterrupted)
    assert not same_weights(trained(*RUN, "checkpointing.save_dir=other", "seed=2"), uninterrupted)


def test_resuming_with_more_steps_equals_a_longer_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    constant = [*RUN, "lr_scheduler=constant_warmup", "lr_scheduler.num_warmup_steps=1"]
    trained(*constant, "checkpointing.save_dir=a", "trainer.max_steps=7")
    in_parts = trained(*constant, "checkpointing.save_dir=a", "trainer.max_steps=12")
    assert same_weights(in_parts, trained(*constant, "checkpointing.save_dir=b", "trainer.max_steps=12"))


def test_a_named_checkpoint_goes_on_with_the_typed_rates_and_the_same_command_goes_on_from_there(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    ask = [*FIT, "optim=adamw", "lr_scheduler=constant", "lr_scheduler.num_warmup_steps=0", "trainer.max_steps=2"]
    run(*ask, "optim.lr=1e-3", "training.ema=0.9", "checkpointing.save_dir=a")
    named = "a/checkpoints/last.ckpt"
    gentler = [*ask, "optim.lr=1e-5", "optim.weight_decay=0.25", "training.ema=0.5", "checkpointing.save_dir=b"]
    for steps, origin in (4, named), (6, "b/checkpoints/last.ckpt"):
        capsys.readouterr()
        run(*gentler, f"trainer.max_steps={steps}", f"checkpointing.resume_ckpt_path={named}")
        assert f"resuming from {origin}" in capsys.readouterr().out
    content = torch.load(tmp_path / "b/checkpoints/last.ckpt", weights_only=False)
    group = content["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["weight_decay"], content["ema"]["decay"]) == (1e-5, 0.25, 0.5)
    assert content["lr_schedulers"][0]["base_lrs"] == pytest.approx([1e-5])


def test_a_trial_of_one_batch_leaves_the_run_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*FIT, "checkpointing.save_dir=a")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}
    run(*FIT, "checkpointing.save_dir=a", "trainer.fast_dev_run=true", "trainer.max_steps=9")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert before.items() <= after.items() and (tmp_path / "a/fast_dev_run/results.json").exists()


def test_what_changes_the_weights_names_another_run():
    usual = identity(compose_config([]))
    assert identity(compose_config(["+trainer.gradient_clip_algorithm=value"])) != usual
