"""The vocabulary projection at selected positions, never holding more than one chunk of its logits.

Shape suffixes: N selected positions, C positions of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of a chunk are chosen so that a chunk's float32 logits stay near this size.
_CHUNK_BYTES = 32 * 2**20
# So few rows are a matter of reading the weights once, which BLAS does up to 3 times faster when these come first.
_FEW_ROWS = 8


def _chunks(num_rows: int, vocab_size: int) -> Iterator[slice]:
    rows = max(1, _CHUNK_BYTES // (4 * vocab_size))
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


def _logits(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, banned_id: int) -> Tensor:
    if len(hidden_CD) <= _FEW_ROWS:
        logits_CV = (weight_VD @ hidden_CD.T).T.contiguous()
        logits_CV = (logits_CV if bias_V is None else logits_CV.add_(bias_V)).float()
    else:
        logits_CV = F.linear(hidden_CD, weight_VD, bias_V).float()
    logits_CV[:, banned_id] = -torch.inf
    return logits_CV


class _LinearCrossEntropy(torch.autograd.Function):
    """-log softmax(hidden weight^T + bias)[target] per row, with the logits recomputed chunk by chunk in the backward
    pass (the memory argument of Wijmans et al., "Cut your losses", arXiv 2411.09009)."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, target_N, banned_id):  # noqa: ANN001, ANN205
        log_z_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        picked_N = torch.empty_like(log_z_N)
        for rows in _chunks(len(hidden_ND), len(weight_VD)):
            logits_CV = _logits(hidden_ND[rows], weight_VD, bias_V, banned_id)
            log_z_N[rows] = logits_CV.logsumexp(-1)
            picked_N[rows] = logits_CV.gather(1, target_N[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, target_N, log_z_N)
        ctx.banned_id = banned_id
        return log_z_N - picked_N

    @staticmethod
    def backward(ctx, grad_N):  # noqa: ANN001, ANN205
        hidden_ND, weight_VD, bias_V, target_N, log_z_N = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD, dtype=torch.float32)
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for rows in _chunks(len(hidden_ND), len(weight_VD)):
            # d nll / d logits = softmax - onehot(target)
            p_CV = _logits(hidden_ND[rows], weight_VD, bias_V, ctx.banned_id)
            p_CV.sub_(log_z_N[rows, None]).exp_()
            p_CV.scatter_add_(1, target_N[rows, None], p_CV.new_full((len(p_CV), 1), -1.0))
            p_CV.mul_(grad_N[rows, None])
            if grad_bias is not None:
                grad_bias += p_CV.sum(0)
            p_CV = p_CV.to(hidden_ND.dtype)
            grad_hidden[rows] = p_CV @ weight_VD
            grad_weight.addmm_(p_CV.T, hidden_ND[rows]) if p_CV.dtype == torch.float32 else grad_weight.add_(
                p_CV.T @ hidden_ND[rows]
            )
        grad_bias = None if grad_bias is None else grad_bias.to(bias_V.dtype)
        return grad_hidden, grad_weight.to(weight_VD.dtype), grad_bias, None, None


def _operands(hidden_ND: Tensor, head: nn.Linear) -> list[Tensor | None]:
    """Hidden states, weight and bias (if any) as autocast would hand them to the head; custom functions are left alone
    by it."""
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    return [None if tensor is None else tensor.to(dtype) for tensor in (hidden_ND, head.weight, head.bias)]


def cross_entropy(hidden_ND: Tensor, head: nn.Linear, target_N: Tensor, banned_id: int) -> Tensor:
    """-log p(target) under softmax(head(hidden)) with `banned_id` excluded, float32 (N,), differentiable."""
    return _LinearCrossEntropy.apply(*_operands(hidden_ND, head), target_N, banned_id)


def log_probs(hidden_ND: Tensor, head: nn.Linear, banned_id: int) -> Tensor:
    """log softmax(head(hidden)) with `banned_id` excluded, float32 (N, V)."""
    hidden_ND, weight, bias = _operands(hidden_ND, head)
    return _logits(hidden_ND, weight, bias, banned_id).log_softmax(-1)
