"""File readers: the rows of every format, and one message with file, line and remedy for bad rows. Each file is read
whole and streamed, with equal results."""

import bz2
import gzip
import json
import lzma
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from palimpsest.common.messages import listed, short_repr
from palimpsest.data.files import Columns, read_files, readable_files
from palimpsest.data.shards import FilePieces, Shards
from palimpsest.data.user_files import UserFiles

LABELLED = Columns(label="label")


def outcome(path, columns=LABELLED):
    """Return rows as tuples, or the error message; the same for a file read whole and streamed."""
    found = []
    for streamed in (False, True):
        try:
            files = readable_files(str(path), "data.path")
            if streamed:
                shards = Shards(FilePieces.of(files, "data.path", columns), lambda table: table, str(path))
                tables = [table for number in range(len(shards.ranges)) for table in shards.blocks(number, 7)]
            else:
                tables = list(read_files(files, "data.path", columns))
            found.append([tuple(row.values()) for table in tables for row in table.to_pylist()])
        except (ValueError, FileNotFoundError) as error:
            found.append(str(error))
    assert found[0] == found[1]
    if isinstance(found[0], str):
        assert "\n" not in found[0] and len(found[0]) < 700
    return found[0]


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def objects(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


HEAD, ROW = "text,label\n", "a b,0\n"
FIELDS = "another number of fields"


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("a.csv", HEAD + ROW + "a, b,1\n", f"line 3 has {FIELDS} (3) than the header (2: text, label); put texts with com"),
    ("a.csv", "label,text\n0,a, b\n0,c\n", f"line 2 has {FIELDS} (3)"),
    ("a.csv", HEAD + ROW + "alone\n" + ROW, f"line 3 has {FIELDS} (1) than the header (2: text, label); complete"),
    ("a.csv", HEAD + ROW * 2 + "a,0,\n", f"line 4 has {FIELDS} (3)"),
    ("a.csv", HEAD + '"a\nb",1\n' + "c,d,1\n", f"line 4 has {FIELDS} (3)"),
    ("a.csv", HEAD + ROW + '"a" said he,1\n', "line 3: "),
    ("a.csv", HEAD + ROW + '"never closed,1\n' + ROW * 3, "line 3: "),
    ("a.csv", HEAD + '"opened,0\nanother "line",1\n', "line 2: "),
    ("a.csv", ",text,label\n0,a,0\n1,b,1\n", [("a", "0"), ("b", "1")]),
    ("a.csv", "text;label\na;0\n", "it has text;label (fields are separated by commas)"),
    ("a.csv", "text,label,text\na,0,b\n", "2 columns are called 'text'; rename all but one"),
    ("a.csv", "sep=,\ntext,label\na,0\n", "there is no column 'text'; it has sep=, ''"),
    ("a.csv", "\ufefflabel,text\r\n1,\"a, \"\"b\"\"\"\r\n\r\n0,\" c \"\r\n", [('a, "b"', "1"), (" c ", "0")]),
    ("a.csv", "text,label\ra,0\rb,1", [("a", "0"), ("b", "1")]),
    ("a.csv", HEAD + '"a\r\n\nb",0\n' + 'he said "no",1\n,1\n', [("a\r\n\nb", "0"), ('he said "no"', "1"), ("", "1")]),
    ("a.csv", HEAD + "x" * 200_000 + ",0\n", [("x" * 200_000, "0")]),
    ("a.csv", "", "it is empty; its first line must name the columns"),
    ("a.csv", HEAD, []),
], ids=lambda value: re.sub(r"\W+", "-", value)[:40] if isinstance(value, str) else "")  # fmt: skip
def test_csv_never_shifts_a_column(name, content, expected, tmp_path):
    agrees(outcome(write(tmp_path / name, content)), expected)


def agrees(found, expected):
    if isinstance(expected, str):
        assert isinstance(found, str) and expected in found, found
    else:
        assert found == expected


TAB = "text\tlabel\n"


@pytest.mark.parametrize(("content", "expected"), [
    (TAB + "a\t0\nb\tc\t1\n", f"line 3 has {FIELDS} (3) than the header (2: text, label); put texts with tabs"),
    (TAB + "a\t0\nb\n", f"line 3 has {FIELDS} (1)"),
    (TAB + '"a\t0\nb\t1\nc"\t0\n', [('"a', "0"), ("b", "1"), ('c"', "0")]),  # without quoting, as GLUE has it
    (TAB + '"a" b\t0\nb\t1\n', [('"a" b', "0"), ("b", "1")]),
    ("label\ttext\n0\t\"a\n1\tb\n0\tc\"\n", [('"a', "0"), ("b", "1"), ('c"', "0")]),
    (TAB + '"he said ""a"""\t0\n"b\tc"\t1\n', [('he said "a"', "0"), ("b\tc", "1")]),  # with quoting
    (TAB + '"a\n\nb"\t0\nc\t1\nd\n', f"line 6 has {FIELDS} (1)"),
    (TAB + '"a\n\nb"\t0\nc\t1\n', [("a\n\nb", "0"), ("c", "1")]),
    ("label\ttext\n0\t\"a\nb\"\n1\tc\n", [("a\nb", "0"), ("c", "1")]),
    (TAB + '"a\tx\nb"\t0\n', [('"a', "x"), ('b"', "0")]),
    (TAB + '"a\nb\t0\n', f"line 2 has {FIELDS} (1)"),
    (TAB + '"a\nb\tc\nd"\t0\n', f"line 2 has {FIELDS} (1)"),  # tabs and line breaks in one field
    (TAB + "a\t0\n" + '"' + "b\t1\n" * 3, [("a", "0"), ('"b', "1"), ("b", "1"), ("b", "1")]),
    ("\ufeff" + TAB.replace("\n", "\r\n") + "a\t0\r\n\r\n\"b\"\t1", [("a", "0"), ("b", "1")]),
])  # fmt: skip
def test_tsv_with_and_without_quotation(content, expected, tmp_path):
    agrees(outcome(write(tmp_path / "a.tsv", content)), expected)


def test_a_tsv_of_one_column_never_joins_lines(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\n"a\nb"\n"c"\n')
    assert outcome(path, Columns()) == [('"a',), ('b"',), ("c",)]


@pytest.mark.parametrize(("value", "expected"), [
    (5, "is 5, not a text"), (2.5, "is 2.5, not a text"), (True, "is True, not a text"), (None, "is null, not a text"),
    ({"a": 1}, "is {'a': 1}, not a text; a JSON file holds one object per line"), (["a"], "is ['a'], not a text"),
    (["a" * 10**5] * 20, "not a text"), (10**40, "is 10000000"), ("\ud83d", "half a character"),
    (float("nan"), "is nan, not a text"), ("2024-01-01", None), ("12", None), ("null", None), ("[1]", None),
], ids=lambda value: str(value)[:12].encode("ascii", "replace").decode())  # fmt: skip
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_one_odd_value_changes_no_other_text(value, expected, kind, tmp_path):
    rows = [{"text": f"text {i}", "n": i} for i in range(1500)] + [{"text": value, "n": 0}, {"text": "end", "n": 1}]
    path = write(tmp_path / f"a.{kind}", objects(*rows) if kind == "jsonl" else json.dumps(rows, indent=1))
    found = outcome(path, Columns())
    if expected is None:
        assert found == [(row["text"],) for row in rows]
    else:
        assert expected in found and f"{path} cannot be read: " in found
        assert ("line 1501, row 1500" if kind == "jsonl" else "row 1500") in found


def test_odd_values_of_parquet(tmp_path):
    for values, expected in ((["a", None], "row 1 of column 'text' is null"), ([1, 2], "row 0 of column 'text' is 1"),
                             ([["a"], ["b"]], "row 0 of column 'text' is ['a']")):  # fmt: skip
        pq.write_table(pa.table({"text": ["x"] * 4}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"text": values}), tmp_path / "b.parquet", row_group_size=1)
        found = outcome(tmp_path, Columns())
        assert expected in found and "b.parquet" in found


OTHERS = [
    ({"a.jsonl": objects({"text": "a", "id": 1}), "b.jsonl": objects({"text": "b", "id": "x"})}, ["a", "b"]),
    ({"a.jsonl": objects({"text": "a", "m": None}), "b.jsonl": objects({"text": "b", "m": {"u": [1]}})}, ["a", "b"]),
    ({"a.jsonl": objects({"text": "a"}), "b.jsonl": objects({"more": [1], "text": "b"})}, ["a", "b"]),
    ({"a.csv": "text,n\na,1\n", "b.csv": "n,text\n1,b\n"}, ["a", "b"]),
    ({"a.csv": "text,n\na,1\n", "b.csv": "text\nb\n"}, ["a", "b"]),
    ({"a.csv": "text,n\na,1\n", "b.csv": "body,n\nb,1\n"}, "b.csv cannot be read: there is no column 'text'; it has b"),
    ({"a.jsonl": objects({"text": "a"}), "b.jsonl": objects({"body": "b"})}, "b.jsonl cannot be read: line 1, row 0: "),
    ({"a.csv": "text,n\na,1\n", "b.tsv": "text\nb\n", "c.txt": "c\n", "d.json": '[{"text": "d"}]'}, list("abcd")),
    ({"a.csv": "text,n\na,1\n", "b.csv": ""}, "b.csv cannot be read: it is empty"),
    ({"a.jsonl": "", "b.jsonl": objects({"text": "b"})}, ["b"]),
    ({"a.jsonl": objects({"text": "a"}), "b.jsonl": '{"text": "b", "text": "c"}'}, "b.jsonl cannot be read: line 1: "),
    ({"a.jsonl": objects({"text": 'about "text": "x"', "meta": {"text": 1}})}, ['about "text": "x"']),
]  # fmt: skip


@pytest.mark.parametrize(("files", "expected"), OTHERS, ids=map(str, range(len(OTHERS))))
def test_files_may_differ_in_columns_that_nobody_asked_for(files, expected, tmp_path):
    for name, content in files.items():
        write(tmp_path / name, content)
    agrees(outcome(tmp_path, Columns()), expected if isinstance(expected, str) else [(text,) for text in expected])


def test_parquet_files_may_differ_in_type(tmp_path):
    texts = (pa.array(["a"], pa.string()), pa.array(["b"], pa.large_string()),
             pa.array(["c"]).dictionary_encode(), pa.array(["d"], pa.string_view()))  # fmt: skip
    others = (pa.array([1]), pa.array([{"u": 1}]), pa.array([None]), pa.array([b"\xff"]))
    labels = (pa.array([0], pa.int8()), pa.array(["1"]), pa.array([1]), pa.array(["0"]).dictionary_encode())
    for number, (text, other, label) in enumerate(zip(texts, others, labels, strict=True)):
        pq.write_table(pa.table({"text": text, "o": other, "label": label}), tmp_path / f"{number}.parquet")
    assert outcome(tmp_path) == [("a", "0"), ("b", "1"), ("c", "1"), ("d", "0")]


GOOD = objects({"text": "a", "label": 0})
LINE = "{{}} cannot be read: line {}".format


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("a.jsonl", GOOD * 40 + '{"text": "a"\n' + GOOD, "line 41 is not JSON (Expecting ',' delimiter at character 13)"),
    ("a.jsonl", "\n\n" + GOOD + '{"text": "' + "x" * 10**6 + "\n", "line 4 is not JSON"),
    ("a.jsonl", GOOD + "[" * 100_000, "line 2 has too many brackets within brackets"),
    ("a.jsonl", GOOD + '{"text": "a", "label": ' + "9" * 31 + "}", "line 2, row 1 of column 'label' is 9999"),
    ("a.jsonl", GOOD + '{"text": "a", "label": ' + "9" * 5000 + "}", "line 2: a number has over 4,300 digits"),
    ("a.jsonl", '{\n "text": "a",\n "label": 0\n}\n', "line 1 is not JSON"),
    ("a.jsonl", '{"text": ["a", "b"], "label": [0, 1]}', "line 1, row 0 of column 'text' is ['a', 'b'], not a text; a"),
    ("a.json", '[{"text": "a",\n "label": 0},\n {"text": }]', "line 3 is not JSON"),
    ("a.json", "[[[" * 50_000, "line 1 has too many brackets"),
    ("a.json", '["a", "b"]', "row 0 is 'a', not an object with columns"),
    ("a.csv", HEAD.encode() + ROW.encode() * 30 + b"caf\xe9,0\n", "line 32 is not UTF-8 (byte 0xe9); convert the file"),
    ("a.tsv", b"text\tlabel\na\xff\t0\n", "line 2 is not UTF-8 (byte 0xff); convert the file"),
    ("a.csv", HEAD.encode("utf-16"), "line 1 is not UTF-8 (byte 0xff); convert the file, for example by iconv -f UTF"),
    ("a.csv", HEAD + ROW * 3 + "a,\n", "line 5, row 3 of column 'label' is ''; labels must be"),
    ("a.csv", HEAD + "a," + "9" * 10 + "\n", "line 2, row 0 of column 'label' is '9999999999'; labels must be"),
    ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:-9], "cannot be read"),
    ("a.jsonl.gz", b"not packed", "Not a gzipped file"),
    ("a.jsonl.xz", lzma.compress(GOOD.encode() * 99)[:-9], "cannot be read: Compressed file ended"),
    ("a.jsonl.bz2", bz2.compress(GOOD.encode() * 99)[:-9], "cannot be read: Compressed file ended"),
    ("a.jsonl.zst", pa.Codec("zstd").compress(GOOD.encode() * 99, asbytes=True)[:-9], "Truncated compressed stream"),
    ("a.parquet", b"PAR1 no", "a.parquet cannot be read"),
    ("a.parquet.gz", b"", "unpack it"),
    ("a.docx", b"", "files of type .docx cannot be read; give one of txt, csv"),
    ("a.zip", b"", "files of type .zip cannot be read"),
    ("a.arrow", b"", "save_to_disk"),
], ids=lambda value: re.sub(r"\W+", "-", value)[:30] if isinstance(value, str) else "")  # fmt: skip
def test_an_error_names_file_and_line(name, content, expected, tmp_path):
    path = write(tmp_path / name, content)
    found = outcome(path)
    agrees(found, expected)
    assert found.startswith(f"data.path={path} cannot be read: ")


def zstd(raw):
    return pa.Codec("zstd").compress(raw, asbytes=True)


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd, "GZ": gzip.compress}


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "json"])
def test_folders_of_packed_files(ending, kind, tmp_path):
    """Covers concatenated compressed files, and uncompressed files next to them."""
    halves = {
        "txt": ("a\n", "b\n"),
        "csv": ("text\na\n", "b\n"),
        "tsv": ("text\na\n", "b\n"),
        "jsonl": (objects({"text": "a"}), objects({"text": "b"})),
        "json": ('[{"text": "a"},', '{"text": "b"}]'),
    }
    pack, (one, two) = PACKERS[ending], halves[kind]
    write(tmp_path / f"a.{kind}.{ending}", pack(one.encode()) + pack(two.encode()))
    write(tmp_path / "b.txt", "c\n")
    write(tmp_path / "README.md", "no data")
    write(tmp_path / "c.zip", b"no data")
    write(tmp_path / f".hidden.{kind}", "no data")
    (tmp_path / f"folder.{kind}").mkdir()
    assert outcome(tmp_path, Columns()) == [("a",), ("b",), ("c",)]


def test_what_is_no_ordinary_file_is_refused_unopened(tmp_path):
    write(tmp_path / "ok.txt", "a\n")
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", tmp_path, tmp_path / "*.txt"):
        assert "pipe.txt is no ordinary file but a pipe, a device or a socket" in outcome(path)
    (tmp_path / "pipe.txt").unlink()
    for target, expected in (("/dev/zero", "link.txt is no ordinary file"), ("/nowhere", "link.txt is a link to n")):
        (tmp_path / "link.txt").symlink_to(target)
        for path in (tmp_path / "link.txt", tmp_path):
            assert expected in outcome(path)
        (tmp_path / "link.txt").unlink()
    (tmp_path / "link.txt").symlink_to("ok.txt")
    assert outcome(tmp_path, Columns()) == [("a",), ("a",)]


def test_a_folder_of_save_to_disk_is_refused_with_the_remedy(tmp_path):
    for name in ("dataset_info.json", "state.json", "data-00000-of-00001.arrow"):
        write(tmp_path / "one" / name, "{}")
    write(tmp_path / "splits" / "dataset_dict.json", "{}")
    for folder in ("one", "splits"):
        assert "written by save_to_disk of the library datasets; write Parquet files" in outcome(tmp_path / folder)


# -------------------------------------------------------------------------------- labels


def labelled(tmp_path, values, name="a.jsonl", **settings):
    path = write(tmp_path / name, objects(*({"text": f"t{i}", "label": value} for i, value in enumerate(values))))
    source = UserFiles(str(path), label_column="label", validation_share=0.1, test_share=0.1, **settings)
    return source, {int(row["text"][1:]): row["label"] for split in source.splits for row in source.load(split)}


@pytest.mark.parametrize(("values", "expected"), [
    ([0, 1] * 10 + ["one"], r"line 21, row 20 of column 'label' is 'one', and most labels are numbers"),
    (["0", "1"] * 10 + ["one"], r"row 20 of column 'label' is 'one', and most labels are numbers"),
    (["x"] * 5 + ["y", 3] + ["x"] * 5, r"row 6 of column 'label' is 3, and most labels are words"),
    (["a", "\u00e9"] * 5 + ["e\u0301"], r"two labels look the same, 'e\\u0301' and '\\xe9'"),
    (["a", "b", "b\u200b"] * 5, r"two labels look the same"),
    ([str(i) * 50 for i in range(500)], r"most labels|labels must be"),
    ([0, 1.0], r"line 2, row 1 of column 'label' is 1\.0; labels must be"),
    ([0, []], r"row 1 of column 'label' is \[\]; labels must be"),
    (["  ", "a"], r"row 0 of column 'label' is '  '; labels must be"),
    ([i * 2 for i in range(3000)], r"there are 3000 labels \(0, 2, 4, .* in all\)\) for .* texts; name the column"),
])  # fmt: skip
def test_labels_that_are_refused(values, expected, tmp_path):
    with pytest.raises(ValueError, match=expected) as error:
        labelled(tmp_path, values)
    assert len(str(error.value)) < 500


def test_labels_lose_the_blanks_around_them(tmp_path, caplog):
    source, labels = labelled(tmp_path, ["pos", " pos", "neg\t", "neg"] * 10)
    assert source.label_names == ("neg", "pos") and [labels[i] for i in range(4)] == [1, 1, 0, 0]
    assert "a.jsonl: line 2, row 1: the label ' pos' is read as 'pos'" in caplog.text


def test_label_names_fix_what_a_label_is(tmp_path):
    source, labels = labelled(tmp_path, ["4", "n/a", "5"] * 10, label_names=["n/a", "4", "5"])
    assert [labels[i] for i in range(3)] == [1, 0, 2]
    with pytest.raises(ValueError, match=r"data\.label_names: two labels look the same, 'a' and 'a'"):
        labelled(tmp_path, [0, 1], label_names=["a", "a "])
    with pytest.raises(ValueError, match=r"data\.label_column=text is a column of the texts"):
        UserFiles("a.csv", label_column="text")


def test_any_whole_numbers_name_classes(tmp_path):
    source, labels = labelled(tmp_path, [1, 2, 3, 4, 5] * 10)
    assert source.label_names == ("1", "2", "3", "4", "5") and [labels[i] for i in range(5)] == [0, 1, 2, 3, 4]
    source, labels = labelled(tmp_path, ["10", "2", "02"] * 10)
    assert source.label_names == ("2", "10") and [labels[i] for i in range(3)] == [1, 0, 0]
    source, labels = labelled(tmp_path, [1, 2] * 10, label_names=["1", "2"])
    assert [labels[i] for i in range(2)] == [0, 1]
    (tmp_path / "test.jsonl").write_text('{"text": "a text", "label": 1}\n')
    held_out = {"label_column": "label", "validation_share": 0.1, "test_path": str(tmp_path / "test.jsonl")}
    assert labelled(tmp_path, [0, 2] * 10)[0].label_names == ("0", "2")
    source = UserFiles(str(tmp_path / "a.jsonl"), **held_out)
    with pytest.raises(
        ValueError, match=r"label' is 1, which is none of 0 \(0\), 1 \(2\); .*name all classes in data.lab"
    ):
        source.load("test")
    with pytest.raises(ValueError, match=r"a negative one usually means .* give data\.label_names=\[-1,0,1\]"):
        labelled(tmp_path, [-1, 0, 1] * 10)


def test_the_classes_of_a_parquet_file_may_be_named_by_other_numbers(tmp_path):
    with_classes(tmp_path / "a.parquet", ["1", "2", "3"], [0, 1, 2] * 10)
    source = UserFiles(str(tmp_path / "a.parquet"), label_column="label", validation_share=0.1, test_share=0.1)
    assert source.label_names == ("1", "2", "3") and set(source.load("train")["label"]) == {0, 1, 2}


def test_texts_cut_into_tokens_are_joined(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"it is @-@ said , {k} .\n" for k in range(40)))
    source = UserFiles(str(tmp_path / "a.txt"), detokenizer="wikitext")
    assert source.load("train")["text"][0].startswith("it is-said, ") and source.detokenizer_of("train") == "wikitext"
    with pytest.raises(ValueError, match="detokenizer=gpt9 is none of wikitext, ptb"):
        UserFiles(str(tmp_path / "a.txt"), detokenizer="gpt9")
    with pytest.raises(
        ValueError, match="data.detokenizer=ptb applies to whole texts, and data.prompt_column=question"
    ):
        UserFiles(str(tmp_path / "a.csv"), detokenizer="ptb", prompt_column="question")


def with_classes(path, names, labels):
    features = {"label": {"names": names, "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
    schema = pa.schema(
        [("text", pa.string()), ("label", pa.int64())], {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(pa.table([[f"t{i}" for i in range(len(labels))], labels], schema), path)


def test_parquet_files_tell_the_names_of_their_classes(tmp_path):
    with_classes(tmp_path / "a.parquet", ["bad", "fair", "good"], [0, 2] * 10)
    shares = {"validation_share": 0.1, "test_share": 0.1, "label_column": "label"}
    source = UserFiles(str(tmp_path / "a.parquet"), **shares)
    assert source.label_names == ("bad", "fair", "good") and set(source.load("train")["label"]) == {0, 2}
    assert UserFiles(str(tmp_path / "a.parquet"), label_names=["x", "y", "z"], **shares).label_names == ("x", "y", "z")
    with_classes(tmp_path / "b.parquet", ["bad", "good"], [-1, 1])
    with pytest.raises(ValueError, match=r"a\.parquet has the classes 0 \(bad\), 1 \(fair\).*but .*b\.parquet has"):
        UserFiles(str(tmp_path), **shares).load("train")
    with pytest.raises(ValueError, match=r"row 0 of column 'label' is -1, which is none of 0 \(bad\), 1 \(good\)"):
        UserFiles(str(tmp_path / "b.parquet"), **shares).load("train")


def test_splits_that_number_their_classes_differently_are_refused(tmp_path):
    with_classes(tmp_path / "train.parquet", ["bad", "fair", "good"], [0, 1, 2] * 10)
    with_classes(tmp_path / "test.parquet", ["fair", "good"], [0, 1])
    (tmp_path / "test.csv").write_text("text,label\nt0,good\nt1,bad\n")
    shares = {"validation_share": 0.1, "label_column": "label", "label_names": None}
    train = str(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="test.parquet has the classes 0 .fair.*and the training has 0 .bad.*alike"):
        UserFiles(train, test_path=str(tmp_path / "test.parquet"), **shares).load("test")
    with pytest.raises(ValueError, match="number them alike"):
        names = {**shares, "label_names": ["good", "fair", "bad"]}
        UserFiles(train, test_path=train, **names).load("train")
    words = UserFiles(train, test_path=str(tmp_path / "test.csv"), **shares)
    assert words.load("test")["label"] == [2, 0], "words beside numbers"


# -------------------------------------------------------------------------------- messages


def test_messages_stay_short():
    assert short_repr(None) == "null" and short_repr("a") == "'a'"
    deep = []
    for _ in range(5000):
        deep = [deep]
    for value in ("x" * 10**6, ["x" * 10**6] * 100, {"a": deep}, 10**4000, deep):
        assert len(short_repr(value)) < 500
    assert listed(["a", " b", "", "x" * 99]) == "a, ' b', '', " + short_repr("x" * 99)
    assert listed(list(range(99))).endswith("11, ... (99 in all)")
