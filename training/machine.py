"""Devices of a run, and their batch sizes."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from palimpsest.common.values import IF_SET, AtLeastOne, BatchRamp, Size
from palimpsest.data.stream import batch_arithmetic
from palimpsest.training.processes import launched_per_node, local_device

# With weights in 16 bits (bf16-true, 16-true) most updates of a training would be rounded away.
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "64-true", "32", "16", "64", "bf16", 16, 32, 64]


@dataclass(frozen=True)
class Machine:
    """Devices and precision of a run, and the division of batches among the devices."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda"]
    devices_per_node: Literal["auto"] | Size  # processes; "auto" for one per GPU
    num_nodes: Size
    typed_precision: Precision | None  # None for the one that suits the device
    accumulate_grad_batches: AtLeastOne | None  # micro-batches per optimizer step; None for the number that follows
    batch_size: AtLeastOne | None  # samples per device at once; None for an equal share of the global batch
    eval_batch_size: AtLeastOne | None
    global_batch_size: AtLeastOne
    eval_global_batch_size: AtLeastOne
    ramp: Annotated[BatchRamp, IF_SET] | None  # smaller optimizer steps at the beginning (data/stream.py)

    @property
    def device(self) -> torch.device:
        """Device of this process.

        Raises:
            ValueError: a GPU is requested, but there is none.
        """
        if self.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"trainer.accelerator={self.accelerator}: torch finds no GPU on this machine; use auto or cpu"
            )
        gpu = self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return torch.device("cuda", local_device()) if gpu else torch.device("cpu")

    @property
    def name(self) -> str:
        """Name of the hardware in reports."""
        if torch.cuda.is_available():
            return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' * (threads > 1)}"

    @property
    def precision(self) -> str:
        fast = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return self.typed_precision or ("bf16-mixed" if fast else "32-true")

    @property
    def devices(self) -> int:
        """Number of processes per node: for "auto" as many as torchrun or srun launched, else one per GPU."""
        available = torch.cuda.device_count() if self.device.type == "cuda" else 1
        return launched_per_node() or available if self.devices_per_node == "auto" else self.devices_per_node

    @property
    def micro_batch(self) -> int:
        """Samples per device at once in training."""
        return self._division()[0]

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        return self._division()[1]

    @property
    def eval_batch(self) -> int:
        """Samples per device at once in evaluation."""
        devices = self.devices * self.num_nodes
        return self.eval_batch_size or -(-self.eval_global_batch_size // devices)

    def _division(self) -> tuple[int, int]:
        return batch_arithmetic(
            self.global_batch_size,
            self.batch_size,
            self.devices,
            self.num_nodes,
            accumulate=self.accumulate_grad_batches,
            ramp=self.ramp,
        )
