"""data.protocol=reference makes the rows of kuleshov-group's mdlm, whose steps are repeated here with `datasets`."""

from __future__ import annotations

import gzip
import itertools

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from palimpsest.corpora.text8 import Text8
from palimpsest.data.sources import Combined, HubOrFolder
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from tests.helpers.texts import text_data

LENGTH = 16
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "=", "\n", *(f"w{i}" for i in range(40))]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Return the folder of a tokenizer that frames each text like BERT and has a line feed token."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("bert")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
             "mask_token": "[MASK]"}  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return folder


def lines(number: int) -> list[str]:
    """Return a Hub file like WikiText's: headings, paragraphs, empty lines, each with its line feed."""
    made = []
    for i in range(number):
        words = " ".join(f"w{(7 * i + 3 * j) % 40}" for j in range(i % 11))
        made.append([f" = w{i % 40} = \n", f" {words} \n", ""][i % 3] if words or i % 3 != 1 else "")
    return made


def theirs(rows: list[str], tokenizer, num_proc: int) -> list[list[int]]:
    """Apply kuleshov-group/mdlm's preprocess_and_tokenize and _group_texts to contiguous shards."""
    end, begin = tokenizer.encode("[SEP]")[0], tokenizer.encode("[CLS]")[0]
    data, out = datasets.Dataset.from_dict({"text": rows}), []
    for number in range(num_proc):
        shard = data.shard(num_proc, number, contiguous=True)["text"][:]
        for start in range(0, len(shard), 1000):
            encoded = tokenizer(shard[start : start + 1000], add_special_tokens=False)["input_ids"]
            stream = list(itertools.chain(*([*ids, end] for ids in encoded)))
            inner = LENGTH - 2
            for place in range(0, len(stream) // inner * inner, inner):
                out.append([begin, *stream[place : place + inner], end])
    return out


def source(**more) -> HubOrFolder:
    return HubOrFolder(
        "Salesforce/wikitext",
        "look_alike",
        {"train": "train.txt", "test": "test.txt"},
        {"train": "train", "test": "test"},
        drop_blank=True,
        **more,
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    (tmp_path / "look_alike").mkdir()
    for split, number in (("train", 30), ("test", 2345)):
        # The file has a blank where the Hub has nothing.
        (tmp_path / "look_alike" / f"{split}.txt").write_text("".join(line or " \n" for line in lines(number)))
    return tmp_path


def rows_of(made_from, bert, folder, split="test", **more) -> list[list[int]]:
    data = text_data(
        made_from,
        length=LENGTH,
        tokenizer_name_or_path=str(bert),
        wrap=more.pop("wrap", True),
        cache_dir=folder / "cache",
        protocol="reference",
        **more,
    )
    return [list(map(int, row)) for row in data.split(split)["input_ids"]]


@pytest.mark.parametrize("num_proc", [None, 1, 3])
def test_wrapped_rows_are_the_references_token_by_token(bert, folder, num_proc):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert)
    expected = theirs(lines(2345), tokenizer, num_proc or 1)
    assert rows_of(source(), bert, folder, num_proc=num_proc) == expected
    assert {row[-1] for row in expected} == {2}, "the references end texts of a framing tokenizer with [CLS]"


def test_the_number_of_processes_changes_the_rows(bert, folder):
    assert rows_of(source(), bert, folder, num_proc=1) != rows_of(source(), bert, folder, num_proc=3)


def test_a_padded_text_that_is_cut_keeps_its_end_token(bert, folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bert)
    path = folder / "look_alike" / "test.txt"
    texts = [" ".join(f"w{i % 40}" for i in range(number)) for number in (3, 14, 15, 40)]
    path.write_text("".join(f"{text}\n" for text in texts))
    plain = HubOrFolder("someone/lines", "look_alike", {"test": "test.txt"}, {"test": "test"})
    expected = tokenizer(texts, max_length=LENGTH, truncation=True)["input_ids"]
    assert rows_of(plain, bert, folder, wrap=False, long_texts="truncate") == expected


def test_padded_rows_are_scored_with_their_frame(bert, folder):
    data = text_data(
        source(),
        length=LENGTH,
        tokenizer_name_or_path=str(bert),
        wrap=False,
        long_texts="truncate",
        cache_dir=folder / "cache",
        protocol="reference",
    )
    assert "observed" not in next(iter(data.eval_dataloader("test")))


def test_special_tokens_are_read_out_of_the_text_and_a_mask_is_refused(bert, folder):
    path = folder / "look_alike" / "test.txt"
    plain = HubOrFolder("someone/lines", "look_alike", {"test": "test.txt"}, {"test": "test"})
    path.write_text("w1 [SEP] w2\n" * 20)
    assert rows_of(plain, bert, folder)[0][1:6] == [WORDS.index("w1"), 3, WORDS.index("w2"), 2, WORDS.index("w1")]
    path.with_name("test.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    packed = HubOrFolder("someone/lines", "look_alike", {"test": "test.txt.gz"}, {"test": "test"})
    assert rows_of(packed, bert, folder) == rows_of(plain, bert, folder)
    path.write_bytes("é\n".encode("latin-1") * 20)
    with pytest.raises(ValueError, match=r"DATA_DIR=.*test.txt cannot be read: .*line 1"):
        rows_of(plain, bert, folder)
    path.write_text("w1 [MASK] w2\n" * 20)
    with pytest.raises(ValueError, match="mask token.*data.protocol"):
        rows_of(plain, bert, folder)


def test_named_data_sets_are_not_shuffled_and_joined_ones_follow(bert, folder):
    shuffled = source(shuffle=True)
    assert rows_of(shuffled, bert, folder) == rows_of(source(), bert, folder)
    joined = Combined({"a": source(), "b": source(shuffle=True)}, train="a", validation="a", test="b")
    assert rows_of(joined, bert, folder) == rows_of(source(), bert, folder)


def test_text8_drops_a_shorter_last_text(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    (tmp_path / "text8").mkdir()
    (tmp_path / "text8" / "text8").write_text("abcdefghij" * 10)
    whole = Text8(None, "text8", 16, {"train": 50, "validation": 25, "test": 25})
    assert [len(text) for text in whole.load("test")["text"]] == [16, 9]
    assert [len(text) for text in whole.published().load("test")["text"]] == [16]


def test_ours_and_theirs_differ(bert, folder):
    data = text_data(source(), length=LENGTH, tokenizer_name_or_path=str(bert), cache_dir=folder / "cache")
    assert [list(map(int, row)) for row in data.split("test")["input_ids"]] != rows_of(source(), bert, folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_proc": 4}, "data.num_proc=4.*data.protocol=reference"),
        ({"protocol": "reference", "streaming": True}, "data.streaming=false"),
        ({"protocol": "reference", "random_crop": True}, "data.random_crop=false"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        text_data(source(), length=LENGTH, tokenizer_name_or_path="word", **settings)


def test_the_protocol_is_part_of_a_training_only_where_it_is_set():
    ours, reference = (
        identity(compose_config(["data=wikitext2", *more])) for more in ([], ["data.protocol=reference"])
    )
    assert "data.protocol" not in ours and "data.num_proc" not in ours
    assert reference["data.protocol"] == "reference"
