"""A small part of the fault campaign (benchmarks/faults.py): kills, a damaged file, a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.commands import ROOT


def test_a_training_survives_kills_damaged_files_and_a_full_disk(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--kills", "4", "--damages", "1", "--disks", "1"]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["ok"] and facts["kills"] == 4 and facts["set aside"] >= 1
    # Each disturbed training has the last and the best weights of the undisturbed one.
    assert facts["identical"] == 2 * facts["trainings"] >= 4
    if facts["disks_left_out"]:
        pytest.skip(f"all but the full disk was seen: {facts['disks_left_out']}")
    assert facts["saves that failed"] >= 1
