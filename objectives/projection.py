"""The vocabulary projection at selected positions, which holds one chunk of logits at a time.

Shape suffixes: N selected positions, K entries picked per position, C positions of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Approximate size of the float32 logits of a chunk.
_CHUNK_BYTES = 32 * 2**20
# For so few rows, reading the weights dominates; BLAS is up to 3 times faster if they are the first operand.
_FEW_ROWS = 8


def _chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    rows = max(1, _CHUNK_BYTES // (4 * vocab_size))
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, banned_id: int | None) -> Tensor:
    if len(hidden_CD) <= _FEW_ROWS:
        logits_CV = (weight_VD @ hidden_CD.T).T.contiguous()
        logits_CV = (logits_CV if bias_V is None else logits_CV.add_(bias_V)).float()
    else:
        logits_CV = F.linear(hidden_CD, weight_VD, bias_V).float()
    if banned_id is not None:
        logits_CV[:, banned_id] = -torch.inf
    return logits_CV


class _PickedLogits(torch.autograd.Function):
    """Logsumexp of the logits, and the logits at given ids, of each row.

    The backward pass computes the logits again, chunk by chunk (Wijmans et al., "Cut your losses", arXiv 2411.09009).
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, ids_NK, banned_id):  # noqa: ANN001, ANN205
        log_z_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        picked_NK = log_z_N.new_empty(ids_NK.shape)
        for rows in _chunks(len(hidden_ND), len(weight_VD)):
            logits_CV = _logits(hidden_ND[rows], weight_VD, bias_V, banned_id)
            log_z_N[rows] = logits_CV.logsumexp(-1)
            picked_NK[rows] = logits_CV.gather(1, ids_NK[rows])
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, ids_NK, log_z_N)
        ctx.banned_id = banned_id
        return log_z_N, picked_NK

    @staticmethod
    def backward(ctx, grad_log_z_N, grad_picked_NK):  # noqa: ANN001, ANN205
        hidden_ND, weight_VD, bias_V, ids_NK, log_z_N = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for rows in _chunks(len(hidden_ND), len(weight_VD)):
            # d log_z / d logits = softmax, d picked / d logits = onehot
            grad_CV = _logits(hidden_ND[rows], weight_VD, bias_V, ctx.banned_id)
            grad_CV.sub_(log_z_N[rows, None]).exp_().mul_(grad_log_z_N[rows, None])
            grad_CV.scatter_add_(1, ids_NK[rows], grad_picked_NK[rows])
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_ND.dtype)
            grad_hidden[rows] = grad_CV @ weight_VD
            grad_weight.addmm_(grad_CV.T, hidden_ND[rows]) if grad_CV.dtype == torch.float32 else grad_weight.add_(
                grad_CV.T @ hidden_ND[rows]
            )
        grad_bias = None if grad_bias is None else grad_bias.to(bias_V.dtype)
        return grad_hidden, grad_weight.to(weight_VD.dtype), grad_bias, None, None


def _operands(hidden_ND: Tensor, head: nn.Linear) -> list[Tensor | None]:
    """Return hidden states, weight and bias (if any) in autocast's precision, which skips custom functions."""
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    return [None if tensor is None else tensor.to(dtype) for tensor in (hidden_ND, head.weight, head.bias)]


def picked_logits(
    hidden_ND: Tensor, head: nn.Linear, ids_NK: Tensor, banned_id: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return logsumexp of head(hidden) without `banned_id`, (N,), and the logits at `ids_NK`, (N, K), in float32."""
    return _PickedLogits.apply(*_operands(hidden_ND, head), ids_NK, banned_id)


def chunked(
    reduce: Callable[..., Tensor], hidden_ND: Tensor, head: nn.Linear, *rows: Tensor, banned_id: int | None = None
) -> Tensor:
    """Return `reduce(logits_CV, *rows_C)` for all N positions, (N, ...), holding one chunk of logits at a time.

    `reduce` maps the float32 logits of some positions, and their rows of `rows`, to a few numbers per position. The
    backward pass computes the logits again.
    """
    hidden_ND, weight_VD, bias_V = _operands(hidden_ND, head)

    def part(hidden_CD: Tensor, *rows_C: Tensor) -> Tensor:
        return reduce(_logits(hidden_CD, weight_VD, bias_V, banned_id), *rows_C)

    chunks = list(_chunks(len(hidden_ND), len(weight_VD))) or [slice(0, 0)]
    found = [checkpoint(part, hidden_ND[at], *(row[at] for row in rows), use_reentrant=False) for at in chunks]
    return torch.cat(found)


def cross_entropy(hidden_ND: Tensor, head: nn.Linear, target_N: Tensor, banned_id: int | None) -> Tensor:
    """Return -log p(target) under softmax(head(hidden)) without `banned_id`, float32 (N,)."""
    log_z_N, picked_N1 = picked_logits(hidden_ND, head, target_N[:, None], banned_id)
    return log_z_N - picked_N1.squeeze(1)


def logits(hidden_ND: Tensor, head: nn.Linear, banned_id: int | None) -> Tensor:
    """Return head(hidden), float32 (N, V), with -inf at `banned_id`."""
    return _logits(*_operands(hidden_ND, head), banned_id)


def log_probs(hidden_ND: Tensor, head: nn.Linear, banned_id: int | None) -> Tensor:
    """Return log softmax(head(hidden)) without `banned_id`, float32 (N, V)."""
    return logits(hidden_ND, head, banned_id).log_softmax(-1)
