"""Detokenizers: each convention on examples and on real lines; natural text is unchanged."""

from __future__ import annotations

import re

import pytest

from palimpsest.data.detokenizers import DETOKENIZERS, detokenizer

EXAMPLES = {
    "wikitext": [
        (" = Robert Boulter = \n", " = Robert Boulter =\n"),
        (" = = = Early life = = = ", " === Early life ==="),
        ("a mass of 6 kilograms ( 13 lb ) , and", "a mass of 6 kilograms (13 lb), and"),
        ("a well @-@ known 1 @,@ 000 metres , 0 @.@ 5 %", "a well-known 1,000 metres, 0.5 %"),
        ('only becoming " lobster red " on cooking .', 'only becoming "lobster red" on cooking .'),
        ("It is . It was ; it will : be ? Yes ! No , thanks", "It is. It was; it will: be? Yes! No, thanks"),
        ("the dogs ' tails", "the dogs' tails"),
        ("the dog 's tail", "the dog's tail"),
        ("the dogs ' and the cats ' tails", "the dogs'and the cats' tails"),  # an error of the convention: quotes
        ("see [ 1 ] and { 2 }", "see [1] and {2}"),
        ("at 30 ° C", "at 30°C"),
        ("first line \n second line ", "first line\nsecond line"),
    ],
    "ptb": [
        ("no it was n't black monday", "no it wasn't black monday"),
        ("revenue rose N N to $ N million from $ N million", "revenue rose 1 1 to $1 million from $1 million"),
        ("mr. <unk> 's shares", "mr. ?'s shares"),
        ("the traders ' rooms", "the traders' rooms"),
        ("and\\/or", "and/or"),
        (" the # N line \n", "the #1 line"),
    ],
    "lm1b": [
        ("The U.S. said it would , however , wait .", "The U.S. said it would, however, wait."),
        ("Is it ? Yes ! He 's right ; or : not ?", "Is it? Yes! He's right; or: not?"),
        ('He said " a good day " ( or two ) .', 'He said "a good day" (or two) .'),
        ("It costs $ 5 or £ 4 a day", "It costs $5 or £4 a day"),
        ("See http : / / example.org and / or [ 1 ]", "See http://example.org and/or [1]"),
        ("' a word ' , twice", "'a word', twice"),
    ],
    "lambada": [("“ yes , ” he said .  ", '\n" yes , " he said .'), ("\nalready", "\nalready")],
    "published_wikitext": [
        (" = Robert Boulter = \n", " = Robert Boulter =\n"),
        ("it ends with a blank ", "it ends with a blank "),
        ("and/' 5/ is an oddity", "and/'[0-9]/ is an oddity"),
    ],
    "published_scientific_papers": [("a fit/' 5/ in fig. 1 ,", "a fit/'[0-9]/ in fig. 1 ,")],
    "scientific_papers": [
        ("the model ( see fig . 1 ) is @xmath0 ,\n we show", "the model (see fig. 1) is @xmath0 ,\nwe show"),
        ('a " good " fit ; cf . [ 3 ] .', 'a "good" fit; cf. [3] .'),
    ],
}


@pytest.mark.parametrize(
    ("name", "text", "expected"), [(name, *pair) for name, pairs in EXAMPLES.items() for pair in pairs]
)
def test_examples(name, text, expected):
    assert detokenizer(name)(text) == expected


def test_every_detokeniser_has_examples():
    assert set(EXAMPLES) == set(DETOKENIZERS)


@pytest.mark.parametrize("name", sorted(DETOKENIZERS))
def test_ordinary_text_stays_as_it_is(name):
    text = "A well-known plot (see above) isn't new; it's from 1999, \"so what?\" she asked. Don't!"
    assert detokenizer(name)(text).lstrip("\n") == text
    assert detokenizer(name)("") in ("", "\n")


def test_an_unknown_name_lists_what_exists():
    with pytest.raises(
        ValueError, match=r"detokenizer=wiki is none of wikitext, ptb, lm1b, lambada, scientific_papers"
    ):
        detokenizer("wiki")


def lines(data_dir, name="valid"):
    return [line for line in (data_dir / "wikitext2" / f"{name}.txt").read_text().split("\n") if line.strip()]


def test_real_wikitext(data_dir):
    """Letters and digits keep their order; the marks of the tokenisation disappear."""
    found = [detokenizer("wikitext")(line) for line in lines(data_dir)]
    for before, after in zip(lines(data_dir), found, strict=True):
        assert re.findall(r"\w", after.replace("N", "1")) == re.findall(r"\w", before.replace("N", "1"))
    raw, text = "\n".join(lines(data_dir)), "\n".join(found)
    for mark in ("@-@", "@,@", "@.@", " , ", " ; ", "= =", "( "):
        assert text.count(mark) <= 0.02 * raw.count(mark), f"{mark!r} is left"
    assert found[0] == " = Homarus gammarus ="
    assert found[1].startswith(
        " Homarus gammarus, known as the European lobster or common lobster, is a species of <unk>"
    )
    assert "(24 in) and a mass of 6 kilograms (13 lb), and bears" in found[1]
    assert "weigh 0.7–2.2 kg" not in found[3] and "weigh 0.7 – 2.2 kg (1.5 – 4.9 lb)." in found[3]


@pytest.mark.parametrize("name", ["wikitext", "ptb", "lambada"])
def test_applied_twice_changes_nothing_more(data_dir, name):
    """Except for consecutive signs, of which the published convention moves every other one."""
    plain = [line for line in lines(data_dir) if not re.search(r"([:;.!?,'\"] ){2}", line)]
    assert len(plain) > 1000
    function = detokenizer(name)
    for text in map(function, plain):
        assert function(text) == text
