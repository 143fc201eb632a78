"""Writing the folders that latents=file reads (latents/shards.py has the format), shard by shard.

A shard contains consecutive rows of one split and appears by one rename. A killed process thus leaves whole shards
only; the next one makes the others, and those that have changed since. The groups of rows that an encoder gets depend
on the shard alone, so that any number of processes and interruptions gives the same bytes.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from palimpsest.common.files import write_atomically
from palimpsest.data.cache import file_digest, fingerprint
from palimpsest.data.passages import PackedTexts, Passages
from palimpsest.latents.encoder import Encoder
from palimpsest.latents.shards import FITTED, METADATA, SHARDS, Listing, changed_files, digests
from palimpsest.latents.space import Sharded, faults, moments

log = logging.getLogger(__name__)

VERSION = 1  # of the format
_PROGRESS = "progress"  # a folder that exists while shards are missing


@dataclass(frozen=True)
class Part:
    """A shard: rows `start` to `stop` of a split."""

    number: int
    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """The content of a folder."""

    settings: Mapping[str, object]  # everything that the vectors depend on
    counts: Mapping[str, int]  # split -> rows
    shard_size: int

    @property
    def parts(self) -> list[Part]:
        """Return all shards, each of one split."""
        pieces = [(split, start, min(start + self.shard_size, count))
                  for split, count in self.counts.items() for start in range(0, count, self.shard_size)]  # fmt: skip
        return [Part(number, *piece) for number, piece in enumerate(pieces)]

    @property
    def fingerprint(self) -> str:
        """Return a hex digest of the plan."""
        return fingerprint(asdict(self))


class Preparation:
    """A folder that is being written.

    Args:
        texts: split -> rows.
        encoder: fitted.
        max_skipped: largest number of texts without a latent that may be left out.
        changed: called between groups of rows; the work stops if it returns True.

    Raises:
        ValueError: the folder was started with other settings, or more texts failed than allowed.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        texts: Mapping[str, PackedTexts],
        encoder: Encoder,
        max_skipped: int = 0,
        changed: Callable[[], bool] = lambda: False,
    ) -> None:
        self.out, self.plan = out, plan
        self.texts, self.encoder = texts, encoder
        self.max_skipped, self.changed = max_skipped, changed

    def begin(self) -> bool:
        """Make the folder, or continue an earlier start; return whether anything is left to do. Raises ValueError if
        the folder has other content, or is done and has been damaged."""
        done = self.out / METADATA
        begun = done if done.is_file() else self.out / _PROGRESS / "plan.json"
        if begun.is_file():
            try:
                content = dict(json.loads(begun.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"--out={self.out}: {begun.name} is damaged ({error}); delete the folder, and make it again"
                ) from error
            if content.get("plan") != self.plan.fingerprint:
                raise ValueError(
                    f"--out={self.out} has latents of other texts, or by other settings; give an empty "
                    "folder, or the settings that it was started with"
                )
            if wrong := changed_files(self.out, content):
                raise ValueError(
                    f"--out={self.out}: {wrong[0]} is not the file that was written; delete the folder, "
                    "and make it again"
                )
            return begun != done
        if self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"--out={self.out} has other content; give an empty or a new folder")
        for folder in (SHARDS, _PROGRESS):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        write_atomically(begun, json.dumps({"plan": self.plan.fingerprint}).encode())
        return True

    def write(self, numbers: Collection[int]) -> None:
        """Make the shards with these numbers, except those that are there and unchanged."""
        for part in self.plan.parts:
            if part.number in numbers and not self._whole(part):
                self._write_shard(part)
            if self.changed():
                return

    def _write_shard(self, part: Part) -> None:
        rows = self.texts[part.split]
        groups, skipped = [], {}
        cut = getattr(self.encoder, "cut", 0)
        for first, passages in rows.chunks(part.start, part.stop):
            good_NW, failed = _encode(self.encoder, passages)
            skipped |= {str(first + number): why for number, why in failed.items()}
            groups += [good_NW] if len(good_NW) else []
            self._check_budget(skipped, rows)
            if self.changed():
                return
        if not groups:
            raise ValueError(
                f"none of the {part.stop - part.start} texts of shard {part.number} has a latent "
                f"({next(iter(skipped.values()))}); give other texts"
            )
        with whole_file(self._shard(part.number)) as file:
            np.save(file, np.concatenate(groups))
        cut = getattr(self.encoder, "cut", 0) - cut
        record = {"skipped": skipped, "cut": cut, "sha256": file_digest(self._shard(part.number))}
        write_atomically(self._record(part), json.dumps(record).encode())  # the shard is done when this file exists
        kept = part.stop - part.start - len(skipped)
        log.info("shard %d of %d: %d texts of %s", part.number + 1, len(self.plan.parts), kept, part.split)

    def _check_budget(self, skipped: Mapping[str, str], rows: PackedTexts, total: int | None = None) -> None:
        total = len(skipped) if total is None else total
        if skipped and total > self.max_skipped:
            row, why = next(iter(skipped.items()))
            raise ValueError(
                f"{total} texts have no latent, such as row {row} ({rows[[int(row)]].texts[0]!r:.80}): {why}. "
                f"--max-skipped={self.max_skipped} may be left out; correct them, or raise it"
            )

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are missing or changed."""
        return [part.number for part in self.plan.parts if not self._whole(part)]

    def _whole(self, part: Part) -> bool:
        record, shard = self._record(part), self._shard(part.number)
        if not (record.is_file() and shard.is_file()):
            return False
        try:
            return json.loads(record.read_text())["sha256"] == file_digest(shard)
        except (ValueError, KeyError, TypeError):  # a power cut may leave a truncated record
            return False

    def finish(self, further: Mapping[str, object]) -> dict[str, object]:
        """Write the lists of texts and, last, metadata.json with the entries of `further`; return its content. Raises
        ValueError if more texts were left out than allowed, over all shards."""
        records = {part: json.loads(self._record(part).read_text()) for part in self.plan.parts}
        skipped = {part: record["skipped"] for part, record in records.items()}
        self._check_all(skipped)
        listed = {split: self._write_list(split, skipped) for split in self.plan.counts}
        width = np.load(self._shard(0), mmap_mode="r").shape[1]
        scale = self._scale(listed["train"], width) if "train" in listed else {}
        if fitted := self.encoder.arrays():
            with whole_file(self.out / FITTED) as file:
                np.savez(file, **fitted, **{key: np.array(value) for key, value in scale.items()})
        known = listed["train"].text if "train" in listed else []
        metadata = {
            "version": VERSION, "latent_dim": width, "shard_size": self.plan.shard_size,
            "num_shards": len(self.plan.parts), "counts": {split: len(found.text) for split, found in listed.items()},
            **self.encoder.metadata, **further, "skipped": sum(map(len, skipped.values())),
            "cut_by_encoder": sum(record["cut"] for record in records.values()),
            "also_in_train": {split: int(np.isin(found.text, known).sum()) for split, found in listed.items()
                              if split != "train"},
            "plan": self.plan.fingerprint, **scale, "sha256": self._digests(records),
        }  # fmt: skip
        write_atomically(self.out / METADATA, (json.dumps(metadata, indent=1, ensure_ascii=False) + "\n").encode())
        shutil.rmtree(self.out / _PROGRESS)
        for left in self.out.rglob("*.partial"):
            left.unlink()
        return metadata

    def _write_list(self, split: str, skipped: Mapping[Part, Mapping[str, str]]) -> Listing:
        """Write the list of a split's texts, and return it as numbers."""
        text, shard = [], []
        place = []
        with whole_file(self.out / f"{split}_data.jsonl") as file:
            for part in (part for part in self.plan.parts if part.split == split):
                for line in self._lines(part, skipped[part]):
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass"))
                    text += digests([line["text"]])
                    shard.append(line["shard"])
                    place.append(line["idx"])
        numbers = np.array(text, dtype=np.uint64)
        return Listing(numbers, np.zeros_like(numbers), np.array(shard), np.array(place))

    def _scale(self, train: Listing, width: int) -> dict[str, list[float]]:
        shards = [self._shard(part.number) for part in self.plan.parts]
        mean_W, std_W = moments(Sharded(shards, width, train.shard, train.place))
        return {"mean": mean_W.tolist(), "std": std_W.tolist()}

    def _digests(self, records: Mapping[Part, Mapping[str, Any]]) -> dict[str, str]:
        """Return the digests of all files; those of shards as recorded when they were written."""
        shards = {self._shard(part.number): record["sha256"] for part, record in records.items()}
        others = [self.out / FITTED, *(self.out / f"{split}_data.jsonl" for split in self.plan.counts)]
        found = {**shards, **{file: file_digest(file) for file in others if file.is_file()}}
        return {file.relative_to(self.out).as_posix(): digest for file, digest in found.items()}

    def _check_all(self, skipped: Mapping[Part, Mapping[str, str]]) -> None:
        total = sum(map(len, skipped.values()))
        for part, found in skipped.items():
            for row, why in found.items():
                log.warning("%s: row %s was left out: %s", part.split, row, why)
            if total > self.max_skipped:
                self._check_budget(found, self.texts[part.split], total)

    def _lines(self, part: Part, skipped: Mapping[str, str]) -> Iterator[dict[str, object]]:
        rows, idx = self.texts[part.split], 0
        for first, passages in rows.chunks(part.start, part.stop):
            text_ids = rows.rows[first : first + len(passages)]["text_id"]
            for row, (text, text_id) in enumerate(zip(passages.texts, text_ids, strict=True), start=first):
                if str(row) not in skipped:
                    yield {"text": text, "shard": part.number, "idx": idx, "document": f"{part.split}/{int(text_id)}"}
                    idx += 1

    def _shard(self, number: int) -> Path:
        return self.out / SHARDS / f"shard_{number:04d}.npy"

    def _record(self, part: Part) -> Path:
        return self.out / _PROGRESS / f"shard_{part.number:04d}.json"


def _encode(encoder: Encoder, passages: Passages) -> tuple[np.ndarray, dict[int, str]]:
    """Return the vectors (float32) of the rows that have one, and the faults of the others, number -> reason. If the
    encoder refuses the rows together, they are encoded one by one."""
    try:
        vectors_NW, failed = encoder.encode(passages), {}
    except ValueError:
        found, failed = [], {}
        for number in range(len(passages)):
            try:
                found.append(encoder.encode(passages.only(number)))
            except ValueError as error:
                failed[number] = str(error)
        if not found:
            return np.zeros((0, 0), np.float32), failed
        vectors_NW = np.concatenate(found)
    numbers = [number for number in range(len(passages)) if number not in failed]
    wrong = faults(vectors_NW)
    good_NW = np.delete(vectors_NW, sorted(wrong), axis=0).astype(np.float32)
    return good_NW, {**failed, **{numbers[row]: why for row, why in wrong.items()}}


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name only when it is completely on the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
