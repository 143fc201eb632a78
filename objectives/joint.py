"""MM-LDLM: a text, by masked diffusion, and its latent, by Gaussian diffusion, denoised together by one network.

Both have a time of their own, and every row of a batch draws which of the two it learns to predict from which. All the
directions so are rows of one graph: the conditional, the joint and the marginal laws, whose ratio is guidance.
Shape suffixes: B batch, L length, N selected positions, K latent tokens, D numbers of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import Length, NotNegative
from palimpsest.denoisers import JointDenoiser
from palimpsest.gaussian_process import LatentPrediction
from palimpsest.objectives.base import (
    Backbone,
    Batch,
    Containing,
    Model,
    TokenLoss,
    counted_mask,
    fresh_noise,
    scored_mask,
)
from palimpsest.objectives.gaussian import EARLIEST, LATEST, GaussianDiffusion, LatentLoss
from palimpsest.objectives.noising import Noising
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing


@dataclass(frozen=True)
class Direction:
    """What a row is trained on. Text and latent are each `learned` (noised, at a time of their own, and predicted),
    `told` (clean, time 0), or `hidden` (time 1)."""

    text: str
    latent: str


DIRECTIONS = {
    "joint": Direction("learned", "learned"),
    "l2t": Direction("learned", "told"),
    "t2l": Direction("told", "learned"),
    "text": Direction("learned", "hidden"),
    "latent": Direction("hidden", "learned"),
}
SHARES = {"joint": 0.3, "l2t": 0.25, "t2l": 0.25, "text": 0.1, "latent": 0.1}


class JointModel(Model, JointDenoiser):
    """The joint objective bound to a network that reads texts and latents."""

    @property
    def latent_shape(self) -> tuple[int, int]:
        return self.backbone.latent_shape

    def predict_latent(
        self, latent_BKD: Tensor, latent_t_B: Tensor, x_BL: Tensor, t_B: Tensor, **cond: Tensor
    ) -> LatentPrediction:
        return self.objective.predict_latent(self.backbone, latent_BKD, latent_t_B, x_BL, t_B, **cond)

    def denoise_both(
        self, x_BL: Tensor, t_B: Tensor, at_BL: Tensor, latent_BKD: Tensor, latent_t_B: Tensor, **cond: Tensor
    ) -> tuple[Tensor, LatentPrediction]:
        return self.objective.denoise_both(self.backbone, x_BL, t_B, at_BL, latent_BKD, latent_t_B, **cond)


class JointDiffusion(Containing):
    """The joint objective. Over the rows of an optimizer step it sums text_weight times the nats of a row's text (the
    SUBS bound) and latent_weight times the row's latent loss counted as `latent_tokens` tokens, where each is learned,
    and divides by the step's tokens: a mean over tokens, for texts that fill their rows nats per token plus latent loss
    per text (objectives/reduction.py says why there is one denominator).

    Measured (`bound`), it is the text's objective given what the batch says of the latent: the bound of
    -log p(text | latent), or with latent_t = 1 of -log p(text).

    Args:
        process: of the text.
        text: process -> the objective of the text.
        latent: the objective of the latent.
        modes: the weights with which rows draw their direction (DIRECTIONS); None for SHARES.
        text_weight, latent_weight: of the two terms.
        latent_tokens: how many tokens a latent counts as; the length of a row.

    Raises:
        ValueError: weights that are none.
    """

    name = "mmldlm"
    binds_to = JointModel
    reads_latents = True
    loss_weight = "elbo"

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
        self.text = text(process=process)
        self.latent = latent
        self.shares = _shares(modes)
        learned = [DIRECTIONS[name] for name in self.shares]
        text_counts = text_weight and any(one.text == "learned" for one in learned)
        if not text_counts and not (latent_weight and any(one.latent == "learned" for one in learned)):
            raise ValueError(
                f"training.text_weight={text_weight} training.latent_weight={latent_weight} training.joint_modes="
                f"{self.shares}: nothing is trained; give a weight to something that a mode learns"
            )
        self.text_weight = text_weight
        self.latent_weight = latent_weight
        self.latent_tokens = latent_tokens
        self.measures = False

    @property
    def inner(self) -> Subs:
        return self.text

    @property
    def loss_name(self) -> str:
        """The training loss is a sum of two terms and no likelihood."""
        return "nll" if self.measures else "loss"

    def bound(self, noising: Noising | None) -> JointDiffusion:
        """The bound of the text given the latent of the batch; as of `TokenDiffusion`."""
        other = copy.copy(self)
        other.text, other.measures = self.text.bound(noising), True
        return other

    def loss_at(self, backbone: Backbone, batch: Batch, xt_BL: Tensor, t_B: Tensor) -> TokenLoss:
        """The integrand of the text's bound, given the latent of the batch."""
        return self.text.loss_at(backbone, batch, xt_BL, t_B)

    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at_BL: Tensor | None = None, **cond: Tensor
    ) -> Tensor:
        """log p(x_0 | x_t, latent), of `latent=` (B, K, D) with `latent_t=` (B,) among `cond`; without them the
        marginal over latents. (B, L, V), or (N, V) at `at_BL`."""
        return self.text.denoise(backbone, x_BL, t_B, at_BL, **cond)

    def reverse(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at_BL: Tensor, **cond: Tensor
    ) -> Tensor:
        """log p(x_s | x_t, latent); as `denoise`."""
        return self.text.reverse(backbone, x_BL, t_B, s_B, at_BL, **cond)

    def predict_latent(
        self, backbone: Backbone, latent_BKD: Tensor, latent_t_B: Tensor, x_BL: Tensor, t_B: Tensor, **cond: Tensor
    ) -> LatentPrediction:
        """What the network says of the noised latent, in standardised units, given text x_BL at its time t_B: clean at
        0, nothing but masks at 1 (the marginal). Latent times are kept within those of the training."""
        seen_t_B = latent_t_B.double().clamp(EARLIEST, LATEST)
        nowhere_BL = torch.zeros_like(x_BL, dtype=torch.bool)
        told = {**cond, "latent": latent_BKD, "latent_t": seen_t_B, "at_BL": nowhere_BL}
        _, output_BKD = backbone.encode_both(x_BL, self.text.conditioning(t_B.double()), **told)
        return self.latent.read(output_BKD, latent_BKD, seen_t_B)

    def denoise_both(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at_BL: Tensor, latent_BKD: Tensor, latent_t_B: Tensor,
        **cond: Tensor,
    ) -> tuple[Tensor, LatentPrediction]:  # fmt: skip
        """`denoise` at `at_BL` given the noised latent, (N, V), and `predict_latent`, in one pass of the network."""
        seen_t_B = latent_t_B.double().clamp(EARLIEST, LATEST)
        heard = _Heard(backbone)
        log_p_NV = self.text.denoise(heard, x_BL, t_B, at_BL, **cond, latent=latent_BKD, latent_t=seen_t_B)
        return log_p_NV, self.latent.read(heard.output_BKD, latent_BKD, seen_t_B)

    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss:
        """The joint loss of a training batch, or the text's bound where this measures.

        Raises:
            ValueError: the batch has no latents to learn.
        """
        if self.measures:
            return self.text.loss(backbone, batch, generator)
        if "latent" not in batch:
            raise ValueError("algo=mmldlm learns texts with their latents, and these have none; choose latents=")
        noise = generator or fresh_noise(batch["input_ids"])
        own = noise.part(1)  # the row's own numbers are the text's
        rows = self._rows(own.uniform())
        latent, told = self.latent.draw(batch["latent"], own), _any(rows, "latent", "told")
        t_B = torch.where(told, 0.0, torch.where(_any(rows, "latent", "hidden"), 1.0, latent.t_B))
        shown_BKD = torch.where(told[:, None, None], latent.x0_BKD, latent.xt_BKD)
        reads_text_B, scored_BL = _any(rows, "text", "learned"), scored_mask(batch)
        both = _Both(
            backbone, self.process, _any(rows, "text", "told"), _any(rows, "text", "hidden"), scored_BL,
            self.text.conditioning(torch.ones_like(t_B)),
        )  # fmt: skip
        given_BL = ~scored_BL | ~reads_text_B[:, None]
        text = self.text.loss(both, {**batch, "latent": shown_BKD, "latent_t": t_B, "given": given_BL}, noise)
        found = _averaged([self.latent.loss(output_BKD, latent) for output_BKD in both.outputs])
        reads_latent_B = _any(rows, "latent", "learned")
        row_B = self.latent_weight * self.latent_tokens * torch.where(reads_latent_B, found.loss_B, 0.0)
        loss = TokenLoss(self.text_weight * text.nll_BL, counted_mask(batch), text.logs, row_B)
        return replace(loss, means=_means(loss, text, found, rows))

    def _rows(self, u_B: Tensor) -> dict[str, Tensor]:
        """Which rows are trained in which direction, True in exactly one of them for each row."""
        rows, low = {}, 0.0
        for name, share in self.shares.items():
            high = low + share
            # The last one takes what rounding leaves.
            rows[name] = (u_B >= low) & ((u_B < high) | (name == next(reversed(self.shares))))
            low = high
        return rows


def _shares(modes: Mapping[str, float] | None) -> dict[str, float]:
    """Modes that are drawn at all, with their probabilities."""
    if modes is not None and not isinstance(modes, Mapping):
        raise ValueError(f"training.joint_modes={modes} must say how often: training.joint_modes={{l2t: 1, t2l: 1}}")
    modes = dict(SHARES if modes is None else modes)
    if unknown := [name for name in modes if name not in DIRECTIONS]:
        raise ValueError(
            f"training.joint_modes={modes}: {', '.join(map(str, unknown))} is unknown; choose among "
            f"{', '.join(DIRECTIONS)}"
        )
    total = sum(modes.values())
    if not total:
        raise ValueError(f"training.joint_modes={modes}: at least one of the modes needs a weight above 0")
    return {name: modes[name] / total for name in DIRECTIONS if modes.get(name)}


def _any(rows: Mapping[str, Tensor], modality: str, state: str) -> Tensor:
    """True for rows whose text (or latent) is in `state`, (B,)."""
    none_B = torch.zeros_like(next(iter(rows.values())))
    chosen = [here_B for name, here_B in rows.items() if getattr(DIRECTIONS[name], modality) == state]
    return torch.stack([none_B, *chosen]).any(0)


def _averaged(parts: list[LatentLoss]) -> LatentLoss:
    """Over the network passes of a draw."""
    return LatentLoss(*(torch.stack([getattr(part, name) for part in parts]).mean(0)
                        for name in ("loss_B", "mse_B", "cosine_B")))  # fmt: skip


@torch.no_grad()
def _means(loss: TokenLoss, text: TokenLoss, latent: LatentLoss, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is logged: the two weighted terms (their sum is the loss), the unweighted ones (nats per token; per row),
    how near the latents come, and the unweighted terms and the share of the rows by direction."""
    reads_text_B, reads_latent_B = (_any(rows, modality, "learned") for modality in ("text", "latent"))
    tokens, nats_B, tokens_B = loss.mask_BL.sum(), text.nll_BL.double().sum(-1), loss.mask_BL.sum(-1)
    found = {"text_term": (loss.nll_BL.double().sum(), tokens), "latent_term": (loss.row_B.double().sum(), tokens)}

    def over(name: str, value_B: Tensor, weight_B: Tensor, here_B: Tensor) -> None:
        found[name] = (value_B.where(here_B, 0).sum(), weight_B.where(here_B, 0).sum())

    one_B = torch.ones_like(latent.loss_B)
    over("text_loss", nats_B, tokens_B, reads_text_B)
    for name, value_B in (("loss", latent.loss_B), ("mse", latent.mse_B), ("cos", latent.cosine_B)):
        over(f"latent_{name}", value_B, one_B, reads_latent_B)
    for name, here_B in rows.items():
        if DIRECTIONS[name].text == "learned":
            over(f"text_loss_{name}", nats_B, tokens_B, here_B)
        if DIRECTIONS[name].latent == "learned":
            over(f"latent_loss_{name}", latent.loss_B, one_B, here_B)
        found[f"share_{name}"] = (here_B.sum(), one_B.sum())
    return {name: torch.stack([value.double() for value in pair]) for name, pair in found.items()}


@dataclass
class _Both:
    """The backbone as the text's objective sees it in training: it also keeps what the same pass says of the latents,
    and shows the text as it is meant to be where it is not learned, clean or all masked, with the time of that."""

    backbone: Backbone
    process: Absorbing
    told_B: Tensor
    hidden_B: Tensor
    maskable_BL: Tensor
    sigma_of_masks_B: Tensor
    outputs: list[Tensor] = field(default_factory=list)
    encodes_positions: bool = field(default=True, init=False)

    @property
    def head(self) -> nn.Linear:
        return self.backbone.head

    def encode(self, tokens_BL: Tensor, sigma_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor:
        """(N, D), at the positions of `at_BL`."""
        tokens_BL = self.process.mask(tokens_BL, self.hidden_B[:, None] & self.maskable_BL)
        sigma_B = torch.where(self.hidden_B, self.sigma_of_masks_B, sigma_B).masked_fill(self.told_B, 0.0)
        hidden_ND, output_BKD = self.backbone.encode_both(tokens_BL, sigma_B, at_BL=at_BL, **cond)
        self.outputs.append(output_BKD)
        return hidden_ND


@dataclass
class _Heard:
    """The backbone as the text's objective sees it, which keeps what the same pass says of the latents."""

    backbone: Backbone
    output_BKD: Tensor | None = None
    encodes_positions: bool = field(default=True, init=False)

    @property
    def head(self) -> nn.Linear:
        return self.backbone.head

    def encode(self, tokens_BL: Tensor, sigma_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor:
        """(N, D), at the positions of `at_BL`."""
        hidden_ND, self.output_BKD = self.backbone.encode_both(tokens_BL, sigma_B, at_BL=at_BL, **cond)
        return hidden_ND
