"""latents=file: vectors stored with their texts, as scripts/prepare_latents.py or any other program writes them.

    FOLDER/metadata.json                  latent_dim, counts, encoder, sha256 of files ... (only latent_dim is needed)
    FOLDER/<split>_data.jsonl             a line per text: text, shard, idx; document if the text is part of one
    FOLDER/latent_shards/shard_0000.npy   float32 (n, W), or (n, K, D) for K latent tokens

A row of the data gets the vector of the line in its split with the same text.

Shape suffixes: N rows, W numbers of a vector, K latent tokens, D numbers of each.
"""

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
_CODE_VERSION = 1  # increase it whenever a change below gives another index


def _number(path: Path) -> int:
    """Return the number of a shard; -1 if its name has none."""
    number = path.stem.removeprefix("shard_")
    return int(number) if number.isdecimal() else -1


def _opened(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{KEY}={path.parents[1]}: {path.name} is damaged ({error}); make the folder again") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an uncompressed np.savez file. Raises ValueError for a compressed one, which might grow when
    read."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
        if any(info.compress_type for info in infos) or sum(info.file_size for info in infos) > path.stat().st_size:
            raise ValueError("it is compressed, and np.savez does not compress")
        with np.load(path) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{KEY}={path.parent}: {path.name} is damaged ({error}); make the folder again") from error


@dataclass(frozen=True)
class Listing:
    """The lines of a split."""

    text: np.ndarray  # (N,) uint64 digests
    document: np.ndarray  # (N,) uint64 digests, 0 if a line has none
    shard: np.ndarray  # (N,) int64
    place: np.ndarray  # (N,) int64, row of the shard


class Shards:
    """A folder of vectors and their texts.

    Args:
        path: the folder.
        dim: principal components that are kept, fitted on train; None: all numbers.
        max_overlap: largest share of the texts of a held-out split that may also be in train. Real splits share some
            short texts; a split that is mostly train measures nothing.
    """

    informed = False

    def __init__(self, path: FilePath | None, dim: AtLeastOne | None = None, max_overlap: Share = 0.01) -> None:
        if not path:
            raise ValueError(f"latents=file needs {KEY}=: a folder that scripts/prepare_latents.py has written")
        self.path, self.dim = Path(path).expanduser(), dim
        self.max_overlap = max_overlap
        if not (self.path / METADATA).is_file():
            raise FileNotFoundError(
                f"{KEY}={path}: there is no {METADATA} in it; scripts/prepare_latents.py writes it "
                "last, so let that finish"
            )

    @cached_property
    def description(self) -> dict[str, Any]:
        """Return the content of metadata.json."""
        try:
            content = json.loads((self.path / METADATA).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{KEY}={self.path}: {METADATA} is damaged ({error}); make the folder again") from error
        if not isinstance(content, dict):
            raise ValueError(f"{KEY}={self.path}: {METADATA} is not an object; make the folder again")
        return content

    @property
    def metadata(self) -> dict[str, object]:
        """Return the encoder as the folder names it, for reports."""
        return {key: self.description.get(key) for key in ("encoder", "pooling", "settings") if key in self.description}

    @cached_property
    def paths(self) -> list[Path]:
        """Return the shards, by number."""
        found = sorted((self.path / SHARDS).glob("shard_*.npy"), key=lambda path: (_number(path), path.name))
        number = self.description.get("num_shards", len(found))
        if len(found) != number or not found:
            raise ValueError(f"{KEY}={self.path}: {len(found)} shards, and {METADATA} counts {number}; make them again")
        if [_number(path) for path in found] != list(range(len(found))):
            raise ValueError(
                f"{KEY}={self.path}: shards are shard_0000.npy, shard_0001.npy and so on, without a gap; "
                f"{next(p.name for n, p in enumerate(found) if _number(p) != n)} is not"
            )
        return found

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Return (K, D) of a vector. Raises ValueError if shards differ or are not float32."""
        kinds = {(vectors.dtype.name, *vectors.shape[1:]) for vectors in map(_opened, self.paths)}
        dtype, *shape = next(iter(kinds))
        if len(kinds) > 1 or dtype != "float32" or len(shape) not in (1, 2):
            raise ValueError(
                f"{KEY}={self.path}: shards must be float32 arrays (n, D) or (n, K, D), all alike; these are "
                f"{', '.join(map(str, sorted(kinds)))}"
            )
        tokens, numbers = (1, *shape)[-2:]
        claimed = self.description.get("latent_dim", numbers)
        if claimed != numbers:
            raise ValueError(
                f"{KEY}={self.path}: {METADATA} says latent_dim={claimed}, the shards have {numbers}; correct it"
            )
        return tokens, numbers

    @property
    def width(self) -> int:
        """Return the numbers of a vector, K * D."""
        return self.shape[0] * self.shape[1]

    @property
    def tokens(self) -> int:
        """Return K; 1 for principal components."""
        return self.shape[0] if self.dim is None else 1

    @cached_property
    def signature(self) -> list[list[object]]:
        """Return name, size and time of all files, which show changes."""
        files = [self.path / METADATA, *self.path.glob(FITTED), *sorted(self.path.glob("*_data.jsonl")), *self.paths]
        return [[str(file.relative_to(self.path)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    @property
    def _settings(self) -> dict[str, object]:
        return {"code": _CODE_VERSION, "path": str(self.path.resolve()), "files": self.signature}

    def _check_files(self, cache_dir: str | Path) -> None:
        """Raise ValueError if a file does not have its digest in metadata.json; checked once."""

        def build(_: Path) -> None:
            if wrong := changed_files(self.path, self.description):
                raise ValueError(
                    f"{KEY}={self.path}: {wrong[0]} is not the file that {METADATA} was written for; make the folder "
                    "again, or leave sha256 and identity out of it where that was meant"
                )

        cached_folder(cache_dir, "latent-files", self._settings, build)

    def content(self, cache_dir: str | Path) -> str:
        """Return a hex digest of the vectors of train. If metadata.json has an identity, that is used, because vectors
        computed again elsewhere differ in their last digits; else it is that of the texts and vectors."""
        if "identity" in self.description:
            return str(self.description["identity"])

        def build(_: Path) -> dict[str, str]:
            found = self.listing("train", cache_dir)
            digest = hashlib.sha256(found.text.tobytes())
            for vectors_NW in chunks(self._vectors(found)):
                digest.update(vectors_NW.tobytes())
            return {"content": digest.hexdigest()}

        return cached_folder(cache_dir, "latent-content", self._settings, build)[1]["content"]

    def listing(self, split: str, cache_dir: str | Path) -> Listing:
        """Return the lines of a split, read once and kept in the cache.

        Raises:
            FileNotFoundError: the split has no lines.
            ValueError: a file has changed; a line is malformed or has no valid vector; a held-out split overlaps with
                train or shares documents with it.
        """
        file = self.path / f"{split}_data.jsonl"
        if not file.is_file():
            raise FileNotFoundError(
                f"{KEY}={self.path} has no {file.name}, so that the {split} split has no latents; "
                "scripts/prepare_latents.py with another --out and without --splits writes a folder with all splits"
            )
        self._check_files(cache_dir)
        settings = {**self._settings, "split": split, "max_overlap": self.max_overlap}

        def build(folder: Path) -> None:
            found = _listing(file, [len(_opened(path)) for path in self.paths])
            _check_vectors(file, self._vectors(found))
            if split != "train" and (self.path / "train_data.jsonl").is_file():
                self._check_apart(split, found, self.listing("train", cache_dir))
            np.savez(folder / "listing.npz", **found.__dict__)

        folder, _ = cached_folder(cache_dir, "latent-listing", settings, build)
        with np.load(folder / "listing.npz") as arrays:
            return Listing(**arrays)

    def _vectors(self, lines: Listing) -> Sharded:
        return Sharded(self.paths, self.width, lines.shard, lines.place)

    def _check_apart(self, split: str, found: Listing, train: Listing) -> None:
        share = float(np.isin(found.text, train.text).mean())
        if share > self.max_overlap:
            raise ValueError(
                f"{KEY}={self.path}: {share:.1%} of the texts of the {split} split are in train too, so that it would "
                f"measure memorisation; split the texts anew, or raise latents.max_overlap={self.max_overlap}"
            )
        shared = np.intersect1d(found.document[found.document > 0], train.document[train.document > 0])
        if len(shared):
            raise ValueError(
                f"{KEY}={self.path}: {len(shared)} documents have parts in train and in the {split} split; split by "
                "document first, then cut"
            )

    def train(self, cache_dir: str | Path) -> Sharded:
        """Return all vectors of train, also those not trained on, for mean and scale. Raises ValueError if
        metadata.json has another mean or scale."""
        store = self._vectors(self.listing("train", cache_dir))
        if "mean" in self.description and "std" in self.description:
            mean_W, std_W = moments(store)
            theirs = [np.asarray(self.description[key], dtype=np.float64).ravel() for key in ("mean", "std")]
            if not (np.abs(theirs[0] - mean_W) <= 0.01 * std_W).all() or not np.allclose(theirs[1], std_W, rtol=0.01):
                raise ValueError(
                    f"{KEY}={self.path}: mean and std in {METADATA} are not those of the vectors of train; make the "
                    "folder again, or leave the two out of it"
                )
        return store

    def store(
        self, split: str, rows: PackedTexts, whole: Callable[[np.ndarray], Mapping[int, str]], cache_dir: str | Path
    ) -> Sharded:
        """Return the vectors of packed rows.

        Args:
            whole: rows -> the source texts of those that are whole texts, since a tokenizer may decode a text
                differently.

        Raises:
            ValueError: a row has no vector.
        """
        settings = {**self._settings, "split": split, "rows": rows.fingerprint, "max_overlap": self.max_overlap}

        def build(folder: Path) -> None:
            found = self.listing(split, cache_dir)
            order = np.argsort(found.text, kind="stable")
            line_N = _lines(found.text, order, [digest for _, part in rows.chunks() for digest in digests(part.texts)])
            missing = np.flatnonzero(line_N < 0)
            if len(missing):
                texts = whole(missing)
                known = np.array(sorted(texts), dtype=np.int64)
                line_N[known] = _lines(found.text, order, digests([texts[i] for i in known]))
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
        """Return everything known in the folder that the vectors depend on; `content` is added to it."""
        return {"encoder": "file", "code": _CODE_VERSION, **self.metadata, "shape": list(self.shape)}

    def check(self, vocabulary: Vocabulary, length: int) -> None:
        """Accept any vocabulary that spells the texts."""
        self._vocabulary, self._length = vocabulary, length

    @cached_property
    def encoder(self) -> object:
        """Return the encoder of the vectors, for further texts. Raises ValueError if it is not known here."""
        from palimpsest.latents.attributes import Attributes
        from palimpsest.latents.hf import Pretrained
        from palimpsest.latents.lsa import LSA

        kinds = {"lsa": LSA, "hf": Pretrained, "synthetic": Attributes}
        name, settings = self.description.get("encoder"), self.description.get("settings")
        if name not in kinds or not isinstance(settings, dict):
            raise ValueError(
                f"{KEY}={self.path} was made by {name}, which cannot be run again from there, so that "
                "further texts have no latents; use latents=lsa, hf or self for that"
            )
        vocabulary = self.description.get("vocabulary", self._vocabulary.fingerprint)  # older folders do not say
        if name == "lsa" and vocabulary != self._vocabulary.fingerprint:
            raise ValueError(
                f"{KEY}={self.path} was made by counting other tokens ({self.description['tokenizer']}), "
                "so further texts have no latents; give data.tokenizer_name_or_path that tokenizer, or set latents=lsa"
            )
        encoder = kinds[name](**settings)
        encoder.check(self._vocabulary, self._length)
        if (self.path / FITTED).is_file():
            encoder.load(_arrays(self.path / FITTED))
        return encoder

    def encode(self, passages: Passages) -> np.ndarray:
        """Return vectors (N, W), float32, by the encoder that made the folder, if it is known."""
        return self.encoder.encode(passages)


def changed_files(folder: Path, metadata: Mapping[str, Any]) -> list[str]:
    """Return the files with a digest in metadata.json (`metadata`) that are missing or have another digest."""
    return [name for name, digest in metadata.get("sha256", {}).items()
            if not (folder / name).is_file() or file_digest(folder / name) != digest]  # fmt: skip


def digests(texts: Sequence[str]) -> list[int]:
    """Return 64-bit digests of texts. Among ten million texts, two share one with a probability of 3 in a million."""
    raw = (hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts)
    return [int.from_bytes(digest, "little") for digest in raw]


def _lines(text_N: np.ndarray, order: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """Return the first line with each of these texts, -1 if there is none."""
    wanted = np.asarray(wanted, dtype=np.uint64)
    place = np.searchsorted(text_N, wanted, sorter=order).clip(max=len(order) - 1)
    line = order[place]
    return np.where(text_N[line] == wanted, line, -1)


def _check_vectors(file: Path, vectors: Sharded) -> None:
    """Check the vectors of the lines of `file`, in order."""
    line = 1
    for vectors_NW in chunks(vectors):
        if wrong := faults(vectors_NW):
            row, why = next(iter(wrong.items()))
            raise ValueError(
                f"{file}, line {line + row}: {why}; make the latent of that text again, or leave the line out"
            )
        line += len(vectors_NW)


def _listing(file: Path, sizes: Sequence[int]) -> Listing:
    columns: dict[str, list[int]] = {"text": [], "document": [], "shard": [], "place": []}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                text, shard = entry["text"], entry["shard"]
                place = entry["idx"]
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
