"""What a configuration says of the machine: devices, precision, and how batches are cut for them."""

from __future__ import annotations

import torch
from omegaconf import DictConfig, OmegaConf

from palimpsest.dataloader import batch_arithmetic
from palimpsest.training.processes import local_device, processes_per_node


class Machine:
    """The devices of a run, and what each of them takes at once."""

    def __init__(self, cfg: DictConfig) -> None:
        self._loader, self._trainer = cfg.loader, cfg.trainer

    @property
    def device(self) -> torch.device:
        """That of this process.

        Raises:
            ValueError: a GPU is asked for, and there is none.
        """
        if self._trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"trainer.accelerator={self._trainer.accelerator}: torch finds no GPU on this machine; use auto or cpu"
            )
        gpu = self._trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return torch.device("cuda", local_device()) if gpu else torch.device("cpu")

    @property
    def name(self) -> str:
        """As reports say it."""
        if torch.cuda.is_available():
            return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' * (threads > 1)}"

    @property
    def precision(self) -> str:
        return self._trainer.precision or ("bf16-mixed" if self.device.type == "cuda" else "32-true")

    @property
    def devices(self) -> int:
        """Of a node."""
        available = torch.cuda.device_count() if self.device.type == "cuda" else 1
        return processes_per_node(self._trainer.devices, available)

    @property
    def ramp(self) -> list[list[int]] | None:
        """`loader.batch_ramp`, in lists."""
        ramp = self._loader.batch_ramp
        return OmegaConf.to_container(ramp) if OmegaConf.is_config(ramp) else ramp

    @property
    def micro_batch(self) -> int:
        """Samples that a device takes at once in training."""
        return self._cut()[0]

    @property
    def accumulate(self) -> int:
        """Micro-batches per optimizer step."""
        return self._cut()[1]

    @property
    def eval_batch(self) -> int:
        """Samples that a device takes at once in evaluation."""
        devices = self.devices * self._trainer.num_nodes
        return self._loader.eval_batch_size or -(-self._loader.eval_global_batch_size // devices)

    def _cut(self) -> tuple[int, int]:
        return batch_arithmetic(
            self._loader.global_batch_size, self._loader.batch_size, self.devices, self._trainer.num_nodes,
            accumulate=self._trainer.accumulate_grad_batches, ramp=self.ramp,
        )  # fmt: skip
