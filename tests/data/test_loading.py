"""The number of workers, and how long training waits for them."""

from __future__ import annotations

import csv
import os
import signal
import time

import pytest
import torch
from datasets.utils import tqdm
from torch.utils.data import TensorDataset

from palimpsest.data import loading
from palimpsest.data.loading import (
    Loading,
    TimedLoader,
    begin_worker,
    check_shared_memory,
    local_ranks,
    workers_for,
)
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.settings.command_line import compose_config
from tests.helpers.commands import TINY


@pytest.mark.parametrize(("cpus", "ranks", "environ", "workers"), [
    (16, 1, {}, 8), (16, 4, {}, 4), (2, 1, {}, 2), (2, 4, {}, 0), (1, 1, {}, 1), (7, 2, {}, 3), (128, 8, {}, 8),
    (16, 8, {"SLURM_CPUS_PER_TASK": "16"}, 8),  # bound to the task: all its own
    (6, 8, {"SLURM_CPUS_PER_TASK": "6"}, 6),
    (64, 8, {"SLURM_CPUS_PER_TASK": "8"}, 8),  # not bound: all tasks see the same 64
    (12, 4, {"SLURM_CPUS_PER_TASK": "3"}, 3),
])  # fmt: skip
def test_every_process_gets_its_share_of_the_cpus(cpus, ranks, environ, workers):
    assert workers_for(cpus, ranks, environ) == workers


@pytest.mark.parametrize(("environ", "devices", "ranks"), [
    ({}, 1, 1), ({}, 4, 4), ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "32"}, 1, 2),
    ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_NTASKS": "64"}, 1, 8), ({"LOCAL_WORLD_SIZE": ""}, 3, 3), ({}, 0, 1),
])  # fmt: skip
def test_the_ranks_that_count_are_those_on_this_machine(environ, devices, ranks):
    assert local_ranks(environ, devices) == ranks


def test_what_null_means(monkeypatch, caplog):
    monkeypatch.setattr(loading, "cpu_count", lambda: 6)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    with caplog.at_level("INFO"):
        assert Loading().workers(streamed=True, devices=2) == 3
    assert "loader.num_workers=null: 3 (6 CPUs for this process, 2 processes" in caplog.text
    assert Loading().workers(streamed=False, devices=1) == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Loading().workers(streamed=False, devices=1) == 2, "a GPU does not wait for each batch"
    assert Loading().workers(streamed=False, devices=6) == 1
    assert Loading(num_workers=5).workers(streamed=True, devices=6) == 5


def test_workers_settings_are_given_only_to_workers(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert Loading(pin_memory=False).arguments(0, again=True) == {"num_workers": 0, "pin_memory": False}
    with_workers = Loading(prefetch_factor=3).arguments(2, again=True)
    assert with_workers == {
        "num_workers": 2,
        "pin_memory": True,
        "prefetch_factor": 3,
        "persistent_workers": True,
        "worker_init_fn": begin_worker,
    }
    assert not Loading().arguments(2, again=False)["persistent_workers"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not Loading().arguments(0, again=True)["pin_memory"]
    for workers in (0, 1):
        list(TimedLoader(TensorDataset(torch.arange(3)), **Loading(pin_memory=False).arguments(workers, again=False)))


class KilledWhileReading(TensorDataset):
    """datasets holds the lock of its progress bars while it reads rows."""

    def __getitem__(self, index):
        tqdm.get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_does_not_stop_the_reading_of_others():
    shared = tqdm.get_lock()
    with pytest.raises(RuntimeError, match="killed by signal|exited unexpectedly"):
        list(TimedLoader(KilledWhileReading(torch.arange(3)), **Loading().arguments(1, again=False)))
    assert tqdm.get_lock() is shared
    for lock in shared.locks:
        assert lock.acquire(timeout=10)
        lock.release()


class Slow(TensorDataset):
    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


def test_waiting_is_counted_and_working_is_not():
    loader = TimedLoader(Slow(torch.arange(5)))
    for _ in loader:
        time.sleep(0.05)
    assert 0.1 <= loader.waited < 0.25


def test_a_run_logs_how_long_it_waited(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [f"data.source.num_{split}_per_class=10" for split in ("train", "validation", "test")]
    settings = [*TINY, *few, "trainer.max_steps=4", "trainer.log_every_n_steps=2", "checkpointing.save_dir=run"]
    fit(Experiment(compose_config(settings), "a test"))
    values = [row.get("train/data_wait_share") for path in (tmp_path / "run").rglob("metrics.csv")
              for row in csv.DictReader(path.open())]  # fmt: skip
    values = [float(value) for value in values if value]
    assert len(values) == 2 and all(0 <= value < 1 for value in values)


def test_too_little_shared_memory_is_refused_before_workers_start(tmp_path, monkeypatch):
    monkeypatch.setattr("palimpsest.data.loading.LEAST_SHARED", 1 << 60)
    with pytest.raises(ValueError, match=r"bytes left.*loader\.num_workers=0.*--shm-size"):
        check_shared_memory(tmp_path)
    check_shared_memory(tmp_path / "absent")
