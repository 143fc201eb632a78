"""Checkpoint files: written atomically, read without executing anything, checked before a single weight is changed.

Three layouts are read: ours, the Lightning `.ckpt` of the reference projects (with configuration and tokenizer objects
pickled inside), and the Hub's `config.json` + `model.safetensors` or `pytorch_model.bin`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.ema import EMA

BACKBONE_PREFIX = "backbone."


@dataclass
class Checkpoint:
    """Weights with what is known about them.

    state: backbone parameter name -> tensor, without prefix. ema: the average, as `EMA.state_dict` gives it.
    identity: what Palimpsest saved beside the weights (empty for foreign files). config: a Hub `config.json`.
    """

    path: Path
    state: dict[str, Tensor]
    ema: dict[str, object] | None = None
    identity: dict[str, object] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)

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
        backbone.load_state_dict(self.state)
        if use_ema and self.ema:
            average = EMA(backbone.parameters(), decay=0.0)
            average.load_state_dict(self.ema)
            average.copy_to(backbone.parameters())


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a kill or a full disk leaves the previous file whole."""

    def save_checkpoint(self, checkpoint: dict, path: str | os.PathLike, storage_options: object = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"the checkpoint {path} could not be written ({error}); the previous one, if any, is intact. "
                "Free some space or set checkpointing.save_dir, then run the same command again: it resumes"
            ) from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: object = None, weights_only: bool | None = None
    ) -> dict:
        return load_inert(Path(path))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a `.ckpt` file or a Hub-layout directory.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: it is truncated, corrupt, or not a checkpoint of a known layout.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"eval.checkpoint_path={path}: there is no such file or directory")
    return _read_hub_directory(path) if path.is_dir() else _read_lightning_file(path)


def _read_lightning_file(path: Path) -> Checkpoint:
    content = load_inert(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    return Checkpoint(path, _strip(content["state_dict"], path), content.get("ema"), content.get("identity", {}))


def _read_hub_directory(path: Path) -> Checkpoint:
    config_file = path / "config.json"
    if not config_file.exists():
        raise FileNotFoundError(f"{path} holds no config.json: it is not a model in the Hub's layout")
    if (weights := path / "model.safetensors").exists():
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise _unreadable(weights, error) from error
    elif (weights := path / "pytorch_model.bin").exists():
        state = load_inert(weights)
    else:
        raise FileNotFoundError(f"{path} holds neither model.safetensors nor pytorch_model.bin")
    return Checkpoint(path, _strip(state, weights), config=json.loads(config_file.read_text()))


def _strip(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
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


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read ({type(error).__name__}: {error}); it is truncated, corrupt or unsafe. "
        "Use an earlier checkpoint, or delete it to start afresh"
    )


def load_inert(path: Path) -> object:
    """torch.load that never runs code of the file: foreign classes become empty shells that only hold their state.

    Raises:
        ValueError: the file is truncated or corrupt, or asks for a function beyond tensors and plain containers.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_INERT_PICKLE)
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


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable | type:
        if name in _SAFE.get(module, ()) or (module in ("builtins", "__builtin__") and name in _SAFE_BUILTINS):
            return super().find_class("builtins" if module == "__builtin__" else module, name)
        if (module, name) == ("__builtin__", "long"):  # what old pickle protocols call an int
            return int
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
