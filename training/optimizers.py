"""Optimizers as configuration names them: each builder takes the backbone and gives one torch optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from palimpsest.common.values import BelowOne, NotNegative

# A weight matrix of one of a backbone's repeated blocks.
_BLOCK_MATRIX = re.compile(r"(^|\.)(blocks|layers?)\.\d+\..*\.weight$")


def adamw(
    backbone: nn.Module, lr: NotNegative, beta1: BelowOne, beta2: BelowOne, eps: NotNegative, weight_decay: NotNegative
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over all parameters, in torch's fused kernel."""
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True
    )
    # Else Lightning refuses to clip gradients under mixed precision: the fused kernel offers to unscale them itself.
    optimizer._step_supports_amp_scaling = False
    return optimizer


class MuonWithAdamW(torch.optim.Optimizer):
    """Several optimizers, each over its own parameters, that step as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        # The groups stay the parts' own dicts, so that a learning-rate scheduler reaches them.
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, object]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


class _Muon(torch.optim.Muon):
    """Muon also for matrices that are shared out over devices: its step needs them whole, so gradients and momenta are
    put together for it on every device, and the momenta shared out again."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        shared = [p for group in self.param_groups for p in group["params"] if isinstance(p, DTensor)]
        for p in shared:
            if p.grad is not None:
                p.grad = _together(p.grad)
                self.state[p].update({name: _together(value) for name, value in self.state[p].items()})
        loss = super().step(closure)
        for p in shared:
            state = self.state[p]
            state.update({name: value.redistribute(placements=p.placements) for name, value in state.items()})
        return loss


def _together(tensor: DTensor) -> DTensor:
    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def muon(
    backbone: nn.Module,
    lr: NotNegative,
    matrix_lr: NotNegative,
    beta1: BelowOne,
    beta2: BelowOne,
    eps: NotNegative,
    weight_decay: NotNegative,
) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with `matrix_lr` on the blocks' weight matrices,
    AdamW with `lr` on everything else: embedding, head, norms, biases and the modulation of adaLN."""
    named = [(name, p) for name, p in backbone.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if p.ndim == 2 and _BLOCK_MATRIX.search(name) and "adaLN" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    if not matrices:
        raise ValueError("optim=muon found no weight matrix in the backbone's blocks; use optim=adamw")
    return MuonWithAdamW(
        _Muon(matrices, lr=matrix_lr, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True),
    )
