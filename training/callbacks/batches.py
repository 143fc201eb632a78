"""What a step of the training takes, said at its start and where it changes; and a resume with other micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class BatchArithmetic(Callback):
    """Says how a global batch is made up, and lets a run go on with another number of devices or micro-batches, and
    after its end.

    Lightning counts micro-batches and accumulates until their number divides; a checkpoint of a run that made more or
    fewer of them per step would put its steps out of place. And a run that ended has finished an epoch for it: it would
    begin another, and count its steps for the log one too high. Training is one endless epoch here, so the counts of a
    checkpoint are made those that this run would have had after the same optimizer steps.
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
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if loops is None:
            return
        step, batches = int(checkpoint["global_step"]), loops["epoch_loop.batch_progress"]
        wanted = step * trainer.accumulate_grad_batches
        batches["is_last_batch"] = False
        for counts in (batches["total"], batches["current"]):
            missing = wanted - counts["ready"]
            counts.update({name: count + missing for name, count in counts.items()})
        epoch = loops["epoch_progress"]
        if epoch["total"]["processed"]:  # it ended; as if it had been saved by the validation of its last step
            for counts in (epoch["total"], epoch["current"]):
                counts.update(ready=1, started=1, processed=0, completed=0)
            due = trainer.limit_val_batches and wanted % trainer.val_check_interval == 0
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - bool(due)

    @staticmethod
    @rank_zero_only
    def _say(line: str) -> None:
        print(line, flush=True)
