"""Cost of data loading: tokens per second by number of workers, for texts tokenised ahead and for streamed texts.

It also measures the time to the first batch of a new stream, and of one resumed with and without saved positions. It
needs real files of texts (Parquet, jsonl, csv, txt; one, or a glob), and prints medians and ranges of the repetitions.

    python benchmarks/data_loading.py --path "$DATA_DIR/imdb/unsupervised.parquet" --tokenizer gpt2
"""

from __future__ import annotations

import argparse
import itertools
import logging
import tempfile
import time
from types import SimpleNamespace

from palimpsest.benchmarks.shared import report, spread
from palimpsest.data.user_files import UserFiles
from palimpsest.dataloader import Batches, Loading, TextData, Texts


def build(args: argparse.Namespace, workers: int, streaming: bool, step: int = 0) -> TextData:
    source = UserFiles(args.path, validation_path=args.path, test_path=args.path)
    limit = None if streaming else args.texts
    texts = Texts(args.length, args.tokenizer, streaming=streaming, max_train_texts=limit, cache_dir=args.cache)
    batches = Batches(global_batch_size=args.batch, max_steps=10**6, seed=1, loading=Loading(workers))
    data = TextData(source, texts, batches)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, max_steps=10**6, global_step=step, num_devices=1)
    return data


def speed(args: argparse.Namespace, workers: int, streaming: bool) -> float:
    """Return the tokens per second after the first batches, without other work."""
    batches = iter(build(args, workers, streaming).train_dataloader())
    next(itertools.islice(batches, 8, 8), None)
    began = time.perf_counter()
    tokens = sum(batch["input_ids"].numel() for batch in itertools.islice(batches, args.steps))
    return tokens / (time.perf_counter() - began)


def resumes(args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds to the first batch of a new stream, and of one resumed after `steps` steps."""
    data, began = build(args, 0, True), time.perf_counter()
    batches = iter(data.train_dataloader())
    next(batches)
    seconds = {"new": time.perf_counter() - began}
    wanted = next(itertools.islice(batches, args.steps - 1, None))
    data.trainer.global_step = args.steps
    state = data.state_dict()
    for name in ("by its places", "without them"):
        again = build(args, 0, True, args.steps)
        again.load_state_dict(state)
        again.vocabulary  # noqa: B018 - loading the tokenizer is not what is measured
        began = time.perf_counter()
        batch = next(iter(again.train_dataloader()))
        seconds[name] = time.perf_counter() - began
        assert batch["input_ids"].equal(wanted["input_ids"])
        state["stream"]["places"] = {}
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--path", required=True)
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as args.cache:
        for _ in range(args.pairs):
            for streaming, workers in itertools.product((False, True), (0, 1, 2)):
                name = f"{'streamed' if streaming else 'tokenised ahead'}, {workers} workers, tokens/s"
                found.setdefault(name, []).append(speed(args, workers, streaming))
            for name, seconds in resumes(args).items():
                found.setdefault(f"first batch, {name}, s", []).append(seconds)
    for name, values in found.items():
        low, median, high = spread(values)
        print(f"{name:45s} {median:12,.2f}   ({low:,.2f} to {high:,.2f})")
    report("data_loading", length=args.length, batch=args.batch, steps=args.steps, pairs=args.pairs, **found)


if __name__ == "__main__":
    main()
