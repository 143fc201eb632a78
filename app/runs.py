"""Discovery of trained networks and classifiers in named folders or in ./outputs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from palimpsest.common.files import PathOrUrl, is_remote, path_or_url, version
from palimpsest.experiment.from_checkpoint import training_identity
from palimpsest.scripts import generate
from palimpsest.settings.command_line import CONFIGS
from palimpsest.settings.identity import overrides

OUTPUTS = Path("outputs")
_LAST = ("checkpoints", "last.ckpt")
_BLOCK_SAMPLERS, _CAUSAL_SAMPLERS = ("block_unmask", "block"), ("ar",)
_OTHER_KEYS = ("semi_ar",)  # a sampler with keys that the app does not offer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network:
    """A trained network: its checkpoint, its configuration, and the class it was trained on (None for all)."""

    path: PathOrUrl
    configuration: Mapping[str, object]
    label: int | None

    @property
    def title(self) -> str:
        """Folder of its run; for a file other than last.ckpt its path."""
        text = str(self.path)
        return text.removesuffix("/".join(_LAST)).rstrip("/") or text

    @property
    def version(self) -> str:
        """Identifier that changes when the checkpoint is rewritten."""
        return f"{self.path} {version(self.path)}"

    @cached_property
    def words(self) -> list[str]:
        """Words of a command line for its data, network and objective."""
        return overrides(self.configuration)

    @property
    def conditional(self) -> bool:
        """True if it can be conditioned on a class."""
        return self.configuration.get("classify.sharing") == "conditional"

    @property
    def decoders(self) -> list[str]:
        """Choices of sampling.predictor; the first is the default of scripts/generate.py."""
        first = generate.predictor(self.configuration)
        for group in (_CAUSAL_SAMPLERS, _BLOCK_SAMPLERS):
            if first in group:
                return list(group)
        if first == "uniform":
            return [first]
        unfit = ["first_hitting"] if first == "analytic" else []
        excluded = (first, "uniform", *unfit, *_CAUSAL_SAMPLERS, *_BLOCK_SAMPLERS, *_OTHER_KEYS)
        names = [path.stem for path in sorted((CONFIGS / "sampler").glob("*.yaml"))]
        return [first, *(name for name in names if name not in excluded)]


@dataclass(frozen=True)
class Classifier:
    """The networks of a classifying run in `folder`: one per class in order, or one conditioned on the class."""

    folder: Path
    networks: tuple[Network, ...]


def find(typed: Sequence[str]) -> list[Network]:
    """Return the networks of the given checkpoints and folders, by default those below ./outputs, newest first.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is not a checkpoint of this project.
    """
    if typed:
        return [_network(path) for name in typed for path in _checkpoints(name)]
    paths = sorted(OUTPUTS.rglob("/".join(_LAST)), key=lambda path: path.stat().st_mtime, reverse=True)
    found = []
    for path in paths:
        try:
            found.append(_network(path))
        except (ValueError, OSError) as error:  # damaged, or being written
            log.warning("left out: %s", error)
    if not found:
        raise FileNotFoundError(
            "there is no trained network below ./outputs: train one (python main.py; python main.py mode=classify for "
            "the models of classes), or name a checkpoint or the folder of a run: python -m palimpsest.app "
            "--checkpoint PATH"
        )
    return found


def classifiers(networks: Sequence[Network]) -> list[Classifier]:
    """Return the classifiers: networks of classes 0, 1, ... of one run, and networks conditioned on the class."""
    found = [Classifier(network.path.parents[1], (network,)) for network in networks
             if network.conditional and not is_remote(network.path)]  # fmt: skip
    by_folder: dict[Path, dict[int, Network]] = {}
    for network in networks:
        per_class = not is_remote(network.path) and network.path.parts[-3:] == (f"label={network.label}", *_LAST)
        if per_class and network.label is not None:
            by_folder.setdefault(network.path.parents[2], {})[network.label] = network
    for folder, classes in by_folder.items():
        if len(classes) > 1 and sorted(classes) == list(range(len(classes))):
            found.append(Classifier(folder, tuple(classes[label] for label in sorted(classes))))
    return found


def _checkpoints(typed: str) -> list[PathOrUrl]:
    path = path_or_url(typed, "--checkpoint")
    if is_remote(path) or not path.is_dir():
        return [path]
    found = sorted(path.rglob("/".join(_LAST)))
    if not found:
        raise FileNotFoundError(
            f"--checkpoint {typed}: no run in this folder has a {'/'.join(_LAST)}; name the folder of a run, or a "
            ".ckpt file"
        )
    return found


def _network(path: PathOrUrl) -> Network:
    known = training_identity(path, "--checkpoint")
    return Network(path, known["configuration"], known.get("label"))
