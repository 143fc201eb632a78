"""Every estimator of the NELBO with the exact Bayes denoiser, against the exact -log p of the same texts.

With exact conditionals the continuous-time bound is tight for each text, so its mean gap is 0 within its error. With T
steps the gap is positive, because steps that unmask several tokens cost nats. A negative gap would refute the bound.
The error is of the mean over texts and draws; the noise is of one text and draw. All lines share their random numbers,
so their deviations are not independent.

    python benchmarks/exact_bounds.py                  # 64 texts, 64 network evaluations each
"""

import time

import numpy as np
import torch

from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.corpora.exact_denoiser import ExactDenoiser
from palimpsest.corpora.reviews import ReviewGrammar, tokens
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.noise_schedule import Cosine, Geometric, LogLinear, NoiseSchedule
from palimpsest.objectives.base import Model
from palimpsest.objectives.mask_sampling import Bernoulli, Complementary, ExactCount, MaskSampler, TiltedCount
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing

MASK, PAD, FIRST = 0, 1, 2
SCHEDULES: dict[str, NoiseSchedule] = {"loglinear": LogLinear(), "cosine": Cosine(), "geometric": Geometric(1e-4, 20.0)}
CONTINUOUS: dict[str, MaskSampler] = {
    "uniform": Bernoulli(antithetic_sampling=False), "stratified": Bernoulli(),
    "importance-sampled": Bernoulli(importance_sampling=True), "exact_count": ExactCount(),
    "tilted_count": TiltedCount(), "complementary": Complementary(),
}  # fmt: skip
STEPS = (1, 4, 16, 64, 1000)


def nats(grammar: ReviewGrammar, texts: list[str]) -> np.ndarray:
    """Return -log p(text | its length) under both classes with equal weights, (M,)."""
    lengths = [len(tokens(text)) for text in texts]
    joint = np.logaddexp.reduce([grammar.log_prob(texts, label) for label in (0, 1)])
    return np.logaddexp.reduce([grammar.log_prob_length(lengths, label) for label in (0, 1)]) - joint


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--draws", type=int, default=64)
    args = parser.parse_args()
    grammar = ReviewGrammar()
    ids = {word: FIRST + i for i, word in enumerate(grammar.vocabulary)}
    denoiser = ExactDenoiser(grammar.grammars, ids, MASK, FIRST + len(ids))
    texts = [*grammar.sample(args.texts // 2, 0, seed=1), *grammar.sample(args.texts - args.texts // 2, 1, seed=1)]
    rows = [torch.tensor([ids[token] for token in tokens(text)]) for text in texts]
    x_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    batch = {"input_ids": x_BL, "attention_mask": x_BL != PAD, "sample_id": torch.arange(len(texts))}
    truth_B, found, start = torch.from_numpy(nats(grammar, texts)), {}, time.perf_counter()
    print(f"{len(texts)} texts of {float(truth_B.mean()):.2f} nats on average, {args.draws} draws each", flush=True)
    for schedule_name, schedule in SCHEDULES.items():
        cases = {name: (0, noising) for name, noising in CONTINUOUS.items()} | {f"T={T}": (T, None) for T in STEPS}
        for name, (num_steps, noising) in cases.items():
            model = Model(Subs(schedule, Absorbing(MASK), T=num_steps), denoiser)
            above_BK = Nelbo(noising)(model, batch, 0, args.draws).nll_BK - truth_B[:, None]
            mean, noise = float(above_BK.mean()), float(above_BK.std(dim=1).square().mean().sqrt())
            se = float(above_BK.mean(1).std()) / len(texts) ** 0.5
            found[f"{schedule_name}, {name}"] = {"above_truth": mean, "se": se, "noise_of_a_draw": noise}
            print(
                f"{schedule_name:10} {name:19} above the truth by {mean:8.3f} ± {se:.3f} nats/text, "
                f"noise of a draw {noise:6.2f}",
                flush=True,
            )
    seconds = round(time.perf_counter() - start)
    report("exact_bounds", texts=len(texts), draws=args.draws, estimators=found, seconds=seconds)


if __name__ == "__main__":
    main()
