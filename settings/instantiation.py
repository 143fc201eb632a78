"""Build objects from configurations as hydra's `instantiate` does, but only those that this project allows."""

import inspect
from typing import get_type_hints

import hydra.utils
from hydra.errors import InstantiationException
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from palimpsest.settings.declared import ROOT
from palimpsest.settings.names import PACKAGE, current_path
from palimpsest.settings.wiring import WIRING

_ABSENT = object()
_LOGGERS = "lightning.pytorch.loggers."
# Library components that configs/ names, besides Lightning's callbacks. Others must be in our package.
OF_LIBRARIES = frozenset({"builtins.str", f"{_LOGGERS}CSVLogger", f"{_LOGGERS}TensorBoardLogger"})
CALLBACKS = "lightning.pytorch.callbacks."


def instantiate(node: object, **arguments: object) -> object:
    """Build the `_target_` of a configuration, as hydra.utils.instantiate does; None for None.

    Raises:
        ValueError: a `_target_`, at any depth, is neither defined in the project's folder, nor one of `OF_LIBRARIES`,
            nor a callback of Lightning.
        ValueError, OSError: as what is built raises them.
    """
    try:
        return hydra.utils.instantiate(_with_current_targets(plain(node)), **arguments)
    except InstantiationException as error:  # Hydra's wrapping would hide our message from the library's users
        if (cause := error.__cause__) and isinstance(cause, ValueError | OSError):
            raise cause from cause.__cause__
        raise


def build_from_settings(cfg: DictConfig, target: str, **given: object) -> object:
    """Build the class or function `target`, which no yaml names, from the configuration.

    settings/wiring.py says which key of `cfg` each argument takes; `given` are further arguments.
    """
    found = {name: OmegaConf.select(cfg, key, default=_ABSENT) for name, key in WIRING[target].items()}
    return resolve_target(target)(
        **{name: plain(value) for name, value in found.items() if value is not _ABSENT} | given
    )


def plain(value: object) -> object:
    """Return a value of a configuration, with nodes as dicts and lists and with interpolations resolved."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def class_built_by(node: DictConfig) -> type:
    """Return the class of the object that a configuration's `_target_` builds."""
    build = resolve_target(node._target_)
    return build if isinstance(build, type) else get_type_hints(build)["return"]


def resolve_target(target: object) -> object:
    """Return the class or function at the path `target`.

    Raises:
        ValueError: it is not allowed (see `instantiate`), or it cannot be imported.
    """
    refusal = ValueError(
        f"_target_={target!s:.200} is refused: a configuration builds only what the project defines. Put your module "
        f"into {ROOT} and name it, as CONTRIBUTING.md shows"
    )
    if not isinstance(target, str):
        raise refusal
    target = current_path(target)
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
    # Our modules also contain what they import: files.os.system is not ours.
    module = inspect.getmodule(found)
    if target not in OF_LIBRARIES and (module is None or not module.__name__.startswith(PACKAGE)):
        raise refusal
    return found


def _with_current_targets(node: object) -> object:
    """Return a copy of a configuration in which each `_target_`, at any depth, is current and allowed."""
    if isinstance(node, dict):
        return {
            key: current_path(value) if key == "_target_" and resolve_target(value) else _with_current_targets(value)
            for key, value in node.items()
        }
    return [_with_current_targets(part) for part in node] if isinstance(node, list) else node
