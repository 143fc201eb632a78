"""python main.py [mode=train|ppl_eval|sample_eval|classify] [data=...] [key=value ...]

The Hydra entry: composes the configuration, builds what it names and hands it to the task that `mode` names. What the
folders beside it hold receives built objects and values, never the configuration.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import logging
import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

if "palimpsest" not in sys.modules:  # `python main.py`: the folder of this file is the package, installed or not
    _FOLDER = Path(__file__).resolve().parent
    _SPEC = importlib.util.spec_from_file_location("palimpsest", _FOLDER / "__init__.py")
    sys.modules["palimpsest"] = importlib.util.module_from_spec(_SPEC)
    _SPEC.loader.exec_module(sys.modules["palimpsest"])

import hydra
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from palimpsest.classification.models import pretraining_splits
from palimpsest.common.files import Place, below, exists, folder_of, is_remote, place
from palimpsest.corpora.judging import Judge, same_text
from palimpsest.dataloader import BatchPlan, Loading, TextData
from palimpsest.diffusion import Diffusion, Provenance
from palimpsest.estimators.base import Estimator
from palimpsest.estimators.nelbo import Nelbo, comparison_noising
from palimpsest.evaluation.drawing import Drawing
from palimpsest.evaluation.likelihood import Precision
from palimpsest.evaluation.sampling_inputs import Template
from palimpsest.models.belonging import FUNCTION, check_belongs, check_same, check_together
from palimpsest.models.checkpoints import Checkpoint, read_checkpoint, read_progress
from palimpsest.models.freezing import freeze, refuse_frozen, summary
from palimpsest.models.recompute import recompute_blocks
from palimpsest.objectives.base import Objective
from palimpsest.process import Process
from palimpsest.settings import command_line
from palimpsest.settings.contradictions import check_schedule, is_mlm, law, refuse_contradictions, trains
from palimpsest.settings.from_checkpoint import complete
from palimpsest.settings.identity import identity
from palimpsest.settings.instantiation import instantiate
from palimpsest.settings.values import check_numbers
from palimpsest.training.logs import guard_output
from palimpsest.training.machine import Machine
from palimpsest.training.processes import first_process, started_beside_others
from palimpsest.training.recovery import newest_good
from palimpsest.training.run_lock import alone_in
from palimpsest.training.signals import SIGNALS
from palimpsest.training.slurm import check_processes
from palimpsest.training.trainer import Run, build_trainer

log = logging.getLogger(__name__)

_TEXT_DATA = inspect.signature(TextData).parameters
_FETCHING = ("num_workers", "prefetch_factor", "pin_memory", "persistent_workers")
# What `trainer` says of a run in words of its own, beside the arguments of lightning.Trainer.
_OF_THE_RUN = ("devices", "precision", "accumulate_grad_batches")


class Experiment:
    """Builds what the configuration names, when a task asks for it (see tasks/base.py)."""

    def __init__(self, cfg: DictConfig, command: str, shared: bool = False) -> None:
        self.cfg, self.command, self.seed, self.machine = cfg, command, cfg.seed, Machine(cfg)
        # Checkpoints; all else is written on this machine.
        self._kept_in = place(cfg.checkpointing.save_dir or self._own_folder())
        self._save_dir = self._own_folder() if is_remote(self._kept_in) else self._kept_in
        self.conditional, self.start_from_counts = cfg.classify.sharing == "conditional", cfg.training.start_from_counts
        self._shared, self._data = shared, dict[int | None, TextData]()
        self._encoder = instantiate(cfg.latents) if cfg.latents else None  # of texts into latents

    @cached_property
    def pretraining(self) -> Experiment | None:
        """The training of the weights that the models of all classes start from; None without classify.pretrain."""
        classify = self.cfg.classify
        if not classify.pretrain:
            return None
        splits = pretraining_splits(classify.pretrain, self.data().splits)
        cfg = _shared_start(self.cfg, splits, below(self._kept_in, "pretrained"))
        return Experiment(cfg, self.command, shared=True)

    def patience(self, label: int | None = None) -> int | None:
        """How many validations without a better one end a training, whose best weights then are the model; None for
        one that runs up to trainer.max_steps and ends with its last weights."""
        ordinary = self.folder(label) == self._save_dir and not self.conditional and not self._shared
        return None if ordinary else self.cfg.classify.patience

    def finished(self, label: int | None = None) -> Place | None:
        """The weights of a training that is complete; None where there is something left to do.

        Raises:
            ValueError: the training in the folder has other settings or another tokenizer.
        """
        checkpointing = self.cfg.checkpointing
        if checkpointing.resume_ckpt_path or not checkpointing.resume_from_ckpt:
            return None
        last = newest_good(self.checkpoints(label))
        if last is None:
            return None
        progress, data = read_progress(last), self.data(label)
        ours = {**identity(self.cfg), "data.label": data.label, "tokenizer": data.vocabulary.fingerprint,
                "latents": data.latents and data.latents.fingerprint}  # fmt: skip
        check_same(last, progress, ours)
        patience = self.patience(label)
        stopped = patience is not None and progress.fruitless >= patience
        return self.model_path(label) if stopped or progress.step >= self.cfg.trainer.max_steps else None

    def model_path(self, label: int | None = None) -> Place:
        """The checkpoint of the trained model: with a patience the best by validation, if one ran, else the last."""
        last = newest_good(self.checkpoints(label))
        best = read_progress(last).best if self.patience(label) is not None and last else None
        return best if best and exists(best) else last or below(self.checkpoints(label), "last.ckpt")

    def _own_folder(self) -> Path:
        digest = hashlib.sha256(json.dumps(identity(self.cfg), sort_keys=True).encode()).hexdigest()
        return Path(self.cfg.output_dir) / self.cfg.data.name / f"{self.cfg.model.name}-{digest[:8]}"

    def folder(self, label: int | None = None) -> Path:
        """Where a run and its results live: the experiment's folder, or that of one class's model below it."""
        label = self.cfg.data.label if label is None else label
        return self._save_dir if label is None else self._save_dir / f"label={label}"

    def checkpoints(self, label: int | None = None) -> Place:
        """Where the checkpoints of a run are: in its folder, or below the address checkpointing.save_dir."""
        below_it = self.folder(label).relative_to(self._save_dir).parts
        return below(self._kept_in, *below_it, "checkpoints")

    def alone(self, label: int | None = None) -> AbstractContextManager[None]:
        """A context in which no other process trains in the run's folder (training/run_lock.py). The first of several
        processes sees to it; where others were started beside it, it cannot let them wait."""
        if not first_process():
            return nullcontext()
        return alone_in(self.folder(label), wait=not started_beside_others())

    @property
    def settings(self) -> str:
        return OmegaConf.to_yaml(self.cfg, resolve=True)

    @property
    def facts(self) -> dict[str, object]:
        data, prefix = self.data(), self.cfg.training.prefix_length
        with torch.device("meta"):
            parameters = sum(p.numel() for p in self._backbone(data, self._process(data).vocab_size).parameters())
        return {"data": self.cfg.data.name, "tokenizer": f"{self.cfg.data.tokenizer_name_or_path}, "
                f"{data.vocabulary.size} types", "network": f"{self.cfg.model.name}, {parameters:,} parameters",
                "length": self.cfg.model.length, "seed": self.seed, "device": self.machine.name,
                **({"given": f"the first {prefix} tokens of each text"} if prefix else {})}  # fmt: skip

    @property
    def drawing(self) -> Drawing:
        given = Template(self.cfg.sampling.prefix, self.cfg.sampling.template, self.cfg.sampling.max_length)
        settings = OmegaConf.to_container(self.cfg.sampler, resolve=True)
        protocol = {"sampler": settings.pop("_target_"), **settings, **asdict(given)}
        return Drawing(instantiate(self.cfg.sampler), given, protocol, self.cfg.sampling.var_length)

    @property
    def protocol(self) -> dict[str, object]:
        """What is measured: which law, which weights, which random numbers."""
        keys = ("T", "subs_masking", "time_conditioning", "training.ignore_bos", "trainer.precision", "seed",
                "eval.checkpoint_path", "eval.disable_ema")  # fmt: skip
        settings = {key: OmegaConf.select(self.cfg, key) for key in keys}
        if law(self.cfg) == "bd3lm":
            keys = ("block_size", "parameterization.ignore_bos", "data.segments")
            settings |= {key: OmegaConf.select(self.cfg, key) for key in keys}
        return {"parameterization": law(self.cfg), "noise": self.cfg.noise._target_, **settings}

    @property
    def estimator(self) -> Estimator:
        return instantiate(self.cfg.estimator)

    @property
    def precision(self) -> Precision:
        ev = self.cfg.eval
        return Precision(ev.num_draws, ev.target_se, ev.max_draws)

    @cached_property
    def truth(self) -> object | None:
        """The corpus's own law, if it has one and rows are its texts token by token, so that the two compare."""
        data = self.cfg.data
        whole = not data.wrap and not self.cfg.training.prefix_length
        comparable = whole and not data.get("score_special") and data.tokenizer_name_or_path == "word"
        return instantiate(data.get("truth")) if comparable else None

    @property
    def judge(self) -> Judge:
        """Of completed prompts: the data set's own, else whether they are the reference's text."""
        return instantiate(self.cfg.data.get("judge")) or same_text

    def data(self, label: int | None = None) -> TextData:
        label = self.cfg.data.label if label is None else label
        if label not in self._data:
            loader, machine = self.cfg.loader, self.machine
            self._data[label] = TextData(
                instantiate(self.cfg.data.source), label=label, length=self.cfg.model.length, **_of_texts(self.cfg),
                batch_size=machine.micro_batch, eval_batch_size=machine.eval_batch, batch_ramp=machine.ramp,
                global_batch_size=loader.global_batch_size, max_steps=self.cfg.trainer.max_steps, seed=self.seed,
                prefix_length=self.cfg.training.prefix_length,
                first_given=self.cfg.parameterization.get("ignore_bos", self.cfg.training.ignore_bos),
                stream=instantiate(self.cfg.streaming), loading=Loading(**{key: loader[key] for key in _FETCHING}),
                latents=self._encoder,
            )  # fmt: skip
        return self._data[label]

    def diffusion(self, data: TextData) -> Diffusion:
        lightning.seed_everything(self.seed, verbose=False)
        vocabulary = data.vocabulary
        process = self._process(data)
        objective = instantiate(self.cfg.parameterization, process=process)
        backbone = self._backbone(data, process.vocab_size)
        check_together(data, objective, backbone)
        freeze(backbone, self.cfg.training.freeze)
        if self.cfg.training.gradient_checkpointing:
            recompute_blocks(backbone)
        # backbone=hf_* leaves sizes open in the configuration; what is saved says those that were found.
        settings = identity(self.cfg)
        settings |= {k: v for k, v in backbone.settings.items() if settings.get(k) is None}
        known = {"configuration": settings, "tokenizer": vocabulary.fingerprint, "label": data.label}
        known |= {} if data.latents is None else {"latents": data.latents.facts}
        return Diffusion(
            backbone, objective, instantiate(self.cfg.optim), instantiate(self.cfg.lr_scheduler),
            self.cfg.training.ema, self.seed, data.plan, known, self.cfg.classify.label_dropout,
        )  # fmt: skip

    def _process(self, data: TextData) -> Process:
        known = data.vocabulary
        return instantiate(self.cfg.process, vocab_size=known.size, own_size=known.own_size, mask_id=known.mask_id)

    def _backbone(self, data: TextData, vocab_size: int) -> torch.nn.Module:
        cfg = self.cfg.copy()  # with the files of this class's model, in which backbone=hf_* find their sizes
        resumed = self.resume_path(data.label) or (self.resume_path(0) if data.label is None else None)
        cfg.checkpointing.resume_ckpt_path = str(resumed) if resumed else None
        cfg.eval.checkpoint_path = _of_class(cfg.eval.checkpoint_path, data.label or 0)
        conditional = cfg.classify.sharing == "conditional"
        told = {"num_classes": len(data.label_names or ())} if conditional else {}
        if data.latents is not None and "latent_size" in cfg.backbone:
            told["latent_shape"] = data.latents.shape
        return instantiate(cfg.backbone, vocab_size=vocab_size, **told)

    def trained(self, data: TextData, checkpoint_path: str, disable_ema: bool) -> Diffusion:
        """The model with the weights of `checkpoint_path`, or of this configuration's own last checkpoint if that is
        empty; on the device it will run on. Refuses weights that belong to something else."""
        path = _of_class(checkpoint_path, data.label) or self.model_path()
        if not checkpoint_path and not exists(path):
            raise FileNotFoundError(
                f"this configuration has no trained model at {path}: train it (the same command with mode=train), "
                "or name one with eval.checkpoint_path="
            )
        checkpoint = read_checkpoint(path)
        shape = (*FUNCTION, "model.mask_padding", "block_size", "data.segments", "data.segment_room")
        self._write_behind_a_window(checkpoint)
        _warn_of_length(checkpoint, self.cfg.model.length)
        shape += ("model.length",) if "configuration" in checkpoint.identity and not self._any_length else ()
        check_belongs(checkpoint, identity(self.cfg), (*shape, "parameterization"), data)
        diffusion = self.diffusion(data)
        checkpoint.load_into(diffusion.backbone, use_ema=not disable_ema)
        diffusion.ema = None
        averaged = checkpoint.ema is not None and not disable_ema
        length = checkpoint.settings.get("model.length")
        diffusion.provenance = Provenance(str(path), checkpoint.step, averaged, length)
        return diffusion.eval().to(self.machine.device)

    @property
    def _any_length(self) -> bool:
        """Whether texts may be longer than those of the training: block diffusion writes on behind a window."""
        sampled = self.cfg.mode._target_ == "palimpsest.tasks.sample_eval.sample_eval"
        return law(self.cfg) == "bd3lm" and sampled and not self.cfg.data.get("segments")

    def _write_behind_a_window(self, checkpoint: Checkpoint) -> None:
        """Limit what a token sees to the lengths of the training, unless sampling.context says otherwise."""
        longest, length = checkpoint.settings.get("model.length"), self.cfg.model.length
        if law(self.cfg) != "bd3lm" or not longest or length <= longest:
            return
        if not self._any_length:
            raise ValueError(
                f"model.length={length} is longer than the {longest} tokens that {checkpoint.path} was trained on; "
                "texts can be written on behind a window (mode=sample_eval), but not measured, nor can segments"
            )
        if self.cfg.sampling.context is None:
            self.cfg.sampling.context = longest // self.cfg.block_size * self.cfg.block_size

    def start_from_pretrained(self, diffusion: Diffusion, data: TextData, shared: Place | None) -> Place | None:
        """Give a new training the averaged weights of `shared`, those of training.from_pretrained, of the file that
        backbone=hf_dit was built from, or those that the backbone itself names (hf_causal, hf_mlm); returns where
        they lie. Refuses weights that belong to something else, before anything changes."""
        named = {"classify.pretrain": shared, "training.from_pretrained": self.cfg.training.from_pretrained,
                 "eval.checkpoint_path": _of_class(self.cfg.backbone.get("checkpoint_path"), data.label)}  # fmt: skip
        key = next((key for key, path in named.items() if path), None)
        if key is not None:
            checkpoint = read_checkpoint(named[key], key)
            check_belongs(checkpoint, diffusion.identity["configuration"], FUNCTION, data)
        else:
            checkpoint = diffusion.backbone.pretrained()
        if checkpoint is None:
            refuse_frozen(diffusion.backbone, dict(diffusion.backbone.named_parameters()))
            return None
        new = diffusion.start_from(checkpoint, use_ema=shared is not None or not self.cfg.eval.disable_ema)
        if new:
            print(f"not in {checkpoint.path}, so begun anew: {summary(new)}")
        return checkpoint.path

    def resume_path(self, label: int | None = None) -> Place | None:
        """The checkpoint to go on from, if there is one and checkpointing.resume_from_ckpt allows it."""
        typed = self.cfg.checkpointing.resume_ckpt_path
        path = place(typed, "checkpointing.resume_ckpt_path") if typed else None
        if path and not exists(path):
            raise FileNotFoundError(f"checkpointing.resume_ckpt_path={typed}: there is no such file")
        return (path or newest_good(self.checkpoints(label))) if self.cfg.checkpointing.resume_from_ckpt else None

    def trainer(self, title: str, label: int | None = None) -> lightning.Trainer:
        """A Trainer that logs and saves below `folder(label)`."""
        cfg, machine = self.cfg.copy(), self.machine
        fitting = title.startswith("train")
        cfg.checkpointing.save_dir = str(folder_of(self.checkpoints(label)))
        callbacks = [instantiate(node) for node in _callbacks(cfg)] if fitting else []
        cfg.checkpointing.save_dir = str(self.folder(label))
        run = Run(
            title, fitting, devices=machine.devices, accumulate=machine.accumulate, precision=machine.precision,
            patience=self.patience(label) if fitting else None, max_skipped_steps=cfg.training.max_skipped_steps,
            max_failed_saves=cfg.checkpointing.max_failed_saves, folder=self.folder(label),
            checkpoints=self.checkpoints(label), command=self.command, settings=self.settings, callbacks=callbacks,
            loggers=[instantiate(node) for node in (cfg.get("logger") or {}).values()] if fitting else [],
            strategy=instantiate(cfg.strategy),
        )  # fmt: skip
        settings = {k: v for k, v in OmegaConf.to_container(cfg.trainer, resolve=True).items() if k not in _OF_THE_RUN}
        return build_trainer(run, settings)


def _of_texts(cfg: DictConfig) -> dict[str, object]:
    """Settings of the group `data` that a TextData takes."""
    settings = {k: v for k, v in cfg.data.items() if k in _TEXT_DATA and k not in ("label", "source")}
    if is_mlm(cfg) and settings.get("score_special") is None:
        settings["score_special"] = False
    return settings


def _shared_start(cfg: DictConfig, splits: list[str], folder: Place) -> DictConfig:
    """The configuration of the training on `splits` from whose weights the models of all classes start."""
    cfg = cfg.copy()
    changes = {"data.train_splits": splits, "data.label": None, "trainer.max_steps": int(cfg.classify.pretrain_steps),
               "classify.pretrain": None, "training.freeze": None, "checkpointing.save_dir": str(folder),
               "checkpointing.resume_ckpt_path": None}  # fmt: skip
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def _check_ramp(experiment: Experiment) -> None:
    """Raises ValueError where a training that the command asks for would end before its batch ramp does."""
    cfg = experiment.cfg
    plan = BatchPlan.of(cfg.loader.global_batch_size, experiment.machine.ramp)
    if trains(cfg):
        plan.check_reached(cfg.trainer.max_steps)
        if cfg.classify.pretrain:
            plan.check_reached(cfg.classify.pretrain_steps, "classify.pretrain_steps")


def _callbacks(cfg: DictConfig) -> list[DictConfig]:
    """What is called back during a fit: the group `callbacks`, and `plateau` where it is chosen."""
    return [*(cfg.get("callbacks") or {}).values(), *([cfg.plateau] if cfg.plateau else [])]


def _warn_of_length(checkpoint: Checkpoint, length: int) -> None:
    trained = checkpoint.settings.get("model.length")
    if trained not in (None, length):
        log.warning(
            "model.length=%d: %s was trained on texts of %d tokens, and is used on others; leave model.length out for "
            "the length of its training", length, checkpoint.path, trained,
        )  # fmt: skip


def _of_class(path: str | None, label: int | None) -> str:
    """`path` with the number of the class in place of {label}."""
    return (path or "").replace("{label}", "{label}" if label is None else str(label))


def checked(cfg: DictConfig, command: str) -> Experiment:
    """The experiment of a configuration, after all that can be said against it before data are read.

    Raises:
        ValueError, OSError: a setting is none, contradicts another one, or names what does not exist.
    """
    check_numbers(cfg)
    refuse_contradictions(cfg)
    check_schedule(cfg)
    instantiate(cfg.lr_scheduler)(torch.optim.SGD([torch.zeros(1)]))  # what it refuses, before any data are read
    experiment = Experiment(cfg, command)
    experiment.drawing, experiment.estimator  # noqa: B018 - what they refuse, likewise
    process = instantiate(cfg.process, vocab_size=2, own_size=1, mask_id=0)
    _check_measuring(experiment, instantiate(cfg.parameterization, process=process))
    check_processes(experiment.machine.devices, cfg.trainer.num_nodes)
    _check_ramp(experiment)
    return experiment


def _check_measuring(experiment: Experiment, objective: Objective) -> None:
    """Raise ValueError if the objective cannot be measured as eval.estimator says, before anything is trained."""
    if isinstance(experiment.estimator, Nelbo):
        objective.bound(experiment.estimator.noising)
        if experiment.cfg.mode._target_ == "palimpsest.tasks.classify.classify":
            objective.bound(comparison_noising(experiment.estimator, objective))


def run(cfg: DictConfig, command: str) -> dict[str, object]:
    """Build the experiment and run the task that `mode` names; returns its results."""
    experiment = checked(cfg, command)
    torch.set_float32_matmul_precision("high")
    if is_remote(experiment.checkpoints()):
        print(f"checkpoints: {experiment.checkpoints()}; logs, reports and results, here: {experiment.folder()}")
    return instantiate(cfg.mode)(experiment)


def job(cfg: DictConfig) -> None:
    """What a process started by hand, by SLURM or by a launcher of Hydra does: one command, ended by signals."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    if not first_process():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end: what is said is said once
    guard_output()
    with command_line.clear_errors():  # here, before Hydra tells of them in its own words
        words = list(HydraConfig.get().overrides.task)
        command_line.refuse_unknown_additions(cfg, words)
        command = " ".join(["python main.py", *words])
        with SIGNALS.listening():
            run(cfg, command)


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def _hydra_main(cfg: DictConfig) -> None:
    # By its name: a launcher that sends this function to another process (submitit) would send all that it mentions.
    importlib.import_module("palimpsest.main").job(cfg)


def main() -> None:
    guard_output()
    with command_line.clear_errors():
        sys.argv[1:] = complete(command_line.translate(sys.argv[1:]))
        _hydra_main()
    SIGNALS.finished()


if __name__ == "__main__":
    main()
