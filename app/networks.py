"""Networks in memory, and the experiments (as of main.py) that use them."""

import threading
from collections.abc import Callable, Mapping, Sequence

from palimpsest.app.runs import Classifier, Network
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.experiment.classifier import TrainedClassifier, read_classes
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.running import checked
from palimpsest.scripts.generate import quoted
from palimpsest.settings.command_line import compose_config


class Networks:
    """Loader of networks on first use, which keeps the last that sampled and the last that classified.

    Args:
        extra: words of the command line (key=value) for every experiment.
    """

    def __init__(self, extra: Sequence[str] = ()) -> None:
        self._extra, self._composing = list(extra), threading.Lock()
        self._kept: dict[str, tuple[object, object, object]] = {}

    def sampler(self, network: Network, settings: Mapping[str, object]) -> tuple[Experiment, TextData, Diffusion]:
        """Return the experiment, data and model of `network` for sampling with `settings`, keys of main.py.

        Raises ValueError for settings that contradict each other or the network.
        """
        settings = {"mode": "sample_eval", "eval.checkpoint_path": str(network.path), "eval.split": "null",
                    **({} if network.label is None else {"data.label": network.label}), **settings}  # fmt: skip
        experiment = self._experiment(network, settings)
        experiment.build.drawing()  # noqa: B018 - raises for invalid settings before anything is read

        def read() -> tuple[TextData, Diffusion]:
            data = experiment.build.data()
            return data, experiment.weights.trained(data, str(network.path), experiment.weights.disable_ema)

        return experiment, *self._once("sampler", network.version, read)

    def classifier(self, classifier: Classifier, settings: Mapping[str, object]) -> TrainedClassifier:
        """Return the class models that mode=classify would use, with `settings`.

        Raises ValueError for settings that contradict each other or the networks, and for data without classes.
        """
        first = classifier.networks[0]
        settings = {"mode": "classify", "checkpointing.save_dir": str(classifier.folder), **settings}
        experiment = self._experiment(first, settings)
        version = " ".join(network.version for network in classifier.networks)
        read = lambda: read_classes(experiment, classifier.folder, first.conditional)
        return TrainedClassifier(experiment, *self._once("classifier", version, read))

    def classes(self, network: Network) -> list[str]:
        """Return the names of the classes that a network can be conditioned on."""
        return list(self._experiment(network, {}).data().label_names) if network.conditional else []

    def _experiment(self, network: Network, settings: Mapping[str, object]) -> Experiment:
        with self._composing:  # Hydra composes one configuration at a time
            words = [*network.words, *(f"{key}={quoted(key, value)}" for key, value in settings.items()), *self._extra]
            configuration = compose_config(words)
        return checked(configuration, "python -m palimpsest.app", words)

    def _once(self, kind: str, version: str, read: Callable[[], tuple[object, object]]) -> tuple[object, object]:
        if self._kept.get(kind, ("",))[0] != version:
            self._kept.pop(kind, None)  # free its memory first
            self._kept[kind] = (version, *read())
        return self._kept[kind][1:]
