"""The interface of training objectives, and what they may ask of a backbone.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, D width, P network passes.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import Natural
from palimpsest.denoisers import Denoiser
from palimpsest.models.backbone import Backbone
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.objectives.mask_sampling import Bernoulli, Draw, ExactCount, MaskSampler
from palimpsest.process import Absorbing, Process

Batch = Mapping[str, Tensor]
MAX_SIGMA = 50.0
# Lowest mask rate at which classes are compared in training. On IMDB a single mask of 87 % tells them apart in 83 % of
# the reviews, one of 12 % in 65 % (docs/log.md).
_CONTRASTED = 0.4


@dataclass(frozen=True)
class TokenLoss:
    """An unreduced loss.

    Attributes:
        nll_BL: estimate, in nats, of each token's part of -log p(x); its sum over L estimates (bounds) -log p(row).
        mask_BL: True where a token is scored and counted; False on padding, prompt tokens and EOS padding.
        logs: further detached tensors to record, (B, P) each.
        row_B: a further term of each row, which adds to the nats of its tokens (objectives/joint.py).
        means: what training logs as train/<name>: a sum and its denominator, detached, float64 (2,) each.
        weight_BL: weight of each token's cross-entropy in `nll_BL`, 0 for unmasked tokens; None for a loss that is no
            such sum.
    """

    nll_BL: Tensor
    mask_BL: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    row_B: Tensor | None = None
    means: dict[str, Tensor] = field(default_factory=dict)
    weight_BL: Tensor | None = None

    def total(self) -> Tensor:
        """Return the sum of all terms over all rows; totals add up over the batches of a step."""
        return self.nll_BL.sum() if self.row_B is None else self.nll_BL.sum() + self.row_B.sum()

    def mean(self) -> Tensor:
        """Return the mean per token of this batch; objectives/reduction.py has that of an optimizer step."""
        return self.total() / self.mask_BL.sum().clamp(min=1)


class Objective(ABC):
    """A training objective: it defines the loss and the meaning of the network's output.

    Attributes:
        name: as typed in parameterization=<name>; the class name in lower case unless the class sets another.
        processes: the forward processes that it can be trained on; `process` is the one in use.
        model_class: the class that `model` returns, which says which denoiser the objective offers (denoisers.py).
        exact: the loss is -log p itself, not a Monte Carlo estimate of a bound.
        causal: it needs a causal backbone, and the model decides where a text ends.
        first_given: the first token of a row is context, which is neither masked nor scored.
        encodes: network evaluations of one draw.
        streams: how often one evaluation reads the text.
        zero_loss_on_clean_text: the integrand of the bound is 0 for a text without a corrupted token.
        independent_unmasking: the schedule alone decides when a token is unmasked, not the network.
        reads_segments: it uses the ends of a text's segments (`segment_ends` of a batch).
        reads_latents: it trains on texts and their latents.
        reads_bigrams: it uses the `bigrams` of a backbone.
        needs_time: the network must be shown the time.
        masks_special: special tokens are corrupted too, unless the data say otherwise.
        limits_rates: training may leave mask rates out (noise=clipped).
        change_of_variables: the network is shown log(1 - alpha) instead of sigma.
        T: number of time steps; 0 for continuous time.
        mask_sampler: how t and masks are drawn; None if nothing is drawn.
        sampling_eps: the range of mask rates in training, if it changes during the training.
        search: how that range is chosen.
        loss_name: name of the mean loss in logs.
    """

    name: str
    processes: tuple[type[Process], ...] = (Absorbing,)
    model_class: "type[BoundModel]"
    process: Process
    exact = causal = first_given = independent_unmasking = reads_segments = reads_latents = reads_bigrams = False
    needs_time = limits_rates = change_of_variables = False
    zero_loss_on_clean_text = masks_special = True
    encodes = streams = 1
    T = 0
    mask_sampler: MaskSampler | None = None
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
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at: Positions | None = None, **cond: Tensor
    ) -> Tensor:
        """Return log p(x_0 | x_t): (B, L, V), or (N, V) for the N positions `at` in row-major order."""

    @abstractmethod
    def bound(self, mask_sampler: MaskSampler | None) -> Self:
        """Return the objective whose loss is the unweighted bound, for evaluation.

        Args:
            mask_sampler: how t and masks are drawn; None for the choice with the least variance.
        """

    def contrasted(self) -> Self:
        """Return the objective by whose loss classes are compared in training: the bound. Objectives that draw exact
        numbers of masks draw at least 40 % of the tokens, where classes differ most."""
        return self.bound(None)

    def check_network(self, network: type[Backbone]) -> None:  # noqa: B027 - most take any
        """Raise ValueError if a network of this class cannot be trained on the objective."""

    def model(self, backbone: Backbone) -> "BoundModel":
        """Bind the objective to a network, for samplers and estimators."""
        return self.model_class(self, backbone)


class BoundModel:
    """An objective bound to a network."""

    def __init__(self, objective: Objective, backbone: Backbone) -> None:
        self.objective = objective
        self.backbone = backbone
        self.process = objective.process

    @property
    def vocab_size(self) -> int:
        return self.backbone.head.out_features

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at: Positions | None = None, **cond: Tensor) -> Tensor:
        return self.objective.denoise(self.backbone, x_BL, t_B, at, **cond)


class Model(BoundModel, Denoiser):
    """A diffusion objective bound to a network."""

    @property
    def schedule(self) -> NoiseSchedule:
        return self.objective.schedule

    @property
    def independent_unmasking(self) -> bool:
        return self.objective.independent_unmasking

    def reverse(self, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at: Positions, **cond: Tensor) -> Tensor:
        return self.objective.reverse(self.backbone, x_BL, t_B, s_B, at, **cond)


class TokenDiffusion(Objective):
    """The base of diffusion objectives: it draws t and masks, and averages the draws.

    Args:
        schedule: amount of noise at time t.
        process: how tokens are corrupted.
        noising: how t and masks are drawn in training.
        T: 0 for continuous time, otherwise the number of steps of the discrete-time loss.
    """

    model_class = Model
    loss_weight = "elbo"

    def __init__(
        self,
        schedule: NoiseSchedule,
        process: Process,
        noising: MaskSampler | None = None,
        T: Natural = 0,  # noqa: N803
    ) -> None:
        self.schedule = schedule
        self.process = process
        self.T = T
        self.trained_schedule = schedule.unclipped
        low, high = self.trained_schedule(torch.tensor([0.0, 1.0], dtype=torch.float64)).sigma.tolist()
        self._shown_sigma = low, min(high, MAX_SIGMA)
        self.mask_sampler = Bernoulli(T=T) if noising is None else noising
        self._check_clipping(schedule, noising, T)
        if self.mask_sampler.discrete and not T:
            raise ValueError(f"T={noising.T} means nothing to parameterization={self.name}; leave it out")
        if self.mask_sampler.changes_variables and not self.change_of_variables:
            raise ValueError(
                f"training.change_of_variables=true means nothing to parameterization={self.name}; leave it out"
            )
        self._check_mask_sampler()

    @property
    def loss_name(self) -> str:
        """Name of the mean loss: nats per token of the bound, or per masked token, or neither."""
        if self.loss_weight != "elbo":
            return "cross_entropy"
        return "loss" if self.mask_sampler.prefers_rates else "nll"

    @property
    def best_mask_sampler(self) -> MaskSampler:
        """The mask sampler with the least variance at equal cost that fits (benchmarks/estimators.py)."""
        return Bernoulli(T=self.T) if self.T else ExactCount()

    def bound(self, mask_sampler: MaskSampler | None) -> Self:
        """Return the same objective for evaluation: the bound itself, over all mask rates of the schedule. Raises
        ValueError if the mask sampler leaves mask rates out.

        Args:
            mask_sampler: how t and masks are drawn; None for `best_mask_sampler`.
        """
        other = copy.copy(self)
        other.mask_sampler = mask_sampler or self.best_mask_sampler
        other.loss_weight = "elbo"
        other.schedule = self.schedule.full_range
        other._check_mask_sampler()
        if not other.mask_sampler.covers_all_rates:
            raise ValueError(
                f"eval.estimator with masks by {other.mask_sampler.label} leaves mask rates out, so it would measure a "
                "part of the bound only; set estimator.noising.sampling_eps=0, or use eval.estimator=auto"
            )
        return other

    def contrasted(self) -> Self:
        other = self.bound(None)
        if isinstance(other.mask_sampler, ExactCount):
            other.mask_sampler = ExactCount(lowest_rate=_CONTRASTED)
        return other

    def _check_clipping(self, schedule: NoiseSchedule, noising: MaskSampler | None, T: int) -> None:  # noqa: N803
        """Refuse a schedule that leaves mask rates out if that would have no effect."""
        drawn = noising is None or isinstance(noising, Bernoulli)
        if schedule is not schedule.unclipped and not (self.limits_rates and drawn and not T):
            raise ValueError(
                "noise=clipped limits the mask rates of parameterization=subs training.masking=bernoulli T=0; with "
                f"parameterization={self.name}, T={T} and these masks it would do nothing"
            )

    def _check_mask_sampler(self) -> None:
        label = self.mask_sampler.label
        if self.loss_weight == "uniform" and self.mask_sampler.corrects_density:
            raise ValueError(
                "training.time_density=bell_corrected keeps the bound, and training.loss_weight=uniform gives it up; "
                "use training.time_density=bell, or training.loss_weight=elbo"
            )
        if self.mask_sampler.always_masks and not self.zero_loss_on_clean_text:
            raise ValueError(
                f"masks by {label} do not fit {type(self).__name__}, whose bound counts texts without a corrupted "
                "token too: use training.masking=bernoulli, and eval.estimator=auto, stratified or uniform"
            )
        if self.mask_sampler.discrete != (self.T > 0):
            raise ValueError(
                f"T={self.T} and masks by {label} contradict each other: T > 0 needs times of its grid "
                "(training.masking=bernoulli, eval.estimator=stratified or auto), T = 0 has none"
            )
        if self.loss_weight == "elbo" and not self.mask_sampler.estimates_bound:
            raise ValueError(
                f"training.loss_weight=elbo with training.masking=rates ({label}): the bound is an integral over all "
                "mask rates, which these draws do not cover; set training.masking_rates=continuous "
                "training.masking_rate_min=0 training.masking_rate_max=1, another training.masking, or "
                "training.loss_weight=uniform"
            )

    def loss(self, backbone: Backbone, batch: Batch, generator: KeyedNoise | None = None) -> TokenLoss:
        """Return one Monte Carlo estimate of the bound: the mean over the passes of the mask sampler."""
        x0_BL, scored_BL = batch["input_ids"], scored_mask(batch)
        noise = generator or fresh_noise(x0_BL)
        draws = self.mask_sampler(self.schedule, x0_BL, scored_BL, self.process, noise)
        inputs = [self.network_input(backbone, batch, draw, noise) for draw in draws]
        passes = zip(inputs, draws, strict=True)
        parts = [self.loss_at(network, batch, replace(draw, xt_BL=xt_BL)) for (network, xt_BL), draw in passes]
        logs = {name: torch.stack([part.logs[name] for part in parts], dim=1) for name in parts[0].logs}
        if self.loss_weight == "uniform":  # every masked token counts once, whatever its t
            masked_BL = torch.stack([part.mask_BL for part in parts]).any(0)
            return TokenLoss(sum(part.nll_BL for part in parts), masked_BL, logs)
        weighted = [self._scaled(part, draw, batch) for part, draw in zip(parts, draws, strict=True)]
        logs["nats"] = torch.stack([nll_BL.detach().double().sum(-1) for nll_BL in weighted], dim=1)
        if parts[0].weight_BL is not None:
            sums = [part.weight_BL.double().sum(-1) * draw.scale_B for part, draw in zip(parts, draws, strict=True)]
            logs["weight"] = torch.stack(sums, dim=1)
        return TokenLoss(sum(weighted) / len(weighted), parts[0].mask_BL, logs)

    def _scaled(self, part: TokenLoss, draw: Draw, batch: Batch) -> Tensor:
        """Return the nats of each token, multiplied by the row's scale.

        In a comparison of classes the batch has `class_bias`, the bias of each token in its row's class, and perhaps
        `pair_bias`, that of a token and the one before it. They are parts of log-probabilities that do not depend on
        the masks, so each is counted once instead of when its token is masked (a pair: one of its tokens, with the
        other one visible). Over all mask rates that changes no mean over the draws, and without it most of the noise of
        a comparison is which tokens are masked. Draws of high rates only, as in training, see fewer visible
        neighbours; there it gives every pair its whole weight.
        """
        scale_B1 = draw.scale_B.float()[:, None]
        nll_BL = part.nll_BL * scale_B1
        if "class_bias" not in batch or part.weight_BL is None:
            return nll_BL
        weight_BL, scored_BL = part.weight_BL * scale_B1, scored_mask(batch)
        nll_BL = nll_BL + (weight_BL - scored_BL.float()) * batch["class_bias"]
        if "pair_bias" in batch and not self.T:  # of two tokens that are unmasked in one of T steps, neither is visible
            visible_BL = ~self.process.is_corrupted(draw.xt_BL)
            counted_BL = weight_BL * _before(visible_BL) + _before(weight_BL) * visible_BL
            nll_BL = nll_BL + (counted_BL - (scored_BL | _before(scored_BL)).float()) * batch["pair_bias"]
        return nll_BL

    def network_input(self, backbone: Backbone, batch: Batch, draw: Draw, noise: KeyedNoise) -> tuple[Backbone, Tensor]:
        """Return the network that is evaluated and its input x_t; a subclass may change both."""
        return backbone, draw.xt_BL

    @abstractmethod
    def loss_at(self, backbone: Backbone, batch: Batch, draw: Draw) -> TokenLoss:
        """Return the integrand of the bound at the draw's x_t and t; its logs are (B,).

        The caller multiplies each row by `draw.scale_B`, which the `weight_N` of a projection therefore contains.
        """

    def reverse(
        self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at: Positions, **cond: Tensor
    ) -> Tensor:
        """Return log p(x_s | x_t) at the N positions `at`, (N, V), by the process's posterior."""
        alpha_t_N, alpha_s_N = (at.of_rows(self.schedule(t).alpha) for t in (t_B, s_B))
        log_p_NV = self.denoise(backbone, x_BL, t_B, at, **cond)
        return self.process.posterior(at.take(x_BL), log_p_NV, alpha_t_N, alpha_s_N)

    def encode_at(self, backbone: Backbone, x_BL: Tensor, t_B: Tensor, at: Positions | None, **cond: Tensor) -> Tensor:
        """Return the hidden states at the N positions `at` in row-major order (None: all B * L), (N, D)."""
        sigma_B = self.conditioning(t_B)
        if at is None:
            return backbone.encode(x_BL, sigma_B, **cond).flatten(0, 1)
        if backbone.encodes_positions:
            return backbone.encode(x_BL, sigma_B, at=at, **cond)
        return at.take(backbone.encode(x_BL, sigma_B, **cond))

    def conditioning(self, t_B: Tensor) -> Tensor:
        """Return the total noise that a network is shown, float32 (B,), within the range of the training schedule."""
        return self.schedule(t_B).sigma.clamp(*self._shown_sigma).float()


def _before(x_BL: Tensor) -> Tensor:
    """Return what stands one position earlier; zero at the first one."""
    return torch.cat([torch.zeros_like(x_BL[:, :1]), x_BL[:, :-1]], dim=1)


_CONTEXT = ("attention_mask", "class_id", "document", "latent", "latent_t")


def context(batch: Batch) -> dict[str, Tensor]:
    """Return the conditioning of a batch: what a backbone reads besides tokens and noise level."""
    return {name: batch[name] for name in _CONTEXT if name in batch}


def drop_latent(batch: Batch) -> Batch:
    """Return `batch` with its latents, if any, at time 1 (pure noise), which measures p(text)."""
    if "latent" not in batch:
        return batch
    latent = batch["latent"]
    return {**batch, "latent_t": torch.ones(len(latent), dtype=torch.float64, device=latent.device)}


def scored_mask(batch: Batch) -> Tensor:
    """Return True where a token is masked and scored, (B, L): also on EOS padding, not on padding and prompt tokens."""
    mask_BL = batch.get("attention_mask")
    scored_BL = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask_BL is None else mask_BL.bool()
    return scored_BL & ~batch["observed"] if "observed" in batch else scored_BL


def counted_mask(batch: Batch) -> Tensor:
    """Return True where a scored token counts as a token of its text, (B, L): not on EOS padding."""
    return scored_mask(batch) & ~batch["eos_padding"] if "eos_padding" in batch else scored_mask(batch)


def fresh_noise(x_BL: Tensor) -> KeyedNoise:
    """Return noise seeded from torch's global generator, with times spread evenly over the batch."""
    rows_B = torch.arange(len(x_BL), device=x_BL.device)
    seed = int(torch.randint(2**62, ()))
    jitter_B = KeyedNoise(seed, rows_B, draw=-1).uniform()
    shared_B = KeyedNoise(seed, torch.zeros_like(rows_B), draw=-6).uniform()
    return KeyedNoise(seed, rows_B, time_B=(rows_B + jitter_B) / len(x_BL), shared_B=shared_B)
