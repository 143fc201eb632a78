"""Detokenizers: pure functions that turn tokenised text back into natural text.

They follow the conventions of the published zero-shot perplexities (kuleshov-group/mdlm; they go back to GPT-2), errors
included, because perplexities are comparable only on the same characters. Functions say where they differ.
"""

import re
from collections.abc import Callable

VERSION = 1  # raise it whenever a change below gives other characters for the same text

_NUMERAL = " 1 "  # replaces PTB's N, "some number"


def wikitext(text: str) -> str:
    """Detokenise WikiText (Merity et al., 2016): ` @-@ ` in words, spaces around signs, ` = = Heading = = `.

    Differs from the published convention twice: blanks at the end of the text are removed, as at the end of a line, and
    `/' 5/` is unchanged (see `published_wikitext`).
    """
    return _wikitext(text).rstrip(" ")


def published_wikitext(text: str) -> str:
    """Detokenise WikiText as the reference projects do, errors included (data.protocol=reference)."""
    return _wikitext(re.sub("/' [0-9]/", "/'[0-9]/", text))


def _wikitext(text: str) -> str:
    text = text.replace("s '", "s'")
    for sign in "-,.":
        text = text.replace(f" @{sign}@ ", sign)
    text = _join_to_the_left(text, ":;.!?,")
    for pair in ("()", "[]", "{}", '""', "''"):
        text = _tighten(text, pair, any_space=True)
    text = re.sub(r"(?<==) (?==)", "", text)
    text = text.replace(" ° ", "°").replace(" \n", "\n").replace("\n ", "\n").replace(" N ", _NUMERAL)
    return text.replace(" 's", "'s")


def ptb(text: str) -> str:
    """Detokenise Penn Treebank for language models (Mikolov et al., 2010): lower case, N for numbers, <unk>.

    Blanks around the text are removed too, because Mikolov's files have them and the Hub does not.
    """
    text = text.strip().replace(" 's", "'s").replace("s ' ", "s' ").replace(" n't", "n't")
    text = text.replace(" \n ", "\n").replace("\\/", "/")
    text = re.sub(r"(?<= )N(?= )", _NUMERAL.strip(), text)
    return text.replace("$ 1", "$1").replace("# 1", "#1").replace("<unk>", "?")


def lm1b(text: str) -> str:
    """Detokenise One Billion Words (Chelba et al., 2013): a sentence with a space before every sign."""
    text = re.sub(r"(https?) : / / ", r"\1://", text)
    text = re.sub(r" '(\w+)", r"'\1", text)
    text = re.sub(r" (\w+) \. ", r" \1. ", text)
    text = re.sub(r" (\w+) \.$", r" \1.", text)
    for sign in "?!":
        text = re.sub(rf" \{sign}$", sign, _join_to_the_left(text, sign))
    text = _join_to_the_left(text, ",:;").replace(" / ", "/")
    for pair in ('""', "''", "()", "[]"):
        text = _tighten(text, pair, any_space=False)
    return text.replace("$ ", "$").replace("£ ", "£")


def lambada(text: str) -> str:
    """Detokenise OpenAI's version of LAMBADA (Paperno et al., 2016): straight quotation marks, a leading line feed."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def _join_to_the_left(text: str, signs: str) -> str:
    """Attach free-standing signs to the word before them."""
    for sign in signs:
        text = text.replace(f" {sign} ", f"{sign} ")
    return text


def _tighten(text: str, pair: str, any_space: bool) -> str:
    """Remove white space inside a pair of signs; without any_space only single blanks on both sides."""
    first, last = (re.escape(sign) for sign in pair)
    if any_space:
        return re.sub(rf"{first}\s*([^{last}]*?)\s*{last}", lambda m: f"{pair[0]}{m[1]}{pair[1]}", text)
    return re.sub(rf"{first} ([^{first}{last}]+) {last}", lambda m: f"{pair[0]}{m[1]}{pair[1]}", text)


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "wikitext": wikitext, "ptb": ptb, "lm1b": lm1b, "lambada": lambada,
    "scientific_papers": lambda text: lm1b(wikitext(text)),  # lower-case arXiv and PubMed (Cohan et al., 2018)
    "published_wikitext": published_wikitext,
    "published_scientific_papers": lambda text: lm1b(published_wikitext(text)),
}  # fmt: skip
PUBLISHED = {"wikitext": "published_wikitext", "scientific_papers": "published_scientific_papers"}  # ours -> theirs


def detokenizer(name: str) -> Callable[[str], str]:
    """Return the function of that name. Raises ValueError with the names that exist."""
    if name not in DETOKENIZERS:
        raise ValueError(f"detokenizer={name} is none of {', '.join(DETOKENIZERS)}; or null for none")
    return DETOKENIZERS[name]
