"""Which trained networks there are: those named, or the runs of ./outputs, and which of them classify together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from palimpsest.common.files import PathOrUrl, is_remote, path_or_url, version
from palimpsest.experiment.carried import carried
from palimpsest.scripts import generate
from palimpsest.settings.command_line import CONFIGS
from palimpsest.settings.identity import overrides

OUTPUTS = Path("outputs")
_LAST = ("checkpoints", "last.ckpt")
# Decoders of models that write in blocks, or from the left; and one that goes on behind full rows, by keys of its own.
_OF_BLOCKS, _FROM_THE_LEFT, _BEHIND_ROWS = ("block_unmask", "block"), ("ar",), ("semi_ar",)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Network:
    """A trained network: where its checkpoint lies, the configuration that this carries, the class it was trained on
    (None: all)."""

    path: PathOrUrl
    configuration: Mapping[str, object]
    label: int | None

    @property
    def title(self) -> str:
        """The folder of its run; of another file than last.ckpt its path."""
        text = str(self.path)
        return text.removesuffix("/".join(_LAST)).rstrip("/") or text

    @property
    def version(self) -> str:
        """Changes when the checkpoint is written anew."""
        return f"{self.path} {version(self.path)}"

    @cached_property
    def words(self) -> list[str]:
        """Of a command line, for its data, network and objective."""
        return overrides(self.configuration)

    @property
    def conditional(self) -> bool:
        """Whether it can be told a class."""
        return self.configuration.get("classify.sharing") == "conditional"

    @property
    def decoders(self) -> list[str]:
        """Choices of sampling.predictor, the first as scripts/generate.py chooses it."""
        first = generate.predictor(self.configuration)
        for some in (_FROM_THE_LEFT, _OF_BLOCKS):
            if first in some:
                return list(some)
        others = [path.stem for path in sorted((CONFIGS / "sampler").glob("*.yaml"))]
        return [first, *(name for name in others if name not in (first, *_FROM_THE_LEFT, *_OF_BLOCKS, *_BEHIND_ROWS))]


@dataclass(frozen=True)
class Classifier:
    """Networks that classify: one for each class, in the order of the classes, or one that is told the class. folder:
    of the run."""

    folder: Path
    networks: tuple[Network, ...]


def find(typed: Sequence[str]) -> list[Network]:
    """The networks of the checkpoints, and of the folders with runs, that were typed; without any those below
    ./outputs, the newest first.

    Raises:
        FileNotFoundError: there is none.
        ValueError: what was typed is no checkpoint of ours.
    """
    if typed:
        return [_network(path) for name in typed for path in _checkpoints(name)]
    paths = sorted(OUTPUTS.rglob("/".join(_LAST)), key=lambda path: path.stat().st_mtime, reverse=True)
    found = []
    for path in paths:
        try:
            found.append(_network(path))
        except (ValueError, OSError) as error:  # one that is damaged, or being written
            log.warning("left out: %s", error)
    if not found:
        raise FileNotFoundError(
            "there is no trained network below ./outputs: train one (python main.py; python main.py mode=classify for "
            "the models of classes), or name a checkpoint or the folder of a run: python -m app --checkpoint PATH"
        )
    return found


def classifiers(networks: Sequence[Network]) -> list[Classifier]:
    """Those that classify: networks of the classes 0, 1, ... of one run, and networks that are told the class."""
    found = [Classifier(network.path.parents[1], (network,)) for network in networks
             if network.conditional and not is_remote(network.path)]  # fmt: skip
    by_folder: dict[Path, dict[int, Network]] = {}
    for network in networks:
        here = not is_remote(network.path) and network.path.parts[-3:] == (f"label={network.label}", *_LAST)
        if here and network.label is not None:
            by_folder.setdefault(network.path.parents[2], {})[network.label] = network
    for folder, classes in by_folder.items():
        if len(classes) > 1 and sorted(classes) == list(range(len(classes))):
            found.append(Classifier(folder, tuple(classes[label] for label in sorted(classes))))
    return found


def _checkpoints(typed: str) -> list[PathOrUrl]:
    path = path_or_url(typed, "--checkpoint")
    if is_remote(path) or not path.is_dir():
        return [path]
    below = sorted(path.rglob("/".join(_LAST)))
    if not below:
        raise FileNotFoundError(
            f"--checkpoint {typed}: no run in this folder has a {'/'.join(_LAST)}; name the folder of a run, or a "
            ".ckpt file"
        )
    return below


def _network(path: PathOrUrl) -> Network:
    known = carried(path, "--checkpoint")
    return Network(path, known["configuration"], known.get("label"))
