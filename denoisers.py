"""Denoisers: what a sampler or an estimator may ask of a model, in four small contracts, and wrappers of a denoiser.

A sampler names the contract that it needs as the type of its first argument; `Objective.denoiser` is the one that an
objective offers. Both are checked before data are read.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, C classes, K latent tokens, D numbers of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from gaussian_process import LatentPrediction
from noise_schedule import NoiseSchedule
from process import Process


class Denoiser(ABC):
    """A network's prediction of the clean text from a noised one.

    Attributes:
        process: how texts are noised.
        schedule: how much noise there is at time t.
        vocab_size: number of tokens that a prediction scores, V.
        independent_unmasking: whether the schedule alone decides when a mask goes, not the network.
        evaluations: network evaluations of one prediction.
    """

    process: Process
    schedule: NoiseSchedule
    vocab_size: int
    independent_unmasking: bool
    evaluations: int = 1

    @abstractmethod
    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at_BL: Tensor | None = None, **cond: Tensor) -> Tensor:
        """Return log p(x_0 | x_t) at the N positions of `at_BL`, (N, V); at all of them without it, (B, L, V)."""

    def reverse(self, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor:
        """Return log p(x_s | x_t) for s < t at the N positions of `at_BL`, (N, V)."""
        alpha_t_N, alpha_s_N = (self.schedule(t).alpha[:, None].expand(at_BL.shape)[at_BL] for t in (t_B, s_B))
        log_p_NV = self.denoise(x_BL, t_B, at_BL, **cond).double()
        return self.process.posterior(x_BL[at_BL], log_p_NV, alpha_t_N, alpha_s_N)


class CausalDenoiser(ABC):
    """A model that predicts each token from those before it. There is no noise, so it has no time and no schedule.

    Attributes:
        process: what marks a token that is to be written.
        vocab_size: number of tokens that a prediction scores, V.
    """

    process: Process
    vocab_size: int

    @abstractmethod
    def denoise(self, x_BL: Tensor, t_B: None = None, at_BL: Tensor | None = None, **cond: Tensor) -> Tensor:
        """Return log p(x_i | x_<i) at the N positions of `at_BL`, (N, V), or behind the first, (B, L - 1, V)."""

    @abstractmethod
    def new_cache(self, batch_size: int, length: int) -> object:
        """Return an empty cache of keys and values for texts of up to `length` tokens."""

    @abstractmethod
    def next_token(self, new_Bn: Tensor, cache: object, **cond: Tensor) -> Tensor:
        """Read `new_Bn` behind what the cache has read, and return log p of the token after them, (B, V)."""


class BlockDenoiser(Denoiser):
    """A denoiser that writes block after block, each behind the clean ones before it. block_size: tokens of a block."""

    block_size: int

    @abstractmethod
    def after(self, earlier: object, window: int | None = None, **told: Tensor) -> Denoiser:
        """Return the denoiser of one block behind `earlier`.

        earlier: clean tokens (B, S) of which the last `window` are seen, or a cache that has read them; of segments a
        list of what `remember_segment` takes, or a cache.
        """

    @abstractmethod
    def new_block_cache(self, batch_size: int, length: int, window: int | None = None) -> object:
        """Return an empty cache for clean blocks of which the last `window` tokens are seen (None: all)."""

    @abstractmethod
    def remember(self, clean_BL: Tensor, cache: object, **told: Tensor) -> None:
        """Read clean blocks into the cache."""

    @abstractmethod
    def new_segment_cache(self, batch_size: int) -> object:
        """Return an empty cache for clean segments."""

    @abstractmethod
    def remember_segment(self, clean_BW: Tensor, here_BW: Tensor, cache: object, **told: Tensor) -> None:
        """Read the next segment into the cache; `here_BW` is True on its tokens, the first ones of each row."""


class JointDenoiser(Denoiser):
    """A denoiser of texts and their latents. latent_shape: (K, D)."""

    latent_shape: tuple[int, int]

    @abstractmethod
    def predict_latent(
        self, latent_BKD: Tensor, latent_t_B: Tensor, x_BL: Tensor, t_B: Tensor, **cond: Tensor
    ) -> LatentPrediction:
        """Return the prediction of the clean latent."""

    @abstractmethod
    def denoise_both(
        self, x_BL: Tensor, t_B: Tensor, at_BL: Tensor, latent_BKD: Tensor, latent_t_B: Tensor, **cond: Tensor
    ) -> tuple[Tensor, LatentPrediction]:
        """Return `denoise` and `predict_latent` of one evaluation of the network."""


# Of each kind of denoiser: what offers it, and the samplers that fit.
_KINDS = {
    CausalDenoiser: ("parameterization=ar", "ar"),
    BlockDenoiser: ("algo=bd3lm", "block"),
    JointDenoiser: ("algo=mmldlm", "ddpm_cache"),
    Denoiser: ("a diffusion model", "ddpm_cache, unmask or first_hitting"),
}


def mismatch(module: str, offered: type, needed: type) -> str:
    """Say that the sampler of `module` cannot write with a model of the type `offered`, and which one can."""
    mine, fitting = next(found for kind, found in _KINDS.items() if issubclass(offered, kind))
    return (
        f"sampling.predictor: {module.replace('.', '/')}.py writes texts of {_KINDS[needed][0]}, "
        f"and the model is {mine}; use sampling.predictor={fitting}"
    )


class Wrapped(Denoiser):
    """The base of denoisers that change the predictions of another one."""

    independent_unmasking = True

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.process, self.schedule, self.vocab_size = inner.process, inner.schedule, inner.vocab_size


class Barred(Wrapped):
    """A denoiser that never predicts the tokens `ids`, such as the end of a text in its midst."""

    def __init__(self, inner: Denoiser, ids: tuple[int, ...]) -> None:
        super().__init__(inner)
        self.ids, self.evaluations = ids, inner.evaluations

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at_BL: Tensor | None = None, **cond: Tensor) -> Tensor:
        log_p_NV = self.inner.denoise(x_BL, t_B, at_BL, **cond)
        return log_p_NV.index_fill(-1, torch.tensor(self.ids, device=log_p_NV.device), -torch.inf).log_softmax(-1)


class LatentGuided(Wrapped):
    """Guidance towards a latent: log p_u + weight (log p(x | latent) - log p_u), normalised, where p_u is told nothing
    of the latent (its time is 1). Weight 1 is the model itself, 0 the marginal."""

    def __init__(self, inner: Denoiser, weight: float) -> None:
        super().__init__(inner)
        self.weight, self.evaluations = weight, inner.evaluations * (1 if weight in (0, 1) else 2)

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at_BL: Tensor | None = None, **cond: Tensor) -> Tensor:
        hidden = {**cond, "latent_t": torch.ones(len(x_BL), dtype=torch.float64, device=x_BL.device)}
        return guided(
            lambda: self.inner.denoise(x_BL, t_B, at_BL, **cond),
            lambda: self.inner.denoise(x_BL, t_B, at_BL, **hidden),
            self.weight,
        )


class ClassGuided(Wrapped):
    """Classifier-free guidance towards a class (D-CFG, Schiff et al., arXiv 2412.10193, section 3.3): log p(. | class)
    to the power `weight` times log p(.) to the power 1 - weight, normalised. Weight 1 is the conditional distribution,
    0 the unconditional one.

    Where the schedule alone decides when a mask goes the prediction of the clean tokens is mixed, which leaves it so;
    else the distribution of one step back.
    """

    def __init__(self, inner: Denoiser, class_id: int, weight: float) -> None:
        super().__init__(inner)
        self.class_id, self.weight = class_id, weight
        self.independent_unmasking = inner.independent_unmasking
        self.evaluations = inner.evaluations * (1 if weight in (0, 1) else 2)

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at_BL: Tensor | None = None, **cond: Tensor) -> Tensor:
        told = {**cond, "class_id": torch.full_like(x_BL[:, 0], self.class_id)}
        return guided(
            lambda: self.inner.denoise(x_BL, t_B, at_BL, **told),
            lambda: self.inner.denoise(x_BL, t_B, at_BL, **cond),
            self.weight,
        )

    def reverse(self, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor:
        if self.independent_unmasking:
            return super().reverse(x_BL, t_B, s_B, at_BL, **cond)
        told = {**cond, "class_id": torch.full_like(x_BL[:, 0], self.class_id)}
        return guided(
            lambda: self.inner.reverse(x_BL, t_B, s_B, at_BL, **told),
            lambda: self.inner.reverse(x_BL, t_B, s_B, at_BL, **cond),
            self.weight,
        )


class ClassifierGuided(Wrapped):
    """Classifier-based guidance towards a class, to first order (D-CBG, arXiv 2412.10193, section 3.4): log p(.) plus
    `weight` times the change of log p(class | text) that a token makes, normalised.

    The classifier is naive Bayes on the tokens that are not blank, so it needs no training of its own and fits any
    network. Its log-odds are linear in the tokens; of their logarithm's normaliser the first order is taken.

    Args:
        log_p_CV: log p(token | class). log_prior_C: log p(class).
    """

    def __init__(
        self, inner: Denoiser, class_id: int, weight: float, log_p_CV: Tensor, log_prior_C: Tensor
    ) -> None:  # fmt: skip
        super().__init__(inner)
        self.class_id, self.weight, self.evaluations = class_id, weight, inner.evaluations
        self.independent_unmasking = inner.independent_unmasking
        self.log_p_CV, self.log_prior_C = log_p_CV.double(), log_prior_C.double()

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at_BL: Tensor | None = None, **cond: Tensor) -> Tensor:
        return self._tilted(self.inner.denoise(x_BL, t_B, at_BL, **cond), x_BL, at_BL)

    def reverse(self, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at_BL: Tensor, **cond: Tensor) -> Tensor:
        if self.independent_unmasking:
            return super().reverse(x_BL, t_B, s_B, at_BL, **cond)
        return self._tilted(self.inner.reverse(x_BL, t_B, s_B, at_BL, **cond), x_BL, at_BL)

    def _tilted(self, log_p: Tensor, x_BL: Tensor, at_BL: Tensor | None) -> Tensor:
        if self.weight == 0:
            return log_p
        seen_BL = x_BL != self.process.blank_id
        said_CBL = self.log_p_CV[:, x_BL.clamp(min=0)] * seen_BL
        p_BC = (said_CBL.sum(-1).T + self.log_prior_C).softmax(-1)
        gain_BV = self.log_p_CV[self.class_id] - p_BC @ self.log_p_CV
        gain = gain_BV[:, None].expand(*x_BL.shape, -1) if at_BL is None else gain_BV[at_BL.nonzero()[:, 0]]
        return (log_p.double() + self.weight * gain).log_softmax(-1)


def guided(told: Callable[[], Tensor], untold: Callable[[], Tensor], weight: float) -> Tensor:
    """Return log p_u + weight (log p_c - log p_u), normalised; (..., V), float64 where two predictions are mixed.

    told, untold: compute log p_c and log p_u; one that the weight leaves out is not called.
    """
    if weight == 1:
        return told()
    if weight == 0:
        return untold()
    log_c, log_u = told().double(), untold().double()
    return (log_u + weight * (log_c - log_u)).masked_fill(log_u.isneginf(), -torch.inf).log_softmax(-1)
