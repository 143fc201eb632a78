"""Run one command: check the settings, build the experiment, run the task of its mode."""

import os
import sys
from collections.abc import Mapping, Sequence

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from palimpsest.common.files import is_remote
from palimpsest.common.output import guard_output
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fits import check_typed
from palimpsest.settings import command_line
from palimpsest.settings.instantiation import instantiate
from palimpsest.settings.reading import Readers
from palimpsest.training.processes import first_process, quiet_lightning
from palimpsest.training.signals import SIGNALS


def checked(cfg: DictConfig, command: str, words: Sequence[str] = ()) -> Experiment:
    """Check a configuration as far as possible without reading data, and return its experiment.

    Args:
        words: typed settings, each of which must be used by something.

    Raises:
        ValueError, OSError: a setting is invalid, unused or contradicts another, or a file is missing.
    """
    readers = Readers(cfg)
    readers.refuse_wrong()
    readers.refuse_unread(words)
    check_typed(cfg, words)
    experiment = Experiment(cfg, command)
    experiment.build.check()
    return experiment


def composed(words: Sequence[str]) -> DictConfig:
    """Compose a configuration from words of a command line.

    Raises:
        ValueError: a word names an unknown setting or choice.
    """
    try:
        return command_line.compose_config(list(words))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(command_line.explain(error, words)) from None


def run(cfg: DictConfig, command: str, words: Sequence[str] = ()) -> dict[str, object]:
    """Build the experiment and run the task that `mode` names; return its results."""
    experiment = checked(cfg, command, words)
    torch.set_float32_matmul_precision("high")
    if is_remote(experiment.runs.checkpoints()):
        runs = experiment.runs
        print(f"checkpoints: {runs.checkpoints()}; logs, reports and results, here: {runs.folder()}")
    return instantiate(cfg.mode)(experiment)


def objective_value(results: Mapping[str, object]) -> float | None:
    """Return the number that a sweeper minimises: the log loss of a classification, else the nats per token; None for
    samples."""
    found = results.get("log_loss_nats") or results.get("nll_nats_per_token")
    return None if found is None else float(found.value)


def job(cfg: DictConfig) -> float | None:
    """Do what a process started by hand, by SLURM or by a launcher of Hydra does: one command, ended by signals.

    Returns:
        What a sweeper of Hydra minimises.
    """
    quiet_lightning()
    if not first_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - only the first process prints
    guard_output()
    with command_line.clear_errors():  # before Hydra reports them in its own words
        words = list(HydraConfig.get().overrides.task)
        command_line.refuse_unknown_additions(cfg, words)
        command = " ".join(["python main.py", *words])
        with SIGNALS.listening():
            return objective_value(run(cfg, command, words))
