"""Compute the latents of a data set's texts into a folder that latents=file reads, or check their quality.

    python scripts/prepare_latents.py --out latents/imdb --data imdb --encoder lsa --processes 2 model.length=256
    python scripts/prepare_latents.py --out latents/news --data ag_news --encoder hf latents.name_or_path=FOLDER \\
        data.long_texts=windows model.length=128
    python scripts/prepare_latents.py --check --data imdb --encoder lsa model.length=256

Other settings are typed as for main.py: data=, model.length, data.tokenizer_name_or_path, data.long_texts, latents.*.
All windows of a text (data.long_texts=windows) are in the same split. Then train with the same data settings:
python main.py algo=mmldlm backbone=mmdit ... latents=file latents.path=FOLDER

The same command resumes a killed run. The bytes do not depend on --processes. metadata.json has the digest of every
file; a changed file is refused.
--check prints one line of JSON: how often the latent of a text with 20 % of its words dropped is nearest to its own
among --texts texts (latents=synthetic: the accuracy of a linear map for each attribute). The exit status is 1 if that
is less than 0.9 (0.99).
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from palimpsest.data.cache import fingerprint
from palimpsest.data.tokenizers import encode
from palimpsest.dataloader import TextData
from palimpsest.experiment.experiment import Experiment
from palimpsest.latents.attributes import Attributes, known_texts
from palimpsest.latents.preparing import Plan, Preparation
from palimpsest.latents.quality import LEAST_PROBED, LEAST_RETRIEVED, probe, retrieval
from palimpsest.latents.shards import SPLITS, Shards
from palimpsest.settings.command_line import clear_errors, compose_config
from palimpsest.settings.reading import Readers

log = logging.getLogger(__name__)


def texts_of(overrides: list[str]) -> TextData:
    """Return the data that these arguments of main.py name, with their encoder.

    Raises:
        ValueError: there is no encoder, or a setting is invalid.
    """
    configuration = compose_config(overrides)
    Readers(configuration).refuse_wrong()
    data = Experiment(configuration, "scripts/prepare_latents.py").build.data()
    if data.latents is None:
        raise ValueError("--encoder is missing: give lsa, hf, self or synthetic")
    return data


def preparation(typed: argparse.Namespace, data: TextData, parent: int | None = None) -> Preparation:
    """Return the requested work with a fitted encoder; `parent` is the process that started this one, if any."""
    latents = data.latents
    if isinstance(latents.encoder, Shards):
        raise ValueError("--encoder=file: those latents exist already; give lsa, hf, self or synthetic")
    if data.wrap:
        raise ValueError(
            "data.wrap=true joins texts and cuts them anywhere, so a row is not one text; set "
            "data.wrap=false, with data.long_texts=windows for long texts"
        )
    if latents.encoder.dim is not None:
        dim = latents.encoder.dim
        raise ValueError(
            f"latents.dim={dim}: the folder keeps all dimensions of the encoder; set latents.dim=null "
            f"here, and latents=file latents.dim={dim} in training"
        )
    if latents.encoder.tokens != 1:
        raise ValueError(
            f"latents.tokens={latents.encoder.tokens}: the folder keeps a text's vector in one piece; leave it out"
        )
    unknown = [split for split in typed.splits or () if split not in data.splits]
    if unknown:
        raise ValueError(f"--splits: there is no {', '.join(unknown)}; there are {', '.join(data.splits)}")
    splits = typed.splits or [split for split in SPLITS if split in data.splits]
    latents.fit_encoder()
    texts = {split: latents.packed(split) for split in splits}
    rows = {split: [part.fingerprint, part.known_fingerprint] for split, part in texts.items()}
    plan = Plan(
        {**latents.settings, "rows": rows}, {split: len(part) for split, part in texts.items()}, typed.shard_size
    )
    orphaned = (lambda: os.getppid() != parent) if parent else (lambda: False)
    return Preparation(typed.out, plan, texts, latents.encoder, typed.max_skipped, orphaned)


def prepare(typed: argparse.Namespace, overrides: list[str]) -> dict[str, object]:
    """Write the folder; return the content of its metadata.json.

    Raises:
        ValueError: it cannot be written, or a process failed.
    """
    data = texts_of(overrides)
    work = preparation(typed, data)
    if work.begin():
        numbers = work.missing()
        if typed.processes == 1:
            work.write(numbers)
        else:
            _write_in_processes(typed, overrides)
        left_out = sum(data.figures[split]["cut"] for split in work.texts)
        tokenizer = data.settings.tokenizer_name_or_path
        return work.finish({"length": data.length, "tokenizer": tokenizer,
                            "vocabulary": data.vocabulary.fingerprint, "tokens_left_out": left_out,
                            "identity": fingerprint(data.latents.settings)})  # fmt: skip
    return json.loads((typed.out / "metadata.json").read_text())


def _write_in_processes(typed: argparse.Namespace, overrides: list[str]) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads of torch may hang
    processes = [context.Process(target=_write_share, args=(typed, overrides, number, os.getpid()))
                 for number in range(typed.processes)]  # fmt: skip
    for process in processes:
        process.start()
    while all(process.exitcode in (None, 0) for process in processes) and any(p.is_alive() for p in processes):
        time.sleep(0.05)
    failed = [process.exitcode for process in processes if process.exitcode]
    for process in processes:
        if failed:
            process.terminate()
        process.join()
    if failed:
        raise ValueError(
            f"a process has ended with status {failed[0]} (the reason is above, unless it was killed); "
            "the same command resumes"
        )


def _write_share(typed: argparse.Namespace, overrides: list[str], number: int, parent: int) -> None:
    _quiet(typed)
    with clear_errors():
        work = preparation(typed, texts_of(overrides), parent)
        work.write([part.number for part in work.plan.parts][number :: typed.processes])


def check(typed: argparse.Namespace, overrides: list[str]) -> dict[str, object]:
    """Return the output of --check."""
    data = texts_of(overrides)
    latents = data.latents
    held_out = next(split for split in ("validation", "test", "train") if split in data.splits)
    facts = {"check": str(latents.metadata.get("encoder")), "data": data.name, "split": held_out,
            "shape": list(latents.shape), "length": data.length}  # fmt: skip
    rows = data.split(held_out)
    chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[: typed.texts])
    if isinstance(latents.encoder, Attributes):
        return {**facts, **_probe(typed, data, held_out, chosen)}
    packing, vocabulary = data.packing(held_out), data.vocabulary
    head, tail = ([i] if put else [] for i, put in ((vocabulary.bos_id, packing.bos), (vocabulary.eos_id, packing.eos)))

    def standardised(texts: list[str]) -> np.ndarray:
        ids = [(head + row + tail)[: data.length] for row in encode(data.tokenizer, texts)]
        parts = [latents.encode(ids[start : start + 1024]) for start in range(0, len(ids), 1024)]
        return np.concatenate(parts)

    found = retrieval(standardised, latents.packed(held_out)[chosen].texts)
    return {**facts, "retrieval_top1": round(found.share, 4), "se": round(found.se, 4), "texts": found.texts,
            "chance": found.chance, "passed": found.share >= LEAST_RETRIEVED}  # fmt: skip


def _probe(typed: argparse.Namespace, data: TextData, held_out: str, chosen: np.ndarray) -> dict[str, object]:
    encoder, sides = data.latents.encoder, {}
    for split, rows in (("train", np.arange(min(len(data.split("train")), 4 * typed.texts))), (held_out, chosen)):
        passages = data.latents.packed(split)[rows]
        sides[split] = data.latents.of(split)[rows], encoder.attributes(known_texts(passages), passages.labels)
    accuracy = probe(*sides["train"], *sides[held_out])
    read = (encoder.read(data.latents.restore(sides[held_out][0])) == sides[held_out][1]).mean()
    return {"probe": dict(zip(encoder.names, (round(a, 4) for a in accuracy), strict=True)), "texts": len(chosen),
            "decoder": round(float(read), 4), "passed": min(accuracy) >= LEAST_PROBED}  # fmt: skip


def _quiet(typed: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # The same number for any --processes, because sums over threads differ in their last digits.
    torch.set_num_threads(typed.threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write or resume")
    parser.add_argument("--data", help="the same as data=")
    parser.add_argument("--encoder", help="lsa | hf | self | synthetic: the same as latents=")
    parser.add_argument(
        "--splits",
        type=lambda names: names.split(","),
        metavar="A,B",
        help="default: those of train, validation, test that exist",
    )
    parser.add_argument(
        "--shard-size", type=int, default=10_000, help="texts per shard; a kill loses at most one shard"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="per process")
    parser.add_argument(
        "--max-skipped", type=int, default=0, help="maximum number of texts without a latent, which are left out"
    )
    parser.add_argument("--check", action="store_true", help="measure the latents instead of writing them")
    parser.add_argument("--texts", type=int, default=1000, help="of --check")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for main.py")
    return parser


def main() -> None:
    typed = _parser().parse_intermixed_args()
    named = [f"{key}={value}" for key, value in (("data", typed.data), ("latents", typed.encoder)) if value]
    _quiet(typed)
    with clear_errors():
        for key in ("processes", "threads", "shard_size", "texts"):
            if getattr(typed, key) < 1:
                raise ValueError(f"--{key.replace('_', '-')}={getattr(typed, key)} must be at least 1")
        if typed.max_skipped < 0:
            raise ValueError(f"--max-skipped={typed.max_skipped} must be 0 or more")
        if typed.check:
            facts = check(typed, [*named, *typed.overrides])
        elif typed.out is None:
            raise ValueError("--out is missing: the folder to write")
        else:
            facts = prepare(typed, [*named, *typed.overrides])
            facts = {key: value for key, value in facts.items() if key not in ("mean", "std", "plan")}
    print(json.dumps(facts))
    sys.exit(0 if facts.get("passed", True) else 1)


if __name__ == "__main__":
    main()
