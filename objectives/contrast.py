"""The classes' likelihoods of a class-conditional model, trained against each other.

Shape suffixes: B batch, C classes, K compared classes.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.models.backbone import Backbone
from palimpsest.models.class_conditioning import under_class
from palimpsest.objectives.base import Batch, Objective, drop_latent
from palimpsest.objectives.projection import gradients_afterwards

# Classes that a text is read under, its own included. Each costs a network evaluation.
_MOST_COMPARED = 4


def class_log_joint(
    objective: Objective,
    backbone: Backbone,
    batch: Batch,
    log_prior_C: Tensor,
    noise: KeyedNoise,
    seed_dropout: Callable[[], None],
) -> Tensor:
    """Return log p(text, class) of the text's own class, in column 0, and of other classes, nats (B, K).

    Each likelihood is one estimate of the bound (`Objective.contrasted`). Every class sees the same masks and the same
    dropout. With more than 4 classes, 3 others are drawn at random.

    Args:
        batch: rows with their classes, `label` (B,).
        log_prior_C: log probabilities of the classes.
        seed_dropout: seeds torch's generator; it is called before every class.
    """
    noise = copy.copy(noise)
    class_BK = _compared(batch["label"], len(log_prior_C), noise)
    contrasted = objective.contrasted()
    log_joint = []
    with gradients_afterwards():
        for class_B in class_BK.unbind(1):
            seed_dropout()
            loss = contrasted.loss(backbone, under_class(drop_latent(batch), class_B, backbone), copy.copy(noise))
            log_joint.append(log_prior_C[class_B] - loss.nll_BL.double().sum(-1))
    return torch.stack(log_joint, dim=1)


def _compared(label_B: Tensor, num_classes: int, noise: KeyedNoise) -> Tensor:
    """Return each text's own class and then other ones, all of them or a random choice, (B, K)."""
    key_BC = noise.uniform(num_classes).scatter(1, label_B[:, None], -1.0)
    return key_BC.argsort(dim=1)[:, :_MOST_COMPARED]


def class_losses(log_joint_BK: Tensor, num_classes: int) -> Tensor:
    """Return the cross-entropy of each text's own class, and whether it is the most probable of those compared, (B, 2).

    In the cross-entropy the other classes that were drawn stand for all others. The cross-entropy, added to the
    generative loss, makes a hybrid of generative and discriminative training (Lasserre et al., CVPR 2006). Equally
    probable classes share the credit.
    """
    drawn = log_joint_BK.shape[1] - 1
    correction_K = log_joint_BK.new_full((drawn + 1,), math.log((num_classes - 1) / drawn))
    correction_K[0] = 0.0
    cross_entropy_B = -(log_joint_BK + correction_K).log_softmax(1)[:, 0]
    best_BK = log_joint_BK == log_joint_BK.amax(1, keepdim=True)
    return torch.stack([cross_entropy_B, best_BK[:, 0] / best_BK.sum(1)], dim=1)
