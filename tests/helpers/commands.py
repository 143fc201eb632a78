"""Commands, as users type them and as main.py runs them, and the settings that make them small."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from palimpsest.experiment import running
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.settings.command_line import compose_config, explain, translate

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
TINY = ["model.hidden_size=16", "model.cond_dim=8", "model.n_blocks=1", "model.n_heads=2", "trainer.max_steps=2",
        "loader.global_batch_size=4", "lr_scheduler.num_warmup_steps=1", "trainer.accelerator=cpu",
        "data.max_train_texts=32", "data.max_valid_texts=8", "data.max_test_texts=8", "eval.num_draws=2",
        "sampling.steps=4", "sampling.num_sample_log=1", "sampling.num_sample_batches=1",
        "classify.num_draws=2"]  # fmt: skip
FEW = [f"data.source.num_{split}_per_class=40" for split in ("train", "validation", "test")]
FIT = [*TINY, *FEW, "model.n_blocks=2", "trainer.max_steps=4", "trainer.val_check_interval=2",
       "trainer.log_every_n_steps=1"]  # fmt: skip
RUN = [*TINY, *FEW, "model.dropout=0.2", "trainer.max_steps=24", "trainer.val_check_interval=10", "loader.batch_size=2",
       "callbacks.checkpoint_every_n_steps.every_n_train_steps=3", "sampling.num_sample_log=0"]  # fmt: skip
FEW_PROBLEMS = [*TINY, "data=gsm8k", "model.length=64", "data.tokenizer_name_or_path=word", "trainer.max_steps=20",
                "sampling.steps=8", "loader.eval_batch_size=8", "optim.lr=1e-3"]  # fmt: skip


def experiment(*arguments: str) -> Experiment:
    """The experiment that these arguments describe."""
    return Experiment(compose_config(list(arguments)), "a test")


def run(*arguments: str) -> dict[str, object]:
    """The results of a command. The settings that make it small are as good as not typed, so not all need be read."""
    typed = [argument for argument in arguments if argument not in (*TINY, *FEW_PROBLEMS)]
    return running.run(compose_config(list(arguments)), "a test", translate(typed))


def trained(*arguments: str) -> Path:
    """The last checkpoint of a training, without the measurements and the report that follow it."""
    return fit(experiment(*arguments))


def refused(said: str, *arguments: str) -> None:
    """Assert that this command ends with an error message that matches `said`."""
    with pytest.raises((ValueError, OSError)) as caught:
        run(*arguments)
    assert re.search(said, explain(caught.value)), explain(caught.value)


def start_main(*arguments: str, cwd: Path, before: tuple[str, ...] = (), **options: object) -> subprocess.Popen:
    """Start main.py in a process of its own, as a user does; `before`: words in front, such as nohup."""
    command = [*before, sys.executable, str(ROOT / "main.py"), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DATA_DIR": ""}
    return subprocess.Popen(command, cwd=cwd, **{"env": env, **options})


def run_main(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run main.py in a process of its own and keep what it says."""
    with start_main(*arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)


@contextmanager
def in_a_process(target: Callable[..., None], *arguments: object) -> Iterator[multiprocessing.Process]:
    """Run a function of a module in a process of its own, which ends with the context.

    It is not forked, because forks share a lock that `datasets` takes to read rows: one that is killed while it holds
    it would stop this process.
    """
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_for(
    happened: Callable[[], object],
    process: subprocess.Popen | None = None,
    seconds: float = 600,
    explained: Callable[[], str] = lambda: "it ended, or took too long",
) -> None:
    """Wait until something has happened, while `process` runs."""
    end = time.monotonic() + seconds
    while not happened():
        assert (process is None or process.poll() is None) and time.monotonic() < end, explained()
        time.sleep(0.1)
