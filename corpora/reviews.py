"""The embedded corpus (`data=reviews`): short film reviews in two classes, from a grammar of our own.

A review introduces a film, judges two groups of aspects, and closes with a verdict. Verbs agree with their subject
across the words between ("the songs in places feel"). Each judgement has a latent sentiment that agrees with the class
most of the time. It is expressed directly ("feels truly dull") or by negating its opposite ("never feels clever"), and
contrasts ("..., but ...") have one judgement of each kind. Single words thus say little about the class, clauses nearly
all.

Every clause has CLAUSE_TOKENS tokens (words and punctuation), a review four to six clauses. The length of a text thus
determines where its clauses begin, and only the words remain to be learned.

Swapping the two polarities maps one class onto the other word for word, so lengths say nothing about the class.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import datasets
import numpy as np

from palimpsest.common.values import Count, Seed
from palimpsest.corpora.grammar import Expression, FiniteStateGrammar, chain, weighted, words
from palimpsest.data.rows import check_split, from_table, text_table

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


def _stated(polarity: int, plain: Expression, negation: Expression, opposites: tuple[str, str]) -> Expression:
    """Return `plain` with a word of the polarity, or `negation` with a word of the opposite one."""
    return weighted(
        (1 - P_NEGATED, chain(plain, words(opposites[polarity]))),
        (P_NEGATED, chain(negation, words(opposites[1 - polarity]))),
    )


def _predicate(polarity: int, plural: int) -> Expression:
    """Return three tokens: "feels truly dull", "is never clever", "hardly seems clever"."""
    plain = chain(weighted((0.4, BE[plural]), (0.6, LINKING[plural])), ADVERBS)
    negation = weighted((0.5, chain(BE[plural], NOT)), (0.5, chain(NEVER, LINKING[plural])))
    return _stated(polarity, plain, negation, ADJECTIVES)


def _nouns(groups: tuple[tuple[str, str], ...], form: Callable[[str, int], Expression]) -> Expression:
    """Return `form` applied to the subjects of some groups, singular (0) or plural (1)."""
    return weighted(
        *((weight, form(group[plural], plural)) for group in groups for plural, weight in enumerate((0.6, 0.4)))
    )


def _pair(polarity: int, plural: int) -> Expression:
    """Return five tokens with two words of one polarity: "is truly dull and shallow", "is never dull or shallow"."""
    halves = [" ".join(listing.split()[:8]) for listing in ADJECTIVES]
    others = [" ".join(listing.split()[8:]) for listing in ADJECTIVES]
    plain = chain(BE[plural], ADVERBS, words(halves[polarity]), "and", words(others[polarity]))
    negated = chain(BE[plural], NOT, words(halves[1 - polarity]), "or", words(others[1 - polarity]))
    return weighted((1 - P_NEGATED, plain), (P_NEGATED, negated))


def _clause(groups: tuple[tuple[str, str], ...], polarity: int, end: str) -> Expression:
    """Return a judgement whose verb agrees with the subject, not with the nouns between them."""
    place = weighted((1.0, "in places"), (1.0, "at times"), (1.0, "in parts"), (1.0, "on screen"))
    return _nouns(groups, lambda noun, plural: chain("The", words(noun), place, _predicate(polarity, plural), end))


def judgement(groups: tuple[tuple[str, str], ...], polarity: int) -> Expression:
    """Return a judgement of some groups of aspects, a choice between the forms of JUDGEMENTS: one clause, or two of
    opposite polarity on two groups. `polarity` is that of the main one."""
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
    """Return the start of a review, a choice between the forms of OPENINGS."""
    return weighted(
        (0.45, chain(words("I We"), words("watched saw rented caught"), "this", KINDS, FILM, "last", SEASONS, ".")),
        (0.30, chain("My", COMPANY, words("chose picked rented found"), "this", FILM, "last", SEASONS, ".")),
        (0.25, chain("Here is a", KINDS, FILM, "about", PEOPLE, ".")),
    )


def verdict(polarity: int) -> Expression:
    """Return the end of a review, a choice between the forms of VERDICT_FORMS."""
    sure = words("truly really simply clearly certainly")
    found = _stated(polarity, chain(sure, "found the", FILM, "a"), chain(NEVER, "found the", FILM, "a"), VERDICTS)
    advice = _stated(polarity, sure, words("never"), ADVICE)
    worth = _stated(polarity, chain(sure, "a", FILM, "worth"), chain(NOT, "a", FILM, "worth"), WORTH)
    return weighted(
        (0.35, chain("I", found, ".")),
        (0.35, chain("So", advice, "this", FILM, words("this next"), SEASONS, ".")),
        (0.30, chain("It is", worth, ".")),
    )


def _review(label: int) -> Expression:
    """Return an opening, a judgement of each of the GROUPS, and a verdict."""

    def agreeing(p_agrees: float, expressions: list[Expression]) -> Expression:
        return weighted((p_agrees, expressions[label]), (1 - p_agrees, expressions[1 - label]))

    middle = chain(
        *(agreeing(P_ASPECT_AGREES, [judgement(groups, polarity) for polarity in (0, 1)]) for groups in GROUPS)
    )
    return chain(opening(), middle, agreeing(P_VERDICT_AGREES, [verdict(polarity) for polarity in (0, 1)]))


def tokens(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, in order."""
    return TOKEN.findall(text)


def detokenize(tokens: Sequence[str]) -> str:
    """Return tokens as prose, without a space before punctuation: the inverse of `tokens` on the corpus."""
    return re.sub(r" (?=[.,!?;:])", "", " ".join(tokens))


def _generator(seed: int, *stream: int) -> np.random.Generator:
    # A spawn key, because a list as seed loses its trailing zeros: [seed, 1] and [seed, 1, 0] are one stream.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)))


class ReviewGrammar:
    """The two distributions p(text | class), sampled and computed exactly, with probabilities in nats. `vocabulary` has
    the distinct tokens of both classes, sorted."""

    label_names: tuple[str, ...] = ("negative", "positive")

    def __init__(self) -> None:
        self.grammars = tuple(FiniteStateGrammar(_review(label)) for label in range(len(self.label_names)))
        self.vocabulary = tuple(sorted({token for grammar in self.grammars for token in grammar.vocabulary}))

    def sample(self, num_texts: int, label: int, seed: int, stream: int = 0) -> list[str]:
        """Draw `num_texts` independent reviews of a class; those of a smaller draw come first in a larger one."""
        rng = _generator(seed, stream, label)
        return [detokenize(text) for text in self._grammar(label).sample(num_texts, rng)]

    def _grammar(self, label: int) -> FiniteStateGrammar:
        if label not in range(len(self.label_names)):
            raise ValueError(f"label={label!r} is not a class of the reviews: 0 is negative, 1 is positive")
        return self.grammars[label]

    def log_prob(self, texts: Sequence[str], label: int) -> np.ndarray:
        """Return log p(text | class), (N,) nats; -inf for an impossible text. White space is ignored."""
        # Texts with other characters than words and punctuation, which `tokens` would drop, are impossible.
        split = [tokens(text) if not TOKEN.sub("", text).strip() else [text] for text in texts]
        return self._grammar(label).log_prob(split)

    def log_prob_length(self, num_tokens: Sequence[int], label: int) -> np.ndarray:
        """Return log p(number of tokens | class), (N,) nats; the same for both classes."""
        return self._grammar(label).log_prob_length(num_tokens)

    def mean_tokens(self, label: int) -> float:
        """Return the expected length of a review, in tokens."""
        lengths = np.arange(MAX_TOKENS + 1)
        return float(lengths @ np.exp(self.log_prob_length(lengths, label)))

    def entropy(self, label: int, given_length: bool = True) -> float:
        """Return the exact entropy of a review of the class in nats per text, given its length unless `given_length` is
        false. The derivation of a review follows from its text, so that this is the entropy of the derivations."""
        log_p = self._grammar(label).log_prob_length(np.arange(MAX_TOKENS + 1))
        of_length = -float(sum(np.exp(x) * x for x in log_p[np.isfinite(log_p)]))
        return self._grammar(label).derivation_entropy() - given_length * of_length

    def entropy_per_token(self, label: int) -> float:
        """Return the exact entropy given the length, in nats per token: the smallest loss that a model can reach."""
        return self.entropy(label) / self.mean_tokens(label)

    def posterior(self, texts: Sequence[str], prior: Sequence[float] = (0.5, 0.5)) -> np.ndarray:
        """Return p(class | text) by Bayes' rule, (N, 2); nan for a text that is impossible in both classes."""
        with np.errstate(divide="ignore", invalid="ignore"):
            joint = np.stack([self.log_prob(texts, label) for label in (0, 1)], axis=1) + np.log(prior)
            p = np.exp(joint - joint.max(axis=1, keepdims=True))
            return p / p.sum(axis=1, keepdims=True)


def generate_split(split: str, num_texts_per_class: int, seed: int) -> dict[str, list]:
    """Return {"text": N strings, "label": N ints} with N = 2 * num_texts_per_class, both classes shuffled together.
    Every split and every seed has its own random stream. Raises ValueError for a split not in SPLITS."""
    check_split(split, SPLITS)
    grammar, stream = ReviewGrammar(), 1 + SPLITS.index(split)
    classes = range(len(grammar.label_names))
    rows = [(text, label) for label in classes for text in grammar.sample(num_texts_per_class, label, seed, stream)]
    order = _generator(seed, stream, len(classes)).permutation(len(rows))
    return {"text": [rows[i][0] for i in order], "label": [rows[i][1] for i in order]}


class GeneratedReviews:
    """The embedded corpus as a source (data/sources.py), with a given number of texts per class in random order."""

    splits = SPLITS
    label_names = ReviewGrammar.label_names

    def __init__(
        self, num_train_per_class: Count, num_validation_per_class: Count, num_test_per_class: Count, seed: Seed = 0
    ) -> None:
        sizes = (num_train_per_class, num_validation_per_class, num_test_per_class)
        self.sizes, self.seed = dict(zip(self.splits, sizes, strict=True)), seed

    def load(self, split: str) -> datasets.Dataset:
        """Return the rows of a split. Raises ValueError if it does not exist."""
        check_split(split, self.splits)
        return _generated(split, self.sizes[split], self.seed)


@lru_cache(maxsize=8)  # generating takes half a second
def _generated(split: str, num_texts_per_class: int, seed: int) -> datasets.Dataset:
    rows = generate_split(split, num_texts_per_class, seed)
    return from_table(text_table(rows["text"], rows["label"]))
