"""Text -> batches.

The batch contract. Every batch is a dict of CPU tensors (B rows, L tokens):
  input_ids       int64 (B, L)
  attention_mask  bool  (B, L)  False on padding; absent when nothing is padded (wrapped data)
  given           bool  (B, L)  True on context (prompts, BOS, EOS): seen, never masked, not scored; absent when there
                                is none
  fill            bool  (B, L)  True behind a text's own EOS where EOS fills its row (data.fill=eos): masked and scored
                                where a model finds the length by it, never counted as tokens
  segment         int64 (B, L)  part of its text that a token belongs to, from 0; with data.segments=true only
  sample_id       int64 (B,)    lasting name of the row: evaluation noise is keyed by it
  position        int64 (B,)    place in the run's stream of training samples; training batches only
  label           int64 (B,)    where the texts have labels
  class_id        int64 (B,)    class that a conditional network is told, -1 for none; set where it is known, not here
  text_id         int64 (B,)    source text of the row, where a row is (part of) one text
L is `model.length` for wrapped and filled data; padded batches are as long as their longest row, rounded up to
a multiple of 8.

Training data is ONE stream. Position p of the run is row order(seed, p // n)[p % n] of the n rows; optimizer
step s takes the positions [s * G, (s + 1) * G), G = loader.global_batch_size, for any number of devices and
any size of the micro-batches. The place in the stream is a function of the step alone: a checkpoint holds
one number, workers none. With data.random_crop a row is twice as long, and what is seen of it at position p is
a function of (seed, p).
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from text.collate import Collate
from text.order import evaluation_batches
from text.packing import Packing, pack
from text.rows import at_most, joined, keep_label, without_texts_of
from text.sources import Source
from text.stream import PositionBatchSampler, TrainingStream, batch_arithmetic
from text.tokenizers import Vocabulary, load_tokenizer, vocabulary

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


# -------------------------------------------------------------------------------- evaluation


class _Rows(Dataset):
    """Row numbers -> columns of these rows."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        return self.rows[indices]


# -------------------------------------------------------------------------------- the data module


class TextData(LightningDataModule):
    """A source, a tokenizer and a way of packing, as splits and loaders. Nothing is read before it is asked
    for.

    Settings are named as on the command line. data: `insert_train_*` holds for the train split,
    `insert_valid_*` for the others; `insert_*_special` puts BOS and EOS around the chunks of wrapped data
    and BOS before padded texts; `insert_*_eos` ends each text with EOS; `label` keeps one class;
    `max_*_texts` limits a split for quick runs (a fixed random choice where there are labels, else the first
    ones). Tokenizers are trained on the whole train split, whatever `label` and the limits are, so that the
    models of all classes share one vocabulary; `score_special` false makes BOS and EOS of padded rows given. `fill`
    "eos" fills padded rows up to `length` with EOS, so that their length is not shown: the law of a row then is
    p(text, EOS, the fill | prompt), and a model decides where a text ends. `segments`: batches say which part of its
    text each token belongs to.
    `streaming` reads no more of a split than its `max_*_texts` (tokenizers too); `random_crop` trains on random
    stretches of wrapped rows twice as long, evaluation has fixed rows. `train_splits`: train on these splits of the
    source together, without labels (validation has none then either) and without texts of the held-out splits.
    loader: `batch_size` and `eval_batch_size` are rows per
    device; `batch_size` None divides `global_batch_size`. `length` is model.length, `seed` orders the
    training stream, `max_steps` are optimizer steps of the whole run.
    """

    def __init__(
        self,
        source: Source,
        *,
        length: int,
        tokenizer_name_or_path: str,
        tokenizer_folder: str | None = None,
        vocab_size: int | None = None,
        name: str | None = None,
        train: str | None = None,
        valid: str | None = None,
        streaming: bool = False,
        random_crop: bool = False,
        wrap: bool = True,
        insert_train_special: bool = True,
        insert_valid_special: bool = True,
        insert_train_eos: bool = True,
        insert_valid_eos: bool = True,
        score_special: bool = False,
        fill: str | None = None,
        segments: bool = False,
        long_texts: str = "error",
        drop_empty: bool = False,
        label: int | None = None,
        max_train_texts: int | None = None,
        max_valid_texts: int | None = None,
        max_test_texts: int | None = None,
        train_splits: Sequence[str] | None = None,
        cache_dir: str | Path = ".cache",
        batch_size: int | None = None,
        eval_batch_size: int = 32,
        global_batch_size: int = 32,
        max_steps: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = True,
    ) -> None:
        super().__init__()
        self.name, self.score_special, self.fill, self.segments = name or "text", score_special, fill, segments
        self.source, self.length, self.label, self.wrap = source, length, label, wrap
        self.streaming, self.random_crop, self.train_splits = streaming, random_crop, train_splits
        self.tokenizer_settings = {"name_or_path": tokenizer_name_or_path, "folder": tokenizer_folder,
                                   "vocab_size": vocab_size, "cache_dir": cache_dir}  # fmt: skip
        self.packings = {
            split: Packing(length, wrap, eos=eos, bos=special and not wrap, chunk_special=special and wrap,
                           long_texts=long_texts, drop_empty=drop_empty)
            for split, special, eos in (("train", insert_train_special, insert_train_eos),
                                        ("validation", insert_valid_special, insert_valid_eos),
                                        ("test", insert_valid_special, insert_valid_eos))
        }  # fmt: skip
        self.limits = {"train": max_train_texts, "validation": max_valid_texts, "test": max_test_texts}
        self.cache_dir, self.seed, self.num_workers, self.max_steps = cache_dir, seed, num_workers, max_steps
        self.batch_size, self.eval_batch_size, self.global_batch_size = batch_size, eval_batch_size, global_batch_size
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.figures: dict[str, dict[str, int]] = {}
        self._texts: dict[str, datasets.Dataset] = {}
        self._splits: dict[str, datasets.Dataset] = {}
        self._resumed: dict[str, int] = {}
        _check_names({name, *getattr(source, "sources", ())}, train, valid)
        _check(self)

    @property
    def prompted(self) -> bool:
        """Whether texts begin with a prompt, which is given."""
        return getattr(self.source, "prompted", False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        settings = {key: value for key, value in self.tokenizer_settings.items() if key != "name_or_path"}
        name = self.tokenizer_settings["name_or_path"]
        return load_tokenizer(name, texts=lambda: self._read("train")["text"][:], **settings)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return vocabulary(self.tokenizer)

    @property
    def label_names(self) -> tuple[str, ...] | None:
        return self.source.label_names

    @property
    def splits(self) -> tuple[str, ...]:
        return self.source.splits

    def detokenizer(self, split: str) -> str | None:
        """What undid a tokenisation of the split's texts (a name in text/detokenizers.py), None: nothing."""
        return self.source.detokenizer_of(split) if hasattr(self.source, "detokenizer_of") else None

    def packing(self, split: str) -> Packing:
        """How the texts of a split become rows."""
        return self.packings.get(split, self.packings["test"])

    def _read(self, split: str) -> datasets.Dataset:
        """The split's rows from the source, when streaming no more of them than the limit."""
        if not self.streaming:
            return self.source.load(split)
        limit = self.limits.get(split, self.limits["train"])
        if limit is None:
            raise ValueError(f"data.streaming=true reads a split up to its limit, and {split} has none: "
                             f"set {_limit_key(split)}, or data.streaming=false")  # fmt: skip
        if not hasattr(self.source, "stream"):
            raise ValueError("data.streaming=true: these texts are not on the Hub; set it to false")
        return self.source.stream(split, limit)

    def texts(self, split: str) -> datasets.Dataset:
        """The split's texts as they are: columns text, text_id (number in the whole split), label and ends
        (text/sources.py) where there are such.

        Raises ValueError for an unknown split, an unknown label, an empty split.
        """
        if split not in self._texts:
            parts = self.train_splits if split == "train" and self.train_splits else (split,)
            rows = [self._part(part) for part in parts]
            rows = rows[0] if self.train_splits is None else joined(rows)
            if not len(rows):
                raise ValueError(f"the {split} split of the data is empty")
            self._texts[split] = rows
        return self._texts[split]

    def _part(self, split: str) -> datasets.Dataset:
        rows = self._read(split)
        rows = rows.add_column("text_id", np.arange(len(rows)))
        if self.label is not None:
            rows = keep_label(rows, self.label, self.label_names, split)
        if split not in SPLITS:
            measured = {held_out: self._read(held_out) for held_out in SPLITS[1:] if held_out in self.splits}
            rows = without_texts_of(rows, split, measured)
        return at_most(rows, self.limits.get(split, self.limits["train"]))

    def split(self, name: str) -> datasets.Dataset:
        """The split's packed rows (columns: text/packing.py). `figures[name]` says what packing did.

        Raises ValueError for texts, lengths and tokenizers that do not go together.
        """
        if name not in self._splits:
            self._splits[name] = self._pack(name, self.packing(name))
        return self._splits[name]

    def _pack(self, name: str, packing: Packing) -> datasets.Dataset:
        texts = self.texts(name)
        if self.wrap and self.label is None and "label" in texts.column_names:
            texts = texts.remove_columns("label")  # a chunk of several texts has no label
        rows, figures = pack(texts, self.tokenizer, self.vocabulary, packing, self.cache_dir, f"{name} split")
        self._report(name, figures)
        self.figures[name] = figures
        return rows

    def _report(self, name: str, figures: dict[str, int]) -> None:
        log.info("%s: %d texts -> %d rows, %d tokens", name, figures["texts"], figures["rows"], figures["tokens"])
        if figures["long"] and not self.wrap:
            log.warning("%s: %d of %d texts are longer than model.length=%d; tokens left out: %d", name,
                        figures["long"], figures["texts"], self.length, figures["cut"])  # fmt: skip
        if figures["unknown"]:
            log.warning("%s: %d of %d tokens are unknown to the tokenizer", name, figures["unknown"], figures["tokens"])

    def train_dataloader(self) -> DataLoader:
        """This rank's micro-batches of the whole run, from the place that a loaded checkpoint has reached.

        Raises ValueError where the batch sizes do not divide or the trainer would run on past the stream.
        """
        rank, world = self._rank()
        limit = None if self.trainer is None else self.trainer.max_steps
        if limit is not None and not 0 < limit <= self.max_steps:
            raise ValueError(f"trainer.max_steps={limit}, but the data were set up for {self.max_steps} "
                             f"steps; "
                             f"give both one positive number")  # fmt: skip
        size, _ = batch_arithmetic(self.global_batch_size, self.batch_size, world)
        sampler = PositionBatchSampler(self.global_batch_size, size, self.max_steps, rank, world, self._consumed())
        if not self.random_crop:
            return self._loader(TrainingStream(self.split("train"), self.seed), sampler)
        double = self._pack("train", replace(self.packings["train"], length=2 * self.length))
        return self._loader(TrainingStream(double, self.seed, crop=self.length), sampler)

    def val_dataloader(self) -> DataLoader:
        return self.eval_dataloader("validation")

    def test_dataloader(self) -> DataLoader:
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: str, only: np.ndarray | None = None) -> DataLoader:
        """Every row of the split (or of `only`) once over all ranks; padded rows longest first, to waste least."""
        rows = self.split(split)
        order = np.arange(len(rows)) if only is None else only
        if not self.wrap:
            order = order[np.argsort(-np.asarray(rows["length"][:])[order], kind="stable")]
        return self._loader(_Rows(rows), evaluation_batches(order, self.eval_batch_size, *self._rank()))

    @property
    def collate(self) -> Collate:
        """Columns of rows of a split -> a batch."""
        if self.wrap:
            return Collate(self.length, None)
        vocabulary = self.vocabulary
        frame = {vocabulary.bos_id} if self.fill else {vocabulary.bos_id, vocabulary.eos_id}
        frame = () if self.score_special else frame - {None}
        pad_id = vocabulary.eos_id if self.fill else vocabulary.pad_id
        return Collate(self.length, pad_id, frame, bool(self.fill), self.segments)

    def _loader(self, rows: Dataset, batches: Sampler | list[list[int]]) -> DataLoader:
        return DataLoader(
            rows, batch_sampler=batches, collate_fn=self.collate, num_workers=self.num_workers,
            pin_memory=self.pin_memory, persistent_workers=self.num_workers > 0,
        )  # fmt: skip

    def _rank(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def state_dict(self) -> dict[str, int]:
        """Samples that finished steps have taken from the stream, and what else the order hangs on."""
        steps = None if self.trainer is None else self.trainer.global_step
        consumed = self._resumed.get("consumed_samples", 0) if steps is None else steps * self.global_batch_size
        return {"consumed_samples": consumed, "global_batch_size": self.global_batch_size, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._resumed = dict(state_dict)

    def _consumed(self) -> int:
        """Where training goes on. Raises ValueError for a checkpoint of a run with another stream."""
        for key, value in (("global_batch_size", self.global_batch_size), ("seed", self.seed)):
            before = self._resumed.get(key, value)
            if before != value:
                setting = f"loader.{key}" if key == "global_batch_size" else key
                raise ValueError(f"{setting}={value}, but the run to be resumed was begun with "
                                 f"{setting}={before}; "
                                 f"resume it with that, or start a new run")  # fmt: skip
        return int(self._resumed.get("consumed_samples", 0))


def _limit_key(split: str) -> str:
    return f"data.max_{ {'validation': 'valid', 'test': 'test'}.get(split, 'train') }_texts"


def _check_names(known: Iterable[str | None], train: str | None, valid: str | None) -> None:
    """data.train and data.valid (keys of the reference projects) name the data set, or one of those that it joins;
    other values would do nothing."""
    names = [name for name in known if name is not None]
    for key, value in (("data.train", train), ("data.valid", valid)):
        if value is not None and names and value not in names:
            raise ValueError(f"{key}={value}: a data set is trained and measured on its own splits; "
                             f"choose it with "
                             f"data={value}, or leave {key} as it is ({', '.join(sorted(names))})")  # fmt: skip


def _check(data: TextData) -> None:
    packing = data.packings["train"]
    if data.random_crop and (not data.wrap or packing.chunk_special):
        raise ValueError("data.random_crop=true cuts stretches out of wrapped text, without a begin or an end; "
                         "set data.wrap=true and data.insert_train_special=false")  # fmt: skip
    _check_parts(data)
    least = {
        "loader.eval_batch_size": (data.eval_batch_size, 1),
        "loader.num_workers": (data.num_workers, 0),
        "trainer.max_steps": (data.max_steps, 1),
    }
    limits = {_limit_key(split): (n, 1) for split, n in data.limits.items()}
    for key, (value, lowest) in {**least, **limits}.items():
        if value is not None and value < lowest:
            raise ValueError(f"{key}={value} must be at least {lowest}")


def _check_parts(data: TextData) -> None:
    if data.fill not in (None, "eos"):
        raise ValueError(f"data.fill={data.fill} is unknown; choose eos, or null")
    if data.fill and (data.wrap or not all(packing.eos for packing in data.packings.values())):
        raise ValueError("data.fill=eos fills the row of each text behind its EOS; set data.wrap=false and "
                         "data.insert_train_eos=data.insert_valid_eos=true, or data.fill=null")  # fmt: skip
    if data.segments and not data.prompted:
        raise ValueError(f"data.segments=true: the texts of data={data.name} have no parts; set it to false")
