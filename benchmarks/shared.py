"""Shared parts of the benchmarks: command line, measurements in turns, timed training steps, trainings by main.py."""

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from palimpsest.common.randomness import KeyedNoise, training_noise

ROOT = Path(__file__).parents[1]

T = TypeVar("T")


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows `description` with its own line breaks."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def report(benchmark: str, output: Path | None = None, **facts: object) -> None:
    """Print the results and the number of CPU threads as one line of JSON; append it to the file `output`, if any."""
    line = json.dumps({"benchmark": benchmark, "threads": torch.get_num_threads(), **facts})
    print(line, flush=True)
    if output:
        with output.open("a") as file:
            file.write(line + "\n")


def in_turns(runs: Mapping[str, Callable[[], T]], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[T]]]:
    """Call each of `runs` in each round, so that other load affects all of them.

    Returns:
        the seconds and the results of all rounds, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, list[T]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            results[name].append(run())
            seconds[name].append(time.perf_counter() - start)
    return seconds, results


def in_own_processes(
    measure: Callable[..., dict[str, Any]], arguments: Mapping[str, Sequence[object]], rounds: int
) -> dict[str, dict[str, list[Any]]]:
    """Call `measure` with each of `arguments` in each round, in processes of their own, so that peak memory is too.

    Returns:
        what it returns: key -> name of the arguments -> values of all rounds.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = {name: (lambda given=given: pool.submit(measure, *given).result()) for name, given in arguments.items()}
        results = in_turns(runs, rounds)[1]
    keys = next(iter(results.values()))[0]
    return {key: {name: [one[key] for one in found] for name, found in results.items()} for key in keys}


def spread(values: Sequence[float]) -> list[float]:
    """Return the smallest value, the median and the largest value."""
    return [min(values), statistics.median(values), max(values)]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the spread of the ratios of pairs."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def training_steps(
    net: nn.Module, loss: Callable[[KeyedNoise], Tensor], batch_size: int, steps: int, clip: float | None = 1.0
) -> tuple[float, list[float]]:
    """Take `steps` training steps after one to warm up; return the median seconds, and the losses of all steps."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)
    rows_B = torch.arange(batch_size, device=next(net.parameters()).device)
    seconds = []
    losses = []
    for step in range(steps + 1):
        start = time.perf_counter()
        found = loss(training_noise(0, rows_B + step * batch_size, batch_size))
        found.backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(found.detach()))  # waits for the device
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), losses


def peak_mib() -> float:
    """Return the largest resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def trained(folder: Path, *overrides: str) -> tuple[dict[str, Any], float]:
    """Train by main.py into `folder`, where an interrupted training resumes; return its results and the seconds."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "main.py"), f"checkpointing.save_dir={folder}", *overrides]
    subprocess.run(command, check=True)
    return json.loads((folder / "results.json").read_text()), time.perf_counter() - start
