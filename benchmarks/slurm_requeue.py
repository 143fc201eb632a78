"""Test on a real SLURM that a training requeued at its time limit equals an undisturbed one, bit for bit.

    python benchmarks/slurm_requeue.py --minutes 4 --steps 2500 > benchmarks/results/slurm_requeue.log

It submits scripts/train_seeds_array.sh with a time limit shorter than the training, so the job saves and is requeued
until it is done. Then it runs the same command without SLURM in another folder and compares the two last.ckpt: weights,
their average, the optimizer's moments, schedule, counts, position in the data. It prints the output of SLURM and the
job, the comparison, and one line of JSON. The exit status is 1 if the job was never requeued, failed or differs.

It needs sbatch and CPUs only. The limit must allow for the start of Python, and SLURM warns up to a minute early.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from palimpsest.benchmarks.faults import tensors_and_counts

ROOT = Path(__file__).parents[1]

SEED, WORK = 7, Path("outputs/requeue")
SETTINGS = ["model.hidden_size=16", "model.cond_dim=8", "model.n_blocks=1", "model.n_heads=2", "model.dropout=0.2",
            "loader.global_batch_size=4", "trainer.accelerator=cpu", "data.max_train_texts=200",
            "data.max_valid_texts=50", "sampling.num_sample_log=0"]  # fmt: skip
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "")


def told(*command: str) -> str:
    """Return the output of a command run in the project's folder with this interpreter as `python`."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def state(job: str) -> str:
    """Return the state from squeue; empty for a job that it no longer lists."""
    known = ["squeue", "-h", "-j", job, "-t", "all", "-o", "%T"]
    return subprocess.run(known, capture_output=True, text=True).stdout.strip()


def follow(job: str) -> int:
    """Return how often the job was requeued, after its end; it is restarted at once, without SLURM's two minutes."""
    requeued, before = 0, "PENDING"
    while (now := state(job)) not in ENDED:
        if now == "PENDING" and before != "PENDING":
            requeued += 1
        if now == "PENDING":
            asked = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
            subprocess.run(asked, capture_output=True)  # refused while the job is being removed from its node
        before = now
        time.sleep(1)
    return requeued


def digest(tensors: list[torch.Tensor]) -> str:
    """Return the SHA-256 of all bytes of all tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def compared(ours: Path, theirs: Path) -> dict[str, object]:
    """Compare two checkpoints; print the result and return it as facts."""
    (of_job, rest_of_job), (undisturbed, rest) = tensors_and_counts(ours), tensors_and_counts(theirs)
    facts = {"tensors": len(of_job), "numbers": sum(tensor.numel() for tensor in of_job), "sha256": digest(of_job),
             "sha256_undisturbed": digest(undisturbed), "counts_equal": rest_of_job == rest}  # fmt: skip
    facts["equal"] = facts["sha256"] == facts["sha256_undisturbed"] and facts["counts_equal"]
    print(f"{os.path.relpath(ours, ROOT)}: {facts['tensors']} tensors, {facts['numbers']:,} numbers, {facts['sha256']}")
    print(f"{os.path.relpath(theirs, ROOT)}: {len(undisturbed)} tensors, {facts['sha256_undisturbed']}")
    print(
        "weights, their average, moments, schedule, counts and place in the data are "
        + ("EQUAL, bit for bit" if facts["equal"] else "NOT EQUAL")
    )
    return facts


def what_slurm_wrote(array: str) -> str:
    """Return the lines of SLURM's log about the job, if it is readable."""
    found = re.search(r"SlurmctldLogFile\s*=\s*(\S+)", told("scontrol", "show", "config"))
    log = Path(found[1]) if found else Path()
    if not log.is_file() or not os.access(log, os.R_OK):
        return "(its log cannot be read here)\n"
    lines = [line for line in log.read_text(errors="replace").splitlines() if re.search(rf"JobId={array}(?!\d)", line)]
    return "\n".join(lines) + "\n"


def shown(text: str) -> str:
    """Return the text without the name of this machine."""
    return re.sub(rf"\b{re.escape(socket.gethostname().partition('.')[0])}\b", "node", text)


def run(minutes: int, steps: int) -> dict[str, object]:
    """Run the comparison and print everything but its last line."""
    shutil.rmtree(ROOT / WORK, ignore_errors=True)
    settings = [*SETTINGS, f"trainer.max_steps={steps}"]
    submit = [f"--array={SEED}", "--gres=none", "--cpus-per-task=1", f"--time={minutes}", "--signal=USR1@60",
              "scripts/train_seeds_array.sh", *settings, f"checkpointing.save_dir={WORK / 'job'}"]  # fmt: skip
    began = time.monotonic()
    print(told("sbatch", "--version").strip(), "on the CPU, from the project's folder:\n")
    print(f"$ sbatch {shlex.join(submit)}\n", flush=True)
    array = told("sbatch", "--parsable", *submit).strip()
    requeued = follow(f"{array}_{SEED}")
    print(f"What slurmctld wrote:\n\n{shown(what_slurm_wrote(array))}")
    for path in sorted((ROOT / "watch_folder").glob(f"*_{array}_{SEED}.*"), reverse=True):
        print(f"{path.relative_to(ROOT)}:\n\n{shown(path.read_text())}")
        path.unlink()
    alone = [f"seed={SEED}", "mode=train", *settings, f"checkpointing.save_dir={WORK / 'undisturbed'}"]
    print(f"Afterwards, without SLURM:\n\n$ python main.py {shlex.join(alone)}\n", flush=True)
    print(told("python", "-u", "main.py", *alone))
    last = [ROOT / WORK / name / "checkpoints/last.ckpt" for name in ("job", "undisturbed")]
    facts = compared(*last) if all(path.exists() for path in last) else {"equal": False}
    return {"benchmark": "slurm_requeue", "command": f"python {shlex.join(sys.argv)}", "requeued": requeued, **facts,
            "ok": bool(requeued and facts["equal"]), "seconds": round(time.monotonic() - began, 1),
            "torch": str(torch.__version__), "device": "cpu"}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=int, default=4, help="time limit of each start (4)")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps, more than fit into one start (2500)")
    arguments = parser.parse_args()
    os.environ.pop("DATA_DIR", None)
    if not shutil.which("sbatch"):
        sys.exit("error: there is no sbatch here; this needs a SLURM")
    facts = run(arguments.minutes, arguments.steps)
    print(json.dumps(facts))
    sys.exit(not facts["ok"])
