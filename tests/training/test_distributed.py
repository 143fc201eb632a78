"""Two processes over gloo learn and measure the same as one; the death of one ends the other."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.checkpoints import load_inert
from palimpsest.report.training import history
from palimpsest.settings.command_line import compose_config, translate
from palimpsest.training.machine import Machine
from palimpsest.training.processes import FullySharded, ddp, strategy_for
from tests.helpers.commands import FIT, ROOT, run, start_main, wait_for
from tests.helpers.networks import assert_close_weights

# The environment before any test; strategy=ddp in this process leaves its port there and still listens on it.
ENVIRON = dict(os.environ)
# Tolerance of weights; Muon orthogonalises in bfloat16, which amplifies the rounding of another order of sums.
ATOL, ATOL_MUON = 1e-6, 5e-4
SAME = [*FIT, "loader.global_batch_size=8", "data.max_test_texts=9", "data.max_valid_texts=9",
        "lr_scheduler=constant_warmup", "lr_scheduler.num_warmup_steps=1", "data.cache_dir=cache"]  # fmt: skip
CLASSIFY = ["mode=classify", "classify.sharing=conditional", "trainer.max_steps=2", "classify.confidence=0.9",
            "classify.num_draws=6", "classify.baselines=false", "eval.num_draws=2"]  # fmt: skip
TRAIN, SAMPLE = ["optim=adamw"], ["mode=sample_eval", "loader.eval_batch_size=3", "sampling.num_sample_batches=3"]
PERPLEXITY = ["mode=ppl_eval", "eval.split=test", "loader.eval_batch_size=4"]


def save_dir(name: str) -> str:
    return f"checkpointing.save_dir={name}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with trainings and measurements by one process, and the same by two."""
    folder, before = tmp_path_factory.mktemp("runs"), Path.cwd()
    os.chdir(folder)
    try:
        for name, settings in {"adamw": TRAIN, "muon": ["optim=muon"]}.items():
            fit(Experiment(compose_config([*SAME, *settings, save_dir(name)]), "a test"))
        fit(Experiment(compose_config([*SAME, *TRAIN, save_dir("begun"), "trainer.max_steps=2"]), "a test"))
        for more in (PERPLEXITY, SAMPLE):
            run(*SAME, *TRAIN, save_dir("adamw"), *more)
        shutil.copytree("adamw/checkpoints", "measured/checkpoints")
        run(*SAME, *TRAIN, save_dir("classified"), *CLASSIFY)
        shutil.copytree("classified/checkpoints", "classified_by_two/checkpoints")
        jobs = [
            ["fit", save_dir("ddp_adamw"), *TRAIN, "loader.batch_size=2"],
            ["fit", save_dir("fsdp_muon"), "optim=muon", "strategy=fsdp", "training.gradient_checkpointing=true"],
            ["fit", save_dir("begun"), *TRAIN, "strategy=fsdp"],
            ["fit", save_dir("to_be_ended"), *TRAIN, "strategy=fsdp", "trainer.max_steps=2"],
            ["run", save_dir("measured"), *TRAIN, *PERPLEXITY, "strategy=fsdp"],
            ["run", save_dir("measured"), *TRAIN, *SAMPLE],
            ["run", save_dir("classified_by_two"), *TRAIN, *CLASSIFY],
            ["hang", save_dir("hanging"), *TRAIN, "strategy=ddp", "strategy.timeout_minutes=0.15"],
        ]
        lines = [" ".join([kind, name, *SAME, *more]) for kind, name, *more in jobs]
        Path("jobs").write_text("\n".join(lines))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        script = ROOT / "tests/training/two_processes.py"
        done = subprocess.run(
            [*torchrun, script, "jobs"],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert "hang checkpoint" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
        seconds = time.time() - float(Path("hung").read_text())
        end = {"returncode": done.returncode, "stderr": done.stderr, "seconds": seconds}
        Path("end").write_text(json.dumps(end))
        Path("output").write_text(done.stdout)
        fit(Experiment(compose_config([*SAME, *TRAIN, save_dir("to_be_ended"), "loader.batch_size=4"]), "a test"))
    finally:
        os.chdir(before)
    return folder


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(("one", "two", "atol"), [
    ("adamw", "ddp_adamw", ATOL), ("muon", "fsdp_muon", ATOL_MUON), ("adamw", "begun", ATOL),
    ("adamw", "to_be_ended", ATOL),
], ids=["ddp", "fsdp, muon, recomputing", "one process, then fsdp", "fsdp, then one process"])  # fmt: skip
def test_two_processes_learn_the_same_as_one(runs, one, two, atol):
    """Weights, averages and the layout of the file; validation, and the loss of every step."""
    assert_close_weights(last(runs / one), last(runs / two), atol)
    a, b = load_inert(last(runs / one)), load_inert(last(runs / two))
    assert shapes(a["optimizer_states"]) == shapes(b["optimizer_states"]) and a["lr_schedulers"] == b["lr_schedulers"]
    ours, theirs = history(runs / one), history(runs / two)
    for name in ("train/nll", "val/nll", "val/nll_se", "train/batch_samples"):
        assert theirs[name] == pytest.approx(ours[name], rel=100 * atol), name


def shapes(state: object) -> object:
    """Return a state with every tensor replaced by its shape."""
    if torch.is_tensor(state):
        return (type(state), tuple(state.shape))
    if isinstance(state, dict):
        return {key: shapes(value) for key, value in state.items()}
    return [shapes(value) for value in state] if isinstance(state, list | tuple) else state


@pytest.mark.parametrize(("one", "two"), [
    ("adamw/ppl_eval/test", "measured/ppl_eval/test"), ("adamw/sample_eval", "measured/sample_eval"),
    ("classified/classify/test", "classified_by_two/classify/test"),
])  # fmt: skip
def test_two_processes_measure_every_text_once(runs, one, two):
    ours, theirs = (flat(json.loads((runs / folder / "results.json").read_text())) for folder in (one, two))
    assert ours.keys() == theirs.keys() and any(key.endswith("/texts") or key == "/samples" for key in ours)
    for key in (key for key in ours if key != "/seconds_per_text" and not key.startswith("/models/")):
        assert theirs[key] == (pytest.approx(ours[key], rel=1e-5) if isinstance(ours[key], float) else ours[key]), key


def flat(node: object, prefix: str = "") -> dict[str, object]:
    """Return the leaves of a tree by their path."""
    if isinstance(node, dict | list):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        return {path: leaf for key, child in pairs for path, leaf in flat(child, f"{prefix}/{key}").items()}
    return {prefix: node}


def test_two_processes_sample_the_texts_of_one(runs):
    files = [(runs / folder / "sample_eval/samples.jsonl").read_text() for folder in ("adamw", "measured")]
    assert files[0] == files[1] and files[0].count("\n") == 9


def test_only_the_first_process_prints_and_writes(runs):
    output = (runs / "output").read_text()
    assert output.count("= 2 process(es) x 2 micro-batch(es) x 2\n") == 1 and output.count("perplexity 2") == 1
    assert sorted(path.name for path in (runs / "ddp_adamw/csv").iterdir()) == ["version_0"]
    with open(runs / "ddp_adamw/csv/version_0/metrics.csv") as file:
        logged = [row["step"] for row in csv.DictReader(file) if row["train/nll"]]
    assert logged == ["0", "1", "2", "3"]
    assert not [path for path in runs.rglob("*") if "partial" in path.name or path.suffix == ".tmp"]


def test_a_process_that_hangs_ends_the_job_within_the_timeout(runs):
    """The second process never reaches the second step; the timeout is 9 seconds."""
    end = json.loads((runs / "end").read_text())
    assert end["returncode"] != 0 and "9000ms" in end["stderr"], end["stderr"][-3000:]
    assert end["seconds"] < 90, "the default is half an hour"


def test_a_process_that_dies_ends_the_job(tmp_path):
    """Started by Lightning, as `python main.py trainer.devices=2` is."""
    settings = [*SAME, save_dir("run"), "trainer.max_steps=100000", "trainer.devices=2",
                "trainer.val_check_interval=100000"]  # fmt: skip
    with open(tmp_path / "output", "w") as output:
        job = start_main(
            *settings,
            cwd=tmp_path,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**ENVIRON, "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(lambda: "each optimizer step" in (tmp_path / "output").read_text() or job.poll() is not None)
        (other,) = children(job.pid)
        os.kill(other, signal.SIGKILL)
        assert job.wait(timeout=60) != 0
    finally:
        os.killpg(job.pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    stats = {
        path.parent.name: path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")
    }
    return [int(child) for child, stat in stats.items() if int(stat[1]) == pid]


# -------------------------------------------------------------------------------- launched processes


def test_the_launched_processes_are_used(monkeypatch):
    def devices(typed: int | str, gpus: int) -> int:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        return Machine("auto", typed, 1, None, None, None, None, 512, 512, None).devices

    assert devices("auto", 3) == 3 and devices(2, 8) == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert devices("auto", 1) == 4 and devices(4, 1) == 4
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, value in {"NTASKS": "6", "NTASKS_PER_NODE": "2", "NNODES": "3", "JOB_NAME": "train"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert devices("auto", 8) == 2


def test_strategies(monkeypatch):
    assert strategy_for("auto", 1, True) == "auto" and type(strategy_for("auto", 2, True)) is type(ddp())
    sharded = FullySharded(timeout_minutes=2)
    assert strategy_for(sharded, 2, True) is sharded
    measuring = strategy_for(sharded, 2, False)
    assert type(measuring) is type(ddp()) and measuring._timeout.total_seconds() == 120
    assert ddp()._timeout.total_seconds() == FullySharded()._timeout.total_seconds() == 1800
    kwargs = ddp()._ddp_kwargs
    assert kwargs["gradient_as_bucket_view"] and not kwargs["broadcast_buffers"]
    assert not kwargs["find_unused_parameters"]
    assert ddp(10080)._timeout.days == 7


def test_arguments_that_lightning_passes_to_its_processes_are_not_the_users():
    user = ["hydra.run.dir=runs/a", "seed=2"]
    assert translate(user) == ["checkpointing.save_dir=runs/a", "seed=2"]
    assert (
        translate(["seed=2", "hydra.run.dir=outputs", "hydra.job.name=train_ddp_process_1"])[1]
        == "hydra.run.dir=outputs"
    )
