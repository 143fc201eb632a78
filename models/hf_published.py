"""What backbone=hf_causal and hf_mlm share: models of the transformers library, read as configurations and weights.

Weights come from safetensors files alone, and no code comes with them.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from palimpsest.common.files import check_regular
from palimpsest.models.attention import resolve_backend
from palimpsest.models.checkpoints import read_settings

KEY = "backbone.name_or_path"
FILES = "config.json and model.safetensors"
_MOST_UNUSED = 1024  # rows of the network beyond the data's ids: rounding up to a multiple stays far below
_DROPOUT = re.compile(r"(dropout|pdrop)(_prob)?$")
_NOT_OURS = re.compile(r"classifier|summary")  # rates of other heads
# attn_backend -> the library's name; None: its own choice, sdpa where the model has it.
_ATTENTION = {"sdpa": None, "flash_attn": "flash_attention_2"}


@dataclass(frozen=True)
class Kind:
    """A kind of published model. backbone: as typed. model_class: the library's class that builds and loads it. words:
    what it is, for messages. config_key: where a checkpoint of ours keeps the config.json it was built from, which
    outlives the folder. added: ids of the data that may lie beyond the network's, such as a new mask's."""

    backbone: str
    model_class: type
    words: str
    config_key: str
    added: int


@dataclass(frozen=True)
class Loaded:
    """A published model, and the names of the weights that its files lack and that therefore are random."""

    model: PreTrainedModel
    missing: tuple[str, ...]


def build(kind: Kind, config: PretrainedConfig, attn_backend: str) -> PreTrainedModel:
    """The architecture with random weights, float32.

    Raises:
        ValueError: there is no such architecture of this kind, or its sizes do not fit together.
    """
    attention = _ATTENTION[resolve_backend(attn_backend)]
    try:
        return kind.model_class.from_config(
            config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
    except (ValueError, ImportError, AssertionError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"backbone={kind.backbone} can not build a {config.model_type} ({first_line(error)})"
        ) from error


def recompute_blocks(model: PreTrainedModel) -> None:
    """Gradient checkpointing (models/recompute.py), by the library's own switch.

    Raises:
        ValueError: the architecture has none.
    """
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"training.gradient_checkpointing=true: a {model.config.model_type} model of transformers can not "
            "compute its blocks again; leave it out"
        )
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def kept_config(
    kind: Kind, files: dict[str, str | None], typed: dict[str, str | None]
) -> tuple[PretrainedConfig, str] | None:
    """The config that the first of `files` (key -> path) with one was saved with, and what says so; `typed` keys name
    where it came from, and must be those of the file where they are not None.

    Raises:
        ValueError: they are others.
    """
    for key, path in files.items():
        known = read_settings(path, key).settings if path else {}
        if kind.config_key not in known:
            continue
        for name, value in typed.items():
            if value not in (None, known.get(name)):
                raise ValueError(
                    f"{name}={value} contradicts {key}={path}, which was trained from {known.get(name)}; leave it out"
                )
        try:
            settings = json.loads(known[kind.config_key])
            return type(AutoConfig.for_model(settings["model_type"])).from_dict(settings), f"{key}={path}"
        except (ValueError, TypeError, LookupError, RecursionError, AttributeError) as error:
            raise ValueError(
                f"{key}={path} carries a {kind.config_key} that cannot be read ({first_line(error)}); name another file"
            ) from error
    return None


def refuse_contradictions(
    kind: Kind, config: PretrainedConfig, typed: dict[str, int | None], vocab_size: int, said_by: str
) -> None:
    """Raises ValueError for typed sizes that are not the model's, and for data with another vocabulary."""
    known = sizes(config)
    differing = [f"{key}={value}" for key, value in typed.items() if value not in (None, known[key])]
    if differing:
        says = " ".join(f"{key}={value}" for key, value in known.items())
        raise ValueError(f"{' '.join(differing)} contradicts {said_by}, which has {says}; leave it out")
    rows = config.vocab_size
    if vocab_size > rows + kind.added or vocab_size < rows - max(_MOST_UNUSED, rows // 20):
        raise ValueError(
            f"the data have {vocab_size} token ids (the mask included), but {said_by} has {rows}, so they do not "
            "belong together: set data.tokenizer_name_or_path to the tokenizer of that model"
        )


def refuse_length(length: int, longest: int | None, said_by: str) -> None:
    """Raises ValueError where the model has positions for fewer tokens."""
    if longest and length > longest:
        raise ValueError(
            f"model.length={length} is longer than the {longest} positions of {said_by}; set model.length={longest} "
            "or less"
        )


def sizes(config: PretrainedConfig) -> dict[str, int | None]:
    """Under our keys."""
    names = {"model.hidden_size": "hidden_size", "model.n_blocks": "num_hidden_layers",
             "model.n_heads": "num_attention_heads"}  # fmt: skip
    return {ours: getattr(config, theirs, None) for ours, theirs in names.items()}


def forget_padding(model: PreTrainedModel) -> None:
    """Which id pads rows is the data's affair: here it may be that of a token which is learned, such as the end."""
    model.config.pad_token_id = None
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None


def set_dropout(config: PretrainedConfig, rate: float) -> None:
    """Put `rate` in place of every dropout rate of the config.

    Raises:
        ValueError: the model has no dropout to set.
    """
    inner = config.get_text_config()
    names = [
        name
        for name, value in inner.to_dict().items()
        if _DROPOUT.search(name) and not _NOT_OURS.search(name) and isinstance(value, int | float)
    ]
    if rate and not names:
        raise ValueError(f"model.dropout={rate}: a {config.model_type} model has no dropout; leave it out")
    for name in names:
        setattr(inner, name, rate)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def with_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first `rows` rows, with the mean of all of them where there are fewer."""
    if rows <= len(tensor):
        return tensor[:rows]
    mean = tensor.mean(0, keepdim=True)
    return torch.cat([tensor, mean.expand(rows - len(tensor), *mean.shape[1:])])


def load_config(kind: Kind, name: str) -> PretrainedConfig:
    """The model's config.json.

    Raises:
        FileNotFoundError: the model is nowhere.
        ValueError: what is there can not be used.
    """
    source, local = _source(name)
    try:
        return AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers raises many types, none of them for users
        raise _unusable(kind, name, source, local, error) from error


def load_weights(kind: Kind, name: str) -> Loaded:
    """The model with its weights.

    Raises: as `load_config`.
    """
    source, local = _source(name)
    try:
        model, info = kind.model_class.from_pretrained(
            source, local_files_only=local, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # transformers raises many types, none of them for users
        raise _unusable(kind, name, source, local, error) from error
    return Loaded(model, tuple(sorted(info["missing_keys"])))


def refuse_missing(kind: Kind, name: str, missing: tuple[str, ...]) -> None:
    """Raises ValueError where a file of weights lacks some."""
    if missing:
        raise ValueError(
            f"{KEY}={name}: its file of weights lacks {', '.join(missing[:3])} ({len(missing)} in all), which would be "
            f"random; give a complete {kind.words}, or set backbone.from_scratch=true"
        )


def _source(name: str) -> tuple[str, bool]:
    """What the library is to open, and whether that is a folder here."""
    root = os.environ.get("DATA_DIR")
    folders = ([Path(root) / name] if root else []) + [Path(name).expanduser()]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is not None:
        check_regular(found)
    if found is None and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
        raise FileNotFoundError(f"{KEY}={name}: there is no such folder; correct the path")
    return (name, False) if found is None else (str(found), True)


def _unusable(kind: Kind, name: str, source: str, local: bool, error: Exception) -> ValueError | FileNotFoundError:
    if local:
        return ValueError(
            f"{KEY}={name}: the folder {source} holds no {kind.words} that can be read "
            f"({first_line(error)}); it needs {FILES}"
        )
    return FileNotFoundError(
        f"{KEY}={name} was not found: put {FILES} into $DATA_DIR/{name} or another folder and name that, or make "
        f"{name!r} reachable on the Hugging Face Hub ({first_line(error)})"
    )


def first_line(error: Exception) -> str:
    """The kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
