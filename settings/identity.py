"""The identity of a training: the part of the configuration that determines the weights.

Also the command line that rebuilds the identity stored in a checkpoint.
"""

import re
from collections.abc import Mapping

from omegaconf import DictConfig, OmegaConf

from palimpsest.common.messages import plain
from palimpsest.settings.command_line import compose_config, in_quotes
from palimpsest.settings.declared import CONFIGS, marks
from palimpsest.settings.instantiation import class_built_by
from palimpsest.settings.names import current_path, permanent_path

# Groups and keys that a training depends on, except settings that are marked otherwise (common/values.py).
IDENTITY = ("data", "latents", "model", "backbone", "parameterization", "noise", "masking", "T", "subs_masking",
            "time_conditioning", "optim", "lr_scheduler", "plateau", "training", "seed", "loader.global_batch_size",
            "loader.batch_ramp", "trainer.gradient_clip_val",
            "trainer.gradient_clip_algorithm", "process.word_share")  # fmt: skip
# Groups whose fingerprints have always contained settings that are left out elsewhere while they are false.
_ALWAYS = ("parameterization.within.", "parameterization.text.")
_ABSENT = object()


def identity(cfg: DictConfig) -> dict[str, object]:
    """Return the part of the configuration that determines the weights, flat: key as typed -> value."""
    flat: dict[str, object] = {}
    present = _targets(cfg)

    def visit(key: str, node: object, target: str | None) -> None:
        if isinstance(node, dict):
            own = node.get("_target_")
            for name, child in node.items():
                visit(f"{key}.{name}", child, own if not name.startswith("_") else None)
        elif not key.startswith("data.judge") and (
            _is_part(marks(key, target, present), node) or (key.startswith(_ALWAYS) and node is not None)
        ):
            flat[key] = permanent_path(node) if key.endswith("._target_") else node

    for key in IDENTITY:
        node = OmegaConf.select(cfg, key, default=_ABSENT)
        if node is _ABSENT:
            continue
        own = _target_around(cfg, key)
        visit(key, OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node, own)
    objective = class_built_by(cfg.parameterization).name
    return {**_with_conditions(flat, cfg, objective), "parameterization": objective}


def _is_part(marked: frozenset[str], value: object) -> bool:
    return not marked & {"FREE", "COPY"} and ("IF_SET" not in marked or bool(value))


def _targets(cfg: DictConfig) -> frozenset[str]:
    """Return the paths of all components of a configuration."""
    found, open_ = set(), [OmegaConf.to_container(cfg)]
    while open_:
        node = open_.pop()
        if isinstance(node, dict):
            found |= {current_path(node["_target_"])} if isinstance(node.get("_target_"), str) else set()
            open_ += node.values()
    return frozenset(found)


def _with_conditions(flat: dict[str, object], cfg: DictConfig, objective: str) -> dict[str, object]:
    """Add and remove the settings that a training depends on only under some conditions."""
    if not (cfg.classify.pretrain or cfg.data.get("train_splits")):  # nothing else reads texts without labels
        apart = cfg.data.source.get("unlabelled") or ()
        names = [f"data.source.{kind}.{split}" for kind in ("files", "hub_splits") for split in apart]
        flat = {key: value for key, value in flat.items() if key not in (*names, "data.source.unlabelled")}
    if flat.get("data.source.validation", "") is None:  # a mixture is then measured on the first of its data sets
        first = next(iter(cfg.data.source.get("paths") or ()), None)
        flat |= dict.fromkeys(("data.valid", "data.source.validation"), first)
    if not cfg.data.get("segments"):
        flat.pop("data.segment_room", None)
    if cfg.data.streaming and cfg.data.get("max_train_texts") is None:
        flat |= {f"streaming.{key}": value for key, value in cfg.streaming.items() if key != "_target_"}
    if cfg.classify.sharing == "conditional":
        names = [name for name in ("discriminative_weight", "bigrams") if cfg.classify[name]]
        flat |= {f"classify.{name}": cfg.classify[name] for name in ("sharing", "label_dropout", *names)}
    if cfg.classify.pretrain:
        flat |= {f"classify.{key}": cfg.classify[key] for key in ("pretrain", "pretrain_steps")}
        if cfg.classify.pretrain_lr_factor != 1:
            flat["classify.pretrain_lr_factor"] = cfg.classify.pretrain_lr_factor
    flat |= {"block_size": cfg.block_size} if objective == "bd3lm" else {}
    if flat.get("data.score_special", ...) is None:  # the meaning of null depends on data.wrap
        flat |= {} if cfg.data.wrap or cfg.data.get("protocol") else {"data.score_special": False}
        flat = {key: value for key, value in flat.items() if key != "data.score_special" or value is not None}
    return flat


# Settings that describe how a model was trained, not what it is.
_OF_TRAINING = ("optim.", "lr_scheduler.", "plateau.", "loader.", "trainer.", "streaming.", "seed", "classify.pretrain",
                "classify.discriminative_weight", "training.from_pretrained", "training.start_from_counts",
                "data.train_splits")  # fmt: skip
_GROUPS = ("data", "model", "backbone", "parameterization", "noise", "masking", "latents")
_OF_CLASSES = ("classify.sharing", "classify.label_dropout", "classify.discriminative_weight", "classify.bigrams")
_CARRIED = (*IDENTITY, *_OF_CLASSES, "block_size")
_KEY = re.compile(r"\w+(\.\w+)*", re.ASCII)
_FIRST = ("data.", "model.", "noise.", "training.", "classify.", "T", "block_size", "subs_masking", "time_conditioning")


def overrides(known: Mapping[str, object]) -> list[str]:
    """Return the command line that makes the configuration whose `identity` is `known`, without settings of training.

    The checkpoint may come from anybody. Only plain values of existing keys are taken from it; every component and
    every choice of a group is named by a file in configs/.

    Raises:
        ValueError: it names something else.
    """
    known = {
        key: value
        for key, value in known.items()
        if not (key.startswith(_OF_TRAINING) or _is_free(key) or _is_found(key, value))
    }
    for key, value in known.items():
        if not _may_be_carried(key, value):
            raise _unknown(key, value)
    words: list[str] = []
    for group in _GROUPS:
        words += _choice(group, known, words)
    for first in (_FIRST, ("",)):  # first the settings that others refer to, then the rest
        cfg = compose_config(words)
        ours = identity(cfg)
        present = _targets(cfg)
        unset = {
            key: _unset(value)
            for key, value in ours.items()
            if "IF_SET" in marks(key, _target_around(cfg, key), present) and key not in known
        }
        new = {**{key: known[key] for key in _different(known, ours)}, **unset}
        new = {key: value for key, value in new.items() if key.startswith(first) and not key.startswith(_OF_TRAINING)}
        if first is _FIRST:  # sources refer to data.path and the like
            new = {key: value for key, value in new.items() if not key.startswith("data.source.")}
        for key, value in new.items():
            if not _is_setting(key, cfg, value is None):
                raise _unknown(key, value)
        there = {key for key in new if OmegaConf.select(cfg, key, default=_ABSENT) is not _ABSENT}
        words += [f"{'' if key in there else '++'}{key}={word(value)}" for key, value in new.items()]
    return words


def _target_around(cfg: DictConfig, key: str) -> str | None:
    """Return the component that a setting is an argument of."""
    group = OmegaConf.select(cfg, key.rpartition(".")[0]) if "." in key else None
    return group.get("_target_") if OmegaConf.is_dict(group) else None


def _is_free(key: str) -> bool:
    """Return True if the setting is not part of an identity."""
    return "FREE" in marks(key, None, ()) and "._" not in key


def _is_found(key: str, value: object) -> bool:
    """Return True for the config.json of a published network, which is read from the checkpoint itself."""
    return key.startswith("backbone.config") and str(value).startswith("{")


def _unset(value: object) -> object:
    """Return the value of a setting that an identity leaves out, given another value of it."""
    return False if isinstance(value, bool) else 0 if isinstance(value, int) else None


def _different(known: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    return [key for key, value in known.items() if value != ours.get(key, _ABSENT)]


def _choice(group: str, known: Mapping[str, object], words: list[str]) -> list[str]:
    """Return `group=choice` for the file that has this name or target and agrees best with `known`; nothing if there
    is none."""
    fitting = []
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        content = OmegaConf.load(path)
        target = OmegaConf.select(content, "_target_") or OmegaConf.select(content, f"{group}._target_")
        if path.stem == known.get(f"{group}.name") or (
            target and permanent_path(target) == permanent_path(known.get(f"{group}._target_") or "")
        ):
            fitting.append([f"{group}={path.stem}"])
    if len(fitting) < 2:
        return fitting[0] if fitting else []
    return min(fitting, key=lambda choice: len(_different(known, identity(compose_config([*words, *choice])))))


def _unknown(key: str, value: object) -> ValueError:
    return ValueError(
        f"the checkpoint was trained with {plain(key)}={plain(value)}, which no file in configs/ names: it is from "
        "another version or configuration; add its yaml"
    )


def _may_be_carried(key: str, value: object) -> bool:
    """Return True for a key and value that an identity may have: a setting with a plain value, no choice of a group."""
    if not _KEY.fullmatch(key) or not any(key == name or key.startswith(f"{name}.") for name in _CARRIED):
        return False
    if key == "parameterization":  # the name of the objective
        return isinstance(value, str) and value.isidentifier()
    return _is_plain(value) and (value is None or not (CONFIGS / key).is_dir())


def _is_setting(key: str, cfg: DictConfig, unset: bool) -> bool:
    """Return True if `key` is a value in `cfg`; with `unset` also if it is a mapping of values."""
    parts = key.split(".")
    if any(part.startswith("_") for part in parts) or (CONFIGS / key).is_dir():
        return False
    node = OmegaConf.select(cfg, key, default=_ABSENT)
    if node is _ABSENT:  # mappings of settings, such as training.joint_modes, have free keys
        parent = OmegaConf.select(cfg, ".".join(parts[:-1]), default=_ABSENT) if len(parts) > 2 else _ABSENT
        return parent is None or (OmegaConf.is_dict(parent) and "_target_" not in parent)
    return not OmegaConf.is_dict(node) or (unset and "_target_" not in node)


def _is_plain(value: object) -> bool:
    """Return True for a text without interpolation, a number, a bool, null, or a list of these."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and "${" not in value)


def word(value: object) -> str:
    """Return a value in the notation of Hydra's command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(word, value)) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_/][\w/.-]*", value):
        return in_quotes(value)
    return str(value)
