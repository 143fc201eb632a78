"""Apply a function to many batches on all devices of a Lightning Trainer.

Shape suffix: M rows.
"""

from collections.abc import Callable

import lightning
import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Mapper(lightning.LightningModule):
    """A module that is not trained: a Trainer calls `function` on each batch and provides devices and precision."""

    def __init__(self, network: nn.Module, function: Callable[[object], object]) -> None:
        super().__init__()
        self.network, self.function = network, function
        self.results: list[object] = []
        self.allow_zero_length_dataloader_with_multiple_devices = True  # of few rows some devices may have none

    def test_step(self, batch: object, batch_idx: int) -> None:
        self.results.append(self.function(batch))

    predict_step = test_step


def map_over_devices(
    trainer: lightning.Trainer, network: nn.Module, function: Callable[[dict], dict[str, Tensor]], loader: DataLoader
) -> dict[str, np.ndarray]:
    """Return the columns that `function` computes for the batches of `loader`, from all devices, sorted by sample id.

    Args:
        network: the module that `function` evaluates; it is moved to the device of each process, and back.
        function: batch -> columns of its rows, including `sample_id`.

    Raises ValueError if there are no rows or a number is not finite.
    """

    def on_cpu(batch: dict) -> dict[str, Tensor]:
        return {name: column.cpu() for name, column in function(batch).items()}

    parts = gather(trainer, network, on_cpu, lambda module: trainer.test(module, loader, verbose=False))
    batches = [batch for part in parts for batch in part]
    if not batches:
        raise ValueError("there is nothing to score: the split is empty")
    if not all(bool(column.isfinite().all()) for batch in batches for column in batch.values()):
        raise ValueError("a likelihood is not finite: the weights or the noise schedule gave NaN or infinity")
    columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    order_M = columns["sample_id"].argsort()
    assert (columns["sample_id"][order_M].diff() > 0).all(), "a row was scored by two devices"
    return {name: column[order_M].numpy() for name, column in columns.items()}


def gather(
    trainer: lightning.Trainer,
    network: nn.Module,
    function: Callable[[object], object],
    run: Callable[[Mapper], object],
) -> list[list]:
    """Return the results of `function` for the batches of each process. `run` starts the trainer's loop."""
    mapper, device = Mapper(network, function), next(network.parameters()).device
    run(mapper)
    mapper.to(device)  # a trainer leaves a module on the CPU
    if trainer.world_size == 1:
        return [mapper.results]
    parts: list = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, mapper.results)
    return parts
