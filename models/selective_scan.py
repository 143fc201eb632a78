"""The selective scan of Mamba (arXiv 2312.00752, algorithm 2), by mamba_ssm's kernel where that runs, else in PyTorch.

Shape suffixes: B batch, L length, E inner width, N state size, S segments. In the PyTorch scan time comes first, so
that the slice of a step is contiguous, and the width last, so that its operations vectorise.
"""

import importlib.util
import math
import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from palimpsest.models.layers import at_least_float32


def gated_scan(u_BLE: Tensor, *others: Tensor) -> Tensor:
    """Return (y + D u) silu(z), (B, L, E), where y is the selective scan of u with steps softplus(delta + delta_bias).
    It is computed in float32 (at least) under any autocast, and returned in the precision of `u_BLE`. `others` are the
    other arguments of `torch_scan`."""
    scan = kernel_scan if u_BLE.is_cuda and kernel_available() else torch_scan
    return scan(u_BLE, *others)


@cache
def kernel_available() -> bool:
    """Return whether mamba_ssm is installed, and warn once if it is not."""
    found = importlib.util.find_spec("mamba_ssm") is not None
    if not found:
        warnings.warn(
            "mamba_ssm is not installed: Mamba runs its PyTorch scan, which gives the same numbers and is slow on a "
            "GPU; pip install mamba-ssm causal-conv1d",
            stacklevel=2,
        )
    return found


def kernel_scan(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    z_BLE: Tensor,
    delta_bias_E: Tensor,
) -> Tensor:
    """Run `gated_scan` on mamba_ssm's CUDA kernel, which needs one precision and the length last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, b, c, z = (
        x.to(u_BLE.dtype).transpose(1, 2).contiguous() for x in (u_BLE, delta_BLE, B_BLN, C_BLN, z_BLE)
    )
    out_BEL = selective_scan_fn(
        u, delta, A_EN.float(), b, c, D_E.float(), z=z, delta_bias=delta_bias_E.float(), delta_softplus=True
    )
    return out_BEL.transpose(1, 2)


def torch_scan(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    z_BLE: Tensor,
    delta_bias_E: Tensor,
) -> Tensor:
    """Run `gated_scan` in PyTorch, on any device."""
    with torch.autocast(u_BLE.device.type, enabled=False):
        u, delta, b, c, z = (at_least_float32(x) for x in (u_BLE, delta_BLE, B_BLN, C_BLN, z_BLE))
        y = selective_scan(u, F.softplus(delta + delta_bias_E), A_EN, b, c)
        return ((y + D_E * u) * F.silu(z)).to(u_BLE.dtype)


def selective_scan(u_BLE: Tensor, delta_BLE: Tensor, A_EN: Tensor, B_BLN: Tensor, C_BLN: Tensor) -> Tensor:
    """Return y_t = C_t . h_t, (B, L, E), with h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, h_0 = 0, per channel of
    E."""
    u, delta, b, c = (x.transpose(0, 1).contiguous() for x in (u_BLE, delta_BLE, B_BLN, C_BLN))
    return _Scan.apply(u, delta, A_EN.T.contiguous(), b, c).transpose(0, 1)


def _advance(h_BNE, delta_BE, A_NE, b_BN, du_BE, decay_BNE, out_BNE):  # noqa: ANN001, ANN202
    """Write one step of the recurrence into `out_BNE`, which may be `h_BNE`; leave exp(delta A) in `decay_BNE`."""
    torch.mul(delta_BE[:, None], A_NE, out=decay_BNE).exp_()
    torch.mul(decay_BNE, h_BNE, out=out_BNE)
    out_BNE.addcmul_(b_BN[:, :, None], du_BE[:, None])


class _Scan(torch.autograd.Function):
    """The recurrence, whose backward pass is the reverse recurrence, without an autograd graph per step. Only the state
    at the start of each of about sqrt(L) segments is kept; the backward pass recomputes the states of a segment from
    it. The tensors of a step thus stay in cache, and memory grows with sqrt(L) states."""

    @staticmethod
    def forward(ctx, u_LBE, delta_LBE, A_NE, b_LBN, c_LBN):  # noqa: ANN001, ANN205
        length, (batch, width) = len(u_LBE), u_LBE.shape[1:]
        segment = math.isqrt(length - 1) + 1
        h = u_LBE.new_zeros(batch, len(A_NE), width)
        scratch, starts = torch.empty_like(h), h.new_empty(-(-length // segment), *h.shape)
        du_LBE, y_LBE = delta_LBE * u_LBE, torch.empty_like(u_LBE)
        for t in range(length):
            if t % segment == 0:
                starts[t // segment] = h
            _advance(h, delta_LBE[t], A_NE, b_LBN[t], du_LBE[t], scratch, out_BNE=h)
            torch.sum(torch.mul(c_LBN[t, :, :, None], h, out=scratch), 1, out=y_LBE[t])
        ctx.save_for_backward(u_LBE, delta_LBE, A_NE, b_LBN, c_LBN, starts)
        ctx.segment = segment
        return y_LBE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LBE):  # noqa: ANN001, ANN205
        u_LBE, delta_LBE, A_NE, b_LBN, c_LBN, starts = ctx.saved_tensors
        length, grad_LBE = len(u_LBE), grad_LBE.contiguous()
        du_LBE = delta_LBE * u_LBE
        grad_delta, grad_du, grad_b, grad_c = (torch.empty_like(x) for x in (delta_LBE, u_LBE, b_LBN, c_LBN))
        states = starts.new_empty(ctx.segment + 1, *starts.shape[1:])
        decays, scratch = torch.empty_like(states[1:]), torch.empty_like(states[0])
        # g is d loss / d h_t, and carries to h_{t-1} through the decay.
        g, grad_A = torch.zeros_like(scratch), torch.zeros_like(scratch)
        for s in reversed(range(len(starts))):
            times = range(s * ctx.segment, min((s + 1) * ctx.segment, length))
            states[0] = starts[s]
            for k, t in enumerate(times):
                _advance(states[k], delta_LBE[t], A_NE, b_LBN[t], du_LBE[t], decays[k], out_BNE=states[k + 1])
            for k, t in reversed(list(enumerate(times))):
                g.addcmul_(c_LBN[t, :, :, None], grad_LBE[t, :, None])
                torch.sum(torch.mul(states[k + 1], grad_LBE[t, :, None], out=scratch), 2, out=grad_c[t])
                torch.sum(torch.mul(g, du_LBE[t, :, None], out=scratch), 2, out=grad_b[t])
                torch.sum(torch.mul(g, b_LBN[t, :, :, None], out=scratch), 1, out=grad_du[t])
                g.mul_(decays[k])
                torch.mul(g, states[k], out=scratch)  # d loss / d (delta_t A)
                grad_A.addcmul_(scratch, delta_LBE[t, :, None])
                torch.sum(scratch.mul_(A_NE), 1, out=grad_delta[t])
        return grad_du * delta_LBE, grad_delta.addcmul_(grad_du, u_LBE), grad_A.sum(0), grad_b, grad_c
