"""A time limit on a real SLURM: is the training that went back into the queue the one that was left alone, bit for bit?

    python benchmarks/slurm_requeue.py --minutes 4 --steps 2500 > benchmarks/results/slurm_requeue.log

Submits scripts/train_seeds_array.sh with a time limit that is shorter than the training, so that SLURM warns it, it
saves and goes back into the queue, as often as it takes; then runs the same command without SLURM, undisturbed, into
another folder, and compares the two last.ckpt: weights, their average, the optimizer's moments, schedule, counts, place
in the data. Prints what SLURM and the job wrote, the comparison, and one line of JSON; exit status 1 if the job was
never requeued, did not finish or ended with anything else than the undisturbed training.

To be run where sbatch is, CPU only. Its limit needs room for the start of python, and SLURM warns up to a minute early.
"""

from __future__ import annotations

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

from benchmarks.faults import tensors_and_counts

ROOT = Path(__file__).parents[1]

SEED, WORK = 7, Path("outputs/requeue")
SETTINGS = ["model.hidden_size=16", "model.cond_dim=8", "model.n_blocks=1", "model.n_heads=2", "model.dropout=0.2",
            "loader.global_batch_size=4", "trainer.accelerator=cpu", "data.max_train_texts=200",
            "data.max_valid_texts=50", "sampling.num_sample_log=0"]  # fmt: skip
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "")


def told(*command: str) -> str:
    """What a command says, run from the project's folder; `python` is the one that runs this."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout


def state(job: str) -> str:
    """As squeue has it; nothing for a job that it has forgotten."""
    known = ["squeue", "-h", "-j", job, "-t", "all", "-o", "%T"]
    return subprocess.run(known, capture_output=True, text=True).stdout.strip()


def follow(job: str) -> int:
    """How often the job went back into the queue, once it has ended. There it is started at once, not after SLURM's two
    minutes."""
    requeued, before = 0, "PENDING"
    while (now := state(job)) not in ENDED:
        if now == "PENDING" and before != "PENDING":
            requeued += 1
        if now == "PENDING":
            asked = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
            subprocess.run(asked, capture_output=True)  # refused while the job is being taken from its node
        before = now
        time.sleep(1)
    return requeued


def digest(tensors: list[torch.Tensor]) -> str:
    """SHA-256 of all bytes of all tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def compared(ours: Path, theirs: Path) -> dict[str, object]:
    """Two checkpoints, said in words and returned as facts."""
    (of_job, rest_of_job), (undisturbed, rest) = tensors_and_counts(ours), tensors_and_counts(theirs)
    facts = {"tensors": len(of_job), "numbers": sum(tensor.numel() for tensor in of_job), "sha256": digest(of_job),
             "sha256_undisturbed": digest(undisturbed), "counts_equal": rest_of_job == rest}  # fmt: skip
    facts["equal"] = facts["sha256"] == facts["sha256_undisturbed"] and facts["counts_equal"]
    print(f"{os.path.relpath(ours, ROOT)}: {facts['tensors']} tensors, {facts['numbers']:,} numbers, {facts['sha256']}")
    print(f"{os.path.relpath(theirs, ROOT)}: {len(undisturbed)} tensors, {facts['sha256_undisturbed']}")
    print("weights, their average, moments, schedule, counts and place in the data are "
          + ("EQUAL, bit for bit" if facts["equal"] else "NOT EQUAL"))  # fmt: skip
    return facts


def what_slurm_wrote(array: str) -> str:
    """The lines of its own log about the job, where that may be read."""
    found = re.search(r"SlurmctldLogFile\s*=\s*(\S+)", told("scontrol", "show", "config"))
    log = Path(found[1]) if found else Path()
    if not log.is_file() or not os.access(log, os.R_OK):
        return "(its log can not be read here)\n"
    lines = [line for line in log.read_text(errors="replace").splitlines() if re.search(rf"JobId={array}(?!\d)", line)]
    return "\n".join(lines) + "\n"


def shown(text: str) -> str:
    """Without the name of this machine."""
    return re.sub(rf"\b{re.escape(socket.gethostname().partition('.')[0])}\b", "node", text)


def run(minutes: int, steps: int) -> dict[str, object]:
    """The whole comparison; everything but its last line is printed on the way."""
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
