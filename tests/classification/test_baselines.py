"""The bag-of-words baselines: naive Bayes against scikit-learn and by hand, and what all of them must learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.naive_bayes import MultinomialNB

from palimpsest.classification.baselines import Labelled, baselines

NAMES = ["naive Bayes, unigrams", "naive Bayes, uni- and bigrams", "TF-IDF logistic regression",
         "NB-weighted logistic regression"]  # fmt: skip


def labelled(rows, labels) -> Labelled:
    ids = [np.array(row, dtype=np.int64) for row in rows]
    return Labelled([" ".join(f"w{i}" for i in row) for row in rows], ids, np.array(labels))


def by_name(train, validation, test, vocab_size):
    found = baselines(train, validation, test, vocab_size)
    assert [one.name for one in found] == NAMES
    for one in found:
        assert one.posterior_MC.sum(1) == pytest.approx(np.ones(len(test.label_M)))
        assert one.validation_MC.shape == (len(validation.label_M), one.posterior_MC.shape[1])
        if validation is test:
            np.testing.assert_array_equal(one.validation_MC, one.posterior_MC)
    return {one.name: one.posterior_MC for one in found}


def test_naive_bayes_by_hand():
    """Tokens 0 1 0 in class 0, 1 2 in class 1; V = 3. The bigrams are 01, 10, 12: none goes from one text to the next
    (0 1 would), and 22 of the test text was never seen."""
    train = labelled([[0, 1, 0], [1, 2]], [0, 1])
    test = labelled([[0, 1], [2, 2]], [0, 1])
    found = by_name(train, train, test, 3)
    first = np.array([3 / 6 * 2 / 6, 1 / 5 * 2 / 5])
    second = np.array([(1 / 6) ** 2, (2 / 5) ** 2])
    expected = np.stack([first / first.sum(), second / second.sum()])
    assert found["naive Bayes, unigrams"] == pytest.approx(expected)
    first = np.array([3 * 2 * 2 / 11**3, 1 * 2 * 1 / 9**3])
    second = np.array([1 / 11**2, 2 * 2 / 9**2])
    expected = np.stack([first / first.sum(), second / second.sum()])
    assert found["naive Bayes, uni- and bigrams"] == pytest.approx(expected)


def test_naive_bayes_is_scikit_learns_on_counts():
    rng = np.random.default_rng(0)
    rows, labels = [rng.integers(9, size=rng.integers(1, 8)) for _ in range(60)], np.arange(60) % 3

    def dense(rows):
        counts = np.zeros((len(rows), 9 + 81))
        for m, row in enumerate(rows):
            for i, token in enumerate(row):
                counts[m, token] += 1
                if i:
                    counts[m, 9 + 9 * row[i - 1] + token] += 1
        return counts

    train, test = labelled(rows[:40], labels[:40]), labelled(rows[40:], labels[40:])
    found = by_name(train, test, test, 9)
    counts, others = dense(rows[:40]), dense(rows[40:])
    seen = counts.sum(0) > 0
    seen[:9] = True
    expected = MultinomialNB().fit(counts[:, :9], labels[:40]).predict_proba(others[:, :9])
    assert found[NAMES[0]] == pytest.approx(expected)
    expected = MultinomialNB().fit(counts[:, seen], labels[:40]).predict_proba(others[:, seen])
    assert found[NAMES[1]] == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_all_learn_a_unigram_law_and_only_bigrams_learn_order(num_classes):
    rng = np.random.default_rng(1)
    labels = np.arange(600) % num_classes
    p_CV = softmax(rng.normal(size=(num_classes, 30)), axis=1)
    rows = [rng.choice(30, size=25, p=p_CV[k]) for k in labels]
    parts = [labelled(rows[a:b], labels[a:b]) for a, b in ((0, 400), (400, 500), (500, 600))]
    for name, posterior_MC in by_name(*parts, 30).items():
        assert (posterior_MC.argmax(1) == parts[2].label_M).mean() > 0.9, name
    # tokens 0 .. C-1 round and round, upwards by 1 + the class: the same counts in every class
    size = num_classes + 2
    rows = [(rng.integers(size) + (1 + k) * np.arange(30)) % size for k in labels]
    parts = [labelled(rows[a:b], labels[a:b]) for a, b in ((0, 400), (400, 500), (500, 600))]
    for name, posterior_MC in by_name(*parts, size).items():
        accuracy = (posterior_MC.argmax(1) == parts[2].label_M).mean()
        assert accuracy == 1 if name != NAMES[0] else accuracy < 0.8, name


def test_tiny_training_sets_and_texts_without_tokens():
    """No word stands in two texts, one text is empty, one has tokens that training never saw."""
    train = labelled([[0], [1, 2]], [0, 1])
    found = by_name(train, train, labelled([[], [5, 5, 4], [0]], [0, 1, 0]), 6)
    for name, posterior_MC in found.items():
        assert posterior_MC[2].argmax() == 0, name


def test_invalid_data_are_refused():
    good = labelled([[0], [1]], [0, 1])
    with pytest.raises(ValueError, match=r"no training text of class \[1\]"):
        baselines(labelled([[0]], [0]), good, good, 3)
    with pytest.raises(ValueError, match="validation split has no text"):
        baselines(good, labelled([], []), good, 3)
    with pytest.raises(ValueError, match="one class"):
        baselines(*[labelled([[0]], [0])] * 3, 3)
    with pytest.raises(ValueError, match="vocabulary"):
        baselines(good, good, labelled([[7]], [0]), 3)
