"""Block diffusion: BD3-LM (Arriola et al., arXiv 2503.09573).

Shape suffixes: B batch, L length, R rows, N selected positions, b blocks of a text, k tokens of a block, V vocabulary,
D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import COPY, LATER, Length, Share
from palimpsest.denoisers import BlockDenoiser
from palimpsest.noise_schedule import Clipped
from palimpsest.objectives.base import (
    Backbone,
    Batch,
    Containing,
    Model,
    TokenDiffusion,
    TokenLoss,
    context,
    fresh_noise,
    scored_mask,
)
from palimpsest.objectives.clipping import WHOLE, ClipSearch
from palimpsest.objectives.cuts import Cut, Segments, Stretches
from palimpsest.objectives.noising import Bernoulli, ExactCount, Noising
from palimpsest.process import Absorbing

MASK_RATES = ("num_masked", "cross_entropy", "num_scored")  # what the losses by mask rate are made of


class BlockModel(Model, BlockDenoiser):
    """Block diffusion bound to a network that reads texts in blocks."""

    @property
    def block_size(self) -> int:
        return self.objective.block_size

    def after(self, earlier: object, window: int | None = None, **told: Tensor) -> Model:
        return self.objective.after(self.backbone, earlier, window, **told)

    def new_block_cache(self, batch_size: int, length: int, window: int | None = None) -> object:
        return self.backbone.new_block_cache(batch_size, length, window)

    def remember(self, clean_BL: Tensor, cache: object, **told: Tensor) -> None:
        self.backbone.remember(clean_BL, self.block_size, cache, **told)

    def new_segment_cache(self, batch_size: int) -> object:
        return self.backbone.new_segment_cache(batch_size)

    def remember_segment(self, clean_BW: Tensor, here_BW: Tensor, cache: object, **told: Tensor) -> None:
        self.backbone.remember_segment(clean_BW, here_BW, cache, **told)


class BlockDiffusion(Containing):
    """-log p(x) = sum over blocks b of -log p(x^b | x^<b), each bounded by the loss of masked diffusion within the
    block (eq. 3 and 7). With one block that is masked diffusion; with blocks of one token there is nothing left to
    draw: the block is masked, and the loss is -log p(x_i | x_<i) itself.

    Where a batch says where the segments of its texts end (`segment_ends`), these are the blocks, whatever their
    lengths: a noised token sees its own noised segment and the clean ones before, a clean token the clean ones up to
    its own.

    Args:
        within: process -> the objective of a block, which is one row to it.
        block_size: tokens of a block; the last one of a text may be shorter. Of segments it says nothing.
        ignore_bos: the first token of a text is given, as context.
        sampling_eps_min, sampling_eps_max: mask rates that training draws from (section 5). See `clip`.
        search: how these are chosen again at every validation; None: they are not.
        length: tokens of a row, which whole blocks must fill; None where that is not asked.

    Raises:
        ValueError: a setting that would do nothing, or blocks that do not fill a row.
    """

    name = "bd3lm"
    binds_to = BlockModel
    reads_segments = True
    streams = 2  # noised and clean

    def __init__(
        self,
        process: Absorbing,
        within: Callable[..., TokenDiffusion],
        block_size: Annotated[Length, LATER],
        ignore_bos: Annotated[bool, COPY] = True,
        sampling_eps_min: Annotated[Share, COPY] = WHOLE[0],
        sampling_eps_max: Annotated[Share, COPY] = WHOLE[1],
        search: ClipSearch | None = None,
        length: Annotated[Length, LATER] | None = None,
    ) -> None:
        if length is not None and length % block_size:
            raise ValueError(
                f"block_size={block_size} must divide model.length={length} into whole blocks; the nearest that do: "
                f"{_nearest_divisors(block_size, length)}"
            )
        self.process = process
        self.block_size = block_size
        self.first_given = ignore_bos
        self.within = within(process=process)
        self._schedule = self.within.schedule
        self.sampling_eps = WHOLE
        limited = (sampling_eps_min, sampling_eps_max) != WHOLE or (search is not None and search.candidates)
        self._check_drawing(limited)
        if self.exact:
            self.within.noising = ExactCount()  # one token of one
        self.clip(sampling_eps_min, sampling_eps_max)
        self.search = search

    def _check_drawing(self, limited: bool) -> None:
        """Refuse settings of a training's draws that would do nothing."""
        noising, T = self.within.noising, self.within.T  # noqa: N806
        bernoulli = isinstance(noising, Bernoulli) and not T
        if limited and not bernoulli:
            raise ValueError(
                "training.sampling_eps_min, sampling_eps_max and clip_search_widths limit the mask rates of "
                f"training.masking=bernoulli T=0; with masks by {noising.label}, T={T} they would do nothing"
            )
        drawn = not bernoulli or noising.importance_sampling or noising.resample
        if self.exact and (limited or drawn):
            raise ValueError(
                f"block_size=1 leaves nothing to draw (the only token of a block is masked), so masks by "
                f"{noising.label}, T={T}, training.resample and limits of mask rates would do nothing; leave them out"
            )

    @property
    def inner(self) -> TokenDiffusion:
        return self.within

    @property
    def exact(self) -> bool:
        return self.block_size == 1

    @property
    def clean_text_costs_nothing(self) -> bool:
        return self.within.clean_text_costs_nothing and not self.exact

    @property
    def encodes(self) -> int:
        return self.within.encodes

    @property
    def loss_name(self) -> str:
        return self.within.loss_name

    def clip(self, low: float, high: float) -> None:
        """Train on mask rates from `low` to `high` only, from now on; measuring always uses all of them.

        Raises:
            ValueError: they do not satisfy 0 <= low < high <= 1, or blocks have one token, which has one mask rate.
        """
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"training.sampling_eps_min={low} and training.sampling_eps_max={high} must satisfy 0 <= min < max <= 1"
            )
        if (low, high) != WHOLE and self.exact:
            raise ValueError(
                f"training.sampling_eps_min={low} training.sampling_eps_max={high} with block_size=1: the only token "
                "of a block is always masked; leave them out"
            )
        self.sampling_eps = (low, high)
        self.within.schedule = self._schedule if (low, high) == WHOLE else Clipped(self._schedule.whole, low, high)

    def bound(self, noising: Noising | None) -> BlockDiffusion:
        """As of `TokenDiffusion`; blocks of one token are exact, so nothing may be chosen.

        Raises:
            ValueError: a noising is asked for all the same.
        """
        if self.exact and noising is not None:
            raise ValueError(
                f"eval.estimator with masks by {noising.label} and block_size=1 contradict each other: its likelihood "
                "is exact; use eval.estimator=auto"
            )
        other = copy.copy(self)
        other.within = self.within.bound(noising)
        return other

    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss:
        """The sum over blocks: every block is a row of its own, with noise of its own, behind its clean past."""
        cut, blocks = self._blocks(batch)
        noise = (generator or fresh_noise(batch["input_ids"])).parts(cut.number)
        loss = self.within.loss(_BehindClean(backbone, batch["input_ids"], cut, context(batch)), blocks, noise)
        by_block = {name: value.unflatten(0, (-1, cut.number)) for name, value in loss.logs.items()}
        logs = {name: value.sum(1) for name, value in by_block.items()}
        if "num_masked" in logs:  # mask rates are those of blocks
            shape = by_block["num_masked"].shape
            by_block["num_scored"] = (~blocks["given"]).sum(-1).view(*shape[:2], 1).expand(shape)
            logs |= {f"{name}_by_part": by_block[name].flatten(1) for name in MASK_RATES}
        return TokenLoss(cut.together(loss.nll_BL), cut.together(loss.mask_BL), logs)

    def _cut(self, x_BL: Tensor, segment_ends: Tensor | None) -> Cut:
        if segment_ends is None:
            return Stretches(*x_BL.shape, self.block_size)
        return Segments(segment_ends, x_BL.shape[1])

    def _blocks(self, batch: Batch) -> tuple[Cut, Batch]:
        """The blocks of a batch of texts as a batch of their own."""
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        if self.first_given:
            scored_BL = scored_BL & (torch.arange(x0_BL.shape[1], device=x0_BL.device) > 0)
        cut = self._cut(x0_BL, batch.get("segment_ends"))
        blocks = {"input_ids": cut.apart(x0_BL), "given": ~cut.apart(scored_BL)}
        return cut, blocks | ({"fill": cut.apart(batch["fill"])} if "fill" in batch else {})

    def block_losses(self, backbone: Backbone, batch: Batch, generator: KeyedNoise) -> tuple[Tensor, Tensor]:
        """One draw of t in (0, 1) for every block that has scored tokens: (mask rate, nats per scored token), (R,)."""
        cut, blocks = self._blocks(batch)
        plain, scored_Rk = self.bound(Bernoulli()).within, ~blocks["given"]
        noise = generator.parts(cut.number)
        (look,) = plain.noising(plain.schedule, blocks["input_ids"], scored_Rk, self.process, noise)
        behind = _BehindClean(backbone, batch["input_ids"], cut, context(batch))
        nats_R = plain.loss_at(behind, blocks, look.xt_BL, look.t_B).nll_BL.double().sum(-1)
        rate_R, count_R = plain.schedule(look.t_B).move_chance, scored_Rk.sum(-1)
        real_R = count_R > 0
        return rate_R[real_R], nats_R[real_R] / count_R[real_R]

    def denoise(
        self,
        backbone: Backbone,
        x_BL: Tensor,
        t_B: Tensor,
        at_BL: Tensor | None = None,
        segment_ends: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """log p(x_0^b | x_t^b, x^<b): (B, L, V), or (N, V) at the positions of `at_BL`. Each text is clean up to some
        block, of which the answers are; behind it there are none. `segment_ends`: as in a batch.

        Raises:
            ValueError: an answer is asked for behind a block with masks.
        """
        cut = self._cut(x_BL, segment_ends)
        behind = self._behind_itself(backbone, x_BL, at_BL, cut, cond)
        everywhere_BL = torch.ones_like(x_BL, dtype=torch.bool) if at_BL is None else at_BL
        answer_NV = self.within.denoise(behind, cut.apart(x_BL), cut.of_blocks(t_B), cut.apart(everywhere_BL))
        return answer_NV.unflatten(0, x_BL.shape) if at_BL is None else answer_NV

    def reverse(
        self,
        backbone: Backbone,
        x_BL: Tensor,
        t_B: Tensor,
        s_B: Tensor,
        at_BL: Tensor,
        segment_ends: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """log p(x_s^b | x_t^b, x^<b), (N, V); as `denoise`."""
        cut = self._cut(x_BL, segment_ends)
        behind = self._behind_itself(backbone, x_BL, at_BL, cut, cond)
        t_R, s_R = cut.of_blocks(t_B), cut.of_blocks(s_B)
        return self.within.reverse(behind, cut.apart(x_BL), t_R, s_R, cut.apart(at_BL))

    def after(self, backbone: Backbone, earlier: object, window: int | None = None, **told: Tensor) -> Model:
        """The law of one block behind `earlier`: clean tokens (B, S), read anew for every answer, or a cache of them.
        Of segments the tokens are a list: of each its tokens, and where a row has any, (B, W). Answers are asked with
        `row` (R,), the rows behind which they stand."""
        return self.within.model(_BehindEarlier(backbone, earlier, self.block_size, window, told))

    def _behind_itself(
        self, backbone: Backbone, x_BL: Tensor, at_BL: Tensor | None, cut: Cut, cond: dict
    ) -> _BehindClean:
        masked_BL = self.process.is_corrupted(x_BL)
        if at_BL is not None:
            before_Bb = cut.apart(masked_BL).any(-1).unflatten(0, (-1, cut.number)).cumsum(-1).roll(1, dims=1)
            before_Bb[:, 0] = 0
            if bool((cut.apart(at_BL).any(-1).unflatten(0, (-1, cut.number)) & (before_Bb > 0)).any()):
                key = f"block_size={self.block_size}" if isinstance(cut.blocks, int) else "data.segments=true"
                raise ValueError(
                    f"parameterization=bd3lm with {key} answers block after block, and was asked behind a block with "
                    "masks; use sampling.predictor=block, or block_size=model.length and no segments"
                )
        return _BehindClean(backbone, x_BL, cut, cond)


@dataclass(frozen=True)
class _BehindClean:
    """A backbone of blocks, each behind the clean blocks before it: all in one pass over their texts."""

    backbone: Backbone
    clean_BL: Tensor
    cut: Cut
    told: dict[str, Tensor]
    encodes_positions: bool = field(default=True, init=False)

    @property
    def head(self) -> torch.nn.Linear:
        return self.backbone.head

    def encode(self, tokens_Rk: Tensor, sigma_R: Tensor, at_BL: Tensor) -> Tensor:
        """(N, D), at the positions of `at_BL` (R, k)."""
        sigma_Bb, at_BL = sigma_R.unflatten(0, (-1, self.cut.number)), self.cut.together(at_BL)
        noised_BL = self.cut.together(tokens_Rk)
        return self.backbone.encode_blocks(noised_BL, self.clean_BL, self.cut.blocks, sigma_Bb, at_BL, **self.told)


@dataclass(frozen=True)
class _BehindEarlier:
    """A backbone of one block behind clean tokens: those a cache has read, or those given, (B, S), read every time; of
    segments those given are a list of what `remember_segment` reads."""

    backbone: Backbone
    earlier: object
    block_size: int
    window: int | None
    told: dict[str, Tensor]
    encodes_positions: bool = field(default=True, init=False)

    @property
    def head(self) -> torch.nn.Linear:
        return self.backbone.head

    def encode(
        self, tokens_Rk: Tensor, sigma_R: Tensor, row: Tensor, at_BL: Tensor | None = None, **cond: Tensor
    ) -> Tensor:
        """`row`: which of the rows behind `earlier` these are."""
        told = {name: value[row] for name, value in self.told.items()}
        read = isinstance(self.earlier, Tensor | list)
        cache, rows = (self._read(row, told), None) if read else (self.earlier, row)
        return self.backbone.encode_after(tokens_Rk, sigma_R, cache, rows, at_BL, **told, **cond)

    def _read(self, row: Tensor, told: dict[str, Tensor]) -> object:
        """A cache of what is there before the block, of some rows."""
        if isinstance(self.earlier, Tensor):
            cache = self.backbone.new_block_cache(len(row), self.earlier.shape[1], self.window)
            self.backbone.remember(self.earlier[row], self.block_size, cache, **told)
            return cache
        cache = self.backbone.new_segment_cache(len(row))
        for tokens_BW, here_BW in self.earlier:
            self.backbone.remember_segment(tokens_BW[row], here_BW[row], cache, **told)
        return cache


def _nearest_divisors(size: int, length: int) -> str:
    divisors = [k for k in range(1, length + 1) if length % k == 0]
    below, above = [k for k in divisors if k < size], [k for k in divisors if k > size]
    return " and ".join(str(k) for k in (*below[-1:], *above[:1]))
