"""Test that a training that is killed, whose files are damaged or whose disk is full, ends with the same weights.

    python benchmarks/faults.py --kills 60 --damages 24 --disks 4

A small model (dropout, micro-batches, validations, patience) saves every one to three steps. Each training is restarted
by the same call until it is complete. After each fault all checkpoints must be intact, milestones must exist, and
last.ckpt must exist and not be older than before. At the end weights, average, optimizer, schedule, callback counts and
best weights must equal those of the undisturbed training, bit for bit.

kills: SIGKILL, SIGTERM, SIGUSR1 at random moments, and SIGKILL before or after a random operation of a save (fsync,
rename, link, removal). damages: a flipped byte, a truncation, an empty file, in a random checkpoint.
disks: a small tmpfs that is full for a while, for good, or too small for all files (needs the right to mount).
One process imports torch and forks every training. The last line is JSON; the exit status is 1 after any failure.
"""

import argparse
import json
import os
import random
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from palimpsest.common.files import SealingStream, check_seal
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.checkpoints import load_inert, read_progress
from palimpsest.settings.command_line import compose_config
from palimpsest.training.callbacks.best import LastCheckpoint

STEPS, KEEP, MILESTONE = 24, 2, 7
OVERRIDES = ["model.hidden_size=16", "model.cond_dim=8", "model.n_blocks=1", "model.n_heads=2", "model.dropout=0.2",
             "loader.global_batch_size=4", "loader.batch_size=2", "lr_scheduler.num_warmup_steps=3",
             "trainer.accelerator=cpu", "data.max_train_texts=32", "data.max_valid_texts=8", "data.label=0",
             "data.source.num_train_per_class=64", "data.source.num_validation_per_class=16",
             "classify.patience=50", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=10",
             f"checkpointing.keep_last={KEEP}", f"checkpointing.milestone_every={MILESTONE}"]  # fmt: skip
OPERATIONS = 9  # of a save, among which a kill is placed; a number beyond the last is no kill


@dataclass
class Campaign:
    """Counts and failures of the campaign."""

    folder: Path
    chance: random.Random
    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def expect(self, true: bool, what: str) -> None:
        if not true:
            self.faults.append(what)
            print(f"FAULT: {what}", file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------- trainings in their own processes


@dataclass
class Training:
    """A training in its own process."""

    pid: int
    log: Path
    pipe: int

    def wait_for_start(self, timeout: float = 120.0) -> None:
        select.select([self.pipe], [], [], timeout)  # or the end of the process

    def wait(self, timeout: float = 120.0) -> int:
        """Return the exit status (negative: the signal that ended it), after a kill at `timeout` seconds."""
        until = time.monotonic() + timeout
        while time.monotonic() < until:
            if (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
                return self._close(ended[1])
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        return self._close(os.waitpid(self.pid, 0)[1])

    def _close(self, status: int) -> int:
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(status)


def start(folder: Path, every: int, *more: str, prepare: Callable[[], None] = lambda: None) -> Training:
    """Fork a training in `folder` that saves every `every` steps and calls `prepare` before its first step."""
    cfg = compose_config([*OVERRIDES, f"checkpointing.save_dir={folder}", f"data.cache_dir={folder.parent / 'cache'}",
                          f"callbacks.checkpoint_every_n_steps.every_n_train_steps={every}", *more])  # fmt: skip
    folder.mkdir(exist_ok=True)
    log, (reading, writing) = folder / "log.txt", os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return Training(pid, log, reading)
    status = 1
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        real = LastCheckpoint.on_train_start

        def said(self: LastCheckpoint, *args: object) -> None:
            real(self, *args)
            os.write(writing, b"x")
            prepare()

        LastCheckpoint.on_train_start = said
        fit(Experiment(cfg, "faults"), 0)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def killed_in_a_save(operation: int, after: bool) -> None:
    """Make this process kill itself before (or `after`) the given operation of its saves."""
    count = 0

    def fatal(real: Callable) -> Callable:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == operation and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if count == operation and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for owner, name in ((os, "fsync"), (os, "replace"), (os, "link"), (Path, "unlink"), (SealingStream, "close")):
        setattr(owner, name, fatal(getattr(owner, name)))


# -------------------------------------------------------------------------------- checks


def inspect(campaign: Campaign, folder: Path, reached: int, milestones: bool = True) -> int:
    """Check that all files are intact and last.ckpt is not below `reached`; return its step."""
    kept = folder / "checkpoints"
    for path in kept.glob("*.ckpt"):
        try:
            campaign.expect(check_seal(path) and isinstance(load_inert(path), dict), f"{path} has no seal")
        except ValueError as error:
            campaign.expect(False, f"half-written: {error}")
    last = kept / "last.ckpt"
    step = read_progress(last).step if last.exists() else 0
    campaign.expect(step >= reached, f"{last} went back from step {reached} to {step}")
    steps = sorted(int(path.stem.removeprefix("step-")) for path in kept.glob("step-*.ckpt"))
    campaign.expect(len(steps) <= KEEP + 1, f"{kept} keeps {steps}")
    for milestone in range(MILESTONE, step + 1, MILESTONE) if milestones else ():
        there = any(kept.glob(f"milestone-{milestone:08d}.ckpt*"))  # or a damaged one that was renamed
        campaign.expect(there, f"{kept}: no milestone of {milestone}")
    return step


def tensors_and_counts(path: Path) -> tuple[list[torch.Tensor], str]:
    """Return all tensors of a checkpoint in a fixed order, and its other content to compare."""
    content, tensors, rest = load_inert(path), [], []

    def visit(name: str, node: object) -> None:
        if torch.is_tensor(node):
            tensors.append(node)
        elif isinstance(node, dict):
            for key in sorted(node, key=str):
                visit(f"{name}.{key}", node[key])
        elif isinstance(node, list | tuple):
            for i, part in enumerate(node):
                visit(f"{name}.{i}", part)
        elif "path" not in name and "best_k_models" not in name:
            rest.append(f"{name}={node}")

    callbacks = {key: {k: v for k, v in state.items() if k in ("wait_count", "best_score", "best_model_score")}
                 for key, state in content["callbacks"].items()}  # fmt: skip
    for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "global_step", "TextData"):
        visit(key, content[key])
    visit("callbacks", callbacks)
    return tensors, "\n".join(rest)


def same(a: Path, b: Path) -> bool:
    """Return True if two checkpoints are the same training, bit for bit."""
    (x, of_x), (y, of_y) = tensors_and_counts(a), tensors_and_counts(b)
    return of_x == of_y and len(x) == len(y) and all(map(torch.equal, x, y))


def complete(campaign: Campaign, folder: Path, whole: Path, status: int) -> None:
    """Check that a finished training has the results of the undisturbed one."""
    campaign.counts["trainings"] += 1
    campaign.expect(status == 0, f"{folder} ended with status {status}: see log.txt there")
    reached = inspect(campaign, folder / "label=0", 0, milestones="disk" not in folder.name)
    campaign.expect(reached == STEPS, f"{folder} reached step {reached}")
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (place / "label=0" / "checkpoints" / name for place in (folder, whole))
        identical = ours.exists() and same(ours, theirs)
        campaign.expect(identical, f"{ours} is not that of the undisturbed training")
        campaign.counts["identical"] += identical
    partial = list((folder / "label=0" / "checkpoints").glob("*.partial"))
    campaign.expect(not partial, f"left behind: {partial}")


# -------------------------------------------------------------------------------- the faults


def kill_once(campaign: Campaign, folder: Path, every: int, seconds: float) -> int | None:
    """Start or resume a training and kill it; return its exit status if it finished first."""
    chance, kind = campaign.chance, campaign.chance.choice(["SIGKILL", "in a save", "SIGTERM", "SIGUSR1", "in a save"])
    if kind == "in a save":
        operation, after = chance.randint(1, OPERATIONS * 6), chance.random() < 0.5
        training = start(folder, every, prepare=lambda: killed_in_a_save(operation, after))
        status = training.wait()
        kind = "SIGKILL in a save"
    else:
        training = start(folder, every)
        if chance.random() < 0.9:
            training.wait_for_start()
        time.sleep(chance.random() * seconds)
        partial = any((folder / "label=0" / "checkpoints").glob("*.partial"))
        os.kill(training.pid, getattr(signal, kind))
        status = training.wait()
        campaign.counts["seen half-written"] += partial and status != 0
    if status == 0 and read_progress(folder / "label=0/checkpoints/last.ckpt").step == STEPS:
        return status
    campaign.counts[kind] += 1
    campaign.counts["kills"] += 1
    return None


def kills(campaign: Campaign, whole: Path, number: int, seconds: float) -> None:
    """Kill and restart trainings until they are complete, with `number` kills in all."""
    while campaign.counts["kills"] < number:
        folder = campaign.folder / f"kills-{campaign.counts['trainings']}"
        every = campaign.chance.randint(1, 3)
        reached = 0
        status = None
        while status is None and campaign.counts["kills"] < number:
            status = kill_once(campaign, folder, every, seconds)
            reached = inspect(campaign, folder / "label=0", reached)
        complete(campaign, folder, whole, start(folder, every).wait() if status is None else status)
        shutil.rmtree(folder)


def damage(campaign: Campaign, path: Path) -> str:
    """Flip a byte of a file, truncate it, or empty it, in place, so under all its names."""
    content, chance = bytearray(path.read_bytes()), campaign.chance
    kind = chance.choice(["flipped byte", "flipped byte", "truncation", "empty file"])
    if kind == "flipped byte":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    else:
        del content[0 if kind == "empty file" else chance.randrange(len(content)) :]
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    campaign.counts[kind] += 1
    return kind


def damages(campaign: Campaign, whole: Path, number: int) -> None:
    """Kill trainings, damage some of their checkpoints, and resume them."""
    for trial in range(number):
        folder, kept = campaign.folder / f"damage-{trial}", campaign.folder / f"damage-{trial}/label=0/checkpoints"
        step = campaign.chance.randint(4, STEPS - 1)
        start(folder, 1, prepare=lambda step=step: killed_in_a_save(OPERATIONS * step, True)).wait()
        reached = inspect(campaign, folder / "label=0", 0)
        # last.ckpt, and another one if a third remains to resume from.
        others = sorted(path for path in kept.glob("*.ckpt") if path.stat().st_nlink == 1)
        chosen = {kept / "last.ckpt", *([campaign.chance.choice(others)] if len(others) > 1 else [])}
        told = [(path, damage(campaign, path)) for path in chosen if path.exists()]
        complete(campaign, folder, whole, start(folder, 1).wait())
        aside = {path.name for path in kept.glob("*.corrupt*")}
        for path, kind in told:
            if path.name in ("last.ckpt", "best.ckpt"):
                campaign.expect(f"{path.name}.corrupt" in aside, f"{path} ({kind} at {reached}) was not set aside")
        campaign.counts["set aside"] += len(aside)
        shutil.rmtree(folder)
    if number > 1:
        all_damaged(campaign)


def all_damaged(campaign: Campaign) -> None:
    """Check that a training without an intact checkpoint is refused, twice, and does not start over."""
    folder = campaign.folder / "all"
    start(folder, 1, prepare=lambda: killed_in_a_save(OPERATIONS * 5, True)).wait()
    for path in (folder / "label=0/checkpoints").glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:-100])
    for _ in range(2):
        training = start(folder, 1)
        status = training.wait()
        said = "all others are damaged" in training.log.read_text()
        campaign.expect(status == 1 and said, f"{folder}: nothing could be read, and it went on")
    campaign.counts["nothing left, and said so"] += 1


def disks(campaign: Campaign, whole: Path, number: int, size: int) -> str | None:
    """Run trainings on a disk that is too small; return the reason if they were left out, else None."""
    for trial in range(number):
        folder = campaign.folder / f"disk-{trial}"
        kept = folder / "label=0/checkpoints"
        kept.parent.mkdir(parents=True)
        kind = ("full for a while", "full for good", "room for few")[trial % 3]
        # Milestones are always kept: 3 of them, last, best, and a new one take 6 files; 2 more are the latest.
        room = {"room for few": 6.7}.get(kind, 12)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(room * size)}", "tmpfs", str(kept.parent)],
                                 capture_output=True, text=True)  # fmt: skip
        if mounted.returncode:
            return f"mounting a tmpfs is not allowed here: {mounted.stderr.strip()}"
        try:
            _fill(campaign, folder, kept, whole, kind)
        finally:
            subprocess.run(["umount", "-l", str(kept.parent)], check=True)
        campaign.counts[kind] += 1
    return None


def _fill(campaign: Campaign, folder: Path, kept: Path, whole: Path, kind: str) -> None:
    ballast = kept / "ballast"
    most_failed = 4 if kind == "full for good" else "null"
    settings = ["trainer.log_every_n_steps=1", f"checkpointing.max_failed_saves={most_failed}"]

    def at_steps() -> None:
        """Fill the disk after a random step, and empty it a few steps later, or never."""
        real, first = LastCheckpoint.on_train_batch_end, campaign.chance.randint(3, 10)

        def step_by_step(self: LastCheckpoint, trainer: object, *args: object) -> None:
            if trainer.global_step == first and not ballast.exists():
                with ballast.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(kept).free // 4096 * 4096)
            if trainer.global_step == first + 6 and kind == "full for a while":
                ballast.unlink(missing_ok=True)
            real(self, trainer, *args)

        LastCheckpoint.on_train_batch_end = step_by_step

    training = start(folder, 1, *settings, prepare=at_steps if kind != "room for few" else lambda: None)
    status = training.wait()
    log = training.log.read_text()
    campaign.counts["saves that failed"] += log.count("COULD NOT BE WRITTEN")
    if kind == "full for good":
        said = "the training ends here" in log
        campaign.expect(status == 1 and said, f"{folder}: the disk was full for good, and nobody said so")
        inspect(campaign, folder / "label=0", 1, milestones=False)
        ballast.unlink()
        status = start(folder, 1).wait()
    elif kind == "full for a while":
        campaign.expect("COULD NOT BE WRITTEN" in log and "written again" in log, f"{folder}: nobody said it was full")
    else:
        campaign.expect("to make room" in log, f"{folder}: no room was made")
    complete(campaign, folder, whole, status)


def run(arguments: argparse.Namespace, folder: Path) -> tuple[Campaign, dict[str, object]]:
    """Run the whole campaign below `folder`."""
    torch.set_num_threads(1)
    began, campaign = time.monotonic(), Campaign(folder, random.Random(arguments.seed))
    whole = folder / "whole"
    training = start(whole, 1)
    training.wait_for_start()
    first_step = time.monotonic()
    campaign.expect(training.wait() == 0, f"the undisturbed training failed: {training.log.read_text()[-2000:]}")
    last = whole / "label=0/checkpoints/last.ckpt"
    assert not campaign.faults and same(last, last)
    seconds = time.monotonic() - first_step
    kills(campaign, whole, arguments.kills, seconds)
    damages(campaign, whole, arguments.damages)
    left_out = disks(campaign, whole, arguments.disks, last.stat().st_size)
    # fmt: off
    facts = {"benchmark": "faults", "command": f"python {shlex.join(sys.argv)}", "steps": STEPS,
             "checkpoint_bytes": last.stat().st_size, "seed": arguments.seed, **dict(campaign.counts),
             "disks_left_out": left_out, "faults": campaign.faults[:20], "ok": not campaign.faults,
             "seconds": round(time.monotonic() - began, 1), "torch": str(torch.__version__), "device": "cpu"}
    # fmt: on
    return campaign, facts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--damages", type=int, default=24)
    parser.add_argument("--disks", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="folder to work in, which then is left as it is; else a temporary one")
    arguments = parser.parse_args()
    os.environ.pop("DATA_DIR", None)
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        folder = Path(arguments.keep or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        campaign, facts = run(arguments, folder)
    print(json.dumps(facts))
    sys.exit(bool(campaign.faults))
