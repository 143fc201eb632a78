"""The embedded corpus (`data=reviews`): short film reviews in two classes from a grammar of our own.

A review introduces a film, judges two groups of aspects, and closes with a verdict. Verbs agree with their subject
across whatever stands between ("the songs in places feel"). Each judgement has a latent sentiment that agrees with
the class most of the time; it is told plainly ("feels truly dull") or by negating its opposite ("never feels
clever"), and contrasts ("..., but ...") hold one judgement of each kind. So single words say little about the class,
clauses nearly all.

Every clause is CLAUSE_TOKENS long (words and punctuation), a review four to six of them. So a text's length tells
where its clauses begin, and what is left to learn is their words.

Swapping the two polarities maps one class onto the other word for word; hence lengths say nothing about the class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import datasets
import numpy as np

from palimpsest.common.values import Count, Seed
from palimpsest.corpora.grammar import Expression, FiniteStateGrammar, chain, weighted, words
from palimpsest.data.rows import check_split, text_rows

CLAUSE_TOKENS = 8
MIN_TOKENS, MAX_TOKENS = 16, 64
SPLITS = ("train", "validation", "test")
TOKEN = re.compile(r"[A-Za-z]+|[.,!?;:]")

P_ASPECT_AGREES = 0.9
P_VERDICT_AGREES = 0.94
P_NEGATED = 0.32

# Index 0 is the negative list, 1 the positive one; words of equal rank are each other's opposites.
ADJECTIVES = (
    (
        "dull boring tedious clumsy predictable lifeless awful dreadful "
        "tiresome bland shallow messy hollow stale dreary forgettable"
    ),
    (
        "brilliant superb gripping charming clever moving wonderful splendid "
        "delightful fresh subtle elegant vivid inspired engaging memorable"
    ),
)
VERDICTS = (
    "disaster failure bore mess chore letdown disappointment",
    "triumph success joy marvel delight treat masterpiece",
)
FEELINGS = ("hated disliked loathed resented dreaded regretted", "loved enjoyed admired liked adored treasured")
ADVICE = ("avoid skip miss shun ignore", "see watch rent catch try")
WORTH = ("avoiding skipping missing ignoring forgetting", "seeing watching sharing owning remembering")
OPPOSITES = (ADJECTIVES, VERDICTS, FEELINGS, ADVICE, WORTH)

FILM = words("film movie")
KINDS = words(
    "new classic recent foreign famous strange quiet bold little modern short popular lengthy costly "
    "celebrated peculiar silent gloomy cheerful"
)
COMPANY = words("friends parents sister brother family cousins neighbours children uncle aunt husband wife roommates")
SEASONS = words("week month weekend summer winter year")
PEOPLE = words(
    "detectives soldiers teachers singers painters widows thieves lawyers doctors farmers strangers poets "
    "pilots nurses sailors miners dancers lovers"
)

# (singular, plural) subjects. A sentence is about one pair of groups, so that no aspect is judged twice.
STORY = ("plot story script premise ending pacing direction editing", "twists jokes surprises cuts scenes")
ACTING = ("acting cast chemistry dialogue narration humour", "actors performances characters lines speeches")
MUSIC = ("music score soundtrack rhythm singing", "songs melodies tunes")
LOOK = ("photography lighting scenery design", "costumes images effects colours")
GROUPS = ((STORY, ACTING), (MUSIC, LOOK))

# Names of the forms between which the parts of a review choose, in their order.
OPENINGS = ("seen", "chosen", "shown")
JUDGEMENTS = ("pair", "clause", "feeling", "contrast")
VERDICT_FORMS = ("found", "advice", "worth")

ADVERBS = words("truly really quite simply rather genuinely thoroughly remarkably deeply strangely oddly surprisingly")
NEVER = words("never hardly rarely scarcely seldom")
NOT = words("not never hardly scarcely")
LINKING = (words("feels seems proves remains becomes"), words("feel seem prove remain become"))
BE = ("is", "are")
TAILS = words("overall throughout though instead")


def _told(polarity: int, plain: Expression, negation: Expression, opposites: tuple[str, str]) -> Expression:
    """`plain` and a word of the polarity meant, or `negation` and a word of the other one."""
    return weighted(
        (1 - P_NEGATED, chain(plain, words(opposites[polarity]))),
        (P_NEGATED, chain(negation, words(opposites[1 - polarity]))),
    )


def _predicate(polarity: int, plural: int) -> Expression:
    """Three tokens: "feels truly dull", "is never clever", "hardly seems clever"."""
    plain = chain(weighted((0.4, BE[plural]), (0.6, LINKING[plural])), ADVERBS)
    negation = weighted((0.5, chain(BE[plural], NOT)), (0.5, chain(NEVER, LINKING[plural])))
    return _told(polarity, plain, negation, ADJECTIVES)


def _nouns(groups: tuple[tuple[str, str], ...], form: Callable[[str, int], Expression]) -> Expression:
    """`form` of the subjects of some groups, singular (0) or plural (1)."""
    return weighted(
        *((weight, form(group[plural], plural)) for group in groups for plural, weight in enumerate((0.6, 0.4)))
    )


def _pair(polarity: int, plural: int) -> Expression:
    """Five tokens, two words of one polarity: "is truly dull and shallow", "is never dull or shallow"."""
    halves = [" ".join(listing.split()[:8]) for listing in ADJECTIVES]
    others = [" ".join(listing.split()[8:]) for listing in ADJECTIVES]
    told = chain(BE[plural], ADVERBS, words(halves[polarity]), "and", words(others[polarity]))
    negated = chain(BE[plural], NOT, words(halves[1 - polarity]), "or", words(others[1 - polarity]))
    return weighted((1 - P_NEGATED, told), (P_NEGATED, negated))


def _clause(groups: tuple[tuple[str, str], ...], polarity: int, end: str) -> Expression:
    """A judgement whose verb agrees with the subject, not with the nouns of the place between them."""
    place = weighted((1.0, "in places"), (1.0, "at times"), (1.0, "in parts"), (1.0, "on screen"))
    return _nouns(groups, lambda noun, plural: chain("The", words(noun), place, _predicate(polarity, plural), end))


def judgement(groups: tuple[tuple[str, str], ...], polarity: int) -> Expression:
    """One clause on one of two groups of aspects, or two of opposite polarity on both; `polarity` is the main one's. A
    choice between the forms of JUDGEMENTS."""
    listed = _nouns(groups, lambda noun, plural: chain("The", words(noun), _pair(polarity, plural), "."))
    firsts, seconds = (weighted(*((1.0, words(listing)) for listing in group)) for group in groups)
    felt = weighted(
        (1 - P_NEGATED, chain(ADVERBS, words(FEELINGS[polarity]), "its", firsts, "and", seconds)),
        (P_NEGATED, chain(NEVER, words(FEELINGS[1 - polarity]), "its", firsts, "or", seconds)),
    )
    contrast = chain(
        _clause(groups[:1], 1 - polarity, ","),
        words("but yet"),
        _nouns(groups[1:], lambda noun, plural: chain("the", words(noun), _predicate(polarity, plural), TAILS, ".")),
    )
    return weighted(
        (0.30, listed), (0.30, _clause(groups, polarity, ".")), (0.20, chain("I", felt, ".")), (0.20, contrast)
    )


def opening() -> Expression:
    """How a review begins, as a choice between the forms of OPENINGS."""
    return weighted(
        (0.45, chain(words("I We"), words("watched saw rented caught"), "this", KINDS, FILM, "last", SEASONS, ".")),
        (0.30, chain("My", COMPANY, words("chose picked rented found"), "this", FILM, "last", SEASONS, ".")),
        (0.25, chain("Here is a", KINDS, FILM, "about", PEOPLE, ".")),
    )


def verdict(polarity: int) -> Expression:
    """How a review ends, as a choice between the forms of VERDICT_FORMS."""
    sure = words("truly really simply clearly certainly")
    return weighted(
        (
            0.35,
            chain(
                "I",
                _told(polarity, chain(sure, "found the", FILM, "a"), chain(NEVER, "found the", FILM, "a"), VERDICTS),
                ".",
            ),
        ),
        (
            0.35,
            chain("So", _told(polarity, sure, words("never"), ADVICE), "this", FILM, words("this next"), SEASONS, "."),
        ),
        (
            0.30,
            chain(
                "It is", _told(polarity, chain(sure, "a", FILM, "worth"), chain(NOT, "a", FILM, "worth"), WORTH), "."
            ),
        ),
    )


def _review(label: int) -> Expression:
    """Opening, a judgement on each of the GROUPS, verdict."""

    def agreeing(p_agrees: float, expressions: list[Expression]) -> Expression:
        return weighted((p_agrees, expressions[label]), (1 - p_agrees, expressions[1 - label]))

    middle = chain(
        *(agreeing(P_ASPECT_AGREES, [judgement(groups, polarity) for polarity in (0, 1)]) for groups in GROUPS)
    )
    return chain(opening(), middle, agreeing(P_VERDICT_AGREES, [verdict(polarity) for polarity in (0, 1)]))


def tokens(text: str) -> list[str]:
    """The words and punctuation marks of a text, in order."""
    return TOKEN.findall(text)


def detokenize(tokens: Sequence[str]) -> str:
    """Tokens as prose, with no space before punctuation. The inverse of `tokens` on the corpus."""
    return re.sub(r" (?=[.,!?;:])", "", " ".join(tokens))


def _generator(seed: int, *stream: int) -> np.random.Generator:
    # As a spawn key, because a seed's trailing zeros are dropped: [seed, 1] and [seed, 1, 0] are one stream.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)))


class ReviewGrammar:
    """The two laws p(text | class), sampled and computed exactly. Probabilities in nats.

    vocabulary: the distinct tokens of both classes, sorted.
    """

    label_names: tuple[str, ...] = ("negative", "positive")

    def __init__(self) -> None:
        self.grammars = tuple(FiniteStateGrammar(_review(label)) for label in range(len(self.label_names)))
        self.vocabulary = tuple(sorted({token for grammar in self.grammars for token in grammar.vocabulary}))

    def sample(self, num_texts: int, label: int, seed: int) -> list[str]:
        """`num_texts` independent reviews of a class; those of a smaller draw come first in a larger one."""
        return self._sample(num_texts, label, seed, stream=0)

    def _sample(self, num_texts: int, label: int, seed: int, stream: int) -> list[str]:
        rng = _generator(seed, stream, label)
        return [detokenize(text) for text in self._grammar(label).sample(num_texts, rng)]

    def _grammar(self, label: int) -> FiniteStateGrammar:
        if label not in range(len(self.label_names)):
            raise ValueError(f"label={label!r} is not a class of the reviews: 0 is negative, 1 is positive")
        return self.grammars[label]

    def log_prob(self, texts: Sequence[str], label: int) -> np.ndarray:
        """(N,) log p(text | class), nats; -inf for a text the grammar cannot write. Spacing is free."""
        # Characters that are neither words nor punctuation would vanish from the tokens: not a text of ours.
        split = [tokens(text) if not TOKEN.sub("", text).strip() else [text] for text in texts]
        return self._grammar(label).log_prob(split)

    def log_prob_length(self, num_tokens: Sequence[int], label: int) -> np.ndarray:
        """(N,) log p(number of tokens | class), nats; the same for both classes."""
        return self._grammar(label).log_prob_length(num_tokens)

    def mean_tokens(self, label: int) -> float:
        """Expected length of a review, in tokens."""
        lengths = np.arange(MAX_TOKENS + 1)
        return float(lengths @ np.exp(self.log_prob_length(lengths, label)))

    def entropy(self, label: int, given_length: bool = True) -> float:
        """Exact entropy of a review of the class, nats per text; without the length's share unless asked for.

        The derivation of a review can be read off its text, so that this is the entropy of the derivations.
        """
        log_p = self._grammar(label).log_prob_length(np.arange(MAX_TOKENS + 1))
        of_length = -float(sum(np.exp(x) * x for x in log_p[np.isfinite(log_p)]))
        return self._grammar(label).derivation_entropy() - given_length * of_length

    def entropy_per_token(self, label: int) -> float:
        """Exact entropy given the length, in nats per token: the least loss a model can reach."""
        return self.entropy(label) / self.mean_tokens(label)

    def posterior(self, texts: Sequence[str], prior: Sequence[float] = (0.5, 0.5)) -> np.ndarray:
        """(N, 2) p(class | text) by Bayes' rule; nan for a text that neither class can write."""
        with np.errstate(divide="ignore", invalid="ignore"):
            joint = np.stack([self.log_prob(texts, label) for label in (0, 1)], axis=1) + np.log(prior)
            p = np.exp(joint - joint.max(axis=1, keepdims=True))
            return p / p.sum(axis=1, keepdims=True)


def generate_split(split: str, num_texts_per_class: int, seed: int) -> dict[str, list]:
    """{"text": N strings, "label": N ints} with N = 2 * num_texts_per_class, the classes shuffled together.

    Every split draws from its own random stream, as does every seed. ValueError for a split not in SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not a split of the reviews: choose one of {', '.join(SPLITS)}")
    grammar, stream = ReviewGrammar(), 1 + SPLITS.index(split)
    classes = range(len(grammar.label_names))
    rows = [(text, label) for label in classes for text in grammar._sample(num_texts_per_class, label, seed, stream)]
    order = _generator(seed, stream, len(classes)).permutation(len(rows))
    return {"text": [rows[i][0] for i in order], "label": [rows[i][1] for i in order]}


class GeneratedReviews:
    """The embedded corpus as a source (data/sources.py): as many texts per class as asked, the two classes
    shuffled together."""

    splits = ("train", "validation", "test")
    label_names = ReviewGrammar.label_names

    def __init__(
        self, num_train_per_class: Count, num_validation_per_class: Count, num_test_per_class: Count, seed: Seed = 0
    ) -> None:
        self.sizes = dict(
            zip(self.splits, (num_train_per_class, num_validation_per_class, num_test_per_class), strict=True)
        )
        self.seed = seed

    def load(self, split: str) -> datasets.Dataset:
        """The split's rows. Raises ValueError for a split that does not exist."""
        check_split(split, self.splits)
        return _generated(split, self.sizes[split], self.seed)


@lru_cache(maxsize=8)  # half a second for each of many readers
def _generated(split: str, num_texts_per_class: int, seed: int) -> datasets.Dataset:
    rows = generate_split(split, num_texts_per_class, seed)
    return text_rows(rows["text"], rows["label"])
