"""Gaussian diffusion of latents: noising in training, prediction targets, and losses.

Shape suffixes: B batch, K latent tokens, D numbers of each.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import NotNegative
from palimpsest.gaussian_process import LatentPrediction, cosine_level, noise_latent, read_prediction, velocity
from palimpsest.models.layers import at_least_float32

# Range of training times. At t = 0 and 1 nothing can be learned, because x0 or eps cannot be recovered from x_t.
EARLIEST, LATEST = 1e-3, 1 - 1e-3


@dataclass(frozen=True)
class NoisedLatent:
    """A latent, its noise, and the noised latent, (B, K, D) in float32 or more, at the time t_B, float64 (B,)."""

    x0_BKD: Tensor
    eps_BKD: Tensor
    xt_BKD: Tensor
    t_B: Tensor


class LatentLoss(NamedTuple):
    """The training loss, and detached squared error and cosine of the predicted latent; row means over K D numbers."""

    loss_B: Tensor
    mse_B: Tensor
    cosine_B: Tensor


class GaussianDiffusion:
    """Variance-preserving diffusion in continuous time with the cosine schedule.

    Latents are standardised to mean 0 and variance 1, as the schedule's signal-to-noise ratio assumes. Everything is
    computed in float32, under any autocast. Raises ValueError for loss=cosine without target=x0.

    Args:
        target: the meaning of the network's output: v, x0 or eps.
        loss: mse or huber on the target. mse_cosine adds `cosine_weight` times one minus the cosine of the true and the
            predicted latent. cosine is that term alone.
        cosine_weight: weight of that term in mse_cosine.
    """

    def __init__(
        self,
        target: Literal["v", "x0", "eps"] = "v",
        loss: Literal["mse", "huber", "mse_cosine", "cosine"] = "mse",
        cosine_weight: NotNegative = 1.0,
    ) -> None:
        if loss == "cosine" and target != "x0":
            raise ValueError(
                f"training.latent_loss=cosine with training.latent_target={target}: a cosine ignores the length of the "
                f"prediction, which a sampler needs to step by {target}; use training.latent_target=x0 (directions "
                "only), or training.latent_loss=mse_cosine"
            )
        self.target = target
        self.form = loss
        self.cosine_weight = cosine_weight

    def draw(self, x0_BKD: Tensor, noise: KeyedNoise) -> NoisedLatent:
        """Noise every row at its own time, uniform from EARLIEST to LATEST."""
        t_B = EARLIEST + (LATEST - EARLIEST) * noise.uniform()
        return self.at(x0_BKD, noise.normal(*x0_BKD.shape[1:]), t_B)

    def at(self, x0_BKD: Tensor, eps_BKD: Tensor, t_B: Tensor) -> NoisedLatent:
        """Return `x0_BKD` with the noise `eps_BKD` at time t_B, in at least float32."""
        x0_BKD = at_least_float32(x0_BKD)
        eps_BKD = eps_BKD.to(x0_BKD.dtype)
        return NoisedLatent(x0_BKD, eps_BKD, noise_latent(x0_BKD, eps_BKD, cosine_level(t_B).like(x0_BKD)), t_B)

    def read(self, output_BKD: Tensor, xt_BKD: Tensor, t_B: Tensor) -> LatentPrediction:
        """Return the prediction for x_t that the network's output stands for."""
        xt_BKD = at_least_float32(xt_BKD)
        return read_prediction(self.target, output_BKD.to(xt_BKD.dtype), xt_BKD, cosine_level(t_B).like(xt_BKD))

    def loss(self, output_BKD: Tensor, noised: NoisedLatent) -> LatentLoss:
        """Return the loss of the network's output for `noised`."""
        with torch.autocast(output_BKD.device.type, enabled=False):
            x0_BKD, output_BKD = noised.x0_BKD, output_BKD.to(noised.x0_BKD.dtype)
            predicted_BKD = self.read(output_BKD, noised.xt_BKD, noised.t_B).x0_BKD
            cosine_B = F.cosine_similarity(predicted_BKD, x0_BKD, dim=-1).mean(-1)
            if self.form == "cosine":
                loss_B = 1 - cosine_B
            else:
                error = F.huber_loss if self.form == "huber" else F.mse_loss
                loss_B = error(output_BKD, self._target(noised), reduction="none").mean((-2, -1))
                if self.form == "mse_cosine":
                    loss_B = loss_B + self.cosine_weight * (1 - cosine_B)
            mse_B = (predicted_BKD - x0_BKD).detach().square().mean((-2, -1))
        return LatentLoss(loss_B, mse_B, cosine_B.detach())

    def _target(self, noised: NoisedLatent) -> Tensor:
        if self.target == "v":
            return velocity(noised.x0_BKD, noised.eps_BKD, cosine_level(noised.t_B).like(noised.x0_BKD))
        return noised.x0_BKD if self.target == "x0" else noised.eps_BKD
