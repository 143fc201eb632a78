"""Packing: nothing is lost or truncated silently, and every setting has a separate cache entry."""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest

from palimpsest.data import packing as packing_module
from palimpsest.data.cache import cached_folder
from palimpsest.data.packing import Packing, pack
from palimpsest.data.tokenizers import Vocabulary, decode, encode, load_tokenizer, vocabulary
from tests.helpers.commands import in_a_process

TEXTS = [f"{'word ' * (i % 7)}number {i}." for i in range(2500)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("byte", cache_dir=tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def vocab(tokenizer):
    return vocabulary(tokenizer)


def rows_of(texts, labels=None):
    columns = {"text": list(texts), "text_id": list(range(len(texts)))}
    return datasets.Dataset.from_dict(columns | ({"label": labels} if labels is not None else {}))


def ids_of(rows):
    return [row.tolist() for row in rows["input_ids"]]


# -------------------------------------------------------------------------------- wrapped


@pytest.mark.parametrize("chunk_special", [True, False])
def test_wrap_is_one_stream_over_the_whole_split(chunk_special, tokenizer, vocab, tmp_path):
    """Only the last chunk of the split is dropped, not one of every batch of texts."""
    packing = Packing(length=64, wrap=True, chunk_special=chunk_special)
    rows, figures = pack(rows_of(TEXTS), tokenizer, vocab, packing, tmp_path)
    stream = [i for ids in encode(tokenizer, TEXTS) for i in [*ids, vocab.eos_id]]
    chunks = ids_of(rows)
    assert all(len(chunk) == 64 for chunk in chunks)
    if chunk_special:
        assert all(chunk[0] == vocab.bos_id and chunk[-1] == vocab.eos_id for chunk in chunks)
        chunks = [chunk[1:-1] for chunk in chunks]
    flat = [i for chunk in chunks for i in chunk]
    assert flat == stream[: len(flat)] and len(stream) - len(flat) < 64
    assert figures["cut"] == len(stream) - len(flat) and figures["rows"] == len(chunks)
    assert rows["sample_id"][:].tolist() == list(range(len(chunks)))
    assert set(rows.column_names) == {"input_ids", "length", "sample_id", "first_document", "last_document"}


def test_rows_know_the_documents_of_their_ends(tokenizer, vocab, tmp_path, monkeypatch):
    """Uses texts of 1, 2, 3, ... characters and an EOS each, lines of documents, and unknown documents."""
    monkeypatch.setattr(packing_module, "_TEXTS_AT_ONCE", 2)
    texts = ["a" * n for n in (1, 2, 0, 3, 4, 5)]
    of_token = np.repeat([0, 1, 2, 3, 4], [2, 3, 4, 5, 6])
    for chunk_special, inner in ((False, 4), (True, 2)):
        rows, _ = pack(rows_of(texts), tokenizer, vocab, Packing(4, True, chunk_special=chunk_special), tmp_path)
        stop = len(of_token) // inner * inner
        assert rows["first_document"][:].tolist() == of_token[0:stop:inner].tolist()
        assert rows["last_document"][:].tolist() == of_token[inner - 1 : stop : inner].tolist()
    for numbers, wanted in (([7, 7, 7, 7, 9, 9], [0, 0, 1, 1, 1]), ([-1] * 6, None)):
        lines = rows_of(texts).add_column("document", numbers)
        rows, _ = pack(lines, tokenizer, vocab, Packing(4, True), tmp_path)
        assert ("first_document" in rows.column_names) == (wanted is not None)
        assert wanted is None or rows["last_document"][:].tolist() == wanted
        lines = lines.select([0, 1, 3, 4, 5])
        rows, _ = pack(lines, tokenizer, vocab, Packing(8, False), tmp_path)
        assert ("first_document" in rows.column_names) == (wanted is not None)
        assert wanted is None or rows["first_document"][:].tolist() == [7, 7, 7, 9, 9]


def test_wrapped_rows_do_not_depend_on_the_batches(tokenizer, vocab, tmp_path, monkeypatch):
    packing = Packing(length=50, wrap=True)
    expected = ids_of(pack(rows_of(TEXTS), tokenizer, vocab, packing, tmp_path / "a")[0])
    monkeypatch.setattr(packing_module, "_TEXTS_AT_ONCE", 7)
    assert ids_of(pack(rows_of(TEXTS), tokenizer, vocab, packing, tmp_path / "b")[0]) == expected


def test_wrap_without_eos_and_with_empty_texts(tokenizer, vocab, tmp_path):
    rows, figures = pack(rows_of(["ab", "", "cd"]), tokenizer, vocab, Packing(2, True, eos=False), tmp_path)
    assert [decode(tokenizer, ids) for ids in ids_of(rows)] == ["ab", "cd"] and figures["empty"] == 1
    rows, _ = pack(rows_of(["ab", "", "cd"]), tokenizer, vocab, Packing(3, True), tmp_path)
    assert [decode(tokenizer, ids) for ids in ids_of(rows)] == ["ab[EOS]", "cd[EOS]"]


def test_too_little_text_to_wrap(tokenizer, vocab, tmp_path):
    with pytest.raises(ValueError, match=r"train split: 4 tokens do not fill one chunk of model\.length=9"):
        pack(rows_of(["abc"]), tokenizer, vocab, Packing(9, True), tmp_path, "train split")
    with pytest.raises(ValueError, match="no text with any token"):
        pack(rows_of([""]), tokenizer, vocab, Packing(9, True), tmp_path)


def test_wrapped_labels(tokenizer, vocab, tmp_path):
    rows, _ = pack(rows_of(["ab", "cd"], [1, 1]), tokenizer, vocab, Packing(3, True), tmp_path)
    assert rows["label"][:].tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"data\.wrap=true .*data\.label"):
        pack(rows_of(["ab", "cd"], [1, 0]), tokenizer, vocab, Packing(3, True), tmp_path)


# -------------------------------------------------------------------------------- padded


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_padded_rows_hold_their_text(bos, eos, tokenizer, vocab, tmp_path):
    labels = [i % 3 for i in range(len(TEXTS))]
    rows, figures = pack(rows_of(TEXTS, labels), tokenizer, vocab, Packing(64, False, bos=bos, eos=eos), tmp_path)
    for text, ids in zip(TEXTS, ids_of(rows), strict=True):
        assert decode(tokenizer, ids) == "[BOS]" * bos + text + "[EOS]" * eos
    assert rows["label"][:].tolist() == labels
    assert rows["text_id"][:].tolist() == rows["sample_id"][:].tolist() == list(range(len(TEXTS)))
    assert rows["length"][:].tolist() == [len(ids) for ids in ids_of(rows)]
    assert figures["long"] == figures["cut"] == 0 and figures["tokens"] == sum(map(len, ids_of(rows)))


LONG = ["abcdefghij", "abc", "abcd"]  # with EOS 11, 4, 5 tokens


def test_long_texts_are_an_error_by_default(tokenizer, vocab, tmp_path):
    message = r"test split: 2 of 3 texts are longer than model\.length=4 .* has 11\).*data\.long_texts"
    with pytest.raises(ValueError, match=message):
        pack(rows_of(LONG), tokenizer, vocab, Packing(4, False), tmp_path, "test split")
    assert not list(tmp_path.glob("rows-*")), "a refused split leaves no cache entry"


def test_long_texts_cut(tokenizer, vocab, tmp_path):
    rows, figures = pack(rows_of(LONG), tokenizer, vocab, Packing(4, False, long_texts="truncate"), tmp_path)
    assert [decode(tokenizer, ids) for ids in ids_of(rows)] == ["abcd", "abc[EOS]", "abcd"]
    assert (figures["long"], figures["cut"], figures["longest"]) == (2, 8, 11)


def test_long_texts_in_windows(tokenizer, vocab, tmp_path):
    packing = Packing(4, False, long_texts="windows")
    rows, figures = pack(rows_of(LONG), tokenizer, vocab, packing, tmp_path)
    assert [decode(tokenizer, ids) for ids in ids_of(rows)] == ["abcd", "efgh", "ij[EOS]", "abc[EOS]", "abcd", "[EOS]"]
    assert rows["text_id"][:].tolist() == [0, 0, 0, 1, 2, 2] and figures["cut"] == 0
    names = rows["sample_id"][:].tolist()
    assert len(set(names)) == 6
    some = rows_of(LONG).select([2])
    assert pack(some, tokenizer, vocab, packing, tmp_path)[0]["sample_id"][:].tolist() == names[4:], "names last"


def test_empty_texts(tokenizer, vocab, tmp_path):
    with pytest.raises(ValueError, match=r"text 1 \(''\) has no tokens.*data\.drop_empty"):
        pack(rows_of(["a", "", "b"]), tokenizer, vocab, Packing(4, False), tmp_path)
    rows, figures = pack(rows_of(["a", "", "b"]), tokenizer, vocab, Packing(4, False, drop_empty=True), tmp_path)
    assert rows["text_id"][:].tolist() == [0, 2] and figures["empty"] == 1
    with pytest.raises(ValueError, match="no text with any token"):
        pack(rows_of([""]), tokenizer, vocab, Packing(4, False, drop_empty=True), tmp_path)


def test_unknown_tokens_are_counted(tmp_path):
    tokenizer = load_tokenizer("word", texts=lambda: ["a b"], cache_dir=tmp_path)
    _, figures = pack(rows_of(["a c", "b"]), tokenizer, vocabulary(tokenizer), Packing(4, False), tmp_path)
    assert figures["unknown"] == 1


def test_settings_and_tokens_that_do_not_go_together(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"model\.length=2 is too short; give at least 3"):
        Packing(2, True, chunk_special=True)
    with pytest.raises(ValueError, match=r"model\.length=0"):
        Packing(0, False)
    poor = Vocabulary(261, 4, 0, None, None, "x")
    with pytest.raises(ValueError, match=r"no end \(EOS or SEP\) token.*insert_\*_eos=false"):
        pack(rows_of(["a"]), tokenizer, poor, Packing(4, True), tmp_path)
    with pytest.raises(ValueError, match=r"no begin \(BOS or CLS\) token"):
        pack(rows_of(["a"]), tokenizer, replace(poor, eos_id=3), Packing(4, True, chunk_special=True), tmp_path)
    with pytest.raises(ValueError, match=r"no begin \(BOS or CLS\) token"):
        pack(rows_of(["a"]), tokenizer, poor, Packing(4, False, eos=False, bos=True), tmp_path)


# -------------------------------------------------------------------------------- the cache


def test_every_setting_has_its_own_cache_entry(tokenizer, vocab, tmp_path, monkeypatch):
    base = Packing(8, False, long_texts="truncate")
    texts = rows_of(["abc", "defghijklm"], [0, 1])

    def entries(rows=texts, v=vocab, **change):
        pack(rows, tokenizer, v, replace(base, **change), tmp_path)
        return len([p for p in tmp_path.iterdir() if p.is_dir()])

    assert entries() == entries() == 1
    changes = [
        {"length": 9}, {"eos": False}, {"bos": True}, {"long_texts": "windows"}, {"drop_empty": True},
        {"wrap": True, "rows": texts.remove_columns("label")},
        {"wrap": True, "chunk_special": True, "rows": texts.remove_columns("label")},
        {"v": replace(vocab, fingerprint="another tokenizer")}, {"v": replace(vocab, eos_id=2)},
        {"rows": rows_of(["abc", "defghijkln"], [0, 1])}, {"rows": rows_of(["abcd", "efghijklm"], [0, 1])},
        {"rows": rows_of(["abc", "defghijklm"], [1, 1])}, {"rows": texts.select([0])},
        {"rows": rows_of(["defghijklm", "abc"], [0, 1])}, {"rows": texts.select([1])},
    ]  # fmt: skip
    for number, change in enumerate(changes, start=2):
        assert entries(**change) == number, change
    monkeypatch.setattr(packing_module, "_CODE_VERSION", -1)
    assert entries() == len(changes) + 2


def test_a_cache_entry_is_used_again(tokenizer, vocab, tmp_path, monkeypatch):
    first = pack(rows_of(TEXTS), tokenizer, vocab, Packing(64, False), tmp_path)
    monkeypatch.setattr(packing_module, "encode", lambda *a: pytest.fail("tokenised again"))
    again = pack(rows_of(TEXTS), tokenizer, vocab, Packing(64, False), tmp_path)
    assert ids_of(again[0]) == ids_of(first[0]) and again[1] == first[1]


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "entry", "empty"])
def test_a_damaged_cache_entry_is_built_again(damage, tokenizer, vocab, tmp_path):
    packing = Packing(64, False)
    expected = ids_of(pack(rows_of(TEXTS), tokenizer, vocab, packing, tmp_path)[0])
    (folder,) = tmp_path.glob("rows-*")
    path = folder / ("entry.json" if damage == "entry" else "rows.arrow")
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage != "empty" else b"")
    assert ids_of(pack(rows_of(TEXTS), tokenizer, vocab, packing, tmp_path)[0]) == expected
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == [folder.name], "no debris"


def _killed_build(folder: Path) -> None:
    (folder / "data").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_build_leaves_nothing_behind(tmp_path):
    with in_a_process(cached_folder, tmp_path, "x", {"a": 1}, _killed_build) as process:
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    assert any((left / "data").exists() for left in tmp_path.glob(".x-*-*-*"))
    folder, _ = cached_folder(tmp_path, "x", {"a": 1}, lambda folder: None)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == [folder.name]


def _pack_in_process(folder, queue):
    tokenizer = load_tokenizer("byte", cache_dir=folder)
    rows, _ = pack(rows_of(TEXTS), tokenizer, vocabulary(tokenizer), Packing(64, False), folder)
    queue.put(sum(map(sum, ids_of(rows))))


def test_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_pack_in_process, args=(tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert len(sums) == 1 and all(process.exitcode == 0 for process in processes)
    assert len(list(tmp_path.glob("rows-*"))) == 1


def test_a_second_writer_does_no_harm(tmp_path):
    """Two builders without a lock, as on a file system that has none: the later one finds the entry built."""

    def slow(folder):
        monkey = cached_folder(tmp_path, "x", {"a": 1}, lambda f: (f / "data").write_text("1") and {"n": 1})
        assert monkey[1] == {"n": 1}
        (folder / "data").write_text("1")
        return {"n": 1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("palimpsest.data.cache._lock", lambda folder: __import__("contextlib").nullcontext())
        folder, figures = cached_folder(tmp_path, "x", {"a": 1}, slow)
    assert figures == {"n": 1} and (folder / "data").read_text() == "1"


def test_a_cache_that_cannot_be_written(tokenizer, vocab, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir=.*file cannot be written"):
        pack(rows_of(["a"]), tokenizer, vocab, Packing(4, False), tmp_path / "file")


def test_large_splits_read_as_numpy(tokenizer, vocab, tmp_path):
    rows, _ = pack(rows_of(TEXTS), tokenizer, vocab, Packing(64, True), tmp_path)
    batch = rows[[3, 1, 2]]
    assert isinstance(batch["input_ids"], np.ndarray) and batch["input_ids"].shape == (3, 64)
