"""How many processes load data, and a loader that knows how long training has waited for it."""

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from palimpsest.common.values import AtLeastOne, Natural

log = logging.getLogger(__name__)

MOST_WORKERS = 8
LEAST_SHARED = 2**20  # bytes of shared memory; Docker gives 64 MiB if nothing is said


@dataclass(frozen=True)
class Loading:
    """The keys of `loader` that say how batches are fetched, none of which changes what is in them.

    num_workers: processes beside the training one; None: `workers_for` where texts are tokenised on the fly, else 0
    (reading rows that are tokenised ahead takes less time than handing them from one process to another).
    prefetch_factor: batches that each worker keeps ready. pin_memory: copy batches to where a GPU fetches them faster.
    persistent_workers: those of a validation are kept for the next one.
    """

    num_workers: Natural | None = None
    prefetch_factor: AtLeastOne = 4
    pin_memory: bool = True
    persistent_workers: bool = True

    def workers(self, streamed: bool, devices: int) -> int:
        """The number of processes; what null stands for is logged. devices: processes of this training per machine."""
        if self.num_workers is not None:
            return self.num_workers
        if not streamed:
            return 0
        cpus, ranks = usable_cpus(), local_ranks(os.environ, devices)
        workers = workers_for(cpus, ranks, os.environ)
        log.info("loader.num_workers=null: %d (%d CPUs for this process, %d processes of this training on the machine)",
                 workers, cpus, ranks)  # fmt: skip
        return workers

    def arguments(self, workers: int, again: bool) -> dict[str, Any]:
        """Arguments of a DataLoader with so many workers. again: it will be gone through more than once."""
        of_workers = {"prefetch_factor": self.prefetch_factor, "persistent_workers": again and self.persistent_workers}
        pin = self.pin_memory and torch.cuda.is_available()
        return {"num_workers": workers, "pin_memory": pin, **(of_workers if workers else {})}


def workers_for(cpus: int, ranks: int, environ: Mapping[str, str]) -> int:
    """This process's share of the CPUs, at most MOST_WORKERS, at least 0.

    Where SLURM has bound each task to CPUs of its own (they are no more than SLURM_CPUS_PER_TASK), they are the share
    already.
    """
    own = environ.get("SLURM_CPUS_PER_TASK", "")
    share = cpus if own.isdigit() and cpus <= int(own) else cpus // ranks
    return max(0, min(share, MOST_WORKERS))


def local_ranks(environ: Mapping[str, str], devices: int) -> int:
    """Processes of this training on this machine, by the launcher (torchrun, SLURM), else `devices`. Never those of all
    machines: on 4 machines of 8 GPUs a process would get a quarter of what is its own."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        value = environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return max(1, devices)


def usable_cpus() -> int:
    """CPUs this process may use: those it is bound to, and no more than its control group's quota, rounded down."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus()
    return bound if quota is None else max(1, min(bound, math.floor(quota)))


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs that the control groups of this process grant (the least of all levels, versions 1 and 2), None without a
    limit."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    grants: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            continue
        top = root / controllers if controllers else root
        level = top / path.lstrip("/")
        # In a container the path is the host's, and what there is of it is mounted at the top.
        levels = [level, *level.parents] if level.is_relative_to(top) else []
        grants += [grant for place in levels if place.is_relative_to(top) for grant in _grants(place)]
    return min(grants, default=None)


def _grants(place: Path) -> Iterator[float]:
    """Quota / period of one control group, where it has a quota."""
    if (place / "cpu.max").is_file():
        quota, _, period = (place / "cpu.max").read_text().strip().partition(" ")
        if quota != "max":
            yield int(quota) / int(period or 100_000)
    elif (place / "cpu.cfs_quota_us").is_file():
        quota = int((place / "cpu.cfs_quota_us").read_text())
        if quota > 0:
            yield quota / int((place / "cpu.cfs_period_us").read_text())


def check_shared_memory(place: Path = Path("/dev/shm")) -> None:
    """Refuse too little shared memory before workers start: a batch that finds no room is lost without a word, and
    the run would wait for it forever.

    Raises:
        ValueError: less than `LEAST_SHARED` bytes are free.
    """
    free = shutil.disk_usage(place).free if place.is_dir() else LEAST_SHARED
    if free < LEAST_SHARED:
        raise ValueError(
            f"{place} has {free:,} bytes left, through which the workers of loader.num_workers hand over batches; set "
            "loader.num_workers=0, or give the container more shared memory (docker run --shm-size=1g)"
        )


class TimedLoader(DataLoader):
    """A DataLoader that adds up the seconds its user has waited for batches, in `waited`."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        batches = self.batches()
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def batches(self) -> Iterator[Any]:
        """The batches themselves."""
        if self.num_workers:
            check_shared_memory()
        return super().__iter__()
