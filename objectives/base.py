"""The narrow waist: what every training law offers, and what it may ask of a backbone.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, D width, P network passes.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import Natural
from palimpsest.denoisers import Denoiser
from palimpsest.models.backbone import Backbone
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.objectives.noising import Bernoulli, ExactCount, Noised, Noising
from palimpsest.process import Absorbing, Process

Batch = Mapping[str, Tensor]
MAX_SIGMA = 50.0


@dataclass(frozen=True)
class TokenLoss:
    """An unreduced loss.

    nll_BL: estimate, in nats, of each token's part of -log p(x); its sum over L estimates (bounds) -log p(row).
    mask_BL: True where a token is scored and counted, False on padding, given tokens and fill: the denominator.
    logs: further tensors worth recording, detached, (B, P) each.
    row_B: a further term of each row, which adds to the nats of its tokens (objectives/joint.py); None for none.
    means: what a training logs as train/<name>, detached: a sum and what it is to be divided by, float64 (2,) each.
    """

    nll_BL: Tensor
    mask_BL: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    row_B: Tensor | None = None
    means: dict[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        """Everything there is, over all rows. It has one denominator, so that it adds up over the batches of a step."""
        return self.nll_BL.sum() if self.row_B is None else self.nll_BL.sum() + self.row_B.sum()

    def mean(self) -> Tensor:
        """Per token over the batch; that of an optimizer step, over all its batches, is in objectives/reduction.py."""
        return self.total() / self.mask_BL.sum().clamp(min=1)


class Objective(ABC):
    """A training objective: it defines the loss and what the network's output means.

    Attributes:
        name: as it is typed: parameterization=<name>; the class's own name in lower case, unless it has another.
        processes: the forward processes that it can be trained on; `process` is the one in use.
        binds_to: the class that `model` returns, which says which denoiser the objective offers (denoisers.py).
        exact: the loss is -log p itself, not a Monte Carlo draw of a bound.
        causal: it needs a causal backbone, and the model decides where a text ends.
        first_given: the first token of a row is context, which is neither masked nor scored.
        encodes: network evaluations of one draw.
        streams: how often one evaluation reads the text.
        clean_text_costs_nothing: the integrand of the bound is 0 for a text without a corrupted token.
        independent_unmasking: the schedule alone decides when a token is unmasked, not the network.
        reads_segments: it uses the ends of a text's segments (`segment_ends` of a batch).
        reads_latents: it is of texts and their latents.
        needs_time: the network must be shown the time.
        masks_special: special tokens are corrupted too, unless the data say otherwise.
        limits_rates: training may leave mask rates out (noise=clipped).
        change_of_variables: the network is shown log(1 - alpha) instead of sigma.
        T: number of time steps; 0 for continuous time.
        noising: how t and masks are drawn; None if nothing is drawn.
        sampling_eps: the range of mask rates in training, if it changes during the training.
        search: how that range is chosen.
        loss_name: name of the mean loss in logs.
    """

    name: str
    processes: tuple[type[Process], ...] = (Absorbing,)
    binds_to: type[BoundTo]
    process: Process
    exact = causal = first_given = independent_unmasking = reads_segments = reads_latents = False
    needs_time = limits_rates = change_of_variables = False
    clean_text_costs_nothing = masks_special = True
    encodes = streams = 1
    T = 0
    noising: Noising | None = None
    sampling_eps: tuple[float, float] | None = None
    search: object | None = None
    loss_name = "nll"

    def __init_subclass__(cls) -> None:
        cls.name = vars(cls).get("name", cls.__name__.lower())

    @abstractmethod
    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss:
        """Return the loss of every token; `generator` is the only randomness."""

    @abstractmethod
    def denoise(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at_BL: Tensor | None = None, **cond: Tensor
    ) -> Tensor:
        """Return log p(x_0 | x_t): (B, L, V), or (N, V) for the N positions of `at_BL` in row-major order."""

    @abstractmethod
    def bound(self, noising: Noising | None) -> Objective:
        """Return the objective whose loss is the unweighted bound, for evaluation.

        noising: how t and masks are drawn; None for the choice with the least variance.
        """

    def check_network(self, network: type[Backbone]) -> None:  # noqa: B027 - most take any
        """Raise ValueError if a network of this class cannot be trained on the objective."""

    def model(self, backbone: Backbone) -> BoundTo:
        """Bind the objective to a network, for samplers and estimators."""
        return self.binds_to(self, backbone)


class BoundTo:
    """An objective bound to a network."""

    def __init__(self, objective: Objective, backbone: Backbone) -> None:
        self.objective = objective
        self.backbone = backbone

    @property
    def process(self) -> Process:
        return self.objective.process

    @property
    def vocab_size(self) -> int:
        return self.backbone.head.out_features

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at_BL: Tensor | None = None, **cond: Tensor) -> Tensor:
        return self.objective.denoise(self.backbone, x_BL, t_B, at_BL, **cond)


class Model(BoundTo, Denoiser):
    """A diffusion objective bound to a network."""

    @property
    def schedule(self) -> NoiseSchedule:
        return self.objective.schedule

    @property
    def independent_unmasking(self) -> bool:
        return self.objective.independent_unmasking

    def reverse(self, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor:
        return self.objective.reverse(self.backbone, x_BL, t_B, s_B, at_BL, **cond)


class TokenDiffusion(Objective):
    """What objectives of the masking process share: where they look, and how the looks are averaged.

    Args:
        schedule: of the masking process.
        process: what becomes of a token, and which one is the mask.
        noising: how t and masks are drawn in training.
        T: 0 for continuous time, else the number of steps of the discrete-time loss.
    """

    binds_to = Model
    loss_weight = "elbo"

    def __init__(
        self,
        schedule: NoiseSchedule,
        process: Process,
        noising: Noising | None = None,
        T: Natural = 0,  # noqa: N803
    ) -> None:
        self.schedule = schedule
        self.process = process
        self.T = T
        self.trained_schedule = schedule.whole
        self.noising = Bernoulli(T=T) if noising is None else noising
        self._refuse_limits(schedule, noising, T)
        self._check_training()
        self._check_noising()

    @property
    def loss_name(self) -> str:
        """What the mean of the loss is: nats per token of the bound, or per masked token."""
        return "nll" if self.loss_weight == "elbo" else "cross_entropy"

    @property
    def sharpest(self) -> Noising:
        """The noising with the least variance at equal cost that this objective allows (benchmarks/estimators.py)."""
        return Bernoulli(T=self.T) if self.T else ExactCount()

    def bound(self, noising: Noising | None) -> Self:
        """The same objective for measuring: the bound itself, whatever training weighs, under `noising` (None: the
        sharpest) and over all mask rates, whatever the schedule of the training leaves out.

        Raises:
            ValueError: the noising leaves mask rates out.
        """
        other = copy.copy(self)
        other.noising, other.loss_weight = noising or self.sharpest, "elbo"
        other.schedule = self.schedule.complete
        other._check_noising()
        if not other.noising.all_rates:
            raise ValueError(
                f"eval.estimator with masks by {other.noising.label} leaves mask rates out, so it would measure a part "
                "of the bound only; set estimator.noising.sampling_eps=0, or use eval.estimator=auto"
            )
        return other

    def _check_training(self) -> None:
        """Refuse what the noising of a training says and this objective makes nothing of."""
        noising = self.noising
        if noising.discrete and not self.T:
            raise ValueError(f"T={noising.T} means nothing to parameterization={self.name}; leave it out")
        if noising.changes_variables and not self.change_of_variables:
            raise ValueError(
                f"training.change_of_variables=true means nothing to parameterization={self.name}; leave it out"
            )

    def _refuse_limits(self, schedule: NoiseSchedule, noising: Noising | None, T: int) -> None:  # noqa: N803
        """Refuse a schedule that leaves mask rates out where that would do nothing."""
        drawn = noising is None or isinstance(noising, Bernoulli)
        if schedule is not schedule.whole and not (self.limits_rates and drawn and not T):
            raise ValueError(
                "noise=clipped limits the mask rates of parameterization=subs training.masking=bernoulli T=0; with "
                f"parameterization={self.name}, T={T} and these masks it would do nothing"
            )

    def _check_noising(self) -> None:
        if self.noising.counts and not self.clean_text_costs_nothing:
            raise ValueError(
                f"masks by {self.noising.label} do not fit {type(self).__name__}, whose bound counts texts without a "
                "corrupted token too: use training.masking=bernoulli, and eval.estimator=auto, stratified or uniform"
            )
        if self.noising.discrete != (self.T > 0):
            raise ValueError(
                f"T={self.T} and masks by {self.noising.label} contradict each other: T > 0 needs times of its grid "
                "(training.masking=bernoulli, eval.estimator=stratified or auto), T = 0 has none"
            )

        if self.loss_weight == "elbo" and not self.noising.of_the_bound:
            raise ValueError(
                f"training.loss_weight=elbo with training.masking=rates ({self.noising.label}): the bound is an "
                "integral over all mask rates, which these draws do not cover; set training.masking_rates=continuous "
                "training.masking_rate_min=0 training.masking_rate_max=1, another training.masking, or "
                "training.loss_weight=uniform"
            )

    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss:
        """One Monte Carlo draw of the bound: the mean over the passes of its noising."""
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        noise = generator or fresh_noise(x0_BL)
        looks = self.noising(self.schedule, x0_BL, scored_BL, self.process, noise)
        inputs = [self.network_input(backbone, batch, look, noise) for look in looks]
        passes = zip(inputs, looks, strict=True)
        parts = [self.loss_at(network, batch, xt_BL, look.t_B) for (network, xt_BL), look in passes]
        logs = {name: torch.stack([part.logs[name] for part in parts], dim=1) for name in parts[0].logs}
        if self.loss_weight == "uniform":  # every masked token counts once, whatever its t
            seen_BL = torch.stack([part.mask_BL for part in parts]).any(0)
            return TokenLoss(sum(part.nll_BL for part in parts), seen_BL, logs)
        weighed = [part.nll_BL * look.scale_B.float()[:, None] for part, look in zip(parts, looks, strict=True)]
        logs["nats"] = torch.stack([nll_BL.detach().double().sum(-1) for nll_BL in weighed], dim=1)
        return TokenLoss(sum(weighed) / len(weighed), parts[0].mask_BL, logs)

    def network_input(
        self, backbone: Backbone, batch: Batch, look: Noised, noise: KeyedNoise
    ) -> tuple[Backbone, Tensor]:
        """Return the network that is evaluated and its input x_t; a subclass may change both."""
        return backbone, look.xt_BL

    @abstractmethod
    def loss_at(self, backbone: Backbone, batch: Batch, xt_BL: Tensor, t_B: Tensor) -> TokenLoss:
        """The bound's integrand for a given x_t and t; logs are (B,)."""

    def reverse(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at_BL: Tensor, **cond: Tensor
    ) -> Tensor:
        """Return log p(x_s | x_t) at the N positions of `at_BL`, (N, V), by the process's posterior."""
        alpha_t_N, alpha_s_N = (per_position(self.schedule(t).alpha, at_BL) for t in (t_B, s_B))
        log_p_NV = self.denoise(backbone, x_BL, t_B, at_BL, **cond)
        return self.process.posterior(x_BL[at_BL], log_p_NV, alpha_t_N, alpha_s_N)

    def conditioning(self, t_B: Tensor) -> Tensor:
        """Return the total noise that a time-conditioned network is shown, float32 (B,): that of the mask rate at t,
        finite and within what the schedule of the training reaches."""
        low, high = self.trained_schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).sigma.tolist()
        return self.schedule(t_B).sigma.clamp(low, min(high, MAX_SIGMA)).float()


class Containing(Objective):
    """An objective that trains another one, `inner`, on blocks of a text or on a text with its latent."""

    @property
    @abstractmethod
    def inner(self) -> TokenDiffusion:
        """The objective of the text or block."""

    @property
    def T(self) -> int:  # noqa: N802
        return self.inner.T

    @property
    def noising(self) -> Noising:
        return self.inner.noising

    @property
    def schedule(self) -> NoiseSchedule:
        return self.inner.schedule

    @property
    def independent_unmasking(self) -> bool:
        return self.inner.independent_unmasking


def encode_at(backbone: Backbone, x_BL: Tensor, sigma_B: Tensor, at_BL: Tensor | None, **cond: Tensor) -> Tensor:
    """Hidden states of the N positions of `at_BL` in row-major order, of all B * L without it; (N, D)."""
    if at_BL is None:
        return backbone.encode(x_BL, sigma_B, **cond).flatten(0, 1)
    if backbone.encodes_positions:
        return backbone.encode(x_BL, sigma_B, at_BL=at_BL, **cond)
    return backbone.encode(x_BL, sigma_B, **cond)[at_BL]


def context(batch: Batch) -> dict[str, Tensor]:
    """What of a batch a backbone is told beside tokens and noise level."""
    return {name: batch[name] for name in ("attention_mask", "class_id", "latent", "latent_t") if name in batch}


def latent_hidden(batch: Batch) -> Batch:
    """`batch` with nothing known of its latents, where it has some: what measures p(text), whatever is said beside."""
    if "latent" not in batch:
        return batch
    latent = batch["latent"]
    return {**batch, "latent_t": torch.ones(len(latent), dtype=torch.float64, device=latent.device)}


def masked_positions(batch: Batch, xt_BL: Tensor, process: Absorbing) -> Tensor:
    """True where a scored token is masked in x_t, (B, L)."""
    return process.is_corrupted(xt_BL) & scored_mask(batch)


def spread(values_N: Tensor, at_BL: Tensor) -> Tensor:
    """(B, L) with `values_N` at the positions of `at_BL` and 0 elsewhere; differentiable."""
    return torch.zeros(at_BL.shape, dtype=values_N.dtype, device=at_BL.device).masked_scatter(at_BL, values_N)


def per_position(value_B: Tensor, at_BL: Tensor) -> Tensor:
    """The row's value at each of the N positions of `at_BL`, (N,)."""
    return value_B[:, None].expand(at_BL.shape)[at_BL]


def scored_mask(batch: Batch) -> Tensor:
    """True where a token is to be masked and scored (B, L): everywhere but on padding and on given tokens; also on
    fill, by which a model of masks finds where a text ends."""
    mask_BL = batch.get("attention_mask")
    scored_BL = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask_BL is None else mask_BL.bool()
    return scored_BL & ~batch["given"] if "given" in batch else scored_BL


def counted_mask(batch: Batch) -> Tensor:
    """True where a scored token counts as a token of its text (B, L): not on the fill behind the text, whose nats
    belong to the row's likelihood but would make a likelihood per token look as good as the row is long."""
    return scored_mask(batch) & ~batch["fill"] if "fill" in batch else scored_mask(batch)


def fresh_noise(x_BL: Tensor) -> KeyedNoise:
    """Noise for a caller who brought none: seeded from torch's global generator, antithetic over the batch."""
    rows_B = torch.arange(len(x_BL), device=x_BL.device)
    seed = int(torch.randint(2**62, ()))
    jitter_B = KeyedNoise(seed, rows_B, draw=-1).uniform()
    shared_B = KeyedNoise(seed, torch.zeros_like(rows_B), draw=-6).uniform()
    return KeyedNoise(seed, rows_B, time_B=(rows_B + jitter_B) / len(x_BL), shared_B=shared_B)
