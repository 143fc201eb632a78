"""Denoisers: the four interfaces between models and samplers, and denoisers that wrap another one.

The type of a sampler's first argument is the interface that it needs, and `model_class` of an objective is the one that
it offers. The two are compared before data are read.

Shape suffixes: B batch, L length, N selected positions, V vocabulary, C classes, K latent tokens, D numbers of each.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.gaussian_process import LatentPrediction
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.process import Process


class Denoiser(ABC):
    """A network's prediction of the clean text from a noised one.

    Attributes:
        process: how tokens are corrupted.
        schedule: amount of noise at time t.
        vocab_size: number of tokens that a prediction scores, V.
        independent_unmasking: True if the schedule alone decides when a token is unmasked, not the network.
        evaluations: network evaluations of one prediction.
    """

    process: Process
    schedule: NoiseSchedule
    vocab_size: int
    independent_unmasking: bool
    evaluations: int = 1

    @abstractmethod
    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at: Positions | None = None, **cond: Tensor) -> Tensor:
        """Return log p(x_0 | x_t) at the N positions `at`, (N, V), or at all positions, (B, L, V)."""

    def reverse(self, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at: Positions, **cond: Tensor) -> Tensor:
        """Return log p(x_s | x_t) for s < t at the N positions `at`, (N, V)."""
        alpha_t_N, alpha_s_N = (at.of_rows(self.schedule(t).alpha) for t in (t_B, s_B))
        log_p_NV = self.denoise(x_BL, t_B, at, **cond).double()
        return self.process.posterior(at.take(x_BL), log_p_NV, alpha_t_N, alpha_s_N)


class CausalDenoiser(ABC):
    """A model that predicts each token from those before it; it has no time and no schedule.

    Attributes:
        process: says which id marks a token to be generated.
        vocab_size: number of tokens that a prediction scores, V.
    """

    process: Process
    vocab_size: int

    @abstractmethod
    def denoise(self, x_BL: Tensor, t_B: None = None, at: Positions | None = None, **cond: Tensor) -> Tensor:
        """Return log p(x_i | x_<i) at the N positions `at`, (N, V), or at all but the first, (B, L - 1, V)."""

    @abstractmethod
    def new_cache(self, batch_size: int, length: int) -> object:
        """Return an empty cache of keys and values for texts of up to `length` tokens."""

    @abstractmethod
    def next_token(self, new_Bn: Tensor, cache: object, **cond: Tensor) -> Tensor:
        """Append `new_Bn` to the cache and return log p of the next token, (B, V)."""


class BlockDenoiser(Denoiser):
    """A denoiser that generates a text block by block, each conditioned on the clean blocks before it.

    Attributes:
        block_size: tokens of a block.
    """

    block_size: int

    @abstractmethod
    def after(self, earlier: object, window: int | None = None, **cond: Tensor) -> Denoiser:
        """Return the denoiser of the block that follows `earlier`.

        Args:
            earlier: the clean tokens before the block, (B, S), or a cache of them. For segments, a list of the
                (tokens, mask) arguments of `remember_segment`, or a cache.
            window: number of clean tokens that the block attends to; None for all.
        """

    @abstractmethod
    def new_block_cache(self, batch_size: int, length: int, window: int | None = None) -> object:
        """Return an empty cache for clean blocks; `window` is the number of tokens to attend to (None: all)."""

    @abstractmethod
    def remember(self, clean_BL: Tensor, cache: object, **cond: Tensor) -> None:
        """Read clean blocks into the cache."""

    @abstractmethod
    def new_segment_cache(self, batch_size: int) -> object:
        """Return an empty cache for clean segments."""

    @abstractmethod
    def remember_segment(self, clean_BW: Tensor, here_BW: Tensor, cache: object, **cond: Tensor) -> None:
        """Read the next segment into the cache; `here_BW` is True on its tokens and False on padding."""


class JointDenoiser(Denoiser):
    """A denoiser of texts and their latents.

    Attributes:
        latent_shape: (K, D).
    """

    latent_shape: tuple[int, int]

    @abstractmethod
    def predict_latent(
        self, latent_BKD: Tensor, latent_t_B: Tensor, x_BL: Tensor, t_B: Tensor, **cond: Tensor
    ) -> LatentPrediction:
        """Return the prediction of the clean latent."""

    @abstractmethod
    def denoise_both(
        self, x_BL: Tensor, t_B: Tensor, at: Positions, latent_BKD: Tensor, latent_t_B: Tensor, **cond: Tensor
    ) -> tuple[Tensor, LatentPrediction]:
        """Return the results of `denoise` and `predict_latent` from one evaluation of the network."""


# Interface -> (the models that offer it, the samplers that fit them).
_KINDS = {
    CausalDenoiser: ("parameterization=ar", "ar"),
    BlockDenoiser: ("algo=bd3lm", "block"),
    JointDenoiser: ("algo=mmldlm", "ddpm_cache"),
    Denoiser: ("a diffusion model", "ddpm_cache, unmask or first_hitting"),
}


def mismatch(module: str, offered: type, needed: type) -> str:
    """Return the message for a sampler of `module` that needs another kind of model than the type `offered`."""
    mine, fitting = next(found for kind, found in _KINDS.items() if issubclass(offered, kind))
    return (
        f"sampling.predictor: {module.replace('.', '/')}.py writes texts of {_KINDS[needed][0]}, "
        f"and the model is {mine}; use sampling.predictor={fitting}"
    )


class WrappedDenoiser(Denoiser):
    """The base of denoisers that change the predictions of another one, `inner`."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.process = inner.process
        self.schedule = inner.schedule
        self.vocab_size = inner.vocab_size
        self.independent_unmasking = inner.independent_unmasking
        self.evaluations = inner.evaluations


class WithoutTokens(WrappedDenoiser):
    """A denoiser that gives the tokens `ids` no probability, such as EOS inside a text."""

    def __init__(self, inner: Denoiser, ids: tuple[int, ...]) -> None:
        super().__init__(inner)
        self.ids = ids

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at: Positions | None = None, **cond: Tensor) -> Tensor:
        log_p_NV = self.inner.denoise(x_BL, t_B, at, **cond)
        return log_p_NV.index_fill(-1, torch.tensor(self.ids, device=log_p_NV.device), -torch.inf).log_softmax(-1)


class Guided(WrappedDenoiser):
    """The base of guidance: log p_u + weight (log p_c - log p_u), normalised, from two predictions.

    Weight 1 gives the conditional prediction p_c, weight 0 the unconditional one p_u; each then needs one evaluation.
    """

    def __init__(self, inner: Denoiser, weight: float) -> None:
        super().__init__(inner)
        self.weight = weight
        self.evaluations = inner.evaluations * (1 if weight in (0, 1) else 2)

    @abstractmethod
    def conditions(self, x_BL: Tensor, cond: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the arguments of the conditional and of the unconditional prediction."""

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at: Positions | None = None, **cond: Tensor) -> Tensor:
        return self._mixed(self.inner.denoise, x_BL, cond, t_B, at)

    def _mixed(self, predict: Callable[..., Tensor], x_BL: Tensor, cond: dict[str, Tensor], *args: Tensor) -> Tensor:
        """Mix two results of `predict`, in float64; call it once if the weight is 0 or 1."""
        conditional, unconditional = self.conditions(x_BL, cond)
        if self.weight == 1:
            return predict(x_BL, *args, **conditional)
        log_u = predict(x_BL, *args, **unconditional)
        if self.weight == 0:
            return log_u
        log_c, log_u = predict(x_BL, *args, **conditional).double(), log_u.double()
        return (log_u + self.weight * (log_c - log_u)).masked_fill(log_u.isneginf(), -torch.inf).log_softmax(-1)


class LatentGuided(Guided):
    """Guidance towards a latent; the unconditional prediction drops it (time 1)."""

    def conditions(self, x_BL: Tensor, cond: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return cond, {**cond, "latent_t": torch.ones(len(x_BL), dtype=torch.float64, device=x_BL.device)}


class ClassGuided(Guided):
    """Classifier-free guidance towards a class (D-CFG, Schiff et al., arXiv 2412.10193, section 3.3).

    If the schedule alone decides when a token is unmasked, predictions of the clean tokens are mixed, which keeps this
    property. Otherwise the distributions of one reverse step are mixed.
    """

    def __init__(self, inner: Denoiser, class_id: int, weight: float) -> None:
        super().__init__(inner, weight)
        self.class_id = class_id

    def conditions(self, x_BL: Tensor, cond: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {**cond, "class_id": torch.full_like(x_BL[:, 0], self.class_id)}, cond

    def reverse(self, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at: Positions, **cond: Tensor) -> Tensor:
        if self.independent_unmasking:
            return super().reverse(x_BL, t_B, s_B, at, **cond)
        return self._mixed(self.inner.reverse, x_BL, cond, t_B, s_B, at)


class ClassifierGuided(WrappedDenoiser):
    """Classifier-based guidance towards a class, to first order (D-CBG, arXiv 2412.10193, section 3.4).

    It adds `weight` times the change of log p(class | text) due to each token. The classifier is naive Bayes on the
    tokens that are not blank, so it needs no training and fits any network.

    Args:
        log_p_CV: log p(token | class).
        log_prior_C: log p(class).
    """

    def __init__(self, inner: Denoiser, class_id: int, weight: float, log_p_CV: Tensor, log_prior_C: Tensor) -> None:
        super().__init__(inner)
        self.class_id = class_id
        self.weight = weight
        self.log_p_CV = log_p_CV.double()
        self.log_prior_C = log_prior_C.double()

    def denoise(self, x_BL: Tensor, t_B: Tensor | None, at: Positions | None = None, **cond: Tensor) -> Tensor:
        return self._guided(self.inner.denoise(x_BL, t_B, at, **cond), x_BL, at, **cond)

    def reverse(self, x_BL: Tensor, t_B: Tensor, s_B: Tensor, at: Positions, **cond: Tensor) -> Tensor:
        if self.independent_unmasking:
            return super().reverse(x_BL, t_B, s_B, at, **cond)
        return self._guided(self.inner.reverse(x_BL, t_B, s_B, at, **cond), x_BL, at, **cond)

    def _guided(
        self, log_p: Tensor, x_BL: Tensor, at: Positions | None, attention_mask: Tensor | None = None, **_: Tensor
    ) -> Tensor:
        """Add the gradient of log p(class | text) with respect to each token's one-hot vector, and normalise."""
        if self.weight == 0:
            return log_p
        visible_BL = x_BL != self.process.blank_id
        if attention_mask is not None:
            visible_BL &= attention_mask.bool()
        log_p_CBL = self.log_p_CV[:, x_BL.clamp(min=0)] * visible_BL
        p_BC = (log_p_CBL.sum(-1).T + self.log_prior_C).softmax(-1)
        gain_BV = self.log_p_CV[self.class_id] - p_BC @ self.log_p_CV
        gain = gain_BV[:, None].expand(*x_BL.shape, -1) if at is None else at.of_rows(gain_BV)
        return (log_p.double() + self.weight * gain).log_softmax(-1)
