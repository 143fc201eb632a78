"""Resuming: a killed and restarted run ends with the weights of an uninterrupted one."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from palimpsest.diffusion import Diffusion
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


def test_other_texts_in_the_same_files_are_refused_by_a_finished_and_by_an_unfinished_run(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    texts = [f"text number {number}" for number in range(200)]
    Path("texts.txt").write_text("\n".join(texts))
    few = ["data=text", "data.path=texts.txt", "data.tokenizer_name_or_path=byte", "model.length=32", *TINY[2:]]
    few += ["checkpointing.save_dir=run", "sampling.num_sample_log=0", "data.max_train_texts=null"]
    trained(*few, "trainer.max_steps=2")
    trained(*few, "trainer.max_steps=3")  # the same texts
    run(*few, "trainer.max_steps=3", "mode=ppl_eval")
    assert "the texts have changed" not in caplog.text
    Path("texts.txt").write_text("\n".join([*texts, "one more"]))
    run(*few, "trainer.max_steps=3", "mode=ppl_eval")
    assert "the texts have changed" in caplog.text and "Held-out texts may be among those that" in caplog.text
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
    named = f"{'a folder with a long name and blanks ' * 3}/last.ckpt"  # which YAML would fold
    Path(named).parent.mkdir()
    shutil.move("a/checkpoints/last.ckpt", named)
    gentler = [*ask, "optim.lr=1e-5", "optim.weight_decay=0.25", "training.ema=0.5", "checkpointing.save_dir=b"]
    for steps, origin in (4, named), (6, "b/checkpoints/last.ckpt"):
        capsys.readouterr()
        run(*gentler, f"trainer.max_steps={steps}", f"checkpointing.resume_ckpt_path='{named}'")
        assert f"resuming from {origin}" in capsys.readouterr().out
    content = torch.load(tmp_path / "b/checkpoints/last.ckpt", weights_only=False)
    group = content["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["weight_decay"], content["ema"]["decay"]) == (1e-5, 0.25, 0.5)
    assert content["lr_schedulers"][0]["base_lrs"] == pytest.approx([1e-5])


def test_a_training_goes_back_in_its_own_folder_and_is_complete_then(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saving = ["callbacks.checkpoint_every_n_steps.every_n_train_steps=1", "checkpointing.keep_last=2"]
    ask = [*FIT, *saving, "checkpointing.save_dir=a"]
    run(*ask, "trainer.max_steps=4")
    back = ["checkpointing.resume_ckpt_path=a/checkpoints/step-00000003.ckpt", "trainer.max_steps=7"]
    run(*ask, *back)
    assert not (tmp_path / "a/checkpoints/step-00000003.ckpt").exists(), "the oldest are removed, the named one too"
    capsys.readouterr()
    run(*ask, *back)
    assert "complete: a/checkpoints/last.ckpt" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="step-00000003.ckpt: there is no such file"):
        run(*ask, *back, "optim.lr=1e-5")  # not the same command


@pytest.mark.parametrize("change", [
    ["data.tokenizer_name_or_path=char", "data.long_texts=truncate"], ["model.n_heads=4"], ["optim=adamw"],
    ["parameterization=sedd", "time_conditioning=true"], ["training.freeze=[embeddings]"],
], ids=lambda change: change[0])  # fmt: skip
def test_another_network_tokenizer_or_optimizer_does_not_go_on(tmp_path, monkeypatch, change, uninterrupted):
    monkeypatch.chdir(tmp_path)
    kind = {"data.tokenizer_name_or_path": "tokenizer", "optim": r"optim\._target_"}.get(
        change[0].partition("=")[0], change[0].partition("=")[0]
    )
    words = [*RUN, *change, "checkpointing.save_dir=b", f"checkpointing.resume_ckpt_path={uninterrupted}"]
    with pytest.raises(ValueError, match=rf"trained with other settings:(\n.*)*\n  {kind}: there .*"):
        run(*words)


def test_the_next_step_follows_the_typed_schedule(tmp_path, monkeypatch):
    """Also when the file was written at the end of a shorter one, or with a rate of 0."""
    monkeypatch.chdir(tmp_path)
    decay = [*FIT, "optim=adamw", "lr_scheduler=cosine_decay_warmup", "lr_scheduler.num_warmup_steps=1"]
    for folder, lr in ("a", "1e-3"), ("b", "0"):
        run(*decay, f"optim.lr={lr}", "trainer.max_steps=2", f"checkpointing.save_dir={folder}")
        named = f"checkpointing.resume_ckpt_path={folder}/checkpoints/last.ckpt"
        longer = [*decay, "optim.lr=1e-3", "trainer.max_steps=4", f"checkpointing.save_dir={folder}-longer", named]
        with monkeypatch.context() as patch:
            rates = []
            step = Diffusion.training_step

            def watched(self, *args, rates=rates, step=step):
                rates.append(self.optimizers().param_groups[0]["lr"])
                return step(self, *args)

            patch.setattr(Diffusion, "training_step", watched)
            run(*longer)
        assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * k / 3)) / 2 for k in (1, 2)])


def test_a_training_that_patience_ended_is_complete_also_with_a_named_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    still = [*RUN, "data.label=0", "optim.lr=0", "optim.matrix_lr=0", "trainer.val_check_interval=1"]
    run(*still, "trainer.max_steps=1", "checkpointing.save_dir=a")
    ask = [*still, "classify.patience=1", "trainer.max_steps=9", "checkpointing.save_dir=b",
           "checkpointing.resume_ckpt_path=a/label=0/checkpoints/last.ckpt"]  # fmt: skip
    for said in "1 validations were not better", "complete: ":
        capsys.readouterr()
        run(*ask)
        assert said in capsys.readouterr().out


def test_a_share_of_too_few_validation_batches_is_refused_plainly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^lightning.Trainer refuses a setting of trainer: .*limit_val_batches"):
        run(*FIT, "trainer.limit_val_batches=0.01")


def test_what_a_complete_training_had_otherwise_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [*FIT, "checkpointing.save_dir=a", "trainer.max_steps=2"]
    run(*few)
    capsys.readouterr()
    for typed, said in (
        (["trainer.precision=bf16"], "it was trained with trainer.precision="),
        (["trainer.val_check_interval=1"], None),
    ):
        results = run(*few, *typed)
        out = capsys.readouterr().out
        assert "complete: " in out and (said in out if said else "it was trained with" not in out)
    run(*few, "trainer.max_steps=1", "mode=ppl_eval")
    known = json.loads(next(tmp_path.rglob("ppl_eval/validation/results.json")).read_text())["protocol"]
    assert known["steps"] == 2 and results["checkpoint"].name == "last.ckpt"
    cut = [*few, "plateau=cut", "checkpointing.save_dir=b"]
    run(*cut)
    run(*cut, "trainer.val_check_interval=1")
    assert "it was trained with trainer.val_check_interval=2; another" in capsys.readouterr().out


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
