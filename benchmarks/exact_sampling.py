"""Share of sampled texts that are possible at all, by sampler and number of steps, with the exact Bayes denoiser.

The network is perfect, so whatever is wrong with a text is the sampler's: tokens that one step writes together are
drawn independently of each other. A text is possible if the grammar of the embedded corpus can write it. Rows have the
lengths of the corpus. Errors are binomial.

    python benchmarks/exact_sampling.py                # 2,000 texts each, about 5 minutes on one core
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from noise_schedule import LogLinear  # noqa: E402
from objectives.base import Model  # noqa: E402
from objectives.subs import Subs  # noqa: E402
from process import Absorbing  # noqa: E402
from randomness import KeyedNoise  # noqa: E402
from samplers import ancestral, first_hitting, unmasking  # noqa: E402
from samplers.base import Trace  # noqa: E402
from text.exact_denoiser import ExactDenoiser  # noqa: E402
from text.reviews import ReviewGrammar, detokenize, tokens  # noqa: E402

MASK, FIRST = 0, 1  # the id of the first word
STEPS = (8, 16, 32, 64, 128, 256, 1000)


class Exact(Model):
    """An objective over an exact denoiser, whose own answer in float64 takes the place of the float32 projection."""

    def denoise(self, x_BL: torch.Tensor, t_B: torch.Tensor, at_BL: torch.Tensor, **cond: torch.Tensor) -> torch.Tensor:
        return self.backbone.denoise(x_BL, t_B, at_BL, **cond)


def blanks(grammar: ReviewGrammar, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the lengths of `number` texts of the corpus, and where the texts are, (B, L) each."""
    length_B = torch.tensor([len(tokens(text)) for text in grammar.sample(number, 0, seed)])
    here_BL = torch.arange(int(length_B.max())) < length_B[:, None]
    return torch.where(here_BL, MASK, FIRST), here_BL


def possible(grammar: ReviewGrammar, ids_BL: torch.Tensor, here_BL: torch.Tensor) -> np.ndarray:
    """Whether each row is a text of either class, (B,)."""
    rows = [row[here].tolist() for row, here in zip(ids_BL, here_BL, strict=True)]
    texts = [detokenize([grammar.vocabulary[i - FIRST] for i in row]) for row in rows]
    return np.isfinite(np.logaddexp(grammar.log_prob(texts, 0), grammar.log_prob(texts, 1)))


def share(ok_B: np.ndarray) -> dict[str, float]:
    """The share of possible texts with its standard error, that of one more and one less impossible text at least."""
    n, p = len(ok_B), float(ok_B.mean())
    return {"possible": p, "se": max(float(np.sqrt(p * (1 - p) / n)), 1 / n)}


def samplers() -> dict[str, Callable[..., Trace]]:
    """What is compared, by name."""
    found = {f"ddpm_cache, {steps} steps": partial(ancestral.sample, steps=steps, skip_idle=True) for steps in STEPS}
    one_each = partial(unmasking.sample, how=unmasking.Unmasking(order="random"))
    found |= {f"unmask, random, {steps} steps": partial(one_each, steps=steps) for steps in (8, 32, 64)}
    return found | {"first_hitting": first_hitting.sample}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=500)
    args = parser.parse_args()
    grammar = ReviewGrammar()
    denoiser = ExactDenoiser(grammar.grammars, {word: FIRST + i for i, word in enumerate(grammar.vocabulary)}, MASK,
                             FIRST + len(grammar.vocabulary))  # fmt: skip
    model = Exact(Subs(LogLinear(), Absorbing(MASK)).bound(None), denoiser)
    x_BL, here_BL = blanks(grammar, args.texts, seed=1)
    print(f"{args.texts} texts of {float(here_BL.sum(-1).double().mean()):.1f} tokens on average", flush=True)
    rows, start = {}, time.perf_counter()
    for name, sampler in samplers().items():
        outs = [sampler(model, x_BL[some], KeyedNoise(0, some), attention_mask=here_BL[some])
                for some in torch.arange(args.texts).split(args.batch)]  # fmt: skip
        ok_B = possible(grammar, torch.cat([out.ids_BL for out in outs]), here_BL)
        evaluations = float(torch.cat([out.evaluations_B for out in outs]).double().mean())
        rows[name] = {**share(ok_B), "evaluations": evaluations}
        print(f"{name:25} possible {rows[name]['possible']:7.1%} ± {rows[name]['se']:.1%}, "
              f"{evaluations:5.1f} network evaluations a text", flush=True)  # fmt: skip
    print(json.dumps({"benchmark": "exact_sampling", "texts": args.texts, "samplers": rows,
                      "seconds": round(time.perf_counter() - start)}))  # fmt: skip


if __name__ == "__main__":
    main()
