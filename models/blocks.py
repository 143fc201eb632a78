"""The DiT on texts in blocks (BD3-LM, Arriola et al., arXiv 2503.09573): noised blocks that see the clean ones before.

The parameters are those of the DiT: any of its checkpoints is one of a block diffusion model, of whatever block size.
Shape suffixes: B batch, L length, R rows, N selected positions, D width, C conditioning width, H heads, K keys,
b blocks of a text, k tokens of such a block, W those of the longest segment (a block of any length). A block of the
network is called a layer here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from palimpsest.models.attention import apply_rotary, attend, rotary_angles
from palimpsest.models.block_attention import QKV, attend_blocks, attend_up_to
from palimpsest.models.class_conditioning import untold, with_class
from palimpsest.models.kv_cache import MOST_AT_ONCE, BlockCache, SegmentCache
from palimpsest.models.layers import modulate, over_positions
from palimpsest.models.segment_attention import SegmentMasks, segment_masks


@dataclass(frozen=True)
class _Modulation:
    """What adaLN does in a layer; each (1, D) for all positions, (B, D) by row, (B, L, D) or (N, D) by position."""

    shift_att: Tensor
    scale_att: Tensor
    gate_att: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class TwoStreams:
    """What a layer of the DiT does to texts in blocks; it has the layer's own weights."""

    entrances = ("two_streams",)  # beside `forward`: see models/sharding.py

    def two_streams(
        self,
        x_BLD: Tensor,
        z_BLD: Tensor,
        c_noised: Tensor,
        c_clean: Tensor,
        rotary: tuple[Tensor, Tensor],
        blocks: int | SegmentMasks,
        key_mask_BL: Tensor | None,
        last: bool = False,
        at_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The noised stream `x_BLD` and the clean one `z_BLD`, which may lack the last block, one layer on. The last
        layer has nobody who asks for the clean stream, None, and gives the noised one at `at_BL` only, (N, D)."""
        rotary_clean = tuple(table[: z_BLD.shape[1]] for table in rotary)
        by, by_clean = _modulation(self, c_noised), _modulation(self, c_clean)
        noised, clean = _qkv(self, x_BLD, by, rotary), _qkv(self, z_BLD, by_clean, rotary_clean, asks=not last)
        if isinstance(blocks, int):
            attended, attended_clean = attend_blocks(noised, clean, blocks, key_mask_BL, self.attn_backend)
        else:
            attended, attended_clean = blocks.attend(noised, clean)
        if at_BL is not None:
            attended, x_BLD, by = attended[at_BL], x_BLD[at_BL], _modulation(self, _at(c_noised, at_BL))
        x = _after_attention(self, x_BLD, attended, by)
        return x, None if last else _after_attention(self, z_BLD, attended_clean, by_clean)


class BlockStreams:
    """What a DiT offers to block diffusion. Of the conditioning the clean stream sees noise level 0 and the noised one
    that of each block, so that clean tokens are read the same whatever is being written behind them."""

    def encode_blocks(
        self,
        noised_BL: Tensor,
        clean_BL: Tensor,
        blocks: int | Tensor,
        sigma_Bb: Tensor,
        at_BL: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_id: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of the noised tokens, each block given the clean tokens before it, in one pass: (B, L, D), or
        only those of the N positions of `at_BL`, (N, D), ready for `head`. `blocks`: tokens of each; or (B, L), the
        number of the block that a token belongs to, in order, for blocks of any lengths, which differ from row to row.

        Work that nobody looks at is left out: the clean stream's last block (where it begins at one place in all rows),
        its last layer but keys and values, and what the last layer does to noised positions that are not asked for.
        """
        length = noised_BL.shape[1]
        class_id = untold(noised_BL) if class_id is None and self.num_classes else class_id
        c_noised, c_clean = self._conditioned(sigma_Bb, blocks, length, class_id), self._clean(noised_BL, class_id)
        rotary = rotary_angles(self.rotary_emb.inv_freq, length)
        key_mask_BL, earlier = attention_mask if self.mask_padding else None, length
        if isinstance(blocks, int):
            earlier = (length - 1) // blocks * blocks
        else:
            blocks = segment_masks(blocks, key_mask_BL, self.blocks[0].attn_backend)
        streams = self.vocab_embed(noised_BL), self.vocab_embed(clean_BL[:, :earlier])
        for layer in self.order[:-1]:
            streams = self.through(layer.two_streams, *streams, c_noised, c_clean, rotary, blocks, key_mask_BL)
        x, _ = self.through(
            self.order[-1].two_streams, *streams, c_noised, c_clean, rotary, blocks, key_mask_BL, True, at_BL
        )
        return self._last_hidden(x, c_noised, class_id, at_BL)

    def new_block_cache(self, batch_size: int, length: int, window: int | None = None) -> BlockCache:
        """An empty cache for texts of `length` tokens, in the precision in which attention will run; `window`: how many
        clean tokens are seen at most."""
        return BlockCache(len(self.order), batch_size, length, window, *self._kept())

    def new_segment_cache(self, batch_size: int) -> SegmentCache:
        """As `new_block_cache`, for texts in segments."""
        return SegmentCache(len(self.order), batch_size, *self._kept())

    def _kept(self) -> tuple[int, int, torch.device, torch.dtype]:
        """What a cache keeps for a token: heads, their width; where, and how precisely."""
        embedding, device = self.vocab_embed.embedding, self.vocab_embed.embedding.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else embedding.dtype
        return self.n_heads, embedding.shape[1] // self.n_heads, device, dtype

    def remember(self, clean_BL: Tensor, block_size: int, cache: BlockCache, class_id: Tensor | None = None) -> None:
        """Read whole clean blocks that follow what `cache` holds, into it."""
        most = max(1, MOST_AT_ONCE // block_size) * block_size
        for start in range(0, clean_BL.shape[1], most):
            new_BL = clean_BL[:, start : start + most]
            cache.make_room(new_BL.shape[1])
            window = None if cache.window is None else cache.window // block_size + 1

            def attention(q: Tensor, k: Tensor, v: Tensor, backend: str, window: int | None = window) -> Tensor:
                return attend_up_to(q, k, v, block_size, None, backend, window)

            self._read(new_BL, cache, attention, class_id)
            cache.advance(new_BL.shape[1])

    def remember_segment(
        self, clean_BW: Tensor, here_BW: Tensor, cache: SegmentCache, class_id: Tensor | None = None
    ) -> None:
        """Read the clean segment that follows what `cache` holds, into it; `here_BW` is True on its tokens, which are
        the first ones of each row."""
        key_mask_BK = torch.cat([cache.key_mask(), here_BW], dim=1)

        def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
            return attend(q, k, v, key_mask_BK, backend)

        self._read(clean_BW, cache, attention, class_id)
        cache.advance(here_BW)

    def _read(
        self, clean_BL: Tensor, cache: BlockCache | SegmentCache, attention: Callable, class_id: Tensor | None
    ) -> None:
        """Store keys and values of clean tokens behind those of `cache`; attention(q, k, v, backend) is theirs."""
        class_id = untold(clean_BL) if class_id is None and self.num_classes else class_id
        angles = rotary_angles(self.rotary_emb.inv_freq, clean_BL.shape[1], cache.next_position())
        c, z_BLD = self._clean(clean_BL, class_id), self.vocab_embed(clean_BL)
        for number, layer in enumerate(self.order):
            last, by = number == len(self.order) - 1, _modulation(layer, c)
            own = _qkv(layer, z_BLD, by, angles, asks=not last)
            k, v = cache.seen(number)
            cache.store(number, own.k, own.v)
            if not last:
                k, v = torch.cat([k.to(own.k.dtype), own.k], dim=1), torch.cat([v.to(own.v.dtype), own.v], dim=1)
                z_BLD = _after_attention(layer, z_BLD, attention(own.q, k, v, layer.attn_backend), by)

    def encode_after(
        self,
        noised_Rk: Tensor,
        sigma_R: Tensor,
        cache: BlockCache | SegmentCache,
        rows: Tensor | None = None,
        at_BL: Tensor | None = None,
        attention_mask: Tensor | None = None,
        class_id: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of one noised block behind the clean ones of `cache`, of which `rows` (None: all) are meant:
        what `encode_blocks` gives there, (R, k, D) or (N, D). `attention_mask` is False behind the tokens of a row."""
        length = noised_Rk.shape[1]
        class_id = untold(noised_Rk) if class_id is None and self.num_classes else class_id
        c = self._conditioned(sigma_R[:, None], length, length, class_id)
        angles = rotary_angles(self.rotary_emb.inv_freq, length, cache.next_position(rows))
        key_mask = self._seen_after(cache, rows, noised_Rk, attention_mask)
        x_RkD = self.vocab_embed(noised_Rk)
        for number, layer in enumerate(self.order):
            by = _modulation(layer, c)
            own, (k, v) = _qkv(layer, x_RkD, by, angles), cache.seen(number, rows)
            k, v = torch.cat([k.to(own.k.dtype), own.k], dim=1), torch.cat([v.to(own.v.dtype), own.v], dim=1)
            attended = attend(own.q, k, v, key_mask, layer.attn_backend)
            if at_BL is not None and number == len(self.order) - 1:
                attended, x_RkD, by = attended[at_BL], x_RkD[at_BL], _modulation(layer, _at(c, at_BL))
            x_RkD = _after_attention(layer, x_RkD, attended, by)
        return self._last_hidden(x_RkD, c, class_id, at_BL)

    def _seen_after(
        self, cache: BlockCache | SegmentCache, rows: Tensor | None, own_Rk: Tensor, here_Rk: Tensor | None
    ) -> Tensor | None:
        """The keys that tokens `own_Rk` behind `cache` see, (R, K + k); None for all."""
        earlier_RK = cache.key_mask(rows)
        if earlier_RK is None and (here_Rk is None or not self.mask_padding or bool(here_Rk.all())):
            return None
        here_Rk = torch.ones_like(own_Rk, dtype=torch.bool) if here_Rk is None else here_Rk
        if earlier_RK is None:
            earlier_RK = here_Rk.new_ones(cache.seen(0, rows)[0].shape[:2])
        return torch.cat([earlier_RK, here_Rk], dim=1)

    def _clean(self, tokens_BL: Tensor, class_id: Tensor | None) -> Tensor:
        """The conditioning of clean tokens, (1, C), or (B, C) with classes."""
        rows = 1 if class_id is None else len(tokens_BL)
        return self.conditioning(torch.zeros(rows, device=tokens_BL.device), class_id)

    def _conditioned(self, sigma_Bb: Tensor, blocks: int | Tensor, length: int, class_id: Tensor | None) -> Tensor:
        """The conditioning of noised tokens: (B, L, C), or as `_clean` if the network sees no noise level."""
        if not self.time_conditioning:
            return self._clean(sigma_Bb, class_id)
        of_block = None if class_id is None else class_id.repeat_interleave(sigma_Bb.shape[1])
        c_BbC = self.conditioning(sigma_Bb.flatten(), of_block).unflatten(0, sigma_Bb.shape)
        if isinstance(blocks, Tensor):
            return c_BbC[torch.arange(len(blocks), device=blocks.device)[:, None], blocks]
        return c_BbC.repeat_interleave(blocks, dim=1)[:, :length]

    def _last_hidden(self, x: Tensor, c: Tensor, class_id: Tensor | None, at_BL: Tensor | None) -> Tensor:
        hidden = self.output_layer.normed(x, c if at_BL is None else _at(c, at_BL))
        if not self.num_classes:
            return hidden
        if at_BL is None:
            return with_class(hidden, class_id, self.num_classes)
        return with_class(hidden[:, None], class_id[at_BL.nonzero()[:, 0]], self.num_classes)[:, 0]


def _modulation(layer: nn.Module, c: Tensor) -> _Modulation:
    return _Modulation(*layer.adaLN_modulation(c).chunk(6, dim=-1))


def _at(c: Tensor, at_BL: Tensor) -> Tensor:
    """The conditioning of the N positions of `at_BL`, (N, C); (1, C) if it is the same everywhere."""
    if c.ndim == 3:
        return c[at_BL]
    return c if len(c) == 1 else c[at_BL.nonzero()[:, 0]]


def _qkv(layer: nn.Module, x_BLD: Tensor, by: _Modulation, angles: tuple[Tensor, Tensor], asks: bool = True) -> QKV:
    normed_BLD = modulate(layer.norm1(x_BLD), by.shift_att, by.scale_att)
    if not asks:
        k, v = layer.keys_and_values(normed_BLD)
        return QKV(None, apply_rotary(k, *angles), v)
    q, k, v = layer.attn_qkv(normed_BLD).unflatten(-1, (3, layer.n_heads, -1)).unbind(dim=2)
    return QKV(apply_rotary(q, *angles), apply_rotary(k, *angles), v)


def _after_attention(layer: nn.Module, x: Tensor, attended: Tensor, by: _Modulation) -> Tensor:
    """The layer's two residual steps, for whole rows (B, L, D) or selected positions (N, D)."""
    x = x + over_positions(by.gate_att, x) * layer.project(attended)
    return x + over_positions(by.gate_mlp, x) * layer.transform(modulate(layer.norm2(x), by.shift_mlp, by.scale_mlp))
