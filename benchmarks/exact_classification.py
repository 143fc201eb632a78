"""Cost of stopping early in classification: the embedded corpus under its exact denoisers.

    python benchmarks/exact_classification.py --texts 2000 --seeds 1 2 3 --output benchmarks/results/x.jsonl

The exact p(token | unmasked tokens, class) comes from the forward-backward algorithm on each class's grammar, so the
masks are the only source of error. Masks and sequential test are those of mode=classify. It prints one row per
confidence: the mean draws, and the Kullback-Leibler divergence from the exact posterior, which equals the mean excess
log loss. Paired differences over the same texts compare stopping early with

- the same number of draws: every text gets the mean number, from a design of that many draws;
- all draws: every text gets 64.

The row "informed" is the posterior of a reader who knows the distribution of the true log-odds and the noise of each
text. No posterior from the same draws can be much better.

Shape suffixes: M texts, C classes, K draws, L length, S states, G log-odds.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.special import expit

from palimpsest.benchmarks.shared import new_parser
from palimpsest.classification.bayes import averaged_posterior, posterior
from palimpsest.classification.sequential_test import undecided
from palimpsest.common.metrics import Estimate
from palimpsest.common.randomness import evaluation_noise
from palimpsest.corpora.grammar import END, FiniteStateGrammar
from palimpsest.corpora.reviews import ReviewGrammar, generate_split, tokens
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.mask_sampling import TiltedCount
from palimpsest.process import Absorbing

DRAWS = 64
LOOKS = (4, 6, 8, 12, 16, 24, 32, 48, 64)
MASK = 1
EVEN_C = np.log([0.5, 0.5])
CONFIDENCES = (0.8, 0.9, 0.95)


class Denoiser:
    """The exact denoiser of a grammar."""

    def __init__(self, grammar: FiniteStateGrammar) -> None:
        arcs, self._ids = grammar.arcs, grammar.token_ids
        p_A, size = np.exp(arcs.log_p), len(arcs.first) - 1

        def step(at_A: np.ndarray) -> csr_matrix:
            return csr_matrix((p_A[at_A], (arcs.source[at_A], arcs.target[at_A])), shape=(size, size))

        self._any = step(arcs.token != END)
        self._of = {token: step(arcs.token == token) for token in self._ids.values()}
        self._begin_S1 = (np.arange(size) == grammar.start)[:, None] * 1.0
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


def measured(corpus: ReviewGrammar, texts: list[list[str]], num_draws: int, seed: int) -> np.ndarray:
    """Return -log p(text | class, length), one estimate per draw, nats (M, C, K)."""
    lengths, ids_M = np.array([len(text) for text in texts]), torch.arange(len(texts))
    scored_ML = torch.arange(int(lengths.max())) < torch.from_numpy(lengths)[:, None]
    denoisers, nats_MCK = [Denoiser(grammar) for grammar in corpus.grammars], np.empty((len(texts), 2, num_draws))
    no_tokens_ML, sample = torch.zeros_like(scored_ML, dtype=torch.long), TiltedCount()
    noises = [evaluation_noise(seed, ids_M, k, num_draws, ids_M) for k in range(num_draws)]
    looks = [sample(LogLinear(), no_tokens_ML, scored_ML, Absorbing(MASK), noise)[0] for noise in noises]
    masked_MKL = torch.stack([look.xt_BL == MASK for look in looks], dim=1).numpy()
    weight_MK = torch.stack([look.scale_B * LogLinear()(look.t_B).elbo_weight for look in looks], dim=1).numpy()
    for m, text in enumerate(texts):
        nats_MCK[m] = [weight_MK[m] * d.cross_entropies(text, masked_MKL[m, :, : len(text)]) for d in denoisers]
    return nats_MCK


def stopped_early(nats_MCK: np.ndarray, confidence: float, tokens_M: np.ndarray) -> np.ndarray:
    """Return the draws that the sequential test takes; the others are nan."""
    drawn_MCK = nats_MCK.copy()
    for here, there in pairwise(LOOKS):
        active_M = undecided(drawn_MCK[:, :, :here], EVEN_C, confidence, tokens_M)
        drawn_MCK[~active_M, :, here:there] = np.nan
    return drawn_MCK


def informed_posterior(nats_MCK: np.ndarray, all_MCK: np.ndarray, exact_MC: np.ndarray) -> np.ndarray:
    """Return p(class | text) (M, C) given the distribution of the true log-odds and each text's noise."""
    difference_MK, true_M = nats_MCK[:, 0] - nats_MCK[:, 1], exact_MC[:, 1] - exact_MC[:, 0]
    noise_M = (all_MCK[:, 0] - all_MCK[:, 1]).std(axis=1, ddof=1)
    error_M = noise_M / np.sqrt((~np.isnan(difference_MK)).sum(axis=1))
    odds_G = np.sort(true_M)[:: max(1, len(true_M) // 500)]
    deviate_MG = (np.nanmean(difference_MK, axis=1)[:, None] - odds_G) / error_M[:, None]
    weight_MG = np.exp(-0.5 * (deviate_MG**2 - (deviate_MG**2).min(axis=1, keepdims=True)))
    p_M = (weight_MG * expit(odds_G)).sum(axis=1) / weight_MG.sum(axis=1)
    return np.stack([1 - p_M, p_M], axis=1)


def excess(exact_MC: np.ndarray, p_MC: np.ndarray) -> np.ndarray:
    """Return the divergence of each prediction from the exact posterior, nats (M,)."""
    return (np.exp(exact_MC) * (exact_MC - np.log(np.maximum(p_MC, 1e-300)))).sum(axis=1)


def compared(corpus: ReviewGrammar, num_texts: int, seed: int) -> dict[float, dict[str, np.ndarray]]:
    """Return the measurements of each text by confidence."""
    split, found = generate_split("test", num_texts // 2, seed), {}
    texts, exact_MC = [tokens(text) for text in split["text"]], np.log(corpus.posterior(split["text"]))
    nats_MCK, lengths_M = measured(corpus, texts, DRAWS, seed), np.array([len(text) for text in texts])
    complete_M = excess(exact_MC, averaged_posterior(nats_MCK, EVEN_C))
    for confidence in CONFIDENCES:
        drawn_MCK = stopped_early(nats_MCK, confidence, lengths_M)
        draws_M = (~np.isnan(drawn_MCK[:, 0])).sum(axis=1)
        fixed_MCK = measured(corpus, texts, round(draws_M.mean()), seed)
        early_M = excess(exact_MC, averaged_posterior(drawn_MCK, EVEN_C))
        fixed_M = excess(exact_MC, averaged_posterior(fixed_MCK, EVEN_C))
        found[confidence] = {
            "draws": draws_M, "stopped early": early_M,
            "Bayes' rule": excess(exact_MC, posterior(-np.nanmean(drawn_MCK, axis=2), EVEN_C)),
            "informed": excess(exact_MC, informed_posterior(drawn_MCK, nats_MCK, exact_MC)),
            "the same number of draws": fixed_M, "minus the same number of draws": early_M - fixed_M,
            "all draws": complete_M, "minus all draws": early_M - complete_M,
            "same prediction as the exact posterior": _agrees(drawn_MCK, exact_MC),
            "same prediction, the same number of draws": _agrees(fixed_MCK, exact_MC),
        }  # fmt: skip
    return found


def _agrees(nats_MCK: np.ndarray, exact_MC: np.ndarray) -> np.ndarray:
    return 1.0 * (np.nanmean(nats_MCK, axis=2).argmin(axis=1) == exact_MC.argmax(axis=1))


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--texts", type=int, default=2000, help="for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the texts and masks")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    seeds = " ".join(map(str, args.seeds))
    by_seed, lines = [compared(ReviewGrammar(), args.texts, seed) for seed in args.seeds], []
    for confidence in CONFIDENCES:
        print(f"confidence {confidence}")
        row = {
            "benchmark": "exact_classification", "confidence": confidence, "texts": args.texts, "seeds": args.seeds,
            "command": f"python benchmarks/exact_classification.py --texts {args.texts} --seeds {seeds}",
        }  # fmt: skip
        for name in by_seed[0][confidence]:
            values_M = np.concatenate([found[confidence][name] for found in by_seed])
            mean = Estimate(float(values_M.mean()), float(values_M.std() / np.sqrt(len(values_M))))
            print(f"    {name:45s} {mean}")
            means = [float(found[confidence][name].mean()) for found in by_seed]
            row[name] = {"mean": mean.value, "se": mean.se, "by_seed": means}
        lines.append(json.dumps(row))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
