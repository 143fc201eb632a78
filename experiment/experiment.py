"""An experiment: the objects that a configuration builds, its run folders, and the weights of its models."""

from __future__ import annotations

from functools import cached_property

import lightning
import torch
from omegaconf import DictConfig, OmegaConf

from palimpsest.classification.models import pretraining_splits
from palimpsest.common.files import PathOrUrl, join_path
from palimpsest.experiment.building import Builder, with_changes
from palimpsest.experiment.fitting import fit
from palimpsest.experiment.runs import Runs
from palimpsest.experiment.weights import Weights
from palimpsest.settings.identity import identity
from palimpsest.settings.instantiation import build_from_settings, resolve_target


class Experiment:
    """An experiment, as a task receives it.

    Attributes:
        build: builder of data, networks, samplers and trainers (building.py).
        runs: the folders of the trainings and their checkpoints (runs.py).
        weights: loader of checkpoints (weights.py).
        command: the command line.
    """

    def __init__(self, cfg: DictConfig, command: str, shared: bool = False) -> None:
        self.command, self.seed = command, cfg.seed
        # The best weights by val/nll are not those that classify best.
        always_waits = shared or (cfg.classify.sharing == "conditional" and not cfg.classify.discriminative_weight)
        self.runs: Runs = build_from_settings(
            cfg, "palimpsest.experiment.runs.Runs", identity=identity(cfg), always_waits=always_waits
        )
        self.build = Builder(cfg, self.runs)
        writes = resolve_target(cfg.mode._target_).mode.writes
        self.weights: Weights = build_from_settings(
            cfg, "palimpsest.experiment.weights.Weights", build=self.build, runs=self.runs, writes=writes
        )
        self._cfg = cfg

    @cached_property
    def pretraining(self) -> Experiment | None:
        """The training of the shared weights that all class models start from; None without classify.pretrain."""
        pretrain = self.build.choices.pretrain
        if not pretrain:
            return None
        factor, optim = self.build.choices.pretrain_lr_factor, self._cfg.optim
        changes = {
            "data.train_splits": pretraining_splits(pretrain, self.build.data().splits),
            "data.label": None,
            "data.label_noise": 0,  # texts without labels, all of them
            "data.texts_per_class": None,
            "trainer.max_steps": self.build.choices.pretrain_steps,
            "classify.pretrain": None,
            "classify.discriminative_weight": 0.0,
            "classify.bigrams": 0,
            "training.freeze": None,
            "checkpointing.save_dir": str(join_path(self.runs.checkpoint_root, "pretrained")),
            "checkpointing.resume_ckpt_path": None,
            **{f"optim.{name}": factor * optim[name] for name in ("lr", "matrix_lr") if name in optim},
            **({"optim.class_lr": None} if "class_lr" in optim else {}),
        }
        return Experiment(with_changes(self._cfg, changes), self.command, shared=True)

    @property
    def facts(self) -> dict[str, object]:
        """Facts at the top of a report: data, tokenizer, network, device."""
        cfg, data = self._cfg, self.build.data()
        prefix = cfg.training.prefix_length
        with torch.device("meta"):
            network = self.build.backbone(data, self.build.process(data).vocab_size)
            parameters = sum(p.numel() for p in network.parameters())
        return {
            "data": cfg.data.name,
            "tokenizer": f"{cfg.data.tokenizer_name_or_path}, {data.vocabulary.size} types",
            "network": f"{cfg.model.name}, {parameters:,} parameters",
            "length": cfg.model.length,
            "seed": self.seed,
            "device": self.build.machine.name,
            **({"given": f"the first {prefix} tokens of each text"} if prefix else {}),
        }

    @property
    def protocol(self) -> dict[str, object]:
        """Protocol of a measurement: objective, weights and random numbers."""
        keys = ["T", "subs_masking", "time_conditioning", "training.ignore_bos", "trainer.precision", "seed"]
        keys += ["eval.checkpoint_path", "eval.disable_ema"]
        if self.build.objective_name == "bd3lm":
            keys += ["block_size", "parameterization.ignore_bos", "data.segments"]
        settings = {key: OmegaConf.select(self._cfg, key) for key in keys}
        return {"parameterization": self.build.objective_name, "noise": self._cfg.noise._target_, **settings}

    def fit(self, label: int | None = None) -> PathOrUrl:
        """Return the weights of a complete training, after training what is missing (fitting.py)."""
        return fit(self, label)

    def trainer(self, title: str, label: int | None = None) -> lightning.Trainer:
        """Return a Trainer for a run of this experiment (`Builder.trainer`)."""
        return self.build.trainer(title, self.command, label)
