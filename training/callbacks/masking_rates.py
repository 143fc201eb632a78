"""The cross-entropy of masked tokens at fixed mask rates, at every validation."""

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from palimpsest.common.values import Rates


class MaskingRates(Callback):
    """Mean cross-entropy [nats] of the masked tokens, with each scored token masked with probability `rate`.

    Logged at every validation for each of `rates`: val/cross_entropy_at_100 for rate 1, val/cross_entropy_at_50 for
    0.5. Each text has the same masks at every validation, and the weights are those of the validation. Each rate costs
    one network pass per batch.

    Raises:
        ValueError: a rate is repeated, or the objective does not predict masks anywhere in a text.
    """

    def __init__(self, rates: Rates = (1.0, 0.5, 0.1)) -> None:
        if len(set(rates)) < len(rates):
            raise ValueError(f"callbacks.masking_rates.rates={list(rates)} names a rate twice; name each once")
        self.rates = tuple(rates)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.fills_masks or pl_module.objective.T:
            raise ValueError(
                "callbacks=masking_rates masks any tokens of a text in continuous time, and algo=ar, algo=bd3lm and T "
                "above 0 do not; leave it out of callbacks="
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums_R2 = torch.zeros(len(self.rates), 2, dtype=torch.float64, device=pl_module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: dict, *_: object
    ) -> None:
        with trainer.precision_plugin.val_step_context():
            found = [pl_module.cross_entropy_at(batch, rate) for rate in self.rates]
        self._sums_R2 += torch.stack([torch.stack([nats, tokens.double()]) for nats, tokens in found])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        nats_R, tokens_R = trainer.strategy.reduce(self._sums_R2, reduce_op="sum").unbind(1)
        names = (f"val/cross_entropy_at_{100 * rate:g}" for rate in self.rates)
        pl_module.log_dict(dict(zip(names, nats_R / tokens_R, strict=True)))
