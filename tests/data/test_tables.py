"""Texts on disk: converted once, the same for any number of processes, and found again without being read."""

from __future__ import annotations

import os
import time

import pyarrow as pa
import pytest

from palimpsest.data import cache, packing, tables, user_files
from palimpsest.data.packing import Packing, in_order, pack
from palimpsest.data.tables import consecutive, read, write
from palimpsest.data.tokenizers import load_tokenizer, vocabulary
from palimpsest.data.user_files import UserFiles

TEXTS = [f"text {i} " + "word " * (i % 9) for i in range(3000)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    old = time.time() - 60
    os.utime(path, (old, old))
    return path


def kept(corpus, **settings):
    return UserFiles(str(corpus), **settings).cached(str(corpus.parent / "cache"))


def test_a_stored_corpus_has_the_rows_of_one_in_memory(corpus):
    for split in ("train", "validation", "test"):
        mapped, in_memory = kept(corpus).load(split), UserFiles(str(corpus)).load(split)
        assert mapped.cache_files and not in_memory.cache_files
        assert mapped.to_dict() == in_memory.to_dict()
        assert mapped["text_id"][:] == list(range(len(mapped)))


def test_files_are_converted_once_and_hashed_once(corpus, monkeypatch):
    first = kept(corpus).load("train")
    digest = cache.file_digest

    def of_the_cache(path):
        assert path != corpus, "hashed again"
        return digest(path)

    monkeypatch.setattr(user_files, "read_files", lambda *_: pytest.fail("converted again"))
    monkeypatch.setattr(cache, "file_digest", of_the_cache)
    again = kept(corpus).load("train")
    assert again._fingerprint == first._fingerprint and again["text"][:5] == first["text"][:5]


def test_another_content_or_setting_is_another_entry(corpus):
    entries = {kept(corpus).load("train")._fingerprint, kept(corpus, seed=1).load("train")._fingerprint}
    corpus.write_text(corpus.read_text().replace("text 7 ", "text 8 "))  # as long, at another time
    changed = kept(corpus).load("train")
    assert len({*entries, changed._fingerprint}) == 3
    every = [text for split in ("train", "validation", "test") for text in kept(corpus).load(split)["text"]]
    assert "text 7 " + "word " * 7 not in every


def test_a_file_that_has_just_changed_is_not_remembered(corpus, tmp_path):
    corpus.write_text("a" * 10)
    before = cache.content_digests([corpus], tmp_path / "other")
    stat = corpus.stat()
    corpus.write_text("b" * 10)
    os.utime(corpus, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.content_digests([corpus], tmp_path / "other") != before


def test_a_damaged_list_of_digests_is_made_again(corpus, tmp_path):
    before = cache.content_digests([corpus], tmp_path)
    for damage in ("", "[1]", '{"a": 3}', "{"):
        (tmp_path / "files.json").write_text(damage)
        assert cache.content_digests([corpus], tmp_path) == before


def test_reading_in_order_equals_the_memory_map(corpus, monkeypatch):
    monkeypatch.setattr(tables, "_PIECE", 1000)
    rows = kept(corpus).load("train")
    assert tables._file_of(rows) and not tables._file_of(rows.select(range(5, 50)))
    for some in (rows, rows.select(range(50)), rows.select(range(5, 50)), rows.select([0, 7, 49])):
        found = pa.concat_tables(consecutive(some))
        assert found["text"].to_pylist() == some["text"][:] and found.column_names == some.column_names


def test_a_table_is_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_PIECE", 100)
    texts = ["a", "b" * 500, "", *["c" * 30] * 20]
    assert write(tmp_path / "x", (pa.table({"text": texts[at : at + 4]}) for at in range(0, len(texts), 4))) == 23
    found = list(read(tmp_path / "x"))
    assert pa.concat_tables(found)["text"].to_pylist() == texts and len(found) > 4
    assert write(tmp_path / "y", []) == 0 and not (tmp_path / "y").exists()


@pytest.mark.parametrize("wrap", [True, False])
def test_the_rows_do_not_depend_on_the_number_of_processes(wrap, corpus, monkeypatch):
    monkeypatch.setattr(tables, "_PIECE", 5000)
    rows, tokenizer = kept(corpus).load("train"), load_tokenizer("byte", cache_dir=corpus.parent)
    monkeypatch.setattr(packing, "cpu_count", lambda: 3)
    found = []
    for limit in (2**30, 0):
        monkeypatch.setattr(packing, "_LARGE", limit)
        setting = Packing(64, wrap, long_texts="windows")
        packed, figures = pack(rows, tokenizer, vocabulary(tokenizer), setting, None)
        found.append((packed.with_format(None).to_dict(), figures))
    assert found[0] == found[1] and found[0][1]["texts"] == len(rows)


def test_an_error_of_a_process_is_that_of_one_process(corpus, monkeypatch):
    rows, tokenizer = kept(corpus).load("train"), load_tokenizer("byte", cache_dir=corpus.parent)
    monkeypatch.setattr(packing, "_LARGE", 0)
    monkeypatch.setattr(packing, "cpu_count", lambda: 2)
    with pytest.raises(ValueError, match=r"train split: \d+ of \d+ texts are longer than model\.length=20"):
        pack(rows, tokenizer, vocabulary(tokenizer), Packing(20, False), None, "train split")


def test_processes_are_only_a_few_items_ahead():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    results = in_order(abs, items(), processes=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2] and len(taken) < 12
    assert list(results) == list(range(3, 100))


def test_packer_counts_are_added_up():
    figures = packing.Figures(texts=2, longest=5)
    figures.add(packing.Figures(texts=3, longest=4))
    assert (figures.texts, figures.longest) == (5, 5)
