"""Objectives that train another objective, and the views of a backbone that they show it."""

from dataclasses import dataclass
from typing import Self

from torch import nn

from palimpsest.models.backbone import Backbone
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.objectives.base import Objective, TokenDiffusion
from palimpsest.objectives.mask_sampling import MaskSampler


class WrapperObjective(Objective):
    """An objective that trains another one, `inner`, on blocks of a text or on a text with its latent."""

    inner: TokenDiffusion

    def contrasted(self) -> Self:
        other = self.bound(None)
        other.inner = self.inner.contrasted()
        return other

    @property
    def T(self) -> int:  # noqa: N802
        return self.inner.T

    @property
    def mask_sampler(self) -> MaskSampler:
        return self.inner.mask_sampler

    @property
    def schedule(self) -> NoiseSchedule:
        return self.inner.schedule

    @property
    def independent_unmasking(self) -> bool:
        return self.inner.independent_unmasking


@dataclass
class BackboneView:
    """A backbone whose `encode` a subclass replaces."""

    backbone: Backbone
    bigrams = None  # experiment/fits.py refuses them for objectives that read a network through a view

    @property
    def encodes_positions(self) -> bool:
        return self.backbone.encodes_positions

    @property
    def head(self) -> nn.Linear:
        return self.backbone.head
