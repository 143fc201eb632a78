"""Cost of the Monte Carlo error in classification: the embedded corpus under its exact denoisers.

python -m benchmarks.exact_classification 2000

The exact p(token | unmasked tokens, class) comes from the forward-backward algorithm on each class's grammar, so the
masks are the only source of error. Masks and sequential test are those of mode=classify. For each confidence it prints
the mean draws and the Kullback-Leibler divergence from the exact posterior, which equals the mean excess log loss.

Shape suffixes: M texts, C classes, K draws, L length, S states.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from palimpsest.classification.bayes import averaged_posterior, posterior
from palimpsest.classification.sequential_test import undecided
from palimpsest.common.metrics import Estimate
from palimpsest.common.randomness import evaluation_noise
from palimpsest.corpora.grammar import END, FiniteStateGrammar
from palimpsest.corpora.reviews import ReviewGrammar, generate_split, tokens
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.mask_sampling import TiltedCount
from palimpsest.process import Absorbing

DRAWS, LOOKS, MASK, SEED = 64, (4, 6, 8, 12, 16, 24, 32, 48, 64), 1, 1


class Denoiser:
    """The exact denoiser of a grammar."""

    def __init__(self, grammar: FiniteStateGrammar) -> None:
        arcs, self._ids = grammar._arcs, grammar._token_ids
        p_A, size = np.exp(arcs.log_p), len(arcs.first) - 1

        def step(at_A: np.ndarray) -> csr_matrix:
            return csr_matrix((p_A[at_A], (arcs.source[at_A], arcs.target[at_A])), shape=(size, size))

        self._any = step(arcs.token != END)
        self._of = {token: step(arcs.token == token) for token in self._ids.values()}
        self._begin_S1 = (np.arange(size) == grammar._start)[:, None] * 1.0
        self._end_S1 = np.asarray(self._of[END].sum(axis=1))

    def cross_entropies(self, text: list[str], masked_KL: np.ndarray) -> np.ndarray:
        """Return the cross-entropy of the masked tokens, summed over each mask, nats (K,)."""
        steps, masked_LK = [self._of[self._ids[token]] for token in text], masked_KL.T
        before = [self._begin_S1.repeat(len(masked_KL), axis=1)]
        for step, masked_K in zip(steps, masked_LK, strict=False):
            before.append(np.where(masked_K, self._any.T @ before[-1], step.T @ before[-1]))
        after_SK, nats_K = self._end_S1.repeat(len(masked_KL), axis=1), np.zeros(len(masked_KL))
        total_K = (before[-1] * after_SK).sum(axis=0)
        for step, masked_K, before_SK in list(zip(steps, masked_LK, before, strict=False))[::-1]:
            own_SK = step @ after_SK
            nats_K -= np.where(masked_K, np.log((before_SK * own_SK).sum(axis=0) / total_K), 0.0)
            after_SK = np.where(masked_K, self._any @ after_SK, own_SK)
        return nats_K


def measured(corpus: ReviewGrammar, texts: list[list[str]]) -> np.ndarray:
    """Return -log p(text | class, length), one estimate per draw, nats (M, C, K)."""
    lengths, ids_M = np.array([len(text) for text in texts]), torch.arange(len(texts))
    scored_ML = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
    denoisers, nats_MCK = [Denoiser(grammar) for grammar in corpus.grammars], np.empty((len(texts), 2, DRAWS))
    looks = [TiltedCount()(LogLinear(), torch.zeros_like(scored_ML, dtype=torch.long), scored_ML, Absorbing(MASK),
                           evaluation_noise(SEED, ids_M, k, DRAWS, ids_M))[0] for k in range(DRAWS)]  # fmt: skip
    masked_MKL = torch.stack([look.xt_BL == MASK for look in looks], dim=1).numpy()
    weight_MK = torch.stack([look.scale_B * LogLinear()(look.t_B).elbo_weight for look in looks], dim=1).numpy()
    for m, text in enumerate(texts):
        nats_MCK[m] = [weight_MK[m] * d.cross_entropies(text, masked_MKL[m, :, : len(text)]) for d in denoisers]
    return nats_MCK


def main() -> None:
    corpus, split = ReviewGrammar(), generate_split("test", int(sys.argv[1]) // 2, SEED)
    texts, even_C = [tokens(text) for text in split["text"]], np.log([0.5, 0.5])
    nats_MCK, exact_MC = measured(corpus, texts), np.log(corpus.posterior(split["text"]))
    lengths = [len(text) for text in texts]
    found = {"texts": len(texts)}
    for confidence in (0.8, 0.9, 0.95, 1.0):
        drawn_MCK = nats_MCK.copy()
        for here, there in pairwise(LOOKS):
            racing_M = undecided(drawn_MCK[:, :, :here], even_C, confidence, np.array(lengths))
            drawn_MCK[~racing_M, :, here:there] = np.nan
        by_name = {"Bayes' rule": posterior(-np.nanmean(drawn_MCK, axis=2), even_C),
                   "averaged": averaged_posterior(drawn_MCK, even_C)}  # fmt: skip
        draws = float((~np.isnan(drawn_MCK[:, 0])).sum(axis=1).mean())
        found[str(confidence)] = {"draws": draws}
        for name, p_MC in by_name.items():
            excess_M = (np.exp(exact_MC) * (exact_MC - log_softmax(np.log(p_MC), axis=1))).sum(axis=1)
            excess = Estimate(float(excess_M.mean()), float(excess_M.std() / np.sqrt(len(excess_M))))
            same = float((p_MC.argmax(1) == by_name["Bayes' rule"].argmax(1)).mean())
            found[str(confidence)][name] = {"excess": str(excess), "same verdicts": same}
            print(f"confidence {confidence}, {draws:.1f} draws: {name} {excess} nats above the exact log loss")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
