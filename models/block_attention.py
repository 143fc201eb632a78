"""Attention of block diffusion (BD3-LM, Arriola et al., arXiv 2503.09573), without computing what its mask excludes.

Each text has two streams. Noised queries attend to their own noised block and the clean blocks before it; clean queries
attend to the clean blocks up to their own. As one matrix over both streams, three quarters would be masked.
Shape suffixes: B batch, L length, Q queries, K keys, H heads, D head width.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from palimpsest.models.attention import attend, sdpa, takes_flash

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Queries of one kernel call: few enough that little of the diagonal is wasted, enough to fill the kernel.
_CHUNK = 128
_FLASH_BLOCKS = 32
_LEAST_WIDTH = 16  # of a head in flex on a GPU
_FORBIDDEN = -(2.0**14)  # added to a score by extra dimensions of the heads in flash-attn; finite in every precision


@dataclass(frozen=True)
class QKV:
    """Queries, keys (both rotated) and values of one stream, (B, L, H, D); q is None if there are no queries."""

    q: Tensor | None
    k: Tensor
    v: Tensor


def visible(query_block: Tensor, key_block: Tensor, query_noised: Tensor, key_noised: Tensor) -> Tensor:
    """Return whether the query may attend to the key: the mask as a predicate on block numbers and streams."""
    own = query_noised & key_noised & (query_block == key_block)
    before = query_noised & ~key_noised & (key_block < query_block)
    clean = ~query_noised & ~key_noised & (key_block <= query_block)
    return own | before | clean


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    """Return whether Triton is installed and knows the GPU; torch.compile does not look into this function."""
    return has_triton()


def takes_flex(backend: str, device: torch.device, head_width: int) -> bool:
    """Return whether flex attends to blocks: with `auto` on a GPU for which Triton compiles it."""
    if backend != "auto":
        return backend == "flex"
    return device.type == "cuda" and head_width >= _LEAST_WIDTH and _has_triton()


def attend_blocks(
    noised: QKV, clean: QKV, size: int, key_mask_BL: Tensor | None, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Return the attention of the noised and of the clean queries, each (B, its length, H, D).

    A noised query sees its own noised block and the clean blocks before it; a clean query sees the clean blocks up to
    its own (BD3-LM, arXiv 2503.09573, section 3.1). Without clean queries the second result is None. The clean stream
    may lack the last block, which no noised query sees. `key_mask_BL` is False on padding, for both streams.
    """
    attended = torch.cat(
        [
            _noised_chunk(noised, clean, size, key_mask_BL, backend, rows)
            for rows in _chunks(noised.q.shape[1], size, backend)
        ],
        dim=1,
    )
    if clean.q is None or not clean.k.shape[1]:
        return attended, clean.q
    return attended, attend_up_to(clean.q, clean.k, clean.v, size, _slice(key_mask_BL, 0, clean.k.shape[1]), backend)


def attend_up_to(
    q_BQHD: Tensor,
    k_BKHD: Tensor,
    v_BKHD: Tensor,
    size: int,
    key_mask_BK: Tensor | None,
    backend: str,
    window: int | None = None,
) -> Tensor:
    """Return clean attention, (B, Q, H, D): each query sees the keys of all blocks up to its own. The queries are the
    last of the positions of the keys. With `window` each query sees that many blocks, its own included."""
    start = k_BKHD.shape[1] - q_BQHD.shape[1]
    if size == 1 and start == 0 and window is None and key_mask_BK is None:
        return attend(q_BQHD, k_BKHD, v_BKHD, None, backend, causal=True)
    parts = []
    for rows in _chunks(q_BQHD.shape[1], size, backend):
        low = 0 if window is None else max(0, (start + rows.start) // size - window + 1) * size
        high = min(start + rows.stop, k_BKHD.shape[1])
        mask_QK = _clean_mask(start + rows.start, high, low, size, window, q_BQHD.device)
        key_mask = _slice(key_mask_BK, low, high)
        parts.append(_attend(q_BQHD[:, rows], k_BKHD[:, low:high], v_BKHD[:, low:high], mask_QK, key_mask, backend))
    return torch.cat(parts, dim=1)


def _noised_chunk(noised: QKV, clean: QKV, size: int, key_mask_BL: Tensor | None, backend: str, rows: slice) -> Tensor:
    """Return the attention of some noised queries to their own noised keys and the clean keys before the last block."""
    earlier = (rows.stop - 1) // size * size
    k, v = noised.k[:, rows], noised.v[:, rows]
    if earlier:
        k, v = torch.cat([clean.k[:, :earlier], k], dim=1), torch.cat([clean.v[:, :earlier], v], dim=1)
    mask_QK = _noised_mask(rows.start, rows.stop, earlier, size, k.device)
    key_mask = _slice(key_mask_BL, rows.start, rows.stop)
    if key_mask is not None and earlier:
        key_mask = torch.cat([key_mask_BL[:, :earlier], key_mask], dim=1)
    return _attend(noised.q[:, rows], k, v, mask_QK, key_mask, backend)


def _attend(
    q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask_QK: Tensor | None, key_mask_BK: Tensor | None, backend: str
) -> Tensor:
    if mask_QK is None:
        return attend(q_BQHD, k_BKHD, v_BKHD, key_mask_BK, backend)
    if takes_flash(backend, q_BQHD):
        return _flash(q_BQHD, k_BKHD, v_BKHD, mask_QK, key_mask_BK)
    mask = mask_QK if key_mask_BK is None else mask_QK & key_mask_BK[:, None, None]
    return sdpa(q_BQHD, k_BKHD, v_BKHD, mask)


def _chunks(length: int, size: int, backend: str) -> Iterator[slice]:
    """Return slices of whole blocks."""
    blocks = max(1, min(_CHUNK // size, _FLASH_BLOCKS if backend == "flash_attn" else _CHUNK))
    return (slice(start, min(start + blocks * size, length)) for start in range(0, length, blocks * size))


def _slice(mask_BL: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if mask_BL is None else mask_BL[:, start:stop].bool()


@lru_cache(maxsize=512)
def _noised_mask(start: int, stop: int, earlier: int, size: int, device: torch.device) -> Tensor | None:
    """Return `visible` for the noised queries start..stop over the clean keys ..earlier and the noised keys
    start..stop; None if every query sees every key."""
    query, key = torch.arange(start, stop, device=device), torch.arange(earlier, device=device)
    key_block, noised = torch.cat([key, query]) // size, torch.arange(earlier + len(query), device=device) >= earlier
    mask_QK = visible(query[:, None] // size, key_block, torch.ones_like(query, dtype=torch.bool)[:, None], noised)
    return None if (stop - 1) // size == start // size else mask_QK


@lru_cache(maxsize=512)
def _clean_mask(start: int, stop: int, low: int, size: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return `visible` for the clean queries start..stop over the clean keys low..stop; None if nothing is masked."""
    query = torch.arange(start, stop, device=device)[:, None] // size
    key = torch.arange(low, stop, device=device) // size
    no = torch.zeros((), dtype=torch.bool, device=device)
    mask_QK = visible(query, key, no, no)
    mask_QK = mask_QK if window is None else mask_QK & (key > query - window)
    return None if (stop - 1) // size == start // size else mask_QK


def _flash(q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask_QK: Tensor, key_mask_BK: Tensor | None) -> Tensor:
    """Run flash-attn under a mask, which it does not take, by encoding the mask as extra dimensions of the heads. Keys
    with the same column of the mask form a kind. Each kind gets a dimension: 1 in its keys, and `_FORBIDDEN` in the
    queries that may not see it. Their inner product adds exactly 0, or a score too low for any probability."""
    kinds_NQ, kind_K = _kinds(mask_QK)
    if key_mask_BK is not None:
        kinds_NQ = torch.cat([kinds_NQ, torch.zeros_like(kinds_NQ[:1])])  # padding, hidden from all queries
    extra = -(-len(kinds_NQ) // 8) * 8
    ban_QN = F.pad((~kinds_NQ.T).to(q_BQHD.dtype) * _FORBIDDEN, (0, extra - len(kinds_NQ)))
    is_KN = F.one_hot(kind_K, extra).to(k_BKHD.dtype)
    is_BKN = is_KN.expand(len(k_BKHD), -1, -1)
    if key_mask_BK is not None:
        hidden_N = is_KN.new_zeros(extra)
        hidden_N[len(kinds_NQ) - 1] = 1
        is_BKN = torch.where(key_mask_BK[..., None], is_BKN, hidden_N)
    heads, width = q_BQHD.shape[2:]
    q = torch.cat([q_BQHD, ban_QN[None, :, None].expand(len(q_BQHD), -1, heads, -1)], dim=-1)
    k = torch.cat([k_BKHD, is_BKN[:, :, None].expand(-1, -1, heads, -1)], dim=-1)
    # The inner product of the new dimensions is scaled with the rest; 2^14 is far more than needed.
    return _flash_kernel(q, k, F.pad(v_BKHD, (0, extra)), width**-0.5)[..., :width]


@lru_cache(maxsize=512)
def _kinds(mask_QK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct columns of a (cached) mask, and the column of each key."""
    return mask_QK.T.unique(dim=0, return_inverse=True)


def _flash_kernel(q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, scale: float) -> Tensor:
    return importlib.import_module("flash_attn").flash_attn_func(q_BQHD, k_BKHD, v_BKHD, softmax_scale=scale)


@dataclass(frozen=True)
class FlexBlocks:
    """The blocks of a batch for flex, whose masks are built once for all layers.

    Attributes:
        both: the mask of the queries of both streams.
        noised: that of the noised queries alone, for the last layer.
        key_mask_BL: False on padding, for both streams.
    """

    both: "BlockMask"
    noised: "BlockMask"
    key_mask_BL: Tensor | None

    def attend(self, noised: QKV, clean: QKV) -> tuple[Tensor, Tensor | None]:
        """Return the attention of `attend_blocks` in one call of a kernel that skips tiles without visible keys."""
        length, earlier = noised.k.shape[1], clean.k.shape[1]
        queries = noised.q if clean.q is None else torch.cat([noised.q, clean.q], dim=1)
        k, v = torch.cat([noised.k, clean.k], dim=1), torch.cat([noised.v, clean.v], dim=1)
        score_mod = None
        if self.key_mask_BL is not None:
            seen_BK = torch.cat([self.key_mask_BL, self.key_mask_BL[:, :earlier]], dim=1).bool()

            def score_mod(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return torch.where(seen_BK[b, key], score, -torch.inf)

        out_BQHD = flex_attend(queries, k, v, self.noised if clean.q is None else self.both, score_mod)
        return out_BQHD[:, :length], None if clean.q is None else out_BQHD[:, length:]


def flex_blocks(length: int, earlier: int, size: int, key_mask_BL: Tensor | None, device: torch.device) -> FlexBlocks:
    """Return the blocks of texts of `length` tokens, of which the clean stream has the first `earlier`."""
    both, noised = (_flex_mask(queries, length, earlier, size, device) for queries in (length + earlier, length))
    return FlexBlocks(both, noised, key_mask_BL)


def flex_attend(
    q_BQHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, block_mask: "BlockMask", score_mod: Callable | None = None
) -> Tensor:
    """Run flex attention under a mask of `create_block_mask`, (B, Q, H, D). Raises ValueError if gradients are needed
    on a CPU."""
    if q_BQHD.requires_grad and q_BQHD.device.type == "cpu":
        raise ValueError(
            "model.attn_backend=flex can measure and sample on a CPU but not train there (torch has no CPU backward "
            "pass for it); use model.attn_backend=sdpa"
        )
    q, k, v = (x.transpose(1, 2) for x in (q_BQHD, k_BKHD, v_BKHD))
    return _flex_kernel()(q, k, v, score_mod=score_mod, block_mask=block_mask).transpose(1, 2)


@lru_cache(maxsize=32)
def _flex_mask(queries: int, length: int, earlier: int, size: int, device: torch.device) -> "BlockMask":
    """Return the predicate on indices into [noised ; clean], built once."""
    from torch.nn.attention.flex_attention import create_block_mask

    def predicate(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(query % length // size, key % length // size, query < length, key < length)

    allow_recompilation()
    with torch.inference_mode(False):  # a validation may be the first to need the mask, and a training keeps it
        return create_block_mask(predicate, None, None, queries, length + earlier, device=device)


def allow_recompilation() -> None:
    """Let torch compile a function for each kind of its inputs. Beyond the limit, which is 8, it would run the function
    uncompiled (flex with all scores in memory), and only warn."""
    torch._dynamo.config.recompile_limit = 64


@lru_cache(maxsize=1)
def _flex_kernel() -> object:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
