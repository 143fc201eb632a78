"""data=mixture: shares by weight, the order of each data set as if it were alone, and a resume in the middle."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra.utils import instantiate

from palimpsest.data.order import MIXED, mixed_rows_at, quotas, rows_at
from palimpsest.data.user_files import mixture
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from tests.helpers.texts import text_data


@pytest.fixture
def paths(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{'a' * (i % 9 + 1)}{i}\n" for i in range(400)))
    rows = [json.dumps({"text": f"{'b' * (i % 9 + 1)}{i}"}) for i in range(50)]
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    return {"a": str(tmp_path / "a.txt"), "b": str(tmp_path / "b.jsonl")}


def data_of(paths, weights, validation=None, **settings):
    source = mixture(paths, weights, validation)
    settings = {"wrap": False, "global_batch_size": 8, "max_steps": 500} | settings
    cache = f"{paths['a']}.cache"
    return text_data(source, length=32, tokenizer_name_or_path="byte", cache_dir=cache, **settings)


def test_every_thousand_positions_have_the_shares_and_each_set_its_own_order():
    sizes, weights = [300, 7, 90], [1, 2, 5.0]
    positions = np.arange(5 * MIXED)
    rows = mixed_rows_at(positions, sizes, weights, seed=3)
    kinds = np.searchsorted(np.cumsum(sizes), rows, side="right")
    for block in np.split(kinds, 5):
        assert np.bincount(block).tolist() == quotas(weights).tolist() == [125, 250, 625]
    for kind, (size, first) in enumerate(zip(sizes, (0, 300, 307), strict=True)):
        own = rows[kinds == kind] - first
        assert own.tolist() == rows_at(range(len(own)), size, 3).tolist(), "epoch by epoch, nothing left out"
    some = np.random.default_rng(0).permutation(positions)[:100]
    assert mixed_rows_at(some, sizes, weights, 3).tolist() == rows[some].tolist(), "a function of the position alone"


def test_quotas_are_whole_and_sum_up():
    assert quotas([1, 1, 1]).tolist() == [334, 333, 333] and quotas([3, 1]).tolist() == [750, 250]


def test_no_held_out_text_of_any_corpus_is_trained_on(paths, tmp_path):
    (tmp_path / "b.txt").write_text((tmp_path / "a.txt").read_text() + "".join(f"b{i}\n" for i in range(200)))
    data = data_of({"a": paths["a"], "b": str(tmp_path / "b.txt")}, {"a": 1, "b": 3})
    trained = set(data.texts("train")["text"][:])
    for measured in data.source.sources.values():
        for split in ("validation", "test"):
            assert not trained & set(measured.load(split)["text"][:])
    assert any(text.startswith("b") for text in trained) and any(text.startswith("a") for text in trained)


@pytest.mark.parametrize("wrap", [False, True])
def test_training_takes_the_shares_and_resumes(paths, wrap):
    data = data_of(paths, {"a": 1, "b": 3}, wrap=wrap)
    batches = list(itertools.islice(data.train_dataloader(), 125))  # 1,000 rows
    sizes = [len(part) for part in data._packed("train", data.packings["train"])[0]]
    assert sum(sizes) == len(data.split("train"))
    ids = np.concatenate([batch["sample_id"] for batch in batches])
    rows = data.split("train")
    assert len(set(rows["sample_id"][:].tolist())) == len(rows), "each row has a number of its own"
    of_a = {int(number) for number in rows["sample_id"][: sizes[0]]}
    assert sum(int(number) in of_a for number in ids) == 250
    later = data_of(paths, {"a": 1, "b": 3}, wrap=wrap)
    later.trainer = SimpleNamespace(global_rank=0, world_size=1, max_steps=500, global_step=100, num_devices=1)
    later.load_state_dict({"consumed_samples": 800, **later._order})
    again = list(itertools.islice(later.train_dataloader(), 25))
    assert all(one["input_ids"].equal(two["input_ids"]) for one, two in zip(batches[100:], again, strict=True))


def test_the_order_of_the_names_changes_nothing_but_the_measured_data_set(paths):
    turned = dict(reversed(paths.items()))
    one, two = data_of(paths, {"a": 1, "b": 3}, "a"), data_of(turned, {"b": 3, "a": 1}, "a")
    for _, first, second in zip(range(30), one.train_dataloader(), two.train_dataloader(), strict=False):
        assert first["input_ids"].equal(second["input_ids"])
    words = [f"data.paths={{a:{paths['a']},b:{paths['b']}}}", f"data.paths={{b:{paths['b']},a:{paths['a']}}}"]
    typed = [compose_config(["data=mixture", word, "data.weights={a:1,b:3}"]) for word in words]
    known = [identity(cfg)["data.valid"] for cfg in typed]
    assert known == ["a", "b"], "so the second command is another run"
    assert [instantiate(cfg.data.source).choice["test"] for cfg in typed] == known


def test_held_out_texts_are_looked_for_once(paths, tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_text("".join(f"{'a' * (i % 9 + 1)}{i}\n" for i in range(300, 700)))
    both = paths | {"b": str(tmp_path / "b.txt")}
    first, second = data_of(both, {"a": 1, "b": 1}), data_of(both, {"a": 1, "b": 1})

    def seen(data):
        rows = [ids.tolist() for ids in data.split("train")["input_ids"]]
        return rows, data.train_size, data.texts("train")["text"][:]

    before = seen(first)
    monkeypatch.setattr("palimpsest.data.rows.text_hashes", None)  # a second start does not call it
    assert seen(second) == before


def test_a_tokenizer_of_a_mixture_sees_no_held_out_text_of_any_corpus(tmp_path):
    """The held-out texts of one corpus all stand in the other one."""
    lines = [f"{'a' * (i % 9 + 1)}{i}" for i in range(400)]
    for name, text in (("a", lines), ("b", [*lines, "z"])):
        (tmp_path / f"{name}.txt").write_text("".join(f"{line}\n" for line in text))
    data = data_of({name: str(tmp_path / f"{name}.txt") for name in "ab"}, {"a": 1, "b": 1})
    measured = {text for source in data.source.sources.values() for text in source.load("test")["text"]}
    assert measured and not measured & set(data._texts.whole("train")["text"][:])


def test_texts_are_joined_and_one_data_set_is_measured(paths):
    data = data_of(paths, {"a": 1, "b": 3})
    texts = data.texts("train")
    assert texts["text_id"][:] == list(range(len(texts))) and {text[0] for text in texts["text"]} == {"a", "b"}
    assert data.split("train")["text_id"][:].tolist() == list(range(len(texts)))
    assert {text[0] for text in data.texts("validation")["text"]} == {"a"}
    assert {text[0] for text in data_of(paths, {"a": 1, "b": 3}, "b").texts("validation")["text"]} == {"b"}
    assert data.figures["train"]["texts"] == len(texts)
    few = data_of(paths, {"a": 1, "b": 3}, max_train_texts=10)
    assert len(few.texts("train")) == 20, "the limit is of each data set"


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        (None, {}, r"data\.weights is not set: give .*books:1"),
        ({"a": 1}, {}, r"data\.weights=.* must name each data set of the mixture \(a, b\)"),
        ({"a": 1, "b": 1, "c": 1}, {}, "and no other"),
        ({"a": 1, "b": 1e-5}, {}, r"b has 1e-05 of 1\.00001, less than one row in 1000"),
        ({"a": 1, "b": 1}, {"streaming": True}, "this is a mixture of a, b; set it to false"),
    ],
)
def test_what_does_not_go_together_is_refused(paths, weights, settings, message):
    with pytest.raises(ValueError, match=message):
        next(iter(data_of(paths, weights, **settings, long_texts="drop").train_dataloader()))
    with pytest.raises(ValueError, match=r"data\.paths is not set"):
        mixture(None, None)
    with pytest.raises(FileNotFoundError, match=r"data\.paths\.b=.*no such file"):
        mixture(paths | {"b": "nothing.txt"}, {"a": 1, "b": 1}).load("train")


def test_windows_of_a_mixture_have_numbers_of_their_own(paths):
    """The text with the most windows is not the last one."""
    rows = [json.dumps({"text": "c" * (90 if i == 3 else 9)}) for i in range(20)]
    Path(paths["b"]).write_text("\n".join(rows))
    data = data_of(paths, {"a": 1, "b": 1}, long_texts="windows")
    ids = np.asarray(data.split("train")["sample_id"])
    assert len(set(ids.tolist())) == len(ids)
