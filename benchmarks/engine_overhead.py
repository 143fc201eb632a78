"""Overhead of the engine: step time of a training with all default callbacks and loggers, against a bare loop.

The bare loop has the same batches, objective, gradient clipping, optimizer, learning-rate schedule and weight average,
but no Lightning, guard, metrics, logs or seeds for dropout. Both alternate step by step in one process, so other load
affects both; ratios are of pairs of steps. On a CPU the processor time is also reported, because a busy machine
stretches only the wall time.

    python benchmarks/engine_overhead.py                           # hidden 128, 8 blocks, batch 32
    python benchmarks/engine_overhead.py --steps 200 model.hidden_size=64 trainer.log_every_n_steps=1
"""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator

import lightning
import numpy as np
import torch

from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.common.randomness import training_noise
from palimpsest.experiment.experiment import Experiment
from palimpsest.settings.command_line import compose_config
from palimpsest.training.callbacks.hardware import synchronize

SIZE = ["model=tiny", "model.hidden_size=128", "model.length=72", "loader.global_batch_size=32", "optim=adamw",
        "callbacks.checkpoint_every_n_steps.every_n_train_steps=1000000"]  # fmt: skip
WARM_UP = 5


def now(device: torch.device) -> tuple[float, float]:
    """Return (wall, processor) seconds after the device has finished its work."""
    synchronize(device)
    return time.perf_counter(), time.process_time()


class TakingTurns(lightning.Callback):
    """One step of the bare loop after each training step; milliseconds of both as (wall, processor)."""

    def __init__(self, bare: Iterator[None]) -> None:
        self.bare, self.engine_ms, self.bare_ms, self._end = bare, [], [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ANN001
        start = now(pl_module.device)
        if self._end:
            self.engine_ms.append([1e3 * (b - a) for a, b in zip(self._end, start, strict=True)])
        next(self.bare)
        self._end = now(pl_module.device)
        self.bare_ms.append([1e3 * (b - a) for a, b in zip(start, self._end, strict=True)])


def bare_steps(experiment: Experiment, device: torch.device) -> Iterator[None]:
    """Yield after each step of the same training in a bare loop."""
    data = experiment.build.data()
    model = experiment.build.diffusion(data).train().to(device)
    optimizer = model.build_optimizer(model.backbone)
    scheduler = model.build_lr_scheduler(optimizer)
    clip, size = experiment.cfg.trainer.gradient_clip_val, experiment.cfg.loader.global_batch_size
    model.ema.to(device, model.backbone.parameters())
    for batch in data.train_dataloader():
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        optimizer.zero_grad()
        noise = training_noise(experiment.seed, batch["position"], size)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.objective.loss(model.backbone, batch, noise).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.backbone.parameters(), clip)
        optimizer.step()
        scheduler.step()
        model.ema.update(model.backbone.parameters())
        yield


def run() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=100)
    args, overrides = parser.parse_known_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = args.steps + WARM_UP
    with tempfile.TemporaryDirectory() as folder:
        places = [f"checkpointing.save_dir={folder}/run", f"data.cache_dir={folder}/data"]
        cfg = compose_config([*SIZE, *overrides, *places, f"trainer.max_steps={steps}", "trainer.limit_val_batches=0"])
        by_hand, experiment = Experiment(cfg, "benchmark"), Experiment(cfg, "benchmark")
        clock = TakingTurns(bare_steps(by_hand, device))
        trainer = experiment.trainer("train")
        data = experiment.build.data()
        trainer.callbacks.append(clock)
        trainer.fit(experiment.build.diffusion(data), datamodule=data)
    engine_ms, bare_ms = (np.array(times) for times in (clock.engine_ms, clock.bare_ms[1:]))
    quartiles = lambda values: np.quantile(values, [0.25, 0.5, 0.75]).round(4).tolist()  # noqa: E731
    ratio = lambda of, a, b: round(float(of(a) / of(b)), 4)  # noqa: E731
    found = {"device": device.type, "torch": torch.__version__,
             "settings": [*SIZE, *overrides], "steps": args.steps, "load_average": os.getloadavg()[0],
             "cpus": os.cpu_count()}  # fmt: skip
    for column, kind in enumerate(("wall", "processor")[: 1 if device.type == "cuda" else 2]):
        engine, bare = engine_ms[WARM_UP - 1 :, column], bare_ms[WARM_UP - 1 :, column]
        found[f"{kind}_ms"] = {"bare": quartiles(bare), "engine": quartiles(engine)}
        found[f"{kind}_ratio"] = {"of_steps": quartiles(engine / bare), "of_medians": ratio(np.median, engine, bare),
                                  "of_sums": ratio(np.sum, engine, bare)}  # fmt: skip
    report("engine_overhead", **found)


if __name__ == "__main__":
    run()
