"""Latents of texts: a standardised vector of the content of every packed row of every split.

Vectors come from an encoder (latents/lsa.py, hf.py, attributes.py, hidden_states.py) or a folder (latents/shards.py).
Everything that is fitted (encoder, principal components, mean and scale) is fitted on the train split with all of its
classes, up to data.max_train_texts, so that the models of all classes share one space. Vectors are computed once and
kept in the cache as a float32 memory map, by the content of the rows; batches are standardised when they are read.

Shape suffixes: N rows, B rows at once, W numbers of a vector, K latent tokens, D numbers of each.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from palimpsest.data.cache import cached_folder, fingerprint
from palimpsest.data.packing import Packing
from palimpsest.data.passages import PackedTexts, Passages, special_ids, without_padding
from palimpsest.data.sources import Source
from palimpsest.data.tokenizers import Vocabulary
from palimpsest.latents.encoder import Encoder
from palimpsest.latents.shards import Shards
from palimpsest.latents.space import Mapped, Space, Store, faults, fit_space

log = logging.getLogger(__name__)

_CODE_VERSION = 1  # increase it whenever a change below gives other latents


class Splits(Protocol):
    """The part of the data (dataloader.TextData) that latents need."""

    length: int
    source: Source
    train_splits: Sequence[str] | None
    cache_dir: str | Path
    tokenizer: PreTrainedTokenizerBase
    vocabulary: Vocabulary

    def split(self, name: str) -> datasets.Dataset: ...
    def whole_train(self) -> datasets.Dataset: ...
    def texts(self, split: str) -> datasets.Dataset: ...
    def packing(self, split: str) -> Packing: ...


class TextLatents:
    """The latents of some data, read or computed at the first use.

    Attributes:
        shape: (K, D).
        mean, std: (K, D) float64, of the train split.
        space: the map from vectors to latents.
    """

    def __init__(self, encoder: Encoder | Shards, data: Splits) -> None:
        self._encoder, self._data = encoder, data
        self._of: dict[str, Latents] = {}

    @cached_property
    def encoder(self) -> Encoder | Shards:
        """Return the encoder, not yet fitted (see `space`). Raises ValueError if it does not fit the data."""
        self._encoder.check(self._data.vocabulary, self._data.length)
        return self._encoder

    @cached_property
    def _train(self) -> PackedTexts:
        return self._packed("train", self._data.whole_train())

    def packed(self, split: str) -> PackedTexts:
        """Return the rows of a split as input of encoders."""
        return self._packed(split, self._data.split(split))

    def _packed(self, split: str, rows: datasets.Dataset) -> PackedTexts:
        sources, data = None, self._data
        if self.encoder.informed and data.train_splits is None and not data.packing(split).wrap:
            texts, whole = data.source.load(split)["text"][:], self._whole(split, rows[:])
            ids = map(int, rows["text_id"][:])
            sources = [texts[i] if is_whole else None for i, is_whole in zip(ids, whole, strict=True)]
        return PackedTexts(rows, data.tokenizer, data.vocabulary, sources)

    def _whole(self, split: str, columns: Mapping[str, Any]) -> list[bool]:
        """Return which of these rows contain all of their text."""
        packing, eos_id = self._data.packing(split), self._data.vocabulary.eos_id
        return [number < 2**32 and (len(ids) < packing.length or (packing.eos and ids[-1] == eos_id))
                for number, ids in zip(columns["sample_id"], columns["input_ids"], strict=True)]  # fmt: skip

    @cached_property
    def settings(self) -> dict[str, object]:
        """Return everything that the space depends on: the encoder and its training data, but no computed numbers,
        whose last digits differ between machines."""
        encoder = self.encoder
        kept = {"code": _CODE_VERSION, "dim": encoder.dim, "tokens": encoder.tokens, "encoder": encoder.identity}
        if isinstance(encoder, Shards):
            return kept
        known = self._train.known_fingerprint if encoder.informed else None
        return {**kept, "train": self._train.fingerprint, "known": known,
                "tokenizer": self._data.vocabulary.fingerprint}  # fmt: skip

    def fit_encoder(self) -> None:
        """Fit the encoder alone on train, or load it from the cache, for users of its vectors."""
        if isinstance(self.encoder, Shards):
            return

        def build(folder: Path) -> None:
            self.encoder.fit(self._train)
            np.savez(folder / "encoder.npz", **self.encoder.arrays())

        folder, _ = cached_folder(self._data.cache_dir, "latent-encoder", self.settings, build)
        with np.load(folder / "encoder.npz") as arrays:
            self.encoder.load(dict(arrays))

    @cached_property
    def space(self) -> Space:
        """Return the map from vectors to latents. Raises ValueError if the vectors of train do not define a space
        (latents/space.py)."""
        encoder, files = self.encoder, {}
        if isinstance(encoder, Shards):
            files = {"path": str(encoder.path.resolve()), "files": encoder.signature}

        def build(folder: Path) -> None:
            if isinstance(encoder, Shards):
                train = encoder.train(self._data.cache_dir)
            else:
                encoder.fit(self._train)
                train = self._encoded(self._train, "train split")
            space = fit_space(train, encoder.dim, encoder.tokens, f"the vectors of {len(train)} texts of train")
            arrays = {} if isinstance(encoder, Shards) else encoder.arrays()
            np.savez(folder / "space.npz", **arrays, **space.arrays())

        folder, _ = cached_folder(self._data.cache_dir, "latent-space", {**self.settings, **files}, build)
        with np.load(folder / "space.npz") as file:
            arrays = dict(file)
        if not isinstance(encoder, Shards):
            encoder.load(arrays)
        return Space.from_arrays(arrays)

    @property
    def shape(self) -> tuple[int, int]:
        return self.space.shape

    @property
    def mean(self) -> np.ndarray:
        return self.space.mean_KD

    @property
    def std(self) -> np.ndarray:
        return self.space.std_KD

    @property
    def metadata(self) -> Mapping[str, object]:
        """Return the encoder, its pooling and its settings."""
        return self.encoder.metadata

    @cached_property
    def fingerprint(self) -> str:
        """Return a hex digest; equal digests mean the same latents for the same rows."""
        numbers = [self.encoder.content(self._data.cache_dir)] if isinstance(self.encoder, Shards) else []
        return fingerprint({**self.settings, "numbers": numbers})

    @property
    def facts(self) -> dict[str, object]:
        """Return the description of the latents for a checkpoint, in plain values."""
        return {"fingerprint": self.fingerprint, "shape": list(self.shape), "mean": self.mean.tolist(),
                "std": self.std.tolist(), **self.metadata}  # fmt: skip

    def restore(self, latent: Any) -> Any:
        """Return latents (..., K, D), array or tensor, in the numbers of the encoder, or in its principal
        components."""
        return self.space.restore(latent)

    def vectors(self, latent_NKD: np.ndarray) -> np.ndarray:
        """Return the encoder's vectors (N, W), float32, of latents (N, K, D), for cosines in its own space."""
        return self.space.vectors(latent_NKD)

    def encode(self, rows: Sequence[Sequence[int]], labels: Sequence[int] | None = None) -> np.ndarray:
        """Return latents (N, K, D), float32, of any token ids, such as sampled ones; padding at the end is ignored.
        Raises ValueError if a row has no latent, or the encoder of a folder is not known."""
        space, vocabulary = self.space, self._data.vocabulary
        ids = [without_padding(row, vocabulary) for row in rows]
        labels = None if labels is None else np.asarray(labels)
        passages = Passages(ids, labels, self._data.tokenizer, special_ids(vocabulary))
        vectors_NW = self.encoder.encode(passages)
        if wrong := faults(vectors_NW):
            row, why = next(iter(wrong.items()))
            raise ValueError(f"text {row} ({passages.texts[row]!r:.80}): {why}")
        return space.standardise(vectors_NW)

    def of(self, split: str) -> Latents:
        """Return the latents of a split, indexed by row number. Raises ValueError if a row has none."""
        if split not in self._of:
            space, rows = self.space, self.packed(split)
            if isinstance(self.encoder, Shards):
                store = self.encoder.store(split, rows, partial(self._texts_of_whole, split), self._data.cache_dir)
            else:
                store = self._encoded(rows, f"{split} split")
            self._of[split] = Latents(store, space)
        return self._of[split]

    def _texts_of_whole(self, split: str, some: np.ndarray) -> dict[int, str]:
        """Return the source texts of those of these rows that contain all of a text: row -> text."""
        if self._data.packing(split).wrap:
            return {}
        columns, texts = self._data.split(split)[some], self._data.texts(split)
        place = {int(text_id): number for number, text_id in enumerate(texts["text_id"][:])}
        column, whole = texts.select_columns("text"), self._whole(split, columns)
        return {int(row): column[place[int(text_id)]]["text"] for row, text_id, is_whole in
                zip(some, columns["text_id"], whole, strict=True) if is_whole}  # fmt: skip

    def _encoded(self, rows: PackedTexts, name: str) -> Mapped:
        """Return the vectors of rows, from the cache or computed. Raises ValueError if one fails."""
        settings = {"code": _CODE_VERSION, "encoder": self.encoder.identity, "rows": rows.fingerprint,
                    "train": self._train.fingerprint if self.encoder.fits else None,
                    "known": rows.known_fingerprint if self.encoder.informed else None,
                    "tokenizer": self._data.vocabulary.fingerprint}  # fmt: skip

        def build(folder: Path) -> None:
            log.info("%s: latents of %d rows", name, len(rows))
            out = None
            for first, passages in rows.chunks():
                vectors_BW = self.encoder.encode(passages)
                if wrong := faults(vectors_BW):
                    row, why = next(iter(wrong.items()))
                    raise ValueError(
                        f"{name}, row {first + row} ({passages.texts[row]!r:.80}): {why}; leave that text "
                        "out, or choose another latents="
                    )
                if out is None:
                    shape = (len(rows), vectors_BW.shape[1])
                    out = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float32, shape)
                out[first : first + len(vectors_BW)] = vectors_BW
            out.flush()

        folder, _ = cached_folder(self._data.cache_dir, "latents", settings, build)
        return Mapped(folder / "latents.npy")


class Latents:
    """Row numbers -> latents (B, K, D) float32, standardised."""

    def __init__(self, store: Store, space: Space) -> None:
        self.store, self.space = store, space

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.space.standardise(self.store[np.asarray(rows)])


class RowsWithLatents:
    """Packed rows with an additional column `latent`, (B, K, D)."""

    def __init__(self, rows: datasets.Dataset, latents: Latents) -> None:
        self.rows, self.latents = rows, latents

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
        return {**self.rows[indices], "latent": self.latents[indices]}
