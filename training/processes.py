"""Distributed training: who launched the processes, and how they share the weights.

Processes are launched by Lightning (one command on one machine), by torchrun or by srun.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim import Optimizer

from palimpsest.common.values import real
from palimpsest.models.sharding import gather, load_sharded, sharded_like

# Timeout of collective operations. At most a week, because torch counts some milliseconds in 32 bits.
Minutes = Annotated[float, real("[0.01, 10080]")]
_DEFAULT_MINUTES = 30.0


def quiet_lightning() -> None:
    """Silence what Lightning says of its trainers, which run inside of what a user asked for."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


def ddp(timeout_minutes: Minutes = _DEFAULT_MINUTES, find_unused_parameters: bool = False) -> DDPStrategy:
    """Return the strategy with whole weights in every process and averaged gradients.

    Buffers are constants here, so they are not broadcast. Gradients are views of the buckets that are reduced.
    """
    return DDPStrategy(
        timeout=timedelta(minutes=timeout_minutes),
        find_unused_parameters=find_unused_parameters,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


class FullySharded(ModelParallelStrategy):
    """Weights, gradients, averages and optimizer states sharded over all processes (FSDP2), on GPUs or CPUs.

    The module shards itself in `configure_model` (models/sharding.py). Checkpoints are those of any other strategy:
    one file of whole tensors, read by each process, written by the first. Gradients are reduced after every
    micro-batch, because keeping them would take the memory that sharding saves.
    """

    lightning_restore_optimizer = True
    load_checkpoint = Strategy.load_checkpoint

    def __init__(self, timeout_minutes: Minutes = _DEFAULT_MINUTES) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timedelta(minutes=timeout_minutes)
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, object]:
        """Return the optimizer's own state with whole tensors (models/sharding.py)."""
        return gather(getattr(optimizer, "_optimizer", optimizer).state_dict())

    def load_model_state_dict(self, checkpoint: Mapping[str, object], strict: bool = True) -> None:
        load_sharded(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, object]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_shared_state(optimizer, state))


def _shared_state(optimizer: Optimizer, state: Mapping[str, object]) -> dict[str, object]:
    """Return an optimizer's state of whole tensors with each tensor of a parameter's shape sharded like the parameter.

    An optimizer made of several has a state with one entry of `parts` for each.
    """
    parts = getattr(optimizer, "parts", None)
    if parts is not None:
        return {"parts": [_shared_state(*pair) for pair in zip(parts, state["parts"], strict=True)]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    shared = {
        number: {
            name: sharded_like(value, p) if torch.is_tensor(value) and value.shape == p.shape else value
            for name, value in state["state"].get(number, {}).items()
        }
        for number, p in zip(numbers, parameters, strict=True)
    }
    return {**state, "state": {number: values for number, values in shared.items() if values}}


def strategy_for(chosen: Strategy | str, processes: int, fitting: bool) -> Strategy | str:
    """Return the strategy of a trainer: `ddp` if "auto" is chosen and there are several processes.

    A measurement keeps the whole weights in every process and divides the texts.
    """
    if isinstance(chosen, FullySharded) and not fitting:
        return ddp(chosen._timeout.total_seconds() / 60)
    return ddp() if chosen == "auto" and processes > 1 else chosen


def launched_per_node() -> int | None:
    """Return the number of processes per node that torchrun or srun launched; None without them."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if SLURMEnvironment.detect():
        return int(os.environ["SLURM_NTASKS"]) // int(os.environ.get("SLURM_NNODES", "1"))
    return None


def several_launched() -> bool:
    """Return True if torchrun or srun launched several processes."""
    return (launched_per_node() or 1) > 1 or int(os.environ.get("SLURM_NNODES", os.environ.get("WORLD_SIZE", "1"))) > 1


def first_process() -> bool:
    """Return True in the process that prints and writes files; it works before the processes have connected."""
    return rank_zero_only.rank == 0


def local_device() -> int:
    """Return the index of this process's GPU on its node."""
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return rank % max(1, torch.cuda.device_count())
