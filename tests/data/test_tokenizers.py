"""Tokenizers: the vocabulary rule of the references, lossless round trips, caching by content, clear errors."""

import json
import os
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from palimpsest.data import tokenizers as ours
from palimpsest.data.tokenizers import MASK_SYMBOL, decode, encode, load_tokenizer, token_strings, vocabulary

ENGLISH = (
    "The plot isn't dull, but the ending feels (frankly) rushed.",
    'She said: "never boring!" - a well-made film, 8/10...',
    "Two  spaces, a tab\there.\n\nA new paragraph; café, naïve, it\u2019s 12.5%.",
    " a leading space, and a trailing one ",
    "x",
)
HOSTILE = ("[MASK] [EOS] [PAD] <|endoftext|> <mask> </s> <unk>", "日本語 🙂 \u2581\u0120", "\x00\x01\r\n", "a" * 5000)


def build(kind, tmp_path, texts=ENGLISH, vocab_size=None):
    size = 300 if kind == "bpe" and vocab_size is None else vocab_size
    return load_tokenizer(kind, texts=lambda: texts, vocab_size=size, cache_dir=tmp_path)


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_built_tokenizers_lose_nothing(kind, tmp_path):
    tokenizer = build(kind, tmp_path, ENGLISH + HOSTILE)
    for text, ids in zip(ENGLISH + HOSTILE, encode(tokenizer, ENGLISH + HOSTILE), strict=True):
        assert decode(tokenizer, ids) == text
        assert "".join(token_strings(tokenizer, ids)) == text


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_byte_level_tokenizers_know_every_text(kind, tmp_path):
    tokenizer = build(kind, tmp_path)
    for text, ids in zip(HOSTILE, encode(tokenizer, HOSTILE), strict=True):
        assert decode(tokenizer, ids) == text


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_built_vocabulary(kind, tmp_path):
    v = vocabulary(build(kind, tmp_path))
    assert (v.pad_id, v.bos_id, v.eos_id, v.mask_id) == (0, 2, 3, 4)
    assert v.size == {"byte": 261, "bpe": 300}.get(kind, v.size) and v.size > v.mask_id


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_special_tokens_in_a_text_are_ordinary_characters(kind, tmp_path):
    tokenizer = build(kind, tmp_path, HOSTILE)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for ids in encode(tokenizer, HOSTILE):
        assert not special & set(ids)


def test_word_tokens_keep_punctuation_tight_and_count_words(tmp_path):
    tokenizer = build("word", tmp_path)
    ids = encode(tokenizer, ["The plot isn't dull, but"])[0]
    assert token_strings(tokenizer, ids) == ["The", " plot", " isn't", " dull", ",", " but"]
    assert encode(tokenizer, ["plot"])[0] == [ids[1]], "one id for a word, wherever it stands"


def test_word_vocabulary_keeps_the_most_frequent(tmp_path):
    tokenizer = build("word", tmp_path, ["b b b a a c"], vocab_size=7)
    assert set(tokenizer.get_vocab()) - {"[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]"} == {" b", " a"}
    assert decode(tokenizer, encode(tokenizer, ["a c b"])[0]) == "a [UNK] b"


def test_masks_show_and_no_id_crashes(tmp_path):
    tokenizer = build("word", tmp_path)
    v = vocabulary(tokenizer)
    ids = [v.mask_id, *encode(tokenizer, ["plot, but"])[0], v.mask_id, 10**6, -1, v.eos_id, v.pad_id]
    shown = token_strings(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "".join(shown) == decode(tokenizer, ids) == f"{MASK_SYMBOL} plot, but {MASK_SYMBOL} \ufffd \ufffd[EOS][PAD]"
    assert decode(tokenizer, [*ids[1:4], v.eos_id, v.pad_id], skip_special=True) == "plot, but"
    assert decode(tokenizer, []) == ""


def test_a_character_of_several_bytes_shows_once(tmp_path):
    tokenizer = build("byte", tmp_path)
    ids = encode(tokenizer, ["né🙂"])[0]
    assert token_strings(tokenizer, ids) == ["n", "", "é", "", "", "", "🙂"]
    assert token_strings(tokenizer, ids[:2]) == ["n", "\ufffd"]


def test_a_mask_outside_the_tokenizer_shows(tmp_path):
    """Without a mask token, as in gpt2, the mask is the id after the last one."""
    tokenizer = bare({"a": 0, "b": 1, "<eos>": 2}, eos_token="<eos>")
    v = vocabulary(tokenizer)
    assert (v.mask_id, v.size, v.pad_id) == (3, 4, 2)
    assert MASK_SYMBOL in decode(tokenizer, [0, v.mask_id, 1])


def bare(vocab, **specials):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="a")), **specials)


def test_tokens_added_later_never_collide_with_the_mask():
    tokenizer = bare({"a": 0, "b": 1}, eos_token="b")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    v = vocabulary(tokenizer)
    assert tokenizer.vocab_size == 2 and v.pad_id == 2
    assert v.mask_id == 3 and v.size == 4


def test_a_pad_that_is_the_mask_is_not_used():
    v = vocabulary(bare({"a": 0, "b": 1, "<m>": 2}, eos_token="b", pad_token="<m>", mask_token="<m>"))
    assert (v.mask_id, v.pad_id, v.size) == (2, 1, 3)


def test_no_usable_pad_is_an_error():
    with pytest.raises(ValueError, match=r"data\.tokenizer_name_or_path=.*padding"):
        vocabulary(bare({"a": 0, "b": 1}))


def test_fingerprint_is_that_of_the_content(tmp_path):
    tokenizer = build("word", tmp_path)
    first = vocabulary(tokenizer).fingerprint
    tokenizer(["a b", "c"], padding=True, truncation=True, max_length=2)  # leaves its settings in the tokenizer
    assert vocabulary(tokenizer).fingerprint == first
    assert vocabulary(build("word", tmp_path, [*ENGLISH, "other"])).fingerprint != first
    code = (
        "import sys; from palimpsest.data.tokenizers import load_tokenizer, vocabulary; from pathlib import Path\n"
        "tokenizer = load_tokenizer('word', texts=lambda: sys.argv[2:], cache_dir=Path(sys.argv[1]))\n"
        "print(vocabulary(tokenizer).fingerprint)"
    )
    for seed in ("1", "2"):
        out = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed), *ENGLISH], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert out.stdout.strip() == first


def test_cache_follows_the_texts_and_the_size(tmp_path):
    ids = [
        vocabulary(build("bpe", tmp_path, t, n)).fingerprint
        for t, n in ((ENGLISH, 280), (ENGLISH, 290), (ENGLISH[:2], 280))
    ]
    assert len(set(ids)) == 3
    assert len(list(tmp_path.glob("tokenizer-bpe-*"))) == 3
    build("bpe", tmp_path, ENGLISH, 280)
    assert len(list(tmp_path.glob("tokenizer-bpe-*"))) == 3


def test_a_damaged_cache_is_built_again(tmp_path):
    first = vocabulary(build("word", tmp_path))
    (stored,) = tmp_path.glob("tokenizer-word-*")
    (stored / "tokenizer.json").write_text("{}")
    assert vocabulary(build("word", tmp_path)) == first
    (stored / "tokenizer.json").unlink()
    assert vocabulary(build("word", tmp_path)) == first


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(ours.BUILDERS, "word", lambda texts, size: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build("word", tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


@pytest.mark.parametrize(
    ("name", "vocab_size", "message"),
    [
        ("bpe", None, r"data\.vocab_size=null"),
        ("bpe", 100, r"data\.vocab_size=100 is too small"),
        ("char", 100, r"data\.vocab_size=100 applies to"),
        ("byte", 100, r"data\.vocab_size=100 applies to"),
        ("gpt2", 100, r"data\.vocab_size=100 applies to"),
        ("", None, r"char, byte, word, bpe"),
    ],
)
def test_settings_that_do_not_apply(name, vocab_size, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(name, texts=lambda: ENGLISH, vocab_size=vocab_size, cache_dir=tmp_path)


def test_an_absent_tokenizer_names_both_ways(tmp_path, monkeypatch):
    monkeypatch.setattr("palimpsest.data.hub._hub_has_address", lambda: False)
    monkeypatch.delenv("DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match=r"(?s)gpt2.*\$DATA_DIR/gpt2_tokenizer.*not set.*Hub"):
        load_tokenizer("gpt2", cache_dir=tmp_path, folder=None)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no 'gpt2_tokenizer'"):
        load_tokenizer("gpt2", cache_dir=tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"DATA_DIR=.*absent is not a directory"):
        load_tokenizer("gpt2", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer("./absent", cache_dir=tmp_path)


def test_a_folder_that_holds_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("not json")
    with pytest.raises(ValueError, match=r"data\.tokenizer_name_or_path=.*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "roberta", "t5", "xlm-roberta", "qwen2", "opt"])
def test_a_model_folder_without_tokenizer_files_is_refused(kind, tmp_path):
    """transformers would build a tokenizer without words."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    said = r"data\.tokenizer_name_or_path=.* is empty.*needs tokenizer\.json.*has config\.json"
    with pytest.raises(ValueError, match=said):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}'}, "is empty"),
        ({"config.json": '{"model_type": "bert"}', "vocab.json": "{}", "merges.txt": ""}, "is empty"),
        ({"config.json": '{"model_type": "bert"}', "vocab.txt": ""}, "cannot be read"),
        ({"config.json": '{"model_type": "bert"}', "vocab.txt": "version https://git-lfs."}, "git lfs"),
        ({"config.json": '{"model_type": "gpt2"}', "vocab.json": '{"a": 0}'}, "vocab.json with merges.txt"),
        ({"model.safetensors": ""}, "has model.safetensors"),
        ({}, "has nothing"),
        ({"tokenizer_config.json": "[]"}, "needs tokenizer.json"),
    ],
)
def test_incomplete_tokenizer_folders_are_refused_by_name(files, said, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"data\.tokenizer_name_or_path=.*{said}"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_files_may_know_every_byte(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(encode(tokenizer, ["日本"])[0]) == 6


def test_a_vocabulary_file_is_no_folder(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=rf"is a file; give the folder.*={tmp_path}$"):
        load_tokenizer(str(tmp_path / "vocab.json"))


def test_a_sentencepiece_model_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(ValueError, match="SentencePiece model tokenizer.model.*pip install sentencepiece"):
        load_tokenizer(str(tmp_path))


def test_the_code_of_a_tokenizer_folder_is_named(tmp_path):
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('code of a tokenizer folder was run')")
    with pytest.raises(ValueError, match=r"data\.tokenizer_name_or_path=.*auto_map.*PreTrainedTokenizerFast"):
        load_tokenizer(str(tmp_path))


def saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return str(folder)


def with_undeclared_mask(tmp_path, **added):
    tokenizer = bare({"a": 0, "b": 1, "<eos>": 2, "the": 3}, eos_token="<eos>")
    tokenizer.add_tokens(["<|mask|>"], **added)
    return saved(tokenizer, tmp_path / "own")


@pytest.mark.parametrize("special", [True, False])
def test_a_token_is_the_mask_that_its_tokenizer_does_not_declare(special, tmp_path):
    folder = with_undeclared_mask(tmp_path, special_tokens=special)
    plain, named = (vocabulary(load_tokenizer(folder, mask_token=token)) for token in (None, "<|mask|>"))
    assert (plain.size, plain.mask_id) == (6, 5) and (named.size, named.mask_id, named.pad_id) == (5, 4, 2)
    assert plain.fingerprint != named.fingerprint
    tokenizer = load_tokenizer(folder, mask_token="<|mask|>")
    assert decode(tokenizer, [4]) == MASK_SYMBOL
    assert 4 not in encode(tokenizer, ["<|mask|>"])[0], "a text cannot hold the mask"


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("<|msk|>", r"not in the vocabulary.*did you mean <\|mask\|>"),
        ("<eos>", "already the eos_token"),
        ("the", "a word that texts may hold"),
        ("", "not in the vocabulary"),
    ],
)
def test_a_mask_token_that_cannot_be_one_is_refused(token, said, tmp_path):
    with pytest.raises(ValueError, match=rf"data\.mask_token={re.escape(str(token))} .*{said}"):
        load_tokenizer(with_undeclared_mask(tmp_path), mask_token=token)


def test_another_mask_than_the_declared_one_is_refused(tmp_path):
    text8 = load_tokenizer("text8", mask_token="[MASK]")
    assert vocabulary(text8) == vocabulary(load_tokenizer("text8"))
    with pytest.raises(ValueError, match=r"data\.mask_token=a: the mask of .*text8 is \[MASK\]"):
        load_tokenizer("text8", mask_token="a")


def test_a_folder_cannot_run_code(tmp_path):
    build("byte", tmp_path / "cache").save_pretrained(tmp_path / "evil")
    (tmp_path / "evil" / "evil.py").write_text("raise SystemExit('code of a tokenizer folder was run')")
    config = json.loads((tmp_path / "evil" / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    (tmp_path / "evil" / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(str(tmp_path / "evil"))
    except ValueError as error:
        assert "data.tokenizer_name_or_path" in str(error)


def test_text8_has_the_entries_of_the_reference(tmp_path):
    tokenizer = load_tokenizer("text8", cache_dir=tmp_path)
    v = vocabulary(tokenizer)
    assert (v.size, v.mask_id, v.pad_id, v.bos_id, v.eos_id) == (35, 4, 5, 2, 3)
    assert tokenizer.convert_ids_to_tokens([0, 1, 6, 7, 8]) == ["[CLS]", "[SEP]", "[RESERVED]", "[UNK]", "a"]
    assert tokenizer.convert_ids_to_tokens([33, 34]) == ["z", " "]
    text = " the quick brown fox jumps over the lazy dog "
    (ids,) = encode(tokenizer, [text])
    assert len(ids) == len(text) and ids[:4] == [34, 27, 15, 12]
    assert decode(tokenizer, ids) == "".join(token_strings(tokenizer, ids)) == text
    assert encode(tokenizer, ["Az9[MASK]"])[0] == [8, 33, 7, 7, 20, 8, 26, 18, 7]
    assert decode(tokenizer, [8, 4, 34]) == f"a{MASK_SYMBOL} "
    assert vocabulary(load_tokenizer("text8", cache_dir=tmp_path)) == v and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"data\.vocab_size=35 applies to"):
        load_tokenizer("text8", vocab_size=35)


needs_data = pytest.mark.skipif("DATA_DIR" not in os.environ, reason="needs DATA_DIR with the public tokenizers")


@needs_data
def test_the_rule_of_the_references(tmp_path):
    gpt2 = vocabulary(load_tokenizer("gpt2", cache_dir=tmp_path))
    assert (gpt2.mask_id, gpt2.size, gpt2.bos_id, gpt2.eos_id) == (50257, 50258, 50256, 50256)
    assert gpt2.pad_id == 50256 != gpt2.mask_id
    bert = vocabulary(load_tokenizer("bert-base-uncased", cache_dir=tmp_path))
    assert (bert.mask_id, bert.size, bert.bos_id, bert.eos_id, bert.pad_id) == (103, 30522, 101, 102, 0)
    roberta = vocabulary(load_tokenizer("roberta-base", cache_dir=tmp_path))
    assert (roberta.mask_id, roberta.size, roberta.bos_id, roberta.eos_id, roberta.pad_id) == (50264, 50265, 0, 2, 1)


@needs_data
@pytest.mark.parametrize("name", ["gpt2", "roberta-base"])
def test_public_byte_level_round_trips(name, tmp_path):
    tokenizer = load_tokenizer(name, cache_dir=tmp_path)
    special = set(tokenizer.all_special_ids)
    for text, ids in zip(ENGLISH + HOSTILE, encode(tokenizer, ENGLISH + HOSTILE), strict=True):
        assert not special & set(ids)
        assert decode(tokenizer, ids) == text == "".join(token_strings(tokenizer, ids))


@needs_data
def test_gpt2_mask_and_bert_pieces_show(tmp_path):
    gpt2 = load_tokenizer("gpt2", cache_dir=tmp_path)
    assert decode(gpt2, [464, 50257, 2646, 50256]) == f"The {MASK_SYMBOL} film<|endoftext|>"
    bert = load_tokenizer("bert-base-uncased", cache_dir=tmp_path)
    ids = encode(bert, ["unaffable films"])[0]
    assert decode(bert, [*ids, 103]) == f"unaffable films {MASK_SYMBOL}"
    assert "".join(token_strings(bert, ids)) == "unaffable films"
