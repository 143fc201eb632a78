"""The command line: the references' spellings translated, mistakes explained in one message."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"

# Keys of the references under their names here. What names a choice is a group: its members are files in configs/.
ALIASES = {"sampling.predictor": "sampler", "training.masking": "masking", "eval.estimator": "estimator",
           "hydra.run.dir": "checkpointing.save_dir", "+wandb.offline": "wandb.offline"}  # fmt: skip
# Groups that kuleshov-group/bd3lms spells otherwise: its key -> (our group, its choices in our words).
_BACKBONES = tuple(path.stem for path in sorted((CONFIGS / "backbone").glob("*.yaml")))
SPELLINGS = {"algo": ("parameterization", {"mdlm": "subs", "sedd": "sedd", "d3pm": "d3pm", "ar": "ar"}),
             "algo.backbone": ("backbone", {name: name for name in _BACKBONES})}  # fmt: skip
# Texts: their brackets, commas and braces are not Hydra's.
TEXTS = ("sampling.prefix", "sampling.template")
# Keys whose values are paths: runs/label=0/last.ckpt and {label}.ckpt mean something else to Hydra unless quoted.
PATHS = ("eval.checkpoint_path", "training.from_pretrained", "checkpointing.save_dir", "checkpointing.resume_ckpt_path",
         "data.path", "backbone.name_or_path")  # fmt: skip


def translate(arguments: list[str]) -> list[str]:
    """Command-line arguments with the references' spellings replaced by ours, and paths quoted where Hydra needs it.

    Raises:
        ValueError: a spelling that has no meaning here, or two that contradict each other.
    """
    out = []
    # Lightning starts its other processes with the first one's hydra.run.dir, which is not the user's.
    started = any(argument.startswith("hydra.job.name=train_ddp_process_") for argument in arguments)
    for argument in _algo(arguments):
        key, equals, value = argument.partition("=")
        key = key if started and key == "hydra.run.dir" else ALIASES.get(key, key)
        if key in TEXTS and value not in ("", "null") and value[0] not in "'\"":
            value = json.dumps(value, ensure_ascii=False)
        if key in PATHS and re.search("[={}]", value) and not re.search(r"""["'\\,]""", value):
            value = f"'{value}'"
        out.append(f"{key}{equals}{value}")
    return _semi_ar(out)


def _algo(arguments: list[str]) -> list[str]:
    """`algo=mdlm` and `algo.backbone=dit` as `parameterization=subs` and `backbone=dit`.

    Raises:
        ValueError: a choice that does not exist, or another one under our own key.
    """
    for theirs, (ours, choices) in SPELLINGS.items():
        typed = [argument for argument in arguments if argument.startswith(f"{theirs}=")]
        if not typed:
            continue
        for argument in typed:
            if argument.partition("=")[2] not in choices:
                known = ", ".join(f"{theirs}={name}" for name in choices)
                raise ValueError(f"{argument} is unknown; what exists: {known} (the same as {ours}=)")
        own = [argument for argument in arguments if argument.startswith(f"{ours}=")]
        meant = {f"{ours}={choices[argument.partition('=')[2]]}" for argument in typed}
        if len(meant | set(own)) > 1:
            raise ValueError(
                f"{' '.join([*typed, *own])} contradict each other: {theirs}= is another spelling of {ours}= "
                f"({typed[0]} means {ours}={choices[typed[0].partition('=')[2]]}); keep one of them"
            )
        arguments = [*(argument for argument in arguments if argument not in (*typed, *own)), *meant]
    return arguments


def _semi_ar(arguments: list[str]) -> list[str]:
    """The references' flag sampling.semi_ar is a sampler here; its windows are filled by ancestral sampling.

    Raises:
        ValueError: it is neither true nor false, or another sampler is chosen beside it.
    """
    flags = [a.partition("=")[2].lower() for a in arguments if a.startswith("sampling.semi_ar=")]
    rest = [a for a in arguments if not a.startswith("sampling.semi_ar=")]
    if not set(flags) <= {"true", "false"}:
        raise ValueError(f"sampling.semi_ar={flags[-1]} must be true or false")
    if flags[-1:] != ["true"]:
        return rest
    others = [a for a in rest if a.startswith("sampler=") and a not in ("sampler=ddpm", "sampler=ddpm_cache")]
    if others and others != ["sampler=semi_ar"]:
        raise ValueError(
            f"sampling.semi_ar=true fills its windows by ddpm_cache, which contradicts {others[-1]} (the same as "
            "sampling.predictor=); leave one of them out"
        )
    return [*(a for a in rest if not a.startswith("sampler=")), "sampler=semi_ar"]


def compose_config(overrides: list[str]) -> DictConfig:
    """The configuration that these arguments make, without running anything."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=translate(overrides))


def law(cfg: DictConfig) -> str:
    """The objective's name as typed: subs, d3pm, sedd, ar."""
    return cfg.parameterization._target_.rpartition(".")[2].lower()


def trains(cfg: DictConfig) -> bool:
    """Whether the command trains, or may."""
    return cfg.mode._target_ in ("tasks.train.train", "tasks.classify.classify")


# Numbers that are handed on far before they are used: a word in their place is a mistake to name here.
WHOLE = ("seed", "T", "sampling.steps", "sampling.stride_length", "sampling.num_strides", "sampling.tokens_per_step",
         "sampling.num_sample_batches", "sampling.num_sample_log", "sampling.top_k", "eval.num_draws", "eval.max_draws",
         "eval.perplexity_batch_size", "classify.num_draws", "classify.num_examples", "classify.patience",
         "classify.pretrain_steps", "trainer.max_steps", "model.length", "loader.batch_size",
         "loader.global_batch_size", "trainer.num_nodes", "trainer.accumulate_grad_batches",
         "lr_scheduler.num_warmup_steps", "lr_scheduler.num_rewarmup_steps", "plateau.patience", "plateau.cooldown",
         "training.max_skipped_steps", "loader.num_workers", "loader.prefetch_factor")  # fmt: skip
REAL = ("sampling.temperature", "sampling.nucleus_p", "eval.target_se", "training.ema", "training.sampling_eps",
        "classify.confidence", "classify.label_dropout", "lr_scheduler.min_ratio", "lr_scheduler.peak_decay",
        "lr_scheduler.decay_share", "plateau.factor", "plateau.floor", "plateau.min_delta")  # fmt: skip
FLAGS = ("classify.calibrate", "classify.baselines", "training.start_from_counts", "training.gradient_checkpointing",
         "loader.pin_memory", "loader.persistent_workers")  # fmt: skip


NEVER_NULL = ("lr_scheduler.", "plateau.", "loader.global_batch_size", "trainer.max_steps")


def check_numbers(cfg: DictConfig) -> None:
    """Raises ValueError for a word, or a broken number, where a (whole) number belongs."""
    for key in (*WHOLE, *REAL):
        value = OmegaConf.select(cfg, key, default="absent")  # a key of a choice that is not made
        kinds = int if key in WHOLE else (int, float)
        if value == "absent" or (value is None and not key.startswith(NEVER_NULL)):
            continue
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise ValueError(f"{key}={'null' if value is None else value} must be a "
                             f"{'whole ' if key in WHOLE else ''}number")  # fmt: skip
    for key in FLAGS:
        if not isinstance(OmegaConf.select(cfg, key), bool):
            raise ValueError(f"{key}={OmegaConf.select(cfg, key)} must be true or false")
    if isinstance(cfg.classify.compare, str):
        raise ValueError(
            f"classify.compare={cfg.classify.compare} must be a list: classify.compare='[{cfg.classify.compare}]'"
        )
    if cfg.seed < 0:
        raise ValueError(f"seed={cfg.seed} must be 0 or more")
    for key in ("patience", "pretrain_steps"):
        if cfg.classify[key] is not None and cfg.classify[key] < 1:
            raise ValueError(f"classify.{key}={cfg.classify[key]} must be at least 1")


def refuse_contradictions(cfg: DictConfig) -> None:
    """Raises ValueError for settings that can not all be meant, with the reason."""
    training, name = cfg.training, law(cfg)
    unread = {
        "time_conditioning": cfg.time_conditioning and name == "ar",
        "T": cfg.T and name in ("ar", "sedd"),
        "subs_masking": cfg.subs_masking and name in ("ar", "sedd"),
        "training.importance_sampling": training.importance_sampling and name in ("ar", "d3pm"),
        "training.change_of_variables": training.change_of_variables and name != "subs",
        "training.loss_weight": training.loss_weight != "elbo" and name != "subs",
        "classify.masks": cfg.classify.masks == "independent" and name == "ar",
        "training.masking": name == "ar" and not cfg.masking._target_.endswith("Bernoulli"),
    }
    for key, contradicts in unread.items():
        if contradicts:
            value = cfg.masking._target_ if key == "training.masking" else OmegaConf.select(cfg, key)
            raise ValueError(f"{key}={value} means nothing to parameterization={name}; leave it out")
    if cfg.classify.sharing not in ("per_class", "conditional"):
        raise ValueError(f"classify.sharing={cfg.classify.sharing} is unknown; choose per_class or conditional")
    if cfg.classify.sharing == "conditional":
        _check_conditional(cfg)
    _check_start(cfg)
    clipped = cfg.noise._target_.endswith(".Clipped")
    if clipped and (name != "subs" or not cfg.masking._target_.endswith("Bernoulli") or cfg.T):
        raise ValueError(
            "noise=clipped limits the mask rates of parameterization=subs training.masking=bernoulli T=0; "
            f"with parameterization={name}, {cfg.masking._target_}, T={cfg.T} it would do nothing"
        )
    if name == "sedd" and not cfg.time_conditioning:
        raise ValueError(
            "parameterization=sedd with time_conditioning=false: the scale of its scores is a function of t, which the "
            "network then can not see; set time_conditioning=true"
        )
    if training.importance_sampling and training.change_of_variables:
        raise ValueError(
            "training.importance_sampling=true and training.change_of_variables=true are two forms of the same change; "
            "keep one"
        )
    if training.change_of_variables and not cfg.time_conditioning:
        raise ValueError(
            "training.change_of_variables=true changes what a time-conditioned network is shown, and "
            "time_conditioning=false shows it nothing; use training.importance_sampling=true"
        )
    if not cfg.masking._target_.endswith("Bernoulli") and (training.importance_sampling or cfg.T):
        raise ValueError(
            f"training.masking={cfg.masking._target_} integrates t out, so that T={cfg.T} and "
            f"training.importance_sampling={training.importance_sampling} have nothing to act on; leave them out"
        )


def check_schedule(cfg: DictConfig) -> None:
    """The learning-rate schedule and the length of the training must belong together.

    Raises ValueError where the schedule counts to another end, or warms up from a negative step. Warns of a warm-up
    that the training never leaves: it may be a trial.
    """
    steps, schedule = cfg.trainer.max_steps, cfg.lr_scheduler
    total, warmup = schedule.get("num_training_steps", steps), schedule.get("num_warmup_steps", 0)
    if total != steps:
        raise ValueError(
            f"lr_scheduler.num_training_steps={total} contradicts trainer.max_steps={steps}, where the training ends; "
            "leave the first out, it follows the second"
        )
    if warmup < 0:
        raise ValueError(f"lr_scheduler.num_warmup_steps={warmup} must be 0 or more")
    if trains(cfg) and warmup >= steps > 0:
        log.warning(
            "lr_scheduler.num_warmup_steps=%d is not below trainer.max_steps=%d: the whole training is warm-up, and "
            "the learning rate never reaches optim.lr; set lr_scheduler.num_warmup_steps=%d or so",
            warmup, steps, steps // 20,
        )  # fmt: skip


def _check_conditional(cfg: DictConfig) -> None:
    network = cfg.backbone._target_
    if network not in ("models.dit.DiT", "models.ar.AR"):
        raise ValueError(
            f"classify.sharing=conditional needs a network that can be told a class, backbone=dit or ar; {network} can "
            "not, so use classify.sharing=per_class"
        )
    if cfg.data.label is not None:
        raise ValueError(
            f"classify.sharing=conditional is one network for all classes, and data.label={cfg.data.label} is one "
            "class; leave one of them out"
        )
    if not 0 <= cfg.classify.label_dropout <= 1:
        raise ValueError(f"classify.label_dropout={cfg.classify.label_dropout} must lie in [0, 1]")
    if cfg.data.wrap:
        raise ValueError(
            "classify.sharing=conditional with data.wrap=true: a chunk of several texts has no class to be told; set "
            "data.wrap=false"
        )


def _check_start(cfg: DictConfig) -> None:
    """Weights have one beginning."""
    pretrain, sharing = cfg.classify.pretrain, cfg.classify.sharing
    for key in ("training.from_pretrained", "eval.checkpoint_path"):
        if pretrain and OmegaConf.select(cfg, key):
            raise ValueError(
                f"classify.pretrain={pretrain} trains what the models start from, and {key}="
                f"{OmegaConf.select(cfg, key)} names it; leave one of them out"
            )
    if pretrain and cfg.mode._target_ == "tasks.train.train" and sharing == "per_class" and cfg.data.label is None:
        raise ValueError(
            f"classify.pretrain={pretrain} starts the models of classes, and mode=train without data.label trains one "
            "model of all texts; set data.label, mode=classify or classify.sharing=conditional"
        )
    if cfg.training.start_from_counts and cfg.training.from_pretrained:
        raise ValueError(
            "training.start_from_counts=true is where new weights begin, and training.from_pretrained="
            f"{cfg.training.from_pretrained} brings others; leave one of them out"
        )


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn a user's mistakes into one message and exit status 2; HYDRA_FULL_ERROR=1 shows tracebacks instead."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own version of the story and exits
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, OSError, FloatingPointError) as error:
        print(f"\nerror: {explain(error)}\n(HYDRA_FULL_ERROR=1 shows where it was raised)", file=sys.stderr)
        sys.exit(2)


def explain(error: BaseException) -> str:
    """One message that names the key, the value and the remedy."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return explain(error.__cause__)
    chain: BaseException | None = error
    while chain is not None:
        unknown = getattr(chain, "full_key", None)
        if unknown and "not in struct" in str(chain):
            return _unknown_key(unknown)
        chain = chain.__cause__
    return str(error)


def _unknown_key(key: str) -> str:
    cfg = compose_config([])
    parent, _, name = key.rpartition(".")
    while parent and not OmegaConf.is_dict(OmegaConf.select(cfg, parent)):
        parent, _, name = parent.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    existing = sorted(str(k) for k in node if not str(k).startswith("_"))
    close = difflib.get_close_matches(name, existing, n=1)
    prefix = f"{parent}." if parent else ""
    guess = f" Did you mean {prefix}{close[0]}?" if close else ""
    return f"there is no key {key}.{guess}\n  what {parent or 'the configuration'} has: {', '.join(existing)}"
