"""The worked examples of CONTRIBUTING.md do what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from tests.helpers.commands import ROOT, TINY


def test_the_worked_examples_run(tmp_path):
    copy = tmp_path / "palimpsest"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "outputs", ".cache", "__pycache__", ".pytest_cache", ".ruff_cache"
    )
    shutil.copytree(ROOT, copy, ignore=skipped)
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert [name for name, _ in blocks] == [
        "samplers/left_to_right.py", "configs/sampler/left_to_right.yaml", "tests/samplers/test_left_to_right.py",
        "objectives/plain.py", "configs/parameterization/plain.yaml", "tests/objectives/test_plain.py",
    ]  # fmt: skip
    for name, text in blocks:
        (copy / name).write_text(text)
    # One process for all commands: starting it takes longer than each of them.
    sampled = ["mode=sample_eval", "sampling.predictor=left_to_right", "loader.eval_batch_size=2", *TINY]
    plain = ["algo=plain", *TINY]
    tests = ["-q", "-p", "no:cacheprovider", "-k", "left_to_right or plain", "tests/samplers/test_left_to_right.py",
             "tests/objectives/test_plain.py",
             "tests/test_architecture.py"]  # fmt: skip
    commands = (
        "import main, pytest\n"  # the package is the folder of this main.py
        "from tests.helpers.commands import TINY, run, trained\n"
        f"assert pytest.main({tests}) == 0\n"
        f"trained(*TINY), run(*{sampled}), run(*{plain})"
    )
    done = subprocess.run([sys.executable, "-c", commands], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "samples" in (next(copy.rglob("sample_eval/results.json"))).read_text()
