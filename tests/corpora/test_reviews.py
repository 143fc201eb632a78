"""The embedded corpus: exact probabilities, the figures that reports rely on, and English that reads well."""

from __future__ import annotations

import itertools
import math
import re
import time

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from palimpsest.corpora import reviews
from palimpsest.corpora.grammar import FiniteStateGrammar, chain, weighted, words
from palimpsest.corpora.reviews import ReviewGrammar, detokenize, generate_split, tokens

OPPOSITE = {
    one: other
    for pair in (reviews.ADJECTIVES, reviews.VERDICTS, reviews.FEELINGS, reviews.ADVICE, reviews.WORTH)
    for these, those in (pair, pair[::-1])
    for one, other in zip(these.split(), those.split(), strict=True)
}


def polarity_free(text: str) -> list[str]:
    return [min(token, OPPOSITE.get(token, token)) for token in tokens(text)]


@pytest.fixture(scope="module")
def grammar() -> ReviewGrammar:
    return ReviewGrammar()


@pytest.fixture(scope="module")
def test_texts(grammar: ReviewGrammar) -> list[list[str]]:
    return [grammar.sample(3000, label, seed=2) for label in (0, 1)]


def truth(texts_by_class: list[list[str]]) -> np.ndarray:
    return np.repeat([0, 1], [len(texts) for texts in texts_by_class])


MEAN_TOKENS, ENTROPY_PER_TOKEN = 35.2, 1.2015  # tokens; nats, given the length
NAIVE_BAYES, BAYES_OPTIMUM = 0.689, 0.979  # accuracies

# A latent word (x or y) that must come back at the end.
LATENT = weighted(*((1.0, chain(latent, weighted((0.3, "z z"), (0.7, "z")), latent)) for latent in "xy"))
# With an optional word and two derivations of "a b".
TINY = weighted(
    (2.0, chain("a b", weighted((1.0, ""), (1.0, "c")))), (1.0, chain("a", words("b c d b", flatness=0))), (3.0, LATENT)
)


def enumerate_derivations(expression) -> dict[tuple[str, ...], float]:
    """{text: probability} by writing out every derivation: the slow meaning of an expression."""
    if isinstance(expression, str):
        return {tuple(expression.split()): 1.0}
    if hasattr(expression, "options"):
        drawn = [(p * q, text) for p, option in expression.options for text, q in enumerate_derivations(option).items()]
    else:
        distributions = [enumerate_derivations(part).items() for part in expression.parts]
        drawn = [
            (math.prod(q for _, q in parts), sum((text for text, _ in parts), ()))
            for parts in itertools.product(*distributions)
        ]
    distribution: dict[tuple[str, ...], float] = {}
    for p, text in drawn:
        distribution[text] = distribution.get(text, 0.0) + p
    return distribution


def test_forward_algorithm_is_enumeration():
    distribution, tiny = enumerate_derivations(TINY), FiniteStateGrammar(TINY)
    assert len(distribution) == 8
    np.testing.assert_allclose(tiny.log_prob(list(distribution)), np.log(list(distribution.values())), atol=1e-12)


def test_all_strings_of_a_tiny_grammar_sum_to_one():
    tiny = FiniteStateGrammar(TINY)
    strings = [text for n in range(6) for text in itertools.product([*tiny.vocabulary, "?"], repeat=n)]
    assert np.exp(tiny.log_prob(strings)).sum() == pytest.approx(1.0, abs=1e-12)
    assert (tiny.min_tokens, tiny.max_tokens) == (2, 4)


def test_tiny_length_law_and_samples_are_enumeration():
    distribution, tiny = enumerate_derivations(TINY), FiniteStateGrammar(TINY)
    for length in range(-1, 7):
        expected = sum(p for text, p in distribution.items() if len(text) == length)
        assert math.exp(tiny.log_prob_length([length])[0]) == pytest.approx(expected, abs=1e-12)
    draws = [tuple(text) for text in tiny.sample(20_000, np.random.default_rng(0))]
    chi_square = sum((draws.count(text) - 20_000 * p) ** 2 / (20_000 * p) for text, p in distribution.items())
    # 7 degrees of freedom: one false alarm in 10,000 seeds.
    assert set(draws) <= set(distribution) and chi_square < 29.9


def is_ambiguous(grammar: FiniteStateGrammar) -> bool:
    """Return True if a text has two derivations, by following two paths through the automaton at once."""
    arcs, steps = grammar.arcs, [{} for _ in range(grammar.num_states)]
    for source, token, target in np.stack([arcs.source, arcs.token, arcs.target], axis=1).tolist():
        steps[source].setdefault(token, []).append(target)
    seen = {(grammar.start, grammar.start)}
    waiting = list(seen)
    while waiting:
        one, two = waiting.pop()
        pairs = {
            (min(pair), max(pair))
            for token in steps[one].keys() & steps[two].keys()
            for pair in itertools.product(steps[one][token], steps[two][token])
        }
        # Paths in different states are different, so that meeting again makes two derivations.
        if one != two and any(a == b for a, b in pairs):
            return True
        waiting.extend(pairs - seen)
        seen |= pairs
    return False


def test_entropy_of_a_tiny_grammar():
    """Choices and texts have one entropy where each text has one derivation, as in LATENT and not in TINY."""
    for expression, ambiguous in ((LATENT, False), (TINY, True)):
        tiny = FiniteStateGrammar(expression)
        of_texts = -sum(p * math.log(p) for p in enumerate_derivations(expression).values())
        assert is_ambiguous(tiny) == ambiguous
        assert (tiny.derivation_entropy() == pytest.approx(of_texts, abs=1e-12)) != ambiguous


def test_weights_are_checked():
    for bad in ([(-1.0, "a"), (2.0, "b")], [(0.0, "a")], []):
        with pytest.raises(ValueError, match="weights"):
            weighted(*bad)


def test_every_review_has_a_probability(grammar, test_texts):
    for label, other in ((0, 1), (1, 0)):
        for scored_as in (label, other):
            assert np.isfinite(grammar.log_prob(test_texts[label], scored_as)).all()


def test_impossible_texts_have_no_probability(grammar):
    text = grammar.sample(1, 1, seed=0)[0]
    broken = [
        "",
        ".",
        text + " " + text,
        text[:-1],
        text.replace(" ", " 7 ", 1),
        text + " \u2713",
        "Zebra" + text,
        text.lower(),
        " ".join([text] * 40),
    ]
    assert np.isneginf(grammar.log_prob(broken, 1)).all()
    assert np.isnan(grammar.posterior([""])).all()
    assert grammar.log_prob([], 1).shape == (0,) and grammar.posterior([]).shape == (0, 2)
    np.testing.assert_array_equal(grammar.log_prob([" ".join(tokens(text))], 1), grammar.log_prob([text], 1))


def test_a_batch_is_its_texts(grammar, test_texts):
    """Texts of different lengths, good and bad, share the forward pass without touching each other."""
    mixed = [*test_texts[0][:6], "Zebra.", *test_texts[1][:6], "", test_texts[0][0] + " " + test_texts[1][0]]
    alone = np.concatenate([grammar.log_prob([text], 0) for text in mixed])
    np.testing.assert_allclose(grammar.log_prob(mixed, 0), alone, rtol=1e-12)


def test_agreement_at_a_distance(grammar):
    """Verbs agree with their subject, not with the nouns between them."""
    opening = "I saw this quiet film last year. "
    closing = "The songs are truly clever and fresh. It is clearly a film worth seeing."
    for sentence, possible in (
        ("The jokes on screen are truly vivid. ", True),
        ("The jokes on screen is truly vivid. ", False),
        ("The plot at times is truly vivid. ", True),
        ("The plot at times are truly vivid. ", False),
    ):
        assert np.isfinite(grammar.log_prob([opening + sentence + closing], 1))[0] == possible, sentence


def test_classes_are_mirror_images(grammar, test_texts):
    """Opposites map one class onto the other, so lengths carry no evidence."""
    for label in (0, 1):
        swapped = [
            detokenize([OPPOSITE.get(token, token) for token in tokens(text)]) for text in test_texts[label][:500]
        ]
        np.testing.assert_allclose(
            grammar.log_prob(swapped, 1 - label), grammar.log_prob(test_texts[label][:500], label), atol=1e-9
        )
    lengths = np.arange(0, 80)
    np.testing.assert_allclose(
        np.exp(grammar.log_prob_length(lengths, 0)), np.exp(grammar.log_prob_length(lengths, 1)), atol=1e-14
    )


def test_lengths(grammar, test_texts):
    lengths = np.arange(reviews.MIN_TOKENS, reviews.MAX_TOKENS + 1)
    for label in (0, 1):
        p = np.exp(grammar.log_prob_length(lengths, label))
        assert p.sum() == pytest.approx(1.0, abs=1e-12)
        seen = np.array([len(tokens(text)) for text in test_texts[label]])
        assert seen.min() >= reviews.MIN_TOKENS and seen.max() <= reviews.MAX_TOKENS
        frequency = (seen[:, None] == lengths).mean(0)
        # Five standard errors at each of some 40 lengths: a false alarm in about 40,000 seeds.
        assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / len(seen)) + 2e-3).all()


def test_entropy(grammar, test_texts):
    """Exact because no review can be written in two ways; the average surprise of samples agrees."""
    for label in (0, 1):
        assert not is_ambiguous(grammar.grammars[label])
        surprise = -grammar.log_prob(test_texts[label], label)
        error = surprise.std() / math.sqrt(len(surprise))
        assert abs(surprise.mean() - grammar.entropy(label, given_length=False)) < 4 * error
        assert grammar.entropy_per_token(label) == pytest.approx(ENTROPY_PER_TOKEN, abs=5e-4)
        assert grammar.mean_tokens(label) == pytest.approx(MEAN_TOKENS, abs=0.05)


def test_class_is_hidden_from_words_but_not_from_the_grammar(grammar, test_texts):
    train = [grammar.sample(10_000, label, seed=1) for label in (0, 1)]
    counter = CountVectorizer(tokenizer=tokens, token_pattern=None, lowercase=False)
    counts = counter.fit_transform(train[0] + train[1])
    bayes = MultinomialNB().fit(counts, truth(train))
    naive = bayes.score(counter.transform(test_texts[0] + test_texts[1]), truth(test_texts))
    optimal = (grammar.posterior(test_texts[0] + test_texts[1]).argmax(1) == truth(test_texts)).mean()
    assert naive == pytest.approx(NAIVE_BAYES, abs=0.025) and naive <= 0.80
    assert optimal == pytest.approx(BAYES_OPTIMUM, abs=0.012) and optimal >= 0.93


def test_posterior_is_calibrated(grammar, test_texts):
    """On average, p(true class | text) is sum_c p(c | text)^2 and the larger posterior is the accuracy."""
    posterior, label = grammar.posterior(test_texts[0] + test_texts[1]), truth(test_texts)
    assert posterior.sum(1) == pytest.approx(1.0)
    of_truth = posterior[np.arange(len(label)), label]
    assert of_truth.mean() == pytest.approx((posterior**2).sum(1).mean(), abs=0.012)
    assert posterior.max(1).mean() == pytest.approx((posterior.argmax(1) == label).mean(), abs=0.01)
    # The prior enters as Bayes' rule says.
    shifted = grammar.posterior(test_texts[0][:50], prior=(0.2, 0.8))
    odds = posterior[:50, 1] / posterior[:50, 0] * 4
    np.testing.assert_allclose(shifted[:, 1] / shifted[:, 0], odds, rtol=1e-9)


def test_vocabulary(grammar, test_texts):
    assert 150 <= len(grammar.vocabulary) <= 300
    assert grammar.grammars[0].vocabulary == grammar.grammars[1].vocabulary
    assert all(re.fullmatch(r"[A-Za-z]+|[.,!?;:]", token) for token in grammar.vocabulary)
    assert sum(token[0].isupper() for token in grammar.vocabulary) <= 15


def test_prose(test_texts):
    for text in test_texts[0] + test_texts[1]:
        assert detokenize(tokens(text)) == text
        assert re.fullmatch(r"(?:[A-Z][A-Za-z]*(?:,? [A-Za-z]+)+\.(?: (?=[A-Z])|$))+", text)
        assert not re.search(r"\b(\w+) \1\b|\ba [aeiou]|\b(?:a|the|its|this) (?:a|the|its|this)\b", text)


def test_draws_depend_on_their_arguments_only(grammar):
    few, many = grammar.sample(20, 1, seed=5), ReviewGrammar().sample(40, 1, seed=5)
    assert few == many[:20]
    assert few != grammar.sample(20, 1, seed=6) and few != grammar.sample(20, 0, seed=5)
    with pytest.raises(ValueError, match="label=2"):
        grammar.sample(1, 2, seed=0)


def test_splits():
    splits = {split: generate_split(split, 300, seed=0) for split in reviews.SPLITS}
    for split, rows in splits.items():
        assert rows == generate_split(split, 300, seed=0) != generate_split(split, 300, seed=1)
        assert len(rows["text"]) == 600 and sum(rows["label"]) == 300
        assert 100 < sum(rows["label"][:300]) < 200
    texts = [text for rows in splits.values() for text in rows["text"]]
    assert len(set(texts)) == len(texts) == 1800
    # Streams differ in more than the class: no text is another's mirror image, or one that `sample` draws.
    plans = {tuple(polarity_free(text)) for text in texts}
    drawn = ReviewGrammar()
    plans |= {tuple(polarity_free(text)) for label in (0, 1) for text in drawn.sample(300, label, seed=0)}
    assert len(plans) == 2400
    with pytest.raises(ValueError, match="train, validation, test"):
        generate_split("dev", 1, seed=0)


def test_speed(grammar):
    start = time.perf_counter()
    texts = grammar.sample(20_000, 0, seed=9)
    sampled = time.perf_counter()
    grammar.log_prob(texts[:2000], 1)
    assert sampled - start < 5 and time.perf_counter() - sampled < 5
