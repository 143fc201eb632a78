"""A probabilistic finite-state generator of token sequences, with exact probabilities, lengths and entropies.

An *expression* describes texts: a string (its tokens in order), a `Chain` of expressions, or a weighted `Choice`
between them. `FiniteStateGrammar` compiles an expression into an acyclic automaton without silent moves. The forward
algorithm merges different derivations of one text, so a probability is always the sum over every latent choice that
could have produced the text.

Shapes: N texts, S states, A arcs, T the longest text in tokens. Probabilities are returned as logs, in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

END = 0  # the id of the silent token that ends every text


@dataclass(frozen=True, eq=False)
class Chain:
    """Expressions in sequence."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """Alternative expressions with their probabilities."""

    options: tuple[tuple[float, Expression], ...]


Expression = str | Chain | Choice


def chain(*parts: Expression) -> Chain:
    """Return the expressions in sequence; without any, the empty text."""
    return Chain(tuple(parts))


def weighted(*options: tuple[float, Expression]) -> Choice:
    """Return a choice with the given weights, normalised. Raises ValueError if one is negative or all are zero."""
    total = sum(weight for weight, _ in options)
    if not total > 0 or any(weight < 0 for weight, _ in options):
        raise ValueError(f"weights must be non-negative with a positive sum, got {[w for w, _ in options]}")
    return Choice(tuple((weight / total, expression) for weight, expression in options if weight > 0))


def words(listing: str, flatness: float = 6.0) -> Choice:
    """Return a choice of one word of a space-separated list, the r-th with weight 1 / (r + flatness), r = 1, 2, ..."""
    return weighted(*((1.0 / (rank + flatness), word) for rank, word in enumerate(listing.split(), start=1)))


@dataclass(frozen=True)
class Arcs:
    """The automaton's arcs, sorted by source state and then token."""

    source: np.ndarray  # (A,) int64
    token: np.ndarray  # (A,) int64
    target: np.ndarray  # (A,) int64
    log_p: np.ndarray  # (A,) log p(token, target | source) in nats
    first: np.ndarray  # (S + 1,), the arcs of state s are first[s] to first[s + 1] - 1


class _Compiler:
    """The compiler of expressions to states; equal states are merged, so shared endings are stored once."""

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
        """Return {(token, target): probability} of `expression` if state `following` comes after it."""
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
    """The distribution of the texts of an expression.

    Attributes:
        vocabulary: its distinct tokens, sorted.
        num_states: size of the automaton.
        min_tokens, max_tokens: lengths of the shortest and the longest text.
    """

    def __init__(self, root: Expression) -> None:
        compiler = _Compiler()
        final = compiler.state({})
        ending = compiler.state({(END, final): 1.0})
        start = compiler.state(compiler.compile(root, ending))
        self.token_ids = compiler.token_ids
        self._token_of_id = list(compiler.token_ids)
        self.start = start
        self._final = final
        self.num_states = len(compiler.rows)
        self.arcs = _sorted_arcs(compiler.rows)
        self._arc_keys = self.arcs.source * len(self.token_ids) + self.arcs.token
        self._log_p_length = self._length_distribution()
        possible = np.flatnonzero(np.isfinite(self._log_p_length))
        self.min_tokens, self.max_tokens = int(possible[0]), int(possible[-1])
        self.vocabulary = tuple(sorted(token for token in self.token_ids if token))

    def _length_distribution(self) -> np.ndarray:
        """Return log p(number of tokens) for 0, 1, ..., the longest text: the forward algorithm without words."""
        arcs, p_length = self.arcs, []
        p_state = np.zeros(self.num_states)
        p_state[self.start] = 1.0
        while p_state.any():
            p_arc = p_state[arcs.source] * np.exp(arcs.log_p)
            ends = arcs.token == END
            p_length.append(p_arc[ends].sum())
            p_state = np.bincount(arcs.target[~ends], p_arc[~ends], minlength=len(p_state))
        with np.errstate(divide="ignore"):
            return np.log(p_length)

    def log_prob_length(self, num_tokens: Sequence[int]) -> np.ndarray:
        """Return log p(number of tokens), (N,) nats; -inf for an impossible length."""
        lengths = np.asarray(num_tokens, dtype=np.int64)
        possible = (lengths >= 0) & (lengths < len(self._log_p_length))
        return np.where(possible, self._log_p_length[np.where(possible, lengths, 0)], -np.inf)

    def derivation_entropy(self) -> float:
        """Return the entropy of the derivation of a text in nats: that of the text, if no text has two derivations."""
        arcs = self.arcs
        p_arc = np.exp(arcs.log_p)
        p_state = np.zeros(self.num_states)
        p_state[self.start], entropy = 1.0, 0.0
        for _ in range(self.max_tokens + 1):
            visits = p_state[arcs.source] * p_arc
            entropy -= float(visits @ arcs.log_p)
            p_state = np.bincount(arcs.target, visits, minlength=len(p_state))
        return entropy

    def sample(self, num_texts: int, rng: np.random.Generator) -> list[list[str]]:
        """Draw `num_texts` token lists. The first n of a larger draw from an equal generator are the same."""
        arcs = self.arcs
        # One row of uniforms per text, whatever its length, so that a small draw is a prefix of a large one.
        uniforms_NT = rng.random((num_texts, self.max_tokens))
        # State s has the interval [s, s + 1), so that one binary search serves all texts at once.
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
        return [[names[i] for i in row[:length]] for row, length in zip(tokens_NT.tolist(), lengths, strict=True)]

    def log_prob(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """Return log p(text), (N,) nats, summed over every derivation; -inf for an impossible text. The forward
        algorithm runs on all texts at once and keeps only the states that a text can be in (a few of thousands), as
        parallel arrays: `text` and `state` of each entry, and its probability given the tokens so far."""
        arcs = self.arcs
        num_types = len(self.token_ids)
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        tokens_NT = np.full((len(lengths), min(lengths.max(initial=0), self.max_tokens) + 1), END)
        log_p_N = np.where(lengths > self.max_tokens, -np.inf, 0.0)
        for row, text in zip(tokens_NT, texts, strict=True):
            if len(text) < len(row):
                row[: len(text)] = [self.token_ids.get(token or " ", num_types) for token in text]
        text = np.flatnonzero(np.isfinite(log_p_N))
        state = np.full(len(text), self.start)
        p = np.ones(len(text))
        for t in range(tokens_NT.shape[1]):
            token = tokens_NT[text, t]
            # An unknown token must not alias the next state's first token in the combined key.
            key = np.where(token < num_types, state * num_types + token, -1)
            low, high = (np.searchsorted(self._arc_keys, key, side=side) for side in ("left", "right"))
            count = high - low
            entry = np.repeat(np.arange(len(text)), count)
            arc = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
            pair, merged = np.unique(text[entry] * self.num_states + arcs.target[arc], return_inverse=True)
            p = np.bincount(merged, p[entry] * np.exp(arcs.log_p[arc]), minlength=len(pair))
            text, state = np.divmod(pair, self.num_states)
            total_N = np.bincount(text, p, minlength=len(log_p_N))
            pending = np.isfinite(log_p_N) & (t <= lengths)
            with np.errstate(divide="ignore"):
                log_p_N[pending] += np.log(total_N[pending])
            p = p / total_N[text]
        return log_p_N


def _sorted_arcs(rows: list[dict[tuple[int, int], float]]) -> Arcs:
    flat = sorted((source, token, target, p) for source, row in enumerate(rows) for (token, target), p in row.items())
    source, token, target = (np.array([arc[i] for arc in flat], dtype=np.int64) for i in range(3))
    first = np.searchsorted(source, np.arange(len(rows) + 1))
    return Arcs(source, token, target, np.log([arc[3] for arc in flat]), first)
