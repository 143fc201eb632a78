"""The worked examples of CONTRIBUTING.md do what they say, under the names that the scaffold gives them."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from palimpsest import new
from tests.helpers.commands import ROOT, TINY

PARTS = (("sampler", "mine"), ("objective", "simple"), ("data", "my_texts"))


def test_the_worked_examples_run(tmp_path):
    copy = tmp_path / "palimpsest"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "outputs", ".cache", "__pycache__", ".pytest_cache", ".ruff_cache"
    )
    shutil.copytree(ROOT, copy, ignore=skipped)
    made = [new.write(kind, name, copy) for kind, name in PARTS]
    assert [len(paths) for paths in made] == [4, 4, 3]
    with pytest.raises(ValueError, match="samplers/mine.py.* exists; choose another name"):
        new.write("sampler", "mine", copy)
    with pytest.raises(ValueError, match="NAME=My-Part must be lower case"):
        new.write("sampler", "My-Part", copy)
    code = [str(path) for paths in made for path in paths if path.suffix == ".py"]
    style = subprocess.run([sys.executable, "-m", "ruff", "check", *code], cwd=copy, capture_output=True, text=True)
    assert style.returncode == 0, style.stdout
    # One process for all commands: starting it takes longer than each of them.
    sampled = ["mode=sample_eval", "sampling.predictor=mine", "loader.eval_batch_size=2", *TINY]
    plain = ["algo=simple", *TINY]
    tests = ["-q", "-p", "no:cacheprovider", "-k", "mine or simple or my_texts or reads_its",
             *[name for name in code if "/test_" in name], "tests/test_architecture.py"]  # fmt: skip
    commands = (
        "import main, pytest\n"  # the package is the folder of this main.py
        "from tests.helpers.commands import TINY, run, trained\n"
        f"assert pytest.main({tests}) == 0\n"
        f"trained(*TINY), run(*{sampled}), run(*{plain})"
    )
    done = subprocess.run([sys.executable, "-c", commands], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "samples" in (next(copy.rglob("sample_eval/results.json"))).read_text()
