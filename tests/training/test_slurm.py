"""On a real SLURM: a job that is warned of its time limit saves, is requeued, resumes and finishes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
import torch

from benchmarks.slurm_requeue import compared
from palimpsest import main
from palimpsest.experiment import running
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.checkpoints import read_progress
from palimpsest.settings.command_line import compose_config
from tests.helpers.commands import FEW, ROOT, TINY, wait_for
from tests.helpers.networks import same_weights

SCRIPTS = sorted([*(ROOT / "scripts").rglob("*.sh"), *(ROOT / "scripts").rglob("*.sbatch")])
JOBS = [path for path in SCRIPTS if "#SBATCH" in path.read_text()]
PATIENCE = 600  # seconds per event, on a busy machine


def slurm(*command: object, check: bool = True, cwd: Path = ROOT) -> str:
    """Return the output of a SLURM command, with this interpreter as `python`."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
           "DATA_DIR": "", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, check=check, capture_output=True, text=True, timeout=PATIENCE
    ).stdout


@pytest.fixture
def cluster():
    needed, works = os.environ.get("PALIMPSEST_TEST_SLURM") == "1", False
    if shutil.which("sbatch"):
        works = bool(re.search("idle|mix|alloc", slurm("sinfo", "-h", "-o", "%t", check=False)))
    assert works or not needed, "PALIMPSEST_TEST_SLURM=1 needs a SLURM, and sinfo shows no working node"
    if not works:
        pytest.skip("needs a working SLURM: sinfo, sbatch")


def state(job: str) -> str:
    return slurm("squeue", "-h", "-j", job, "-t", "all", "-o", "%T", check=False).strip()


def wait(happened: object, job: str) -> None:
    wait_for(happened, seconds=PATIENCE, explained=lambda: f"job {job} is {state(job)}: {logs(job)}")


def logs(job: str) -> str:
    return "".join(path.read_text() for path in (ROOT / "watch_folder").glob(f"*_{job}.*"))


def test_a_signalled_job_saves_is_requeued_resumes_and_ends_with_the_same_weights(cluster, tmp_path):
    settings = [*TINY, *FEW, "model.dropout=0.2", "trainer.max_steps=600", "trainer.val_check_interval=400",
                "callbacks.checkpoint_every_n_steps.every_n_train_steps=10", "sampling.num_sample_log=0"]  # fmt: skip
    here = {"--array": "3", "--gres": "none", "--cpus-per-task": "1", "--time": "10"}
    options = [f"{option}={value}" for option, value in here.items()]
    array = slurm(
        "sbatch",
        "--parsable",
        *options,
        ROOT / "scripts/train_seeds_array.sh",
        *settings,
        f"checkpointing.save_dir={tmp_path / 'job'}",
    ).strip()
    job, last = f"{array}_3", tmp_path / "job/checkpoints/last.ckpt"
    try:
        wait(last.exists, job)
        slurm("scancel", "--signal=USR1", job)
        wait(lambda: state(job) == "PENDING", job)
        stopped = read_progress(last).step
        log = logs(job)
        assert stopped < 600 and f"SIGUSR1: step {stopped} is saved" in log and f"{job} is back in the queue" in log
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # otherwise SLURM waits for two minutes
        experiment = Experiment(compose_config([*settings, "seed=3", f"checkpointing.save_dir={tmp_path}"]), "")
        fit(experiment)  # meanwhile, without interruption
        wait(lambda: state(job) in ("COMPLETED", "FAILED", ""), job)
        assert state(job) in ("COMPLETED", ""), logs(job)
        assert "resuming from" in logs(job) and "validation NLL" in logs(job), "the log was overwritten"
        assert same_weights(last, tmp_path / "checkpoints/last.ckpt")
    finally:
        slurm("scancel", array, check=False)
        for path in (ROOT / "watch_folder").glob(f"*_{array}_*"):
            path.unlink()


def test_the_benchmark_of_requeueing_compares_two_trainings(tmp_path, capsys):
    content = {"state_dict": {"w": torch.arange(6.0).reshape(2, 3)}, "ema": {"num_updates": 3}, "callbacks": {},
               "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}], "lr_schedulers": [],
               "global_step": 3, "TextData": {"consumed_samples": 12}}  # fmt: skip
    changed = {"state_dict": {"w": torch.arange(6.0).reshape(2, 3).nextafter(torch.tensor(9.0))}, "global_step": 4}
    torch.save(content, tmp_path / "job.ckpt")
    for key, result in (("", "EQUAL, bit for bit"), ("state_dict", "NOT EQUAL"), ("global_step", "NOT EQUAL")):
        torch.save({**content, **({key: changed[key]} if key else {})}, tmp_path / "undisturbed.ckpt")
        facts = compared(tmp_path / "job.ckpt", tmp_path / "undisturbed.ckpt")
        assert facts["equal"] == (not key) and facts["tensors"] == 2 and facts["numbers"] == 7
        assert f"are {result}" in capsys.readouterr().out


def test_the_processes_of_srun_are_compared_with_those_of_the_training(cluster):
    def two_tasks(devices: int) -> subprocess.CompletedProcess:
        code = f"from palimpsest.training.slurm import check_processes; check_processes({devices}, 1)"
        srun = ["srun", "--ntasks=2", "--ntasks-per-node=2", sys.executable, "-c", code]
        return subprocess.run(srun, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)

    assert two_tasks(2).returncode == 0
    refused = two_tasks(1)
    assert refused.returncode != 0 and "SLURM has 2 tasks on 1 nodes" in refused.stderr
    assert "set trainer.devices=2 trainer.num_nodes=1, or ask SLURM for --nodes=1 --ntasks-per-node=1" in refused.stderr


def test_a_launcher_can_send_the_command_to_another_process(monkeypatch):
    """submitit pickles the function that Hydra calls; if main.py is the program, with everything it refers to."""
    cloudpickle = pytest.importorskip("cloudpickle")
    function = main._hydra_main.__wrapped__
    program = FunctionType(function.__code__, {**vars(main), "__name__": "__main__"}, function.__name__)
    program.__module__ = "__main__"
    done = []
    monkeypatch.setattr(running, "job", done.append)
    cloudpickle.loads(cloudpickle.dumps(program))("the configuration")
    assert done == ["the configuration"]


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_can_be_requeued(path):
    text = path.read_text()
    asked = set(re.findall(r"^#SBATCH (--.*)$", text, re.M))
    assert {"--requeue", "--open-mode=append"} <= asked
    name = "%x_%A_%a" if "--array" in text else "%x_%j"
    assert {f"--output=watch_folder/{name}.out", f"--error=watch_folder/{name}.err"} <= asked
    assert (ROOT / "watch_folder/.gitignore").exists(), "sbatch does not create the folder of the logs"
    assert any(option.startswith("--signal=USR1@") for option in asked) == path.name.startswith("train_")
    launch = text.splitlines()[-1]
    assert "srun" in launch and ("python -u main.py" in launch or "train_imdb_classifier.sh" in launch)
    tasks, devices = re.search(r"--ntasks-per-node=(\d+)", text), re.search(r"trainer\.devices=(\d+)", text)
    assert int(devices[1] if devices else 1) == int(tasks[1] if tasks else 1), "its own check would refuse it"
