"""The vocabulary projection at selected positions, which holds one chunk of logits at a time.

A loss that knows the weight of every position beforehand gets its gradient together with its value, so that a training
step takes three products with the vocabulary's matrix (logits, gradient of the hidden states, gradient of the weights)
instead of four.

Shape suffixes: N selected positions, C positions of a chunk, K numbers per position, V vocabulary, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Approximate size of the float32 logits of a chunk. A GPU needs large ones, because each costs a few launches.
_CHUNK_BYTES, _CHUNK_BYTES_CUDA = 32 * 2**20, 512 * 2**20
# For so few rows, reading the weights dominates; BLAS is up to 3 times faster if they are the first operand.
_FEW_ROWS = 8
# The largest deviation of a position's gradient from its weight, as a share of it.
_TOLERANCE = 1e-3

_NOTHING = (False, False, False)

# (logits (C, V), the chunk's part of each row tensor, weights of the positions or None) -> (numbers (C, K), of which
# the first is the loss, and the gradient of the weighted loss (C, V), None without weights). It may change the logits.
Step = Callable[[Tensor, tuple[Tensor, ...], Tensor | None], tuple[Tensor, Tensor | None]]


class Biases(NamedTuple):
    """Biases of the logits that are not trained.

    Attributes:
        add: adds them to the logits of some positions, (C, V), in place, from their part of each of `rows`.
        rows: tensors (N,).
    """

    add: Callable[..., None]
    rows: tuple[Tensor, ...]


_gradients_afterwards = ContextVar("gradients_afterwards", default=False)


@contextmanager
def gradients_afterwards() -> Iterator[None]:
    """Compute gradients in the backward pass, for losses whose positions have weights that are not known before."""
    token = _gradients_afterwards.set(True)
    try:
        yield
    finally:
        _gradients_afterwards.reset(token)


def _chunks(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    chunk_bytes = _CHUNK_BYTES_CUDA if device.type == "cuda" else _CHUNK_BYTES
    rows = max(1, chunk_bytes // (4 * vocab_size))
    return (slice(start, min(start + rows, num_rows)) for start in range(0, max(num_rows, 1), rows))


def _logits(
    hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, banned_id: int | None, weights_first: bool
) -> Tensor:
    """Return the logits; with `weights_first` in the memory layout (V, C), in which a CPU computes them faster."""
    if weights_first:
        logits_CV = (weight_VD @ hidden_CD.T).T
        logits_CV = (logits_CV if bias_V is None else logits_CV.add_(bias_V)).float()
    else:
        logits_CV = F.linear(hidden_CD, weight_VD, bias_V).float()
    if banned_id is not None:
        logits_CV[:, banned_id] = -torch.inf
    return logits_CV


def _evaluate(
    step: Step,
    operands: tuple[Tensor, Tensor, Tensor | None],
    banned_id: int | None,
    rows: tuple[Tensor, ...],
    weight_N: Tensor | None = None,
    needed: tuple[bool, bool, bool] = _NOTHING,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the numbers of all positions, (N, K), and those gradients of the weighted loss that are needed.

    `operands` are hidden states, weights and bias of the projection; a gradient of each may be needed.
    """
    hidden_ND, weight_VD, bias_V = operands
    grad_ND = torch.empty_like(hidden_ND) if needed[0] else None
    grad_VD, grad_V = (
        torch.zeros_like(operand, dtype=torch.float32) if need else None
        for operand, need in zip(operands[1:], needed[1:], strict=True)
    )
    weights_first = hidden_ND.device.type == "cpu"
    numbers = []
    for at in _chunks(len(hidden_ND), len(weight_VD), hidden_ND.device):
        logits_CV = _logits(hidden_ND[at], weight_VD, bias_V, banned_id, weights_first)
        part = tuple(row[at] for row in rows)
        numbers_CK, grad_CV = step(logits_CV, part, weight_N[at] if any(needed) else None)
        numbers.append(numbers_CK)
        if grad_CV is None:
            continue
        if banned_id is not None:
            grad_CV[:, banned_id] = 0
        if needed[2]:
            grad_V += grad_CV.sum(0)
        grad_CV = grad_CV.to(hidden_ND.dtype)
        if needed[0]:
            torch.mm(grad_CV, weight_VD, out=grad_ND[at])
        if needed[1] and grad_CV.dtype == torch.float32:
            grad_VD.addmm_(grad_CV.T, hidden_ND[at])
        elif needed[1]:
            grad_VD += grad_CV.T @ hidden_ND[at]
    return torch.cat(numbers), [grad_ND, grad_VD, grad_V]


class _Losses(torch.autograd.Function):
    """Numbers of each position, of which the first is its loss.

    With `weight_N` the gradients are computed in the forward pass (Liger Kernel, Hsu et al., arXiv 2410.10989, section
    3.2), otherwise in the backward pass, which computes the logits again (Wijmans et al., arXiv 2411.09009).
    """

    @staticmethod
    def forward(ctx, step, banned_id, weight_N, hidden_ND, weight_VD, bias_V, *rows):  # noqa: ANN001, ANN205
        ctx.step = step
        ctx.banned_id = banned_id
        operands = (hidden_ND, weight_VD, bias_V)
        ctx.done_in_forward = weight_N is not None
        needed = ctx.needs_input_grad[3:6] if ctx.done_in_forward else _NOTHING
        numbers_NK, ctx.grads = _evaluate(step, operands, banned_id, rows, weight_N, needed)
        ctx.save_for_backward(*((weight_N,) if ctx.done_in_forward else (*operands, *rows)))
        loss_N, *others = numbers_NK.unbind(1)
        loss_N, others = loss_N.clone(), [other_N.clone() for other_N in others]
        ctx.mark_non_differentiable(*others)
        return (loss_N, *others)

    @staticmethod
    def backward(ctx, grad_N, *_):  # noqa: ANN001, ANN205
        if ctx.done_in_forward:
            grads, ctx.grads = ctx.grads, None
            if grads is None:
                raise RuntimeError("the gradient of this loss was taken already; compute the loss again")
            factor = _common_factor(grad_N, *ctx.saved_tensors)
            grads = [grad if grad is None else grad.mul_(factor) for grad in grads]
        else:
            hidden_ND, weight_VD, bias_V, *rows = ctx.saved_tensors
            operands, needed = (hidden_ND, weight_VD, bias_V), ctx.needs_input_grad[3:6]
            _, grads = _evaluate(ctx.step, operands, ctx.banned_id, tuple(rows), grad_N, needed)
        return None, None, None, *grads, *(None for _ in ctx.needs_input_grad[6:])


def _common_factor(grad_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return the number by which the gradients of all positions exceed their weights. Raises RuntimeError if there is
    none."""
    if not len(grad_N):
        return grad_N.sum()
    grad_N, weight_N = grad_N.double(), weight_N.double()
    factor = grad_N @ weight_N / (weight_N @ weight_N).clamp(min=torch.finfo(torch.float64).tiny)
    expected_N = factor * weight_N
    # Not a number fits: what is wrong is then the loss, and training/updates.py skips the step.
    fits = ~((grad_N - expected_N).abs() > _TOLERANCE * expected_N.abs() + torch.finfo(torch.float32).tiny).any()
    message = (
        "the losses of the positions are weighted otherwise than by `weight_N`; leave `weight_N` out, and the gradient "
        "is computed from the weights that are used"
    )
    torch._assert_async(fits, message)  # without waiting for the device
    return factor


def _operands(hidden_ND: Tensor, head: nn.Linear) -> list[Tensor | None]:
    """Return hidden states, weight and bias (if any) in autocast's precision, which skips custom functions."""
    device = hidden_ND.device.type
    weight_VD = head.weight  # once: the head of a network that is told classes may put it together
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
    return [None if tensor is None else tensor.to(dtype) for tensor in (hidden_ND, weight_VD, head.bias)]


def _losses(
    step: Step,
    hidden_ND: Tensor,
    head: nn.Linear,
    rows: tuple[Tensor, ...],
    banned_id: int | None,
    weight_N: Tensor | None,
) -> tuple[Tensor, ...]:
    if _gradients_afterwards.get() or not torch.is_grad_enabled():
        weight_N = None
    return _Losses.apply(step, banned_id, weight_N, *_operands(hidden_ND, head), *rows)


def losses(
    reduce: Callable[..., Tensor],
    hidden_ND: Tensor,
    head: nn.Linear,
    *rows: Tensor,
    banned_id: int | None = None,
    weight_N: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return `reduce(logits_CV, *rows_C)` for all N positions as K tensors (N,), holding one chunk of logits at a time.

    Args:
        reduce: float32 logits of some positions, (C, V), and their part of each of `rows` -> (C, K). Only the first of
            the K numbers is differentiated.
        banned_id: a token without probability.
        weight_N: the weight of each position in the loss up to a common factor, if it is known. The gradients are then
            computed together with the values, which saves a product. Another weight in the loss is refused.

    Raises:
        RuntimeError: in the backward pass, if the loss does not weight the positions by `weight_N`.
    """
    return _losses(_differentiated(reduce), hidden_ND, head, rows, banned_id, weight_N)


def _differentiated(reduce: Callable[..., Tensor]) -> Step:
    def step(logits_CV: Tensor, rows: tuple[Tensor, ...], weight_C: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if weight_C is None:
            return reduce(logits_CV, *rows), None
        with torch.enable_grad():
            numbers_CK = reduce(logits_CV.requires_grad_(), *rows)
            (grad_CV,) = torch.autograd.grad(numbers_CK[:, 0], logits_CV, weight_C.to(numbers_CK.dtype))
        return numbers_CK.detach(), grad_CV

    return step


def cross_entropy(
    hidden_ND: Tensor,
    head: nn.Linear,
    target_N: Tensor,
    banned_id: int | None,
    weight_N: Tensor | None = None,
    biases: Biases | None = None,
) -> Tensor:
    """Return -log p(target) under softmax(head(hidden) + biases) without `banned_id`, float32 (N,); `losses` has
    `weight_N`."""
    step = _cross_entropy if biases is None else partial(_after, biases.add, _cross_entropy)
    rows = (target_N, *(biases.rows if biases else ()))
    (nll_N,) = _losses(step, hidden_ND, head, rows, banned_id, weight_N)
    return nll_N


def _after(
    add: Callable[..., None], step: Step, logits_CV: Tensor, rows: tuple[Tensor, ...], weight_C: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Take a step of which all rows but the first are those of `Biases`."""
    add(logits_CV, *rows[1:])
    return step(logits_CV, rows[:1], weight_C)


def _cross_entropy(
    logits_CV: Tensor, rows: tuple[Tensor, ...], weight_C: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    target_C1 = rows[0][:, None]
    picked_C1 = logits_CV.gather(1, target_C1)
    largest_C1 = logits_CV.amax(1, keepdim=True)
    p_CV = logits_CV.sub_(largest_C1).exp_()
    sum_C1 = p_CV.sum(1, keepdim=True)
    nll_C1 = sum_C1.log() + largest_C1 - picked_C1
    if weight_C is None:
        return nll_C1, None
    weight_C1 = weight_C.to(p_CV.dtype)[:, None]
    return nll_C1, p_CV.mul_(weight_C1 / sum_C1).scatter_add_(1, target_C1, -weight_C1)


def logits(hidden_ND: Tensor, head: nn.Linear, banned_id: int | None) -> Tensor:
    """Return head(hidden), float32 (N, V), with -inf at `banned_id`."""
    return _logits(*_operands(hidden_ND, head), banned_id, weights_first=len(hidden_ND) <= _FEW_ROWS).contiguous()


def log_probs(hidden_ND: Tensor, head: nn.Linear, banned_id: int | None, biases: Biases | None = None) -> Tensor:
    """Return log softmax(head(hidden) + biases) without `banned_id`, float32 (N, V)."""
    logits_NV = logits(hidden_ND, head, banned_id)
    if biases is not None:
        biases.add(logits_NV, *biases.rows)
    return logits_NV.log_softmax(-1)
