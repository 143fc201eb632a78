"""An n-gram model with interpolated Kneser-Ney smoothing: a scorer of texts without a causal network."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from palimpsest.common.metrics import Units
from palimpsest.data.tokenizers import encode
from palimpsest.evaluation.generative_perplexity import GenerativePerplexity, TextScores

_BEGIN = -1  # before a text


class KneserNey:
    """An interpolated n-gram model (Kneser & Ney 1995; Chen & Goodman 1998, section 2.7) with one discount d.

    p(w | h) = max(c(hw) - d, 0) / c(h) + d N(h) / c(h) p(w | h without its first token). N(h) is the number of
    different tokens after h. Below the highest order c(hw) counts the different tokens before hw. Below order 1 all
    `vocab_size` tokens are equally likely.
    """

    def __init__(
        self, tokenizer: object, texts: Iterable[str], vocab_size: int, order: int = 3, discount: float = 0.75
    ) -> None:
        self.tokenizer, self.vocab_size, self.order, self.discount = tokenizer, vocab_size, order, discount
        grams: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
        rows = encode(tokenizer, list(texts))
        self.trained_on = sum(map(len, rows))
        for ids in rows:
            padded = [_BEGIN] * (order - 1) + list(ids)
            grams[-1].update(tuple(padded[i : i + order]) for i in range(len(ids)))
        for n in range(order - 1, 0, -1):
            grams[n - 1].update(gram[1:] for gram in grams[n])
        self._grams = grams
        self._kinds = [Counter(gram[:-1] for gram in counts) for counts in grams]
        self._total: list[Counter[tuple[int, ...]]] = [Counter() for _ in grams]
        for total, counts in zip(self._total, grams, strict=True):
            for gram, count in counts.items():
                total[gram[:-1]] += count

    @property
    def protocol(self) -> dict[str, object]:
        """Settings that must be equal for two numbers to be comparable."""
        return {"scorer": f"{self.order}-gram, Kneser-Ney", "discount": self.discount, "trained_on": self.trained_on}

    def probability(self, token: int, before: Sequence[int]) -> float:
        """Return p(token | the tokens before it)."""
        p = 1 / self.vocab_size
        for n in range(self.order):
            context = tuple(before[len(before) - n :])
            total = self._total[n][context]
            if total:
                seen = max(self._grams[n][*context, token] - self.discount, 0)
                p = (seen + self.discount * self._kinds[n][context] * p) / total
        return p

    def perplexity(self, texts: Sequence[str], units: Units | None = None) -> GenerativePerplexity:
        """Score as a `CausalScorer`: the tokens of each text, without an end token."""
        rows = encode(self.tokenizer, list(texts))
        nats = [
            -sum(np.log(self.probability(token, ([_BEGIN] * (self.order - 1) + ids)[i : i + self.order - 1]))
                 for i, token in enumerate(ids)) for ids in rows
        ]  # fmt: skip
        scores = TextScores(np.array(nats, dtype=np.float64), np.array([len(ids) for ids in rows]))
        return scores.summary(self.protocol, units)
