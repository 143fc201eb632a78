"""Checks of sampling.direction, the direction of conditional generation, against the other settings."""

import logging

from omegaconf import DictConfig, OmegaConf

from palimpsest.objectives.base import Objective
from palimpsest.samplers import ancestral
from palimpsest.settings.instantiation import resolve_target

log = logging.getLogger(__name__)

# The abilities that a direction needs, each as the set of modes (training.joint_modes) that train it.
_TRAINED_BY = {
    "l2t": [{"l2t", "joint"}],
    "edit": [{"l2t", "joint"}],
    "t2l": [{"t2l", "joint"}],
    "simultaneous": [{"joint"}],
    "latent_first": [{"latent", "joint"}, {"l2t", "joint"}],
}


def check_direction(cfg: DictConfig, objective: Objective) -> None:
    """Check a direction against the other settings.

    Raises:
        ValueError: with the setting, its value and the remedy.
    """
    direction = cfg.sampling.direction
    to_class = cfg.classify["class"]
    by = cfg.sampling.guidance_by
    guided = [f"sampling.guidance={cfg.sampling.guidance}"] if cfg.sampling.guidance != 1 else []
    guided += [f"sampling.guidance_by={by}"] if by != "network" else []
    if guided and not direction and to_class is None:
        raise ValueError(
            f"{' '.join(guided)} guides towards a class or a latent, but none is given; add classify.class= "
            "(or, with algo=mmldlm, sampling.direction=)"
        )
    if not direction:
        return
    if not objective.reads_latents:
        raise ValueError(
            f"sampling.direction={direction} needs latents, and parameterization={objective.name} "
            "has texts only; add algo=mmldlm, or leave it out"
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
    prompts = [key for key in ("prefix", "template", "max_length") if cfg.sampling[key]]
    if direction in ("l2t", "t2l", "edit") and prompts:
        raise ValueError(
            f"sampling.{prompts[0]}={cfg.sampling[prompts[0]]}: with sampling.direction={direction} texts are given by "
            "their latents, or are those of the split; leave it out"
        )
    _check_modes(cfg, direction)
    at_once = direction == "joint" and cfg.sampling.joint_order == "simultaneous"
    if (direction == "edit" or at_once) and resolve_target(cfg.sampler._target_) is not ancestral.sample:
        why = "starts from partially masked texts" if direction == "edit" else "has one time grid for text and latent"
        raise ValueError(
            f"sampling.direction={direction} {why}, but {cfg.sampler._target_} has its own steps; use "
            "sampling.predictor=ddpm or ddpm_cache"
        )


def _check_modes(cfg: DictConfig, direction: str) -> None:
    """Check that the network is trained for a direction."""
    modes = cfg.training.get("joint_modes")
    if not OmegaConf.is_dict(modes):
        return
    trained = {mode for mode, weight in modes.items() if weight}
    marginal = "latent" if direction == "t2l" else "text"
    for sufficient in _TRAINED_BY.get(cfg.sampling.joint_order if direction == "joint" else direction, []):
        if not trained & sufficient:
            raise ValueError(
                f"sampling.direction={direction}: training.joint_modes={modes} does not train it; it needs "
                f"{' or '.join(sorted(sufficient))}"
            )
    if cfg.sampling.guidance != 1 and marginal not in trained:
        raise ValueError(
            f"sampling.guidance={cfg.sampling.guidance} mixes in the marginal, which training.joint_modes={modes} "
            f"never trains; use 1, or give {marginal} a weight"
        )
    if marginal not in trained and direction != "joint":
        log.warning("training.joint_modes=%s never trains the marginal, so the unconditional control is unfair", modes)
