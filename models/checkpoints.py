"""Checkpoint files, read without running code from them, and checked before any weight is changed.

Three layouts are read: ours, the Lightning `.ckpt` of the reference projects (with pickled configuration and tokenizer
objects), and the Hub's `config.json` + `model.safetensors` or `pytorch_model.bin`.
"""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from palimpsest.common import files
from palimpsest.common.files import PathOrUrl
from palimpsest.common.messages import excerpt
from palimpsest.models import hub, torch_archive
from palimpsest.models.class_conditioning import check_names, num_classes_of
from palimpsest.models.ema import EMA
from palimpsest.models.inert_pickle import Inert
from palimpsest.models.reference_settings import settings_of_reference

_CHARACTERS_OF_A_VALUE = 100
_MOST_VALUES, _DEEPEST = 1_000_000, 10  # limits of an identity, which consists mostly of the moments of latents


@dataclass
class Checkpoint:
    """Weights and what their file says about them."""

    path: PathOrUrl
    state: dict[str, Tensor]  # backbone parameter name -> tensor, without prefix
    ema: dict[str, object] | None = None  # the average, as `EMA.state_dict` gives it
    identity: dict[str, object] = field(default_factory=dict)  # saved by Palimpsest; empty for files of other projects
    config: dict[str, object] = field(default_factory=dict)  # a Hub `config.json`
    settings: dict[str, object] = field(default_factory=dict)  # of the network, by key as typed, and `vocab_size`
    step: int | None = None  # optimizer steps of the training
    unsupported: str = ""  # the reason why no network here can use the file
    tokens: dict[str, int] | None = None  # token -> id of the tokenizer in a file of the reference projects
    tokenizer: dict[str, object] = field(default_factory=dict)  # in one of ours (data.tokenizers.tokenizer_from_record)

    def load_into(self, backbone: nn.Module, use_ema: bool = True) -> None:
        """Copy the weights into `backbone`, the averaged ones if there are any and `use_ema`. Raises ValueError if
        names or shapes differ; nothing has been changed then."""
        ours = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
        theirs = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        check_names(theirs, ours, str(self.path))
        problems = [
            f"{name}: checkpoint {theirs[name]}, model {ours[name]}"
            for name in ours.keys() & theirs.keys()
            if ours[name] != theirs[name]
        ]
        problems += [f"{name}: not in the checkpoint" for name in ours.keys() - theirs.keys()]
        problems += [f"{name}: not in the model" for name in theirs.keys() - ours.keys()]
        if problems:
            shown = "\n  ".join(sorted(problems)[:6])
            of_classes = num_classes_of(self.state) != num_classes_of(backbone.state_dict())
            of_classes |= any(problem.startswith("bigrams.") for problem in problems)
            settings = "model=, model.* and backbone="
            if of_classes:
                known = self.identity.get("configuration", {})
                sharing = known.get("classify.sharing", "per_class" if known else "")
                pairs = known.get("classify.bigrams", 0 if known else "")
                settings = f"classify.sharing={sharing} and classify.bigrams={pairs} (or else {settings})"
            raise ValueError(
                f"{self.path} does not fit the model ({len(problems)} differences):\n  {shown}\n"
                f"Set {settings} as they were in training"
            )
        average = EMA(backbone.parameters(), decay=0.0) if use_ema and self.ema else None
        if average:
            average.load_state_dict(self.ema)
        backbone.load_state_dict(self.state)
        if average:
            average.copy_to(backbone.parameters())


def read_checkpoint(path: str | Path, key: str = "eval.checkpoint_path") -> Checkpoint:
    """Read a `.ckpt` file (a path or URL), a Hub-layout directory, or the model of that name on the Hub.

    Args:
        key: the setting that named it, for messages.

    Raises:
        FileNotFoundError: nothing at `path`, neither here nor on the Hub.
        ValueError: it is truncated, corrupt, or not a checkpoint of a known layout.
    """
    path = hub.locate(path, key)
    return _read_lightning_file(path) if files.is_remote(path) or path.is_file() else _read_hub_directory(path)


def read_settings(path: str | Path, key: str = "eval.checkpoint_path") -> Checkpoint:
    """Read the checkpoint without its weights (`state` and `ema` are empty), which is quick. Raises as
    `read_checkpoint`."""
    path = hub.locate(path, key)
    if not files.is_remote(path) and path.is_dir():
        return _hub_checkpoint(path, hub.read_config(path), {})
    checkpoint = _read_lightning_file(path, weights=False)
    checkpoint.state, checkpoint.ema = {}, None
    return checkpoint


@dataclass(frozen=True)
class Progress:
    """The progress of the training behind one of our checkpoints."""

    step: int  # optimizer steps done
    validations_without_improvement: int  # since the best one, 0 if they are not counted
    best: PathOrUrl | None  # the checkpoint of the best validation, in the same folder
    identity: dict[str, object]  # as in `Checkpoint`
    train_size: dict[str, int] | None  # number of texts and bytes, if it is known
    configuration: str = ""  # of the command, as YAML

    def typed(self, key: str) -> object:
        """Return a setting of the command that wrote the checkpoint; None if it is unknown."""
        node = yaml.safe_load(self.configuration)
        for name in key.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node


def read_progress(path: PathOrUrl) -> Progress:
    """Read the progress without the weights. Raises ValueError for a corrupt file, or one that is not our
    checkpoint."""
    return _read_progress(str(path), files.version(path))


@lru_cache(maxsize=64)
def _read_progress(path: str, version: str) -> Progress:
    path = files.path_or_url(path)
    content = read_contents(path, weights=False)
    callbacks = content.get("callbacks")
    if not isinstance(callbacks, dict) or "global_step" not in content:
        raise ValueError(f"{path} is not a checkpoint of a training; delete it, or use another checkpointing.save_dir")
    states = [state for state in callbacks.values() if isinstance(state, dict)]
    waited = next((int(state["wait_count"]) for state in states if "wait_count" in state), 0)
    best = next((state["best_model_path"] for state in states if state.get("monitor") == "val/nll"), None)
    best_path = files.join_path(files.parent_folder(path), files.basename(files.path_or_url(best))) if best else None
    train_size = _part(content, "TextData").get("train_size")
    configuration = str(_part(content, "run").get("configuration", ""))
    step, identity = int(content["global_step"]), content.get("identity") or {}
    return Progress(step, waited, best_path, identity, train_size, configuration)


def _part(content: Mapping[str, object], name: str) -> dict[str, object]:
    """Return a part of a file, empty if it is not there, or not a mapping."""
    part = content.get(name)
    return part if isinstance(part, dict) else {}


def _read_lightning_file(path: PathOrUrl, weights: bool = True) -> Checkpoint:
    content = read_contents(path, weights)
    identity = content.get("identity", {})
    state = _strip(content["state_dict"], path)
    found = Checkpoint(path, state, content.get("ema"), identity, step=content.get("global_step"))
    if "configuration" in identity:
        known = identity["configuration"]
        found.tokenizer = _part(_part(content, "run"), "tokenizer")
    else:
        known, found.unsupported, found.tokens = _reference(content)
    found.settings = {**known, **hub.settings_of_tensors(state)}
    return found


def read_contents(path: PathOrUrl, weights: bool = True) -> dict[str, object]:
    """Return the whole content of a Lightning file, read by `load_inert`, after checking the types of its main parts.
    Raises ValueError if it cannot be read, or is not a Lightning checkpoint."""
    content = load_inert(path, weights)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a Lightning checkpoint: it has no state_dict")
    _tensors(content["state_dict"], path)
    identity = content.get("identity", {})
    if not isinstance(identity, dict) or not isinstance(identity.get("configuration", {}), dict):
        raise ValueError(f"{path} is not one of our checkpoints: its identity has the wrong type")
    if not _is_plain(identity):
        raise ValueError(f"{path} is not one of our checkpoints: its identity holds more than texts and numbers")
    _check_sizes(identity.get("configuration", {}), content["state_dict"], path)
    ema, step = content.get("ema"), content.get("global_step", 0)
    if ema is not None:
        parts = {"shadow_params": list, "decay": int | float, "num_updates": int}
        if not isinstance(ema, dict) or not all(isinstance(ema.get(name), kind) for name, kind in parts.items()):
            raise ValueError(f"{path} is not a checkpoint of a training: its ema has the wrong type")
        _tensors(dict(enumerate(ema["shadow_params"])), path, "ema", int)
    if type(step) is not int:
        raise ValueError(f"{path} is not a Lightning checkpoint: its global_step has the wrong type")
    return content


def _tensors(state: object, path: PathOrUrl, name: str = "state_dict", kind: type = str) -> dict[str, Tensor]:
    """Return `state` if it maps names to tensors, else raise ValueError."""
    if not isinstance(state, dict) or not all(isinstance(k, kind) and isinstance(v, Tensor) for k, v in state.items()):
        raise ValueError(f"{path} is not a checkpoint of a known layout: its {name} does not map names to tensors")
    return state


def _check_sizes(configuration: Mapping[str, object], state: Mapping[str, Tensor], path: PathOrUrl) -> None:
    """Raise ValueError if a configuration claims a larger network than its own tensors."""
    widest = max((length for tensor in state.values() for length in tensor.shape), default=0)
    for key, most in (("hidden_size", widest), ("cond_dim", widest), ("n_heads", widest), ("n_blocks", len(state))):
        claimed = configuration.get(f"model.{key}")
        if isinstance(claimed, int) and claimed > most:
            raise ValueError(
                f"{path} contradicts itself: its configuration has model.{key}={claimed}, and its tensors "
                f"allow {most} at most; it was changed after its training"
            )


def _is_plain(value: object) -> bool:
    """Return whether a value consists of texts, numbers, lists and mappings, and is small enough."""
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
    config = hub.read_config(path)
    weights = next((path / name for name in hub.WEIGHT_FILES if (path / name).exists()), None)
    if weights is None:
        raise FileNotFoundError(f"{path} has neither {' nor '.join(hub.WEIGHT_FILES)}")
    files.check_regular(path)
    try:
        state = load_file(weights) if weights.suffix == ".safetensors" else load_inert(weights)
    except (SafetensorError, OSError) as error:
        raise _unreadable(weights, error) from error
    return _hub_checkpoint(path, config, _strip(_tensors(state, weights), weights))


def _hub_checkpoint(path: Path, config: dict[str, object], state: dict[str, Tensor]) -> Checkpoint:
    identity = {"tokenizer": config["tokenizer_fingerprint"]} if "tokenizer_fingerprint" in config else {}
    settings = {**hub.settings_of_config(config), **hub.settings_of_tensors(state)}
    return Checkpoint(path, state, None, identity, config, settings, unsupported=hub.unsupported(config))


def _reference(content: Mapping[str, object]) -> tuple[dict[str, object], str, dict[str, int] | None]:
    """Return settings, reason and tokens (see `Checkpoint`) of the configuration and tokenizer pickled in a reference
    checkpoint."""
    parameters = content.get("hyper_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    settings, reason = settings_of_reference(lambda key: _omegaconf_value(parameters.get("config"), key))
    return settings, reason, _tokens(parameters.get("tokenizer"))


def _omegaconf_value(node: object, key: str) -> object:
    """Return the value at a.b.c of a pickled omegaconf tree, or of plain dicts; None if there is none. An interpolation
    `${a.b}` is resolved."""
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
    """Return token -> id of a pickled tokenizer of transformers, None if it has none."""
    inner = _state(tokenizer).get("_tokenizer")
    if not isinstance(inner, Inert) or not isinstance(inner.state, bytes):
        return None
    try:
        known = json.loads(inner.state)
        vocab = known["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: pieces with their scores
            vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
        return {**vocab, **{added["content"]: added["id"] for added in known["added_tokens"]}}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _state(thing: object) -> dict[str, object]:
    """Return the attributes of a pickled object; none of other things."""
    return thing.state if isinstance(thing, Inert) and isinstance(thing.state, dict) else {}


def _strip(state: Mapping[str, Tensor], path: PathOrUrl) -> dict[str, Tensor]:
    """Return the backbone entries without `backbone.` and without the `_orig_mod.` of torch.compile."""
    whole = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    kept = {name.removeprefix("backbone."): whole[name] for name in whole if name.startswith("backbone.")}
    if not kept:
        raise ValueError(f"{path} has no parameter named backbone.*: it is not one of our or the references' models")
    return kept


def _unreadable(path: PathOrUrl, error: Exception) -> ValueError:
    return ValueError(
        f"{path} cannot be read ({type(error).__name__}: {excerpt(error)}); it is truncated, corrupt or unsafe. "
        "Use an earlier checkpoint, or delete it to start afresh"
    )


# Errors that reading a damaged archive may raise.
READ_ERRORS = (pickle.UnpicklingError, zipfile.BadZipFile, struct.error, EOFError, RuntimeError, LookupError,
               ValueError, AttributeError, TypeError, OverflowError, MemoryError, OSError)  # fmt: skip


def load_inert(path: str | Path, weights: bool = True) -> object:
    """Return the object that torch.save wrote, without running code of the file: objects of unknown classes become
    `Inert`.

    Args:
        weights: read the content of tensors and check the seal (common/files.py); without, tensors have only shapes.

    Raises:
        ValueError: the file is truncated, corrupt or too large, or asks for a function other than those of tensors and
            plain containers.
    """
    path = files.path_or_url(path)
    try:
        if weights and not files.is_remote(path):
            files.check_seal(path)
        with files.open_regular(path) as file:
            if files.is_remote(path):
                files.check_content(file, path)
            return torch_archive.read(file, weights)
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error
