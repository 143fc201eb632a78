"""Objects out of configurations: hydra's `instantiate`, for what this project defines and nothing else."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import hydra.utils
from lightning.pytorch import Callback
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent
# What configs/ names of libraries, beside callbacks of Lightning. All else is a module of this folder, or is refused.
OF_LIBRARIES = frozenset({
    "builtins.str", "lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.loggers.TensorBoardLogger",
    "transformers.get_constant_schedule_with_warmup", "transformers.get_cosine_schedule_with_warmup",
})  # fmt: skip
CALLBACKS = "lightning.pytorch.callbacks."


def instantiate(node: object, **arguments: object) -> object:
    """Build what a configuration's `_target_` names, as hydra.utils.instantiate does; None for None.

    Raises:
        ValueError: a `_target_`, at any depth, is neither defined in the project's folder, nor one of `OF_LIBRARIES`,
            nor a callback of Lightning.
    """
    for target in _targets(OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node):
        located(target)
    return hydra.utils.instantiate(node, **arguments)


def located(target: object) -> object:
    """Return the class or function at the path `target`.

    Raises:
        ValueError: it is none of what may be built (`instantiate`), or it cannot be imported.
    """
    refusal = ValueError(
        f"_target_={target!s:.200} is refused: a configuration builds only what the project defines. Put your module "
        f"into {ROOT} and name it, as CONTRIBUTING.md shows"
    )
    if not isinstance(target, str) or not (target in OF_LIBRARIES or target.startswith(CALLBACKS) or _is_ours(target)):
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
    if target not in OF_LIBRARIES and (module is None or not _is_ours(module.__name__)):
        raise refusal
    return found


def _targets(node: object) -> Iterator[object]:
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "_target_")
    if isinstance(node, dict | list):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _targets(part)


@lru_cache
def _is_ours(path: str) -> bool:
    """Whether the first part of a dotted path is a module or package right in the project's folder."""
    first = path.partition(".")[0]
    spec = importlib.util.find_spec(first) if first.isidentifier() and first != "__main__" else None
    if spec is None:
        return False
    places = spec.submodule_search_locations or ([spec.origin] if spec.has_location else [])
    return bool(places) and all(Path(place).resolve().parent == ROOT for place in places)
