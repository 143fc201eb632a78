"""The size of an optimizer step: printed when it changes, kept when a run resumes with other micro-batches."""

from collections.abc import Mapping

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from palimpsest.training.processes import first_process


class BatchArithmetic(Callback):
    """Report of the global batch, and correction of Lightning's counters on a resume.

    Lightning counts micro-batches. A run that resumes with more or fewer of them per step would misplace its steps.
    A finished run has also finished an epoch, so Lightning would begin another and log one step too high. Training is
    one endless epoch here, so the counters become those that this run would have after the same optimizer steps.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plan, micro_batches = trainer.datamodule.plan, trainer.accumulate_grad_batches
        parts = trainer.world_size * micro_batches
        self._changes = {stage.step: stage.size for stage in plan.stages}
        size = plan.size(trainer.global_step)
        ramp = f" (ramp: {plan})" if len(plan.stages) > 1 else ""
        _print(
            f"each optimizer step: {size} samples = {trainer.world_size} process(es) x {micro_batches} micro-batch(es) "
            f"x {size // parts}{ramp}"
        )

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        step = trainer.global_step
        if step and step in self._changes:
            _print(f"from step {step} on each optimizer step: {self._changes.pop(step)} samples")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, object]
    ) -> None:
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if loops is None:
            return
        step, batches = int(checkpoint["global_step"]), loops["epoch_loop.batch_progress"]
        expected = step * trainer.accumulate_grad_batches
        batches["is_last_batch"] = False
        for counts in (batches["total"], batches["current"]):
            missing = expected - counts["ready"]
            counts.update({name: count + missing for name, count in counts.items()})
        epoch = loops["epoch_progress"]
        if epoch["total"]["processed"]:  # a finished run: as if it had been saved by the validation of its last step
            for counts in (epoch["total"], epoch["current"]):
                counts.update(ready=1, started=1, processed=0, completed=0)
            due = trainer.limit_val_batches and expected % trainer.val_check_interval == 0
            loops["epoch_loop.state_dict"]["_batches_that_stepped"] = step - bool(due)


def _print(line: str) -> None:
    if first_process():
        print(line, flush=True)
