"""Building what a configuration names: data, networks, objectives, samplers, estimators, trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Literal

import lightning
import torch
from omegaconf import DictConfig, OmegaConf

from palimpsest.common.files import Place, folder_of
from palimpsest.common.values import FREE, IF_SET, NAME, AtLeastOne, FilePath, Name, list_of
from palimpsest.corpora.judging import Judge, same_text
from palimpsest.data.stream import BatchPlan
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.estimators.base import Estimator
from palimpsest.evaluation.drawing import Drawing
from palimpsest.evaluation.likelihood import Precision
from palimpsest.experiment.fits import check_parts
from palimpsest.experiment.runs import Runs
from palimpsest.models.belonging import check_together
from palimpsest.models.freezing import freeze
from palimpsest.models.recompute import recompute_blocks
from palimpsest.objectives.base import Objective
from palimpsest.process import Process
from palimpsest.settings.identity import identity
from palimpsest.settings.instantiation import instantiate, located, made_class, wired
from palimpsest.settings.wiring import WIRING
from palimpsest.training.machine import Machine
from palimpsest.training.slurm import check_processes
from palimpsest.training.trainer import Run, build_trainer


@dataclass(frozen=True)
class Choices:
    """Settings of models and their training that belong to no single component."""

    sharing: Literal["per_class", "conditional"]
    pretrain: Name | None
    pretrain_steps: AtLeastOne
    freeze: Annotated[Sequence[str], list_of(NAME, 1, "[embeddings,blocks]"), IF_SET] | None
    gradient_checkpointing: Annotated[bool, FREE]
    start_from_counts: Annotated[bool, IF_SET]
    max_skipped_steps: Annotated[AtLeastOne, FREE]
    max_failed_saves: AtLeastOne | None
    checkpoint_path: FilePath | None

    @property
    def conditional(self) -> bool:
        return self.sharing == "conditional"


class Builder:
    """Builder of the objects that a configuration names; each is built when it is asked for."""

    def __init__(self, cfg: DictConfig, runs: Runs) -> None:
        self.cfg, self._runs = cfg, runs
        self.choices: Choices = wired(cfg, "palimpsest.experiment.building.Choices")
        self.machine: Machine = wired(cfg, "palimpsest.training.machine.Machine")
        self.seed: int = cfg.seed
        self._data: dict[int | None, TextData] = {}

    def check(self) -> None:
        """Refuse parts that do not fit together, before data are read.

        Raises:
            ValueError, OSError: settings contradict each other, or name what does not exist.
        """
        process = instantiate(self.cfg.process, vocab_size=2, own_size=1, mask_id=0)
        objective = instantiate(self.cfg.parameterization, process=process)
        schedule = instantiate(self.cfg.lr_scheduler)
        schedule(torch.optim.SGD([torch.zeros(1)]))  # what it refuses
        sampler = located(self.cfg.sampler._target_)
        self.drawing()  # what it refuses
        check_parts(self.cfg, objective, process, made_class(self.cfg.backbone), sampler, self.estimator)
        check_processes(self.machine.devices, self.machine.num_nodes)
        self._check_ramp()

    def _check_ramp(self) -> None:
        """Refuse a training that would end before its batch ramp does."""
        plan = BatchPlan.of(self.machine.global_batch_size, self.machine.ramp)
        if self.trains:
            plan.check_reached(self.cfg.trainer.max_steps)
            if self.choices.pretrain:
                plan.check_reached(self.choices.pretrain_steps, "classify.pretrain_steps")

    @property
    def trains(self) -> bool:
        """Return True if the command trains, or may."""
        return located(self.cfg.mode._target_).mode.trains

    @property
    def law(self) -> str:
        """The name of the objective."""
        return made_class(self.cfg.parameterization).name

    @property
    def estimator(self) -> Estimator:
        return instantiate(self.cfg.estimator)

    @property
    def precision(self) -> Precision:
        return wired(self.cfg, "palimpsest.evaluation.likelihood.Precision")

    @cached_property
    def truth(self) -> object | None:
        """The distribution of the corpus, if it has one and rows are its texts token by token, so that they compare."""
        data = self.cfg.data
        whole = not data.wrap and not self.cfg.training.prefix_length
        comparable = whole and not data.get("score_special") and data.tokenizer_name_or_path == "word"
        return instantiate(data.get("truth")) if comparable else None

    @property
    def judge(self) -> Judge:
        """The judge of completed prompts: that of the data set, or a comparison with the reference text."""
        return instantiate(self.cfg.data.get("judge")) or same_text

    def drawing(self, trained_length: int | None = None) -> Drawing:
        """Build the sampler with what is given of each text.

        trained_length: tokens of the model's training rows; longer texts are written with a window of attention.
        """
        given = wired(self.cfg, "palimpsest.evaluation.sampling_inputs.Template")
        node = self.cfg.sampler
        context = self._context(trained_length)
        if context is not None:
            node = OmegaConf.merge(node, {"context": context})
        settings = OmegaConf.to_container(self.cfg.sampler, resolve=True)
        protocol = {"sampler": settings.pop("_target_"), **settings, **asdict(given)}
        protocol |= {} if context is None else {"context": context}
        return Drawing(instantiate(node), given, protocol, self.cfg.sampling.var_length)

    def _context(self, trained_length: int | None) -> int | None:
        """Return the tokens that a token sees where block diffusion writes on behind the length of its training."""
        cfg = self.cfg
        longer = trained_length is not None and cfg.model.length > trained_length
        if not longer or self.law != "bd3lm" or cfg.sampler.get("context", 0) is not None:
            return None
        return trained_length // cfg.block_size * cfg.block_size

    def label(self, label: int | None) -> int | None:
        """Return the class whose texts are meant: `label`, or that of the configuration."""
        return self.cfg.data.label if label is None else label

    @cached_property
    def _encoder(self) -> object | None:
        """The encoder that makes latents of texts; None without one."""
        return instantiate(self.cfg.latents) if self.cfg.latents else None

    def data(self, label: int | None = None) -> TextData:
        label = self.label(label)
        if label not in self._data:
            special = {}
            if self.cfg.data.get("score_special") is None and not made_class(self.cfg.parameterization).masks_special:
                special = {"score_special": False}
            texts = wired(
                self.cfg,
                "palimpsest.dataloader.Texts",
                label=label,
                stream=instantiate(self.cfg.streaming),
                latents=self._encoder,
                **self._first_given(),
                **special,
            )
            loading = wired(self.cfg, "palimpsest.data.loading.Loading")
            batches = wired(
                self.cfg,
                "palimpsest.dataloader.Batches",
                batch_size=self.machine.micro_batch,
                eval_batch_size=self.machine.eval_batch,
                loading=loading,
            )
            self._data[label] = TextData(instantiate(self.cfg.data.source), texts, batches)
        return self._data[label]

    def _first_given(self) -> dict[str, bool]:
        """Block diffusion says itself whether the first token is given."""
        own = self.cfg.parameterization.get("ignore_bos")
        return {} if own is None else {"first_given": own}

    def diffusion(self, data: TextData) -> Diffusion:
        """The model with new weights."""
        lightning.seed_everything(self.seed, verbose=False)
        process = self.process(data)
        objective: Objective = instantiate(self.cfg.parameterization, process=process)
        backbone = self.backbone(data, process.vocab_size)
        check_together(data, objective, backbone)
        freeze(backbone, self.choices.freeze)
        if self.choices.gradient_checkpointing:
            recompute_blocks(backbone)
        # backbone=hf_* leaves sizes open in the configuration; what is saved says those that were found.
        settings = identity(self.cfg)
        settings |= {k: v for k, v in backbone.settings.items() if settings.get(k) is None}
        known = {"configuration": settings, "tokenizer": data.vocabulary.fingerprint, "label": data.label}
        known |= {} if data.latents is None else {"latents": data.latents.facts}
        return wired(
            self.cfg,
            "palimpsest.diffusion.Diffusion",
            backbone=backbone,
            objective=objective,
            optimizer=instantiate(self.cfg.optim),
            lr_scheduler=instantiate(self.cfg.lr_scheduler),
            plan=data.plan,
            identity=known,
        )

    def process(self, data: TextData) -> Process:
        known = data.vocabulary
        return instantiate(self.cfg.process, vocab_size=known.size, own_size=known.own_size, mask_id=known.mask_id)

    def backbone(self, data: TextData, vocab_size: int) -> torch.nn.Module:
        """The network, with new weights. backbone=hf_* find their sizes in the file of a class's model."""
        told = {"num_classes": len(data.label_names or ())} if self.choices.conditional else {}
        node = self.cfg.backbone
        if data.latents is not None and "latent_size" in node:
            told["latent_shape"] = data.latents.shape
        resumed = self._runs.resume_path(data.label) or (self._runs.resume_path(0) if data.label is None else None)
        files = {
            "checkpoint_path": of_class(self.choices.checkpoint_path, data.label or 0),
            "resumed": str(resumed) if resumed else None,
        }
        return instantiate(node, vocab_size=vocab_size, **told, **{k: v for k, v in files.items() if k in node})

    def trainer(self, title: str, command: str, label: int | None = None) -> lightning.Trainer:
        """Return a Trainer that logs and saves in the run's folders; with a title that begins with "train" it fits."""
        fitting = title.startswith("train")
        folder, checkpoints = self._runs.folder(label), self._runs.checkpoints(label)
        saving, logging_ = self._saving_in(folder_of(checkpoints)), self._saving_in(folder)
        loggers = (logging_.get("logger") or {}).values() if fitting else []
        run = Run(
            title,
            fitting,
            self.machine,
            patience=self._runs.patience(label) if fitting else None,
            max_skipped_steps=self.choices.max_skipped_steps,
            max_failed_saves=self.choices.max_failed_saves,
            folder=folder,
            checkpoints=checkpoints,
            command=command,
            settings=self.settings,
            callbacks=[instantiate(node) for node in _callbacks(saving)] if fitting else [],
            loggers=[instantiate(node) for node in loggers],
            strategy=instantiate(self.cfg.strategy),
        )
        names = WIRING["palimpsest.training.trainer.Arguments"]
        told = {name: self.cfg.trainer[name] for name in names if name in self.cfg.trainer}
        return build_trainer(run, told)

    def _saving_in(self, folder: Place) -> DictConfig:
        """Return the configuration in which callbacks and loggers find the folder that is meant."""
        return with_changes(self.cfg, {"checkpointing.save_dir": str(folder)})

    @property
    def settings(self) -> str:
        """The resolved configuration as YAML."""
        return OmegaConf.to_yaml(self.cfg, resolve=True)


def with_changes(cfg: DictConfig, changes: Mapping[str, object]) -> DictConfig:
    """Return a configuration that differs from `cfg` in these keys."""
    cfg = cfg.copy()
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def of_class(path: str | None, label: int | None) -> str:
    """Return `path` with the number of the class in place of {label}."""
    return (path or "").replace("{label}", "{label}" if label is None else str(label))


def _callbacks(cfg: DictConfig) -> list[DictConfig]:
    """Return the callbacks of a fit: the group `callbacks`, and `plateau` if it is chosen."""
    return [*(cfg.get("callbacks") or {}).values(), *([cfg.plateau] if cfg.plateau else [])]
