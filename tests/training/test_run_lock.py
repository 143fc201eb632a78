"""Two trainings in one folder take turns; a killed process does not keep the lock."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

from palimpsest.experiment import runs
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.settings.command_line import compose_config
from palimpsest.training.run_lock import FILE, training_lock


@contextmanager
def training_elsewhere(folder, until=lambda: time.sleep(600)):
    """Let another process hold the lock of `folder` until `until` returns."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no test runs on here
        try:
            with training_lock(folder, wait=False):
                os.write(write, b"x")
                until()
        finally:
            os._exit(0)
    os.close(write)
    try:
        assert os.read(read, 1), "the other process ended without the lock"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)


def test_a_second_training_waits_and_names_the_holder(tmp_path, caplog):
    with training_elsewhere(tmp_path / "run", until=lambda: time.sleep(0.3)) as other:
        with training_lock(tmp_path / "run", wait=True, seconds=0.01):
            assert (tmp_path / "run" / FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
        (message,) = caplog.messages
    holder = f"process {other} on {socket.gethostname()}"
    assert f"{tmp_path / 'run'} is being trained by another process ({holder})" in message
    assert str(tmp_path / "run" / FILE) in message


def test_without_waiting_it_is_refused_with_a_remedy(tmp_path):
    with training_elsewhere(tmp_path) as other:
        message = rf"{tmp_path} is being trained .* \(process {other} on .*checkpointing\.save_dir.*delete "
        with pytest.raises(ValueError, match=message), training_lock(tmp_path, wait=False):
            raise AssertionError
        (tmp_path / FILE).unlink()
        with training_lock(tmp_path, wait=False):
            pass


def test_other_folders_and_readers_are_not_blocked(tmp_path):
    with training_elsewhere(tmp_path / "run"), training_lock(tmp_path / "other", wait=False):
        assert (tmp_path / "run" / FILE).read_text().startswith("process")


def test_a_killed_training_releases_the_lock_though_its_workers_live_on(tmp_path):
    workers, pipe = os.pipe()

    def with_a_worker():
        worker = os.fork()
        if worker == 0:
            time.sleep(600)
        os.write(pipe, str(worker).encode())
        time.sleep(600)

    with training_elsewhere(tmp_path, with_a_worker) as other:
        os.close(pipe)
        worker = int(os.read(workers, 20))
        os.kill(other, signal.SIGKILL)
        with training_lock(tmp_path, wait=True, seconds=0.01):
            os.kill(worker, 0)  # it is there
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used(tmp_path, monkeypatch, number):
    def refused(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "lockf", refused)
    with training_lock(tmp_path, wait=False):
        pass


def test_a_folder_that_cannot_be_created_is_no_error_of_the_lock(tmp_path):
    (tmp_path / "file").write_text("")
    with training_lock(tmp_path / "file" / "run", wait=False):
        pass


def test_a_training_finished_by_another_process_while_waiting_is_complete():
    answers = [None, "last.ckpt"]
    found = SimpleNamespace(finished=lambda data, label: answers.pop(0), lock=lambda label: nullcontext())
    experiment = SimpleNamespace(runs=found, build=SimpleNamespace(data=lambda label: None))
    assert fit(experiment) == "last.ckpt"


@pytest.mark.parametrize(("environ", "waits"), [
    ({}, True),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}, True),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}, False),
    ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}, False),
])  # fmt: skip
def test_processes_launched_together_do_not_wait(environ, waits, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(runs, "training_lock", lambda folder, wait: asked.append((folder, wait)) or nullcontext())
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    experiment = Experiment(compose_config([f"checkpointing.save_dir={tmp_path}"]), "a test")
    with experiment.runs.lock(1):
        assert asked == [(tmp_path / "label=1", waits)]
    monkeypatch.setattr(runs, "first_process", lambda: False)
    with experiment.runs.lock():
        assert len(asked) == 1, "only one process of a training takes the lock"
