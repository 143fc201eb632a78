"""Comparison of decoders of one network: perplexity of their texts under a scorer, diversity, and cost.

Repetition lowers generative perplexity, so compare it together with entropy, distinct-n and the last two lines. They
are of as many real texts, and of texts with tokens drawn independently from the training frequencies (after
sampling.prefix, if set). Sampled texts are kept below --output for another scorer or an interrupted table.

    python benchmarks/decoders.py --checkpoint outputs/reviews/micro-0123abcd/checkpoints/last.ckpt
    DATA_DIR=/path/to/data python benchmarks/decoders.py --checkpoint last.ckpt --scorer gpt2 data=wikitext2 model=tiny
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np

from palimpsest.benchmarks.kneser_ney import KneserNey
from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.common.metrics import Estimate, Units
from palimpsest.data.tokenizers import decode
from palimpsest.data.unigram import token_counts
from palimpsest.evaluation.drawing import draw
from palimpsest.evaluation.generative_perplexity import CausalScorer
from palimpsest.evaluation.sample_quality import measure, real_texts
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.running import checked
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.instantiation import class_built_by

UNMASK = {
    "random": "sampling.order=random",
    "random, top-k 50, temperature 0.7": "sampling.order=random sampling.top_k=50 sampling.temperature=0.7",
    "left to right": "sampling.order=left_to_right",
    "confidence": "sampling.order=confidence",
    "margin": "sampling.order=margin",
    "margin, cosine": "sampling.order=margin sampling.schedule=cosine",
    "margin, exponential": "sampling.order=margin sampling.schedule=exponential",
    "margin, nucleus 0.9": "sampling.order=margin sampling.nucleus_p=0.9",
    "entropy": "sampling.order=entropy",
    "confidence, greedy": "sampling.order=confidence sampling.temperature=0",
    "threshold 0.9": "sampling.threshold=0.9",
    "low-confidence remasking": "sampling.order=confidence sampling.remask=low_confidence",
    "low-confidence remasking, cosine":
        "sampling.order=confidence sampling.remask=low_confidence sampling.schedule=cosine",
    "ReMDM": "sampling.order=random sampling.remask=remdm",
    "ReMDM, nucleus 0.9": "sampling.order=random sampling.remask=remdm sampling.nucleus_p=0.9",
}  # fmt: skip
PLAIN = {"ddpm_cache": "sampling.predictor=ddpm_cache", "first-hitting": "sampling.predictor=first_hitting"}
BLOCK = {"blocks, first-hitting": "sampling.predictor=block"}
NO_BUDGET = ("first-hitting", "blocks, first-hitting")  # as many steps as masks, whatever sampling.steps


def decoders(blocks: bool, steps: list[int]) -> dict[str, list[str]]:
    """Return overrides by name of the decoder, for each budget if it has one."""
    predictor = "block_unmask" if blocks else "unmask"
    every = {**(BLOCK if blocks else PLAIN),
             **{name: f"sampling.predictor={predictor} {how}" for name, how in UNMASK.items()}}  # fmt: skip
    table = {}
    for name, how in every.items():
        for budget in steps[:1] if name in NO_BUDGET else steps:
            shown = name if name in NO_BUDGET else f"{name}, {budget} steps"
            table[shown] = [*how.split(), f"sampling.steps={budget}"]
    return table


class Table:
    """Sampled texts of one network, kept on disk; texts: number per decoder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.overrides, self.folder, self.texts, self.show = args.overrides, args.output, args.texts, args.show
        self.experiment = self._experiment([])
        self.data = self.experiment.build.data()
        self.network = self.experiment.weights.trained(self.data, args.checkpoint, disable_ema=False)
        self.scorer = self._scorer(args.scorer)

    def _experiment(self, how: list[str]) -> Experiment:
        cfg = compose_config([*self.overrides, *how])
        checked(cfg, "a benchmark")
        return Experiment(cfg, "benchmarks/decoders.py")

    def _scorer(self, name: str | None) -> CausalScorer | KneserNey:
        if name:
            return CausalScorer.load(name, device=self.network.device)
        return KneserNey(self.data.tokenizer, self.data.texts("train")["text"][:], self.data.vocabulary.size)

    def drawn(self, name: str, how: list[str]) -> dict[str, object]:
        """Return ids, evaluations and seconds per text of a decoder, from disk if they exist."""
        drawing, source = self._experiment(how).drawing, self.network.provenance
        weights = [str(Path(source.checkpoint).resolve()), source.steps]
        key = [2, dict(drawing.protocol), self.texts, self.experiment.seed, self.data.name, self.data.length, *weights]
        file = self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]}.json"
        if file.exists():
            return json.loads(file.read_text())
        size = min(self.texts, self.data.eval_batch_size)
        draw(self.network, self.data, drawing, 1, 1, self.experiment.seed)  # the first call has extra costs
        start = time.perf_counter()
        texts = draw(self.network, self.data, drawing, self.texts, size, self.experiment.seed)
        kept = {"name": name, "key": key, "batch": size, "ids": [text.ids for text in texts],
                "written": [[step > 0 for step in text.steps] for text in texts],
                "evaluations": sum(text.evaluations for text in texts) / len(texts),
                "seconds": (time.perf_counter() - start) / len(texts)}  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(kept))
        return kept

    def row(
        self,
        name: str,
        rows: list[list[int]],
        evaluations: float | None = None,
        seconds: float | None = None,
        units: Units | None = None,
    ) -> dict[str, object]:
        """Print a line, and the first texts if requested; return the line. units: the units of errors (None: texts)."""
        quality = measure(rows, self.data, self.scorer, units)
        columns = {"generative_perplexity": quality.likelihood.perplexity,
                   "unigram_entropy_nats": quality.diversity.unigram_entropy,
                   **{f"distinct_{n}": share for n, share in quality.diversity.distinct.items()}}  # fmt: skip
        cost = "" if evaluations is None else f"{evaluations:8.1f} evaluations {seconds:8.3f} s a text"
        print(f"{name:46} " + " ".join(_shown(value) for value in columns.values()) + f" {cost}", flush=True)
        for ids in rows[: self.show]:
            print(f"    {decode(self.data.tokenizer, ids, skip_special=True)}", flush=True)
        known = {key: {"value": value.value, "se": value.se} for key, value in columns.items()}
        return {"decoder": name, **known, "network_evaluations": evaluations, "seconds_per_text": seconds}

    def unigrams(self, like: dict[str, object]) -> list[list[int]]:
        """Return the texts `like` with every sampled token redrawn from the training frequencies."""
        counts_V = token_counts(self.data)[0]
        rng, p_V = np.random.default_rng(self.experiment.seed), counts_V / counts_V.sum()
        drawn = [rng.choice(len(p_V), len(ids), p=p_V).tolist() for ids in like["ids"]]
        return [[new if written else old for old, new, written in zip(*text, strict=True)]
                for text in zip(like["ids"], drawn, like["written"], strict=True)]  # fmt: skip


def _shown(value: Estimate) -> str:
    return f"{value.value:9.3f} ± {value.se:7.3f}"


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--checkpoint", required=True)
    scorer = parser.add_mutually_exclusive_group()
    scorer.add_argument("--scorer", help="a causal model: $DATA_DIR/<name>, a folder, or a name on the Hub")
    scorer.add_argument("--ngram", action="store_true", help="score by a 3-gram model of the training texts (default)")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--steps", default="16,64", help="budgets")
    parser.add_argument("--only", default="", help="decoders whose name has this in it")
    parser.add_argument("--show", type=int, default=0, help="so many texts of each")
    parser.add_argument("--output", type=Path, default=Path("outputs/decoders"))
    parser.add_argument("overrides", nargs="*", help="the configuration that the checkpoint belongs to")
    args = parser.parse_intermixed_args()
    table, rows = Table(args), []
    cfg = table.experiment.cfg
    blocks = class_built_by(cfg.parameterization).name == "bd3lm" and cfg.block_size != cfg.model.length
    wanted = {name: how for name, how in decoders(blocks, [int(n) for n in args.steps.split(",")]).items()
              if args.only in name}  # fmt: skip
    print(f"{'':46} {'perplexity':19} {'entropy, nats':19} {'distinct-1':19} {'distinct-2':19} {'distinct-3':19}")
    for name, how in wanted.items():
        kept = table.drawn(name, how)
        rows.append({**table.row(name, kept["ids"], kept["evaluations"], kept["seconds"]), "overrides": how})
    rows.append(table.row("unigrams", table.unigrams(kept)))
    real = real_texts(table.data, "validation", args.texts, table.experiment.seed)
    if real.rows:
        rows.append(table.row("real texts", real.rows, units=real.units))
    report(
        "decoders",
        checkpoint=args.checkpoint,
        texts=args.texts,
        overrides=args.overrides,
        scorer=table.scorer.protocol,
        real_missing=real.missing,
        device=str(table.network.device),
        table=rows,
    )


if __name__ == "__main__":
    main()
