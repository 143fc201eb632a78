"""Small data with latents, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np

from palimpsest.dataloader import Loading, TextData
from tests.helpers.texts import text_data

_WORDS = (
    "the a film plot cast song was is never truly dull clever warm cold actor scene sea river stone bread salt road"
)
WORDS = _WORDS.split()


def some_texts(number: int, seed: int, shortest: int = 4, longest: int = 14) -> list[str]:
    """Texts of random words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(shortest, longest + 1))) for _ in range(number)]


class Given:
    """A source of given texts, with labels 0 and 1 by turns."""

    label_names = ("even", "odd")

    def __init__(self, **texts: list[str]) -> None:
        self.of = {"train": some_texts(120, 0), "validation": some_texts(30, 1), **texts}
        self.splits = tuple(self.of)

    def load(self, split: str) -> datasets.Dataset:
        labels = [i % 2 for i in range(len(self.of[split]))]
        return datasets.Dataset.from_dict({"text": self.of[split], "label": labels})


def data_with(encoder: object, cache_dir: Path, source: object | None = None, **settings: object) -> TextData:
    """TextData whose rows are single texts of whole words, with the latents that `encoder` makes."""
    defaults = {"length": 24, "tokenizer_name_or_path": "word", "wrap": False, "global_batch_size": 8, "max_steps": 4,
                "eval_batch_size": 7, "long_texts": "truncate"}  # fmt: skip
    return text_data(
        source or Given(), latents=encoder, cache_dir=cache_dir, loading=Loading(num_workers=0), **(defaults | settings)
    )


class Unit:
    """An encoder of random directions, a function of the text, norm 1: what sentence encoders give. `broken`: texts
    whose vector comes out as zeros, `refused`: texts that it will not read."""

    fits, informed, dim, tokens = False, False, None, 1

    def __init__(self, width: int = 32, broken: tuple[str, ...] = (), refused: tuple[str, ...] = ()) -> None:
        self.width, self.broken, self.refused, self.calls = width, broken, refused, 0
        self.identity, self.metadata = {"encoder": "unit", "width": width}, {"encoder": "unit", "pooling": "none"}

    def check(self, vocabulary: object, length: int) -> None: ...

    def fit(self, train: object) -> None: ...

    def arrays(self) -> dict[str, np.ndarray]:
        return {}

    def load(self, arrays: object) -> None: ...

    def encode(self, passages: object) -> np.ndarray:
        self.calls += 1
        if set(passages.texts) & set(self.refused):
            raise ValueError("it will not read this")
        vectors = [np.random.default_rng(list(text.encode())).normal(size=self.width) + 0.3 for text in passages.texts]
        unit = np.stack([v / np.linalg.norm(v) for v in vectors]).astype(np.float32)
        unit[[text in self.broken for text in passages.texts]] = 0
        return unit


def write_folder(
    folder: Path,
    vectors: dict[str, np.ndarray],
    texts: dict[str, list[str]],
    documents: dict[str, list[str]] | None = None,
    **metadata: object,
) -> Path:
    """A folder as latents=file reads it, one shard a split, as someone else might write it."""
    (folder / "latent_shards").mkdir(parents=True)
    for number, (split, vectors_N) in enumerate(vectors.items()):
        np.save(folder / "latent_shards" / f"shard_{number:04d}.npy", vectors_N)
        lines = [{"text": text, "shard": number, "idx": idx} for idx, text in enumerate(texts[split])]
        for line, document in zip(lines, (documents or {}).get(split, []), strict=False):
            line["document"] = document
        (folder / f"{split}_data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = {"latent_dim": next(iter(vectors.values())).shape[-1], **metadata}
    (folder / "metadata.json").write_text(json.dumps(said))
    return folder
