"""Checkpoint files: read without executing anything, checked before a single weight is changed.

Three layouts are read: ours, the Lightning `.ckpt` of the reference projects (with configuration and tokenizer objects
pickled inside), and the Hub's `config.json` + `model.safetensors` or `pytorch_model.bin`.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import FunctionType, SimpleNamespace

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from files import Place, below, check_content, check_seal, folder_of, is_remote, name_of, open_to_read, place, version
from models.ema import EMA
from models.hub import (
    CONFIG_FILE,
    WEIGHT_FILES,
    locate,
    read_config,
    settings_of_config,
    settings_of_tensors,
    unsupported,
)
from models.reference_settings import settings_of_reference

BACKBONE_PREFIX = "backbone."


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

    path: Place
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
    """Read a `.ckpt` file, here or at an address (files.py), a Hub-layout directory, or the model of that name on the
    Hub.

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
    best: Place | None
    identity: dict[str, object]


def read_progress(path: Place) -> Progress:
    """Read it without the weights. Raises ValueError for a file that is corrupt or no checkpoint of ours."""
    return _read_progress(str(path), version(path))


@lru_cache(maxsize=64)
def _read_progress(path: str, version: str) -> Progress:
    path = place(path)
    content = load_inert(path, mmap=True)
    callbacks = content.get("callbacks") if isinstance(content, dict) else None
    if not isinstance(callbacks, dict) or "global_step" not in content:
        raise ValueError(f"{path} is not a checkpoint of a training; delete it, or use another checkpointing.save_dir")
    states = [state for state in callbacks.values() if isinstance(state, dict)]
    fruitless = next((int(state["wait_count"]) for state in states if "wait_count" in state), 0)
    best = next((state["best_model_path"] for state in states if state.get("monitor") == "val/nll"), None)
    best_path = below(folder_of(path), name_of(place(best))) if best else None
    return Progress(int(content["global_step"]), fruitless, best_path, content.get("identity") or {})


def _read_lightning_file(path: Place, weights: bool = True) -> Checkpoint:
    content = load_inert(path, mmap=not weights)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    weights_of, identity = content["state_dict"], content.get("identity", {})
    if not isinstance(weights_of, dict) or not all(isinstance(v, Tensor) for v in weights_of.values()):
        raise ValueError(f"{path} is not a Lightning checkpoint: its state_dict does not map names to tensors")
    if not isinstance(identity, dict) or not isinstance(identity.get("configuration", {}), dict):
        raise ValueError(f"{path} is not one of our checkpoints: its identity is of the wrong kind")
    state = _strip(weights_of, path)
    found = Checkpoint(path, state, content.get("ema"), identity, step=content.get("global_step"))
    if "configuration" in identity:
        known = identity["configuration"]
    else:
        known, found.unsupported, found.tokens = _reference(content)
    found.settings = {**known, **settings_of_tensors(state)}
    return found


def _read_hub_directory(path: Path) -> Checkpoint:
    if not (path / CONFIG_FILE).exists():
        raise FileNotFoundError(f"{path} holds no {CONFIG_FILE}: it is not a model in the Hub's layout")
    weights = next((path / name for name in WEIGHT_FILES if (path / name).exists()), None)
    if weights is None:
        raise FileNotFoundError(f"{path} holds neither {' nor '.join(WEIGHT_FILES)}")
    try:
        state = load_file(weights) if weights.suffix == ".safetensors" else load_inert(weights)
    except SafetensorError as error:
        raise _unreadable(weights, error) from error
    return _hub_checkpoint(path, _strip(state, weights))


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
            return value
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


def _strip(state: Mapping[str, Tensor], path: Place) -> dict[str, Tensor]:
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


def _unreadable(path: Place, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read ({type(error).__name__}: {error}); it is truncated, corrupt or unsafe. "
        "Use an earlier checkpoint, or delete it to start afresh"
    )


def load_inert(path: str | Path, mmap: bool = False) -> object:
    """torch.load that never runs code of the file: foreign classes become empty shells that only hold their state.
    Sealed content (files.py) is checked first. With `mmap` it is not, and tensors stay on disk until they are looked
    at, where the file's format allows it.

    Raises:
        ValueError: the file is truncated or corrupt, or asks for a function beyond tensors and plain containers.
    """
    path = place(path)
    try:
        mmap = mmap and not is_remote(path) and zipfile.is_zipfile(path)
        source = path
        if is_remote(path):
            source = open_to_read(path)
            check_content(source, path)
        elif not mmap:
            check_seal(path)
        return torch.load(source, map_location="cpu", weights_only=False, pickle_module=_INERT_PICKLE, mmap=mmap)
    except (
        pickle.UnpicklingError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        AttributeError,
        TypeError,
        IndexError,
        UnicodeDecodeError,
        OSError,
    ) as error:
        raise _unreadable(path, error) from error


class Inert:
    """Stands where a pickled object of a foreign class stood: accepts any construction and state, does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.args, self.kwargs = args, kwargs

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.__dict__.setdefault("items", {})[key] = value

    def append(self, value: object) -> None:
        self.__dict__.setdefault("elements", []).append(value)

    def extend(self, values: list) -> None:
        self.__dict__.setdefault("elements", []).extend(values)


# Functions and classes that rebuild tensors and plain containers. Nothing here reads, writes or runs anything.
_SAFE: dict[str, set[str]] = {
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_tensor"},
    "torch": {name for name in dir(torch) if name.endswith("Storage")}
    | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    | {"Size", "device"},
    "torch.storage": {"UntypedStorage", "TypedStorage"},
    "collections": {"OrderedDict", "defaultdict", "Counter"},
    "_codecs": {"encode"},
}
_PYTHON_2 = {"long": "int", "unicode": "str", "xrange": "range"}  # names in pickles of protocol 2
_SAFE_BUILTINS = {
    "dict",
    "list",
    "set",
    "tuple",
    "int",
    "float",
    "str",
    "bytes",
    "bool",
    "complex",
    "slice",
    "range",
    "frozenset",
    "bytearray",
}
_IMMUTABLE = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE: classes of C, on which nothing can be set
# Modules of which a checkpoint may hold instances; they are replaced by shells, never imported.
_FOREIGN = (
    "omegaconf",
    "tokenizers",
    "transformers",
    "typing",
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "functools",
    "pathlib",
    "enum",
    "torch.optim",
    "transformers_modules",
)


def _throw_away(thing: Callable | type) -> Callable | type:
    """What does the same as `thing` but is not it: a pickle may set attributes on what it is handed."""
    if isinstance(thing, FunctionType):
        return lambda *args, **kwargs: thing(*args, **kwargs)
    if isinstance(thing, type) and not thing.__flags__ & _IMMUTABLE:
        return type(thing.__name__, (thing,), {"__module__": thing.__module__})
    return thing


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable | type:
        if module == "__builtin__":
            module, name = "builtins", _PYTHON_2.get(name, name)
        if name in _SAFE.get(module, ()) or (module == "builtins" and name in _SAFE_BUILTINS):
            return _throw_away(super().find_class(module, name))
        if module.split(".")[0] in _FOREIGN or module in _FOREIGN:
            return type(name, (Inert,), {"__module__": module})
        raise pickle.UnpicklingError(f"the file asks to run {module}.{name}, which no checkpoint needs: refused")


_INERT_PICKLE = SimpleNamespace(
    Unpickler=_InertUnpickler,
    load=lambda file, **kwargs: _InertUnpickler(file, **kwargs).load(),
    loads=lambda data, **kwargs: _InertUnpickler(io.BytesIO(data), **kwargs).load(),
    UnpicklingError=pickle.UnpicklingError,
    __name__="palimpsest_inert_pickle",
)
