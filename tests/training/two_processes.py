"""What test_distributed.py runs in two processes, started by torchrun: `two_processes.py <file of jobs>`.

A line of the file is the kind of a job and its settings. fit: training alone. run: all that main.py does. hang: a
training, in processes that meet anew, in whose second step the second process falls asleep.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch.distributed

from palimpsest.diffusion import Diffusion
from palimpsest.experiment import running
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.settings.command_line import compose_config
from palimpsest.training.processes import first_process


def fall_asleep(diffusion: Diffusion, optimizer: object) -> None:
    """In place of a hook that every process calls before every step."""
    if diffusion.global_step == 1 and not first_process():
        Path("hung").write_text(str(time.time()))
        time.sleep(600)


if __name__ == "__main__":
    if not first_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for line in Path(sys.argv[1]).read_text().splitlines():
        kind, *settings = line.split(" ")
        print(f"{kind} {settings[0]}", flush=True)
        cfg = compose_config([*settings, "trainer.devices=2"])
        if kind == "hang":
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
            # Else they would find in torchrun's own store where they stood the first time.
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
            Diffusion.on_before_optimizer_step = fall_asleep
        running.run(cfg, "a test") if kind == "run" else fit(Experiment(cfg, "a test"))
