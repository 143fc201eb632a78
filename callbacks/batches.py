"""What a step of the training takes, said at its start and where it changes; and a resume with other micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class BatchArithmetic(Callback):
    """Says how a global batch is made up, and lets a run go on with another number of devices or micro-batches.

    Lightning counts micro-batches and accumulates until their number divides; a checkpoint of a run that made more or
    fewer of them per step would put its steps out of place. Hence the counts of a checkpoint are made those that this
    run would have reached after the same optimizer steps.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        plan, micro_batches = trainer.datamodule.plan, trainer.accumulate_grad_batches
        parts = trainer.world_size * micro_batches
        self._changes = {stage.step: stage.size for stage in plan.stages}
        size = plan.size(trainer.global_step)
        ramp = f" (ramp: {plan})" if len(plan.stages) > 1 else ""
        self._say(
            f"each optimizer step: {size} samples = {trainer.world_size} process(es) x {micro_batches} micro-batch(es) "
            f"x {size // parts}{ramp}"
        )

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step and step in self._changes:
            self._say(f"from step {step} on each optimizer step: {self._changes.pop(step)} samples")

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: Mapping[str, object]
    ) -> None:
        loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
        if loop is None or trainer.state.fn != "fit":
            return
        wanted = int(checkpoint["global_step"]) * trainer.accumulate_grad_batches
        for counts in (loop["total"], loop["current"]):
            missing = wanted - counts["ready"]
            counts.update({name: count + missing for name, count in counts.items()})

    @staticmethod
    @rank_zero_only
    def _say(line: str) -> None:
        print(line, flush=True)
