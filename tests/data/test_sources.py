"""Sources: every file format, disjoint and fixed splits, labels, and one clear error for each bad input."""

import json
import os

import datasets
import pyarrow as pa
import pytest
import yaml

from palimpsest.corpora import reviews
from palimpsest.corpora.reviews import GeneratedReviews
from palimpsest.data.rows import at_most, carve, keep_label
from palimpsest.data.sources import HubOrFolder
from palimpsest.data.tables import read
from palimpsest.data.tables import write as write_table
from palimpsest.data.user_files import UserFiles
from tests.helpers.commands import ROOT

TEXTS = [f'Text {i}, with "quotes"\tand a tab' for i in range(40)]


def write(folder, kind, texts=TEXTS, labels=None, name="data"):
    path = folder / f"{name}.{kind}"
    columns = {"text": list(texts)} | ({"label": list(labels)} if labels is not None else {})
    frame = datasets.Dataset.from_dict(columns).to_pandas()
    if kind == "txt":
        path.write_text("\n\n".join(texts) + "\n")
    elif kind in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    return str(path)


def all_texts(source):
    return [text for split in source.splits for text in source.load(split)["text"]]


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "json", "jsonl", "parquet"])
def test_user_files_of_every_format(kind, tmp_path):
    source = UserFiles(write(tmp_path, kind), validation_share=0.1, test_share=0.2)
    assert [len(source.load(split)) for split in source.splits] == [28, 4, 8]
    assert sorted(all_texts(source)) == sorted(TEXTS)
    assert source.label_names is None
    again = UserFiles(write(tmp_path, kind), validation_share=0.1, test_share=0.2)
    assert all_texts(again) == all_texts(source)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("labels", [[0, 1] * 20, ["pos", "neg"] * 20])
def test_labels_of_every_format(kind, labels, tmp_path):
    source = UserFiles(write(tmp_path, kind, labels=labels), label_column="label")
    number = {"pos": 1, "neg": 0, 0: 0, 1: 1}
    expected = {text: number[label] for text, label in zip(TEXTS, labels, strict=True)}
    for split in source.splits:
        rows = source.load(split)
        assert [expected[text] for text in rows["text"]] == rows["label"][:]
    assert source.label_names == (("neg", "pos") if labels[0] == "pos" else ("0", "1"))


def test_folders_globs_and_files_of_their_own(tmp_path):
    for i in range(3):
        write(tmp_path, "txt", TEXTS[i * 10 : i * 10 + 10], name=f"part{i}")
    (tmp_path / "README.md").write_text("not data")
    held = write(tmp_path / "..", "txt", TEXTS[30:], name=f"{tmp_path.name}-held")
    for path in (tmp_path, tmp_path / "part*.txt"):
        source = UserFiles(str(path), validation_path=held, test_path=held)
        assert source.load("train")["text"][:] == TEXTS[:30]
        assert source.load("validation")["text"][:] == source.load("test")["text"][:] == TEXTS[30:]


def test_values_are_read_as_they_are(tmp_path):
    """No text turns into a number or a missing value; other line separators do not end a line of a txt
    file."""
    odd = ["NA", "null", "007", "1e3", " ", "a\u2028b\x85c\x0cd", "é"]
    (tmp_path / "a.csv").write_text("text\n" + "\n".join(f'"{t}"' for t in odd) + "\n")
    source = UserFiles(str(tmp_path / "a.csv"), validation_share=0.1, test_share=0.1)
    assert sorted(all_texts(source)) == sorted(odd)
    (tmp_path / "a.txt").write_bytes("\ufeffa\u2028b\x85c\r\nNA\n \n\nlast".encode())
    source = UserFiles(str(tmp_path / "a.txt"), validation_share=0.1, test_share=0.1)
    assert sorted(all_texts(source)) == ["NA", "a\u2028b\x85c", "last"]


def carved(folder, shares, seed):
    folder.mkdir()
    write_table(folder / "whole", [pa.table({"text": [f"t{i % 30}" for i in range(60)]})])
    carve(folder / "whole", folder, shares, seed)
    return {path.stem: pa.concat_tables(read(path))["text"].to_pylist() for path in folder.glob("*.arrow")}


def test_carved_splits_share_no_text(tmp_path):
    parts = carved(tmp_path / "a", {"validation": 0.2, "test": 0.1}, seed=0)
    assert len(parts["validation"]) == 12 and len(parts["test"]) == 6
    assert not set(parts["train"]) & {*parts["validation"], *parts["test"]}
    assert parts["validation"] != carved(tmp_path / "b", {"validation": 0.2}, seed=1)["validation"]


def test_keep_label_and_limits():
    rows = datasets.Dataset.from_dict({"text": list("abcdef"), "label": [0, 0, 0, 1, 1, 1]})
    assert keep_label(rows, 1, ("no", "yes"), "test")["text"][:] == ["d", "e", "f"]
    assert len(at_most(rows, 4)) == 4 and at_most(rows, 4)["text"][:] == at_most(rows, 4)["text"][:]
    assert at_most(rows.remove_columns("label"), 2)["text"][:] == ["a", "b"]
    for label in (2, -1, True, "yes", 1.0):
        with pytest.raises(ValueError, match=r"data\.label=.*0 \(no\), 1 \(yes\)"):
            keep_label(rows, label, ("no", "yes"), "test")
    with pytest.raises(ValueError, match=r"data\.label=2: the test split has no text of class maybe"):
        keep_label(rows, 2, ("no", "yes", "maybe"), "test")
    with pytest.raises(ValueError, match="have no labels"):
        keep_label(rows.remove_columns("label"), 0, None, "test")


def user(tmp_path, content, name="a.jsonl", **kwargs):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return lambda: UserFiles(str(tmp_path / name), **kwargs).load("train")


LABELLED = {"label_column": "label"}
NAMED = LABELLED | {"label_names": ["n", "p"]}


@pytest.mark.parametrize(
    ("content", "name", "kwargs", "message"),
    [
        ('{"body": "a", "stars": 1}', "a.jsonl", {}, r"'text' \(data\.text_column=text\); it has body, stars"),
        ('{"text": "a"}', "a.jsonl", LABELLED, r"no column 'label' \(data\.label_column=label\); it has text"),
        ('{"text": "a"}\n{"text": null}', "a.jsonl", {}, r"line 2, row 1 of column 'text' is null"),
        ('{"text": "a"}\n{"text": 3}', "a.jsonl", {}, r"row 1 of column 'text'"),
        ('{"text": ["a"]}', "a.jsonl", {}, r"row 0 of column 'text'"),
        ('{"text": "a"}\n{broken', "a.jsonl", {}, r"data\.path=.*a\.jsonl cannot be read"),
        ("[1, 2]", "a.json", {}, r"cannot be read: row 0 is 1, not an object"),
        ("not parquet", "a.parquet", {}, r"data\.path=.*a\.parquet cannot be read"),
        (b"\xff\xfe\xff", "a.txt", {}, r"data\.path=.*a\.txt cannot be read"),
        ("", "a.csv", {}, r"cannot be read"),
        ("", "a.txt", {}, r"holds no text"),
        (" \n\n", "a.txt", {}, r"holds no text"),
        ("text\n", "a.csv", {}, r"holds no text"),
        ("text,label\n", "a.csv", LABELLED, r"holds no text"),
        ("[]", "a.json", {}, r"data\.text_column=text|holds no text"),
        ("one line", "a.txt", {}, r"1 texts are too few"),
        ("a\n" * 50, "a.txt", {}, r"too much alike"),
        ("x", "a.docx", {}, r"files of type \.docx cannot be read; give one of txt, csv"),
        ("text,label\na,0\nb,-1\nc,0", "a.csv", LABELLED, r"the labels are -1, 0; a negative one"),
        ("text,label\na,x\nb,\nc,y", "a.csv", LABELLED, r"row 1 of column 'label' is ''"),
        ("text,label\na,x\nb,x\nc,x", "a.csv", LABELLED, r"one label only \(x\)"),
        ('{"text": "a", "label": 1.5}', "a.jsonl", LABELLED, r"row 0 of column 'label' is 1\.5"),
        ('{"text": "a", "label": true}', "a.jsonl", LABELLED, r"row 0 of column 'label' is True"),
        ("text,label\na,0\nb,2", "a.csv", NAMED, r"line 3, row 1 of column 'label' is '2'.*0 \(n\), 1"),
        ("text,label\na,n\nb,q", "a.csv", NAMED, r"line 3, row 1 of column 'label' is 'q'.*0 \(n\)"),
    ],
)  # fmt: skip
def test_bad_user_files(content, name, kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        user(tmp_path, content, name, **kwargs)()


def test_labels_must_agree_across_splits(tmp_path):
    train = write(tmp_path, "csv", labels=["neg", "pos"] * 20)
    test = write(tmp_path, "csv", TEXTS[:2], ["neg", "meh"], name="test")
    with pytest.raises(ValueError, match=r"test\.csv .*row 1 of column 'label' is 'meh'.*0 \(neg\), 1 \(pos\)"):
        UserFiles(train, label_column="label", test_path=test).load("train")


def test_absent_files(tmp_path):
    for path in ("absent.txt", "*.nothing"):
        with pytest.raises(FileNotFoundError, match=r"data\.path=.*no such file"):
            UserFiles(str(tmp_path / path)).load("train")
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*holds no file of txt, csv"):
        UserFiles(str(tmp_path)).load("train")
    with pytest.raises(FileNotFoundError, match=r"data\.test_path=absent"):
        UserFiles(write(tmp_path, "txt"), test_path="absent").load("train")
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        UserFiles(None)


# -------------------------------------------------------------------------------- named data sets


def named(**kwargs):
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    return HubOrFolder("someone/some-set", "some_set", files, {"train": "train", "test": "test[:50%]"}, **kwargs)


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    (tmp_path / "some_set").mkdir()
    for split, texts in (("train", TEXTS), ("test", TEXTS[:5])):
        write(tmp_path / "some_set", "jsonl", texts, [i % 2 for i in range(len(texts))], name=split)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the Hub was asked"))
    return tmp_path


def test_the_folder_comes_first(data_dir):
    source = named(label_column="label", label_names=["n", "p"], validation_share=0.25, shuffle=True)
    assert source.splits == ("train", "validation", "test")
    train, validation = source.load("train"), source.load("validation")
    assert (len(train), len(validation)) == (30, 10)
    assert not set(train["text"]) & set(validation["text"])
    assert train["text"][:] != sorted(train["text"]), "shuffled"
    assert all(TEXTS.index(row["text"]) % 2 == row["label"] for row in train)
    with pytest.raises(ValueError, match="no split 'valid'; there are train, validation, test"):
        source.load("valid")


def test_columns_are_joined_and_blank_texts_dropped(data_dir):
    rows = [{"q": "a", "r": "b\n"}, {"q": " ", "r": "\n"}, {"q": "c", "r": "d"}]
    (data_dir / "some_set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = named(text_columns=["q", "r"], parts=["{q} | {r}"], drop_blank=False)
    assert source.load("train")["text"][:] == ["a | b\n", "  | \n", "c | d"]
    source = named(text_columns=["q", "r"], parts=["{q}{r}"], drop_blank=True)
    assert source.load("train")["text"][:] == ["ab", "cd"]
    with pytest.raises(ValueError, match=r"train\.jsonl .* no column 'question'; it has q, r"):
        named(text_columns=["question", "r"], parts=["{question}{r}"]).load("train")


def test_the_hub_comes_second_and_gives_the_same(data_dir, tmp_path, monkeypatch):
    local = named(label_column="label", label_names=["n", "p"]).load("train")
    asked = []

    def load_dataset(hub_id, config, split, revision):
        asked.append((hub_id, config, split, revision))
        return datasets.Dataset.from_dict({"text": TEXTS, "label": [i % 2 for i in range(40)], "other": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("DATA_DIR")
    assert named(label_column="label", label_names=["n", "p"]).load("train").to_dict() == local.to_dict()
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "some_set"))  # exists, but has no such folder
    named().load("test")
    assert asked == [("someone/some-set", None, "train", None), ("someone/some-set", None, "test[:50%]", None)]


def test_neither_way_is_one_clear_error(data_dir, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.delenv("DATA_DIR")
    with pytest.raises(
        FileNotFoundError, match=r"someone/some-set.*\$DATA_DIR/some_set/train.jsonl.*not set.*Hub"
    ) as error:
        named().load("train")
    assert "\n" not in str(error.value)
    monkeypatch.setenv("DATA_DIR", str(data_dir / "some_set"))
    with pytest.raises(FileNotFoundError, match=r"DATA_DIR=.* has no 'some_set/train.jsonl'"):
        named().load("train")


# -------------------------------------------------------------------------------- the embedded corpus


def test_generated_reviews(monkeypatch):
    source = GeneratedReviews(20, 4, 6, seed=3)
    assert [len(source.load(split)) for split in source.splits] == [40, 8, 12]
    assert sorted(source.load("test")["label"]) == [0] * 6 + [1] * 6
    assert source.load("train").to_dict() == GeneratedReviews(20, 4, 6, seed=3).load("train").to_dict()
    assert source.label_names == reviews.ReviewGrammar.label_names


# -------------------------------------------------------------------------------- the public data sets


def configured(name):
    """Return the source of configs/data/<name>.yaml."""
    settings = yaml.safe_load((ROOT / "configs" / "data" / f"{name}.yaml").read_text())["source"]
    assert settings.pop("_target_") == "palimpsest.data.sources.HubOrFolder"
    return HubOrFolder(**settings)


needs_data = pytest.mark.skipif("DATA_DIR" not in os.environ, reason="needs DATA_DIR with the public data sets")


def test_lines_of_a_file_are_no_documents_and_rows_of_a_table_are(tmp_path):
    for kind, known in (("txt", False), ("jsonl", True)):
        rows = UserFiles(write(tmp_path, kind), validation_share=0.1, test_share=0.2).load("validation")
        assert ("document" not in rows.column_names) == known
        assert known or set(rows["document"]) == {-1}


@needs_data
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("imdb", {"validation": 2500, "test": 25000}),
        ("ag_news", {"validation": 1154, "test": 7600}),
        ("wikitext2", {"train": 23767, "validation": 2461, "test": 2891}),
        ("gsm8k_baseline", {"train": 7099, "validation": 374, "test": 1319}),
    ],
)
def test_public_data_sets(name, sizes):
    source = configured(name)
    rows = {split: source.load(split) for split in ("train", "validation", "test")}
    for split, size in sizes.items():
        assert len(rows[split]) == size, split
    assert not set(rows["train"]["text"]) & set(rows["validation"]["text"]) or name == "wikitext2"
    if source.label_names:
        assert set(rows["train"]["label"]) == set(range(len(source.label_names)))
        assert len(set(rows["test"]["label"][:50])) > 1, "not sorted by label"
    else:
        assert rows["test"].column_names == ["text", *(["document"] if name == "wikitext2" else []), "text_id"]
    if name == "wikitext2":
        assert rows["validation"]["document"][-1] == 60 and rows["validation"]["document"][0] <= 1
    if name == "gsm8k_baseline":
        assert all("\n#### " in text for text in rows["test"]["text"])
    if name == "wikitext2":
        assert rows["test"]["text"][0] == " = Robert <unk> ="
