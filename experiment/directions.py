"""Checks of sampling.direction (texts from latents, latents from texts, both) against the other parts."""

from __future__ import annotations

import logging

from omegaconf import DictConfig, OmegaConf

from palimpsest.objectives.base import Objective
from palimpsest.samplers import ancestral
from palimpsest.settings.instantiation import located

log = logging.getLogger(__name__)

# What a direction asks of the network, each by the modes (training.joint_modes) any of which trains it.
_TRAINED_BY = {
    "l2t": [{"l2t", "joint"}],
    "edit": [{"l2t", "joint"}],
    "t2l": [{"t2l", "joint"}],
    "simultaneous": [{"joint"}],
    "latent_first": [{"latent", "joint"}, {"l2t", "joint"}],
}


def check_direction(cfg: DictConfig, objective: Objective) -> None:
    """Refuse a direction that the other parts do not allow.

    Raises:
        ValueError: with the setting, its value and the remedy.
    """
    direction, to_class, guidance = cfg.sampling.direction, cfg.classify["class"], cfg.sampling.guidance
    if guidance != 1 and not direction and to_class is None:
        raise ValueError(
            f"sampling.guidance={guidance} guides towards a class or a latent, and none is named; add classify.class= "
            "(or, with algo=mmldlm, sampling.direction=)"
        )
    if not direction:
        return
    if not objective.reads_latents:
        raise ValueError(
            f"sampling.direction={direction} is of texts and their latents, and parameterization={objective.name} "
            "knows texts alone; add algo=mmldlm, or leave it out"
        )
    if direction == "edit" and cfg.data.label is not None:
        raise ValueError(
            f"sampling.direction=edit takes texts to another class, and data.label={cfg.data.label} leaves one; leave "
            "data.label out"
        )
    if cfg.eval.compute_generative_perplexity:
        raise ValueError(
            "eval.compute_generative_perplexity=true measures free texts; leave out "
            f"sampling.direction={direction}, or the perplexity"
        )
    if to_class is not None:
        raise ValueError(f"classify.class={to_class} means nothing to sampling.direction={direction}; leave it out")
    _check_given(cfg, direction)
    _check_modes(cfg, direction)
    at_once = direction == "joint" and cfg.sampling.joint_order == "simultaneous"
    if (direction == "edit" or at_once) and located(cfg.sampler._target_) is not ancestral.sample:
        why = "begins at texts that are masked in part" if direction == "edit" else "has one grid for text and latent"
        raise ValueError(
            f"sampling.direction={direction} {why}, and {cfg.sampler._target_} has steps of its own; use "
            "sampling.predictor=ddpm or ddpm_cache"
        )


def _check_given(cfg: DictConfig, direction: str) -> None:
    given = [key for key in ("prefix", "template") if cfg.sampling[key]]
    if direction in ("l2t", "t2l", "edit") and given:
        raise ValueError(
            f"sampling.{given[0]}={cfg.sampling[given[0]]}: with sampling.direction={direction} texts are given by "
            "their latents, or are those of the split; leave it out"
        )


def _check_modes(cfg: DictConfig, direction: str) -> None:
    """Refuse a direction that the network is not trained for."""
    modes = cfg.training.get("joint_modes")
    if not OmegaConf.is_dict(modes):
        return
    trained = {mode for mode, weight in modes.items() if weight}
    marginal = "latent" if direction == "t2l" else "text"
    for enough in _TRAINED_BY.get(cfg.sampling.joint_order if direction == "joint" else direction, []):
        if not trained & enough:
            raise ValueError(
                f"sampling.direction={direction}: training.joint_modes={modes} trains nothing of the kind; it needs "
                f"{' or '.join(sorted(enough))}"
            )
    if cfg.sampling.guidance != 1 and marginal not in trained:
        raise ValueError(
            f"sampling.guidance={cfg.sampling.guidance} mixes in the marginal, which training.joint_modes={modes} "
            f"never trains; use 1, or give {marginal} a weight"
        )
    if marginal not in trained and direction != "joint":
        log.warning("training.joint_modes=%s never trains the marginal: what is told nothing is no fair control", modes)
