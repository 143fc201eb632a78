"""Metrics of a training, logged every trainer.log_every_n_steps optimizer steps.

Sums are kept on the device within an interval. Only at its end does the host wait for the device, and ranks exchange
their sums (one gather). Every number is of the whole run, over all ranks, unless its name says more:

  train/nll              nats per token, sum over sum of the interval; train/cross_entropy or train/loss where the
                         training weights rates otherwise (`loss_name` of the objective)
  train/nll_ema          its running mean over about `EMA_STEPS` steps
  train/nll_masked_A-B   nats per masked token in texts with a share from A to B masked (train/cross_entropy_...
                         where that is trained)
  train/<name>           the objective's own means (objectives/base.py: TokenLoss.means), sum over sum of the interval
  train/lr               learning rate of the latest step, of the first parameter group; if groups have different
                         rates, lr-<optimizer>/pg1, pg2, ... are those of all (GroupRates)
  train/grad_norm        norm of the gradient before clipping, mean of the interval; train/grad_norm_max: its largest
  train/batch_samples    rows per optimizer step;  train/batch_tokens: their tokens without padding
  train/samples_per_s    rows per second, and train/tokens_per_s tokens per second without padding; validation does not
                         count
  train/data_wait_share  share of the interval in which the first rank waited for its next batch; on a GPU the host
                         runs ahead of the device, so a small share need not cost anything
  train/mfu              FLOP/s of training (training/callbacks/hardware.py: TrainingFlops) as a share of the speed
                         measured for a plain matrix product of the same type
  train/skipped_steps    updates skipped so far (training/callbacks/guard.py)
  memory/..._gib         GiB (training/callbacks/hardware.py), of the rank with the most

Another callback adds metrics by a method `interval_metrics() -> Mapping[str, float]`, called on every rank.
Shape suffixes: B rows, L tokens, P network passes, S sums, N means of the objective's own, R ranks, V values that ranks
exchange.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from torch import Tensor
from torch.optim import Optimizer

from palimpsest.training.callbacks.guard import SpikeDetector
from palimpsest.training.callbacks.hardware import TrainingFlops, compute_dtype, matmul_rate, memory

log = logging.getLogger(__name__)

BUCKETS = 5
EMA_STEPS = 100
# Sums over an interval on the device; nats and masked tokens by mask rate follow them.
_SUMS = ("nll", "scored", "tokens", "projected", "grad_norm", "updates")


class _Interval:
    """Sums over the steps since the last log, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums_S = torch.zeros(len(_SUMS) + 2 * BUCKETS, dtype=torch.float64, device=device)
        self.largest_norm = torch.zeros((), dtype=torch.float64, device=device)
        self.names, self.means_N2 = (), torch.zeros((), dtype=torch.float64, device=device)
        self.rows, self.block_flops = 0, 0.0
        self.steps, self.paused = 0, 0.0
        self.began = time.perf_counter()

    def add(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], flops: float) -> None:
        """Add one micro-batch. A loss that is not finite is left out of the means; the guard counts it."""
        ids_BL, mask_BL = batch["input_ids"], batch.get("attention_mask")
        nll, finite = outputs["nll"], outputs["nll"].isfinite()
        tokens = torch.full_like(nll, ids_BL.numel(), dtype=torch.float64) if mask_BL is None else mask_BL.sum()
        values = (nll.where(finite, 0.0), outputs["tokens"].where(finite, 0), tokens, outputs["projected"])
        self.sums_S[: len(values)] += torch.stack([value.double() for value in values])
        if means := outputs.get("means"):
            means_N2 = torch.stack([*means.values()])
            self.means_N2 = self.means_N2 + means_N2.where(means_N2.isfinite().all(-1, keepdim=True), 0.0)
            self.names = tuple(means)
        if "num_scored_by_part" in outputs:
            parts = ("num_masked", "cross_entropy", "num_scored")
            self._add_by_rate(*(outputs[f"{name}_by_part"] for name in parts))
        elif "cross_entropy" in outputs:
            self._add_by_rate(outputs["num_masked"], outputs["cross_entropy"], outputs["scored_B"][:, None])
        self.rows, self.block_flops = self.rows + len(ids_BL), self.block_flops + flops

    def _add_by_rate(self, masked_BP: Tensor, nats_BP: Tensor, scored_BP: Tensor) -> None:
        masked_BP = masked_BP.double()
        nats_BP = nats_BP.double()
        rate_BP = masked_BP / scored_BP.clamp(min=1)
        bucket_BP = len(_SUMS) + (rate_BP * BUCKETS).long().clamp(max=BUCKETS - 1)
        finite_BP = nats_BP.isfinite()
        index = torch.cat([bucket_BP, bucket_BP + BUCKETS]).flatten()
        added = torch.cat([nats_BP.where(finite_BP, 0.0), masked_BP.where(finite_BP, 0.0)]).flatten()
        self.sums_S.index_add_(0, index, added)

    def add_update(self, norm: Tensor) -> None:
        norm, finite = norm.double(), norm.isfinite()
        norm, at = norm.where(finite, 0.0), _SUMS.index("grad_norm")
        self.sums_S[at : at + 2] += torch.stack([norm, finite.double()])
        self.largest_norm = torch.maximum(self.largest_norm, norm)
        self.steps += 1

    def over_ranks(self, gather: Callable[[Tensor], Tensor], memory: Mapping[str, float]) -> _Totals:
        """Return the totals over all ranks; this waits for the device and the other ranks."""
        host = self.sums_S.new_tensor([self.rows, self.block_flops, *memory.values()])
        means = self.means_N2.flatten()[: 2 * len(self.names)]
        mine = torch.cat([means, self.sums_S, host[:2], self.largest_norm[None], host[2:]])
        all_RV = gather(mine).reshape(-1, len(mine)).cpu()
        means_N2, all_RV = all_RV[:, : len(means)].sum(0).reshape(-1, 2).tolist(), all_RV[:, len(means) :]
        added, summed = all_RV.sum(0).tolist(), len(_SUMS) + 2 * BUCKETS
        largest_norm, *most = all_RV[:, summed + 2 :].max(0).values.tolist()
        return _Totals(
            sums=dict(zip((*_SUMS, *range(2 * BUCKETS), "rows", "block_flops"), added, strict=False)),
            means={name: total / count for name, (total, count) in zip(self.names, means_N2, strict=True) if count},
            largest_norm=largest_norm,
            memory=dict(zip(memory, most, strict=True)),
            ranks=len(all_RV),
            steps=self.steps,
            seconds=time.perf_counter() - self.began - self.paused,
        )


@dataclass(frozen=True)
class _Totals:
    """The totals of an interval over all ranks."""

    sums: Mapping[str | int, float]  # by name; and nats (0 ... K - 1), masked tokens (K ... 2 K - 1) by mask rate
    means: Mapping[str, float]  # the objective's own
    largest_norm: float
    memory: Mapping[str, float]  # of the rank with the most
    ranks: int
    steps: int
    seconds: float

    @property
    def loss(self) -> float:
        return self.sums["nll"] / self.sums["scored"] if self.sums["scored"] else math.nan

    def values(self, loss: str) -> dict[str, float]:
        """Return the metrics that follow from the totals, by name; `loss` is the name of the loss."""
        sums, seen = self.sums, [k for k in range(BUCKETS) if self.sums[BUCKETS + k]]
        by_rate = {f"{loss}_masked_{k / BUCKETS}-{(k + 1) / BUCKETS}": sums[k] / sums[BUCKETS + k] for k in seen}
        return {
            **by_rate, **{f"train/{name}": value for name, value in self.means.items()},
            "train/grad_norm": sums["grad_norm"] / sums["updates"] if sums["updates"] else math.nan,
            "train/grad_norm_max": self.largest_norm,
            "train/batch_samples": sums["rows"] / self.steps, "train/batch_tokens": sums["tokens"] / self.steps,
            "train/samples_per_s": sums["rows"] / self.seconds, "train/tokens_per_s": sums["tokens"] / self.seconds,
            **self.memory,
        }  # fmt: skip


class TrainingMetrics(Callback):
    """The log of each interval's metrics; the progress bar and run.json show `latest`."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.spikes = SpikeDetector()
        self._ema, self._ema_weight = 0.0, 0.0
        self._interval: _Interval | None = None

    def state_dict(self) -> dict[str, float]:
        return {"ema": self._ema, "ema_weight": self._ema_weight}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        self._ema, self._ema_weight = state_dict["ema"], state_dict["ema_weight"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # before a strategy wraps or shards the network
            self._flops = TrainingFlops.of(pl_module.backbone)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.log_every_n_steps and trainer.is_global_zero:
            matmul_rate(pl_module.device, compute_dtype(trainer.precision))  # before the training takes its memory
        memory(pl_module.device)
        self._waited = _waited(trainer)
        self._step, self._interval = trainer.global_step, _Interval(pl_module.device)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._interval:
            self._interval.paused += time.perf_counter() - self._paused_at

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._lr = optimizer.param_groups[0]["lr"]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Mapping, batch: Mapping, *_: object
    ) -> None:
        passes = outputs["num_masked"].shape[1] if "num_masked" in outputs else 1
        objective = pl_module.objective
        flops = passes * objective.encodes * objective.streams * self._flops.of_blocks(*batch["input_ids"].shape)
        self._interval.add(outputs, batch, flops)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._interval.add_update(pl_module.updates.norm)
        if trainer.log_every_n_steps and self._step % trainer.log_every_n_steps == 0:
            self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.log_every_n_steps and self._interval.steps:
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the interval and begin the next."""
        total = self._interval.over_ranks(pl_module.all_gather, memory(pl_module.device))
        name = f"train/{pl_module.objective.loss_name}"
        values = {name: total.loss, f"{name}_ema": self._running_mean(total.loss, total.steps), **total.values(name),
                  "train/lr": self._lr}  # fmt: skip
        for callback in trainer.callbacks:
            values |= callback.interval_metrics() if hasattr(callback, "interval_metrics") else {}
        if trainer.is_global_zero:
            rate = total.ranks * matmul_rate(pl_module.device, compute_dtype(trainer.precision))
            flops = total.sums["block_flops"] + self._flops.of_projection(total.sums["projected"])
            values["train/mfu"] = flops / total.seconds / rate
            waited = _waited(trainer)
            values["train/data_wait_share"] = min(1.0, (waited - self._waited) / total.seconds)
            self._waited = waited
            if self.spikes.begins(total.loss):
                log.warning("step %d: the loss jumped to %.4f per token", self._step, total.loss)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=self._step - 1)
        self.latest = {"loss": total.loss, "seconds_per_step": total.seconds / total.steps, **values}
        self._interval = _Interval(pl_module.device)

    def _running_mean(self, value: float, steps: int) -> float:
        if math.isfinite(value):
            share = 1 - (1 - 1 / EMA_STEPS) ** steps
            self._ema += share * (value - self._ema)
            self._ema_weight += share * (1 - self._ema_weight)
        return self._ema / self._ema_weight if self._ema_weight else math.nan


class GroupRates(LearningRateMonitor):
    """Lightning's monitor, active only if it says more than `train/lr`.

    That is so if parameter groups have different learning rates, or if momenta or weight decays are to be logged.
    """

    def on_train_batch_start(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        if self._says_more(trainer):
            super().on_train_batch_start(trainer, *args, **kwargs)

    def on_train_epoch_start(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        if self._says_more(trainer):
            super().on_train_epoch_start(trainer, *args, **kwargs)

    def _says_more(self, trainer: Trainer) -> bool:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        # Without the schedule, whose factor may be 0 for all of them.
        rates = {group.get("initial_lr", group["lr"]) for group in groups}
        return len(rates) > 1 or self.log_momentum or self.log_weight_decay


def _waited(trainer: Trainer) -> float:
    """Return the seconds that training has waited for batches; 0 if the loader does not measure it."""
    return getattr(trainer.train_dataloader, "waited", 0.0)
