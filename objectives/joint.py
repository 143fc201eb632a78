"""MM-LDLM: one network denoises a text (masked diffusion) and its latent (Gaussian diffusion) together.

Text and latent each have their own time. Every row of a batch draws a training mode, so one network learns the
conditional, joint and marginal distributions; guidance is a ratio of them.
Shape suffixes: B batch, L length, N selected positions, K latent tokens, D numbers of each.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import Length, NotNegative
from palimpsest.denoisers import JointDenoiser
from palimpsest.gaussian_process import LatentPrediction
from palimpsest.models.backbone import Backbone
from palimpsest.objectives.base import Batch, Model, TokenLoss, counted_mask, fresh_noise, scored_mask
from palimpsest.objectives.gaussian import EARLIEST, LATEST, GaussianDiffusion, LatentLoss
from palimpsest.objectives.mask_sampling import Draw, MaskSampler
from palimpsest.objectives.subs import Subs
from palimpsest.objectives.wrapping import BackboneView, WrapperObjective
from palimpsest.process import Absorbing


@dataclass(frozen=True)
class TrainingMode:
    """The role of text and latent in a row: `denoised` (noised at its own time and predicted), `conditioning` (clean,
    time 0), or `dropped` (pure noise, time 1)."""

    text: str
    latent: str


MODES = {
    "joint": TrainingMode("denoised", "denoised"),
    "l2t": TrainingMode("denoised", "conditioning"),
    "t2l": TrainingMode("conditioning", "denoised"),
    "text": TrainingMode("denoised", "dropped"),
    "latent": TrainingMode("dropped", "denoised"),
}
MODE_SHARES = {"joint": 0.3, "l2t": 0.25, "t2l": 0.25, "text": 0.1, "latent": 0.1}


class JointModel(Model, JointDenoiser):
    """The joint objective bound to a network that reads texts and latents."""

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.backbone.latent_shape

    def predict_latent(
        self, latent_BKD: Tensor, latent_t_B: Tensor, x_BL: Tensor, t_B: Tensor, **cond: Tensor
    ) -> LatentPrediction:
        """Return the prediction for the standardised, noised latent given the text at time t_B (1: the marginal)."""
        latent_t_B = latent_t_B.double().clamp(EARLIEST, LATEST)
        nowhere = Positions(torch.zeros_like(x_BL, dtype=torch.bool), [0] * len(x_BL))
        cond = {**cond, "latent": latent_BKD, "latent_t": latent_t_B, "at": nowhere}
        _, output_BKD = self.backbone.encode_both(x_BL, self.objective.inner.conditioning(t_B.double()), **cond)
        return self.objective.latent.read(output_BKD, latent_BKD, latent_t_B)

    def denoise_both(
        self, x_BL: Tensor, t_B: Tensor, at: Positions, latent_BKD: Tensor, latent_t_B: Tensor, **cond: Tensor
    ) -> tuple[Tensor, LatentPrediction]:
        """Return `denoise` given the noised latent, (N, V), and `predict_latent`, from one network pass."""
        latent_t_B = latent_t_B.double().clamp(EARLIEST, LATEST)
        network = _TextNetwork(self.backbone)
        log_p_NV = self.objective.denoise(network, x_BL, t_B, at, **cond, latent=latent_BKD, latent_t=latent_t_B)
        return log_p_NV, self.objective.latent.read(network.outputs[0], latent_BKD, latent_t_B)


class JointDiffusion(WrapperObjective):
    """The joint objective of texts and latents.

    An optimizer step sums text_weight times the nats of each denoised text (the SUBS bound) and latent_weight times the
    loss of each denoised latent, counted as `latent_tokens` tokens. It divides by the step's tokens
    (objectives/reduction.py explains the common denominator).

    For evaluation (`bound`) it is the text's objective given the latent of the batch: the bound of
    -log p(text | latent), or of -log p(text) with latent_t = 1. Raises ValueError for invalid weights.

    Args:
        process: corrupts the text.
        text: process -> the objective of the text.
        latent: the objective of the latent.
        modes: weights with which rows draw a mode of `MODES`; None for `MODE_SHARES`.
        text_weight, latent_weight: weights of the two terms.
        latent_tokens: tokens that a latent counts as: the length of a row.
    """

    name = "mmldlm"
    model_class = JointModel
    reads_latents = True

    def __init__(
        self,
        process: Absorbing,
        text: Callable[..., Subs],
        latent: GaussianDiffusion,
        modes: Mapping[str, NotNegative] | None = None,
        text_weight: NotNegative = 1.0,
        latent_weight: NotNegative = 1.0,
        latent_tokens: Length = 1,
    ) -> None:
        self.process = process
        self.inner = text(process=process)
        self.latent = latent
        self.shares = _shares(modes)
        drawn = [MODES[name] for name in self.shares]
        trains_text = text_weight and any(mode.text == "denoised" for mode in drawn)
        if not trains_text and not (latent_weight and any(mode.latent == "denoised" for mode in drawn)):
            raise ValueError(
                f"training.text_weight={text_weight} training.latent_weight={latent_weight} training.joint_modes="
                f"{self.shares}: nothing is trained; give a weight to something that a mode learns"
            )
        self.text_weight = text_weight
        self.latent_weight = latent_weight
        self.latent_tokens = latent_tokens
        self.evaluates = False

    @property
    def loss_name(self) -> str:
        """The training loss is a sum of two terms and not a likelihood."""
        return "nll" if self.evaluates else "loss"

    def bound(self, mask_sampler: MaskSampler | None) -> Self:
        """Return the bound of the text given the latent of the batch, as in `TokenDiffusion`."""
        other = copy.copy(self)
        other.inner = self.inner.bound(mask_sampler)
        other.evaluates = True
        return other

    def loss_at(self, backbone: Backbone, batch: Batch, draw: Draw) -> TokenLoss:
        """Return the integrand of the text's bound, given the latent of the batch."""
        return self.inner.loss_at(backbone, batch, draw)

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at: Positions | None = None, **cond: Tensor
    ) -> Tensor:
        """Return log p(x_0 | x_t, latent) for `latent` (B, K, D) and `latent_t` (B,) in `cond`, or the marginal."""
        return self.inner.denoise(backbone, x_BL, t_B, at, **cond)

    def reverse(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at: Positions, **cond: Tensor
    ) -> Tensor:
        """Return log p(x_s | x_t, latent), (N, V); as `denoise`."""
        return self.inner.reverse(backbone, x_BL, t_B, s_B, at, **cond)

    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss:
        """Return the joint loss of a training batch, or the text's bound for evaluation. Raises ValueError if a
        training batch has no latents."""
        if self.evaluates:
            return self.inner.loss(backbone, batch, generator)
        if "latent" not in batch:
            raise ValueError("algo=mmldlm learns texts with their latents, and these have none; choose latents=")
        noise = generator or fresh_noise(batch["input_ids"])
        latent_noise = noise.part(1)  # the row's own numbers are the text's
        rows = self._rows(latent_noise.uniform())
        latent = self.latent.draw(batch["latent"], latent_noise)
        clean_latent_B = _any(rows, "latent", "conditioning")
        latent_t_B = torch.where(clean_latent_B, 0.0, torch.where(_any(rows, "latent", "dropped"), 1.0, latent.t_B))
        latent_BKD = torch.where(clean_latent_B[:, None, None], latent.x0_BKD, latent.xt_BKD)
        scored_BL = scored_mask(batch)
        network = _TrainedTextNetwork(
            backbone,
            process=self.process,
            clean_B=_any(rows, "text", "conditioning"),
            dropped_B=_any(rows, "text", "dropped"),
            maskable_BL=scored_BL,
            sigma_of_masks_B=self.inner.conditioning(torch.ones_like(latent_t_B)),
        )
        observed_BL = ~scored_BL | ~_any(rows, "text", "denoised")[:, None]
        text_batch = {**batch, "latent": latent_BKD, "latent_t": latent_t_B, "observed": observed_BL}
        text = self.inner.loss(network, text_batch, noise)
        passes = [self.latent.loss(output_BKD, latent) for output_BKD in network.outputs]
        found = LatentLoss(*(torch.stack(values).mean(0) for values in zip(*passes, strict=True)))
        latent_loss_B = torch.where(_any(rows, "latent", "denoised"), found.loss_B, 0.0)
        row_B = self.latent_weight * self.latent_tokens * latent_loss_B
        loss = TokenLoss(self.text_weight * text.nll_BL, counted_mask(batch), text.logs, row_B)
        return replace(loss, means=_means(loss, text, found, rows))

    def _rows(self, u_B: Tensor) -> dict[str, Tensor]:
        """Return the rows of each training mode; every row is in exactly one."""
        rows, low = {}, 0.0
        for name, share in self.shares.items():
            high = low + share
            # The last mode takes all rows that rounding leaves.
            rows[name] = (u_B >= low) & ((u_B < high) | (name == next(reversed(self.shares))))
            low = high
        return rows


def _shares(modes: Mapping[str, float] | None) -> dict[str, float]:
    """Return the probability of each mode with a positive weight."""
    if modes is not None and not isinstance(modes, Mapping):
        raise ValueError(f"training.joint_modes={modes} must have weights: training.joint_modes={{l2t: 1, t2l: 1}}")
    modes = dict(MODE_SHARES if modes is None else modes)
    if unknown := [name for name in modes if name not in MODES]:
        raise ValueError(
            f"training.joint_modes={modes}: {', '.join(map(str, unknown))} is unknown; choose among {', '.join(MODES)}"
        )
    total = sum(modes.values())
    if not total:
        raise ValueError(f"training.joint_modes={modes}: at least one of the modes needs a weight above 0")
    return {name: modes[name] / total for name in MODES if modes.get(name)}


def _any(rows: Mapping[str, Tensor], modality: str, state: str) -> Tensor:
    """Return True for rows whose text (or latent) has the role `state`, (B,)."""
    none_B = torch.zeros_like(next(iter(rows.values())))
    chosen = [here_B for name, here_B in rows.items() if getattr(MODES[name], modality) == state]
    return torch.stack([none_B, *chosen]).any(0)


@torch.no_grad()
def _means(loss: TokenLoss, text: TokenLoss, latent: LatentLoss, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is logged: weighted terms (which sum to the loss), unweighted ones, and those and shares by mode."""
    text_B, latent_B = (_any(rows, modality, "denoised") for modality in ("text", "latent"))
    nats_B, tokens_B = text.nll_BL.double().sum(-1), loss.mask_BL.sum(-1)
    tokens = loss.mask_BL.sum()
    found = {"text_term": (loss.nll_BL.double().sum(), tokens), "latent_term": (loss.row_B.double().sum(), tokens)}

    def over(name: str, value_B: Tensor, weight_B: Tensor, here_B: Tensor) -> None:
        found[name] = (value_B.where(here_B, 0).sum(), weight_B.where(here_B, 0).sum())

    one_B = torch.ones_like(latent.loss_B)
    over("text_loss", nats_B, tokens_B, text_B)
    for name, value_B in (("loss", latent.loss_B), ("mse", latent.mse_B), ("cos", latent.cosine_B)):
        over(f"latent_{name}", value_B, one_B, latent_B)
    for name, here_B in rows.items():
        if MODES[name].text == "denoised":
            over(f"text_loss_{name}", nats_B, tokens_B, here_B)
        if MODES[name].latent == "denoised":
            over(f"latent_loss_{name}", latent.loss_B, one_B, here_B)
        found[f"share_{name}"] = (here_B.sum(), one_B.sum())
    return {name: torch.stack([value.double() for value in pair]) for name, pair in found.items()}


@dataclass
class _TextNetwork(BackboneView):
    """A backbone of texts and latents as the text's objective sees it; it keeps the outputs for the latents."""

    encodes_positions = True
    outputs: list[Tensor] = field(default_factory=list, init=False)

    def encode(self, tokens_BL: Tensor, sigma_B: Tensor, at: Positions, **cond: Tensor) -> Tensor:
        """Return hidden states at the positions `at`, (N, D)."""
        hidden_ND, output_BKD = self.backbone.encode_both(tokens_BL, sigma_B, at=at, **cond)
        self.outputs.append(output_BKD)
        return hidden_ND


@dataclass(kw_only=True)
class _TrainedTextNetwork(_TextNetwork):
    """A text network that reads conditioning texts clean and dropped texts as masks, with the time of each."""

    process: Absorbing
    clean_B: Tensor
    dropped_B: Tensor
    maskable_BL: Tensor
    sigma_of_masks_B: Tensor

    def encode(self, tokens_BL: Tensor, sigma_B: Tensor, at: Positions, **cond: Tensor) -> Tensor:
        tokens_BL = self.process.mask(tokens_BL, self.dropped_B[:, None] & self.maskable_BL)
        sigma_B = torch.where(self.dropped_B, self.sigma_of_masks_B, sigma_B).masked_fill(self.clean_B, 0.0)
        return super().encode(tokens_BL, sigma_B, at, **cond)
