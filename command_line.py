"""The command line: the references' spellings translated, mistakes explained in one message."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIGS = Path(__file__).parent / "configs"

# Keys of the references under their names here. What names a choice is a group: its members are files in configs/.
ALIASES = {"sampling.predictor": "sampler", "training.masking": "masking", "eval.estimator": "estimator",
           "hydra.run.dir": "checkpointing.save_dir", "+wandb.offline": "wandb.offline",
           "sampling.logdir": "checkpointing.save_dir", "algo.T": "sampling.steps",
           "algo.time_conditioning": "time_conditioning", "algo.ignore_bos": "training.ignore_bos",
           "algo.clip_search_widths": "training.clip_search_widths",
           "algo.clip_search_delta": "training.clip_search_delta", "algo.fix_clipping": "training.fix_clipping",
           **{f"+data.insert_{split}_{what}": f"data.insert_{split}_{what}"
              for split in ("train", "valid") for what in ("special", "eos")}}  # fmt: skip
# Settings of kuleshov-group/bd3lms that have one value here, under which they say nothing.
SETTLED = {"algo.sampler": "semi_ar", "algo.cross_attn": "true", "algo.var_min": "true", "training.eval_nll": "true",
           "algo.T": "0"}  # fmt: skip
# Groups that kuleshov-group/bd3lms spells otherwise: its key -> (our group, its choices in our words).
_BACKBONES = tuple(path.stem for path in sorted((CONFIGS / "backbone").glob("*.yaml")))
SPELLINGS = {"algo": ("parameterization", {"mdlm": "subs", "sedd": "sedd", "d3pm": "d3pm", "ar": "ar",
                                           "bd3lm": "bd3lm", "mlm": "mlm", "mmldlm": "mmldlm"}),
             "algo.backbone": ("backbone", {name: name for name in _BACKBONES})}  # fmt: skip
# Texts: their brackets, commas and braces are not Hydra's.
TEXTS = ("sampling.prefix", "sampling.template")
_QUOTED = re.compile(r"""(["'])(?:(?!\1)[^\\]|\\.)*\1""", re.DOTALL)
# Keys whose values are paths: runs/label=0/last.ckpt and {label}.ckpt mean something else to Hydra unless quoted.
PATHS = ("eval.checkpoint_path", "training.from_pretrained", "checkpointing.save_dir", "checkpointing.resume_ckpt_path",
         "data.path", "backbone.name_or_path", "latents.path", "latents.checkpoint_path",
         "latents.name_or_path")  # fmt: skip


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
        if SETTLED.get(key) == value.lower():
            continue
        if key in SETTLED and key not in ALIASES:
            raise ValueError(f"{argument}: here it is always {SETTLED[key]}; leave it out")
        if key == "algo.mdlm_loss_scale":  # the log-linear schedule of mdlm, or exactly alpha = 1 - t
            key, value = "noise.eps", "0.001" if value.lower() == "true" else "0"
        key = key if started and key == "hydra.run.dir" else ALIASES.get(key, key)
        if key in TEXTS and value not in ("", "null") and not _QUOTED.fullmatch(value):
            value = in_quotes(value)
        if key in PATHS and re.search("[={}]", value) and not re.search(r"""["'\\,]""", value):
            value = f"'{value}'"
        out.append(f"{key}{equals}{value}")
    return _semi_ar(out)


def in_quotes(text: str) -> str:
    """`text` for the right side of an argument, taken letter by letter: no quote, backslash or ${} of it is Hydra's."""
    text = re.sub(r"(\\*)\$\{", lambda slashes: slashes[1] * 2 + "\\${", text)
    return QuotedString(text, Quote.double).with_quotes()


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


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn a user's mistakes into one message and exit status 2; HYDRA_FULL_ERROR=1 shows tracebacks instead."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        yield
        return
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own version of the story and exits
    try:
        yield
    except (HydraException, OmegaConfBaseException, ValueError, OSError, FloatingPointError) as error:
        print(f"\nerror: {explain(error)}\n(HYDRA_FULL_ERROR=1 shows where it was raised)", file=sys.stderr)
        sys.exit(2)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        os.environ |= {} if before is None else {"HYDRA_FULL_ERROR": before}


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


def _part(path: Path, group: str) -> DictConfig:
    """What a choice's file says of its own group."""
    loaded = OmegaConf.load(path)
    return loaded.get(group, loaded)


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
    others = [path.stem for path in sorted((CONFIGS / prefix.rstrip(".")).glob("*.yaml"))
              if parent and OmegaConf.select(_part(path, parent), name) is not None]  # fmt: skip
    guess += f" It is a key of {parent}={', '.join(others)}." if others else ""
    listing = f"\n  what {parent or 'the configuration'} has: {', '.join(existing)}" if existing else ""
    return f"there is no key {key}.{guess}{listing}"
