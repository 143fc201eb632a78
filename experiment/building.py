"""Builder of what a configuration names: data, networks, objectives, samplers, estimators, trainers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Literal

import lightning
import torch
from omegaconf import DictConfig, OmegaConf

from palimpsest.common.files import parent_folder
from palimpsest.common.values import FREE, IF_SET, NAME, AtLeastOne, FilePath, Name, Natural, Positive, list_of
from palimpsest.corpora.answer_checking import AnswerChecker, check_same_text
from palimpsest.data.stream import BatchPlan
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.estimators.base import Estimator
from palimpsest.evaluation.drawing import Drawing
from palimpsest.evaluation.likelihood import Precision
from palimpsest.experiment.fits import check_parts
from palimpsest.experiment.runs import Runs
from palimpsest.models.class_bigrams import ClassBigrams
from palimpsest.models.compatibility import check_data_compatible
from palimpsest.models.compiling import compile_encoder
from palimpsest.models.freezing import freeze
from palimpsest.objectives.base import Objective
from palimpsest.process import Process
from palimpsest.settings.identity import identity
from palimpsest.settings.instantiation import build_from_settings, class_built_by, instantiate, resolve_target
from palimpsest.settings.wiring import WIRING
from palimpsest.training.machine import Machine
from palimpsest.training.slurm import check_processes
from palimpsest.training.trainer import Run, build_trainer


@dataclass(frozen=True)
class Choices:
    """Settings of models and their training that belong to no single component."""

    sharing: Literal["per_class", "conditional"]
    bigrams: Annotated[Natural, IF_SET]
    pretrain: Name | None
    pretrain_steps: AtLeastOne
    pretrain_lr_factor: Positive
    freeze: Annotated[Sequence[str], list_of(NAME, 1, "[embeddings,blocks]"), IF_SET] | None
    gradient_checkpointing: Annotated[bool, FREE]
    compile: Annotated[bool, FREE]
    start_from_counts: Annotated[bool, IF_SET]
    max_skipped_steps: Annotated[AtLeastOne, FREE]
    max_failed_saves: AtLeastOne | None
    checkpoint_path: FilePath | None

    @property
    def conditional(self) -> bool:
        return self.sharing == "conditional"


class Builder:
    """Builder of the objects that a configuration names, each on demand."""

    def __init__(self, cfg: DictConfig, runs: Runs) -> None:
        self.cfg, self._runs = cfg, runs
        self.choices: Choices = build_from_settings(cfg, "palimpsest.experiment.building.Choices")
        self.machine: Machine = build_from_settings(cfg, "palimpsest.training.machine.Machine")
        self.seed: int = cfg.seed
        self._data: dict[int | None, TextData] = {}

    def check(self) -> None:
        """Check that the parts fit together, before data are read.

        Raises:
            ValueError, OSError: settings contradict each other, or name what does not exist.
        """
        process = instantiate(self.cfg.process, vocab_size=2, own_size=1, mask_id=0)
        objective = instantiate(self.cfg.parameterization, process=process)
        schedule = instantiate(self.cfg.lr_scheduler)
        schedule(torch.optim.SGD([torch.zeros(1)]))  # raises for invalid settings
        sampler = resolve_target(self.cfg.sampler._target_)
        self.drawing()  # raises for invalid settings
        check_parts(self.cfg, objective, process, class_built_by(self.cfg.backbone), sampler, self.estimator)
        check_processes(self.machine.devices, self.machine.num_nodes)
        plan = BatchPlan.of(self.machine.global_batch_size, self.machine.ramp)
        if resolve_target(self.cfg.mode._target_).mode.trains:
            plan.check_reached(self.cfg.trainer.max_steps)
            if self.choices.pretrain:
                plan.check_reached(self.choices.pretrain_steps, "classify.pretrain_steps")

    @property
    def objective_name(self) -> str:
        return class_built_by(self.cfg.parameterization).name

    @property
    def estimator(self) -> Estimator:
        return instantiate(self.cfg.estimator)

    @property
    def precision(self) -> Precision:
        return build_from_settings(self.cfg, "palimpsest.evaluation.likelihood.Precision")

    @cached_property
    def truth(self) -> object | None:
        """The exact distribution of the corpus, if it is known and rows are whole texts."""
        data = self.cfg.data
        whole = not data.wrap and not self.cfg.training.prefix_length
        whole = whole and data.long_texts in ("error", "drop")
        comparable = whole and not data.get("score_special") and data.tokenizer_name_or_path == "word"
        return instantiate(data.get("truth")) if comparable else None

    @property
    def judge(self) -> AnswerChecker:
        """The answer checker of completed prompts: that of the data set, or comparison with the reference."""
        return instantiate(self.cfg.data.get("judge")) or check_same_text

    def drawing(self, trained_length: int | None = None) -> Drawing:
        """Return the sampler with its prompt or template.

        Args:
            trained_length: tokens of the model's training rows; longer texts are sampled with an attention window.
        """
        prompt = build_from_settings(self.cfg, "palimpsest.evaluation.sampling_inputs.Template")
        cfg, node = self.cfg, self.cfg.sampler
        longer = trained_length is not None and cfg.model.length > trained_length
        if longer and self.objective_name == "bd3lm" and node.get("context", 0) is None:
            # Block diffusion continues beyond its training length with a window of whole blocks.
            node = OmegaConf.merge(node, {"context": trained_length // cfg.block_size * cfg.block_size})
        settings = OmegaConf.to_container(node, resolve=True)
        protocol = {"sampler": settings.pop("_target_"), **settings, **asdict(prompt)}
        return Drawing(instantiate(node), prompt, protocol, cfg.sampling.var_length)

    @cached_property
    def _encoder(self) -> object | None:
        """The encoder that computes latents of texts, if any."""
        return instantiate(self.cfg.latents) if self.cfg.latents else None

    def data(self, label: int | None = None) -> TextData:
        """Return the texts of class `label`, by default those of the configuration."""
        label = self.cfg.data.label if label is None else label
        if label not in self._data:
            given = {"label": label, "stream": instantiate(self.cfg.streaming), "latents": self._encoder}
            objective = self.cfg.parameterization
            if self.cfg.data.get("score_special") is None and not class_built_by(objective).masks_special:
                given["score_special"] = False
            if objective.get("ignore_bos") is not None:  # block diffusion has its own setting for the first token
                given["first_given"] = objective.ignore_bos
            texts = build_from_settings(self.cfg, "palimpsest.dataloader.Texts", **given)
            loading = build_from_settings(self.cfg, "palimpsest.data.loading.Loading")
            sizes = {"batch_size": self.machine.micro_batch, "eval_batch_size": self.machine.eval_batch}
            batches = build_from_settings(self.cfg, "palimpsest.dataloader.Batches", loading=loading, **sizes)
            self._data[label] = TextData(instantiate(self.cfg.data.source), texts, batches)
        return self._data[label]

    def diffusion(self, data: TextData) -> Diffusion:
        """Return the model with new weights."""
        lightning.seed_everything(self.seed, verbose=False)
        process = self.process(data)
        objective: Objective = instantiate(self.cfg.parameterization, process=process)
        backbone = self.backbone(data, process.vocab_size)
        check_data_compatible(data, objective, backbone)
        freeze(backbone, self.choices.freeze)
        if self.choices.gradient_checkpointing:
            backbone.recompute_blocks()
        if self.choices.compile:
            compile_encoder(backbone)
        # backbone=hf_* leaves sizes open in the configuration; checkpoints save the sizes that were found.
        settings = identity(self.cfg)
        settings |= {k: v for k, v in backbone.settings.items() if settings.get(k) is None}
        known = {"configuration": settings, "tokenizer": data.vocabulary.fingerprint, "label": data.label}
        known |= {} if data.latents is None else {"latents": data.latents.facts}
        return build_from_settings(
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
        """Return the network with new weights; backbone=hf_* read their sizes from a class model's checkpoint."""
        conditioning = {"num_classes": len(data.label_names or ())} if self.choices.conditional else {}
        node = self.cfg.backbone
        if data.latents is not None and "latent_size" in node:
            conditioning["latent_shape"] = data.latents.shape
        resumed = self._runs.resume_path(data.label) or (self._runs.resume_path(0) if data.label is None else None)
        files = {"checkpoint_path": with_label(self.choices.checkpoint_path, data.label or 0)}
        files["resumed"] = str(resumed) if resumed else None
        known = {key: value for key, value in files.items() if key in node}
        network = instantiate(node, vocab_size=vocab_size, **conditioning, **known)
        if self.choices.bigrams:
            network.bigrams = ClassBigrams(vocab_size, len(data.label_names or ()), self.choices.bigrams)
        return network

    def trainer(self, title: str, command: str, label: int | None = None) -> lightning.Trainer:
        """Return a Trainer that logs and saves in the run's folders; it fits if `title` begins with "train"."""
        fitting = title.startswith("train")
        folder, checkpoints = self._runs.folder(label), self._runs.checkpoints(label)
        saving = with_changes(self.cfg, {"checkpointing.save_dir": str(parent_folder(checkpoints))})
        logging_ = with_changes(self.cfg, {"checkpointing.save_dir": str(folder)})
        loggers, callbacks = [], []
        if fitting:
            plateau = [saving.plateau] if saving.plateau else []
            callbacks = [instantiate(node) for node in [*(saving.get("callbacks") or {}).values(), *plateau]]
            loggers = [instantiate(node) for node in (logging_.get("logger") or {}).values()]
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
            resumes=self._runs.resume,
            callbacks=callbacks,
            loggers=loggers,
            strategy=instantiate(self.cfg.strategy),
        )
        names = WIRING["palimpsest.training.trainer.Arguments"]
        return build_trainer(run, {name: self.cfg.trainer[name] for name in names if name in self.cfg.trainer})

    @property
    def settings(self) -> str:
        """The resolved configuration as YAML."""
        return OmegaConf.to_yaml(self.cfg, resolve=True)


def with_changes(cfg: DictConfig, changes: Mapping[str, object]) -> DictConfig:
    """Return a copy of `cfg` with these keys changed."""
    cfg = cfg.copy()
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def with_label(path: str | None, label: int | None) -> str:
    """Return `path` with {label} replaced by the number of the class."""
    return (path or "").replace("{label}", "{label}" if label is None else str(label))
