"""The record of a run in its checkpoints: configuration, tokenizer and versions.

They suffice to rebuild the model from the file alone. Weights, their average, optimizer, schedule, counts of the
callbacks and the position in the data are saved by Lightning and by the modules.

No state of a random generator is saved, because nothing depends on one. Masks, times and the order of the data are
functions of (seed, position in the stream). Only dropout draws from the global generator, which is seeded from (seed,
step, micro-batch, device) before each micro-batch. So the same file serves every rank.
"""

import logging
import platform
from collections.abc import Mapping

import lightning
import tokenizers
import torch
import transformers
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

import palimpsest

log = logging.getLogger(__name__)

# Arithmetic depends on these: with another version a resume is right, but not to the bit.
_ARITHMETIC = ("torch", "device")


def versions() -> dict[str, str]:
    """Return the versions of the software, and the device, by name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"palimpsest": palimpsest.__version__, "python": platform.python_version(), "device": device,
            "torch": str(torch.__version__), "lightning": lightning.__version__,
            "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}  # fmt: skip


def tokenizer_record(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, object]:
    """Return what rebuilds the tokenizer: its tokenizer.json, else its vocabulary, and its special tokens by role."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {"tokenizer.json": backend.to_str()} if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    return {"class": type(tokenizer).__name__, "name_or_path": str(tokenizer.name_or_path), "special": special,
            **content}  # fmt: skip


class RunRecord(Callback):
    """Writer of `record`, the tokenizer and the versions into every checkpoint, under `run`.

    On a resume it warns if results may differ in rounding.
    """

    def __init__(self, record: Mapping[str, object]) -> None:
        self.record, self._tokenizer = dict(record), None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)
        if self._tokenizer is None and tokenizer is not None:
            self._tokenizer = tokenizer_record(tokenizer)
        checkpoint["run"] = {**self.record, "tokenizer": self._tokenizer, "versions": versions()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        saved, now = checkpoint.get("run", {}).get("versions", {}), versions()
        changed = [name for name in _ARITHMETIC if name in saved and saved[name] != now[name]]
        if changed and trainer.is_global_zero:
            differences = ", ".join(f"{name} {saved[name]}, now {now[name]}" for name in changed)
            log.warning("the run was begun with %s: the rest is the same training up to rounding", differences)
