"""Attributes of a review, such as its sentiment: the choices of the grammar (corpora/reviews.py), parsed from the text.

A review has four sentences: an opening, a judgement of story and acting, one of music and look, a verdict. A sentence
has a form and polarity if the grammar can write it with them, which identifies both. Texts of the corpus are thus
parsed without error, and of generated texts all that is well-formed.

Shape suffixes: N texts, A attributes.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from palimpsest.corpora import reviews
from palimpsest.corpora.grammar import Choice, FiniteStateGrammar

UNREAD = -1
SENTIMENTS = reviews.ReviewGrammar.label_names
_TOPICS = tuple(word for _, word in (*reviews.KINDS.options, *reviews.COMPANY.options))
_SUBJECTS = tuple(tuple(" ".join(word for group in groups for word in group).split()) for groups in reviews.GROUPS)

# Attribute -> names of its values. `class` is the label; a sentiment is that of the main judgement; a subject is the
# (first) aspect that is judged; the topic is the kind of film, or the person who chose it.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "class": SENTIMENTS, "opening": reviews.OPENINGS, "topic": _TOPICS,
    "story_sentiment": SENTIMENTS, "story_form": reviews.JUDGEMENTS, "story_subject": _SUBJECTS[0],
    "music_sentiment": SENTIMENTS, "music_form": reviews.JUDGEMENTS, "music_subject": _SUBJECTS[1],
    "verdict_sentiment": SENTIMENTS, "verdict_form": reviews.VERDICT_FORMS,
}  # fmt: skip
_COLUMNS = {name: column for column, name in enumerate(ATTRIBUTES)}
# Probability that the polarity of a sentence agrees with the class.
_AGREES = {"story_sentiment": reviews.P_ASPECT_AGREES, "music_sentiment": reviews.P_ASPECT_AGREES,
         "verdict_sentiment": reviews.P_VERDICT_AGREES}  # fmt: skip


def read_attributes(texts: Sequence[str], labels: Sequence[int] | None = None) -> np.ndarray:
    """Return the value of each of ATTRIBUTES, (N, A) int64, UNREAD if none or several sentences of a text can be the
    part that shows it. The class is the label if labels are given, else the one preferred by the grammar's posterior
    given the polarities that could be read."""
    found_NA = np.full((len(texts), len(ATTRIBUTES)), UNREAD)
    sentences = [_sentences(text) for text in texts]
    distinct = sorted({sentence for row in sentences for sentence in row})
    number = {sentence: i for i, sentence in enumerate(distinct)}
    for part, forms in _grammars().items():
        read = _read(distinct, forms)
        for text, row in enumerate(sentences):
            fitting = [number[sentence] for sentence in row if number[sentence] in read]
            if len(fitting) == 1:
                for name, value in _values(part, distinct[fitting[0]], *read[fitting[0]]).items():
                    found_NA[text, _COLUMNS[name]] = value
    found_NA[:, _COLUMNS["class"]] = _classes(found_NA) if labels is None else labels
    return found_NA


def _sentences(text: str) -> list[tuple[str, ...]]:
    found, sentence = [], []
    for token in reviews.tokens(text):
        sentence.append(token)
        if token == ".":
            found.append(tuple(sentence))
            sentence = []
    return found


@lru_cache(maxsize=1)
def _grammars() -> dict[str, dict[tuple[int | None, int], FiniteStateGrammar]]:
    """Return the grammar of the sentences, by part of a review ("verdict", ...) and then by (polarity, form)."""

    def forms(choice: Choice, polarity: int | None = None) -> dict[tuple[int | None, int], FiniteStateGrammar]:
        return {(polarity, form): FiniteStateGrammar(option) for form, (_, option) in enumerate(choice.options)}

    story, music = (
        forms(reviews.judgement(groups, 0), 0) | forms(reviews.judgement(groups, 1), 1) for groups in reviews.GROUPS
    )
    verdict = forms(reviews.verdict(0), 0) | forms(reviews.verdict(1), 1)
    return {"opening": forms(reviews.opening()), "story": story, "music": music, "verdict": verdict}


def _read(
    sentences: Sequence[tuple[str, ...]], forms: dict[tuple[int | None, int], FiniteStateGrammar]
) -> dict[int, tuple[int | None, int]]:
    """Return number of a sentence -> its polarity and form, for sentences that have them."""
    words = frozenset().union(*(grammar.vocabulary for grammar in forms.values()))
    left = [i for i, sentence in enumerate(sentences) if words.issuperset(sentence)]
    found: dict[int, tuple[int | None, int]] = {}
    for key, grammar in forms.items():
        known = frozenset(grammar.vocabulary)
        likely = [i for i in left if grammar.min_tokens <= len(sentences[i]) <= grammar.max_tokens
                  and known.issuperset(sentences[i])]  # fmt: skip
        log_p = grammar.log_prob([sentences[i] for i in likely]) if likely else []
        found |= {i: key for i, p in zip(likely, log_p, strict=True) if np.isfinite(p)}
        left = [i for i in left if i not in found]  # no sentence has two forms
    return found


def _values(part: str, sentence: tuple[str, ...], polarity: int | None, form: int) -> dict[str, int]:
    if part == "opening":
        return {"opening": form, "topic": next(_TOPICS.index(word) for word in sentence if word in _TOPICS)}
    values = {f"{part}_sentiment": polarity, f"{part}_form": form}
    if part != "verdict":
        subjects = ATTRIBUTES[f"{part}_subject"]
        values[f"{part}_subject"] = next(subjects.index(word) for word in sentence if word in subjects)
    return values


def _classes(found_NA: np.ndarray) -> np.ndarray:
    odds_N = np.zeros(len(found_NA))
    for name, agrees in _AGREES.items():
        sentiment_N = found_NA[:, _COLUMNS[name]]
        sign_N = np.where(sentiment_N == UNREAD, 0, 2 * sentiment_N - 1)
        odds_N += sign_N * np.log(agrees / (1 - agrees))
    return np.where(np.abs(odds_N) < 1e-9, UNREAD, (odds_N > 0).astype(np.int64))
