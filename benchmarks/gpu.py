"""Check a GPU, then measure it: training, likelihood, sampling and classification at the sizes of the papers.

It needs no network and no data of the project. First, results on the GPU are compared with those on the CPU; a failed
check ends the run. Then each measurement runs in a process of its own, so that peak memory is its own. The results are
`gpu.json` and the table `gpu.md`. On one H100 it takes at most 20 minutes.

    python benchmarks/gpu.py --output benchmarks/results
    python benchmarks/gpu.py --output /tmp/small --small        # seconds, on any machine: it shows that nothing broke
"""

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from palimpsest.benchmarks.sampling import plain
from palimpsest.benchmarks.train_step import PlainSubs
from palimpsest.common.randomness import KeyedNoise, evaluation_noise, training_noise
from palimpsest.models.compiling import compile_encoder
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.base import Model, Objective
from palimpsest.objectives.block import BlockDiffusion
from palimpsest.objectives.mask_sampling import ExactCount
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers import ancestral, first_hitting
from palimpsest.training.callbacks.hardware import TrainingFlops, matmul_rate, memory, synchronize

VOCAB, SMALL_VOCAB = 50_258, 300


class Size(NamedTuple):
    """A network and its batches."""

    width: int
    blocks: int
    heads: int
    length: int
    batch: int


SIZES = {"12 x 768": Size(768, 12, 12, 1024, 32), "24 x 1024": Size(1024, 24, 16, 1024, 16)}
SMALL = {"2 x 32": Size(32, 2, 2, 32, 4)}
SECONDS, SMALL_SECONDS = 12.0, 0.0  # of a measurement, after its warm-up
WARM_UP = 3  # steps
_FEW = 4  # steps of a sampler in its warm-up


def network(size: Size, vocab_size: int, device: str, num_classes: int = 0) -> DiT:
    """Return a DiT whose output layer is random: at its start it is zero, and texts would all be alike.

    The weights are drawn on the CPU, because a GPU draws others from the same seed.
    """
    torch.manual_seed(0)
    net = DiT(vocab_size, size.width, 128, size.blocks, size.heads, dropout=0.0, num_classes=num_classes)
    nn.init.normal_(net.head.weight, std=0.02)
    return net.to(device)


def trained(setup: "Setup", compiled: bool, num_classes: int = 0) -> DiT:
    """Return the network of a measurement that does not train."""
    net = network(setup.size, setup.vocab_size, setup.device, num_classes).eval()
    if compiled:
        compile_encoder(net)
    return net


# ------------------------------------------------------------------------------------------------------------- checks


def checks(device: str, size: Size, vocab_size: int) -> Iterator[tuple[str, float, float]]:
    """Yield name, deviation and the largest deviation that is allowed."""
    rows = torch.arange(4)
    numbers = [evaluation_noise(1, rows.to(d)).uniform(64).cpu() for d in ("cpu", device)]
    yield "random numbers, largest difference", float((numbers[0] - numbers[1]).abs().max()), 0.0
    small = size._replace(blocks=min(size.blocks, 2), length=64, batch=4)
    batch = {"input_ids": torch.randint(vocab_size - 1, (4, 64))}
    objectives = {
        "masked diffusion": Subs(LogLinear(), Absorbing(vocab_size - 1), ExactCount()),
        "block diffusion": _blocks(16, Absorbing(vocab_size - 1)),
    }
    for name, objective in objectives.items():
        exact = _loss_and_gradient(objective, network(small, vocab_size, "cpu"), batch)
        for precision, limit in (("32", 2e-3), ("bf16", 5e-2)):
            found = _loss_and_gradient(objective, network(small, vocab_size, device), batch, precision)
            for what, ours, theirs in zip(("loss", "gradient"), found, exact, strict=True):
                deviation = float((ours - theirs).norm() / theirs.norm())
                yield f"{name}, {precision} bits, {what}, relative", deviation, limit
    networks = {
        "tokens of a sample that differ": network(small, vocab_size, device),
        "the same, compiled": network(small, vocab_size, device),
    }
    compile_encoder(networks["the same, compiled"])
    exact_BL = _texts(network(small, vocab_size, "cpu"), "cpu", vocab_size)
    for name, net in networks.items():
        yield name, float((_texts(net, device, vocab_size) != exact_BL).float().mean()), 0.02


def _loss_and_gradient(objective: Objective, net: DiT, batch: dict, precision: str = "32") -> tuple[Tensor, Tensor]:
    device = net.head.weight.device
    batch = {name: value.to(device) for name, value in batch.items()}
    with _autocast(device.type, precision):
        loss = objective.loss(net, batch, training_noise(0, torch.arange(4, device=device), 4)).mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    return loss.detach().double().cpu()[None], gradient.double().cpu()


@torch.inference_mode()
def _texts(net: DiT, device: str, vocab_size: int) -> Tensor:
    model = Model(Subs(LogLinear(), Absorbing(vocab_size - 1)), net.eval())
    blank_BL = torch.full((4, 64), vocab_size - 1, device=device)
    return first_hitting.sample(model, blank_BL, KeyedNoise(0, torch.arange(4, device=device))).ids_BL.cpu()


def _autocast(device: str, precision: str) -> AbstractContextManager:
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


# ------------------------------------------------------------------------------------------------------- measurements


class Setup:
    """Size, device and time of a measurement."""

    def __init__(self, size_name: str, small: bool) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.size = {**SIZES, **SMALL}[size_name]
        self.length, self.batch = self.size.length, self.size.batch
        self.vocab_size = SMALL_VOCAB if small else VOCAB
        self.seconds = SMALL_SECONDS if small else SECONDS
        self.small = small

    def measured(self, step: Callable[[int], None], amount: int, unit: str, warm_up: int = WARM_UP) -> dict[str, float]:
        """Return the mean seconds of as many steps as fit into the time, after the warm-up, and their peak memory."""
        device = torch.device(self.device)
        for number in range(warm_up):
            step(number)
        memory(device)  # peaks count from here
        synchronize(device)
        start, number = time.perf_counter(), 0
        while number == 0 or time.perf_counter() - start < self.seconds:
            step(warm_up + number)
            synchronize(device)
            number += 1
        seconds = (time.perf_counter() - start) / number
        return {"seconds": seconds, unit: amount / seconds, "peak_gib": memory(device)["memory/peak_gib"]}


def training_step(objective: Callable[[Absorbing], Objective], compiled: bool, setup: Setup) -> dict[str, float]:
    """Tokens/s, share of the device's measured speed, and peak memory of a training step."""
    net = network(setup.size, setup.vocab_size, setup.device)
    flops = TrainingFlops.of(net)
    if compiled:
        compile_encoder(net)
    law = objective(Absorbing(setup.vocab_size - 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4, fused=True)
    rows_B = torch.arange(setup.batch, device=setup.device)
    batch = {"input_ids": torch.randint(setup.vocab_size - 1, (setup.batch, setup.length), device=setup.device)}
    masked = []

    def step(number: int) -> None:
        with _autocast(setup.device, "bf16"):
            loss = law.loss(net, batch, training_noise(0, rows_B + number * setup.batch, setup.batch))
        loss.mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        masked.append(loss.logs["num_masked"].sum() if "num_masked" in loss.logs else loss.mask_BL.sum())

    found = setup.measured(step, setup.batch * setup.length, "tokens/s")
    done = flops.of_blocks(setup.batch, setup.length) + flops.of_projection(float(torch.stack(masked).float().mean()))
    return found | {"mfu": done / found["seconds"] / matmul_rate(torch.device(setup.device), torch.bfloat16)}


def likelihood(objective: Callable[[Absorbing], Subs], compiled: bool, setup: Setup) -> dict[str, float]:
    """Tokens/s of one draw of the bound, as in mode=ppl_eval."""
    net = trained(setup, compiled)
    law = objective(Absorbing(setup.vocab_size - 1)).bound(None)
    rows_B = torch.arange(setup.batch, device=setup.device)
    batch = {"input_ids": torch.randint(setup.vocab_size - 1, (setup.batch, setup.length), device=setup.device)}

    @torch.no_grad()
    def step(number: int) -> None:
        with _autocast(setup.device, "bf16"):
            law.loss(net, batch, evaluation_noise(number, rows_B))

    return setup.measured(step, setup.batch * setup.length, "tokens/s")


def sampling(sampler: Callable, steps: int | None, compiled: bool, setup: Setup) -> dict[str, float]:
    """Tokens/s of writing texts, as in mode=sample_eval: no autocast, and tokens are drawn in float64."""
    net = trained(setup, compiled)
    model = Model(Subs(LogLinear(), Absorbing(setup.vocab_size - 1)), net)
    rows_B = torch.arange(setup.batch, device=setup.device)

    def fill(number: int, x_BL: Tensor, steps: int | None) -> None:
        sampler(model, x_BL, KeyedNoise(number, rows_B), **({} if steps is None else {"steps": steps}))

    return _measured_texts(fill, steps, setup)


def plain_sampling(steps: int, setup: Setup) -> dict[str, float]:
    """Tokens/s of the reference's loop, which projects every position at every step."""
    net = trained(setup, compiled=False)
    return _measured_texts(lambda _, x_BL, steps: plain(net, x_BL, steps, timed=steps), steps, setup)


def _measured_texts(
    fill: Callable[[int, Tensor, int | None], object], steps: int | None, setup: Setup
) -> dict[str, float]:
    blank_BL = torch.full((setup.batch, setup.length), setup.vocab_size - 1, device=setup.device)
    steps = min(steps, _FEW) if steps and setup.small else steps
    few_BL = blank_BL.clone()
    few_BL[:, _FEW:] = 0  # a warm-up of few steps, with the shapes of the others
    fill(0, few_BL, steps and _FEW)
    return setup.measured(lambda number: fill(number, blank_BL, steps), blank_BL.numel(), "tokens/s", warm_up=0)


def classification(compiled: bool, setup: Setup, draws: int = 8) -> dict[str, float]:
    """Texts/s of p(class | text) for two classes by one conditional network, with the same masks for both."""
    net = trained(setup, compiled, num_classes=2)
    law = Subs(LogLinear(), Absorbing(setup.vocab_size - 1)).bound(None)
    rows_B = torch.arange(setup.batch, device=setup.device)
    ids_BL = torch.randint(setup.vocab_size - 1, (setup.batch, setup.length), device=setup.device)

    @torch.no_grad()
    def texts(number: int) -> None:
        for draw in range(draws):
            for label in range(2):
                batch = {"input_ids": ids_BL, "class_id": torch.full_like(rows_B, label)}
                with _autocast(setup.device, "bf16"):
                    law.loss(net, batch, evaluation_noise(number, rows_B, draw, draws))

    return setup.measured(texts, setup.batch, "texts/s", warm_up=1)


_subs, _plain = partial(Subs, LogLinear()), partial(PlainSubs, LogLinear())
_ddpm, _ddpm_cache = (partial(ancestral.sample, skip_idle=idle) for idle in (False, True))


def _blocks(size: int, process: Absorbing) -> BlockDiffusion:
    return BlockDiffusion(process, _subs, size)


MEASUREMENTS: dict[str, Callable[[Setup], dict[str, float]]] = {
    "train": partial(training_step, _subs, False),
    "train, compiled": partial(training_step, _subs, True),
    "train, plain form": partial(training_step, _plain, False),
    "train, blocks of 4": partial(training_step, partial(_blocks, 4), False),
    "train, blocks of 4, compiled": partial(training_step, partial(_blocks, 4), True),
    "train, blocks of 16": partial(training_step, partial(_blocks, 16), False),
    "train, blocks of 16, compiled": partial(training_step, partial(_blocks, 16), True),
    "likelihood, one draw": partial(likelihood, _subs, False),
    "likelihood, one draw, compiled": partial(likelihood, _subs, True),
    "likelihood, one draw, plain form": partial(likelihood, _plain, False),
    "sample, ddpm, 128 steps": partial(sampling, _ddpm, 128, False),
    "sample, ddpm, 128 steps, compiled": partial(sampling, _ddpm, 128, True),
    "sample, ddpm, 128 steps, plain form": partial(plain_sampling, 128),
    "sample, ddpm_cache, 128 steps": partial(sampling, _ddpm_cache, 128, False),
    "sample, ddpm_cache, 128 steps, compiled": partial(sampling, _ddpm_cache, 128, True),
    "sample, ddpm_cache, 1000 steps": partial(sampling, _ddpm_cache, 1000, False),
    "sample, first_hitting": partial(sampling, first_hitting.sample, None, False),
    "sample, first_hitting, compiled": partial(sampling, first_hitting.sample, None, True),
    "classify, 8 draws": partial(classification, False),
    "classify, 8 draws, compiled": partial(classification, True),
}


# --------------------------------------------------------------------------------------------------------------- runs


def table(results: dict) -> str:
    """Return the results as Markdown."""
    lines = [f"# {results['device']}, torch {results['torch']}\n", f"`{results['command']}`\n"]
    lines += ["| check | deviation | at most |", "|---|---|---|"]
    lines += [f"| {name} | {found:.2g} | {limit:g} |" for name, found, limit in results["checks"]]
    lines += [
        "\n| size | measured | per second | share of the measured matmul speed | peak GiB |",
        "|---|---|---|---|---|",
    ]
    for row in results["measurements"]:
        if "error" in row:
            lines.append(f"| {row['size']} | {row['name']} | failed: {row['error']} | | |")
            continue
        speed = next(f"{row[unit]:,.0f} {unit.partition('/')[0]}" for unit in ("tokens/s", "texts/s") if unit in row)
        share = f"{row['mfu']:.1%}" if "mfu" in row else ""
        lines.append(f"| {row['size']} | {row['name']} | {speed} | {share} | {row['peak_gib']:.2f} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, results: dict) -> None:
    """Write the results so far."""
    (folder / "gpu.json").write_text(json.dumps(results, indent=1))
    (folder / "gpu.md").write_text(table(results))


def measured(size_name: str, name: str, small: bool) -> dict:
    """Run one measurement, in a process of its own unless it is small."""
    row = {"size": size_name, "name": name}
    if small:
        return row | MEASUREMENTS[name](Setup(size_name, small))
    command = [sys.executable, __file__, "--only", name, "--size", size_name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return row | {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return row | json.loads(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of gpu.json and gpu.md")
    parser.add_argument("--small", action="store_true", help="a tiny network; runs on a CPU too")
    parser.add_argument("--only", choices=MEASUREMENTS, help="this measurement, in this process")
    parser.add_argument("--size", choices=[*SIZES, *SMALL], default="12 x 768", help="of --only")
    args = parser.parse_args(arguments)
    if args.only:
        torch.set_float32_matmul_precision("high")  # as main.py does
        print(json.dumps(MEASUREMENTS[args.only](Setup(args.size, args.small))))
        return 0
    sizes = SMALL if args.small else SIZES
    if not args.small and not torch.cuda.is_available():
        print("torch finds no GPU; --small runs anywhere", file=sys.stderr)
        return 2
    setup = Setup(next(iter(sizes)), args.small)
    name = torch.cuda.get_device_name() if setup.device == "cuda" else platform.machine()
    results = {
        "device": name,
        "torch": torch.__version__,
        "command": shlex.join(["python", *sys.argv]),
        "checks": list(checks(setup.device, setup.size, setup.vocab_size)),
        "measurements": [],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write(args.output, results)
    wrong = [f"{what}: {off:.3g} is above {limit:g}" for what, off, limit in results["checks"] if not off <= limit]
    if wrong:
        print("\n".join(["results differ from those of the CPU:", *wrong]), file=sys.stderr)
        return 1
    for size_name in sizes:
        for what in MEASUREMENTS:
            results["measurements"].append(measured(size_name, what, args.small))
            print(json.dumps(results["measurements"][-1]), flush=True)
            write(args.output, results)
    return int(any("error" in row for row in results["measurements"]))


if __name__ == "__main__":
    sys.exit(main())
