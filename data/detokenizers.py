"""Detokenisers: text that a data set keeps cut into tokens -> text as people write it. Pure functions str -> str.

They follow the conventions of the published zero-shot perplexities (kuleshov-group/mdlm; they go back to GPT-2),
oddities included: a perplexity is comparable only on the same characters. Where ours differ, the function says so.
"""

import re
from collections.abc import Callable

VERSION = 1  # raise it whenever a change below gives other characters for the same text

_NUMERAL = " 1 "  # what stands for PTB's N, "some number"


def wikitext(text: str) -> str:
    """WikiText (Merity et al., 2016): ` @-@ ` within words, spaces around every sign, ` = = Heading = = `.

    Differs from the published convention in two places: blanks at the end of the text go, as they do at a line end, and
    `/' 5/` stays as it is (`published_wikitext`).
    """
    return _wikitext(text).rstrip(" ")


def published_wikitext(text: str) -> str:
    """Detokenise WikiText as the reference projects do, oddities included (data.protocol=reference)."""
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
    """Penn Treebank as language models use it (Mikolov et al., 2010): lower case, N for numbers, <unk> for rare words.

    Blanks around the text go too: Mikolov's files have them, the Hub has not.
    """
    text = text.strip().replace(" 's", "'s").replace("s ' ", "s' ").replace(" n't", "n't")
    text = text.replace(" \n ", "\n").replace("\\/", "/")
    text = re.sub(r"(?<= )N(?= )", _NUMERAL.strip(), text)
    return text.replace("$ 1", "$1").replace("# 1", "#1").replace("<unk>", "?")


def lm1b(text: str) -> str:
    """One Billion Words (Chelba et al., 2013): a sentence with a space before every sign."""
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
    """LAMBADA (Paperno et al., 2016) in OpenAI's version: straight quotation marks, a line of its own."""
    return "\n" + text.replace("“", '"').replace("”", '"').strip()


def scientific_papers(text: str) -> str:
    """arXiv and PubMed articles (Cohan et al., 2018), cut into lower-case tokens: `wikitext`, then `lm1b`."""
    return lm1b(wikitext(text))


def published_scientific_papers(text: str) -> str:
    """Detokenise arXiv and PubMed articles as the reference projects do (data.protocol=reference)."""
    return lm1b(published_wikitext(text))


def _join_to_the_left(text: str, signs: str) -> str:
    """Signs that stand alone move to the word before them."""
    for sign in signs:
        text = text.replace(f" {sign} ", f"{sign} ")
    return text


def _tighten(text: str, pair: str, any_space: bool) -> str:
    """White space just inside a pair of signs goes; any_space false: only where one blank stands on either side."""
    first, last = (re.escape(sign) for sign in pair)
    if any_space:
        return re.sub(rf"{first}\s*([^{last}]*?)\s*{last}", lambda m: f"{pair[0]}{m[1]}{pair[1]}", text)
    return re.sub(rf"{first} ([^{first}{last}]+) {last}", lambda m: f"{pair[0]}{m[1]}{pair[1]}", text)


DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "wikitext": wikitext, "ptb": ptb, "lm1b": lm1b, "lambada": lambada, "scientific_papers": scientific_papers,
    "published_wikitext": published_wikitext, "published_scientific_papers": published_scientific_papers,
}  # fmt: skip
PUBLISHED = {"wikitext": "published_wikitext", "scientific_papers": "published_scientific_papers"}  # ours -> theirs


def detokenizer(name: str) -> Callable[[str], str]:
    """The function of that name. Raises ValueError listing the names there are."""
    if name not in DETOKENIZERS:
        raise ValueError(f"detokenizer={name} is none of {', '.join(DETOKENIZERS)}; or null for none")
    return DETOKENIZERS[name]
