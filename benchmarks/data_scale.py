"""Measure memory and time of a large corpus of one's own: converted, tokenised, trained on, killed and resumed.

    python benchmarks/data_scale.py --megabytes 1000 --output benchmarks/results/data_scale_cpu

It writes a folder of txt files with invented words, whose frequencies follow Zipf's law. Then, each in a process of its
own, as the command line would do it: `cold` converts, builds the tokenizer and packs; `warm` does the same again, with
everything in the cache; `train` trains a tiny model and is killed by SIGKILL after a checkpoint; `resume` is the same
command again. A third training without a kill must end with the same weights, bit for bit.

Memory is that of the process and its children, each second: `anonymous` is what they need; `mapped` are pages of files,
which the kernel takes back when memory is short. Pages that several processes share count once (PSS; needs Linux).
Writes OUTPUT.json and OUTPUT.svg, and prints a Markdown table. The disk needs four times the size of the corpus.
"""

import argparse
import json
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from palimpsest.benchmarks.faults import same
from palimpsest.report.style import BLUE, MUTED, ORANGE, PAPER, new_figure, style_axes, write

ROOT = Path(__file__).parents[1]
FILES = 8
STEPS, EVERY = 400, 20
PREPARE = """
import sys, time
from palimpsest.experiment.experiment import Experiment
from palimpsest.settings.command_line import compose_config
data = Experiment(compose_config(sys.argv[1:]), "data_scale").build.data()
began = time.perf_counter()
rows = sum(len(data.split(name)) for name in ("train", "validation"))
print(f"{time.perf_counter() - began:.2f} {rows}")
"""
TINY = ["model.hidden_size=16", "model.cond_dim=8", "model.n_blocks=1", "model.n_heads=2", "model.length=128",
        "loader.global_batch_size=8", f"trainer.max_steps={STEPS}", "lr_scheduler.num_warmup_steps=2",
        f"callbacks.checkpoint_every_n_steps.every_n_train_steps={EVERY}", f"trainer.val_check_interval={STEPS}",
        "data.max_valid_texts=200", "trainer.accelerator=cpu", "sampling.num_sample_log=0"]  # fmt: skip


# -------------------------------------------------------------------------------- the corpus


def invented_words(number: int) -> list[str]:
    """Return different words of one to three syllables, shorter ones first."""
    chance, words = random.Random(0), {}
    begins, vowels, ends = (
        ["b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "pl", "ch", "sh"],
        "aeiou",
        ["", "n", "r", "s", "t", "nd"],
    )
    while len(words) < number:
        parts = (begins, vowels, ends) * (1 + chance.randrange(1 + min(2, len(words) // 500)))
        words["".join(map(chance.choice, parts))] = None
    return list(words)


def write_corpus(folder: Path, size: int) -> None:
    """Write about `size` bytes of texts of 400 characters on average, one per line."""
    words = np.array(invented_words(20_000), dtype=object)
    chance = np.random.default_rng(0)
    share = np.cumsum(1 / np.arange(1, len(words) + 1))
    for number in range(FILES):
        with (folder / f"part-{number}.txt").open("w") as file:
            while file.tell() < size / FILES:
                found = words[np.searchsorted(share, share[-1] * chance.random(100_000))]
                ends = np.sort(chance.choice(100_000, 1_300, replace=False))
                file.writelines(" ".join(part).capitalize() + ".\n" for part in np.split(found, ends) if len(part))


# -------------------------------------------------------------------------------- memory


@dataclass
class Meter:
    """Memory of a process and its descendants, sampled each second in MiB."""

    began: float
    points: list[tuple[float, float, float]] = field(default_factory=list)  # seconds, anonymous, mapped

    def watch(self, process: subprocess.Popen) -> None:
        """Sample until the process ends."""
        while process.poll() is None:
            anonymous = mapped = 0.0
            for pid in family(process.pid):
                found = pages(pid)
                anonymous, mapped = anonymous + found.get("Pss_Anon", 0), mapped + found.get("Pss_File", 0)
            self.points.append((round(time.monotonic() - self.began, 1), round(anonymous / 1024), round(mapped / 1024)))
            time.sleep(1.0)

    @property
    def peaks(self) -> dict[str, float]:
        """Return the largest sum, and the largest anonymous memory."""
        return {
            "peak_MiB": max(anonymous + mapped for _, anonymous, mapped in self.points),
            "peak_anonymous_MiB": max(anonymous for _, anonymous, _ in self.points),
        }


def family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:  # it has ended
            continue
        for child in found:
            yield from family(int(child))


def pages(pid: int) -> dict[str, int]:
    """Return the kibibytes of each kind of memory; nothing of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    return {name.rstrip(":"): int(size) for name, size, *_ in map(str.split, lines)}


# -------------------------------------------------------------------------------- phases


@dataclass
class Bench:
    """The phases, with the results of each."""

    folder: Path
    settings: list[str]
    began: float = field(default_factory=time.monotonic)
    phases: dict[str, dict] = field(default_factory=dict)

    def run(self, name: str, *command: str, kill_at: Path | None = None) -> str:
        """Run a phase and return its output; `kill_at`: the file whose appearance is followed by SIGKILL."""
        meter, began = Meter(self.began), time.monotonic()
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        log = self.folder / f"{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=file, stderr=file)
        if kill_at is not None:
            threading.Thread(target=kill_after, args=(process, kill_at), daemon=True).start()
        meter.watch(process)
        expected = 0 if kill_at is None else -signal.SIGKILL
        if process.returncode != expected:
            raise RuntimeError(f"{name} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        seconds = round(time.monotonic() - began, 1)
        self.phases[name] = {"process_seconds": seconds, **meter.peaks, "memory": meter.points}
        print(f"{name}: {seconds} s, {meter.peaks}", file=sys.stderr, flush=True)
        return log.read_text()

    def prepare(self, name: str) -> None:
        seconds, rows = self.run(name, "-c", PREPARE, *self.settings).split()[-2:]
        self.phases[name] |= {"seconds": float(seconds), "rows": int(rows)}

    def train(self, name: str, saved: str, kill: bool = False) -> Path:
        folder = self.folder / saved
        last = folder / "checkpoints" / "last.ckpt"
        self.run(name, "main.py", *self.settings, f"checkpointing.save_dir={folder}", kill_at=last if kill else None)
        return last


def kill_after(process: subprocess.Popen, path: Path) -> None:
    """Kill a process as soon as it has written a file."""
    while process.poll() is None:
        if path.exists():
            process.kill()
        time.sleep(0.05)


# -------------------------------------------------------------------------------- results


def memory_curve(phases: dict[str, dict]) -> Figure:
    """Draw the memory over time, with a mark where each phase begins."""
    figure = new_figure(3.0)
    axes = style_axes(figure.add_subplot(), "seconds", "MiB")
    for phase in phases.values():
        seconds, anonymous, mapped = np.array(phase["memory"]).T
        axes.fill_between(seconds, anonymous, anonymous + mapped, color=ORANGE, alpha=0.35, linewidth=0)
        axes.plot(seconds, anonymous, color=BLUE, linewidth=1.4)
    top = max(phase["peak_MiB"] for phase in phases.values())
    axes.set_ylim(0, 1.35 * top)
    for number, (name, phase) in enumerate(phases.items()):
        start = phase["memory"][0][0]
        axes.axvline(start, color=MUTED, linewidth=0.5)
        height = top * (1.27 - 0.07 * (number % 4))
        if number < len(phases) - 1:
            write(axes, start, height, f" {name}", MUTED, ha="left")
        else:  # before its mark, so that it stays inside the figure
            write(axes, start, height, f"{name} ", MUTED, ha="right")
    points = next(iter(phases.values()))["memory"]
    middle, anonymous, mapped = points[2 * len(points) // 3]
    write(axes, middle, anonymous - 0.02 * top, "anonymous", BLUE, ha="center", va="top")
    write(axes, middle, anonymous + mapped + 0.02 * top, "with mapped files", ORANGE, ha="center", va="bottom")
    figure.set_facecolor(PAPER)
    return figure


def table(phases: dict[str, dict]) -> str:
    """Return the phases as Markdown."""
    lines = ["| phase | seconds of the process | of these for the data | peak memory, MiB | of these anonymous |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, phase in phases.items():
        seconds = phase.get("seconds", "")
        lines.append(f"| {name} | {phase['process_seconds']} | {seconds} | {phase['peak_MiB']:.0f} | "
                     f"{phase['peak_anonymous_MiB']:.0f} |")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--tokenizer", default="word", help="a name for data.tokenizer_name_or_path")
    parser.add_argument("--output", type=Path, default=Path("data_scale"), help="without its ending")
    parser.add_argument("--folder", help="where the corpus and the cache are put meanwhile")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        (folder / "corpus").mkdir()
        write_corpus(folder / "corpus", args.megabytes * 10**6)
        size = sum(path.stat().st_size for path in (folder / "corpus").iterdir())
        bench = Bench(folder, ["data=text", f"data.path={folder / 'corpus'}", f"data.cache_dir={folder / 'cache'}",
                               f"data.tokenizer_name_or_path={args.tokenizer}", f"output_dir={folder / 'outputs'}",
                               *(["data.vocab_size=8192"] if args.tokenizer in ("word", "bpe") else []),
                               *TINY])  # fmt: skip
        bench.prepare("cold")
        bench.prepare("warm")
        bench.train("train", "killed", kill=True)
        resumed = bench.train("resume", "killed")
        identical = same(resumed, bench.train("undisturbed", "whole"))
    result = {
        "benchmark": "data_scale", "command": shlex.join(["python", "benchmarks/data_scale.py", "--megabytes",
        str(args.megabytes), "--tokenizer", args.tokenizer]), "corpus_bytes": size, "same_weights": identical,
        "cpus": len(os.sched_getaffinity(0)), "python": platform.python_version(), "torch": torch.__version__,
        "phases": bench.phases,
    }  # fmt: skip
    args.output.with_suffix(".json").write_text(json.dumps(result) + "\n")
    memory_curve(bench.phases).savefig(args.output.with_suffix(".svg"), metadata={"Date": None})
    print(f"{size / 1e6:.0f} MB of text; resumed and undisturbed training end with the same weights: {identical}\n")
    print(table(bench.phases))
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
