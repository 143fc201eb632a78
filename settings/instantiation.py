"""Objects out of configurations: hydra's `instantiate`, for what this project defines and nothing else."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_type_hints

import hydra.utils
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from palimpsest.settings.names import PACKAGE, current
from palimpsest.settings.wiring import WIRING

_ABSENT = object()
ROOT = Path(__file__).resolve().parents[1]
# What configs/ names of libraries, beside callbacks of Lightning. All else is a module of ours, or is refused.
OF_LIBRARIES = frozenset({
    "builtins.str", "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger",
})  # fmt: skip
CALLBACKS = "lightning.pytorch.callbacks."


def instantiate(node: object, **arguments: object) -> object:
    """Build what a configuration's `_target_` names, as hydra.utils.instantiate does; None for None.

    Raises:
        ValueError: a `_target_`, at any depth, is neither defined in the project's folder, nor one of `OF_LIBRARIES`,
            nor a callback of Lightning.
    """
    node = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return hydra.utils.instantiate(_located_in(node), **arguments)


def wired(cfg: DictConfig, target: str, **given: object) -> object:
    """Build what the code builds itself, from the keys that settings/wiring.py hands on to it and the `given` ones."""
    found = {name: OmegaConf.select(cfg, key, default=_ABSENT) for name, key in WIRING[target].items()}
    plain = {
        name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in found.items()
        if value is not _ABSENT
    }
    return located(target)(**{**plain, **given})


def made_class(node: DictConfig) -> type:
    """Return the class of what a configuration's `_target_` makes."""
    build = located(node._target_)
    return build if isinstance(build, type) else get_type_hints(build)["return"]


def located(target: object) -> object:
    """Return the class or function at the path `target`.

    Raises:
        ValueError: it may not be built (see `instantiate`), or it cannot be imported.
    """
    refusal = ValueError(
        f"_target_={target!s:.200} is refused: a configuration builds only what the project defines. Put your module "
        f"into {ROOT} and name it, as CONTRIBUTING.md shows"
    )
    if not isinstance(target, str):
        raise refusal
    target = current(target)
    if not (target in OF_LIBRARIES or target.startswith((CALLBACKS, PACKAGE))):
        raise refusal
    try:
        found = hydra.utils.get_object(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"_target_={target} cannot be imported ({error}); correct the name") from error
    if target.startswith(CALLBACKS):
        if not (isinstance(found, type) and issubclass(found, Callback)):
            raise refusal
        return found
    # A module of ours also holds what it imports: files.os.system is no function of ours.
    module = inspect.getmodule(found)
    if target not in OF_LIBRARIES and (module is None or not module.__name__.startswith(PACKAGE)):
        raise refusal
    return found


def _named(target: object) -> str:
    """Return where `target` is now, after `located` has seen it."""
    located(target)
    return current(target)


def _located_in(node: object) -> object:
    """Return `node` with every `_target_` as it is called now, after `located` has seen it."""
    if isinstance(node, dict):
        return {key: _named(value) if key == "_target_" else _located_in(value) for key, value in node.items()}
    return [_located_in(part) for part in node] if isinstance(node, list) else node
