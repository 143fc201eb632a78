"""Models of the transformers library as backbones, shared by backbone=hf_causal and backbone=hf_mlm.

Weights are read from safetensors files only, and no code of a model is run.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from palimpsest.common.files import check_regular
from palimpsest.models.backbone import Backbone
from palimpsest.models.checkpoints import Checkpoint, read_settings

KEY = "backbone.name_or_path"
FILES = "config.json and model.safetensors"
_NO_TOKEN = -1
_MOST_UNUSED = 1024  # rows of the network beyond the ids of the data, such as those from rounding up to a multiple
_DROPOUT = re.compile(r"(dropout|pdrop)(_prob)?$")
_OTHER_HEADS = re.compile(r"classifier|summary")


@dataclass(frozen=True)
class Kind:
    """A kind of published model."""

    backbone: str  # name on the command line
    model_class: type  # class of the library that builds and loads it
    words: str  # description in messages
    config_key: str  # key under which our checkpoints keep the config.json that it was built from
    added: int  # largest number of data ids beyond those of the network, such as a new mask


class PublishedBackbone(Backbone):
    """A network of the transformers library, in `model`.

    Args:
        config: config.json of the published model.
        vocab_size: ids of the data, the mask included; rows of the embedding and of the head.
        name: name or path of the pretrained weights, as typed; None for a network without.
        dropout: replaces every rate of `config`; None keeps them.
    """

    kind: Kind
    model: PreTrainedModel

    def __init__(self, config: PretrainedConfig, name: str | None) -> None:
        super().__init__()
        self.name, self._config_json = name, config.to_json_string(use_diff=False)

    @property
    def settings(self) -> dict[str, object]:
        """Return the constructor arguments, by their keys on the command line."""
        return {**sizes(self.model.config.get_text_config()), self.kind.config_key: self._config_json}

    def pretrained(self) -> Checkpoint | None:
        """Return the weights that a new training starts from; None if it starts from random ones.

        Rows that the published model lacks are the mean of its rows; rows beyond the ids of the data are left out.
        Raises as `load_config`.
        """
        if self.name is None:
            return None
        model, missing = load_weights(self.kind, self.name)
        self._check_missing(model, missing)
        ours = self.state_dict()
        rows = model.config.get_text_config().vocab_size
        state: dict[str, Tensor] = {}
        for theirs, tensor in model.state_dict().items():
            name = self._name_here(theirs)
            if name in ours and tensor.shape != ours[name].shape and tensor.shape[:1] == (rows,):
                tensor = resize_rows(tensor, self.vocab_size)
            state[name] = ours[name].clone() if theirs in missing else tensor
        return Checkpoint(Path(self.name), state)

    def _check_missing(self, model: PreTrainedModel, missing: list[str]) -> None:
        refuse_missing(self.kind, self.name, missing)

    def _name_here(self, name: str) -> str:
        return f"model.{name}"

    def recompute_blocks(self) -> None:
        """Switch gradient checkpointing on, by the library's own switch. Raises ValueError if it has none."""
        if not self.model.supports_gradient_checkpointing:
            raise ValueError(
                f"training.gradient_checkpointing=true: a {self.model.config.model_type} model of transformers does "
                "not support it; leave it out"
            )
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def build(kind: Kind, config: PretrainedConfig) -> PreTrainedModel:
    """Build the architecture with random weights, in float32. Raises ValueError if there is no such architecture of
    this kind, or its sizes do not fit together."""
    try:
        return kind.model_class.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, ImportError, AssertionError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"backbone={kind.backbone} cannot build a {config.model_type} ({first_line(error)})"
        ) from error


@torch.no_grad()
def head_input(model: PreTrainedModel, head: nn.Linear, ids_BL: Tensor, **inputs: object) -> Tensor | None:
    """Return the input of the head in a forward pass of `model`; None if the logits are not the output of the head."""
    seen: list[Tensor] = []
    output_BLV = torch.linspace(-100, 100, ids_BL.numel() * head.out_features).view(*ids_BL.shape, -1)
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]) or output_BLV)
    logits_BLV = model(input_ids=ids_BL, **inputs).logits
    hook.remove()
    return seen[0] if len(seen) == 1 and torch.equal(logits_BLV, output_BLV) else None


def saved_config(
    kind: Kind, files: dict[str, str | None], typed: dict[str, str | None]
) -> tuple[PretrainedConfig, str] | None:
    """Return the config that the first of `files` (key -> path) with one was saved with, and the file as typed. Raises
    ValueError if it cannot be read or contradicts `typed`.

    Args:
        typed: keys that name the origin of the config; values that are not None must be those of the file.
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
    kind: Kind, config: PretrainedConfig, typed: dict[str, int | None], vocab_size: int, source: str
) -> None:
    """Raise ValueError if typed sizes are not those of the model, or the data have another vocabulary."""
    known = sizes(config)
    differing = [f"{key}={value}" for key, value in typed.items() if value not in (None, known[key])]
    if differing:
        says = " ".join(f"{key}={value}" for key, value in known.items())
        raise ValueError(f"{' '.join(differing)} contradicts {source}, which has {says}; leave it out")
    rows = config.vocab_size
    if vocab_size > rows + kind.added or vocab_size < rows - max(_MOST_UNUSED, rows // 20):
        raise ValueError(
            f"the data have {vocab_size} token ids (the mask included), but {source} has {rows}, so they do not "
            "belong together: set data.tokenizer_name_or_path to the tokenizer of that model"
        )


def refuse_length(length: int, longest: int | None, source: str) -> None:
    """Raise ValueError if the model has fewer positions than `length`."""
    if longest and length > longest:
        raise ValueError(
            f"model.length={length} is longer than the {longest} positions of {source}; set model.length={longest} "
            "or less"
        )


def sizes(config: PretrainedConfig) -> dict[str, int | None]:
    """Return the sizes of a network, by our keys."""
    names = {"model.hidden_size": "hidden_size", "model.n_blocks": "num_hidden_layers",
             "model.n_heads": "num_attention_heads"}  # fmt: skip
    return {ours: getattr(config, theirs, None) for ours, theirs in names.items()}


def clear_padding_id(model: PreTrainedModel) -> None:
    """Remove the padding id of the model. The data choose which id pads rows, possibly a learned token such
    as the end."""
    try:
        model.config.pad_token_id = None
    except StrictDataclassFieldValidationError:  # Nomic BERT and the decoder of ModernBERT must have a number
        model.config.pad_token_id = _NO_TOKEN
    if hasattr(model.base_model, "pad_index"):  # XLM and FlauBERT take it for the end of a row
        model.base_model.pad_index = _NO_TOKEN
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None


def set_dropout(config: PretrainedConfig, rate: float) -> None:
    """Replace every dropout rate of the config by `rate`. Raises ValueError if the model has no dropout."""
    inner = config.get_text_config()
    names = [
        name
        for name, value in inner.to_dict().items()
        if _DROPOUT.search(name) and not _OTHER_HEADS.search(name) and isinstance(value, int | float)
    ]
    if rate and not names:
        raise ValueError(f"model.dropout={rate}: a {config.model_type} model has no dropout; leave it out")
    for name in names:
        setattr(inner, name, rate)


def close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal except for rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def resize_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return the first `rows` rows; rows that are missing are the mean of all."""
    if rows <= len(tensor):
        return tensor[:rows]
    return torch.cat([tensor, tensor.mean(0, keepdim=True).expand(rows - len(tensor), *tensor.shape[1:])])


def load_config(kind: Kind, name: str) -> PretrainedConfig:
    """Read the model's config.json. Raises FileNotFoundError if the model is not found, ValueError if it cannot be
    used."""
    source, local = _source(name)
    try:
        return AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers raises many types, none of them for users
        raise _unusable(kind, name, source, local, error) from error


def load_weights(kind: Kind, name: str) -> tuple[PreTrainedModel, list[str]]:
    """Load the model with its weights, and the names of those that its files lack and that are therefore random. Raises
    as `load_config`."""
    source, local = _source(name)
    try:
        model, info = kind.model_class.from_pretrained(
            source,
            local_files_only=local,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many types, none of them for users
        raise _unusable(kind, name, source, local, error) from error
    return model, sorted(info["missing_keys"])


def refuse_missing(kind: Kind, name: str, missing: list[str]) -> None:
    """Raise ValueError if a file lacks weights."""
    if missing:
        raise ValueError(
            f"{KEY}={name}: its file of weights lacks {', '.join(missing[:3])} ({len(missing)} in all), which would be "
            f"random; give a complete {kind.words}, or set backbone.from_scratch=true"
        )


def _source(name: str) -> tuple[str, bool]:
    """Return the folder or Hub name for the library to open, and whether it is a local folder."""
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
    """Return the type of an error and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
