"""Data module: texts to batches.

The batch contract. Every batch is a dict of CPU tensors (B rows, L tokens):
  input_ids       int64 (B, L)
  attention_mask  bool  (B, L)  False on padding; absent if nothing is padded (wrapped data)
  observed        bool  (B, L)  True on observed tokens (prompts, prefixes, BOS, EOS): never masked, not scored; absent
                                if there are none
  eos_padding     bool  (B, L)  True on EOS padding after a text's own EOS (data.fill=eos): masked and scored if a model
                                determines the length by it, never counted as tokens
  segment_ends    int64 (B, S - 1)  only with data.segments=true, for texts of S segments: the end of each but the last
  document        int64 (B, L)  only with data.document_mask=true: number of the token's document in its row
  sample_id       int64 (B,)    permanent id of the row, which keys evaluation noise; in a stream the position
  position        int64 (B,)    position in the run's stream of training samples; training batches only
  label           int64 (B,)    if the texts have labels
  class_id        int64 (B,)    class for a conditional network, -1 for none; not set here
  text_id         int64 (B,)    source text, if a row is (part of) one text; not in a stream
  first_document, last_document  int64 (B,)  documents of the row's first and last token, if known (data/packing.py):
                                errors are over documents; not in training batches
  latent          float32 (B, K, D)  standardised latent of the row (latents/rows.py); only with `latents=`
L is `model.length` for wrapped and EOS-padded data; otherwise batches are as long as their longest row, rounded up to
PAD_MULTIPLE.

Training data is ONE stream. Position p of the run is row order(seed, p // n)[p % n] of the n rows. Optimizer step s
takes the positions [s * G, (s + 1) * G), G = loader.global_batch_size, for any number of devices and any size of the
micro-batches. With loader.batch_ramp G depends on s, and a step begins where the previous one ends. The position in the
stream is a function of the step alone: a checkpoint contains one number, workers none. With data.random_crop a row is
twice as long, and the crop at position p is a function of (seed, p). Of a mixture (data.weights) each data set has its
share of every thousand positions (data/order.py). With data.streaming and unlimited training texts
the rows and their order are those of data/streaming.py, and a checkpoint also contains the reading positions.
"""

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Any, Literal

import datasets
import numpy as np
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from palimpsest.common.values import (
    FREE,
    IF_SET,
    AtLeastOne,
    BatchRamp,
    BelowOne,
    FilePath,
    FolderName,
    Length,
    Name,
    Natural,
    PresentPath,
    Seed,
    whole,
)
from palimpsest.data.checks import check_settings
from palimpsest.data.collate import Collate, Rows, segment_ends
from palimpsest.data.loading import Loading, TimedLoader
from palimpsest.data.order import evaluation_batches
from palimpsest.data.packing import Figures, Packing, check_prompts, one_after_the_other, pack, with_special_tokens
from palimpsest.data.rows import from_table, text_table
from palimpsest.data.sources import Source, cached
from palimpsest.data.splits import SplitTexts
from palimpsest.data.stream import BatchPlan, PositionBatchSampler, TrainingStream, check_same_texts
from palimpsest.data.stream_loader import StreamLoader
from palimpsest.data.streaming import Corpus, Order
from palimpsest.data.tables import fingerprint_of, size_of, texts_of
from palimpsest.data.tokenizers import Vocabulary, load_tokenizer, published_frame, vocabulary
from palimpsest.latents.rows import Encoder, RowsWithLatents, TextLatents

log = logging.getLogger(__name__)

MOST_UNKNOWN = 0.9  # largest share of unknown tokens in a split


@dataclass(frozen=True)
class Texts:
    """Settings that turn the texts of a source into rows: the keys of `data`, and keys of other groups about rows.

    Attributes:
        length: tokens of a row (model.length).
        insert_train_special, insert_valid_special: BOS and EOS around the chunks of wrapped data, BOS before padded
            texts, in the train split and in the others.
        insert_train_eos, insert_valid_eos: EOS after each text.
        score_special: False observes special tokens; None: BOS and EOS of padded rows, none of wrapped ones.
        prefix_length: number of observed tokens at the beginning of each row (training.prefix_length).
        first_given: the first token is observed (training.ignore_bos).
        fill: "eos" pads rows with EOS up to `length`, which hides their length: the distribution of a row then is
            p(text, EOS, padding | prompt), and a model decides where a text ends.
        segments: batches contain the ends of each text's parts; parts between the first and the last end with EOS and
            are padded to `segment_room` tokens.
        label: keep the texts of one class. Tokenizers are trained on the whole train split, whatever `label` and the
            limits are, so that the models of all classes share one vocabulary.
        max_train_texts, max_valid_texts, max_test_texts: limits for quick runs: a fixed random choice if there are
            labels, else the first ones.
        label_noise: share of the training texts of each class whose label is replaced by another one (data/labels.py).
            Validation and test texts keep theirs. Nothing without labels changes: not the tokenizer, nor
            `train_splits`.
        texts_per_class: training texts of each class, in a fixed random order; None: all. Otherwise as `label_noise`.
        streaming: read no more of a split than its limit (tokenizers too). Without `max_train_texts` training reads
            without end, in the order of `stream`, and keeps only its `sample_texts`.
        document_mask: tokens of wrapped rows attend to their own document only. A document ends with the end token.
        random_crop: train on random crops of wrapped rows twice as long; evaluation has fixed rows.
        train_splits: train on these splits together, without labels (validation has none then either) and without texts
            of the held-out splits.
        protocol: "reference" makes rows as kuleshov-group's mdlm does, with `num_proc` processes (None: 1).
        latents: the encoder of `latents=`.
    """

    length: Length
    tokenizer_name_or_path: PresentPath
    tokenizer_folder: FilePath | None = None
    vocab_size: AtLeastOne | None = None
    mask_token: Annotated[Name, IF_SET] | None = None
    name: FolderName | None = None
    train: Name | None = None
    valid: Name | None = None
    streaming: bool = False
    document_mask: Annotated[bool, IF_SET] = False
    random_crop: bool = False
    wrap: bool = True
    insert_train_special: bool = True
    insert_valid_special: bool = True
    insert_train_eos: bool = True
    insert_valid_eos: bool = True
    score_special: bool | None = None
    prefix_length: Annotated[Natural, IF_SET] = 0
    first_given: Annotated[bool, IF_SET] = False
    fill: Annotated[Literal["eos"], IF_SET] | None = None
    segments: Annotated[bool, IF_SET] = False
    segment_room: Annotated[Annotated[int, whole(2)], IF_SET] | None = None
    long_texts: Literal["truncate", "windows", "drop", "error"] = "error"
    drop_empty: bool = False
    label: Annotated[Natural, FREE] | None = None
    max_train_texts: AtLeastOne | None = None
    max_valid_texts: Annotated[AtLeastOne, FREE] | None = None
    max_test_texts: Annotated[AtLeastOne, FREE] | None = None
    label_noise: Annotated[BelowOne, IF_SET] = 0.0
    texts_per_class: Annotated[AtLeastOne, IF_SET] | None = None
    train_splits: Sequence[str] | None = None
    protocol: Annotated[Literal["reference"], IF_SET] | None = None
    num_proc: Annotated[AtLeastOne, IF_SET] | None = None
    cache_dir: Annotated[PresentPath, FREE] = ".cache"
    stream: Order = Order()
    latents: Encoder | None = None


@dataclass(frozen=True)
class Batches:
    """Settings that turn rows into batches: the keys of `loader`.

    Attributes:
        batch_size, eval_batch_size: rows per device and micro-batch; None divides `global_batch_size`.
        global_batch_size: samples per optimizer step.
        batch_ramp: smaller steps first (data/stream.py).
        max_steps: optimizer steps of the whole run.
        seed: of the order of the training stream.
    """

    batch_size: AtLeastOne | None = None
    eval_batch_size: AtLeastOne = 32
    global_batch_size: AtLeastOne = 32
    batch_ramp: BatchRamp | None = None
    max_steps: AtLeastOne = 1
    seed: Seed = 0
    loading: Loading = Loading()


class TextData(LightningDataModule):
    """A source, a tokenizer and a packing, as splits and loaders. Nothing is read before it is needed."""

    def __init__(self, source: Source, texts: Texts, batches: Batches) -> None:
        super().__init__()
        self.settings = texts
        self.batches = batches
        self.name = texts.name or "text"
        self.source = cached(source if texts.protocol is None else source.published(), texts.cache_dir)
        self.length = texts.length
        self.wrap = texts.wrap
        self.fill = texts.fill
        self.segments = texts.segments
        self.prefix_length = texts.prefix_length
        self.first_given = texts.first_given
        default = texts.wrap or texts.protocol is not None
        self.score_special = default if texts.score_special is None else texts.score_special
        self.protocol = texts.protocol
        self.document_mask = texts.document_mask
        self.label = texts.label
        self.train_splits = texts.train_splits
        self.cache_dir = texts.cache_dir
        self.eval_batch_size = batches.eval_batch_size
        plain = Packing(
            texts.length,
            texts.wrap,
            long_texts=texts.long_texts,
            drop_empty=texts.drop_empty,
            room=texts.segment_room if texts.segments else None,
            num_proc=(texts.num_proc or 1) if texts.protocol else None,
        )
        measured = with_special_tokens(plain, texts.insert_valid_special, texts.insert_valid_eos)
        self.packings = dict.fromkeys(("validation", "test"), measured)
        self.packings["train"] = with_special_tokens(plain, texts.insert_train_special, texts.insert_train_eos)
        limits = {"train": texts.max_train_texts, "validation": texts.max_valid_texts, "test": texts.max_test_texts}
        self._texts = SplitTexts(
            self.source,
            limits,
            texts.streaming,
            texts.stream.sample_texts,
            texts.label,
            texts.train_splits,
            texts.label_noise,
            texts.texts_per_class,
            texts.cache_dir,
        )
        self.plan = BatchPlan.of(batches.global_batch_size, batches.batch_ramp)
        self.figures: dict[str, dict[str, int]] = {}
        self._splits: dict[str, datasets.Dataset] = {}
        self._streamed: StreamLoader | None = None
        self._resumed: dict[str, Any] = {}
        self.latents = None if texts.latents is None else TextLatents(texts.latents, self)
        check_settings(self)

    @property
    def prompted(self) -> bool:
        """Return True if texts begin with a prompt, which is observed."""
        return getattr(self.source, "prompted", False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        train = partial(self._texts.whole, "train")
        return load_tokenizer(
            self.settings.tokenizer_name_or_path,
            folder=self.settings.tokenizer_folder,
            texts=lambda: texts_of(train()),
            content=lambda: fingerprint_of(train()),
            vocab_size=self.settings.vocab_size,
            cache_dir=self.cache_dir,
            mask_token=self.settings.mask_token,
        )

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
        """Return the name of a split's detokenizer (data/detokenizers.py); None if its texts are unchanged."""
        return self.source.detokenizer_of(split) if hasattr(self.source, "detokenizer_of") else None

    def packing(self, split: str) -> Packing:
        """Return the packing of a split."""
        return self.packings.get(split, self.packings["test"])

    def texts(self, split: str) -> datasets.Dataset:
        """Return the split's texts: columns text, text_id (number in the whole split), label and ends (data/sources.py)
        if present. Raises ValueError for an unknown split, an unknown label or an empty split."""
        return self._texts.of(split)

    def split(self, name: str) -> datasets.Dataset:
        """Return the split's packed rows (columns: data/packing.py); `figures[name]` says what packing did.

        Those of a mixture follow one another, data set by data set. Raises ValueError if texts, lengths and tokenizer
        do not fit together.
        """
        if name not in self._splits:
            packed, figures = self._packed(name, self.packing(name))
            _check_known(name, figures, self.settings.tokenizer_name_or_path)
            _report(name, figures, None if self.wrap else self.length)
            self._splits[name], self.figures[name] = one_after_the_other(packed), figures
        return self._splits[name]

    def whole_train(self) -> datasets.Dataset:
        """Return the packed train split for any `label` and `train_splits`, which latents are fitted on."""
        if self.label is None and self.train_splits is None:
            return self.split("train")
        return self._pack("train", self.packings["train"], replace(self._texts, label=None, train_splits=None))[0]

    def _packed(self, name: str, packing: Packing) -> tuple[list[datasets.Dataset], dict[str, int]]:
        """Return the packed rows of each data set that a split is a mixture of, and the counts of all."""
        packed = [self._pack(name, packing, texts) for texts in self._texts.parts(name)]
        if len(packed) == 1:
            return [packed[0][0]], packed[0][1]
        total = Figures()
        for _, figures in packed:
            total.add(Figures(**figures))
        return [rows for rows, _ in packed], asdict(total)

    def _pack(self, name: str, packing: Packing, of: SplitTexts) -> tuple[datasets.Dataset, dict[str, int]]:
        texts = of.of(name)
        if self.wrap and of.label is None and "label" in texts.column_names:
            texts = texts.remove_columns("label")  # a chunk of several texts has no label
        published = self.wrap and self.protocol is not None
        frame = published_frame(self.tokenizer, self.vocabulary) if published else self.vocabulary
        return pack(texts, self.tokenizer, frame, packing, self.cache_dir, f"{name} split")

    def _rows(self, name: str) -> datasets.Dataset | RowsWithLatents:
        rows = self.split(name)
        return rows if self.latents is None else RowsWithLatents(rows, self.latents.of(name))

    def train_dataloader(self) -> DataLoader:
        """Return this rank's micro-batches of the whole run, from the position of a loaded checkpoint on. Raises
        ValueError if batch sizes do not divide, or the trainer would continue past the stream."""
        batches = self.batches
        rank, world = self._rank()
        limit = batches.max_steps if self.trainer is None else self.trainer.max_steps
        if not 0 < limit <= batches.max_steps:
            expected = f"the data were set up for {batches.max_steps} steps"
            raise ValueError(f"trainer.max_steps={limit}, but {expected}; give both one positive number")
        sizes = batches.global_batch_size, batches.batch_size, batches.max_steps
        sampler = PositionBatchSampler(*sizes, rank, world, self._consumed(), self.plan.ramp)
        if self.endless:
            workers = batches.loading.workers(streamed=True, devices=getattr(self.trainer, "num_devices", 1))
            arguments = batches.loading.arguments(workers, again=False)
            self._streamed = StreamLoader(
                _corpus(self), sampler, self.collate, arguments, self._resumed.get("stream"), self._taken
            )
            return self._streamed
        packing = self.packings["train"]
        rows = crop = None
        if self.settings.random_crop:
            packing, crop = replace(packing, length=2 * self.length), self.length
            rows = one_after_the_other(self._packed("train", packing)[0])
        stream = TrainingStream(self._rows("train") if rows is None else rows, batches.seed, crop)
        weights = getattr(self.source, "weights", None)
        if weights:
            stream.sizes = [len(part) for part in self._packed("train", packing)[0]]
            stream.weights = list(weights.values())
        return self._loader(stream, sampler, again=False)

    @property
    def endless(self) -> bool:
        """Return True if training streams a corpus without storing it (data/streaming.py)."""
        return self.settings.streaming and self.settings.max_train_texts is None

    def val_dataloader(self) -> DataLoader:
        number, (_, devices) = len(self.split("validation")), self._rank()
        if number < devices:
            raise ValueError(
                f"{number} validation rows for {devices} devices: raise data.max_valid_texts, or lower trainer.devices"
            )
        return self.eval_dataloader("validation")

    def test_dataloader(self) -> DataLoader:
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: str, only: np.ndarray | None = None, trainer: Trainer | None = None) -> DataLoader:
        """Return every row of the split (or of `only`) once over all ranks of the trainer that reads it (None: of the
        fit).

        Padded rows come longest first, which wastes least.
        """
        rows = self.split(split)
        order = np.arange(len(rows)) if only is None else only
        if not self.wrap:
            order = order[np.argsort(-np.asarray(rows["length"][:])[order], kind="stable")]
        batches = evaluation_batches(order, self.eval_batch_size, *self._rank(trainer))
        return self._loader(Rows(self._rows(split)), batches)

    @property
    def collate(self) -> Collate:
        """Return the function that turns columns of a split's rows into a batch."""
        known = self.vocabulary
        room = self.packings["train"].room
        beginning = {"prefix": self.prefix_length, "bos_id": known.bos_id, "first_given": self.first_given}
        if self.wrap:
            special = () if self.score_special else known.special_ids
            return Collate(self.length, None, special, end_id=known.eos_id if self.document_mask else None, **beginning)
        frame = {known.bos_id} if self.fill else {known.bos_id, known.eos_id}
        frame = () if self.score_special else frame - {None}
        pad_id = known.eos_id if self.fill else known.pad_id
        return Collate(self.length, pad_id, frame, bool(self.fill), self.segments, room, **beginning)

    def segment_ends(self, prompt_tokens_B: np.ndarray) -> np.ndarray | None:
        """Return `segment_ends` of rows with prompts of these lengths, as in batches; None without segments."""
        if not self.segments:
            return None
        number = len(self.texts(self.splits[0])["ends"][0])
        return segment_ends(prompt_tokens_B, number, self.packings["train"].room)

    def _loader(self, rows: Dataset, batches: Sampler | list[list[int]], again: bool = True) -> DataLoader:
        loading = self.batches.loading
        arguments = loading.arguments(loading.workers(streamed=False, devices=1), again)
        return TimedLoader(rows, batch_sampler=batches, collate_fn=self.collate, **arguments)

    def _rank(self, trainer: Trainer | None = None) -> tuple[int, int]:
        trainer = trainer or self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the samples that finished steps have taken, the order's settings, and the stream's cursors."""
        state = {"consumed_samples": self._taken(), **self._order, "train_size": self.train_size}
        reading = self._resumed.get("stream") if self._streamed is None else self._streamed.state()
        return state if reading is None else {**state, "stream": reading}

    @cached_property
    def train_size(self) -> dict[str, int] | None:
        """The number of texts and bytes of the train split; None if it is a stream, which compares its files."""
        if self.endless:
            return None
        sizes = [size_of(part.of("train")) for part in self._texts.parts("train")]
        return {key: sum(size[key] for size in sizes) for key in ("texts", "bytes")}

    @property
    def _order(self) -> dict[str, Any]:
        """Return what the order of the training samples depends on besides the data."""
        size = self.batches.global_batch_size
        seed = self.batches.seed
        return {"global_batch_size": size, "batch_ramp": self.plan.ramp, "seed": seed}

    def _taken(self) -> int:
        """Return the number of samples that finished steps have taken from the stream."""
        steps = None if self.trainer is None else self.trainer.global_step
        return self._resumed.get("consumed_samples", 0) if steps is None else self.plan.start(steps)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = dict(state_dict)

    def _consumed(self) -> int:
        """Return the position where training continues. Raises ValueError for a checkpoint of another stream."""
        if self._resumed and self.endless != ("stream" in self._resumed):
            was, now = ("false", "true") if self.endless else ("true", "false")
            raise ValueError(
                f"data.streaming={now} (of all texts), but the run to be resumed was begun with {was}; resume it with "
                "that, or start a new run"
            )
        for key, value in self._order.items() if self._resumed else ():
            before = self._resumed.get(key, None if key == "batch_ramp" else value)
            if before != value:
                setting = key if key == "seed" else f"loader.{key}"
                raise ValueError(
                    f"{setting}={value}, but the run to be resumed was begun with {setting}={before}; resume it with "
                    "that, or start a new run"
                )
        if self._resumed:
            check_same_texts(self._resumed.get("train_size"), self.train_size)
        return int(self._resumed.get("consumed_samples", 0))


def with_texts(data: TextData, split: str, texts: Sequence[str], cut_long: bool = False) -> TextData:
    """Return `data` with an additional split of other texts, packed like the test split; nothing is stored on disk.

    Their class is unknown (label -1). With `cut_long` a text that data.long_texts=error would refuse is cut. Raises
    ValueError if the texts do not fit these settings, one has no tokens, or rows of the data are no single texts.
    """
    if isinstance(texts, str):
        raise ValueError(f"give a list of texts, not one text: [{texts!r:.40}]")
    if other := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{other[0]!r:.40} is not a text; give a list of texts")
    if data.wrap:
        raise ValueError(
            f"data={data.name} data.wrap=true cuts rows out of joined texts, which says nothing of a single one; load "
            "the model with data.wrap=false"
        )
    if data.prompted:
        raise ValueError(f"the texts of data={data.name} have prompts, and texts from elsewhere have none")
    other = copy(data)
    rows = from_table(text_table(texts, [-1] * len(texts)))
    rows = rows.add_column("text_id", np.arange(len(rows)))
    packing = replace(data.packing(split), drop_empty=True)  # so that such a text is refused below
    if cut_long and packing.long_texts == "error":
        packing = replace(packing, long_texts="truncate")
    packed, figures = pack(rows, data.tokenizer, data.vocabulary, packing, None, split)
    if left_out := set(range(len(texts))).difference(packed["text_id"]):  # by data.drop_empty or data.long_texts=drop
        number = min(left_out)
        fault = "has no tokens" if figures["empty"] else f"does not fit model.length={data.length}"
        raise ValueError(f"text {number} ({texts[number]!r:.40}) {fault}; correct it, or leave it out")
    _report(split, figures, None if data.wrap else data.length)
    other.figures, other._splits = {**data.figures, split: figures}, {**data._splits, split: packed}
    return other


def _report(name: str, figures: dict[str, int], longest: int | None) -> None:
    log.info("%s: %d texts -> %d rows, %d tokens", name, figures["texts"], figures["rows"], figures["tokens"])
    if figures["long"] and longest is not None:
        long = f"{figures['long']} of {figures['texts']} texts are longer than model.length={longest}"
        log.warning("%s: %s; tokens left out: %d", name, long, figures["cut"])
    if figures["unknown"]:
        log.warning("%s: %d of %d tokens are unknown to the tokenizer", name, figures["unknown"], _encoded(figures))


def _check_known(name: str, figures: dict[str, int], tokenizer: str) -> None:
    """Raise ValueError if nearly all tokens are unknown: a model of them says nothing about the texts."""
    if figures["unknown"] > MOST_UNKNOWN * _encoded(figures):
        raise ValueError(
            f"data.tokenizer_name_or_path={tokenizer} does not know {figures['unknown']} of {_encoded(figures)} tokens "
            f"of the {name} split; choose a tokenizer with a fitting vocabulary"
        )


def _encoded(figures: dict[str, int]) -> int:
    """Return the tokens of the texts; older cache entries only have those of the rows."""
    return figures.get("encoded", figures["tokens"])


def _corpus(data: TextData) -> Corpus:
    """Return the train split as a stream. Raises ValueError for settings that need stored texts."""
    for key, value in (("data.random_crop", data.settings.random_crop), ("classify.pretrain", data.train_splits)):
        if value:
            raise ValueError(
                f"{key}={value} needs stored texts, and data.streaming=true without a limit keeps none; set "
                "data.max_train_texts, or data.streaming=false"
            )
    if data.label is not None:
        data.texts("train")  # raises for an unknown class
    if not hasattr(data.source, "open"):
        raise ValueError("data.streaming=true: these texts are made or cut as a whole; set it to false")
    if data.prompted:
        check_prompts(data.packings["train"], "train stream")
    shards, packing = data.source.open("train"), data.packings["train"]
    order = (data.settings.stream, data.batches.global_batch_size, data.batches.seed, data.label)
    return Corpus(shards, data.tokenizer, data.vocabulary, packing, *order)
