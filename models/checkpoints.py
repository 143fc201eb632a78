"""Checkpoint files: read without executing anything, checked before a single weight is changed.

Three layouts are read: ours, the Lightning `.ckpt` of the reference projects (with configuration and tokenizer objects
pickled inside), and the Hub's `config.json` + `model.safetensors` or `pytorch_model.bin`.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from palimpsest.common.files import (
    PathOrUrl,
    basename,
    check_content,
    check_regular,
    check_seal,
    is_remote,
    join_path,
    open_regular,
    parent_folder,
    path_or_url,
    version,
)
from palimpsest.common.messages import excerpt
from palimpsest.models import torch_archive
from palimpsest.models.ema import EMA
from palimpsest.models.hub import (
    CONFIG_FILE,
    WEIGHT_FILES,
    locate,
    read_config,
    settings_of_config,
    settings_of_tensors,
    unsupported,
)
from palimpsest.models.inert_pickle import Inert
from palimpsest.models.reference_settings import settings_of_reference

BACKBONE_PREFIX = "backbone."
_CHARACTERS_OF_A_VALUE = 100
_MOST_VALUES, _DEEPEST = 1_000_000, 10  # of an identity; the moments of latents are the most of it


@dataclass
class Checkpoint:
    """Weights with what is known about them.

    state: backbone parameter name -> tensor, without prefix. ema: the average, as `EMA.state_dict` gives it.
    identity: what Palimpsest saved beside the weights (empty for foreign files). config: a Hub `config.json`.
    settings: what the file says of its network, whatever its layout: keys as typed (`model.hidden_size`,
    `time_conditioning`, and `vocab_size`) -> values; what it does not say is left out. step: optimizer steps of its
    training, None where it does not say. unsupported: the reason why none of our models is that of the file, "" if one
    is. tokens: token -> id of the tokenizer that the file holds, None if it holds none.
    """

    path: PathOrUrl
    state: dict[str, Tensor]
    ema: dict[str, object] | None = None
    identity: dict[str, object] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    step: int | None = None
    unsupported: str = ""
    tokens: dict[str, int] | None = None

    def load_into(self, backbone: nn.Module, use_ema: bool = True) -> None:
        """Copy the weights, the averaged ones where there are any and `use_ema`, into `backbone`.

        Raises:
            ValueError: names or shapes differ; nothing has been changed then.
        """
        ours = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        problems = [
            f"{name}: checkpoint {theirs[name]}, model {ours[name]}"
            for name in ours.keys() & theirs.keys()
            if ours[name] != theirs[name]
        ]
        problems += [f"{name}: not in the checkpoint" for name in ours.keys() - theirs.keys()]
        problems += [f"{name}: not in the model" for name in theirs.keys() - ours.keys()]
        if problems:
            shown = "\n  ".join(sorted(problems)[:6])
            raise ValueError(
                f"{self.path} does not fit the model ({len(problems)} differences):\n  {shown}\n"
                "Set model=, model.* and backbone= as they were in training"
            )
        average = EMA(backbone.parameters(), decay=0.0) if use_ema and self.ema else None
        if average:
            average.load_state_dict(self.ema)
        backbone.load_state_dict(self.state)
        if average:
            average.copy_to(backbone.parameters())


def read_checkpoint(path: str | Path, key: str = "eval.checkpoint_path") -> Checkpoint:
    """Read a `.ckpt` file, here or at an address (common/files.py), a Hub-layout directory, or the model of that name
    on the Hub.

    `key` is the setting that named it, for messages.

    Raises:
        FileNotFoundError: nothing at `path`, here or on the Hub.
        ValueError: it is truncated, corrupt, or not a checkpoint of a known layout.
    """
    path = locate(path, key)
    return _read_lightning_file(path) if is_remote(path) or path.is_file() else _read_hub_directory(path)


def read_settings(path: str | Path, key: str = "eval.checkpoint_path") -> Checkpoint:
    """The checkpoint without its weights: `state` and `ema` are empty. Quick, whatever the size of the file.

    Raises: as `read_checkpoint`.
    """
    path = locate(path, key)
    if not is_remote(path) and path.is_dir():
        return _hub_checkpoint(path, {})
    checkpoint = _read_lightning_file(path, weights=False)
    checkpoint.state, checkpoint.ema = {}, None
    return checkpoint


@dataclass(frozen=True)
class Progress:
    """How far the training behind a checkpoint of ours has come.

    step: optimizer steps done. fruitless: validations since the best one, 0 where that is not counted. best: the
    checkpoint of the best validation, beside this one; None where there was none. identity: as in `Checkpoint`.
    """

    step: int
    fruitless: int
    best: PathOrUrl | None
    identity: dict[str, object]


def read_progress(path: PathOrUrl) -> Progress:
    """Read it without the weights. Raises ValueError for a file that is corrupt or no checkpoint of ours."""
    return _read_progress(str(path), version(path))


@lru_cache(maxsize=64)
def _read_progress(path: str, version: str) -> Progress:
    path = path_or_url(path)
    content = read_contents(path, weights=False)
    callbacks = content.get("callbacks")
    if not isinstance(callbacks, dict) or "global_step" not in content:
        raise ValueError(f"{path} is not a checkpoint of a training; delete it, or use another checkpointing.save_dir")
    states = [state for state in callbacks.values() if isinstance(state, dict)]
    fruitless = next((int(state["wait_count"]) for state in states if "wait_count" in state), 0)
    best = next((state["best_model_path"] for state in states if state.get("monitor") == "val/nll"), None)
    best_path = join_path(parent_folder(path), basename(path_or_url(best))) if best else None
    return Progress(int(content["global_step"]), fruitless, best_path, content.get("identity") or {})


def _read_lightning_file(path: PathOrUrl, weights: bool = True) -> Checkpoint:
    content = read_contents(path, weights)
    identity = content.get("identity", {})
    state = _strip(content["state_dict"], path)
    found = Checkpoint(path, state, content.get("ema"), identity, step=content.get("global_step"))
    if "configuration" in identity:
        known = identity["configuration"]
    else:
        known, found.unsupported, found.tokens = _reference(content)
    found.settings = {**known, **settings_of_tensors(state)}
    return found


def read_contents(path: PathOrUrl, weights: bool = True) -> dict[str, object]:
    """Return the whole content of a Lightning file, read as by `load_inert`, its main parts of the right kinds.

    Raises:
        ValueError: it cannot be read, or is no Lightning checkpoint.
    """
    content = load_inert(path, weights)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    _tensors(content["state_dict"], path)
    identity = content.get("identity", {})
    if not isinstance(identity, dict) or not isinstance(identity.get("configuration", {}), dict):
        raise ValueError(f"{path} is not one of our checkpoints: its identity is of the wrong kind")
    if not _is_plain(identity):
        raise ValueError(f"{path} is not one of our checkpoints: its identity holds more than texts and numbers")
    _check_sizes(identity.get("configuration", {}), content["state_dict"], path)
    ema, step = content.get("ema"), content.get("global_step", 0)
    if ema is not None:
        parts = {"shadow_params": list, "decay": int | float, "num_updates": int}
        if not isinstance(ema, dict) or not all(isinstance(ema.get(name), kind) for name, kind in parts.items()):
            raise ValueError(f"{path} is not a checkpoint of a training: its ema is of the wrong kind")
        _tensors(dict(enumerate(ema["shadow_params"])), path, "ema", int)
    if type(step) is not int:
        raise ValueError(f"{path} is not a Lightning checkpoint: its global_step is of the wrong kind")
    return content


def _tensors(state: object, path: PathOrUrl, name: str = "state_dict", kind: type = str) -> dict[str, Tensor]:
    """`state`, if it maps names to tensors. Raises ValueError."""
    mapped = isinstance(state, dict) and all(isinstance(k, kind) and isinstance(v, Tensor) for k, v in state.items())
    if not mapped:
        raise ValueError(f"{path} is not a checkpoint of a known layout: its {name} does not map names to tensors")
    return state


def _check_sizes(configuration: Mapping[str, object], state: Mapping[str, Tensor], path: PathOrUrl) -> None:
    """Raise ValueError if a configuration claims a larger network than its own tensors are."""
    widest = max((length for tensor in state.values() for length in tensor.shape), default=0)
    for key, most in (("hidden_size", widest), ("cond_dim", widest), ("n_heads", widest), ("n_blocks", len(state))):
        claimed = configuration.get(f"model.{key}")
        if isinstance(claimed, int) and claimed > most:
            raise ValueError(f"{path} contradicts itself: its configuration has model.{key}={claimed}, and its tensors "
                             f"allow {most} at most; it was changed after its training")  # fmt: skip


def _is_plain(value: object) -> bool:
    """Whether it is made of texts, numbers, lists and mappings, of no more than can be shown in a message."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        part, depth = waiting.pop()
        if isinstance(part, dict):
            if not all(isinstance(key, str) for key in part):
                return False
            part = list(part.values())
        if isinstance(part, list | tuple):
            seen += len(part) + sum(len(inner) for inner in part if isinstance(inner, str)) // _CHARACTERS_OF_A_VALUE
            waiting += [(inner, depth + 1) for inner in part] if seen <= _MOST_VALUES else ()
        elif part is not None and not isinstance(part, bool | int | float | str):
            return False
        if seen > _MOST_VALUES or depth > _DEEPEST:
            return False
    return True


def _read_hub_directory(path: Path) -> Checkpoint:
    if not (path / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{path} holds no {CONFIG_FILE}: it is not a model in the Hub's layout")
    weights = next((path / name for name in WEIGHT_FILES if (path / name).exists()), None)
    if weights is None:
        raise FileNotFoundError(f"{path} holds neither {' nor '.join(WEIGHT_FILES)}")
    check_regular(path)
    try:
        state = load_file(weights) if weights.suffix == ".safetensors" else load_inert(weights)
    except (SafetensorError, OSError) as error:
        raise _unreadable(weights, error) from error
    return _hub_checkpoint(path, _strip(_tensors(state, weights), weights))


def _hub_checkpoint(path: Path, state: dict[str, Tensor]) -> Checkpoint:
    config = read_config(path)
    identity = {"tokenizer": config["tokenizer_fingerprint"]} if "tokenizer_fingerprint" in config else {}
    settings = {**settings_of_config(config), **settings_of_tensors(state)}
    return Checkpoint(path, state, None, identity, config, settings, unsupported=unsupported(config))


def _reference(content: Mapping[str, object]) -> tuple[dict[str, object], str, dict[str, int] | None]:
    """What the configuration and the tokenizer pickled in a reference checkpoint say; see `Checkpoint`."""
    parameters = content.get("hyper_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    config = parameters.get("config")
    settings, reason = settings_of_reference(lambda key: _omegaconf_value(config, key))
    return settings, reason, _tokens(parameters.get("tokenizer"))


def _omegaconf_value(node: object, key: str) -> object:
    """The value at a.b.c of a pickled omegaconf tree, or of plain dicts; None if there is none. A value that only
    refers to another one, `${a.b}`, is that one."""
    for _ in range(3):
        value = node
        for name in key.split("."):
            children = _state(value).get("_content") if isinstance(value, Inert) else value
            value = children.get(name) if isinstance(children, dict) else None
        value = _state(value).get("_val") if isinstance(value, Inert) else value
        reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if reference is None:
            return value if isinstance(value, bool | int | float | str) else None
        key = reference[1]
    return None


def _tokens(tokenizer: object) -> dict[str, int] | None:
    """Token -> id of a pickled tokenizer of transformers, None where it does not say."""
    inner = _state(tokenizer).get("_tokenizer") if isinstance(tokenizer, Inert) else None
    serialised = getattr(inner, "state", None)
    if not isinstance(serialised, bytes):
        return None
    try:
        known = json.loads(serialised)
        vocab = known["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: pieces with their scores
            vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
        return {**vocab, **{added["content"]: added["id"] for added in known["added_tokens"]}}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _state(shell: Inert) -> dict[str, object]:
    state = getattr(shell, "state", None)
    return state if isinstance(state, dict) else {}


def _strip(state: Mapping[str, Tensor], path: PathOrUrl) -> dict[str, Tensor]:
    """Backbone entries without `backbone.` and without the `_orig_mod.` that torch.compile leaves in names."""
    names = {name: name.replace("_orig_mod.", "") for name in state}
    kept = {
        clean.removeprefix(BACKBONE_PREFIX): state[name]
        for name, clean in names.items()
        if clean.startswith(BACKBONE_PREFIX)
    }
    if not kept:
        raise ValueError(
            f"{path} holds no parameter named {BACKBONE_PREFIX}*: it is not one of our or the references' models"
        )
    return kept


def _unreadable(path: PathOrUrl, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read ({type(error).__name__}: {excerpt(error)}); it is truncated, corrupt or unsafe. "
        "Use an earlier checkpoint, or delete it to start afresh"
    )


# What a damaged archive may raise.
READ_ERRORS = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, RuntimeError, LookupError,
               ValueError, AttributeError, TypeError, OverflowError, MemoryError, OSError)  # fmt: skip


def load_inert(path: str | Path, weights: bool = True) -> object:
    """Return what torch.save wrote, without running code of the file: objects of foreign classes become empty shells
    that hold their state. Sealed content (common/files.py) is checked first. Without `weights` it is not, and tensors
    have shapes, but no content.

    Raises:
        ValueError: the file is truncated or corrupt, larger than it may be, or asks for a function beyond tensors and
            plain containers.
    """
    path = path_or_url(path)
    try:
        if weights and not is_remote(path):
            check_seal(path)
        with open_regular(path) as file:
            if is_remote(path):
                check_content(file, path)
            return torch_archive.read(file, weights)
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error
