"""The embedded corpus's exact denoiser, and what follows with it for every likelihood: one text has one probability."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from palimpsest.common.positions import Positions
from palimpsest.corpora.exact_denoiser import ExactDenoiser, ExactLeaveOneOut
from palimpsest.corpora.grammar import FiniteStateGrammar, chain, weighted
from palimpsest.corpora.reviews import tokens
from palimpsest.estimators.any_order import AnyOrder
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.estimators.ordered import Ordered
from palimpsest.noise_schedule import Cosine, LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.d3pm import D3PM
from palimpsest.objectives.gidd import GIDD
from palimpsest.objectives.mask_sampling import Bernoulli, Complementary, ExactCount, TiltedCount
from palimpsest.objectives.sedd import SEDD
from palimpsest.objectives.subs import Subs
from palimpsest.objectives.udlm import UDLM
from palimpsest.process import Absorbing, Hybrid, Uniform
from palimpsest.samplers.ordered import ORDERS
from tests.helpers.exact import MASK, ExactModel, Reviews, for_sedd

DRAWS = 64


@pytest.fixture(scope="module")
def reviews() -> Reviews:
    return Reviews()


@pytest.fixture(scope="module")
def texts(reviews) -> list[str]:
    """One of each class, of 32 and of 40 tokens."""
    return [next(text for text in reviews.grammar.sample(40, label, seed=3) if len(tokens(text)) == length)
            for label, length in ((0, 32), (1, 40))]  # fmt: skip


def test_the_posterior_of_a_small_mixture_is_that_of_its_enumerated_texts():
    """Every pattern of masks of every text, with texts of two lengths and a token that two derivations share."""
    first = FiniteStateGrammar(chain(weighted((1, "a b"), (2, "a"), (1, "c")), weighted((3, "b"), (1, "c a"))))
    second = FiniteStateGrammar(weighted((1, "b a"), (1, "a b"), (2, "c c b")))
    ids, mask, size = {"a": 1, "b": 3, "c": 4}, 2, 6
    denoiser = ExactDenoiser([first, second], ids, mask, size)
    distribution: dict[tuple, float] = {}
    for length in range(1, 5):
        for words in itertools.product("abc", repeat=length):
            p = sum(np.exp(grammar.log_prob([list(words)])[0]) for grammar in (first, second)) / 2
            if p:
                distribution[tuple(ids[word] for word in words)] = p
    for text in list(distribution)[::3]:
        for pattern in itertools.product([False, True], repeat=len(text)):
            seen = [mask if hidden else token for token, hidden in zip(text, pattern, strict=True)]
            x = torch.tensor([[0, *seen, 5]])
            at = torch.tensor([[False, *pattern, False]])
            found = denoiser.denoise(x, None, Positions(at)).exp()
            like = {other: p for other, p in distribution.items() if len(other) == len(text) and all(
                hidden or a == b for a, b, hidden in zip(text, other, pattern, strict=True))}  # fmt: skip
            wanted = torch.zeros(len(text), size, dtype=torch.float64)
            for other, p in like.items():
                wanted[torch.arange(len(text)), list(other)] += p / sum(like.values())
            torch.testing.assert_close(found, wanted[list(pattern)])


def test_impossible_texts_are_predicted_uniformly():
    denoiser = ExactDenoiser([FiniteStateGrammar(weighted((1, "a b"), (1, "b a")))], {"a": 0, "b": 1}, 2, 4)
    x = torch.tensor([[0, 2], [2, 2], [2, 2]])
    x[2, 1] = 3  # a special token: a text of one token, of which there is none
    p = denoiser.denoise(x, None, Positions(x == 2)).exp()
    wanted = torch.tensor([[0, 1.0, 0, 0], *[[0.5, 0.5, 0, 0]] * 3], dtype=torch.float64)
    torch.testing.assert_close(p, wanted)


def test_one_order_any_order_and_duel_all_give_the_probability_of_the_text(reviews, texts):
    model = ExactModel(Subs(LogLinear(), Absorbing(MASK)).bound(None), reviews.denoiser())
    batch, wanted = reviews.batch(texts), torch.from_numpy(reviews.nats(texts))
    for estimator in (AnyOrder(), *(Ordered(order) for order in ORDERS)):
        found = estimator(model, batch, 0, 1).nll_BK[:, 0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


MEASURED = {
    "auto": (lambda: Subs(LogLinear(), Absorbing(MASK)), None),
    "uniform": (lambda: Subs(LogLinear(), Absorbing(MASK)), Bernoulli(antithetic_sampling=False)),
    "stratified": (lambda: Subs(Cosine(), Absorbing(MASK)), Bernoulli()),
    "exact_count": (lambda: Subs(Cosine(), Absorbing(MASK)), ExactCount()),
    "tilted_count": (lambda: Subs(LogLinear(), Absorbing(MASK)), TiltedCount()),
    "complementary": (lambda: Subs(LogLinear(), Absorbing(MASK)), Complementary()),
    "sedd": (lambda: SEDD(LogLinear(), Absorbing(MASK)), None),
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_mean_of_the_bound_of_exact_conditionals_is_the_truth(reviews, texts, name):
    """Every order of exact conditionals has the same product, so the bound is tight for each text. 5 standard errors:
    a false alarm once in 1.7 million seeds."""
    build, noising = MEASURED[name]
    network = for_sedd(reviews.denoiser()) if name == "sedd" else reviews.denoiser()
    value, se = _mean(Model(build(), network), noising, reviews.batch(texts[:1]))
    assert abs(value - reviews.nats(texts[:1])[0]) < 5 * se


@pytest.mark.parametrize(("build", "least_gap"), [
    (lambda: Subs(LogLinear(), Absorbing(MASK), T=4), 3.0), (lambda: Subs(LogLinear(), Absorbing(MASK), T=1000), 0.0),
    (lambda: D3PM(LogLinear(), Absorbing(MASK), T=4, subs_masking=True), 3.0),
], ids=["subs T=4", "subs T=1000", "d3pm T=4"])  # fmt: skip
def test_steps_that_unmask_several_tokens_cost_nats_and_never_gain_any(reviews, texts, build, least_gap):
    value, se = _mean(Model(build(), reviews.denoiser()), None, reviews.batch(texts[:1]))
    assert value > reviews.nats(texts[:1])[0] + least_gap - 5 * se


@pytest.mark.parametrize("kind", ["uniform", "hybrid"])
def test_the_bound_of_the_exact_leave_one_out_posterior_is_the_truth(reviews, texts, kind):
    """For processes whose noise is other tokens, over the embedded corpus."""
    size = reviews.vocab_size
    process = Uniform(size) if kind == "uniform" else Hybrid(MASK, size, 0.2)
    network = ExactLeaveOneOut(reviews.grammar.grammars, reviews.id_of_token, MASK, size, process)
    objective = (UDLM if kind == "uniform" else GIDD)(LogLinear(), process)
    row = reviews.batch(texts[:1])
    inside = ~row["observed"]
    inner = {"input_ids": row["input_ids"][inside][None], "sample_id": torch.arange(1)}  # the text alone: all is noised
    value, se = _mean(objective.model(network), None, inner, draws=128)
    assert abs(value - reviews.nats(texts[:1])[0]) < 5 * se and se < 1.5


def _mean(model: Model, noising: object, batch: dict, draws: int = DRAWS // 4) -> tuple[float, float]:
    """Mean and standard error of the bound of one text, over strata of independent repetitions."""
    rows = {name: value.expand(16, -1) for name, value in batch.items() if name != "sample_id"}
    rows["sample_id"] = torch.arange(16)
    nats_B = Nelbo(noising)(model, rows, 7, draws).nll_BK.mean(1)
    return float(nats_B.mean()), float(nats_B.std() / math.sqrt(len(nats_B)))
