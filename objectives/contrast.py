"""The classes' likelihoods of a class-conditional model, trained against each other.

Shape suffixes: B batch, C classes, K compared classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.models.backbone import Backbone
from palimpsest.objectives.base import Batch, Objective, drop_latent
from palimpsest.objectives.projection import weighted_afterwards

# Classes that a text is read under, its own included. Each costs a network evaluation.
_MOST_COMPARED = 4


def class_log_odds(
    objective: Objective,
    backbone: Backbone,
    batch: Batch,
    log_prior_C: Tensor,
    noise: KeyedNoise,
    seed_dropout: Callable[[], None],
) -> Tensor:
    """Return log p(text, class), up to a constant, for the text's own class in column 0 and other classes, (B, K).

    The cross-entropy of their softmax, added to the generative loss, makes a hybrid of generative and discriminative
    training (Lasserre et al., CVPR 2006). p(text | class) stays a normalised likelihood.

    Each likelihood is one estimate of the bound from high mask rates (`Objective.contrasted`), where classes differ
    most. Every class sees the same masks and the same dropout. With more than 4 classes, 3 others are drawn at random
    and stand for all others.

    Args:
        batch: rows with their classes, `label` (B,).
        log_prior_C: log probabilities of the classes.
        seed_dropout: seeds torch's generator; it is called before every class.
    """
    contrasted = objective.contrasted()
    class_BK = _compared(batch["label"], len(log_prior_C), noise)
    log_joint = []
    with weighted_afterwards():
        for class_B in class_BK.unbind(1):
            seed_dropout()
            loss = contrasted.loss(backbone, {**drop_latent(batch), "class_id": class_B}, copy.copy(noise))
            log_joint.append(log_prior_C[class_B] - loss.nll_BL.double().sum(-1))
    log_joint_BK = torch.stack(log_joint, dim=1)
    drawn, others = class_BK.shape[1] - 1, len(log_prior_C) - 1
    return log_joint_BK + F.one_hot(torch.zeros_like(batch["label"]), drawn + 1).logical_not() * math.log(
        others / drawn
    )


def _compared(label_B: Tensor, num_classes: int, noise: KeyedNoise) -> Tensor:
    """Return each text's own class and then other ones, all of them or a random choice, (B, K)."""
    key_BC = copy.copy(noise).uniform(num_classes).scatter(1, label_B[:, None], -1.0)
    return key_BC.argsort(dim=1)[:, :_MOST_COMPARED]
