"""Several processes: who started them, how they find each other, and how the weights lie in them.

Three ways to start them: Lightning itself (one command on one machine; it starts the others), torchrun, srun.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated

import lightning
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.optim import Optimizer

from palimpsest.common.values import real
from palimpsest.models.sharding import gather, load_sharded, sharded_like

# How long a process waits for the others in a collective operation before it gives up and ends with an error. In less
# there is no time to meet; a week is the most, because some of what torch waits with counts milliseconds in 32 bits.
MINUTES = 30.0


def ddp(
    timeout_minutes: Annotated[float, real("[0.01, 10080]")] = MINUTES, find_unused_parameters: bool = False
) -> DDPStrategy:
    """Whole weights in every process, averaged gradients. Buffers are constants here and not sent around; gradients lie
    in the buckets that are sent."""
    return DDPStrategy(
        timeout=timedelta(minutes=timeout_minutes),
        find_unused_parameters=find_unused_parameters,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


class FullySharded(ModelParallelStrategy):
    """Weights, gradients, averages and optimizer states shared out over all processes (FSDP2), on GPUs or CPUs.

    The module shares itself out in `configure_model` (models/sharding.py). Checkpoints are those of any other strategy:
    one file of whole tensors, read by each process, written by the first. Gradients are summed after every micro-batch,
    since keeping them until the last would take the memory of the whole model that sharing out saves.
    """

    def __init__(self, timeout_minutes: Annotated[float, real("[0.01, 10080]")] = MINUTES) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timedelta(minutes=timeout_minutes)
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, object]:
        """The optimizer's own state with whole tensors (models/sharding.py)."""
        return gather(getattr(optimizer, "_optimizer", optimizer).state_dict())

    def load_checkpoint(self, checkpoint_path: str | os.PathLike, weights_only: bool | None = None) -> dict:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, object], strict: bool = True) -> None:
        load_sharded(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, object]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(_shared_state(optimizer, state))


def _shared_state(optimizer: Optimizer, state: Mapping[str, object]) -> dict[str, object]:
    """An optimizer's state of whole tensors with those of a parameter's shape shared out as the parameter is. What is
    made of several optimizers has a state of as many `parts`."""
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
    """The strategy of a trainer: ours where "auto" is chosen and there are several processes. Measurements hold the
    whole weights in every process, and share out the texts."""
    if isinstance(chosen, FullySharded) and not fitting:
        return ddp(chosen._timeout.total_seconds() / 60)
    return ddp() if chosen == "auto" and processes > 1 else chosen


def launched_per_node() -> int | None:
    """How many processes torchrun or srun started on each node; None where Lightning starts them, or there is one."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["LOCAL_WORLD_SIZE"])
    if SLURMEnvironment.detect():
        return int(os.environ["SLURM_NTASKS"]) // int(os.environ.get("SLURM_NNODES", "1"))
    return None


def started_beside_others() -> bool:
    """Whether torchrun or srun started several processes, which meet later than they begin."""
    return (launched_per_node() or 1) > 1 or int(os.environ.get("SLURM_NNODES", os.environ.get("WORLD_SIZE", "1"))) > 1


def processes_per_node(devices: int | str, available: int) -> int:
    """Return how many processes run on each node: `devices`, or for "auto" those that torchrun or srun started, else
    one for each of the `available` devices. Whether so many were started is for training/slurm.py to check."""
    if devices != "auto":
        return devices
    return launched_per_node() or available


def first_process() -> bool:
    """Whether this is the process that writes files and speaks. Known from the start, before they have met."""
    return lightning.pytorch.utilities.rank_zero.rank_zero_only.rank == 0


def local_device() -> int:
    """The number of this process's GPU on its node."""
    rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    return rank % max(1, torch.cuda.device_count())
