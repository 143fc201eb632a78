"""The Mamba mixer (Gu and Dao, arXiv 2312.00752), in one direction and in both.

Attribute names are the parameter names of mamba_ssm and of the reference checkpoints and must not change.
Shape suffixes: B batch, L length, D width, E inner width, N state size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.models.selective_scan import gated_scan

_STEP_RANGE = (1e-3, 1e-1)  # of softplus(dt_proj.bias) at the start, log-uniform


class Mamba(nn.Module):
    """Gated short convolution and selective scan, from left to right: (B, L, D) -> (B, L, D). Neither the convolution
    nor the state sees the input where `padding_BL` is True, so that the outputs are those of the text without padding
    before or after it."""

    def __init__(self, dim: int, state_size: int = 16, conv_width: int = 4, expand: int = 2) -> None:
        super().__init__()
        inner = expand * dim
        self.state_size, self.dt_rank = state_size, math.ceil(dim / 16)
        self.A_log = nn.Parameter(torch.arange(1, state_size + 1).float().log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_width, groups=inner, padding=conv_width - 1)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        low, high = (math.log(step) for step in _STEP_RANGE)
        step_E = (low + (high - low) * torch.rand(inner)).exp()
        with torch.no_grad():
            self.dt_proj.bias.copy_(step_E + (-torch.expm1(-step_E)).log())  # the inverse of softplus

    def forward(self, x_BLD: Tensor, padding_BL: Tensor | None = None) -> Tensor:
        return self.out_proj(self.mix(self.in_proj(x_BLD), padding_BL))

    def mix(self, projected_BLEE: Tensor, padding_BL: Tensor | None = None) -> Tensor:
        """Apply everything between the two projections: (B, L, 2E) -> (B, L, E)."""
        x_BLE, z_BLE = projected_BLEE.chunk(2, dim=-1)
        convolved_BEL = self.conv1d(_absent(x_BLE, padding_BL).transpose(1, 2))[..., : x_BLE.shape[1]]
        # The convolution writes into the padding, through its bias and its width; remove that before the scan.
        u_BLE = _absent(F.silu(convolved_BEL).transpose(1, 2), padding_BL)
        delta, b_BLN, c_BLN = self.x_proj(u_BLE).split([self.dt_rank, self.state_size, self.state_size], dim=-1)
        delta_BLE = F.linear(delta, self.dt_proj.weight)
        return gated_scan(u_BLE, delta_BLE, -self.A_log.exp(), b_BLN, c_BLN, self.D, z_BLE, self.dt_proj.bias)


def _absent(x_BLE: Tensor, padding_BL: Tensor | None) -> Tensor:
    return x_BLE if padding_BL is None else x_BLE.masked_fill(padding_BL[..., None], 0.0)


class BiMamba(nn.Module):
    """The sum of two mixers, from the left and from the right, with shared projections, computed once (Caduceus, arXiv
    2403.03234, section 3.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mamba_fwd, self.mamba_rev = Mamba(dim), Mamba(dim)
        self.mamba_rev.in_proj, self.mamba_rev.out_proj = self.mamba_fwd.in_proj, self.mamba_fwd.out_proj

    def forward(self, x_BLD: Tensor, padding_BL: Tensor | None = None) -> Tensor:
        projected = self.mamba_fwd.in_proj(x_BLD)
        reversed_padding = None if padding_BL is None else padding_BL.flip(1)
        from_right = self.mamba_rev.mix(projected.flip(1), reversed_padding).flip(1)
        return self.mamba_fwd.out_proj(self.mamba_fwd.mix(projected, padding_BL) + from_right)
