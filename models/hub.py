"""Models in the Hub's layout: finding them, and reading config.json in the keys of our command line.

A directory has `config.json` and `model.safetensors` or `pytorch_model.bin`. Code in it is never run.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from palimpsest.common.files import PathOrUrl, exists, is_remote, open_regular, path_or_url
from palimpsest.models.reference_settings import OBJECTIVES

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
MODEL_TYPE = "mdlm"
BLOCK_MODEL_TYPE = "bd3lm"  # the same network, read in blocks
UNIFORM_MODEL_TYPE = "DUO"

# config.json's names -> ours, as in kuleshov-group/mdlm-owt; mask_padding is added by our own exports.
CONFIG_KEYS = {"vocab_size": "vocab_size", "model_length": "model.length", "hidden_dim": "model.hidden_size",
               "cond_dim": "model.cond_dim", "n_blocks": "model.n_blocks", "n_heads": "model.n_heads",
               "dropout": "model.dropout", "time_conditioning": "time_conditioning",
               "mask_padding": "model.mask_padding"}  # fmt: skip
# Defaults of the reference's configuration class, which a file may leave out.
_DEFAULTS = {"model.cond_dim": 129, "model.dropout": 0.1, "time_conditioning": False}

_MOST_CONFIG = 1 << 24  # bytes

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def locate(path: str | Path, key: str) -> PathOrUrl:
    """Return the local path or URL of a model; a name such as `org/name` is downloaded from the Hub. Raises
    FileNotFoundError if it is not found; `key` is the setting that named it."""
    where = path_or_url(path, key)
    if exists(where):
        return where if is_remote(where) else _model_at(where, key)
    name = str(path)
    if not _HUB_ID.fullmatch(name) or name.endswith(_FILES):
        raise FileNotFoundError(f"{key}={name}: there is no such file or directory")
    try:
        return _snapshot(name)
    except Exception as error:  # the Hub's client raises many types, none of them for users
        reason = next(iter(str(error).strip().splitlines()), "")
        raise FileNotFoundError(
            f"{key}={name}: there is no such directory here, and the Hugging Face Hub did not give a model of that "
            f"name ({type(error).__name__}: {reason}). Download it where there is a network "
            f"(hf download {name} --local-dir DIR) and set {key}=DIR, or run this with access to the Hub"
        ) from error


def _model_at(path: Path, key: str) -> Path:
    """Return the checkpoint file or Hub-layout directory that a local path means. A weight file of the Hub's layout
    means its folder. A folder without config.json means its last.ckpt (also in checkpoints/ below it), or the only
    `.ckpt` in it."""
    if path.is_file():
        return path.parent if path.name in WEIGHT_FILES else path
    if (path / CONFIG_FILE).exists():
        return path
    for last in (path / "last.ckpt", path / "checkpoints" / "last.ckpt"):
        if last.exists():
            return last
    found = sorted(path.glob("*.ckpt"))
    if len(found) > 1:
        raise ValueError(f"{key}={path} holds {len(found)} checkpoints and none named last.ckpt; name one, {found[0]}")
    return found[0] if found else path


def _snapshot(name: str) -> Path:
    """Download configuration and weights of a model on the Hub, preferably safetensors, without its code."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, "*.safetensors"]))
    if not (folder / WEIGHT_FILES[0]).exists():
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHT_FILES[1]]))
    return folder


def read_config(folder: Path) -> dict[str, object]:
    """Read the `config.json` of a Hub-layout directory. Raises FileNotFoundError if there is none, ValueError if it is
    not a JSON object, too large or too deep."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}: it is not a model in the Hub's layout")
    with open_regular(path) as file:
        content = file.read(_MOST_CONFIG + 1)
    if len(content) > _MOST_CONFIG:
        raise ValueError(f"{path} has more than {_MOST_CONFIG:,} bytes; download or export the model again")
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); download or export the model again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object; download or export the model again")
    return config


# Settings in config.json of a block model, with the values of a DiT.
_AS_A_DIT = {"causal": False, "adaln": True, "cross_attn": True}


def settings_of_config(config: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of the network in a `config.json`, including defaults, by our keys."""
    found = {**_DEFAULTS, **{ours: config[theirs] for theirs, ours in CONFIG_KEYS.items() if theirs in config}}
    kind = str(config.get("model_type", MODEL_TYPE))
    if kind == BLOCK_MODEL_TYPE and "block_size" in config:
        found["block_size"] = config["block_size"]
    if kind == UNIFORM_MODEL_TYPE:  # time-conditioned by default
        found["time_conditioning"] = config.get("time_conditioning", True)
    objective = OBJECTIVES.get(kind.lower())
    return {**found, **({"parameterization": objective, "backbone": "dit"} if objective else {})}


def unsupported(config: Mapping[str, object]) -> str:
    """Return the reason why the model of a `config.json` cannot be used here; "" if it can."""
    kind = config.get("model_type", MODEL_TYPE)
    if kind not in (MODEL_TYPE, BLOCK_MODEL_TYPE, UNIFORM_MODEL_TYPE):
        return f"it is a model of type {kind}"
    differing = [f"{key}={config[key]}" for key, ours in _AS_A_DIT.items() if config.get(key, ours) != ours]
    if kind == BLOCK_MODEL_TYPE and differing:
        return f"it has {', '.join(differing)} in its config.json, which no diffusion transformer read in blocks has"
    return ""


def settings_of_tensors(state: Mapping[str, Tensor]) -> dict[str, object]:
    """Return the settings of a DiT that follow from the names and shapes of its tensors, by our keys."""
    shape = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found: dict[str, object] = {}
    if "vocab_embed.embedding" in shape:
        found["vocab_size"], found["model.hidden_size"] = shape["vocab_embed.embedding"]
    if "sigma_map.mlp.0.bias" in shape:
        (found["model.cond_dim"],) = shape["sigma_map.mlp.0.bias"]
    if "rotary_emb.inv_freq" in shape and "model.hidden_size" in found:
        found["model.n_heads"] = found["model.hidden_size"] // (2 * shape["rotary_emb.inv_freq"][0])
    blocks = {name.split(".")[1] for name in shape if name.startswith("blocks.")}
    if blocks:
        found["model.n_blocks"] = len(blocks)
    return found
