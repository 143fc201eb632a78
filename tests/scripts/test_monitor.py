"""The monitor: trainings in every state, read from their files only, quickly and without side effects."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from palimpsest.common.process_identity import process_status, process_table
from tests.helpers.commands import ROOT

SCRIPT = ROOT / "scripts" / "monitor.py"
_SPEC = importlib.util.spec_from_file_location("monitor", SCRIPT)
monitor = importlib.util.module_from_spec(_SPEC)
sys.modules["monitor"] = monitor
_SPEC.loader.exec_module(monitor)


def run_in(folder: Path, age: float = 1.0, **known) -> Path:
    """Write the run.json of a training, `age` seconds old; by default its process is this one."""
    now = time.time()
    metrics = {"loss": 3.25, "seconds_per_step": 0.5, "train/tokens_per_s": 12345.6, "train/mfu": 0.415,
               "memory/peak_gib": 7.25, "train/skipped_steps": 0}  # fmt: skip
    defaults = {
        "title": "train", "state": "training", "error": None, "pid": os.getpid(), "host": socket.gethostname(),
        "process_began": process_status(os.getpid())[1], "began": now - age - 100, "updated": now - age,
        "first_step": 100, "step": 300, "max_steps": 1000, "metrics": metrics,
        "curve": [[10, 9.0], [20, 5.0], [30, 3.25]], "validation": {"step": 300, "val/nll": 3.5},
        "checkpoint": {"step": 250, "time": now - 60},
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**defaults, **known}))
    return folder


def look(folder: Path, silent: float = 300.0) -> dict[str, object]:
    return {row.name: row for row in monitor.rows(folder, silent)}


def gone() -> int:
    """Return the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_running_training_with_all_its_numbers(tmp_path):
    run_in(tmp_path / "a" / "b")
    checkpoints = tmp_path / "a/b/checkpoints"
    checkpoints.mkdir()
    (checkpoints / "last.ckpt").touch()
    os.utime(checkpoints / "last.ckpt", (time.time() - 125,) * 2)
    (checkpoints / "next.ckpt.partial").touch()
    row = look(tmp_path)["a/b"]
    assert (row.state, row.step, row.loss, row.validation, row.note) == ("training", "300/1,000", "3.25", "3.5", "")
    assert row.speed == "12,346 tok/s, MFU 42%" and row.memory == "7.2 GiB" and row.checkpoint == "2m ago, step 250"
    assert row.left == "5m", "200 steps took 100 seconds, 700 are left, less the second since"
    assert row.curve == "█▄▁" or len(row.curve) == 3
    (checkpoints / "step_300").mkdir()
    assert look(tmp_path)["a/b"].checkpoint == "0s ago, step 300"


@pytest.mark.parametrize(("known", "age", "state", "note"), [
    ({}, 30, "training", ""),
    ({}, 400, "silent", "has not reported for 6m"),
    ({"metrics": {"seconds_per_step": 60.0}}, 400, "training", ""),
    ({"pid": None}, 30, "dead", "is gone, last seen 30s ago while training"),
    ({"pid": None}, 0, "dead", "is gone, last seen 0s ago while training"),
    ({"process_began": 1}, 0, "dead", "is gone"),
    ({"process_began": None}, 0, "training", ""),
    ({"pid": None, "process_table": "another container"}, 30, "training", ""),
    ({"pid": None, "process_table": "another container"}, 400, "dead", "no report from"),
    ({"process_table": process_table(), "pid": None}, 0, "dead", "is gone"),
    ({"host": "elsewhere"}, 30, "training", ""),
    ({"host": "elsewhere"}, 400, "dead", "no report from elsewhere for 6m"),
    ({"state": "finished", "pid": None}, 9999, "finished", ""),
    ({"state": "stopped", "pid": None}, 9999, "stopped", ""),
    ({"state": "failed", "error": "ValueError: no"}, 9999, "failed", "ValueError: no"),
    ({"state": "starting", "step": 0, "first_step": 0, "curve": [], "metrics": {}, "validation": None,
      "checkpoint": None}, 1, "starting", ""),
    ({"metrics": {"loss": None, "train/skipped_steps": 3}, "curve": [[1, None]]}, 1, "training", "3 updates left out"),
])  # fmt: skip
def test_states(tmp_path, known, age, state, note):
    known = {**known, "pid": gone()} if "pid" in known else known
    (row,) = monitor.rows(run_in(tmp_path, age, **known), 300.0)
    assert row.state == state and note in row.note and bool(note) == bool(row.note)
    assert row.line() and "None" not in row.line()


def test_a_killed_training_is_dead_while_it_is_a_zombie(tmp_path):
    """A killed process stays a zombie until its parent asks for its status."""
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    run_in(tmp_path, 0, pid=process.pid, process_began=process_status(process.pid)[1], process_table=process_table())
    assert monitor.rows(tmp_path, 300.0)[0].state == "training"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert monitor.rows(tmp_path, 300.0)[0].state == "dead"
    finally:
        process.communicate()


def test_a_training_that_finishes_during_the_check_is_not_dead(tmp_path, monkeypatch):
    folder, is_alive = run_in(tmp_path, 0, pid=gone()), monitor._is_alive

    def ends_now(known):
        run_in(folder, 0, pid=known["pid"], state="finished")
        return is_alive(known)

    monkeypatch.setattr(monitor, "_is_alive", ends_now)
    assert monitor.rows(tmp_path, 300.0)[0].state == "finished"


def test_a_curve_of_few_many_and_broken_values():
    assert monitor.sparkline([]) == "" and monitor.sparkline([None, None]) == "  "
    assert monitor.sparkline([3.0, 2.0, 1.0])[-1] == "▁" and monitor.sparkline([1.0, None, 1.0]) == "▁ ▁"
    falling = monitor.sparkline([100.0] + [50 - i / 2 for i in range(63)])
    assert len(falling) == 24 and falling[0] == "█" and sorted(falling, reverse=True) == list(falling)
    assert [monitor.duration(s) for s in (5, 65, 3 * 3600 + 420, 200_000)] == ["5s", "1m", "3h07", "2d07h"]


def test_a_damaged_file_affects_one_row_only(tmp_path):
    run_in(tmp_path / "whole")
    for name, text in (("half", '{"state": "trai'), ("other", "[1, 2]"), ("old", '{"state": "training"}')):
        run_in(tmp_path / name)
        (tmp_path / name / "run.json").write_text(text)
    rows = look(tmp_path)
    assert rows["whole"].state == "training" and rows["whole"] == monitor.rows(tmp_path, 300.0)[0]
    assert all(rows[name].state == "unreadable" and "run.json" in rows[name].note for name in ("half", "other", "old"))


def test_fifty_trainings_within_half_a_second_and_nothing_is_written(tmp_path):
    for i in range(50):
        (run_in(tmp_path / f"run{i}") / "checkpoints").mkdir()
        (tmp_path / f"run{i}/csv/version_0").mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    start = time.process_time()
    assert len(monitor.rows(tmp_path, 300.0)) == 50
    assert time.process_time() - start < 0.25
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_piped_it_prints_plain_lines_once_without_heavy_imports(tmp_path):
    run_in(tmp_path / "one")
    run_in(tmp_path / "two", state="finished")
    check = (
        "import sys, runpy; folder, script = sys.argv[1:]; sys.argv[1:] = [folder]; "
        "runpy.run_path(script, run_name='__main__'); assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check, tmp_path, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("one  training  step 300/1,000  left ") and second.startswith("two  finished  ")
    nowhere = subprocess.run([sys.executable, SCRIPT, tmp_path / "nowhere"], capture_output=True, text=True)
    assert nowhere.returncode == 1 and "there is no folder" in nowhere.stderr


def test_a_table_fits_its_terminal(tmp_path):
    from rich.console import Console

    run_in(tmp_path / "one")
    run_in(tmp_path / "dead", 30, pid=gone())
    for width in (60, 100, 160):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(monitor.table(monitor.rows(tmp_path, 300.0), "runs", width))
        text = console.export_text()
        assert "training" in text and "300/1,000" in text and ("MFU" in text) == (width > 60)
