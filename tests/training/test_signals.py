"""Signals: a training saves after its optimizer step and exits with the signal's status; all else exits at once.

The next start resumes as if there had been no interruption.
"""

from __future__ import annotations

import fcntl
import functools
import json
import multiprocessing
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch

from palimpsest.corpora import reviews
from palimpsest.diffusion import Diffusion
from palimpsest.evaluation.devices import Mapper
from palimpsest.experiment import running
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.checkpoints import load_inert, read_progress
from palimpsest.settings.command_line import compose_config
from palimpsest.training import signals
from palimpsest.training.signals import SIGNALS, Interrupted, Phase, StopAtSignal
from palimpsest.training.slurm import check_processes, requeue
from tests.helpers.commands import FEW, ROOT, RUN, TINY, start_main, wait_for
from tests.helpers.networks import same_weights

CORPUS = functools.cache(reviews.generate_split)


@pytest.fixture(autouse=True)
def restored_handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    SIGNALS.__init__()


@pytest.fixture(autouse=True)
def one_corpus(monkeypatch):
    """Generate the corpus once, because its generation would dominate these tests."""
    monkeypatch.setattr(reviews, "generate_split", CORPUS)


@pytest.fixture
def requeued(monkeypatch) -> list[str]:
    """The requests to SLURM."""
    asked = []
    monkeypatch.setattr(signals, "requeue", lambda: asked.append("requeue") or "asked")
    return asked


def command(*settings: str) -> None:
    """Run a command as main.py does."""
    with SIGNALS.listening():
        running.run(compose_config(list(settings)), "a test")


def training(*settings: str) -> None:
    """Run only the training of such a command, without measurements and report."""
    with SIGNALS.listening():
        fit(Experiment(compose_config(list(settings)), "a test"))


def signal_in(monkeypatch, number: int, where: type, method: str, batch: int, when: object = lambda: True) -> None:
    """Send `number` while `method` processes `batch`."""
    original = getattr(where, method)

    def interrupted(self, *arguments):
        if arguments[1] == batch and when():
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(where, method, interrupted)


def test_three_interruptions_do_not_change_the_weights(tmp_path, monkeypatch, requeued):
    monkeypatch.chdir(tmp_path)
    training(*RUN, "checkpointing.save_dir=whole")
    last = tmp_path / "parts/checkpoints/last.ckpt"
    # A step is two batches here; batch 19 is the second of step 10, where a validation is due.
    for number, batch, step in [(signal.SIGUSR1, 4, 3), (signal.SIGTERM, 19, 10), (signal.SIGINT, 33, 17)]:
        with monkeypatch.context() as patch:
            signal_in(patch, number, Diffusion, "training_step", batch)
            with pytest.raises(Interrupted) as stop:
                training(*RUN, "checkpointing.save_dir=parts")
        assert stop.value.code == 128 + number
        assert load_inert(last)["global_step"] == step, "the optimizer step is unfinished, or another has begun"
        assert not list(tmp_path.glob("parts/**/*hpc*"))
        if step == 10:
            assert known_best(last) == known_best(last.with_name("best.ckpt")), "the validation at this step is lost"
    assert requeued == ["requeue"], "only SIGUSR1 requeues"
    training(*RUN, "checkpointing.save_dir=parts")
    assert same_weights(last, tmp_path / "whole/checkpoints/last.ckpt")


def known_best(path: Path) -> float:
    """Return the lowest val/nll in a checkpoint."""
    states = load_inert(path)["callbacks"]
    return float(next(state["best_model_score"] for name, state in states.items() if name.startswith("BestCheckpoint")))


def test_a_signal_at_the_last_step_ends_the_command_with_the_model_complete(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [*TINY, "checkpointing.save_dir=run", "trainer.max_steps=3"]
    signal_in(monkeypatch, signal.SIGTERM, Diffusion, "training_step", 2)
    with pytest.raises(Interrupted):
        command(*few)
    assert not (tmp_path / "run/results.json").exists()
    training(*few)
    assert "complete: " in capsys.readouterr().out


def test_a_training_that_is_not_to_be_resumed_is_not_requeued(tmp_path, monkeypatch, requeued, capfd):
    monkeypatch.chdir(tmp_path)
    signal_in(monkeypatch, signal.SIGUSR1, Diffusion, "training_step", 1)
    with pytest.raises(Interrupted):
        command(*TINY, "checkpointing.resume_from_ckpt=false")
    said = capfd.readouterr().err
    assert not requeued and "command without checkpointing.resume_from_ckpt=false resumes there" in said
    assert "not requeued: this start made no optimizer step, or is not to be resumed" in said


def test_during_evaluation_a_signal_ends_the_command_at_once(tmp_path, monkeypatch, requeued):
    monkeypatch.chdir(tmp_path)
    few = [*TINY, "checkpointing.save_dir=run", "loader.eval_batch_size=2"]
    signal_in(monkeypatch, signal.SIGUSR1, Mapper, "test_step", 0)
    with pytest.raises(Interrupted) as stop:
        command(*few)
    assert stop.value.code == 128 + signal.SIGUSR1 and requeued == ["requeue"], (
        "it has trained, so another start gets further"
    )
    with pytest.raises(Interrupted):
        command(*few, "mode=ppl_eval")
    assert requeued == ["requeue"], "it would be requeued forever without progress"
    assert read_progress(tmp_path / "run/checkpoints/last.ckpt").step == 2


def test_a_signal_in_a_class_model_ends_the_command_and_the_next_start_resumes_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    classify = [*TINY, "mode=classify", "checkpointing.save_dir=run", "trainer.max_steps=4", "classify.baselines=false"]
    second = tmp_path / "run/label=1"
    with monkeypatch.context() as patch:
        signal_in(patch, signal.SIGTERM, Diffusion, "training_step", 1, second.exists)
        with pytest.raises(Interrupted):
            command(*classify)
    assert read_progress(second / "checkpoints/last.ckpt").step == 2
    signal_in(monkeypatch, signal.SIGTERM, Mapper, "test_step", 0)
    with pytest.raises(Interrupted):
        command(*classify)
    output = capsys.readouterr().out
    assert "complete: run/label=0" in output and "resuming from run/label=1" in output
    assert read_progress(second / "checkpoints/last.ckpt").step == 4


def in_a_fork(work: object) -> int:
    """Return the exit status of a process that ran `work` (negative: the signal that ended it)."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(300)
    process.kill()
    return process.exitcode


def test_a_second_interrupt_exits_at_once():
    def twice() -> None:
        with SIGNALS.listening():
            SIGNALS.phase = Phase.TRAINING
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)  # ignored, it is exiting already
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(300)

    assert in_a_fork(twice) == -signal.SIGINT


def test_a_warning_after_the_end_does_not_change_the_status():
    def done() -> None:
        with SIGNALS.listening():
            pass
        SIGNALS.finished()
        os.kill(os.getpid(), signal.SIGUSR1)

    assert in_a_fork(done) == 0


def test_data_loading_processes_ignore_signals_except_sigterm():
    def worker() -> None:
        for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(300)

    with SIGNALS.listening():
        SIGNALS.phase = Phase.TRAINING
        assert in_a_fork(worker) == -signal.SIGTERM


def test_an_earlier_handler_is_called_after_the_save(requeued):
    """As that of submitit, which counts its restarts."""
    got = []
    signal.signal(signal.SIGUSR1, lambda number, _: got.append((number, SIGNALS.phase)))
    with pytest.raises(Interrupted), SIGNALS.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert got == [(signal.SIGUSR1, Phase.LEAVING)] and not requeued


class TwoProcesses:
    """A trainer of two processes; the other one makes `rate` steps per second and received the signal `other`."""

    world_size, global_step, val_check_batch, num_val_batches = 2, 0, None, [0]

    def __init__(self) -> None:
        self.other, self.rate, self.asked_at, self.saved_at = 0, 100, [], []
        self.callbacks = []
        self.strategy = SimpleNamespace(
            root_device="cpu", reduce=self.reduce, checkpoint_io=SimpleNamespace(error=None)
        )

    def reduce(self, mine: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        self.asked_at.append(self.global_step)
        return torch.maximum(mine, torch.tensor([self.other, self.rate]))

    def save_checkpoint(self, path: Path, weights_only: bool | None = None) -> None:
        self.saved_at.append(self.global_step)


def test_all_processes_stop_after_the_same_step_and_communicate_once_a_second(monkeypatch):
    monkeypatch.setattr(signals.time, "monotonic", iter(range(10**6)).__next__)  # one step a second here
    trainer, callback = TwoProcesses(), StopAtSignal(Path("checkpoints"))
    callback.on_train_start(trainer, None)
    for batch in range(1000):
        callback.on_train_batch_start(trainer, None, None, batch)
        trainer.global_step += batch % 2  # two micro-batches a step
        trainer.other = signal.SIGTERM if trainer.global_step > 250 else 0
        callback.on_train_batch_end(trainer, None, None, None, batch)
        if trainer.saved_at:
            break
    # First after one step, then every 100 steps, the pace of the faster process.
    assert trainer.asked_at == [1, 101, 201, 301] and trainer.saved_at == [301]
    with pytest.raises(Interrupted) as stop:
        callback.on_train_batch_start(trainer, None, None, 0)
    assert stop.value.code == 128 + signal.SIGTERM


def test_two_processes_of_torchrun_stop_together_though_one_got_the_signal(tmp_path):
    settings = [*TINY, *FEW, "trainer.max_steps=1000000", "trainer.devices=2", "strategy=ddp",
                "checkpointing.save_dir=run", "callbacks.checkpoint_every_n_steps.every_n_train_steps=2"]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "main.py"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*torchrun, *settings],
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DATA_DIR": ""},
        )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    last = tmp_path / "run/checkpoints/last.ckpt"
    wait_for(last.exists, process)
    second = next(
        pid for pid in children.read_text().split() if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(int(second), signal.SIGUSR1)
    assert process.wait(600) != 0, "it claims to be complete"
    output = (tmp_path / "log").read_text()
    saved = load_inert(last)["global_step"]
    assert f"SIGUSR1: step {saved} is saved" in output and "not a SLURM job" in output


LONG = [*TINY, *FEW, "trainer.max_steps=1000000", "callbacks.checkpoint_every_n_steps.every_n_train_steps=2",
        "checkpointing.save_dir=run"]  # fmt: skip


@contextmanager
def started(folder: Path, *before: str, **how: object) -> Iterator[subprocess.Popen]:
    """Start a long training in `folder` as a user does."""
    with start_main(*LONG, cwd=folder, before=before, **how) as process:
        try:
            yield process
        finally:
            process.kill()


def take_terminal() -> None:
    """Make standard input the controlling terminal, and let a hangup end the process, as a login does."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_closed_terminal_ends_a_training_after_a_save_unless_nohup(tmp_path):
    last = tmp_path / "run/checkpoints/last.ckpt"
    step = lambda: last.exists() and load_inert(last)["global_step"]  # noqa: E731
    ours, theirs = pty.openpty()
    on_it = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    with started(tmp_path, preexec_fn=take_terminal, **on_it) as process:
        os.close(theirs)
        reader = threading.Thread(target=read_to_the_end, args=(ours, closed := threading.Event()))
        reader.start()
        try:
            wait_for(step, process)
        finally:
            closed.set()
            reader.join()
            os.close(ours)  # the kernel sends SIGHUP, and further output is an error
        assert process.wait(600) == 128 + signal.SIGHUP
    saved, state = step(), json.loads((tmp_path / "run/run.json").read_text())
    assert state["state"] == "stopped" and state["step"] == saved == state["checkpoint"]["step"]
    with (tmp_path / "log").open("w") as log:
        resumed = started(tmp_path, "nohup", stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        with resumed as process:
            wait_for(lambda: step() > saved, process)
            process.send_signal(signal.SIGHUP)
            hung_up = step()
            wait_for(lambda: step() > hung_up + 4, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(600) == 128 + signal.SIGTERM
    output = (tmp_path / "log").read_text()
    assert "resuming from run/checkpoints/last.ckpt" in output and "SIGHUP" not in output


def read_to_the_end(terminal: int, end: threading.Event) -> None:
    """Read the output as a terminal does, until `end`."""
    while not end.is_set():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)


def test_the_task_of_an_array_is_requeued_and_not_the_array(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not a SLURM job" in requeue({})
    assert "could not be put back" in requeue({"SLURM_JOB_ID": "7"})
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >>{tmp_path}/asked\n")
    scontrol.chmod(0o755)
    assert "back in the queue" in requeue({"SLURM_JOB_ID": "7"})
    requeue({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"})
    assert (tmp_path / "asked").read_text() == "requeue 7\nrequeue 7_3\n"
    scontrol.write_text("#!/bin/sh\necho disabled >&2\nexit 1\n")
    assert "did not put job 7 back into the queue (disabled)" in requeue({"SLURM_JOB_ID": "7"})


STEP = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NNODES": "2", "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "2"}  # fmt: skip
TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


def test_the_requested_number_of_processes_is_accepted():
    check_processes(1, 1, {})
    check_processes(8, 2, {})  # Lightning starts them
    check_processes(2, 2, STEP)
    check_processes(2, 2, {**STEP, **TORCHRUN, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"})
    check_processes(1, 1, {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"})
    check_processes(4, 1, {**STEP, "SLURM_JOB_NAME": "interactive"})
    check_processes(4, 1, {"SLURM_JOB_ID": "1"})  # a batch script that asked for no tasks


@pytest.mark.parametrize(("devices", "nodes", "environ", "message"), [
    (1, 1, STEP, "4 tasks on 2 nodes .*trainer.devices=1 trainer.num_nodes=1.*: set trainer.devices=2 "
                 "trainer.num_nodes=2, or ask SLURM for --nodes=1 --ntasks-per-node=1"),
    (4, 1, {"SLURM_NTASKS": "1"}, "1 tasks on 1 nodes.*--ntasks-per-node=4"),
    (4, 1, STEP, "4 tasks on 2 nodes"),
    (2, 2, {k: v for k, v in STEP.items() if "STEP" not in k}, "only one was started: write srun"),
    (2, 2, {**STEP, "SLURM_NTASKS_PER_NODE": ""}, "--ntasks-per-node=2.*instead of --ntasks"),
    (1, 1, TORCHRUN, "torchrun started 4 processes, 2 on this node, and trainer.devices=1 trainer.num_nodes=1.*"
                     "trainer.devices=2 trainer.num_nodes=2, or torchrun --nproc_per_node=1 --nnodes=1"),
])  # fmt: skip
def test_another_number_of_processes_is_refused_with_the_difference(devices, nodes, environ, message):
    with pytest.raises(ValueError, match=message):
        check_processes(devices, nodes, environ)


def test_lightning_still_has_the_two_methods_that_are_replaced():
    """They are private, so another version of Lightning may rename them and end with status 0 again."""
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert callable(type(trainer._signal_connector).register_signal_handlers)
    assert callable(type(trainer.fit_loop.epoch_loop)._broadcast_sigterm_tensor)
