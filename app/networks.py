"""Networks in memory, and the experiments (main.py) that they are used with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from palimpsest.app.runs import Classifier, Network
from palimpsest.classification.models import ClassModel
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.experiment.classifier import read_classes
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.running import checked
from palimpsest.scripts.generate import quoted
from palimpsest.settings.command_line import compose_config


@dataclass(frozen=True)
class Writer:
    """A network that writes, with its data and what it is asked for this time."""

    diffusion: Diffusion
    data: object
    experiment: Experiment


@dataclass(frozen=True)
class Judges:
    """The networks of all classes, with their data and what they are asked for this time."""

    models: list[ClassModel]
    data: object
    experiment: Experiment


class Networks:
    """Reads networks when they are first used, and keeps the last that wrote and the last that classified.

    extra: words of the command line (key=value) that every experiment is told.
    """

    def __init__(self, extra: Sequence[str] = ()) -> None:
        self._extra, self._composing = list(extra), threading.Lock()
        self._kept: dict[str, tuple[object, object, object]] = {}

    def writer(self, network: Network, asked: Mapping[str, object]) -> Writer:
        """`network` with the settings `asked`, keys as main.py takes them.

        Raises:
            ValueError: settings that contradict each other or the network.
        """
        settings = {"mode": "sample_eval", "eval.checkpoint_path": str(network.path), "eval.split": "null",
                    **({} if network.label is None else {"data.label": network.label}), **asked}  # fmt: skip
        experiment = self._experiment(network, settings)
        experiment.build.drawing()  # noqa: B018 - what it refuses, before anything is read

        def read() -> tuple[object, Diffusion]:
            data = experiment.build.data()
            return data, experiment.weights.trained(data, str(network.path), disable_ema=False)

        data, diffusion = self._once("writer", network.version, read)
        return Writer(diffusion, data, experiment)

    def judges(self, classifier: Classifier, asked: Mapping[str, object]) -> Judges:
        """The models of the classes with the settings `asked`: those that mode=classify would use.

        Raises:
            ValueError: settings that contradict each other or the networks; data without classes.
        """
        settings = {"mode": "classify", "checkpointing.save_dir": str(classifier.folder), **asked}
        experiment = self._experiment(classifier.networks[0], settings)

        def read() -> tuple[TextData, list[ClassModel]]:
            return read_classes(experiment, classifier.folder, classifier.networks[0].conditional)

        version = " ".join(network.version for network in classifier.networks)
        data, models = self._once("judges", version, read)
        return Judges(models, data, experiment)

    def classes(self, network: Network) -> list[str]:
        """Names of the classes that a network can be told."""
        return list(self._experiment(network, {}).data().label_names) if network.conditional else []

    def _experiment(self, network: Network, asked: Mapping[str, object]) -> Experiment:
        with self._composing:  # Hydra composes one configuration at a time
            words = [*network.words, *(f"{key}={quoted(key, value)}" for key, value in asked.items()), *self._extra]
            configuration = compose_config(words)
        return checked(configuration, "python -m app", words)

    def _once(self, kind: str, version: str, read: Callable[[], tuple[object, object]]) -> tuple[object, object]:
        if self._kept.get(kind, ("",))[0] != version:
            self._kept.pop(kind, None)  # before another takes its room
            self._kept[kind] = (version, *read())
        return self._kept[kind][1:]
