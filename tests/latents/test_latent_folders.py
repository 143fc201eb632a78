"""Folders of latents for latents=file: reading, and writing of the same bytes by any number of processes and kills."""

from __future__ import annotations

import itertools
import json
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from palimpsest.latents.lsa import LSA
from palimpsest.latents.preparing import Plan, Preparation, whole_file
from palimpsest.latents.shards import Shards
from palimpsest.scripts import prepare_latents
from tests.helpers.commands import in_a_process, wait_for
from tests.helpers.latent_data import Given, Unit, data_with, some_texts, write_folder

TEXTS = {"train": some_texts(50, 0), "validation": some_texts(20, 1)}


def vectors(width: tuple[int, ...] = (6,)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        split: (3 + 0.2 * rng.normal(size=(len(texts), *width))).astype(np.float32) for split, texts in TEXTS.items()
    }


def latents_of(folder: Path, cache: Path, source: Given | None = None, split: str = "validation", **settings: object):
    """The latents of all rows of a split, in their order."""
    data = data_with(Shards(str(folder), **settings), cache, source or Given(**TEXTS))
    return data.latents.of(split)[np.arange(len(data.split(split)))]


# -------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("width", [(6,), (2, 3)], ids=["one latent token", "two"])
def test_a_row_has_the_vector_of_its_text(tmp_path, width):
    given = vectors(width)
    folder = write_folder(tmp_path / "f", given, TEXTS)
    backwards = Given(train=TEXTS["train"], validation=TEXTS["validation"][::-1])
    latent = latents_of(folder, tmp_path, backwards)
    mean, std = given["train"].mean(0), given["train"].std(0)
    np.testing.assert_allclose(
        latent, ((given["validation"][::-1] - mean) / std).reshape(20, *latent.shape[1:]), atol=1e-4
    )
    train = latents_of(folder, tmp_path, backwards, "train")
    assert train.shape[1:] == (width if len(width) == 2 else (1, 6)), "the shards say how many latent tokens there are"
    assert np.abs(train.mean(0)).max() < 0.02 and np.abs(train.std(0) - 1).max() < 0.02
    assert latents_of(folder, tmp_path, dim=2).shape == (20, 1, 2)
    spelt_otherwise = {split: [text.replace(" ", "  ") for text in texts] for split, texts in TEXTS.items()}
    with pytest.raises(ValueError, match="20 of 20 rows of the validation split have no latent there, such as 'a"):
        latents_of(
            write_folder(tmp_path / "g", given, spelt_otherwise),
            tmp_path,
            Given(train=spelt_otherwise["train"], validation=["a stranger"] * 20),
        )


def test_a_text_that_its_tokens_do_not_spell_is_found_by_itself(tmp_path):
    rare = {split: [f"{text} {'xyz'[i % 3]}{i}" for i, text in enumerate(texts)] for split, texts in TEXTS.items()}
    folder = write_folder(tmp_path / "f", vectors(), rare)
    data = data_with(Shards(str(folder)), tmp_path, Given(**rare), vocab_size=20)
    assert data.latents.packed("validation")[[0]].texts[0] != rare["validation"][0]
    assert data.latents.of("validation")[np.arange(20)].shape == (20, 1, 6)
    with pytest.raises(
        ValueError, match="rows of the validation split have no latent"
    ):  # of the whole text, not of this
        data_with(Shards(str(folder)), tmp_path, Given(**rare), vocab_size=20, length=6).latents.of("validation")


def test_latents_of_nothing_and_of_the_wrong_texts_are_refused(tmp_path):
    def refused(message: str, name: str, given: dict | None = None, texts: dict | None = None, **more: object) -> None:
        folder = write_folder(tmp_path / name, given or vectors(), texts or TEXTS, **more)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            latents_of(folder, tmp_path / f"{name}-cache", Given(**(texts or TEXTS)))

    zero = vectors()
    zero["validation"][7] = 0
    refused(r"validation_data.jsonl, line 8: its vector is all zeros", "zero", zero)
    zero["validation"][7] = np.nan
    refused(r"line 8: its vector is not finite", "nan", zero)
    refused(
        "100.0% of the texts of the validation split are in train too",
        "same",
        None,
        {"train": TEXTS["train"], "validation": TEXTS["train"][:20]},
    )
    refused(
        "1 documents have parts in train and in the validation split",
        "straddling",
        None,
        None,
        documents={"train": [f"d{i // 2}" for i in range(50)], "validation": ["v", "d24", "d24"]},
    )
    moments = [vectors()["train"].mean(0).tolist(), vectors()["train"].std(0).tolist()]
    refused("mean and std in metadata.json are not those", "scale", None, None, mean=moments[0], std=[1.0] * 6)
    refused("mean and std in metadata.json are not those", "place", None, None, mean=[0.0] * 6, std=moments[1])
    refused("must be float32", "kind", {split: x.astype(np.float64) for split, x in vectors().items()})
    refused("2 shards, and metadata.json counts 3", "count", None, None, num_shards=3)
    refused("has no validation_data.jsonl", "split", {"train": vectors()["train"]})
    (write_folder(tmp_path / "line", vectors(), TEXTS) / "validation_data.jsonl").write_text(
        '{"text": "a", "shard": 9, "idx": 0}'
    )
    with pytest.raises(ValueError, match="line 1: there is no row 0 of shard 9"):
        latents_of(tmp_path / "line", tmp_path / "line-cache")


# -------------------------------------------------------------------------------- writing


def work(
    out: Path,
    cache: Path,
    encoder: object | None = None,
    source: Given | None = None,
    shard_size: int = 8,
    splits: tuple[str, ...] = ("train", "validation"),
    **settings: object,
) -> tuple[Preparation, object]:
    """A folder to be written, and the data it is of."""
    data = data_with(encoder or LSA(dim=4), cache, source or Given(**TEXTS), insert_train_special=True)
    data.latents.fit_encoder()
    texts = {split: data.latents.packed(split) for split in splits}
    plan = Plan(data.latents.settings, {split: len(part) for split, part in texts.items()}, shard_size)
    return Preparation(out, plan, texts, data.latents.encoder, **settings), data


def complete(made: Preparation) -> dict[str, object]:
    made.begin()
    made.write(made.missing())
    return made.finish({})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_share(folder: Path, numbers: Iterable[int], pause: float = 0) -> None:
    """Write these shards of the folder `folder` as a process of its own does, with a pause before each."""
    made, _ = work(folder, folder.parent)
    encode = made.encoder.encode
    made.encoder.encode = lambda passages: (time.sleep(pause), encode(passages))[1]
    made.begin()
    made.write(numbers)


def test_two_processes_and_a_kill_make_the_same_bytes_as_one(tmp_path):
    whole, _ = work(tmp_path / "one", tmp_path)
    assert whole.begin() and whole.missing() == list(range(10))
    whole.write(whole.missing())
    metadata = whole.finish({"length": 24})
    assert not whole.begin(), "it is done"
    assert metadata["counts"] == {"train": 50, "validation": 20} and metadata["num_shards"] == 10
    assert metadata["encoder"] == "lsa" and metadata["pooling"] == "tf-idf" and len(metadata["mean"]) == 4

    shared, _ = work(tmp_path / "two", tmp_path)
    shared.begin()
    even, odd = (in_a_process(write_share, tmp_path / "two", range(10)[k::2]) for k in range(2))
    with even as first, odd as second:
        for process in (first, second):
            process.join(300)
            assert process.exitcode == 0
    shared.finish({"length": 24})
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

    killed, _ = work(tmp_path / "killed", tmp_path)
    killed.begin()
    with in_a_process(write_share, tmp_path / "killed", range(10), 0.1) as process:
        wait_for(lambda: len(killed.missing()) <= 7 or not process.is_alive())
        process.kill()
        process.join(60)
    left = killed.missing()
    assert process.exitcode == -9 and 0 < len(left) <= 7
    (tmp_path / "killed" / "latent_shards" / f"shard_{left[0]:04d}.npy.1.partial").write_bytes(b"half of")
    kept = (tmp_path / "killed" / "latent_shards" / "shard_0000.npy").stat().st_mtime_ns
    again, _ = work(tmp_path / "killed", tmp_path)
    assert again.begin()
    again.write(again.missing())
    again.finish({"length": 24})
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")
    assert (tmp_path / "killed" / "latent_shards" / "shard_0000.npy").stat().st_mtime_ns == kept, "made once"
    with pytest.raises(ValueError, match="has latents of other texts, or by other settings"):
        work(tmp_path / "one", tmp_path, LSA(dim=5))[0].begin()


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)


def test_shards_damaged_during_the_work_are_made_again(tmp_path):
    complete(work(tmp_path / "whole", tmp_path)[0])
    hurt, _ = work(tmp_path / "hurt", tmp_path)
    hurt.begin()
    hurt.write(range(6))
    shards, records = tmp_path / "hurt" / "latent_shards", tmp_path / "hurt" / "progress"
    flip_a_bit(shards / "shard_0001.npy")
    (shards / "shard_0002.npy").unlink()
    (records / "shard_0003.json").write_text("")
    again, _ = work(tmp_path / "hurt", tmp_path)
    assert again.begin() and again.missing() == [1, 2, 3, 6, 7, 8, 9]
    again.write(again.missing())
    again.finish({})
    assert contents(tmp_path / "hurt") == contents(tmp_path / "whole")
    (tmp_path / "whole" / "metadata.json").write_text("{")
    with pytest.raises(ValueError, match=r"metadata.json is damaged .*delete the folder"):
        work(tmp_path / "whole", tmp_path)[0].begin()


@pytest.mark.parametrize("name", ["latent_shards/shard_0008.npy", "train_data.jsonl", "encoder.npz"])
def test_a_finished_folder_that_has_changed_is_neither_done_nor_read(tmp_path, name):
    out = tmp_path / "out"
    complete(work(out, tmp_path)[0])
    assert latents_of(out, tmp_path).shape == (20, 1, 4)
    flip_a_bit(out / name)
    with pytest.raises(
        ValueError, match=rf"latents.path=.*: {name} is not the file that metadata.json was written for"
    ):
        latents_of(out, tmp_path)
    with pytest.raises(ValueError, match=rf"{name} is not the file that was written; delete the folder"):
        work(out, tmp_path)[0].begin()


def test_other_vectors_are_other_latents(tmp_path):
    """Their mean and scale need not tell: those of another order are the same. Vectors that were made again, and
    differ in their last digits, are the same latents."""
    theirs = vectors()

    def named(train: np.ndarray, name: str, **message: object) -> str:
        folder = write_folder(tmp_path / name, {**theirs, "train": train}, TEXTS, **message)
        return data_with(Shards(str(folder)), tmp_path / "cache", Given(**TEXTS)).latents.fingerprint

    first, turned = named(theirs["train"], "first"), named(theirs["train"][::-1].copy(), "turned")
    assert named(theirs["train"], "copy") == first != turned
    near = np.nextafter(theirs["train"], 9, dtype=np.float32)
    assert named(near, "near") != first
    assert named(theirs["train"], "made", identity="a") == named(near, "elsewhere", identity="a")
    assert named(theirs["train"], "b", identity="b") != named(theirs["train"], "a", identity="a")


def test_shards_are_read_by_their_numbers_and_damage_is_named(tmp_path):
    vectors = {"train": np.arange(36, dtype=np.float32).reshape(12, 3)}
    folder = write_folder(tmp_path / "f", {"train": vectors["train"]}, {"train": some_texts(12, 0)})
    shards = folder / "latent_shards"
    (shards / "shard_0000.npy").unlink()
    for number in range(12):  # as others may name them: 10 stands before 2 in the alphabet
        np.save(shards / f"shard_{number}.npy", vectors["train"][[number]])
    assert [path.name for path in Shards(folder).paths] == [f"shard_{number}.npy" for number in range(12)]
    (shards / "shard_3.npy").write_bytes((shards / "shard_3.npy").read_bytes()[:40])
    with pytest.raises(ValueError, match="shard_3.npy is damaged"):
        _ = Shards(folder).shape
    (shards / "shard_3.npy").rename(shards / "shard_33.npy")
    with pytest.raises(ValueError, match="without a gap; shard_4.npy is not"):
        _ = Shards(folder).paths
    for content, message in (("{", "metadata.json is damaged"), ("[1]", "metadata.json is not an object")):
        (folder / "metadata.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            _ = Shards(folder).paths


def test_a_file_is_there_when_all_of_it_is(tmp_path):
    path = tmp_path / "latents.npy"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half of")
        file.flush()
        raise KeyboardInterrupt
    assert not path.exists()
    with whole_file(path) as file:
        file.write(b"all of it")
        assert not path.exists()
    assert path.read_bytes() == b"all of it"


def test_prepared_latents_equal_computed_ones(tmp_path):
    prepared, data = work(tmp_path / "out", tmp_path, LSA(dim=4))
    complete(prepared)
    read = data_with(Shards(str(tmp_path / "out")), tmp_path, Given(**TEXTS), insert_train_special=True)
    for split in TEXTS:
        rows = np.arange(len(TEXTS[split]))
        np.testing.assert_allclose(read.latents.of(split)[rows], data.latents.of(split)[rows], atol=1e-5)
    written = data.latents.encode(data.split("validation")["input_ids"][:3])
    np.testing.assert_allclose(read.latents.encode(read.split("validation")["input_ids"][:3]), written, atol=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "out" / "train_data.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == TEXTS["train"] and lines[9] == {
        "text": TEXTS["train"][9],
        "shard": 1,
        "idx": 1,
        "document": "train/9",
    }
    with np.load(tmp_path / "out" / "encoder.npz") as kept:
        assert set(kept) == {"idf", "components", "mean", "std"}


def test_a_folder_of_a_held_out_split_alone_keeps_what_was_fitted_on_train(tmp_path):
    metadata = complete(work(tmp_path / "out", tmp_path, splits=("validation",))[0])
    with np.load(tmp_path / "out" / "encoder.npz") as kept:
        assert set(kept) == {"idf", "components"} and "mean" not in metadata


def test_texts_without_a_latent_are_counted_and_never_written(tmp_path):
    bad = {"broken": (TEXTS["train"][3],), "refused": (TEXTS["train"][20], TEXTS["validation"][2])}
    none, _ = work(tmp_path / "none", tmp_path, Unit(6, **bad))
    none.begin()
    with pytest.raises(ValueError, match=r"1 texts have no latent, such as row 3 .*all zeros.*--max-skipped=0"):
        none.write(none.missing())
    two, _ = work(tmp_path / "two", tmp_path, Unit(6, **bad), max_skipped=2)
    two.begin()
    two.write(two.missing())
    with pytest.raises(ValueError, match=r"3 texts have no latent, .*--max-skipped=2"):
        two.finish({})
    three, _ = work(tmp_path / "two", tmp_path, Unit(6, **bad), max_skipped=3)
    metadata = three.finish({})
    assert metadata["skipped"] == 3 and metadata["counts"] == {"train": 48, "validation": 19}
    shards = [np.load(path) for path in sorted((tmp_path / "two" / "latent_shards").iterdir())]
    assert all(np.abs(shard).sum(1).min() > 0 for shard in shards) and sum(map(len, shards)) == 67
    with pytest.raises(ValueError, match="2 of 50 rows of the train split have no latent there.*data=text data.path="):
        latents_of(tmp_path / "two", tmp_path, split="train")
    without = {
        split: [text for text in texts if text not in bad["broken"] + bad["refused"]] for split, texts in TEXTS.items()
    }
    assert latents_of(tmp_path / "two", tmp_path, Given(**without), "train").shape == (48, 1, 6)


def test_the_command_prepares_what_training_reads(tmp_path, monkeypatch):
    """Chunks of a long text are in one split, and the encoder is given each as it stands."""
    monkeypatch.chdir(tmp_path)
    long = [" ".join(some_texts(1, seed, 30, 40)) for seed in range(40)]
    Path("long.txt").write_text("\n".join(long))
    texts = ["data=text", "data.path=long.txt", "data.tokenizer_name_or_path=word", "data.wrap=false", "model=micro",
             "data.long_texts=windows", "model.length=16", "data.cache_dir=cache"]  # fmt: skip
    overrides = [*texts, "latents=lsa", "latents.dim=4"]
    typed = Namespace(out=Path("out"), splits=None, shard_size=50, processes=1, threads=1, max_skipped=0, texts=40)
    metadata = prepare_latents.prepare(typed, overrides)
    assert prepare_latents.prepare(typed, overrides) == metadata
    assert metadata["length"] == 16 and metadata["also_in_train"] == {"validation": 0, "test": 0}
    lines = {split: [json.loads(line) for line in Path(f"out/{split}_data.jsonl").read_text().splitlines()]
             for split in ("train", "validation", "test")}  # fmt: skip
    owners = [{line["document"] for line in lines[split]} for split in lines]
    assert len(set.union(*owners)) == sum(map(len, owners)) == 40
    assert all(len(line["text"].split()) <= 16 for line in lines["train"]) and len(lines["train"]) > 2 * len(owners[0])
    ends = [line for before, line in itertools.pairwise(lines["train"]) if line["text"] == before["text"]]
    assert ends, "windows of nothing but the end token are about what they end"
    data = prepare_latents.texts_of([*texts, "latents=file", "latents.path=out"])
    batch = next(iter(data.eval_dataloader("validation")))
    assert batch["latent"].shape == (len(batch["input_ids"]), 1, 4)
    shards = data.latents.encoder
    shards.check(replace(data.vocabulary, fingerprint="of others"), 16)
    with pytest.raises(ValueError, match=r"was made by counting other tokens \(word\)"):
        _ = shards.encoder
    checked = prepare_latents.check(typed, overrides)
    assert 0 < checked["retrieval_top1"] <= 1 and checked["texts"] <= 40 and checked["split"] == "validation"
    for change, message in [
        (["latents=lsa", "latents.dim=4", "data.wrap=true", "data.long_texts=error"], "data.wrap=true"),
        (["latents=lsa", "latents.dim=4", "latents.tokens=2"], "latents.tokens=2: the folder keeps"),
        (["latents=none"], "--encoder is missing"), (["latents=file", "latents.path=out"], "exist already"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            prepare_latents.prepare(typed, [*texts, *change])
