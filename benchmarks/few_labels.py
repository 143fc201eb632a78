"""Accuracy against the number of labels and the share of wrong ones: diffusion, by likelihood alone and also trained to
tell the classes apart (hybrid), a left-to-right model, baselines.

    DATA_DIR=/path/to/data python benchmarks/few_labels.py --data imdb --texts 100 1000 all --noise 0 0.2 --seeds 1 2 \\
        --steps 600 --pretrain_steps 2500 --output benchmarks/results/few_labels_imdb.jsonl

Each cell (texts per class, noise, seed, model) is one run of mode=classify with one conditional network, and one line
of OUTPUT. The training texts and their wrong labels are the same for all models and seeds (data/labels.py); validation
and test labels are clean. The baselines come from the same runs as the diffusion model. With --pretrain_steps each
model starts from weights trained without labels, on all training texts of --data (and on those that have no labels),
once for each seed; both kinds of diffusion share them. A second start skips the cells that are in OUTPUT. At the end it
prints a Markdown table of the cells in OUTPUT with these --data, --steps, --pretrain_steps and --more, and draws
OUTPUT.svg. Its 95 % intervals contain the spread over test texts and over seeds.
"""

import argparse
import hashlib
import json
import math
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from palimpsest.experiment.running import run
from palimpsest.settings.command_line import compose_config

DATA = {
    "reviews": ["data=reviews"],
    "imdb": ["experiment=imdb_likelihood_cpu", "model.cond_dim=32", "classify.calibrate=false"],
    "ag_news": ["experiment=ag_news_likelihood_cpu", "classify.calibrate=false"],
}
# A training that compares classes needs smaller learning rates than its start, which keeps those of DATA.
SLOWER = ["optim.lr=5e-4", "optim.matrix_lr=5e-3"]
AS_BEFORE = ["classify.pretrain_lr_factor=4"]
WITHOUT_LABELS = {"reviews": "all", "imdb": "all+unsupervised", "ag_news": "all"}  # what classify.pretrain trains on
MODELS = {"diffusion": ["classify.baselines=true"],
          "hybrid diffusion": ["classify.discriminative_weight=1", "classify.baselines=false"],
          "left-to-right": ["algo=ar", "training.loss_weight=elbo", "classify.baselines=false"]}  # fmt: skip
ALL = "all"
ENSEMBLE = "diffusion and the best baseline"


def measured(cell: dict[str, object], folder: Path) -> dict[str, object]:
    """Train and classify one cell; return its line.

    The weights trained without labels are taken from beside `folder`, if they are there, and left there.
    """
    texts = "null" if cell["texts_per_class"] == ALL else cell["texts_per_class"]
    steps = cell["steps"]
    network = str(cell["model"]).removeprefix("hybrid ")  # labels are not used before the start
    slower = cell["model"] != network and cell["data"] != "reviews"
    words = [
        "mode=classify", *DATA[cell["data"]], *MODELS[cell["model"]], "classify.sharing=conditional",
        f"data.texts_per_class={texts}", f"data.label_noise={cell['noise']}", f"seed={cell['seed']}",
        f"trainer.max_steps={steps}", f"trainer.val_check_interval={max(1, steps // 10)}",
        f"checkpointing.save_dir={folder}", "sampling.num_sample_log=0", "classify.num_examples=0", *cell["more"],
    ]  # fmt: skip
    of_start = [cell["data"], network, *(cell[name] for name in ("seed", "pretrain_steps", "more"))]
    start = folder.parent / f"start-{_hash(of_start)}"
    words += SLOWER if slower else []
    if cell["pretrain_steps"]:
        words += [f"classify.pretrain={WITHOUT_LABELS[cell['data']]}"]
        words += [f"classify.pretrain_steps={cell['pretrain_steps']}"]
        words += AS_BEFORE if slower else []
    if start.exists():
        shutil.copytree(start, folder / "pretrained", dirs_exist_ok=True)
    began = time.monotonic()
    results = run(compose_config(words), "benchmarks/few_labels.py")
    if cell["pretrain_steps"] and not start.exists():
        shutil.copytree(folder / "pretrained", start)
    methods = {
        cell["model"] if name == "this model" else name: {
            "accuracy": found["accuracy"].value, "se": found["accuracy"].se,
            "log_loss_nats": found["log_loss_nats"].value, "ece": found["ece"],
        }
        for name, found in results["methods"].items()
    }  # fmt: skip
    seconds = round(time.monotonic() - began, 1)
    return {"benchmark": "few_labels", **cell, "test_texts": results["texts"], "seconds": seconds, "methods": methods}


def key(line: dict[str, object]) -> list[object]:
    """Return what identifies a cell."""
    return [*settings(line), *(line[name] for name in ("texts_per_class", "noise", "seed", "model"))]


def settings(line: dict[str, object]) -> list[object]:
    """Return what the cells of one table have in common."""
    return [line[name] for name in ("data", "steps", "pretrain_steps", "more")]


def _hash(settings: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(settings)).encode()).hexdigest()[:16]


def summary(lines: Sequence[dict[str, object]]) -> dict[tuple[str, float], dict[object, tuple[float, float]]]:
    """Return (method, noise) -> texts per class -> mean accuracy over seeds and half its 95 % interval.

    The variance of the mean is that of one run's test texts, which the seeds share, plus that of the mean over seeds.
    """
    runs = defaultdict(lambda: defaultdict(list))
    for line in lines:
        for name, found in line["methods"].items():
            method = ENSEMBLE if name.startswith("ensemble") else name
            runs[method, line["noise"]][line["texts_per_class"]].append((found["accuracy"], found["se"]))
    found = defaultdict(dict)
    for name, by_size in runs.items():
        for size, values in by_size.items():
            accuracy, se = np.array(values).T
            of_seeds = accuracy.var(ddof=1) / len(accuracy) if len(accuracy) > 1 else 0.0
            found[name][size] = (float(accuracy.mean()), 1.96 * math.sqrt((se**2).mean() + of_seeds))
    return found


def table(found: dict[tuple[str, float], dict[object, tuple[float, float]]], sizes: Sequence[object]) -> str:
    """Return a Markdown table of accuracies, %."""
    rows = ["| wrong labels | method | " + " | ".join(map(str, sizes)) + " |", "|---|---|" + "---|" * len(sizes)]
    for (method, noise), by_size in sorted(found.items(), key=lambda item: item[0][1]):
        cells = [f"{100 * by_size[s][0]:.1f} ± {100 * by_size[s][1]:.1f}" if s in by_size else "–" for s in sizes]
        rows.append(f"| {noise:g} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def figure(found: dict[tuple[str, float], dict[object, tuple[float, float]]], sizes: Sequence[object]) -> Figure:
    """Draw accuracy against texts per class, one panel for each share of wrong labels."""
    noises = sorted({noise for _, noise in found})
    drawn = Figure(figsize=(3 + 4 * len(noises), 4), layout="constrained")
    axes = drawn.subplots(1, len(noises), sharey=True, squeeze=False)[0]
    for (method, noise), by_size in found.items():
        panel, known = axes[noises.index(noise)], [size for size in sizes if size in by_size]
        mean, half = zip(*(by_size[size] for size in known), strict=True)
        panel.errorbar([sizes.index(size) for size in known], mean, half, label=method, marker="o", capsize=2)
    for panel, noise in zip(axes, noises, strict=True):
        panel.set(title=f"{noise:.0%} wrong labels", xlabel="training texts per class")
        panel.set_xticks(range(len(sizes)), list(map(str, sizes)))
    axes[0].set_ylabel("accuracy")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return drawn


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="reviews")
    parser.add_argument("--texts", nargs="+", default=["8", "32", "128", ALL], help="per class; all: every text")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4], help="share of wrong labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pretrain_steps", type=int, default=0, help="steps without labels before; 0: none")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--more", nargs="*", default=[], help="further overrides for every run")
    args = parser.parse_args(words)
    cells = [
        {"data": args.data, "texts_per_class": size if size == ALL else int(size), "noise": noise, "seed": seed,
         "model": model, "steps": args.steps, "pretrain_steps": args.pretrain_steps, "more": args.more}
        for seed in args.seeds for noise in args.noise for size in args.texts for model in args.models
    ]  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    present = [key(line) for line in read(args.output)]
    for number, cell in enumerate(cells):
        if key(cell) in present:
            continue
        folder = Path("outputs/few_labels") / _hash(key(cell))
        line = measured(cell, folder)
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shutil.rmtree(folder)  # a cell is one line; the weights of many would fill the disk
        print(f"{number + 1} of {len(cells)}: {json.dumps(line)}", flush=True)
    lines = [line for line in read(args.output) if settings(line) == settings(cells[0])]
    sizes = sorted({line["texts_per_class"] for line in lines}, key=lambda size: math.inf if size == ALL else size)
    found = summary(lines)
    print(table(found, sizes))
    figure(found, sizes).savefig(args.output.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
