"""What a training run is doing, told every trainer.log_every_n_steps optimizer steps and nowhere in between.

Within an interval everything adds up on the device; its end is the only place where the host waits for it, and where
ranks exchange their sums (one gather). Every number is of the whole run, over all ranks, unless its name says more:

  train/nll              nats per token, sum over sum of the interval (train/cross_entropy where that is trained)
  train/nll_ema          its running mean over about `EMA_STEPS` steps
  train/nll_masked_A-B   nats per masked token in texts of which a share from A to B is masked (train/cross_entropy_...
                         where that is trained)
  train/<name>           the objective's own means (objectives/base.py: TokenLoss.means), sum over sum of the interval
  train/lr               learning rate of the newest step, of the first parameter group; where groups have different
                         ones, lr-<optimizer>/pg1, pg2, ... are those of all (GroupRates)
  train/grad_norm        norm of the gradient before clipping, mean of the interval; train/grad_norm_max: its largest
  train/batch_samples    rows per optimizer step;  train/batch_tokens: their tokens, padding not counted
  train/samples_per_s    rows per second, and train/tokens_per_s tokens per second, padding not counted; the clock
                         stands still during validation
  train/data_wait_share  share of the interval's seconds in which the first rank stood still for its next batch; on a
                         GPU the host runs ahead of the device, so that a small share need not cost anything
  train/mfu              FLOP/s of training (training/callbacks/hardware.py: Arithmetic) as a share of what the devices
  were
                         measured to do in a plain matrix product of the same type
  train/skipped_steps    updates left out so far (training/callbacks/guard.py)
  memory/..._gib         GiB (training/callbacks/hardware.py), of the rank that has most

A further callback adds its own by a method `interval_metrics() -> Mapping[str, float]`, called on every rank.
Shape suffixes: B rows, L tokens, P network passes, S sums, N means of the objective's own, R ranks, V values that ranks
exchange.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import lightning
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from torch import Tensor

from palimpsest.training.callbacks.guard import SpikeWatch
from palimpsest.training.callbacks.hardware import Arithmetic, compute_dtype, matmul_rate, memory

log = logging.getLogger(__name__)

BUCKETS = 5
EMA_STEPS = 100
# What adds up on the device over an interval; behind these stand nats and masked tokens by mask rate.
_SUMS = ("nll", "scored", "tokens", "projected", "grad_norm", "updates")


class _Interval:
    """The sums of the steps since the last reading, those of tensors on the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums_S = torch.zeros(len(_SUMS) + 2 * BUCKETS, dtype=torch.float64, device=device)
        self.largest_norm = torch.zeros((), dtype=torch.float64, device=device)
        self.names, self.means_N2 = (), torch.zeros((), dtype=torch.float64, device=device)
        self.rows, self.block_flops, self.steps, self.paused = 0, 0.0, 0, 0.0
        self.began = time.perf_counter()

    def add(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], flops: float) -> None:
        """One micro-batch. A loss that is not finite is left out of the means; the guard counts it."""
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
            self._add_by_rate(*(outputs[f"{name}_by_part"].double() for name in parts))
        elif "cross_entropy" in outputs:
            self._add_by_rate(outputs["num_masked"].double(), outputs["cross_entropy"].double(),
                              outputs["scored_B"][:, None])  # fmt: skip
        self.rows, self.block_flops = self.rows + len(ids_BL), self.block_flops + flops

    def _add_by_rate(self, masked_BP: Tensor, nats_BP: Tensor, scored_BP: Tensor) -> None:
        rate_BP = masked_BP / scored_BP.clamp(min=1)
        bucket_BP = len(_SUMS) + (rate_BP * BUCKETS).long().clamp(max=BUCKETS - 1)
        finite_BP = nats_BP.isfinite()
        where = torch.cat([bucket_BP, bucket_BP + BUCKETS]).flatten()
        what = torch.cat([nats_BP.where(finite_BP, 0.0), masked_BP.where(finite_BP, 0.0)]).flatten()
        self.sums_S.index_add_(0, where, what)

    def add_update(self, norm: Tensor) -> None:
        norm, finite = norm.double(), norm.isfinite()
        norm, at = norm.where(finite, 0.0), _SUMS.index("grad_norm")
        self.sums_S[at : at + 2] += torch.stack([norm, finite.double()])
        self.largest_norm = torch.maximum(self.largest_norm, norm)
        self.steps += 1

    def over_ranks(self, gather: Callable[[Tensor], Tensor], space: Mapping[str, float]) -> _Totals:
        """Waits for the device and the other ranks."""
        host = self.sums_S.new_tensor([self.rows, self.block_flops, *space.values()])
        means = self.means_N2.flatten()[: 2 * len(self.names)]
        mine = torch.cat([means, self.sums_S, host[:2], self.largest_norm[None], host[2:]])
        all_RV = gather(mine).reshape(-1, len(mine)).cpu()
        means_N2, all_RV = all_RV[:, : len(means)].sum(0).reshape(-1, 2).tolist(), all_RV[:, len(means) :]
        added, summed = all_RV.sum(0).tolist(), len(_SUMS) + 2 * BUCKETS
        largest_norm, *most = all_RV[:, summed + 2 :].max(0).values.tolist()
        return _Totals(
            sums=dict(zip((*_SUMS, *range(2 * BUCKETS), "rows", "block_flops"), added, strict=False)),
            means={name: total / count for name, (total, count) in zip(self.names, means_N2, strict=True) if count},
            largest_norm=largest_norm, memory=dict(zip(space, most, strict=True)), ranks=len(all_RV),
            steps=self.steps, seconds=time.perf_counter() - self.began - self.paused,
        )  # fmt: skip


@dataclass(frozen=True)
class _Totals:
    """An interval over all ranks. sums: by name, and nats (0 ... K - 1) and masked tokens (K ... 2 K - 1) by mask rate.
    means: the objective's own. memory: of the rank that has most."""

    sums: Mapping[str | int, float]
    means: Mapping[str, float]
    largest_norm: float
    memory: Mapping[str, float]
    ranks: int
    steps: int
    seconds: float

    @property
    def loss(self) -> float:
        return self.sums["nll"] / self.sums["scored"] if self.sums["scored"] else math.nan

    def values(self, loss: str) -> dict[str, float]:
        """By the name under which they are logged, where the sums say it all. `loss` is that of the loss."""
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
    """Reads an interval's sums and hands them to the loggers; `latest` is what the progress bar and run.json show."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.spikes = SpikeWatch()
        self._ema, self._ema_weight = 0.0, 0.0
        self._arithmetic: Arithmetic | None = None
        self._interval: _Interval | None = None
        self._step, self._lr, self._paused_at, self._waited = 0, 0.0, 0.0, 0.0

    def state_dict(self) -> dict[str, float]:
        return {"ema": self._ema, "ema_weight": self._ema_weight}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        self._ema, self._ema_weight = state_dict["ema"], state_dict["ema_weight"]

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":  # before a strategy wraps or shards the network
            self._arithmetic = Arithmetic.of(pl_module.backbone)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.log_every_n_steps and trainer.is_global_zero:
            matmul_rate(pl_module.device, compute_dtype(trainer.precision))  # before the training takes its memory
        memory(pl_module.device)
        self._waited = _waited(trainer)
        self._step, self._interval = trainer.global_step, _Interval(pl_module.device)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._interval:
            self._interval.paused += time.perf_counter() - self._paused_at

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:  # noqa: ANN001
        self._lr = optimizer.param_groups[0]["lr"]

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ANN001
        passes = outputs["num_masked"].shape[1] if "num_masked" in outputs else 1
        objective = pl_module.objective
        flops = passes * objective.encodes * objective.streams * self._arithmetic.of_blocks(*batch["input_ids"].shape)
        self._interval.add(outputs, batch, flops)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._interval.add_update(pl_module.updates.norm)
        if trainer.log_every_n_steps and self._step % trainer.log_every_n_steps == 0:
            self._tell(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.log_every_n_steps and self._interval.steps:
            self._tell(trainer, pl_module)

    def _tell(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Read the interval, log it, begin the next."""
        total = self._interval.over_ranks(pl_module.all_gather, memory(pl_module.device))
        name = f"train/{pl_module.objective.loss_name}"
        values = {name: total.loss, f"{name}_ema": self._running_mean(total.loss, total.steps), **total.values(name),
                  "train/lr": self._lr}  # fmt: skip
        for callback in trainer.callbacks:
            values |= callback.interval_metrics() if hasattr(callback, "interval_metrics") else {}
        if trainer.is_global_zero:
            rate = total.ranks * matmul_rate(pl_module.device, compute_dtype(trainer.precision))
            flops = total.sums["block_flops"] + self._arithmetic.of_projection(total.sums["projected"])
            values["train/mfu"] = flops / total.seconds / rate
            waited = _waited(trainer)
            values["train/data_wait_share"] = min(1.0, (waited - self._waited) / total.seconds)
            self._waited = waited
            if self.spikes.is_new(total.loss):
                log.warning("step %d: the loss leapt to %.4f per token", self._step, total.loss)
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
    """Lightning's monitor where it says more than `train/lr`: parameter groups have different learning rates, or their
    momenta or weight decays were asked for."""

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: object, **kwargs: object) -> None:
        if self._says_more(trainer):
            super().on_train_batch_start(trainer, *args, **kwargs)

    def on_train_epoch_start(self, trainer: lightning.Trainer, *args: object, **kwargs: object) -> None:
        if self._says_more(trainer):
            super().on_train_epoch_start(trainer, *args, **kwargs)

    def _says_more(self, trainer: lightning.Trainer) -> bool:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        # Before the schedule, whose factor may be 0 for all of them.
        rates = {group.get("initial_lr", group["lr"]) for group in groups}
        return len(rates) > 1 or self.log_momentum or self.log_weight_decay


def _waited(trainer: lightning.Trainer) -> float:
    """Seconds for which training has stood still for batches; 0 with a loader that does not know."""
    return getattr(trainer.train_dataloader, "waited", 0.0)
