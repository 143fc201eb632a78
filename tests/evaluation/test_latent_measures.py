"""Agreement of texts and latents: worked by hand, and at chance for uninformative latents."""

from __future__ import annotations

import numpy as np
import pytest

from palimpsest.evaluation.centroids import fit_centroids, nearest_of_class, slerp, unit
from palimpsest.evaluation.editing import class_number, smoothness
from palimpsest.evaluation.latent_measures import bleu, cosines, edits, partners, retrieval, token_f1

RNG = np.random.default_rng(0)


def test_retrieval_is_1_of_the_latents_themselves_and_chance_of_latents_that_say_nothing():
    wanted = RNG.standard_normal((40, 2, 3))
    assert [hit.value for hit in retrieval(wanted, wanted).values()] == [1, 1]
    for silent in (np.broadcast_to(RNG.standard_normal((1, 2, 3)), wanted.shape), np.zeros_like(wanted)):
        found = retrieval(silent, wanted)
        assert found[1].value == pytest.approx(1 / 40) and found[10].value == pytest.approx(10 / 40)
        assert found[1].chance == 1 / 40 and found[1].low < 1 / 40 < found[1].high
    swapped = wanted.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert retrieval(swapped, wanted)[1].value == pytest.approx(38 / 40)
    np.testing.assert_allclose(cosines(3 * wanted, wanted), 1)
    assert (cosines(np.zeros_like(wanted), wanted) == 0).all()


def test_partners_are_others_each_once():
    for n in (2, 3, 50):
        found = partners(n, seed=1)
        assert sorted(found) == list(range(n)) and (found != np.arange(n)).all()
    assert (partners(50, 1) == partners(50, 1)).all() and (partners(50, 1) != partners(50, 2)).any()
    with pytest.raises(ValueError, match="take two at least"):
        partners(1, 0)


def test_overlap_worked_by_hand():
    assert token_f1([[1, 1, 2], [], [5]], [[1, 2, 3, 4], [], [6]]).tolist() == pytest.approx([4 / 7, 1, 0])
    # 1- to 4-grams of five words, of which the last differs: 4/5, 3/4, 2/3, 1/2.
    assert bleu(["a b c d e"], ["a b c d f"]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # Counts are added over the texts before they are divided; 9 words for 11 are punished by exp(1 - 11/9).
    precisions = (8 / 9, 6 / 7, 4 / 5, 2 / 3)
    assert bleu(["a b c d e", "g h i j"], ["a b c d f", "g h i j k l"]) == pytest.approx(
        np.prod(precisions) ** 0.25 * np.exp(1 - 11 / 9)
    )
    assert edits([[1, 2, 3], [50000, 7]], [[1, 3], [7, 50000, 9]]).tolist() == [1, 3 - 1 + 0]


def test_centroids_are_rescaled_and_verdicts_go_to_the_nearest():
    label, mean = np.arange(400) % 2, np.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    latent = mean[label] + RNG.standard_normal((400, 3))
    found = fit_centroids([(latent[:150], label[:150]), (latent[150:], label[150:])], 2)
    np.testing.assert_allclose(found.mean_CD, [latent[label == k].mean(0) for k in (0, 1)])
    within = latent - found.mean_CD[label]
    assert found.variance == pytest.approx((within**2).mean())
    assert found.norm == pytest.approx(np.linalg.norm(latent, axis=1).mean())
    assert (np.linalg.norm(found.mean_CD, axis=1) < 0.95 * found.norm).any()
    np.testing.assert_allclose(np.linalg.norm(found.rescaled_CD, axis=1), found.norm)
    np.testing.assert_allclose(unit(found.rescaled_CD), unit(found.mean_CD))
    posterior = found.posterior(latent, np.log([0.5, 0.5]))
    np.testing.assert_allclose(posterior.sum(1), 1)
    distance = ((latent[:, None] - found.mean_CD) ** 2).sum(-1)
    assert (posterior.argmax(1) == distance.argmin(1)).all()
    assert (found.posterior(latent, np.log([1e-9, 1 - 1e-9])).argmax(1) == 1).all()
    with pytest.raises(ValueError, match=r"class \[2\]"):
        fit_centroids([(latent, label)], 3)


def test_the_nearest_of_a_class_and_the_way_between_two_latents():
    latent, label = RNG.standard_normal((30, 4)), np.arange(30) % 3
    wanted_M = np.array([1, 1, 2, 2, 0, 0])
    chunks = [(latent[start : start + 10], label[start : start + 10]) for start in (0, 10, 20)]
    found_MD = nearest_of_class(chunks, latent[:6].copy(), wanted_M)
    with pytest.raises(ValueError, match="no training text of class 7 to edit towards"):
        nearest_of_class(chunks, latent[:6].copy(), wanted_M * 0 + 7)
    for m, wanted in enumerate(wanted_M):
        of_class = latent[label == wanted]
        np.testing.assert_array_equal(found_MD[m], of_class[(unit(of_class) @ unit(latent[m])).argmax()])
    a, b = np.array([[2.0, 0.0]]), np.array([[0.0, 4.0]])
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-12)
    np.testing.assert_allclose(slerp(a, b, 1.0), b, atol=1e-12)
    np.testing.assert_allclose(slerp(a, b, 0.5), 3 / np.sqrt(2) * np.ones((1, 2)))
    np.testing.assert_allclose(slerp(a, 3 * a, 0.5), 2 * a)
    assert np.isfinite(slerp(a, -a, 0.5)).all()


def test_texts_that_stay_are_smooth_and_do_not_rise():
    """The trap: with a rise that need not be strict, a decoder that ignores the latent has SSS = MTS = 1."""
    still = RNG.standard_normal((3, 1, 4))
    way = smoothness([still] * 4, np.full((3, 4), 0.7))
    assert way.sss.value == pytest.approx(1) and way.seen == 1 and way.mts.value == 0
    way = smoothness([still, -still], np.array([[0.1, 0.2], [0.2, 0.1], [0.5, 0.6]]))
    assert way.sss.value == pytest.approx(-1) and way.mts.value == pytest.approx(2 / 3)
    assert smoothness([], np.array([[0.1, 0.2]])).sss is None


def test_texts_without_a_latent_say_nothing_of_smoothness():
    still = RNG.standard_normal((3, 1, 4))
    gone, lost = still.copy(), np.zeros_like(still)
    gone[0] = 0
    way = smoothness([still, gone, still, still], np.full((3, 4), 0.7))
    assert way.sss.value == pytest.approx(1) and way.seen == pytest.approx(7 / 9)
    way = smoothness([still, lost, still], np.full((3, 3), 0.7))
    assert way.sss is None and way.seen == 0


def test_the_wanted_class_has_a_name_or_a_number():
    names = ("a", "b", "c")
    assert class_number(None, names) is None and class_number("b", names) == class_number(1, names) == 1
    with pytest.raises(ValueError, match="sampling.edit_class=d is none of the classes"):
        class_number("d", names)
