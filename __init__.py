"""Palimpsest: train, measure, sample and classify with discrete diffusion language models.

    import palimpsest
    model = palimpsest.load("outputs/reviews/micro-0123abcd/label=1")
    model.log_likelihood(["a dull film ."])
    model.sample(2)

What is named here is imported when it is first used: `import palimpsest` itself is quick.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "experiment.library": (
        "SampledText",
        "TextLikelihoods",
        "TrainedModel",
        "classify",
        "load",
        "log_likelihood",
        "sample",
        "train",
    ),
    "experiment.classifier": ("Predictions", "TrainedClassifier", "load_classifier"),
    "experiment.running": ("run",),
    "settings.command_line": ("compose_config",),
    "process": ("Absorbing", "Hybrid", "Uniform"),
    "noise_schedule": ("Cosine", "CosineSquared", "Geometric", "Linear", "LogLinear"),
    "objectives.subs": ("Subs",),
    "objectives.block": ("BlockDiffusion",),
    "objectives.udlm": ("UDLM",),
    "models.dit": ("DiT",),
    "samplers.base": ("TokenChoice",),
    "samplers.trace": ("Trace",),
    "common.randomness": ("KeyedNoise",),
    "estimators.nelbo": ("Nelbo",),
    "diffusion": ("Diffusion",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'palimpsest' has no attribute {name!r}; what it exports: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"palimpsest.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
