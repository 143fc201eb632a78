"""What a checkpoint says of its run beside the weights, and how a run goes on at the step it was left at.

Weights, their average, optimizer, schedule, the counts of the callbacks and the place in the data are Lightning's and
the modules' own parts of the file. Here are added the resolved configuration, the tokenizer, and the versions, so that
a file alone suffices to build its model again.

No state of a random generator is saved, because nothing depends on one: masks, times and the order of the data are
functions of (seed, place in the stream), and the global generator, which only dropout draws from, is seeded anew from
(seed, step, micro-batch, device) before each micro-batch. Hence the same file serves every rank.
"""

from __future__ import annotations

import logging
import platform
import tomllib
from collections.abc import Mapping
from pathlib import Path

import lightning
import tokenizers
import torch
import transformers
from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"
# What arithmetic hangs on: with another version a resume is right, but not to the bit.
_ARITHMETIC = ("torch", "device")


def versions() -> dict[str, str]:
    """What runs here, by name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    project = tomllib.loads(_PROJECT.read_text())["project"]["version"]
    return {"palimpsest": project, "python": platform.python_version(), "device": device,
            "torch": str(torch.__version__), "lightning": lightning.__version__,
            "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}  # fmt: skip


def tokenizer_record(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, object]:
    """What it takes to build the tokenizer again: the text of its tokenizer.json, or, where it has none, its
    vocabulary; and its special tokens by their roles."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {"tokenizer.json": backend.to_str()} if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    return {"class": type(tokenizer).__name__, "name_or_path": str(tokenizer.name_or_path), "special": special,
            **content}  # fmt: skip


class RunRecord(Callback):
    """Puts `record` (such as the configuration), the tokenizer of the trainer's data and the versions into every
    checkpoint under `run`. Of a checkpoint that is gone on from it says when results may differ in rounding."""

    def __init__(self, record: Mapping[str, object]) -> None:
        self.record, self._tokenizer = dict(record), None

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)
        if self._tokenizer is None and tokenizer is not None:
            self._tokenizer = tokenizer_record(tokenizer)
        checkpoint["run"] = {**self.record, "tokenizer": self._tokenizer, "versions": versions()}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, object]
    ) -> None:
        theirs, ours = checkpoint.get("run", {}).get("versions", {}), versions()
        differing = [f"{name} {theirs[name]}, now {ours[name]}" for name in _ARITHMETIC if name in theirs
                     and theirs[name] != ours[name]]  # fmt: skip
        if differing and trainer.is_global_zero:
            log.warning("the run was begun with %s: what follows is the same training up to rounding, not to the bit",
                        ", ".join(differing))  # fmt: skip
