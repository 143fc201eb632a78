"""How the noise of laws without masks is drawn: the mean over draws is the integral, and its error is what it says."""

from __future__ import annotations

import itertools

import pytest
import torch

from palimpsest.common.randomness import KeyedNoise
from palimpsest.corpora.exact_denoiser import ExactLeaveOneOut
from palimpsest.corpora.grammar import FiniteStateGrammar, weighted
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.noise_schedule import Cosine, CosineSquared, LogLinear
from palimpsest.objectives.gidd import GIDD
from palimpsest.objectives.mask_sampling import Bernoulli, MaskSampler, TiltedNoise
from palimpsest.objectives.udlm import UDLM
from palimpsest.process import Hybrid, Uniform

WORDS = "abcdefgh"


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine(eps=0.0), CosineSquared(eps=0.01)])
def test_the_mean_over_draws_is_the_integral(schedule, monkeypatch):
    """Integrate three powers of the noise 1 - alpha. The square of the steepest one has an infinite integral."""
    u_B = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    monkeypatch.setattr(KeyedNoise, "time", lambda _: u_B)
    x_BL = torch.zeros(len(u_B), 1, dtype=torch.long)
    (draw,) = TiltedNoise()(schedule, x_BL, x_BL == 0, Uniform(4), KeyedNoise(0, torch.arange(len(u_B))))
    level, ends = schedule(draw.t_B), schedule(torch.tensor([0.0, 1.0]).double()).move_chance
    for power in (0.0, 1.0, -0.5):
        found = (draw.scale_B * -level.dalpha * level.move_chance**power).mean()
        assert found == pytest.approx(float((ends[1] ** (power + 1) - ends[0] ** (power + 1)) / (power + 1)), rel=1e-4)


@pytest.mark.parametrize("word_share", [None, 0.1, 0.5], ids=["udlm", "gidd, 0.1", "gidd, 0.5"])
def test_the_error_is_that_of_replications_also_for_surprises_in_little_noise(word_share):
    """With exact networks. Even times have an infinite variance: half of what they say lies far below the truth."""
    torch.manual_seed(0)
    texts = list(itertools.product(WORDS, repeat=2))
    p_M = torch.rand(len(texts)).double() ** 4 + 1e-3
    p_M /= p_M.sum()
    grammar = FiniteStateGrammar(weighted(*[(float(p), " ".join(text)) for p, text in zip(p_M, texts, strict=True)]))
    ids = {word: number for number, word in enumerate(WORDS)}
    process = Uniform(8) if word_share is None else Hybrid(8, 9, word_share)
    network = ExactLeaveOneOut([grammar], ids, -5 if word_share is None else 8, process.vocab_size, process)
    model = (UDLM if word_share is None else GIDD)(LogLinear(), process).model(network)
    x_ML = torch.tensor([[ids[word] for word in text] for text in texts])

    def surprise(noising: MaskSampler | None, seed: int) -> tuple[float, float]:
        """The mean distance to the truth over 500 texts, and its error."""
        chosen_B = torch.multinomial(p_M, 500, replacement=True, generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": x_ML[chosen_B], "sample_id": torch.arange(500)}
        with torch.no_grad():
            found_B = Nelbo(noising)(model, batch, seed, 8).nll_BK.mean(1) + p_M[chosen_B].log()
        return float(found_B.mean()), float(found_B.std() / len(found_B) ** 0.5)

    mean_R, error_R = torch.tensor([surprise(None, seed) for seed in range(24)]).unbind(1)
    assert 0.7 < mean_R.std() / error_R.median() < 1.35
    assert (mean_R / error_R).abs().max() < 3.5 and abs(mean_R.mean()) < 3 * mean_R.std() / 24**0.5
    even_R = torch.tensor([surprise(Bernoulli(), seed)[0] for seed in range(24)])
    assert even_R.std() > 1.3 * mean_R.std()
