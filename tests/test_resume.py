"""The engine, by killing it: a run that was killed and started again ends with the weights of one that never was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from palimpsest import main
from palimpsest.models.checkpoints import load_inert
from palimpsest.settings.command_line import compose_config
from tests.test_configs import TINY

ROOT = Path(__file__).parents[1]
RUN = [*TINY, "model.dropout=0.2", "trainer.max_steps=24", "trainer.val_check_interval=10", "loader.batch_size=2",
       "callbacks.checkpoint_every_n_steps.every_n_train_steps=3", "sampling.num_sample_log=0"]  # fmt: skip


def same_weights(a: Path, b: Path) -> bool:
    """Weights, their average, and the optimizer's moments, bit for bit."""
    a, b = load_inert(a), load_inert(b)
    if a["global_step"] != b["global_step"] or a["ema"]["num_updates"] != b["ema"]["num_updates"]:
        return False
    tensors = [[*c["state_dict"].values(), *c["ema"]["shadow_params"], *moments(c)] for c in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


def moments(checkpoint: dict) -> list[torch.Tensor]:
    """Every tensor in the state of the optimizers."""
    states = [state for part in checkpoint["optimizer_states"][0]["parts"] for state in part["state"].values()]
    return [value for state in states for value in state.values() if torch.is_tensor(value)]


def start(folder: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "main.py"), *RUN, f"checkpointing.save_dir={folder}", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder.parent,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "DATA_DIR": ""})  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    process = start(folder)
    assert "resuming" not in process.communicate()[0].decode() and process.returncode == 0
    return folder / "checkpoints" / "last.ckpt"


def test_kill_9_and_start_again_gives_the_weights_of_an_uninterrupted_run(tmp_path, uninterrupted):
    """By the command itself; benchmarks/faults.py, of which tests/test_faults.py runs a little, does it many times."""
    folder = tmp_path / "run"
    last = folder / "checkpoints" / "last.ckpt"
    process = start(folder)
    while process.poll() is None:
        if last.exists() and load_inert(last)["global_step"] >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    assert load_inert(last)["global_step"] < 24, "it was killed too late to test anything"
    process = start(folder)
    said = process.communicate()[0].decode()
    assert process.returncode == 0 and "resuming from" in said
    assert same_weights(last, uninterrupted)


def test_a_finished_run_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [*RUN, "checkpointing.save_dir=run", "trainer.max_steps=4"]
    main.run(compose_config(few), "a test")
    before = load_inert(tmp_path / "run/checkpoints/last.ckpt")["state_dict"]
    monkeypatch.setattr("palimpsest.diffusion.Diffusion.training_step", lambda *_: pytest.fail("it trained again"))
    main.run(compose_config(few), "a test")
    after = load_inert(tmp_path / "run/checkpoints/last.ckpt")["state_dict"]
    assert "complete: " in capsys.readouterr().out
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path, monkeypatch, uninterrupted):
    monkeypatch.chdir(tmp_path)
    main.run(compose_config([*RUN, "checkpointing.save_dir=again"]), "a test")
    assert same_weights(tmp_path / "again/checkpoints/last.ckpt", uninterrupted)
    main.run(compose_config([*RUN, "checkpointing.save_dir=other", "seed=2"]), "a test")
    assert not same_weights(tmp_path / "other/checkpoints/last.ckpt", uninterrupted)


def test_going_on_with_more_steps_equals_having_asked_for_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    constant = [*RUN, "lr_scheduler=constant_warmup", "lr_scheduler.num_warmup_steps=1"]
    main.run(compose_config([*constant, "checkpointing.save_dir=a", "trainer.max_steps=7"]), "a test")
    main.run(compose_config([*constant, "checkpointing.save_dir=a", "trainer.max_steps=12"]), "a test")
    main.run(compose_config([*constant, "checkpointing.save_dir=b", "trainer.max_steps=12"]), "a test")
    assert same_weights(tmp_path / "a/checkpoints/last.ckpt", tmp_path / "b/checkpoints/last.ckpt")


def test_micro_batches_do_not_change_the_run_but_for_rounding(tmp_path, monkeypatch):
    """Noise and order are keyed by place in the stream, so the size of a micro-batch is invisible (without dropout).
    Micro-batches weigh their tokens alike only where they hold equally many, hence the wrapped data."""
    monkeypatch.chdir(tmp_path)
    same = [*RUN, "model.dropout=0", "trainer.max_steps=6", "data.wrap=true", "data.max_train_texts=500", "optim=adamw"]
    for size in (4, 1):
        main.run(compose_config([*same, f"loader.batch_size={size}", f"checkpointing.save_dir=b{size}"]), "a test")
    a, b = (load_inert(tmp_path / f"b{size}/checkpoints/last.ckpt")["state_dict"] for size in (4, 1))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-3, atol=1e-5, msg=name)
