"""Few labels and wrong labels: exact numbers, the same for every model, baseline and seed."""

from __future__ import annotations

import numpy as np
import pytest

from palimpsest.classification.methods import _texts
from palimpsest.data.labels import first_of_each_class, with_wrong_labels
from palimpsest.data.rows import from_table, text_table
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from tests.helpers.commands import FEW, TINY, experiment, refused

NAMES = ("a", "b", "c")
SMALL = [*FEW, "trainer.accelerator=cpu"]


def rows_of(number: int = 300):
    label_M = np.random.default_rng(0).permutation(np.arange(number) % 3)
    rows = from_table(text_table([f"text {i}" for i in range(number)], label_M.tolist()))
    return rows.add_column("text_id", np.arange(number))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def labels_by_id(rows) -> dict[int, int]:
    return dict(zip(rows["text_id"][:], rows["label"][:], strict=True))


def test_each_class_has_the_number_and_smaller_choices_are_parts_of_larger_ones():
    rows, known, before = rows_of(), labels_by_id(rows_of()), set()
    for number in (1, 5, 37, 100):
        some = labels_by_id(first_of_each_class(rows, number, NAMES))
        assert np.bincount(list(some.values())).tolist() == [number] * 3
        assert before <= some.keys() and all(known[i] == label for i, label in some.items())
        before = some.keys()
    assert first_of_each_class(rows, None, NAMES) is rows
    chosen = list(first_of_each_class(rows, 20, NAMES)["text_id"][:])
    assert chosen == sorted(chosen) and max(chosen) > 200, "in their order, from the whole split"


@pytest.mark.parametrize("share", [0.2, 0.29, 0.4, 0.95])
def test_the_share_of_wrong_labels_is_exact_in_every_choice(share):
    rows, known = rows_of(), labels_by_id(rows_of())
    all_noisy = labels_by_id(with_wrong_labels(rows, share, NAMES))
    with pytest.raises(
        ValueError, match=rf"label_noise={share}: no class has the \d+ texts of which one label is wrong"
    ):
        with_wrong_labels(first_of_each_class(rows, 1, NAMES), share, NAMES)
    for number in (5, 8, 10, 100):
        noisy = labels_by_id(with_wrong_labels(first_of_each_class(rows, number, NAMES), share, NAMES))
        assert all(all_noisy[i] == label for i, label in noisy.items()), "the same labels in every choice"
        for label in range(3):
            wrong = [noisy[i] for i in noisy if known[i] == label and noisy[i] != label]
            assert len(wrong) == int(share * number + 1e-9)
            if number == 100:
                assert abs(np.mean([one == (label + 1) % 3 for one in wrong]) - 0.5) < 2 / len(wrong) ** 0.5
    assert with_wrong_labels(rows, 0.0, NAMES) is rows


def test_models_and_baselines_have_the_same_labels_and_measured_texts_keep_theirs():
    plain = experiment(*SMALL).build.data()
    settings = ["data.texts_per_class=20", "data.label_noise=0.25"]
    e = experiment(*SMALL, *settings)
    data = e.build.data()
    noisy, clean = labels_by_id(data.texts("train")), labels_by_id(plain.texts("train"))
    assert len(noisy) == 40 and sum(noisy[i] != clean[i] for i in noisy) == 10
    for split in ("validation", "test"):
        assert data.texts(split)["label"][:] == plain.texts(split)["label"][:]
    assert labels_by_id(data.split("train")) == noisy and data.vocabulary.size == plain.vocabulary.size
    for label in (0, 1):  # the model of one class
        own = labels_by_id(e.build.data(label).split("train"))
        assert own == {i: label for i in noisy if noisy[i] == label}
    assert _texts(data, "train").label_M.tolist() == [noisy[i] for i in sorted(noisy)]  # what baselines train on
    assert labels_by_id(experiment(*SMALL, *settings, "seed=7").build.data().split("train")) == noisy


def test_a_shared_start_without_labels_reads_all_texts():
    settings = ["classify.pretrain=all", "classify.pretrain_steps=2"]
    plain, few = (experiment(*SMALL, *settings, *more).pretraining
                  for more in ([], ["data.texts_per_class=5", "data.label_noise=0.5"]))  # fmt: skip
    assert len(few.build.data().split("train")) == len(plain.build.data().split("train")) == 80
    assert identity(few._cfg) == identity(plain._cfg)


def test_the_fingerprint_contains_them_if_they_are_set():
    plain = identity(compose_config([]))
    assert not {"data.label_noise", "data.texts_per_class"} & plain.keys()
    found = identity(compose_config(["data.label_noise=0.2", "data.texts_per_class=8"]))
    assert found == {**plain, "data.label_noise": 0.2, "data.texts_per_class": 8}
    assert identity(compose_config(["data.label_noise=0", "data.texts_per_class=null"])) == plain


def test_messages(tmp_path):
    classify = ["mode=classify", *TINY, *FEW]
    refused(r"data.label_noise=1 must be a number in \[0, 1\)", *classify, "data.label_noise=1")
    refused(r"data.label_noise=-0.1 must be", *classify, "data.label_noise=-0.1")
    refused("data.texts_per_class=0 must be a whole number from 1", *classify, "data.texts_per_class=0")
    refused(r"data.texts_per_class=41.* has 40 texts of class 0 \(negative\); lower it", *classify,
            "data.texts_per_class=41")  # fmt: skip
    refused("data.texts_per_class=5 needs all texts.*data.streaming=false", *classify, "data.texts_per_class=5",
            "data.streaming=true")  # fmt: skip
    refused(
        "data.label_noise=0.1: no class has the 10 texts of which",
        *classify,
        "data.label_noise=0.1",
        "data.texts_per_class=9",
    )
    refused(
        "there is no training text of class [a-z]+; use more training texts",
        *classify,
        "data.max_train_texts=1",
        "classify.sharing=conditional",
        "loader.global_batch_size=1",
    )
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"one more line of text, number {i}" for i in range(60)))
    text = ["data=text", f"data.path={path}", "data.tokenizer_name_or_path=char", "model.length=16", *TINY]
    refused("data.label_noise=0.2: these texts have no labels; set data.label_noise=0", *text, "data.label_noise=0.2")
    refused("data.texts_per_class=5: these texts have no labels; set data.texts_per_class=null", *text,
            "data.texts_per_class=5")  # fmt: skip
