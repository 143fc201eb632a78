"""Output cannot end a run: closed, full and narrow streams lose text, and nothing else."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from palimpsest.common.output import SafeStream, guard_output
from palimpsest.settings.command_line import clear_errors


def test_a_closed_pipe_is_ignored_silently():
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError), open(write, "w", closefd=False) as plain:
        print("lost", file=plain, flush=True)
    log = io.StringIO()
    safe = SafeStream(open(write, "w"), log)  # noqa: SIM115
    print("lost", file=safe, flush=True)
    assert safe.writable() and safe.fileno() == write and not log.getvalue()


def test_a_full_disk_is_reported_once():
    log = io.StringIO()
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w") as plain:
        print("lost", file=plain, flush=True)
    safe = SafeStream(open("/dev/full", "w"), log)  # noqa: SIM115
    for _ in range(3):
        print("lost", file=safe, flush=True)
    assert log.getvalue().count("No space left on device") == 1


def test_closed_and_read_only_streams_are_ignored(tmp_path):
    closed = open(tmp_path / "file", "w")  # noqa: SIM115
    closed.close()
    print("lost", file=SafeStream(closed), flush=True)
    reading = os.open(tmp_path / "file", os.O_RDONLY)
    print("lost", file=SafeStream(open(reading, "w")), flush=True)  # noqa: SIM115


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "a?b ?"), ("latin-1", "a\xb1b ?"), ("utf-8", "a\xb1b \u4e2d")]
)
def test_characters_outside_the_encoding_become_question_marks(encoding, shown):
    raw = io.BytesIO()
    safe = SafeStream(io.TextIOWrapper(raw, encoding=encoding, write_through=True))
    print("a\xb1b \u4e2d", file=safe, end="")
    assert raw.getvalue().decode(encoding) == shown
    print("\udcff", file=safe, end="")  # from a file name that is no UTF-8
    safe.writelines(["\u2581", "x"])
    assert raw.getvalue().decode(encoding).startswith(shown + "?") and raw.getvalue().endswith(b"x")


def test_live_displays_and_logs_write_through_it():
    raw = io.BytesIO()
    safe = SafeStream(io.TextIOWrapper(raw, encoding="latin-1", write_through=True))
    Console(file=safe, force_terminal=True, width=40).print("\u4e2d \u2581")
    logging.StreamHandler(safe).handle(logging.makeLogRecord({"msg": "\u4e2d"}))
    full = SafeStream(open("/dev/full", "w"))  # noqa: SIM115
    Console(file=full, force_terminal=True).print("lost")
    assert raw.getvalue().decode("latin-1") == "? ?\n?\n"


def test_streams_closed_before_the_start_are_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    guard_output()
    print("lost", flush=True)
    print("lost", file=sys.stderr, flush=True)
    out = sys.stdout
    guard_output()
    assert sys.stdout is out, "guarded twice"


def test_no_file_gets_the_descriptor_of_a_closed_output(tmp_path):
    """A checkpoint with descriptor 1 or 2 would receive the output of libraries and child processes."""
    program = """
import os, subprocess, sys
from palimpsest.common.output import guard_output
for number in (0, 1, 2):
    os.close(number)
guard_output()
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
subprocess.run("echo lost; echo lost >&2", shell=True, check=True)
os.write(file, str(file).encode())
"""
    subprocess.run([sys.executable, "-c", program, tmp_path / "kept"], check=True)
    assert int((tmp_path / "kept").read_text()) > 2


@pytest.mark.parametrize("message", [
    "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
    "Caught RuntimeError in DataLoader worker process 0.\nunable to write to file: unable to open shared memory object",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of ...",
    "DataLoader worker (pid(s) 18164, 18165) exited unexpectedly",
])  # fmt: skip
def test_too_little_shared_memory_has_a_remedy(message, capsys):
    with pytest.raises(SystemExit) as stop, clear_errors():
        raise RuntimeError(message)
    assert stop.value.code == 2 and "loader.num_workers=0" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="another"), clear_errors():
        raise RuntimeError("another")
