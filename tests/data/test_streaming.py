"""Streams have one order for any readers: packed rows, every text once per epoch, exact resumes."""

import gzip
import io
import itertools
import json
import logging
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from palimpsest.data import streaming
from palimpsest.data.loading import Loading
from palimpsest.data.shards import share_of
from palimpsest.data.sources import HubOrFolder
from palimpsest.data.streaming import LaneCursor, Order
from palimpsest.data.user_files import UserFiles
from palimpsest.diffusion import Diffusion
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.checkpoints import load_inert
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from tests.helpers.commands import TINY
from tests.helpers.texts import text_data

G, STEPS, N = 12, 8, 90


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Make many chunks of a few texts."""
    monkeypatch.setattr(streaming, "CHUNK_CHARACTERS", 150)


def texts(number=N, start=0):
    return [f"<{i}> " + "very " * (i * i % 7) + "long" for i in range(start, start + number)]


def write(folder, kind="jsonl", files=3, number=N):
    """Write `files` files of this kind, with `number` texts in all; return a glob of them."""
    folder.mkdir(exist_ok=True)
    for part, rows in enumerate(np.array_split(np.array(texts(number), dtype=object), files)):
        path, rows = folder / f"part{part}.{kind}", list(rows)
        if kind == "txt":
            path.write_text("\n\n".join(rows) + "\n")
        elif kind == "csv":
            path.write_text("text,n\n" + "".join(f"{row},7\n" for row in rows))
        elif kind == "parquet":
            pq.write_table(pa.table({"n": range(len(rows)), "text": rows}), path, row_group_size=11)
        else:
            lines = "".join(json.dumps({"text": row, "n": 7}) + "\n" for row in rows)
            path.write_bytes(gzip.compress(lines.encode()) if kind.endswith("gz") else lines.encode())
    return str(folder / f"*.{kind}")


def data(tmp_path, path=None, *, rank=0, world=1, step=0, order=None, num_workers=0, **settings):
    """Return TextData on all texts of `path`, with separate files for the held-out splits."""
    path = path or (write(tmp_path / "corpus") if not (tmp_path / "corpus").exists() else str(tmp_path / "corpus/*"))
    held_out = write(tmp_path / "held_out", "txt", files=1, number=5)
    source = UserFiles(path, validation_path=held_out, test_path=held_out)
    given = {"length": 24, "tokenizer_name_or_path": "byte", "streaming": True, "global_batch_size": G, "seed": 3,
             "insert_train_special": False, "max_steps": STEPS, "cache_dir": tmp_path / "cache",
             "max_valid_texts": 5, "max_test_texts": 5, "loading": Loading(num_workers)}  # fmt: skip
    module = text_data(source, stream=Order(**{"lanes": 4, "shuffle_buffer": 8, **(order or {})}), **(given | settings))
    steps = module.batches.max_steps
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world, max_steps=steps, global_step=step)
    return module


def rows(*modules) -> dict[int, list[int]]:
    """Return position -> tokens for all batches of these ranks."""
    seen = {}
    for module in modules:
        for batch in module.train_dataloader():
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"], dtype=torch.bool))
            for position, ids, kept in zip(batch["position"].tolist(), batch["input_ids"], mask, strict=True):
                assert position not in seen
                seen[position] = ids[kept].tolist()
    return dict(sorted(seen.items()))


def saved(modules, step):
    """Return the state of the ranks after `step` steps, as loaded from a checkpoint."""
    states = []
    for module in modules:
        module.trainer.global_step = step
        states.append(module.state_dict())
    places = {}
    for state in states:  # what all_gather_object does between processes
        for lane, place in state["stream"]["places"].items():
            if place["rows"] >= places.get(lane, place)["rows"]:
                places[lane] = place
    states[0]["stream"]["places"] = places
    file = io.BytesIO()
    torch.save(states[0], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


PADDED = {"wrap": False, "insert_train_special": True, "long_texts": "truncate"}


# -------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("settings", [
    {}, {"insert_train_special": True}, {"insert_train_eos": False}, PADDED, {**PADDED, "long_texts": "windows"},
], ids=str)  # fmt: skip
def test_in_one_lane_and_unshuffled_the_rows_are_those_of_packing(settings, tmp_path):
    one = write(tmp_path / "corpus", files=1)
    streamed = rows(data(tmp_path, one, order={"lanes": 1, "shuffle_buffer": 1}, max_steps=3, **settings))
    kept = data(tmp_path, one, streaming=False, **settings).split("train")["input_ids"]
    assert list(streamed.values()) == [ids.tolist() for ids in kept[: 3 * G]]


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "jsonl.gz", "parquet"])
def test_files_of_every_kind_hold_the_same_stream(kind, tmp_path):
    path = write(tmp_path / "corpus", kind, files=1)
    if kind == "parquet":  # its row groups are pieces
        assert len(data(tmp_path, path).source.open("train").ranges) == 9
        return
    one_block = {"order": {"lanes": 1, "shuffle_buffer": 1000}, "max_steps": 2}
    assert rows(data(tmp_path, path, **one_block)) == rows(data(tmp_path, write(tmp_path / "b", files=1), **one_block))


@pytest.mark.parametrize("settings", [{}, PADDED], ids=["wrapped", "padded"])
def test_workers_ranks_and_micro_batches_change_nothing(settings, tmp_path):
    plain = rows(data(tmp_path, **settings))
    assert list(plain) == list(range(G * STEPS))
    for workers in (1, 2):
        assert rows(data(tmp_path, num_workers=workers, **settings)) == plain
    for world, batch_size in ((1, 4), (2, None), (2, 3), (3, 2), (4, 1), (12, 1)):
        ranks = [data(tmp_path, rank=r, world=world, batch_size=batch_size, **settings) for r in range(world)]
        assert rows(*ranks) == plain
    assert rows(data(tmp_path, rank=1, world=2, num_workers=2, **settings)) == {
        position: ids for position, ids in plain.items() if position % G >= G // 2
    }
    assert rows(data(tmp_path, seed=4, **settings)) != plain


def test_a_batch_follows_the_contract(tmp_path):
    for settings in ({}, PADDED):
        module = data(tmp_path, **settings)
        batch = next(iter(module.train_dataloader()))
        padded = {"attention_mask", "observed"} if settings else set()
        assert batch.keys() == {"input_ids", "sample_id", "position"} | padded
        assert torch.equal(batch["sample_id"], batch["position"]) and batch["input_ids"].dtype == torch.int64
        assert (batch["input_ids"] < module.vocabulary.size).all()
    assert len(data(tmp_path).train_dataloader()) == STEPS


# -------------------------------------------------------------------------------- epochs


def epochs_of(module, count):
    """Return the texts of the first epochs of the list of pieces, joined over all lanes in order."""
    corpus = module.train_dataloader().corpus
    found = [[] for _ in range(count)]
    for lane in range(corpus.lanes):
        for chunk in corpus.chunks(lane, LaneCursor()):
            epoch = (lane + chunk.before.piece * corpus.lanes) // corpus.pieces
            if epoch >= count:
                break
            found[epoch] += [module.tokenizer.decode(ids) for ids in chunk.columns["input_ids"]]
    return found


UNCUT = {"wrap": False, "length": 64, "long_texts": "truncate", "insert_train_eos": False}


@pytest.mark.parametrize(("files", "lanes"), [(1, 1), (1, 4), (3, 4), (3, 3), (5, 2), (7, 12)])
def test_every_text_comes_once_in_every_epoch(files, lanes, tmp_path):
    path = write(tmp_path / "corpus", files=files)
    epochs = epochs_of(data(tmp_path, path, order={"lanes": lanes}, **UNCUT), 3)
    assert all(Counter(epoch) == Counter(texts()) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3, "each epoch has an order of its own"
    assert epochs[0] != texts()


def test_texts_run_on_from_piece_to_piece(tmp_path):
    """With one lane, nothing is lost between blocks, pieces and epochs of wrapped texts."""
    module = data(tmp_path, order={"lanes": 1, "shuffle_buffer": 1}, max_steps=STEPS)
    flat = [i for ids in rows(module).values() for i in ids]
    eos = module.vocabulary.eos_id
    runs = [list(run) for end, run in itertools.groupby(flat, lambda i: i == eos) if not end]
    read = [module.tokenizer.decode(run) for run in runs[:-1]]
    assert set(read) == set(texts()) and len(read) > N + 5
    assert sorted(read[:N]) == sorted(texts())


def test_lanes_divide_the_batch():
    assert [Order(lanes=16).lanes_of(size) for size in (1, 4, 12, 32, 17, 512)] == [1, 4, 12, 16, 1, 16]


# -------------------------------------------------------------------------------- resumes


@pytest.mark.parametrize("settings", [{}, PADDED], ids=["wrapped", "padded"])
@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_resume_is_exact_also_with_other_processes(settings, step, tmp_path):
    whole = rows(data(tmp_path, **settings))
    rest = {position: ids for position, ids in whole.items() if position >= step * G}
    for ranks, workers in ((1, 0), (2, 0), (1, 2)):
        before = [data(tmp_path, rank=r, world=ranks, num_workers=workers, **settings) for r in range(ranks)]
        assert rows(*before) == whole
        state = saved(before, step)
        assert state["consumed_samples"] == step * G and len(state["stream"]["places"]) == 4
        for world, more in ((1, 0), (1, 2), (3, 0)):
            after = [data(tmp_path, rank=r, world=world, step=step, num_workers=more, **settings) for r in range(world)]
            for module in after:
                module.load_state_dict(state)
            assert rows(*after) == rest


def test_a_resume_of_a_resume(tmp_path):
    whole = rows(data(tmp_path))
    module, step = data(tmp_path), 0
    for until in (2, 3, 6):
        loader = iter(module.train_dataloader())
        for _ in range(until - step):
            next(loader)
        state, step = saved([module], until), until
        module = data(tmp_path, step=step)
        module.load_state_dict(state)
        assert saved([module], step)["stream"].keys() == state["stream"].keys(), "also before it goes on"
    assert rows(module) == {position: ids for position, ids in whole.items() if position >= 6 * G}


def test_a_resume_tokenises_a_chunk_for_each_lane_and_no_more(tmp_path, monkeypatch):
    before = data(tmp_path)
    list(before.train_dataloader())
    state = saved([before], STEPS - 1)
    after = data(tmp_path, step=STEPS - 1)
    after.load_state_dict(state)
    asked = []
    real = streaming.Packer.tokenise
    monkeypatch.setattr(streaming.Packer, "tokenise", lambda self, some: asked.append(some) or real(self, some))
    next(iter(after.train_dataloader()))
    assert len(asked) <= 2 * 4 and len(before.train_dataloader().places) == 0
    # Without its places it is the same stream, read from the beginning.
    state["stream"]["places"] = {}
    again = data(tmp_path, step=STEPS - 1)
    again.load_state_dict(state)
    few = len(asked)
    first = rows(again)
    assert len(asked) - few > 3 * few
    assert first == {position: ids for position, ids in rows(data(tmp_path)).items() if position >= (STEPS - 1) * G}


def test_old_cursors_are_forgotten(tmp_path):
    module = data(tmp_path, max_steps=100, batch_size=1)
    loader = module.train_dataloader()
    for number, _ in enumerate(loader):
        module.trainer.global_step = number // G
        assert sum(map(len, loader.places.values())) < 150


def test_a_changed_stream_is_refused(tmp_path):
    before = data(tmp_path)
    list(itertools.islice(before.train_dataloader(), 5))
    state = saved([before], 4)

    def resumed(**settings):
        module = data(tmp_path, step=4, **settings)
        module.load_state_dict(state)
        return list(module.train_dataloader())

    assert len(resumed()) == STEPS - 4
    with pytest.raises(ValueError, match=r"streaming\.lanes=3, but .* begun with 4"):
        resumed(order={"lanes": 3})
    with pytest.raises(ValueError, match=r"streaming\.shuffle_buffer=9, but .* begun with 8"):
        resumed(order={"shuffle_buffer": 9})
    with pytest.raises(ValueError, match=r"seed=4, but"):
        resumed(seed=4)
    with pytest.raises(ValueError, match=r"data\.streaming=false \(of all texts\), but .* begun with true"):
        resumed(streaming=False)
    for path in (tmp_path / "corpus").iterdir():  # other words of the same size
        path.write_text(path.read_text().replace("very", "most"))
    with pytest.raises(ValueError, match="not the texts that the run to be resumed has read"):
        resumed()
    with next((tmp_path / "corpus").iterdir()).open("a") as file:
        file.write('{"text": "one more", "n": 7}\n')
    with pytest.raises(ValueError, match=r"the corpus \(files\)=.* begun with"):
        resumed()


def test_every_rank_saves_the_places_of_all(tmp_path, monkeypatch):
    ranks = [data(tmp_path, rank=r, world=2) for r in range(2)]
    rows(*ranks)
    alone = [module._streamed.state()["places"] for module in ranks]
    assert sorted(map(sorted, alone)) == [[0, 1], [2, 3]], "no lane is read twice"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def all_gather_object(into, mine):
        into[:] = alone

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    for module in ranks:
        assert sorted(module._streamed.state()["places"]) == [0, 1, 2, 3]


# -------------------------------------------------------------------------------- splits


def test_held_out_texts_are_chosen_by_hash(tmp_path):
    path = write(tmp_path / "corpus", files=2, number=300)
    with (tmp_path / "corpus/part0.jsonl").open("a") as file:  # every text twice
        file.write((tmp_path / "corpus/part1.jsonl").read_text() + (tmp_path / "corpus/part0.jsonl").read_text())
    source = UserFiles(path, validation_share=0.2, test_share=0.1)
    parts = {split: set(source.stream(split, 1000)["text"]) for split in source.splits}
    assert sum(map(len, parts.values())) == 300 == len(set.union(*parts.values()))
    assert 30 < len(parts["validation"]) < 90 and 10 < len(parts["test"]) < 60
    assert source.stream("validation", 7)["text"][:] == source.stream("validation", 1000)["text"][:7]
    module = text_data(
        source,
        streaming=True,
        tokenizer_name_or_path="byte",
        cache_dir=tmp_path,
        max_steps=1,
        length=64,
        wrap=False,
        long_texts="truncate",
        max_valid_texts=50,
        max_test_texts=9,
    )
    streamed = [text.removeprefix("[BOS]").removesuffix("[EOS]") for text in epochs_of(module, 1)[0]]
    assert Counter(streamed) == Counter({text: 2 for text in parts["train"]})


def test_shares_are_what_they_say():
    found = Counter(share_of([str(i) for i in range(20000)], 0, {"validation": 0.05, "test": 0.1}).tolist())
    for split, share in (("validation", 0.05), ("test", 0.1), ("train", 0.85)):
        assert abs(found[split] / 20000 - share) < 5 * (share * (1 - share) / 20000) ** 0.5


def test_labels_come_along_and_choose(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    rows_of = [{"text": f"{i} {'ab'[i % 2]}", "label": i % 2} for i in range(60)]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    source = HubOrFolder(
        "nowhere/mine", "mine", {"train": "train.jsonl"}, {}, label_column="label", label_names=["a", "b"]
    )

    def batches(**settings):
        module = text_data(
            source,
            streaming=True,
            tokenizer_name_or_path="byte",
            cache_dir=tmp_path,
            max_steps=10,
            length=24,
            long_texts="truncate",
            global_batch_size=6,
            loading=Loading(0),
            insert_train_special=False,
            **settings,
        )
        return module, list(module.train_dataloader())

    module, every = batches(wrap=False)
    for batch in every:
        for ids, label in zip(batch["input_ids"], batch["label"].tolist(), strict=True):
            assert module.tokenizer.decode(ids).split("[EOS]")[0].endswith("ab"[label])
    for wrap in (True, False):
        module, one = batches(wrap=wrap, label=1)
        said = "".join(module.tokenizer.decode(ids) for batch in one for ids in batch["input_ids"])
        assert all((batch["label"] == 1).all() for batch in one) and "b[EOS]" in said and "a[EOS]" not in said
    assert "label" not in batches(wrap=True)[1][0]
    with pytest.raises(ValueError, match=r"data\.label=2 is not one of the labels: 0 \(a\), 1 \(b\)"):
        batches(wrap=False, label=2)


@pytest.mark.parametrize("kind", ["own files", "a named set"])
def test_prompts_are_observed_also_after_a_resume(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    path = tmp_path / "mine" / "train.jsonl"
    path.parent.mkdir()
    path.write_text(
        "\n".join(json.dumps({"ask": "say" + "!" * (i % 4) + f" {i}", "text": f"it is {i}"}) for i in range(60))
    )
    source = UserFiles(str(path), prompt_column="ask", validation_path=str(path), test_path=str(path))
    if kind == "a named set":
        source = HubOrFolder(
            "nowhere/mine",
            "mine",
            {"train": "train.jsonl"},
            {},
            text_columns=["ask", "text"],
            parts=["{ask}\n", "{text}"],
        )

    def batches(step=0, num_workers=0, state=None, **settings):
        given = {"wrap": False, "fill": "eos", "segments": True, "long_texts": "drop", "length": 24}
        module = text_data(
            source,
            streaming=True,
            tokenizer_name_or_path="byte",
            cache_dir=tmp_path,
            max_steps=STEPS,
            global_batch_size=G,
            stream=Order(lanes=4, shuffle_buffer=8),
            loading=Loading(num_workers),
            **(given | settings),
        )
        module.trainer = SimpleNamespace(global_rank=0, world_size=1, max_steps=STEPS, global_step=step)
        module.load_state_dict(state or {})
        return module, list(module.train_dataloader())

    module, whole = batches()
    seen = set()
    for batch in whole:
        assert (
            torch.equal(torch.arange(24) < batch["segment_ends"], batch["observed"])
            and batch["eos_padding"].any(-1).all()
        )
        for ids, given, fill in zip(batch["input_ids"], batch["observed"], batch["eos_padding"], strict=True):
            prompt, text = module.tokenizer.decode(ids[given]), module.tokenizer.decode(ids[~given & ~fill])
            number = prompt.split()[-1]
            assert prompt.startswith("[BOS]say") and prompt.endswith("\n") and text == f"it is {number}[EOS]"
            seen.add(int(number))
    assert seen == set(range(60))
    _, rest = batches(step=3, num_workers=2, state=saved([module], 3))
    assert len(rest) == STEPS - 3
    for ours, theirs in zip(whole[3:], rest, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for settings, said in (
        ({"wrap": True, "fill": None, "segments": False}, "wrap=true joins"),
        ({"long_texts": "windows"}, "would part"),
    ):
        with pytest.raises(ValueError, match=f"train stream: data.*{said}"):
            batches(**settings)


def test_stored_texts_are_the_first_ones(tmp_path):
    module = data(tmp_path, order={"sample_texts": 7}, tokenizer_name_or_path="word")
    assert module.texts("train")["text"][:] == texts(7)
    assert len(module.split("train")) > 0 and len(list(module.val_dataloader())) == 1
    limited = data(tmp_path, max_train_texts=9)
    limited.train_dataloader()
    assert limited._streamed is None and limited.texts("train")["text"][:] == texts(9)


@pytest.mark.parametrize(("settings", "said"), [
    ({"wrap": False}, r"data\.long_texts=error cannot be kept"),
    ({"random_crop": True}, r"data\.random_crop=True needs stored texts"),
    ({"train_splits": ["train", "test"]}, r"classify\.pretrain=\['train', 'test'\] needs stored texts"),
    ({"label": 0}, r"data\.label=0: these texts have no labels"),
    ({"max_valid_texts": None, "max_test_texts": None}, r"validation has none: set data\.max_valid_texts"),
    ({"length": 100000}, r"lane 0 of the stream found no row in 15 pieces"),
    ({"wrap": False, "long_texts": "drop", "length": 2}, r"none that is short enough.* raise model\.length"),
])  # fmt: skip
def test_what_a_stream_can_not_do(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        module = data(tmp_path, **settings)
        next(iter(module.train_dataloader()))
        module.val_dataloader()


def test_files_of_two_kinds_are_read_as_without_streaming(tmp_path):
    write(tmp_path / "corpus", "csv", files=1)
    write(tmp_path / "corpus", "jsonl", files=2)
    held_out = write(tmp_path / "held_out", "txt", files=1, number=5)
    source = UserFiles(str(tmp_path / "corpus"), validation_path=held_out, test_path=held_out)
    assert source.open("train").first(1000)["text"][:] == source.load("train")["text"][:]


def test_truncated_texts_are_reported(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        list(data(tmp_path, max_steps=20, batch_size=2, **PADDED | {"length": 16}).train_dataloader())
    assert "texts are longer than model.length=16" in caplog.text


# -------------------------------------------------------------------------------- a run


def test_a_killed_run_on_a_stream_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "corpus")
    settings = ["data=text", f"data.path='{path}'", "data.streaming=true", "data.tokenizer_name_or_path=byte",
                "data.max_train_texts=null", "model.length=32", "streaming.lanes=2", "streaming.shuffle_buffer=8",
                "trainer.max_steps=7", "trainer.val_check_interval=3", "model.dropout=0.2", "optim=adamw",
                "callbacks.checkpoint_every_n_steps.every_n_train_steps=2"]  # fmt: skip
    base = compose_config([*TINY, *settings])
    assert identity(base)["streaming.lanes"] == 2
    assert not any(key.startswith("streaming") for key in identity(compose_config(TINY)))

    def train(folder, workers):
        changed = base.copy()
        changed.checkpointing.save_dir, changed.loader.num_workers = folder, workers
        fit(Experiment(changed, "a test"))

    train("whole", 0)
    step = Diffusion.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 5:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Diffusion, "training_step", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train("killed", 0)
    monkeypatch.setattr(Diffusion, "training_step", step)
    train("killed", 2)
    whole, resumed = (load_inert(tmp_path / f"{name}/checkpoints/last.ckpt") for name in ("whole", "killed"))
    assert whole["global_step"] == resumed["global_step"] == 7
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name])
