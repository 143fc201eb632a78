"""A probabilistic finite-state generator of token sequences, with everything about it computed exactly.

An *expression* says how texts are written: a string (its tokens in order), a `Chain` of expressions, or a
weighted `Choice` between them. `FiniteStateGrammar` compiles an expression into an acyclic automaton
without silent moves; different derivations of one text meet again in the forward algorithm, so a
probability is always the sum over every latent choice that could have produced the text.

Shapes: N texts, S states, A arcs, T the longest text in tokens. Probabilities are returned as logs, in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

END = 0  # the id of the silent token that ends every text


@dataclass(frozen=True, eq=False)
class Chain:
    """Its parts, one after the other."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """One of its options, drawn with the probability beside it."""

    options: tuple[tuple[float, Expression], ...]


Expression = str | Chain | Choice


def chain(*parts: Expression) -> Chain:
    """The parts in order; no parts at all is the empty text."""
    return Chain(tuple(parts))


def weighted(*options: tuple[float, Expression]) -> Choice:
    """A choice with the given weights, normalised here. ValueError if one is negative or all are zero."""
    total = sum(weight for weight, _ in options)
    if not total > 0 or any(weight < 0 for weight, _ in options):
        raise ValueError(f"weights must be non-negative with a positive sum, got {[w for w, _ in options]}")
    return Choice(tuple((weight / total, expression) for weight, expression in options if weight > 0))


def words(listing: str, flatness: float = 6.0) -> Choice:
    """One word of a space-separated list, the r-th with weight 1 / (r + flatness), r = 1, 2, ..."""
    return weighted(*((1.0 / (rank + flatness), word) for rank, word in enumerate(listing.split(), start=1)))


@dataclass(frozen=True)
class Arcs:
    """The automaton's arcs, sorted by source state and then token.

    source, token, target: (A,) int64; log_p: (A,) log p(token, target | source) in nats; first: (S + 1,),
    the arcs of state s are first[s] to first[s + 1] - 1.
    """

    source: np.ndarray
    token: np.ndarray
    target: np.ndarray
    log_p: np.ndarray
    first: np.ndarray


class _Compiler:
    """Expressions to states; equal states are one state, so shared endings are stored once."""

    def __init__(self) -> None:
        self.token_ids: dict[str, int] = {"": END}
        self.rows: list[dict[tuple[int, int], float]] = []
        self._state_of_row: dict[frozenset, int] = {}
        self._done: dict[tuple[int, int], dict[tuple[int, int], float]] = {}

    def state(self, row: dict[tuple[int, int], float]) -> int:
        key = frozenset(row.items())
        if key not in self._state_of_row:
            self._state_of_row[key] = len(self.rows)
            self.rows.append(row)
        return self._state_of_row[key]

    def compile(self, expression: Expression, following: int) -> dict[tuple[int, int], float]:
        """{(token, target): probability} of `expression` when state `following` comes after it."""
        if isinstance(expression, str):
            ids = [self.token_ids.setdefault(word, len(self.token_ids)) for word in expression.split()]
            return self._compile_parts(ids, following)
        # `expression` objects outlive the compiler, so their identities are safe keys.
        key = (id(expression), following)
        if key not in self._done:
            if isinstance(expression, Chain):
                self._done[key] = self._compile_parts(expression.parts, following)
            else:
                self._done[key] = self._mix(expression, following)
        return self._done[key]

    def _compile_parts(self, parts: Sequence, following: int) -> dict[tuple[int, int], float]:
        row = self.rows[following]
        for part in reversed(parts):
            following = self.state(row)
            row = {(part, following): 1.0} if isinstance(part, int) else self.compile(part, following)
        return row

    def _mix(self, choice: Choice, following: int) -> dict[tuple[int, int], float]:
        row: dict[tuple[int, int], float] = {}
        for probability, option in choice.options:
            for arc, p in self.compile(option, following).items():
                row[arc] = row.get(arc, 0.0) + probability * p
        return row


class FiniteStateGrammar:
    """The law of the texts that `root` writes.

    vocabulary: its distinct tokens, sorted; num_states, num_arcs: the automaton's size;
    min_tokens, max_tokens: the shortest and the longest text it can write, in tokens.
    """

    def __init__(self, root: Expression) -> None:
        compiler = _Compiler()
        final = compiler.state({})
        ending = compiler.state({(END, final): 1.0})
        start = compiler.state(compiler.compile(root, ending))
        self.token_ids = compiler.token_ids
        self._token_of_id = list(compiler.token_ids)
        self.start, self._final = start, final
        self.arcs = self._sorted_arcs(compiler.rows)
        self._arc_keys = self.arcs.source * len(self.token_ids) + self.arcs.token
        self._log_p_length = self._length_law()
        possible = np.flatnonzero(np.isfinite(self._log_p_length))
        self.min_tokens, self.max_tokens = int(possible[0]), int(possible[-1])
        self.vocabulary = tuple(sorted(token for token in self.token_ids if token))
        self.num_states, self.num_arcs = len(compiler.rows), len(self.arcs.token)

    @staticmethod
    def _sorted_arcs(rows: list[dict[tuple[int, int], float]]) -> Arcs:
        flat = sorted(
            (source, token, target, p) for source, row in enumerate(rows) for (token, target), p in row.items()
        )
        source, token, target = (np.array([arc[i] for arc in flat], dtype=np.int64) for i in range(3))
        first = np.searchsorted(source, np.arange(len(rows) + 1))
        return Arcs(source, token, target, np.log([arc[3] for arc in flat]), first)

    def _length_law(self) -> np.ndarray:
        """log p(number of tokens) for 0, 1, ..., the longest text: the forward algorithm without words."""
        arcs, law = self.arcs, []
        p_state = np.zeros(len(arcs.first) - 1)
        p_state[self.start] = 1.0
        while p_state.any():
            p_arc = p_state[arcs.source] * np.exp(arcs.log_p)
            ends = arcs.token == END
            law.append(p_arc[ends].sum())
            p_state = np.bincount(arcs.target[~ends], p_arc[~ends], minlength=len(p_state))
        with np.errstate(divide="ignore"):
            return np.log(law)

    def log_prob_length(self, num_tokens: Sequence[int]) -> np.ndarray:
        """(N,) log p(a text has that many tokens), nats; -inf for a length the grammar cannot write."""
        lengths = np.asarray(num_tokens, dtype=np.int64)
        possible = (lengths >= 0) & (lengths < len(self._log_p_length))
        return np.where(possible, self._log_p_length[np.where(possible, lengths, 0)], -np.inf)

    def derivation_entropy(self) -> float:
        """Entropy of the choices that write a text, nats; that of the text unless `is_ambiguous`."""
        arcs = self.arcs
        p_arc, p_state = np.exp(arcs.log_p), np.zeros(len(arcs.first) - 1)
        p_state[self.start], entropy = 1.0, 0.0
        for _ in range(self.max_tokens + 1):
            visits = p_state[arcs.source] * p_arc
            entropy -= float(visits @ arcs.log_p)
            p_state = np.bincount(arcs.target, visits, minlength=len(p_state))
        return entropy

    def is_ambiguous(self) -> bool:
        """Whether some text has two derivations, found by reading all texts with two readers at once."""
        arcs, steps = self.arcs, [{} for _ in range(len(self.arcs.first) - 1)]
        for source, token, target in np.stack([arcs.source, arcs.token, arcs.target], axis=1).tolist():
            steps[source].setdefault(token, []).append(target)
        seen, waiting = {(self.start, self.start)}, [(self.start, self.start)]
        while waiting:
            one, two = waiting.pop()
            pairs = {
                (min(pair), max(pair))
                for token in steps[one].keys() & steps[two].keys()
                for pair in itertools.product(steps[one][token], steps[two][token])
            }
            # From one state both readers may take one path; from two they cannot, so meeting again makes two.
            if one != two and any(a == b for a, b in pairs):
                return True
            waiting.extend(pairs - seen)
            seen |= pairs
        return False

    def sample(self, num_texts: int, rng: np.random.Generator) -> list[list[str]]:
        """`num_texts` token lists. The first n of any larger draw from an equal generator are these n."""
        arcs = self.arcs
        # One row of uniforms per text, whatever its length: so a small draw is a prefix of a large one.
        uniforms_NT = rng.random((num_texts, self.max_tokens))
        # State s owns the interval [s, s + 1), so that one binary search serves all texts at once.
        mass = np.cumsum(np.exp(arcs.log_p))
        before = np.concatenate([[0.0], mass])[arcs.first[:-1]]
        edges = arcs.source + mass - before[arcs.source]
        state_N = np.full(num_texts, self.start)
        tokens_NT = np.full((num_texts, self.max_tokens), END)
        for t in range(self.max_tokens):
            alive = np.flatnonzero(state_N != self._final)
            state = state_N[alive]
            arc = np.searchsorted(edges, state + uniforms_NT[alive, t], side="right")
            arc = np.clip(arc, arcs.first[state], arcs.first[state + 1] - 1)
            tokens_NT[alive, t], state_N[alive] = arcs.token[arc], arcs.target[arc]
        lengths = (tokens_NT != END).sum(1)
        names = self._token_of_id
        return [
            [names[i] for i in row[:length]] for row, length in zip(tokens_NT.tolist(), lengths.tolist(), strict=True)
        ]

    def log_prob(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """(N,) log p(text) in nats, summed over every derivation; -inf for a text the grammar cannot write.

        Forward algorithm on all texts at once. Only states a text can be in are held (a few, of thousands),
        as parallel arrays: `text` and `state` of each entry, and its probability given the tokens read so
        far.
        """
        arcs, num_states, num_types = self.arcs, len(self.arcs.first) - 1, len(self.token_ids)
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        tokens_NT = np.full((len(lengths), min(lengths.max(initial=0), self.max_tokens) + 1), END)
        log_p_N = np.where(lengths > self.max_tokens, -np.inf, 0.0)
        for row, text in zip(tokens_NT, texts, strict=True):
            if len(text) < len(row):
                row[: len(text)] = [self.token_ids.get(token or " ", num_types) for token in text]
        text = np.flatnonzero(np.isfinite(log_p_N))
        state, p = np.full(len(text), self.start), np.ones(len(text))
        for t in range(tokens_NT.shape[1]):
            token = tokens_NT[text, t]
            # An unknown token must not alias the next state's first token in the combined key.
            key = np.where(token < num_types, state * num_types + token, -1)
            low, high = (np.searchsorted(self._arc_keys, key, side=side) for side in ("left", "right"))
            count = high - low
            entry = np.repeat(np.arange(len(text)), count)
            arc = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
            place, merged = np.unique(text[entry] * num_states + arcs.target[arc], return_inverse=True)
            p = np.bincount(merged, p[entry] * np.exp(arcs.log_p[arc]), minlength=len(place))
            text, state = np.divmod(place, num_states)
            total_N = np.bincount(text, p, minlength=len(log_p_N))
            pending = np.isfinite(log_p_N) & (t <= lengths)
            with np.errstate(divide="ignore"):
                log_p_N[pending] += np.log(total_N[pending])
            p = p / total_N[text]
        return log_p_N
