"""DUO's curriculum for uniform-state diffusion (Sahoo et al., arXiv 2506.10892, section 4.1).

The uniform-state process is the argmax of a Gaussian diffusion of one-hot vectors. Early in training the network reads
the softmax of the Gaussian instead of its argmax.

Shape suffixes: B batch, L length, V vocabulary, S points of a table.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import Natural, real
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.objectives.base import Backbone, Batch, scored_mask
from palimpsest.objectives.mask_sampling import Draw, MaskSampler
from palimpsest.objectives.udlm import UDLM
from palimpsest.objectives.wrapping import BackboneView
from palimpsest.process import Uniform


class Duo(UDLM):
    """UDLM with softened inputs during the first `curriculum_end` optimizer steps.

    The network reads softmax(w_t / tau), where w_t is the Gaussian whose argmax is x_t; the loss is that of x_t. tau
    falls from 10^gumbel_tau_log10_start to 10^gumbel_tau_log10_end. Afterwards, and in evaluation, this is UDLM.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        process: Uniform,
        noising: MaskSampler | None = None,
        curriculum_end: Natural = 1000,
        gumbel_tau_log10_start: Annotated[float, real("[-12, 12]")] = -1.0,
        gumbel_tau_log10_end: Annotated[float, real("[-12, 12]")] = -2.0,
    ) -> None:
        super().__init__(schedule, process, noising)
        self.curriculum_end = curriculum_end
        self.tau_log10 = (gumbel_tau_log10_start, gumbel_tau_log10_end)
        self._signal_S, self._alpha_S = signal_table(process.vocab_size)

    def temperature(self, step: int) -> float:
        """Return the temperature tau at an optimizer step."""
        start, end = self.tau_log10
        return 10 ** (start + (end - start) * step / self.curriculum_end)

    def check_network(self, network: type[Backbone]) -> None:
        if self.curriculum_end and not network.reads_mixtures:
            raise ValueError(
                f"algo=duo needs a network that reads mixtures of tokens, and {network.__name__} does not; use "
                "backbone=dit, or algo.curriculum_end=0"
            )

    def network_input(self, backbone: Backbone, batch: Batch, draw: Draw, noise: KeyedNoise) -> tuple[Backbone, Tensor]:
        step = int(batch["step"]) if "step" in batch else self.curriculum_end
        if step >= self.curriculum_end:
            return backbone, draw.xt_BL
        self.check_network(type(backbone))
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        signal_B = self._signal(self.schedule(draw.t_B).alpha)
        noise = noise.part(1)
        vocab_size = self.process.vocab_size
        xt_BL = x0_BL.clone()
        mixture_BLV = signal_B.new_zeros(*x0_BL.shape, vocab_size, dtype=torch.float32)
        mixture_BLV.scatter_(-1, x0_BL[..., None], 1.0)
        for row_1 in torch.arange(len(x0_BL), device=x0_BL.device).split(1):  # float64 takes much memory
            weight_1LV = gaussian_draw(x0_BL[row_1], signal_B[row_1], vocab_size, noise.rows(row_1))
            xt_BL[row_1] = torch.where(scored_BL[row_1], weight_1LV.argmax(-1), x0_BL[row_1])
            soft_1LV = (weight_1LV / self.temperature(step)).softmax(-1).float()
            mixture_BLV[row_1] = torch.where(scored_BL[row_1][..., None], soft_1LV, mixture_BLV[row_1])
        return _MixtureInput(backbone, mixture_BLV), xt_BL

    def _signal(self, alpha_B: Tensor) -> Tensor:
        """Return the signal-to-noise ratio at which the argmax keeps a token as often as the process does, (B,)."""
        self._signal_S, self._alpha_S = (table_S.to(alpha_B.device) for table_S in (self._signal_S, self._alpha_S))
        place_B = torch.searchsorted(self._alpha_S, alpha_B).clamp(1, len(self._alpha_S) - 1)
        low_B, high_B = self._alpha_S[place_B - 1], self._alpha_S[place_B]
        fraction_B = ((alpha_B - low_B) / (high_B - low_B)).clamp(0, 1)
        return self._signal_S[place_B - 1] + fraction_B * (self._signal_S[place_B] - self._signal_S[place_B - 1])


def gaussian_draw(x0_BL: Tensor, signal_B: Tensor, vocab_size: int, noise: KeyedNoise) -> Tensor:
    """Draw w_t ~ N(a x_0, (1 - a^2) I) for one-hot x_0 and a / sqrt(1 - a^2) = `signal_B`, (B, L, V)."""
    spread_B = (1 + signal_B**2).rsqrt()
    clean_BLV = nn.functional.one_hot(x0_BL, vocab_size).double()
    noise_BLV = noise.normal(x0_BL.shape[1], vocab_size)
    return (signal_B * spread_B)[:, None, None] * clean_BLV + spread_B[:, None, None] * noise_BLV


def signal_table(vocab_size: int, points: int = 2000) -> tuple[Tensor, Tensor]:
    """Return evenly spaced signal-to-noise ratios and the alpha of the uniform-state process of each, float64 (S,).

    This is the diffusion transformation operator of DUO (eq. 10). The argmax keeps the token with probability
    E[Phi(z + signal)^(V - 1)] over z ~ N(0, 1), which equals alpha + (1 - alpha) / V.
    """
    signal_S = torch.linspace(0, math.sqrt(2 * math.log(vocab_size)) + 8, points, dtype=torch.float64)
    z_N = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    density_N = (-(z_N**2) / 2).exp()
    log_below_SN = torch.special.log_ndtr(z_N + signal_S[:, None])
    kept_S = ((vocab_size - 1) * log_below_SN).exp() @ density_N / density_N.sum()
    alpha_S = ((kept_S - 1 / vocab_size) / (1 - 1 / vocab_size)).clamp(0, 1)
    return signal_S, alpha_S.cummax(0).values


@dataclass
class _MixtureInput(BackboneView):
    """A network that reads a mixture of tokens instead of its input tokens."""

    mixture_BLV: Tensor

    def encode(self, tokens_BL: Tensor, sigma_B: Tensor, **cond: Tensor | Positions) -> Tensor:
        return self.backbone.encode(self.mixture_BLV, sigma_B, **cond)
