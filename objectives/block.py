"""Block diffusion: BD3-LM (Arriola et al., arXiv 2503.09573).

Shape suffixes: B batch, L length, R rows (blocks), N selected positions, b blocks of a text, k tokens of a block, V
vocabulary, D width.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Self

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import ADDED_LATER, COPY, Length, Share
from palimpsest.denoisers import BlockDenoiser
from palimpsest.models.backbone import Backbone
from palimpsest.noise_schedule import Clipped
from palimpsest.objectives.base import Batch, Model, TokenDiffusion, TokenLoss, context, fresh_noise, scored_mask
from palimpsest.objectives.block_layout import BlockLayout, EqualBlocks, SegmentBlocks
from palimpsest.objectives.clipping import WHOLE, ClipSearch
from palimpsest.objectives.mask_sampling import Bernoulli, ExactCount, MaskSampler
from palimpsest.objectives.wrapping import BackboneView, WrapperObjective
from palimpsest.process import Absorbing

_OF_TOKENS = ("eos_padding", "class_bias")  # optional, (B, L)
_LOGS_BY_BLOCK = ("num_masked", "cross_entropy", "num_scored")  # from which losses by mask rate are computed


class BlockModel(Model, BlockDenoiser):
    """Block diffusion bound to a network that reads texts in blocks."""

    @property
    def block_size(self) -> int:
        return self.objective.block_size

    def after(self, earlier: object, window: int | None = None, **cond: Tensor) -> Model:
        """Return the model of the next block; its predictions take `row` (R,), the rows of `earlier` they follow."""
        return self.objective.inner.model(_NextBlock(self.backbone, earlier, self.block_size, window, cond))

    def new_block_cache(self, batch_size: int, length: int, window: int | None = None) -> object:
        return self.backbone.new_block_cache(batch_size, length, window)

    def remember(self, clean_BL: Tensor, cache: object, **cond: Tensor) -> None:
        self.backbone.remember(clean_BL, self.block_size, cache, **cond)

    def new_segment_cache(self, batch_size: int) -> object:
        return self.backbone.new_segment_cache(batch_size)

    def remember_segment(self, clean_BW: Tensor, here_BW: Tensor, cache: object, **cond: Tensor) -> None:
        self.backbone.remember_segment(clean_BW, here_BW, cache, **cond)


class BlockDiffusion(WrapperObjective):
    """Block diffusion: -log p(x) = sum over blocks b of -log p(x^b | x^<b), each bounded as masked diffusion (eq. 3).

    With one block this is masked diffusion. With blocks of one token nothing is drawn: the block is masked, and the
    loss is -log p(x_i | x_<i) itself.

    If a batch has `segment_ends`, the segments of each text are its blocks, whatever their lengths. A noised token then
    attends to its own noised segment and the clean ones before it, a clean token to the clean ones up to its own.

    Raises ValueError for a setting that would have no effect, and for blocks that do not fill a row.

    Args:
        within: process -> the objective of a block, which is one row to it.
        block_size: tokens of a block; the last one of a text may be shorter. Segments ignore it.
        ignore_bos: the first token of a text is context, neither masked nor scored.
        sampling_eps_min, sampling_eps_max: mask rates that training draws from (section 5). See `clip`.
        search: how these rates are chosen again at every validation; None keeps them.
        length: tokens of a row, which whole blocks must fill; None skips that check.
    """

    name = "bd3lm"
    model_class = BlockModel
    reads_segments = True
    streams = 2  # noised and clean

    def __init__(
        self,
        process: Absorbing,
        within: Callable[..., TokenDiffusion],
        block_size: Annotated[Length, ADDED_LATER],
        ignore_bos: Annotated[bool, COPY] = True,
        sampling_eps_min: Annotated[Share, COPY] = WHOLE[0],
        sampling_eps_max: Annotated[Share, COPY] = WHOLE[1],
        search: ClipSearch | None = None,
        length: Annotated[Length, ADDED_LATER] | None = None,
    ) -> None:
        if length is not None and length % block_size:
            raise ValueError(
                f"block_size={block_size} must divide model.length={length} into whole blocks; the nearest that do: "
                f"{_nearest_divisors(block_size, length)}"
            )
        self.process = process
        self.block_size = block_size
        self.first_given = ignore_bos
        self.inner = within(process=process)
        self._schedule = self.inner.schedule
        self.sampling_eps = WHOLE
        limited = (sampling_eps_min, sampling_eps_max) != WHOLE or (search is not None and search.candidates)
        self._check_draws(limited)
        if self.exact:
            self.inner.mask_sampler = ExactCount()  # one token of one
        self.clip(sampling_eps_min, sampling_eps_max)
        self.search = search

    def _check_draws(self, limited: bool) -> None:
        """Refuse settings of mask sampling that would have no effect."""
        mask_sampler, T = self.inner.mask_sampler, self.inner.T  # noqa: N806
        bernoulli = isinstance(mask_sampler, Bernoulli) and not T
        if limited and not bernoulli:
            raise ValueError(
                "training.sampling_eps_min, sampling_eps_max and clip_search_widths limit the mask rates of "
                f"training.masking=bernoulli T=0; with masks by {mask_sampler.label}, T={T} they would do nothing"
            )
        drawn = not bernoulli or mask_sampler.importance_sampling or mask_sampler.resample or mask_sampler.time_density
        if self.exact and (limited or drawn):
            raise ValueError(
                "block_size=1 leaves nothing to draw (the only token of a block is masked), so masks by "
                f"{mask_sampler.label}, T={T}, training.resample and limits of mask rates would do nothing; leave them "
                "out"
            )

    @property
    def exact(self) -> bool:
        return self.block_size == 1

    @property
    def zero_loss_on_clean_text(self) -> bool:
        return self.inner.zero_loss_on_clean_text and not self.exact

    @property
    def encodes(self) -> int:
        return self.inner.encodes

    @property
    def loss_name(self) -> str:
        return self.inner.loss_name

    def clip(self, low: float, high: float) -> None:
        """Train on mask rates from `low` to `high` only, from now on; evaluation always uses all of them. Raises
        ValueError unless 0 <= low < high <= 1, and for blocks of one token, which have one mask rate."""
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"training.sampling_eps_min={low} and training.sampling_eps_max={high} must satisfy 0 <= min < max <= 1"
            )
        if (low, high) != WHOLE and self.exact:
            raise ValueError(
                f"training.sampling_eps_min={low} training.sampling_eps_max={high} with block_size=1: the only token "
                "of a block is always masked; leave them out"
            )
        if (low, high) != WHOLE and isinstance(self._schedule, Clipped):
            raise ValueError(
                f"training.sampling_eps_min={low} training.sampling_eps_max={high} and noise=clipped both limit the "
                "mask rates; leave one of them out"
            )
        self.sampling_eps = (low, high)
        self.inner.schedule = self._schedule if (low, high) == WHOLE else Clipped(self._schedule.unclipped, low, high)

    def bound(self, mask_sampler: MaskSampler | None) -> Self:
        """Return the objective for evaluation, as in `TokenDiffusion`. Raises ValueError if a mask sampler is given for
        blocks of one token, whose likelihood is exact."""
        if self.exact and mask_sampler is not None:
            raise ValueError(
                f"eval.estimator with masks by {mask_sampler.label} and block_size=1 contradict each other: its "
                "likelihood is exact; use eval.estimator=auto"
            )
        other = copy.copy(self)
        other.inner = self.inner.bound(mask_sampler)
        return other

    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss:
        """Return the sum over blocks; each is a row with its own noise, conditioned on the clean blocks before it."""
        layout, blocks = self._blocks(batch)
        noise = (generator or fresh_noise(batch["input_ids"])).parts(layout.num_blocks)
        loss = self.inner.loss(_AllBlocks(backbone, batch["input_ids"], layout, context(batch)), blocks, noise)
        by_block = {name: value.unflatten(0, (-1, layout.num_blocks)) for name, value in loss.logs.items()}
        logs = {name: value.sum(1) for name, value in by_block.items()}
        if "num_masked" in logs:  # each block has its own mask rate
            shape = by_block["num_masked"].shape
            by_block["num_scored"] = (~blocks["observed"]).sum(-1).view(*shape[:2], 1).expand(shape)
            logs |= {f"{name}_by_part": by_block[name].flatten(1) for name in _LOGS_BY_BLOCK}
        return TokenLoss(layout.merge(loss.nll_BL), layout.merge(loss.mask_BL), logs)

    def _layout(self, x_BL: Tensor, segment_ends: Tensor | None) -> BlockLayout:
        if segment_ends is None:
            return EqualBlocks(*x_BL.shape, self.block_size)
        return SegmentBlocks(segment_ends, x_BL.shape[1])

    def _blocks(self, batch: Batch) -> tuple[BlockLayout, Batch]:
        """Return the blocks of a batch of texts as a batch."""
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        if self.first_given:
            scored_BL = scored_BL & (torch.arange(x0_BL.shape[1], device=x0_BL.device) > 0)
        layout = self._layout(x0_BL, batch.get("segment_ends"))
        blocks = {"input_ids": layout.split(x0_BL), "observed": ~layout.split(scored_BL)}
        return layout, blocks | {name: layout.split(batch[name]) for name in _OF_TOKENS if name in batch}

    def block_losses(self, backbone: Backbone, batch: Batch, generator: KeyedNoise) -> tuple[Tensor, Tensor]:
        """Return mask rate and nats per scored token of every block with scored tokens, (R,) each, for one draw."""
        layout, blocks = self._blocks(batch)
        bound, scored_Rk = self.bound(Bernoulli()).inner, ~blocks["observed"]
        noise = generator.parts(layout.num_blocks)
        (draw,) = bound.mask_sampler(bound.schedule, blocks["input_ids"], scored_Rk, self.process, noise)
        network = _AllBlocks(backbone, batch["input_ids"], layout, context(batch))
        nats_R = bound.loss_at(network, blocks, draw).nll_BL.double().sum(-1)
        rate_R, count_R = bound.schedule(draw.t_B).move_chance, scored_Rk.sum(-1)
        scored_R = count_R > 0
        return rate_R[scored_R], nats_R[scored_R] / count_R[scored_R]

    def denoise(
        self,
        backbone: Backbone,
        x_BL: Tensor,
        t_B: Tensor,
        at: Positions | None = None,
        segment_ends: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Return log p(x_0^b | x_t^b, x^<b): (B, L, V), or (N, V) at the positions `at`. Raises ValueError if a
        prediction is requested after a block with masks."""
        layout = self._layout(x_BL, segment_ends)
        network = self._network(backbone, x_BL, at, layout, cond)
        t_R = t_B.repeat_interleave(layout.num_blocks)
        chosen = _of_blocks(Positions.everywhere(x_BL) if at is None else at, layout)
        log_p_NV = self.inner.denoise(network, layout.split(x_BL), t_R, chosen)
        return log_p_NV.unflatten(0, x_BL.shape) if at is None else log_p_NV

    def reverse(
        self,
        backbone: Backbone,
        x_BL: Tensor,
        t_B: Tensor,
        s_B: Tensor,
        at: Positions,
        segment_ends: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Return log p(x_s^b | x_t^b, x^<b), (N, V); as `denoise`."""
        layout = self._layout(x_BL, segment_ends)
        network = self._network(backbone, x_BL, at, layout, cond)
        t_R, s_R = (time_B.repeat_interleave(layout.num_blocks) for time_B in (t_B, s_B))
        return self.inner.reverse(network, layout.split(x_BL), t_R, s_R, _of_blocks(at, layout))

    def _network(
        self, backbone: Backbone, x_BL: Tensor, at: Positions | None, layout: BlockLayout, cond: dict
    ) -> "_AllBlocks":
        if at is not None and layout.num_blocks > 1:
            by_text = (-1, layout.num_blocks)
            masked_Bb = layout.split(self.process.is_corrupted(x_BL)).any(-1).unflatten(0, by_text)
            after_masks_Bb = masked_Bb.cumsum(-1).roll(1, dims=1) > 0
            after_masks_Bb[:, 0] = False
            if bool((layout.split(at.mask_BL).any(-1).unflatten(0, by_text) & after_masks_Bb).any()):
                key = f"block_size={self.block_size}" if isinstance(layout.blocks, int) else "data.segments=true"
                raise ValueError(
                    f"parameterization=bd3lm with {key} predicts block after block and cannot predict behind a block "
                    "with masks; use sampling.predictor=block, or block_size=model.length and no segments"
                )
        return _AllBlocks(backbone, x_BL, layout, cond)


@dataclass
class _AllBlocks(BackboneView):
    """A backbone that reads all blocks of its texts in one pass, each after the clean blocks before it."""

    encodes_positions = True
    clean_BL: Tensor
    layout: BlockLayout
    cond: dict[str, Tensor]

    def encode(self, tokens_Rk: Tensor, sigma_R: Tensor, at: Positions) -> Tensor:
        """Return hidden states at the positions `at` of the blocks, (N, D)."""
        layout = self.layout
        sigma_Bb = sigma_R.unflatten(0, (-1, layout.num_blocks))
        counts = [sum(at.counts[i : i + layout.num_blocks]) for i in range(0, len(at.counts), layout.num_blocks)]
        at, noised_BL = Positions(layout.merge(at.mask_BL), counts), layout.merge(tokens_Rk)
        texts = (noised_BL, self.clean_BL, layout.blocks, sigma_Bb)
        if not self.backbone.encodes_positions:
            return at.take(self.backbone.encode_blocks(*texts, **self.cond))
        return self.backbone.encode_blocks(*texts, at, **self.cond)


@dataclass
class _NextBlock(BackboneView):
    """A backbone that reads one block after `earlier`: a cache, or clean tokens, which it reads at every call."""

    encodes_positions = True
    earlier: object
    block_size: int
    window: int | None
    cond: dict[str, Tensor]

    def encode(
        self, tokens_Rk: Tensor, sigma_R: Tensor, row: Tensor, at: Positions | None = None, **cond: Tensor
    ) -> Tensor:
        """Return hidden states; `row` (R,) says which rows of `earlier` the blocks follow."""
        known = {name: value[row] for name, value in self.cond.items()}
        uncached = isinstance(self.earlier, Tensor | list)
        cache, rows = (self._read(row, known), None) if uncached else (self.earlier, row)
        return self.backbone.encode_after(tokens_Rk, sigma_R, cache, rows, at, **known | cond)

    def _read(self, row: Tensor, cond: dict[str, Tensor]) -> object:
        """Return a cache of the clean tokens of some rows."""
        if isinstance(self.earlier, Tensor):
            cache = self.backbone.new_block_cache(len(row), self.earlier.shape[1], self.window)
            self.backbone.remember(self.earlier[row], self.block_size, cache, **cond)
            return cache
        cache = self.backbone.new_segment_cache(len(row))
        for tokens_BW, here_BW in self.earlier:
            self.backbone.remember_segment(tokens_BW[row], here_BW[row], cache, **cond)
        return cache


def _of_blocks(at: Positions, layout: BlockLayout) -> Positions:
    """Return positions of texts as positions of their blocks."""
    return Positions(layout.split(at.mask_BL), at.counts if layout.num_blocks == 1 else None)


def _nearest_divisors(size: int, length: int) -> str:
    divisors = [k for k in range(1, length + 1) if length % k == 0]
    below, above = [k for k in divisors if k < size], [k for k in divisors if k > size]
    return " and ".join(str(k) for k in (*below[-1:], *above[:1]))
