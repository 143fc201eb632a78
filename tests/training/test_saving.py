"""Saving: sealed files, retention, full disks, damaged files, URLs."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from palimpsest.common.files import check_content, check_seal, link_or_copy, newest_first, path_or_url
from palimpsest.experiment import running
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.checkpoints import load_inert, read_progress
from palimpsest.settings.command_line import compose_config
from palimpsest.training.callbacks.best import BestCheckpoint, LastCheckpoint
from palimpsest.training.callbacks.retention import clear, keep, make_room, step_file
from palimpsest.training.recovery import newest_good
from palimpsest.training.storage import AtomicCheckpointIO, _seal, write_checkpoint
from tests.helpers.commands import TINY, run
from tests.helpers.networks import same_weights

CONTENT = {"state_dict": {"backbone.x": torch.arange(12.0).view(3, 4)}, "global_step": 3, "note": "text"}
RUN = [*TINY, "model.dropout=0.2", "loader.batch_size=2", "~logger", "trainer.val_check_interval=100",
       "data.source.num_train_per_class=64", "data.source.num_validation_per_class=16", "data.cache_dir=cache",
       "lr_scheduler=constant_warmup", "callbacks.checkpoint_every_n_steps.every_n_train_steps=1"]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def experiment(*overrides: str) -> Experiment:
    return Experiment(compose_config([*RUN, *overrides]), "a test")


def train(steps: int, *overrides: str) -> Experiment:
    built = experiment(f"trainer.max_steps={steps}", *overrides)
    fit(built)
    return built


def flip(path: Path, place: int = 2000) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    with path.open("r+b") as file:  # in place: under all names of the file
        file.write(content)


# -------------------------------------------------------------------------------- seals


def test_every_reader_reads_a_sealed_file(tmp_path):
    path = tmp_path / "x.ckpt"
    write_checkpoint(CONTENT, path)
    assert check_seal(path) and zipfile.ZipFile(path).testzip() is None
    for mmap in (False, True):
        read = torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
        assert torch.equal(read["state_dict"]["backbone.x"], CONTENT["state_dict"]["backbone.x"])
    for weights in (False, True):
        assert load_inert(path, weights)["note"] == "text"
    torch.save(CONTENT, tmp_path / "plain.ckpt")
    torch.save(CONTENT, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("plain.ckpt", "old.ckpt"):
        assert not check_seal(tmp_path / name) and load_inert(tmp_path / name)["global_step"] == 3


def test_every_flipped_bit_and_truncation_is_detected(tmp_path):
    path, damaged = tmp_path / "x.ckpt", tmp_path / "damaged.ckpt"
    write_checkpoint({"x": torch.ones(2)}, path)
    content = path.read_bytes()
    assert check_content(io.BytesIO(content), "x")
    for at in range(len(content)):
        with pytest.raises(ValueError, match="corrupt"):
            check_content(io.BytesIO(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :]), "x")
    for end in [*range(0, len(content), 97), *range(len(content) - 110, len(content), 5)]:
        damaged.write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"damaged\.ckpt"):
            load_inert(damaged)


def test_a_rewritten_file_is_checked_again(tmp_path):
    path = tmp_path / "x.ckpt"
    write_checkpoint(CONTENT, path)
    assert check_seal(path)
    flip(path, 500)
    with pytest.raises(ValueError, match="corrupt"):
        check_seal(path)


# -------------------------------------------------------------------------------- writing


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    write_checkpoint(CONTENT, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(CONTENT, path)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=70_000))
    with pytest.raises(OSError, match=r"0\.1 MB are free, and the file needs about 4\.1 MB"):
        write_checkpoint({"x": torch.zeros(1_000_000), "y": [torch.zeros(10)]}, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_file_raises_one_plain_error(tmp_path):
    class Full(io.BytesIO):
        def write(self, data: bytes) -> int:
            return full() if self.tell() > 1000 else super().write(data)

    with pytest.raises(OSError, match="No space left"):
        _seal({"x": torch.zeros(100_000)}, Full())


def test_a_failed_save_is_skipped_with_an_error_message_and_too_many_end_the_training(tmp_path, monkeypatch, caplog):
    storage, path = AtomicCheckpointIO(max_failures=3), tmp_path / "last.ckpt"
    monkeypatch.setattr(os, "replace", full)
    for _ in range(2):
        storage.save_checkpoint(CONTENT, path)
        assert "COULD NOT BE WRITTEN" in str(storage.error)
    assert "failure 2 in a row of 3" in caplog.text and "last.ckpt" in caplog.text
    monkeypatch.undo()
    storage.save_checkpoint(CONTENT, path)
    assert storage.error is None and "written again" in caplog.text and check_seal(path)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"3 in a row \(checkpointing.max_failed_saves\)"):
        for _ in range(3):
            storage.save_checkpoint(CONTENT, path)
    assert list(tmp_path.iterdir()) == [path]


def test_older_checkpoints_make_room_but_never_the_last(tmp_path, monkeypatch):
    storage = AtomicCheckpointIO()
    for step in (1, 2, 3):
        storage.save_checkpoint(CONTENT, step_file(tmp_path, step))
        keep(tmp_path, step, keep_last=3, milestone=step == 1)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9 if len(list(tmp_path.glob("step-*"))) == 1 else 0)
    )
    storage.save_checkpoint(CONTENT, step_file(tmp_path, 4))
    assert storage.error is None and not make_room(tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {
        "last.ckpt",
        "step-00000003.ckpt",
        "step-00000004.ckpt",
        "milestone-00000001.ckpt",
    }


# -------------------------------------------------------------------------------- retention


def test_the_last_few_and_the_milestones_are_kept(tmp_path):
    """9 is from a training that was rewound to step 2, so it is not among the last three."""
    for step in (9, 2, 3, 4, 5, 6):
        write_checkpoint({**CONTENT, "global_step": step}, step_file(tmp_path, step))
        if step < 9:
            keep(tmp_path, step, keep_last=3, milestone=step % 3 == 0)
            assert load_inert(tmp_path / "last.ckpt")["global_step"] == step
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last.ckpt",
        "milestone-00000003.ckpt",
        "milestone-00000006.ckpt",
        "step-00000004.ckpt",
        "step-00000005.ckpt",
        "step-00000006.ckpt",
        "step-00000009.ckpt",
    ]
    assert (tmp_path / "last.ckpt").samefile(step_file(tmp_path, 6)), "a second name, not a second file"


def test_remains_of_a_kill_during_a_save_are_removed(tmp_path):
    """Killed between writing step 4 and removing step 1; 9 is from a training that was rewound."""
    for step in (1, 2, 3, 4, 9):
        write_checkpoint({**CONTENT, "global_step": step}, step_file(tmp_path, step))
    (tmp_path / "step-00000005.ckpt.partial").touch()
    clear(tmp_path, 4, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003.ckpt",
        "step-00000004.ckpt",
        "step-00000009.ckpt",
    ]


def test_without_hard_links_a_copy_is_made(tmp_path, monkeypatch):
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refused)
    write_checkpoint(CONTENT, tmp_path / "a.ckpt")
    link_or_copy(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert check_seal(tmp_path / "b.ckpt") and len(list(tmp_path.iterdir())) == 2


def test_it_saves_by_steps_by_milestones_and_by_time():
    def saved(world: int, **settings: object) -> list[int]:
        callback, steps, clock = LastCheckpoint("x", **settings), [], [0.0]
        trainer = SimpleNamespace(
            global_step=0,
            val_check_batch=14,
            num_val_batches=[1],
            fast_dev_run=False,
            world_size=world,
            log_every_n_steps=5,
            ckpt_path=None,
            is_global_zero=False,
            strategy=SimpleNamespace(broadcast=lambda value: value),
        )
        callback.save = lambda trainer: (steps.append(trainer.global_step), setattr(callback, "_clock", clock[0]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("palimpsest.training.callbacks.best.time", SimpleNamespace(monotonic=lambda: clock[0]))
            callback.on_train_start(trainer, None)
            for batch in range(40):  # two micro-batches to a step, a minute to each
                clock[0] += 60
                trainer.global_step = (batch + 1) // 2
                callback.on_train_batch_end(trainer, None, None, None, batch)
                if (batch + 1) % 14 == 0:
                    steps.append(-trainer.global_step)
                    callback.on_validation_end(trainer, None)
        return steps

    only = {"every_n_train_steps": None, "every_minutes": None}
    assert saved(1, **{**only, "every_n_train_steps": 7}) == [-7, 7, -14, 14], (
        "the file contains the result of the validation"
    )
    assert saved(1, **{**only, "every_n_train_steps": 8, "milestone_every": 10}) == [-7, 8, 10, -14, 16, 20]
    assert saved(1, **{**only, "every_minutes": 12}) == [6, -7, 12, -14, 18]
    assert saved(8, **{**only, "every_minutes": 12}) == [-7, 10, -14, 20], "devices compare times at the steps that log"
    assert saved(1, **only) == [-7, -14]


def test_a_best_checkpoint_that_could_not_be_written_is_not_the_best(tmp_path, monkeypatch):
    callback = BestCheckpoint(dirpath=tmp_path, filename="best", monitor="val/nll")
    storage = SimpleNamespace(error=None)
    trainer = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=storage, broadcast=lambda value: value))

    def improved(self: BestCheckpoint, trainer: object, module: object) -> None:
        self.current_score = self.best_model_score = self.kth_value = torch.tensor(trainer.score)
        self.best_model_path = self.kth_best_model_path = "best.ckpt"
        self.best_k_models["best.ckpt"] = self.current_score

    monkeypatch.setattr("palimpsest.training.callbacks.best.ModelCheckpoint.on_validation_end", improved)
    trainer.score = 2.0
    callback.on_validation_end(trainer, None)
    storage.error, trainer.score = OSError("full"), 1.0
    callback.on_validation_end(trainer, None)
    assert float(callback.best_model_score) == float(callback.best_k_models["best.ckpt"]) == 2.0


# -------------------------------------------------------------------------------- resuming


def test_a_damaged_last_checkpoint_is_set_aside_for_the_one_before(caplog):
    train(5, "checkpointing.save_dir=run")
    kept = Path("run/checkpoints").resolve()
    assert {p.name for p in kept.iterdir()} == {"last.ckpt", *(f"step-0000000{n}.ckpt" for n in (3, 4, 5))}
    flip(kept / "last.ckpt")  # and step 5, which is the same file
    built = experiment("trainer.max_steps=8", "checkpointing.save_dir=run")
    assert built.runs.resume_path() == Path("run/checkpoints/step-00000004.ckpt")
    assert (kept / "last.ckpt.corrupt").exists() and (kept / "step-00000005.ckpt.corrupt").exists()
    assert "last.ckpt is corrupt" in caplog.text and "step-00000004.ckpt is used in its place" in caplog.text
    assert not (kept / "last.ckpt").exists() and built.runs.model_path().name == "step-00000004.ckpt"
    fit(built)
    whole = train(8, "checkpointing.save_dir=whole")
    assert same_weights(kept / "last.ckpt", whole.runs.model_path())


def test_without_an_intact_checkpoint_it_does_not_start_over():
    train(2, "checkpointing.save_dir=run")
    for path in Path("run/checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no checkpoint in run/checkpoints can be read.*resume_from_ckpt=false"):
            fit(experiment("trainer.max_steps=3", "checkpointing.save_dir=run"))
    train(3, "checkpointing.save_dir=run", "checkpointing.resume_from_ckpt=false")
    assert newest_good(Path("run/checkpoints")) == Path("run/checkpoints/last.ckpt")


def test_only_the_first_process_sets_files_aside(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(CONTENT, step_file(tmp_path, step))
        keep(tmp_path, step, keep_last=2, milestone=False)
    flip(tmp_path / "last.ckpt", 500)
    monkeypatch.setattr("palimpsest.training.recovery.first_process", lambda: False)
    assert newest_good(tmp_path) == step_file(tmp_path, 1) and (tmp_path / "last.ckpt").exists()
    monkeypatch.setattr("palimpsest.training.recovery.first_process", lambda: True)
    assert newest_good(tmp_path) == step_file(tmp_path, 1) and not (tmp_path / "last.ckpt").exists()


# -------------------------------------------------------------------------------- record of the run


def test_a_checkpoint_contains_its_configuration_tokenizer_and_versions():
    built = train(1, "checkpointing.save_dir=run")
    record = load_inert("run/checkpoints/last.ckpt")["run"]
    assert yaml.safe_load(record["configuration"])["model"]["hidden_size"] == 16 and record["command"] == "a test"
    assert record["versions"]["torch"] == torch.__version__ and set(record["versions"]) >= {"palimpsest", "lightning"}
    tokenizer = built.build.data().tokenizer
    kept = record["tokenizer"]
    again = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(kept["tokenizer.json"]), **kept["special"])
    text = built.build.data().texts("validation")["text"][0]
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and again.mask_token_id == tokenizer.mask_token_id


# -------------------------------------------------------------------------------- URLs


@pytest.fixture
def address():
    yield "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()


def test_a_run_at_a_url_resumes_and_recovers_like_a_local_one(address, caplog, capsys):
    train(4, "data.label=0", f"checkpointing.save_dir={address}", "trainer.val_check_interval=4")
    kept = f"{address}/label=0/checkpoints"
    assert [p.rpartition("/")[2] for p in sorted(newest_first(kept))] == [
        "best.ckpt",
        "last.ckpt",
        "step-00000002.ckpt",
        "step-00000003.ckpt",
        "step-00000004.ckpt",
    ]
    assert check_seal(f"{kept}/last.ckpt") and read_progress(f"{kept}/last.ckpt").best == f"{kept}/best.ckpt"
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{kept}/last.ckpt", memory.cat_file(f"{kept}/last.ckpt")[:-7])
    built = train(8, "data.label=0", f"checkpointing.save_dir={address}", "trainer.val_check_interval=4")
    assert "last.ckpt WAS DAMAGED" in caplog.text and memory.exists(f"{kept}/last.ckpt.corrupt")
    here = train(8, "data.label=0", f"checkpointing.save_dir=file://{Path.cwd()}/here", "trainer.val_check_interval=4")
    assert same_weights(f"{kept}/last.ckpt", Path("here/label=0/checkpoints/last.ckpt"))
    assert built.runs.model_path() == f"{kept}/best.ckpt" and here.runs.model_path().name == "best.ckpt"
    capsys.readouterr()
    assert built.runs.folder().is_relative_to("outputs") and fit(built) == built.runs.model_path()
    assert "complete" in capsys.readouterr().out


def test_reports_and_logs_of_a_run_at_a_url_are_local_and_announced(address, capsys):
    logged = [override for override in RUN if override != "~logger"]
    cfg = compose_config([*logged, f"checkpointing.save_dir={address}", "trainer.max_steps=1"])
    running.run(cfg, "a test")
    folder = next(Path("outputs/reviews").iterdir())
    assert f"checkpoints: {address}/checkpoints; logs, reports and results, here: {folder}" in capsys.readouterr().out
    assert {"report.html", "results.json", "csv"} <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "results.json").read_text())["checkpoint"] == f"{address}/checkpoints/last.ckpt"
    where = [f"eval.checkpoint_path={address}/checkpoints/last.ckpt", "mode=ppl_eval"]
    assert run(*logged, *where)["perplexity"].value > 1
    assert not list(Path.cwd().glob("memory*"))


def test_for_an_unknown_url_the_message_names_what_is_missing():
    with pytest.raises(ValueError, match=r"checkpointing.save_dir=nowhere://x/y: .*nowhere.*fsspec"):
        experiment("checkpointing.save_dir=nowhere://x/y")
    assert path_or_url("file:///a/b") == Path("/a/b") and path_or_url("a/b") == Path("a/b")


def test_a_failed_upload_keeps_the_earlier_file(address, monkeypatch):
    where = f"{address}/last.ckpt"
    write_checkpoint(CONTENT, where)

    class Broken(io.BytesIO):
        def getbuffer(self) -> memoryview:
            raise ConnectionError("the line is dead")

    monkeypatch.setattr("palimpsest.training.storage.io.BytesIO", Broken)
    with pytest.raises(OSError, match="ConnectionError: the line is dead"):
        write_checkpoint({**CONTENT, "global_step": 4}, where)
    assert load_inert(where)["global_step"] == 3
