"""Iterative unmasking of texts whose distribution is a table, and what every decoder must keep to."""

from __future__ import annotations

import copy
import itertools

import torch

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.denoisers import Denoiser
from palimpsest.noise_schedule import LogLinear
from palimpsest.process import Absorbing
from palimpsest.samplers.base import TokenChoice
from palimpsest.samplers.trace import Trace
from palimpsest.samplers.unmasking import Unmasking, sample

CHOICES = (TokenChoice(), TokenChoice(temperature=0), TokenChoice(temperature=0.7, top_k=2), TokenChoice(nucleus_p=0.8))


class Toy(Denoiser):
    """A law over all texts of `length` tokens as a table, and its exact prediction at every mask."""

    independent_unmasking = True
    schedule = LogLinear()

    def __init__(self, vocab: int, length: int) -> None:
        self.process, self.vocab_size = Absorbing(vocab), vocab + 1
        logits = torch.randn(vocab**length, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        self.p_M = (1.5 * logits).softmax(-1)
        self.texts_ML = torch.tensor(list(itertools.product(range(vocab), repeat=length)))

    @property
    def law(self) -> dict[tuple, float]:
        return dict(zip(map(tuple, self.texts_ML.tolist()), self.p_M.tolist(), strict=True))

    def denoise(self, x_BL: torch.Tensor, t_B: torch.Tensor, at: Positions) -> torch.Tensor:
        states_SL, state_B = x_BL.unique(dim=0, return_inverse=True)
        fits_SML = (self.texts_ML == states_SL[:, None]) | (states_SL[:, None] == self.process.mask_id)
        p_SM = self.p_M * fits_SML.all(-1)
        p_SLV = torch.einsum("sm,mlv->slv", p_SM, torch.eye(self.vocab_size, dtype=torch.float64)[self.texts_ML])
        return at.take((p_SLV / p_SM.sum(-1)[:, None, None])[state_B]).log()


def unmask(model, x, how=Unmasking(), steps=3, first=0, seed=0, **settings) -> Trace:  # noqa: B008 - frozen
    """Sample by iterative unmasking; `first`: the number of the first row."""
    return sample(model, x, KeyedNoise(seed, torch.arange(first, first + len(x))), steps=steps, how=how, **settings)


def blank(rows: int, length: int, mask: int) -> torch.Tensor:
    """Rows of nothing but masks."""
    return torch.full((rows, length), mask)


class Watched(list):
    """A watcher that keeps copies of what it was shown."""

    def __call__(self, frame: Trace) -> None:
        self.append(copy.deepcopy(frame))


def assert_sound(toy: Toy, x: torch.Tensor, out: Trace, frames: Watched, steps: int) -> None:
    """Whatever the decoder: what is given stays, all masks go in time, and what was shown is what happened."""
    observed_BL = x != toy.process.mask_id
    assert torch.equal(out.ids_BL[observed_BL], x[observed_BL]) and not (out.ids_BL == toy.process.mask_id).any()
    assert (out.step_BL[observed_BL] == 0).all() and (out.step_BL[~observed_BL] > 0).all()
    assert out.num_steps <= steps and (out.evaluations_B <= steps).all() and int(out.step_BL.max()) <= out.num_steps
    assert (out.evaluations_B[observed_BL.all(-1)] == 0).all()
    assert [frame.num_steps for frame in frames] == list(range(1, out.num_steps + 1))
    before, since = x, torch.zeros_like(x)
    confidence = observed_BL.float()
    for frame in frames:
        new = (before == toy.process.mask_id) & (frame.ids_BL != toy.process.mask_id)
        p = torch.zeros(*x.shape, toy.vocab_size, dtype=torch.float64)
        masked = before == toy.process.mask_id
        p[masked] = toy.denoise(before, None, Positions(masked)).exp()
        p = p.gather(-1, frame.ids_BL[..., None]).squeeze(-1).float()
        masked = frame.ids_BL == toy.process.mask_id
        since = torch.where(new, frame.num_steps, torch.where(masked, 0, since))
        confidence = torch.where(new, p, torch.where(masked, 0.0, confidence))
        assert torch.allclose(frame.confidence_BL, confidence, atol=1e-6), "the model's own probability"
        before = frame.ids_BL
    if frames:
        assert torch.equal(before, out.ids_BL) and torch.equal(frames[-1].confidence_BL, out.confidence_BL)
    assert torch.equal(since, out.step_BL)
