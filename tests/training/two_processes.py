"""The jobs of test_distributed.py in two processes of torchrun: `two_processes.py <file of jobs>`.

Each line of the file is the kind of a job and its settings. fit: a training. run: a whole command. hang: a training in
a new process group, in whose second step the second process sleeps.
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
    """Replacement of a hook that every process calls before every step."""
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
            # Otherwise torchrun's store would return the state of the first group.
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
            Diffusion.on_before_optimizer_step = fall_asleep
        running.run(cfg, "a test") if kind == "run" else fit(Experiment(cfg, "a test"))
