"""The DiT on texts in blocks (BD3-LM, Arriola et al., arXiv 2503.09573): noised blocks attend to the clean blocks
before.

The parameters are those of the DiT, so that any of its checkpoints is one of a block diffusion model of any block size.
Shape suffixes: B batch, L length, R rows, N selected positions, D width, C conditioning width, H heads, K keys, b
blocks of a text, k tokens of such a block, W tokens of the longest segment (a block of any length). A block of the
network is called a layer here.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from palimpsest.common.positions import Positions
from palimpsest.models.attention import apply_rotary, attend, rotary_angles
from palimpsest.models.block_attention import (
    QKV,
    FlexBlocks,
    attend_blocks,
    attend_up_to,
    flex_blocks,
    takes_flex,
)
from palimpsest.models.class_conditioning import unconditional, with_class
from palimpsest.models.kv_cache import MOST_AT_ONCE, BlockCache, CleanCache, SegmentCache, one_token
from palimpsest.models.segment_attention import SegmentMasks, segment_masks
from palimpsest.models.transformer import Modulation


class TwoStreams:
    """The computation of a DiT layer on the noised and the clean stream, with the layer's own weights."""

    forward_methods = ("two_streams",)  # besides `forward`: see models/sharding.py

    def two_streams(
        self,
        x_BLD: Tensor,
        z_BLD: Tensor,
        c_noised: Tensor,
        c_clean: Tensor,
        rotary: tuple[Tensor, Tensor],
        blocks: int | FlexBlocks | SegmentMasks,
        key_mask_BL: Tensor | None,
        last: bool = False,
        index_N: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the layer to the noised stream `x_BLD` and to the clean one `z_BLD`, which may lack the last block.

        The last layer returns None for the clean stream, which nothing reads, and the noised one at `index_N` only, (N,
        D): these are positions of the flattened rows.
        """
        rotary_clean = tuple(table[: z_BLD.shape[1]] for table in rotary)
        by = Modulation.of(self, c_noised)
        by_clean = Modulation.of(self, c_clean)
        noised, clean = _qkv(self, x_BLD, by, rotary), _qkv(self, z_BLD, by_clean, rotary_clean, with_queries=not last)
        if isinstance(blocks, int):
            attended, attended_clean = attend_blocks(noised, clean, blocks, key_mask_BL, self.attn_backend)
        else:
            attended, attended_clean = blocks.attend(noised, clean)
        if index_N is not None:
            by = Modulation.of(self, _at(c_noised, index_N, x_BLD.shape[1]))
            attended, x_BLD = (x.flatten(0, 1).index_select(0, index_N) for x in (attended, x_BLD))
        x = by.after_attention(self, x_BLD, attended)
        return x, None if last else by_clean.after_attention(self, z_BLD, attended_clean)


class BlockStreams:
    """The methods of a DiT for block diffusion. The clean stream is conditioned on noise level 0 and the noised one on
    the level of each block, so that clean tokens are encoded the same whatever follows them."""

    def encode_blocks(
        self,
        noised_BL: Tensor,
        clean_BL: Tensor,
        blocks: int | Tensor,
        sigma_Bb: Tensor,
        at: Positions | None = None,
        attention_mask: Tensor | None = None,
        class_id: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states of the noised tokens, each block given the clean tokens before it, in one pass: (B, L,
        D), or (N, D) for the positions `at`, ready for `head`.

        Unused work is skipped: the last block of the clean stream (if it starts at one position in all rows), its last
        layer except keys and values, and the last layer at noised positions that are not requested.

        Args:
            blocks: tokens of each block; or (B, L), the number of each token's block, for blocks of any length.
        """
        length = noised_BL.shape[1]
        class_id = unconditional(noised_BL) if class_id is None and self.num_classes else class_id
        c_noised, c_clean = self._conditioned(sigma_Bb, blocks, length, class_id), self._clean(noised_BL, class_id)
        rotary = rotary_angles(self.rotary_emb.inv_freq, length)
        key_mask_BL, earlier = attention_mask if self.mask_padding else None, length
        backend, head_width = self.blocks[0].attn_backend, 2 * len(self.rotary_emb.inv_freq)
        if isinstance(blocks, int):
            earlier = (length - 1) // blocks * blocks
            if earlier and takes_flex(backend, noised_BL.device, head_width):
                blocks = flex_blocks(length, earlier, blocks, key_mask_BL, noised_BL.device)
        else:
            blocks = segment_masks(blocks, key_mask_BL, backend, head_width)
        streams = self.vocab_embed(noised_BL), self.vocab_embed(clean_BL[:, :earlier])
        for layer in self.order[:-1]:
            streams = self.through(layer.two_streams, *streams, c_noised, c_clean, rotary, blocks, key_mask_BL)
        index_N = None if at is None else at.index_N
        x, _ = self.through(
            self.order[-1].two_streams, *streams, c_noised, c_clean, rotary, blocks, key_mask_BL, True, index_N
        )
        return self._last_hidden(x, c_noised, class_id, at)

    def new_block_cache(self, batch_size: int, length: int, window: int | None = None) -> BlockCache:
        """Return an empty cache for texts of `length` tokens, of which the last `window` clean ones are seen (None:
        all)."""
        return BlockCache(len(self.order), batch_size, length, window, self._one_token)

    def new_segment_cache(self, batch_size: int) -> SegmentCache:
        """Return an empty cache for texts in segments."""
        return SegmentCache(len(self.order), batch_size, self._one_token)

    @property
    def _one_token(self) -> Tensor:
        return one_token(self.vocab_embed.embedding, self.n_heads)

    def remember(self, clean_BL: Tensor, block_size: int, cache: BlockCache, class_id: Tensor | None = None) -> None:
        """Append whole clean blocks, which follow those in `cache`, to it."""
        most = max(1, MOST_AT_ONCE // block_size) * block_size
        window = None if cache.window is None else cache.window // block_size + 1
        attention = partial(attend_up_to, size=block_size, key_mask_BK=None, window=window)
        for start in range(0, clean_BL.shape[1], most):
            new_BL = clean_BL[:, start : start + most]
            cache.make_room(new_BL.shape[1])
            self._read(new_BL, cache, attention, class_id)
            cache.advance(new_BL.shape[1])

    def remember_segment(
        self, clean_BW: Tensor, here_BW: Tensor, cache: SegmentCache, class_id: Tensor | None = None
    ) -> None:
        """Append the clean segment that follows those in `cache` to it; `here_BW` is True on its tokens, the first of
        each row."""
        key_mask_BK = torch.cat([cache.key_mask(), here_BW], dim=1)
        self._read(clean_BW, cache, partial(attend, key_mask=key_mask_BK), class_id)
        cache.advance(here_BW)

    def _read(self, clean_BL: Tensor, cache: CleanCache, attention: Callable, class_id: Tensor | None) -> None:
        """Store keys and values of clean tokens behind those of `cache`; `attention` takes q, k, v and the backend."""
        class_id = unconditional(clean_BL) if class_id is None and self.num_classes else class_id
        angles = rotary_angles(self.rotary_emb.inv_freq, clean_BL.shape[1], cache.next_position())
        _, by_layer = self._modulations(cache, class_id, partial(self._clean, clean_BL, class_id))
        z_BLD = self.vocab_embed(clean_BL)
        for number, (layer, by) in enumerate(zip(self.order, by_layer, strict=True)):
            last = number == len(self.order) - 1
            own = _qkv(layer, z_BLD, by, angles, with_queries=not last)
            k, v = cache.append(number, own.k, own.v)
            if not last:
                z_BLD = by.after_attention(layer, z_BLD, attention(own.q, k, v, backend=layer.attn_backend))

    def encode_after(
        self,
        noised_Rk: Tensor,
        sigma_R: Tensor,
        cache: CleanCache,
        rows: Tensor | None = None,
        at: Positions | None = None,
        attention_mask: Tensor | None = None,
        class_id: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states of one noised block that follows the clean tokens of `cache`, as `encode_blocks` gives
        them: (R, k, D) or (N, D). `rows` are rows of the cache (None: all). `attention_mask` is False behind the tokens
        of a row."""
        length = noised_Rk.shape[1]
        class_id = unconditional(noised_Rk) if class_id is None and self.num_classes else class_id
        conditioned = partial(self._conditioned, sigma_R[:, None], length, length, class_id)
        c, by_layer = self._modulations(cache, class_id, conditioned)
        angles = rotary_angles(self.rotary_emb.inv_freq, length, cache.next_position(rows))
        key_mask = self._key_mask_after(cache, rows, noised_Rk, attention_mask)
        x_RkD = self.vocab_embed(noised_Rk)
        for number, (layer, by) in enumerate(zip(self.order, by_layer, strict=True)):
            own = _qkv(layer, x_RkD, by, angles)
            k, v = cache.append(number, own.k, own.v, rows)
            attended = attend(own.q, k, v, key_mask, layer.attn_backend)
            if at is not None and number == len(self.order) - 1:
                attended, x_RkD = at.take(attended), at.take(x_RkD)
                by = by if _is_constant(c) else Modulation.of(layer, _at(c, at.index_N, length))
            x_RkD = by.after_attention(layer, x_RkD, attended)
        return self._last_hidden(x_RkD, c, class_id, at)

    def _modulations(
        self, cache: CleanCache, class_id: Tensor | None, conditioned: Callable[[], Tensor]
    ) -> tuple[Tensor, list[Modulation]]:
        """Return the conditioning and its adaLN output for every layer, computed once if it is always the same."""
        always = class_id is None and not self.time_conditioning
        if not always or cache.modulations is None:
            c = conditioned()
            found = c, [Modulation.of(layer, c) for layer in self.order]
            if not always:
                return found
            cache.modulations = found
        return cache.modulations

    def _key_mask_after(
        self, cache: CleanCache, rows: Tensor | None, own_Rk: Tensor, here_Rk: Tensor | None
    ) -> Tensor | None:
        """Return the keys that tokens `own_Rk` behind `cache` see, (R, K + k); None for all."""
        earlier_RK = cache.key_mask(rows)
        if earlier_RK is None and (here_Rk is None or not self.mask_padding):
            return None
        here_Rk = torch.ones_like(own_Rk, dtype=torch.bool) if here_Rk is None else here_Rk
        if earlier_RK is None:
            earlier_RK = here_Rk.new_ones(len(own_Rk), cache.num_seen)
        return torch.cat([earlier_RK, here_Rk], dim=1)

    def _clean(self, tokens_BL: Tensor, class_id: Tensor | None) -> Tensor:
        """Return the conditioning of clean tokens, (1, C), or (B, C) with classes."""
        rows = 1 if class_id is None else len(tokens_BL)
        return self.conditioning(torch.zeros(rows, device=tokens_BL.device), class_id)

    def _conditioned(self, sigma_Bb: Tensor, blocks: int | Tensor, length: int, class_id: Tensor | None) -> Tensor:
        """Return the conditioning of noised tokens: (B, L, C), or as `_clean` if the network sees no noise level."""
        if not self.time_conditioning:
            return self._clean(sigma_Bb, class_id)
        of_block = None if class_id is None else class_id.repeat_interleave(sigma_Bb.shape[1])
        c_BbC = self.conditioning(sigma_Bb.flatten(), of_block).unflatten(0, sigma_Bb.shape)
        if isinstance(blocks, Tensor):
            return c_BbC[torch.arange(len(blocks), device=blocks.device)[:, None], blocks]
        return c_BbC.repeat_interleave(blocks, dim=1)[:, :length]

    def _last_hidden(self, x: Tensor, c: Tensor, class_id: Tensor | None, at: Positions | None) -> Tensor:
        if at is None:
            return with_class(self.output_layer.normed(x, c), class_id, self.num_classes)
        hidden = self.output_layer.normed(x, _at(c, at.index_N, at.mask_BL.shape[1]))
        of_rows = None if class_id is None else at.of_rows(class_id)
        return with_class(hidden[:, None], of_rows, self.num_classes)[:, 0]


def _at(c: Tensor, index_N: Tensor, length: int) -> Tensor:
    """Return the conditioning of positions of the flattened rows, (N, C); (1, C) if it is the same everywhere."""
    if c.ndim == 3:
        return c.flatten(0, 1).index_select(0, index_N)
    return c if _is_constant(c) else c.index_select(0, index_N // length)


def _is_constant(c: Tensor) -> bool:
    return c.ndim == 2 and len(c) == 1


def _qkv(
    layer: nn.Module, x_BLD: Tensor, by: Modulation, angles: tuple[Tensor, Tensor], with_queries: bool = True
) -> QKV:
    normed_BLD = by.before_attention(layer, x_BLD)
    if not with_queries:
        k, v = layer.keys_and_values(normed_BLD)
        return QKV(None, apply_rotary(k, *angles), v)
    return QKV(*layer.rotated(normed_BLD, angles))
