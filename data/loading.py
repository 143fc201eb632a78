"""Worker processes for data loading, and a loader that measures how long training waits for it."""

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec.asyn
import torch
from datasets.utils import tqdm
from joblib import cpu_count
from torch.utils.data import DataLoader

from palimpsest.common.values import AtLeastOne, Natural

log = logging.getLogger(__name__)

MOST_WORKERS = 8
ENOUGH_FOR_ROWS = 2  # workers that read tokenised rows for a GPU
LEAST_SHARED = 2**20  # bytes of shared memory; Docker's default is 64 MiB


@dataclass(frozen=True)
class Loading:
    """The keys of `loader` that determine how batches are fetched; none changes their content.

    Attributes:
        num_workers: processes besides the training one; None: `workers_for` if texts are tokenised while training. For
            tokenised rows it then is 0, because reading them takes less time than passing them between processes, and
            with a GPU up to 2, because it would wait for each batch.
        prefetch_factor: batches that each worker keeps ready.
        pin_memory: copy batches to memory from which a GPU fetches them faster.
        persistent_workers: keep the workers of a validation for the next one.
    """

    num_workers: Natural | None = None
    prefetch_factor: AtLeastOne = 4
    pin_memory: bool = True
    persistent_workers: bool = True

    def workers(self, streamed: bool, devices: int) -> int:
        """Return the number of processes; the choice for null is logged. devices: training processes per machine."""
        if self.num_workers is not None:
            return self.num_workers
        if not streamed and not torch.cuda.is_available():
            return 0
        cpus, ranks = cpu_count(), local_ranks(os.environ, devices)
        workers = min(workers_for(cpus, ranks, os.environ), MOST_WORKERS if streamed else ENOUGH_FOR_ROWS)
        where = "%d CPUs for this process, %d processes of this training on the machine"
        log.info(f"loader.num_workers=null: %d ({where})", workers, cpus, ranks)
        return workers

    def arguments(self, workers: int, again: bool) -> dict[str, Any]:
        """Return the arguments of a DataLoader. again: whether it will be iterated more than once."""
        of_workers = {
            "prefetch_factor": self.prefetch_factor,
            "persistent_workers": again and self.persistent_workers,
            "worker_init_fn": begin_worker,
        }
        pin = self.pin_memory and torch.cuda.is_available()
        return {"num_workers": workers, "pin_memory": pin, **(of_workers if workers else {})}


def begin_worker(_: int) -> None:
    """Prepare a forked process: a file system and a lock of its own, and no tokenizer threads, which a fork ends."""
    fsspec.asyn.reset_lock()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # datasets takes this lock to read rows. Forked processes would share it, and one that is killed while it holds it
    # would stop all others for good.
    tqdm.set_lock(threading.RLock())


def workers_for(cpus: int, ranks: int, environ: Mapping[str, str]) -> int:
    """Return this process's share of the CPUs, from 0 to MOST_WORKERS.

    If SLURM has bound each task to separate CPUs (no more than SLURM_CPUS_PER_TASK), these already are its share.
    """
    own = environ.get("SLURM_CPUS_PER_TASK", "")
    share = cpus if own.isdigit() and cpus <= int(own) else cpus // ranks
    return max(0, min(share, MOST_WORKERS))


def local_ranks(environ: Mapping[str, str], devices: int) -> int:
    """Return the number of training processes on this machine, by the launcher (torchrun, SLURM), else `devices`.

    Processes of other machines do not count: with 4 machines of 8 GPUs each process would get a quarter of its share.
    """
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        value = environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return max(1, devices)


def check_shared_memory(place: Path = Path("/dev/shm")) -> None:
    """Refuse too little shared memory before workers start, because a lost batch would stop the run silently. Raises
    ValueError if less than `LEAST_SHARED` bytes are free."""
    free = shutil.disk_usage(place).free if place.is_dir() else LEAST_SHARED
    if free < LEAST_SHARED:
        raise ValueError(
            f"{place} has {free:,} bytes left, too few for the workers of loader.num_workers; set "
            "loader.num_workers=0, or give the container more shared memory (docker run --shm-size=1g)"
        )


class TimedLoader(DataLoader):
    """A DataLoader that sums the seconds its user has waited for batches in `waited`."""

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
        """Yield the batches, without timing."""
        if self.num_workers:
            check_shared_memory()
        return super().__iter__()
