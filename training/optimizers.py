"""Optimizers: each builder takes the backbone and returns one torch optimizer."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.lr_scheduler import LambdaLR

from palimpsest.common.values import IF_SET, BelowOne, NotNegative, Positive
from palimpsest.models.class_conditioning import class_columns

# A weight matrix of one of a backbone's repeated blocks.
_BLOCK_MATRIX = re.compile(r"(^|\.)(blocks|layers?)\.\d+\..*\.weight$")


def adamw(
    backbone: nn.Module,
    lr: NotNegative,
    beta1: BelowOne,
    beta2: BelowOne,
    eps: NotNegative,
    weight_decay: NotNegative,
    class_lr: Annotated[Positive, IF_SET] | None = None,
) -> torch.optim.AdamW:
    """Return AdamW (arXiv 1711.05101) over all parameters, with torch's fused kernel.

    class_lr: learning rate of the parameters that tell a conditional network the class, and of its output biases.
    """
    learned = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True)
    # Otherwise Lightning refuses to clip gradients under mixed precision, because the fused kernel can unscale them.
    optimizer._step_supports_amp_scaling = False
    return with_class_lr(optimizer, backbone, lr, class_lr)


def with_class_lr(
    optimizer: torch.optim.Optimizer, backbone: nn.Module, lr: float, class_lr: float | None
) -> torch.optim.Optimizer:
    """Multiply the optimizer's updates of the classes' own parameters by class_lr / lr, and return the optimizer.

    They are columns of matrices, which cannot have a group of their own.

    Raises:
        ValueError: there is nothing to multiply.
    """
    if class_lr is None:
        return optimizer
    if not backbone.num_classes or not lr:
        why = "optim.lr=0" if not lr else "the network is not told classes (classify.sharing=conditional)"
        raise ValueError(f"optim.class_lr={class_lr}: {why}; leave it out")
    parts = [*backbone.class_parameters, class_columns(backbone.head, backbone.num_classes)]
    before: list[Tensor] = []

    def views() -> list[Tensor]:
        return [(p.to_local() if isinstance(p, DTensor) else p).detach()[:, part] for p, part in parts]

    def remember(*_: object) -> None:
        before[:] = [view.clone() for view in views()]

    def multiply(*_: object) -> None:
        for view, old in zip(views(), before, strict=True):
            view.copy_(old + class_lr / lr * (view - old))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(multiply)
    return optimizer


def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    """Return what each group of parameters is updated with."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def set_hyperparameters(scheduler: LambdaLR, typed: Sequence[Mapping[str, object]]) -> None:
    """Give an optimizer the hyperparameters that were typed, where a checkpoint of other settings brought its own.

    Cuts of plateau=cut stay. The learning rate of the next step is that of the typed schedule, which may be longer.
    """
    for number, (group, own) in enumerate(zip(scheduler.optimizer.param_groups, typed, strict=True)):
        if own["initial_lr"] != group["initial_lr"]:
            cuts = scheduler.base_lrs[number] / group["initial_lr"] if group["initial_lr"] else 1.0
            scheduler.base_lrs[number] = own["initial_lr"] * cuts
        rate = scheduler.base_lrs[number] * scheduler.lr_lambdas[number](scheduler.last_epoch)
        group.update({**own, "lr": rate})


class MuonWithAdamW(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters, stepped together."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        # The groups are the parts' own dicts, so a learning-rate scheduler changes them.
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = torch.enable_grad()(closure)() if closure else None
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
    """Muon for matrices that may be sharded over devices, and that is fast on CPUs.

    torch's Muon computes in bfloat16, which a CPU without such instructions emulates: a step took 0.39 s instead of
    0.02 s on two blocks of width 128.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: nn.Parameter, group: Mapping[str, object]) -> None:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(momentum, group["momentum"])  # Nesterov's
        if isinstance(update, DTensor):  # the whole matrix is needed
            whole = update.redistribute(placements=[Replicate()] * update.device_mesh.ndim)
            update = DTensor.from_local(_orthogonal(whole.to_local(), group), whole.device_mesh, whole.placements)
            update = update.redistribute(placements=p.placements)
        else:
            update = _orthogonal(update, group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update.to(p.dtype), alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def _orthogonal(matrix: Tensor, group: Mapping[str, object]) -> Tensor:
    """Return U V^T of the matrix's singular value decomposition U S V^T, roughly, by Newton-Schulz iterations."""
    a, b, c = group["ns_coefficients"]
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def muon(
    backbone: nn.Module,
    lr: NotNegative,
    matrix_lr: NotNegative,
    beta1: BelowOne,
    beta2: BelowOne,
    eps: NotNegative,
    weight_decay: NotNegative,
    class_lr: Annotated[Positive, IF_SET] | None = None,
) -> torch.optim.Optimizer:
    """Return Muon with `matrix_lr` on the blocks' weight matrices, and AdamW with `lr` on all other parameters.

    Muon is that of Jordan et al. 2024 (kellerjordan.github.io/posts/muon). The others are embedding, head, norms,
    biases and the modulation of adaLN. class_lr: as for `adamw`.
    """
    matrices = []
    rest = []
    for name, p in backbone.named_parameters():
        if p.requires_grad:
            is_matrix = p.ndim == 2 and _BLOCK_MATRIX.search(name) and "adaLN" not in name
            (matrices if is_matrix else rest).append(p)
    if not matrices:
        raise ValueError("optim=muon found no weight matrix in the backbone's blocks; use optim=adamw")
    optimizer = MuonWithAdamW(
        _Muon(matrices, lr=matrix_lr, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, fused=True),
    )
    return with_class_lr(optimizer, backbone, lr, class_lr)
