"""scripts/run_in_screen.sh: a run in GNU screen is listed, saves when it is stopped, and resumes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile

import pytest

from palimpsest.models.checkpoints import read_progress
from tests.helpers.commands import FEW, ROOT, TINY, wait_for


def test_a_run_is_started_listed_quit_resumed_and_stopped_with_a_checkpoint(tmp_path):
    if not shutil.which("screen"):
        pytest.skip("needs GNU screen: apt-get install screen")
    name = f"test-{os.getpid()}"
    log, last = ROOT / f"outputs/screen/{name}.log", tmp_path / "run/checkpoints/last.ckpt"
    settings = [*TINY, *FEW, "trainer.max_steps=1000000", f"checkpointing.save_dir={tmp_path / 'run'}",
                "callbacks.checkpoint_every_n_steps.every_n_train_steps=2"]  # fmt: skip

    def script(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [ROOT / "scripts/run_in_screen.sh", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "DATA_DIR": "", "SCREENDIR": screens},
        )

    screens = tempfile.mkdtemp()  # a socket's path has at most 107 letters
    try:
        started = script("--name", name, *settings)
        assert started.returncode == 0, started.stderr
        assert f"--stop {name}" in started.stdout and f"screen -r palimpsest-{name}" in started.stdout
        again = script("--name", name, *settings)
        assert again.returncode == 2 and f"{name} is there already" in again.stderr
        wait_for(lambda: last.exists() or name not in script("--list").stdout)
        assert last.exists(), log.read_text()
        subprocess.run(["screen", "-S", f"palimpsest-{name}", "-X", "quit"], check=True,
                       env={**os.environ, "SCREENDIR": screens})  # fmt: skip
        wait_for(lambda: "ended with status 129" in log.read_text())
        saved = read_progress(last).step
        assert f"SIGHUP: step {saved} is saved in {last}" in log.read_text()
        assert not (ROOT / f"outputs/screen/{name}.pid").exists() and name not in script("--list").stdout
        assert script("--name", name, *settings).returncode == 0
        wait_for(lambda: read_progress(last).step > saved)
        assert f"resuming from {last}" in log.read_text()
        stopped = script("--stop", name)
        assert stopped.returncode == 0 and "ended with status 143" in stopped.stdout, stopped.stdout
        assert f"SIGTERM: step {read_progress(last).step} is saved in {last}" in log.read_text()
        assert name not in script("--list").stdout
        assert f"no run named {name}" in script("--stop", name).stderr
    finally:
        subprocess.run(["screen", "-S", f"palimpsest-{name}", "-X", "quit"], capture_output=True,
                       env={**os.environ, "SCREENDIR": screens})  # fmt: skip
        log.unlink(missing_ok=True)


def test_invalid_names_and_options_are_refused():
    for arguments in (["--name", "a/b"], ["--name"], ["--stop"], ["--help"]):
        done = subprocess.run([ROOT / "scripts/run_in_screen.sh", *arguments], capture_output=True, text=True)
        assert done.returncode == 2


@pytest.mark.parametrize("arguments", [[], ["--name", "a-run"]], ids=["nothing", "a name only"])
def test_without_a_command_it_starts_nothing_and_prints_its_usage(tmp_path, arguments):
    screen = tmp_path / "screen"
    screen.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    screen.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts/run_in_screen.sh", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 2 and not (tmp_path / "asked").exists()
    assert "run_in_screen.sh [--name NAME] data=imdb" in done.stderr and "say what to run" in done.stderr
