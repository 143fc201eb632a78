"""latents=file: vectors that lie beside their texts, as scripts/prepare_latents.py writes them or anyone else.

    FOLDER/metadata.json                  latent_dim, counts, encoder, sha256 of files ... (only latent_dim is needed)
    FOLDER/<split>_data.jsonl             a line a text: text, shard, idx; document where a text is part of one
    FOLDER/latent_shards/shard_0000.npy   float32 (n, W), or (n, K, D) for K latent tokens

A row of the data has the vector of the line of its split with the same text.

Shape suffixes: N rows, W numbers of a vector, K latent tokens, D numbers of each.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from palimpsest.common.values import AtLeastOne, FilePath, Share
from palimpsest.data.cache import cached_folder, file_digest
from palimpsest.data.passages import PackedTexts, Passages
from palimpsest.data.tokenizers import Vocabulary
from palimpsest.latents.space import Sharded, chunks, faults, moments

KEY = "latents.path"
SHARDS, METADATA, FITTED = "latent_shards", "metadata.json", "encoder.npz"
SPLITS = ("train", "validation", "test")
_CODE_VERSION = 1  # raise it whenever a change below gives another index


def _number(path: Path) -> int:
    """Of a shard; -1 where its name has none."""
    number = path.stem.removeprefix("shard_")
    return int(number) if number.isdecimal() else -1


def _opened(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{KEY}={path.parents[1]}: {path.name} is damaged ({error}); make the folder again") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays that np.savez wrote, by name. Raises ValueError for others, which might grow when they are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        if any(info.compress_type for info in infos) or sum(info.file_size for info in infos) > path.stat().st_size:
            raise ValueError("it is compressed, and np.savez does not compress")
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays}
    except (ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{KEY}={path.parent}: {path.name} is damaged ({error}); make the folder again") from error


@dataclass(frozen=True)
class Listing:
    """The lines of a split. text, document: (N,) uint64 digests, document 0 where a line names none; shard, place: (N,)
    int64."""

    text: np.ndarray
    document: np.ndarray
    shard: np.ndarray
    place: np.ndarray


class Shards:
    """A folder of vectors and the texts they are of.

    path: the folder. dim: principal components that are kept, fitted on train; None: all numbers. max_overlap: largest
    share of the texts of a held-out split that may stand in train too; a held-out split that is (mostly) train measures
    nothing, and real ones share some short texts.
    """

    informed = False

    def __init__(self, path: FilePath | None, dim: AtLeastOne | None = None, max_overlap: Share = 0.01) -> None:
        if not path:
            raise ValueError(f"latents=file needs {KEY}=: a folder that scripts/prepare_latents.py has written")
        self.path = Path(path).expanduser()
        self.dim = dim
        self.max_overlap = max_overlap
        if not (self.path / METADATA).is_file():
            raise FileNotFoundError(f"{KEY}={path}: there is no {METADATA} in it; scripts/prepare_latents.py writes it "
                                    "last, so let that finish")  # fmt: skip

    @cached_property
    def said(self) -> dict[str, Any]:
        """What metadata.json says."""
        try:
            said = json.loads((self.path / METADATA).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{KEY}={self.path}: {METADATA} is damaged ({error}); make the folder again") from error
        if not isinstance(said, dict):
            raise ValueError(f"{KEY}={self.path}: {METADATA} holds no object; make the folder again")
        return said

    @property
    def metadata(self) -> dict[str, object]:
        """For reports: the encoder, as the folder names it."""
        return {key: self.said.get(key) for key in ("encoder", "pooling", "settings") if key in self.said}

    @cached_property
    def paths(self) -> list[Path]:
        """The shards, by number."""
        found = sorted((self.path / SHARDS).glob("shard_*.npy"), key=lambda path: (_number(path), path.name))
        number = self.said.get("num_shards", len(found))
        if len(found) != number or not found:
            raise ValueError(f"{KEY}={self.path}: {len(found)} shards, and {METADATA} counts {number}; make them again")
        if [_number(path) for path in found] != list(range(len(found))):
            raise ValueError(f"{KEY}={self.path}: shards are shard_0000.npy, shard_0001.npy and so on, without a gap; "
                             f"{next(p.name for n, p in enumerate(found) if _number(p) != n)} is not")  # fmt: skip
        return found

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(K, D) of a vector. Raises ValueError where shards differ or are not float32."""
        kinds = {(vectors.dtype.name, *vectors.shape[1:]) for vectors in
                 (_opened(path) for path in self.paths)}  # fmt: skip
        if len(kinds) > 1 or next(iter(kinds))[0] != "float32" or len(next(iter(kinds))) not in (2, 3):
            raise ValueError(
                f"{KEY}={self.path}: shards must be float32 arrays (n, D) or (n, K, D), all alike; these are "
                f"{', '.join(map(str, sorted(kinds)))}"
            )
        shape = next(iter(kinds))[1:]
        shape = shape if len(shape) == 2 else (1, *shape)
        said = self.said.get("latent_dim", shape[1])
        if said != shape[1]:
            raise ValueError(
                f"{KEY}={self.path}: {METADATA} says latent_dim={said}, the shards hold {shape[1]} numbers; correct it"
            )
        return shape

    @property
    def width(self) -> int:
        """Numbers of a vector, K * D."""
        return self.shape[0] * self.shape[1]

    @property
    def tokens(self) -> int:
        """K; 1 for principal components."""
        return self.shape[0] if self.dim is None else 1

    @cached_property
    def signature(self) -> list[list[object]]:
        """What shows that a file has changed."""
        files = [self.path / METADATA, *self.path.glob(FITTED), *sorted(self.path.glob("*_data.jsonl")), *self.paths]
        return [[str(file.relative_to(self.path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    @property
    def _settings(self) -> dict[str, object]:
        return {"code": _CODE_VERSION, "path": str(self.path.resolve()), "files": self.signature}

    def _check_files(self, cache_dir: str | Path) -> None:
        """Raises ValueError where a file is not the one that metadata.json has the digest of; looked at once."""

        def build(_: Path) -> None:
            if wrong := changed_files(self.path, self.said):
                raise ValueError(f"{KEY}={self.path}: {wrong[0]} is not the file that {METADATA} was written for; make "
                                 "the folder again, or leave sha256 and identity out of it where that was "
                                 "meant")  # fmt: skip

        cached_folder(cache_dir, "latent-files", self._settings, build)

    def content(self, cache_dir: str | Path) -> str:
        """Hex digest of what the vectors of train are. Where metadata.json says what made them, it is that: made again
        elsewhere they differ in their last digits. Otherwise it is that of the texts and vectors themselves."""
        if "identity" in self.said:
            return str(self.said["identity"])

        def build(_: Path) -> dict[str, str]:
            found = self.listing("train", cache_dir)
            digest = hashlib.sha256(found.text.tobytes())
            for vectors_NW in chunks(Sharded(self.paths, self.width, found.shard, found.place)):
                digest.update(vectors_NW.tobytes())
            return {"content": digest.hexdigest()}

        return cached_folder(cache_dir, "latent-content", self._settings, build)[1]["content"]

    def listing(self, split: str, cache_dir: str | Path) -> Listing:
        """The lines of a split, read once and kept in the cache.

        Raises:
            FileNotFoundError: there are none for this split.
            ValueError: a file has changed; a line is none, names a vector that is not there or is no vector; a
                held-out split is (mostly) train, or has parts of a document of train.
        """
        file = self.path / f"{split}_data.jsonl"
        if not file.is_file():
            raise FileNotFoundError(f"{KEY}={self.path} has no {file.name}, so that the {split} split has no latents; "
                                    f"scripts/prepare_latents.py --splits {split} writes it")  # fmt: skip
        self._check_files(cache_dir)
        settings = {**self._settings, "split": split, "max_overlap": self.max_overlap}

        def build(folder: Path) -> None:
            found = _listing(file, [len(_opened(path)) for path in self.paths])
            _check_vectors(file, Sharded(self.paths, self.width, found.shard, found.place))
            if split != "train" and (self.path / "train_data.jsonl").is_file():
                self._check_apart(split, found, self.listing("train", cache_dir))
            np.savez(folder / "listing.npz", **found.__dict__)

        folder, _ = cached_folder(cache_dir, "latent-listing", settings, build)
        with np.load(folder / "listing.npz") as arrays:
            return Listing(**{name: arrays[name] for name in arrays})

    def _check_apart(self, split: str, found: Listing, train: Listing) -> None:
        share = float(np.isin(found.text, train.text).mean())
        if share > self.max_overlap:
            raise ValueError(
                f"{KEY}={self.path}: {share:.1%} of the texts of the {split} split stand in train too, so that it "
                "would measure what was learned by heart; split the texts anew, or raise "
                f"latents.max_overlap={self.max_overlap}"
            )
        shared = np.intersect1d(found.document[found.document > 0], train.document[train.document > 0])
        if len(shared):
            raise ValueError(
                f"{KEY}={self.path}: {len(shared)} documents have parts in train and in the {split} split; split by "
                "document first, then cut"
            )

    def train(self, cache_dir: str | Path) -> Sharded:
        """The vectors of train, whichever of them are trained on, for mean and scale.

        Raises:
            ValueError: metadata.json says another mean or scale.
        """
        found = self.listing("train", cache_dir)
        store = Sharded(self.paths, self.width, found.shard, found.place)
        if "mean" in self.said and "std" in self.said:
            mean_W, std_W = moments(store)
            theirs = [np.asarray(self.said[key], dtype=np.float64).ravel() for key in ("mean", "std")]
            if not (np.abs(theirs[0] - mean_W) <= 0.01 * std_W).all() or not np.allclose(theirs[1], std_W, rtol=0.01):
                raise ValueError(
                    f"{KEY}={self.path}: mean and std in {METADATA} are not those of the vectors of train; make the "
                    "folder again, or leave the two out of it"
                )
        return store

    def store(
        self, split: str, rows: PackedTexts, whole: Callable[[np.ndarray], Mapping[int, str]], cache_dir: str | Path
    ) -> Sharded:
        """The vectors of packed rows. `whole` gives the source texts of those rows, of some, that were not cut: a
        tokenizer may spell a text otherwise.

        Raises:
            ValueError: a row has none.
        """
        settings = {**self._settings, "split": split, "rows": rows.fingerprint, "max_overlap": self.max_overlap}

        def build(folder: Path) -> None:
            found = self.listing(split, cache_dir)
            order = np.argsort(found.text, kind="stable")
            line_N = _lines(found.text, order, [digest for _, part in rows.chunks() for digest in digests(part.texts)])
            missing = np.flatnonzero(line_N < 0)
            if len(missing):
                texts = whole(missing)
                rest = np.array(sorted(texts), dtype=np.int64)
                line_N[rest] = _lines(found.text, order, digests([texts[i] for i in rest]))
            missing = np.flatnonzero(line_N < 0)
            if len(missing):
                raise ValueError(
                    f"{KEY}={self.path}: {len(missing)} of {len(rows)} rows of the {split} split have no latent there, "
                    f"such as {rows[missing[:1]].texts[0]!r:.80}; make them with the data, tokenizer and model.length "
                    f"of this command, or train on the prepared texts themselves (data=text data.path="
                    f"{self.path}/train_data.jsonl data.wrap=false ...)"
                )
            np.savez(folder / "places.npz", shard=found.shard[line_N], place=found.place[line_N])

        folder, _ = cached_folder(cache_dir, "latent-places", settings, build)
        with np.load(folder / "places.npz") as arrays:
            return Sharded(self.paths, self.width, arrays["shard"], arrays["place"])

    @property
    def identity(self) -> dict[str, object]:
        """What its vectors hang on, as far as the folder says; `content` comes on top of it."""
        return {"encoder": "file", "code": _CODE_VERSION, **self.metadata, "shape": list(self.shape)}

    def check(self, vocabulary: Vocabulary, length: int) -> None:
        """Any vocabulary that spells the texts will do."""
        self._vocabulary, self._length = vocabulary, length

    @cached_property
    def encoder(self) -> object:
        """What made the vectors, to make those of further texts.

        Raises:
            ValueError: it is not known here.
        """
        from palimpsest.latents.attributes import Attributes
        from palimpsest.latents.hf import Pretrained
        from palimpsest.latents.lsa import LSA

        kinds = {"lsa": LSA, "hf": Pretrained, "synthetic": Attributes}
        name, settings = self.said.get("encoder"), self.said.get("settings")
        if name not in kinds or not isinstance(settings, dict):
            raise ValueError(f"{KEY}={self.path} was made by {name}, which can not be run again from there, so that "
                             "further texts have no latents; use latents=lsa, hf or self for that")  # fmt: skip
        encoder = kinds[name](**settings)
        encoder.check(self._vocabulary, self._length)
        if (self.path / FITTED).is_file():
            encoder.load(_arrays(self.path / FITTED))
        return encoder

    def encode(self, passages: Passages) -> np.ndarray:
        """(N, W) float32, by the encoder that made the folder, where that is known."""
        return self.encoder.encode(passages)


def changed_files(folder: Path, said: Mapping[str, Any]) -> list[str]:
    """Those of the files which metadata.json (`said`) has the digest of that are gone or have another."""
    return [name for name, digest in said.get("sha256", {}).items()
            if not (folder / name).is_file() or file_digest(folder / name) != digest]  # fmt: skip


def digests(texts: Sequence[str]) -> list[int]:
    """A 64-bit name of each text. Two of ten million texts share one with a probability of 3 in a million."""
    raw = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return [int.from_bytes(digest, "little") for digest in raw]


def _lines(text_N: np.ndarray, order: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """The first line with each of these texts, -1 where there is none."""
    wanted = np.asarray(wanted, dtype=np.uint64)
    place = np.searchsorted(text_N, wanted, sorter=order).clip(max=len(order) - 1)
    line = order[place]
    return np.where(text_N[line] == wanted, line, -1)


def _check_vectors(file: Path, vectors: Sharded) -> None:
    """Those of the lines of `file`, in their order."""
    line = 1
    for vectors_NW in chunks(vectors):
        if wrong := faults(vectors_NW):
            row, why = next(iter(wrong.items()))
            raise ValueError(f"{file}, line {line + row}: {why}; make the latent of that text again, or leave the line "
                             "out")  # fmt: skip
        line += len(vectors_NW)


def _listing(file: Path, sizes: Sequence[int]) -> Listing:
    columns: dict[str, list[int]] = {"text": [], "document": [], "shard": [], "place": []}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                text, shard, place = entry["text"], entry["shard"], entry["idx"]
                found = isinstance(text, str) and 0 <= shard < len(sizes) and 0 <= place < sizes[shard]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number} has no text, shard and idx ({error!r})") from error
            if not found:
                raise ValueError(f"{file}, line {number}: there is no row {place} of shard {shard}; make it again")
            document = entry.get("document")
            columns["text"] += digests([text])
            columns["document"] += [0] if document is None else digests([str(document)])
            columns["shard"].append(shard)
            columns["place"].append(place)
    if not columns["text"]:
        raise ValueError(f"{file} has no line; make it again")
    kinds = {"text": np.uint64, "document": np.uint64, "shard": np.int64, "place": np.int64}
    return Listing(**{name: np.array(columns[name], dtype=kind) for name, kind in kinds.items()})
