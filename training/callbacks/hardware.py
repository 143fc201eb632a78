"""The load of a training on its device: arithmetic as a share of the measured speed, and memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

_GIB = 2**30
# A weight of one of a backbone's repeated blocks (ours, and transformers' names).
_BLOCK_WEIGHT = re.compile(r"(^|\.)(blocks|layers?|h)\.(?P<block>\d+)\..*\.?weight$")
_ATTENTION = re.compile(r"attn|attention")


@dataclass(frozen=True)
class TrainingFlops:
    """Floating point operations of a training, by formula (Chowdhery et al., arXiv 2204.02311, appendix B).

    6 N per token for the N weights of the blocks' matrices (forward 2, backward 4), 12 · layers · width · L per token
    for attention, and 6 · width · V for each position that is projected onto the vocabulary: only the masked ones are.
    Not counted: the modulation of adaLN and the latent stream of an MMDiT (once per row), norms, the scan of a
    state-space layer, anything recomputed.
    """

    block_weights: int  # N
    attention_layers: int
    width: int
    vocab_size: int

    @classmethod
    def of(cls, backbone: nn.Module) -> TrainingFlops:
        """Read the sizes off the parameters of a backbone and their names."""
        found = [(name, match["block"], p) for name, p in backbone.named_parameters()
                 if p.ndim >= 2 and (match := _BLOCK_WEIGHT.search(name))
                 and "adaLN" not in name and ".latent." not in name]  # fmt: skip
        attention = {block for name, block, _ in found if _ATTENTION.search(name)}
        return cls(sum(p.numel() for *_, p in found), len(attention), *reversed(backbone.head.weight.shape))

    def of_blocks(self, rows: int, length: int) -> float:
        """Return the FLOPs of a training pass over (rows, length) tokens with padding, without the projection."""
        return rows * length * (6.0 * self.block_weights + 12.0 * self.attention_layers * self.width * length)

    def of_projection(self, positions: float) -> float:
        return 6.0 * self.width * self.vocab_size * positions


@lru_cache
def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.25) -> float:
    """Return the FLOP/s of the fastest square matrix product on a device, measured once per process.

    float32 is multiplied as torch.set_float32_matmul_precision says, as in the training.
    """
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    repeats = 8 if device.type == "cuda" else 1
    while time.perf_counter() < end or best == float("inf"):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        synchronize(device)
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2.0 * size**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compute_dtype(precision: str) -> torch.dtype:
    """Return the type of matrix products under a Lightning `precision` ("bf16-mixed", "32-true", ...)."""
    narrow = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    return narrow.get(precision.split("-")[0], torch.float32)


def memory(device: torch.device) -> dict[str, float]:
    """Return current and peak memory in GiB: of torch's tensors since the last call on a GPU, else of the process."""
    if device.type == "cuda":
        values = {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device),
                  "peak": torch.cuda.max_memory_allocated(device)}  # fmt: skip
        torch.cuda.reset_peak_memory_stats(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        statm = Path("/proc/self/statm")
        now = int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak
        values = {"resident": now, "peak": max(now, peak)}
    return {f"memory/{name}_gib": value / _GIB for name, value in values.items()}
