"""Writing the folders that latents=file reads (latents/shards.py has the format), shard by shard.

A shard is some rows of one split, in their order; it appears by one rename, so what a killed process leaves is whole
shards and nothing else, and the next one makes the others, and those that are no longer as they were written. Which
rows, in which groups, an encoder is given hangs on the shard alone: any number of processes, and any number of kills,
make the same bytes.
"""

from __future__ import annotations

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

from palimpsest.data.cache import file_digest, fingerprint
from palimpsest.data.passages import PackedTexts, Passages
from palimpsest.latents.rows import Encoder
from palimpsest.latents.shards import FITTED, METADATA, SHARDS, Listing, changed_files, digests
from palimpsest.latents.space import Sharded, faults, moments

log = logging.getLogger(__name__)

VERSION = 1  # of the format
_PROGRESS = "progress"  # a folder that is there while shards are missing


@dataclass(frozen=True)
class Part:
    """A shard: rows `start` to `stop` of a split."""

    number: int
    split: str
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """What is to be made. settings: what the vectors hang on. counts: split -> rows."""

    settings: Mapping[str, object]
    counts: Mapping[str, int]
    shard_size: int

    @property
    def parts(self) -> list[Part]:
        """All shards; each is of one split."""
        pieces = [(split, start, min(start + self.shard_size, count))
                  for split, count in self.counts.items() for start in range(0, count, self.shard_size)]  # fmt: skip
        return [Part(number, *piece) for number, piece in enumerate(pieces)]

    @property
    def fingerprint(self) -> str:
        """Hex digest of all of it."""
        return fingerprint(asdict(self))


class Preparation:
    """A folder that is being written.

    texts: split -> rows. encoder: fitted. max_skipped: how many texts, at most, may be left out because their latent
    can not be made; one more ends the work. changed: asked between groups of rows; where it says so the work ends.

    Raises:
        ValueError: a folder was begun with other settings; more texts failed than may.
    """

    def __init__(
        self, out: Path, plan: Plan, texts: Mapping[str, PackedTexts], encoder: Encoder, max_skipped: int = 0,
        changed: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.out, self.plan, self.texts, self.encoder = out, plan, texts, encoder
        self.max_skipped, self.changed = max_skipped, changed

    def begin(self) -> bool:
        """Make the folder, or find what an earlier start has left; returns whether anything is left to do.

        Raises:
            ValueError: the folder is of something else, or is done and has been damaged.
        """
        done = self.out / METADATA
        begun = done if done.is_file() else self.out / _PROGRESS / "plan.json"
        if begun.is_file():
            said = self._said(begun)
            if said.get("plan") != self.plan.fingerprint:
                raise ValueError(f"--out={self.out} holds latents of other texts, or by other settings; give an empty "
                                 "folder, or the settings that it was begun with")  # fmt: skip
            if wrong := changed_files(self.out, said):
                raise ValueError(f"--out={self.out}: {wrong[0]} is not the file that was written; delete the folder, "
                                 "and make it again")  # fmt: skip
            return begun != done
        if self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"--out={self.out} holds something else; give an empty or a new folder")
        for folder in (SHARDS, _PROGRESS):
            (self.out / folder).mkdir(parents=True, exist_ok=True)
        with whole_file(begun) as file:
            file.write(json.dumps({"plan": self.plan.fingerprint}).encode())
        return True

    def write(self, numbers: Collection[int]) -> None:
        """Make the shards with these numbers, but those that are there as they were written."""
        for part in self.plan.parts:
            if part.number in numbers and not self._whole(part):
                self._write_shard(part)
            if self.changed():
                return

    def _write_shard(self, part: Part) -> None:
        rows = self.texts[part.split]
        groups, skipped, cut = [], {}, getattr(self.encoder, "cut", 0)
        for first, passages in rows.chunks(part.start, part.stop):
            good_NW, failed = _encoded(self.encoder, passages)
            skipped |= {str(first + number): why for number, why in failed.items()}
            groups += [good_NW] if len(good_NW) else []
            self._check_budget(skipped, rows)
            if self.changed():
                return
        if not groups:
            raise ValueError(f"none of the {part.stop - part.start} texts of shard {part.number} has a latent "
                             f"({next(iter(skipped.values()))}); give other texts")  # fmt: skip
        with whole_file(self._shard(part.number)) as file:
            np.save(file, np.concatenate(groups))
        cut = getattr(self.encoder, "cut", 0) - cut
        said = {"skipped": skipped, "cut": cut, "sha256": file_digest(self._shard(part.number))}
        with whole_file(self._record(part)) as file:  # the shard is done when this is there
            file.write(json.dumps(said).encode())
        log.info("shard %d of %d: %d texts of %s", part.number + 1, len(self.plan.parts),
                 part.stop - part.start - len(skipped), part.split)  # fmt: skip

    def _check_budget(self, skipped: Mapping[str, str], rows: PackedTexts, total: int | None = None) -> None:
        total = len(skipped) if total is None else total
        if skipped and total > self.max_skipped:
            row, why = next(iter(skipped.items()))
            raise ValueError(
                f"{total} texts have no latent, such as row {row} ({rows[[int(row)]].texts[0]!r:.80}): {why}. "
                f"--max-skipped={self.max_skipped} may be left out; correct them, or raise it"
            )

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet, or no longer as they were written."""
        return [part.number for part in self.plan.parts if not self._whole(part)]

    def _whole(self, part: Part) -> bool:
        record, shard = self._record(part), self._shard(part.number)
        if not (record.is_file() and shard.is_file()):
            return False
        try:
            return json.loads(record.read_text())["sha256"] == file_digest(shard)
        except (ValueError, KeyError, TypeError):  # a record that is cut off: a power cut may leave one
            return False

    def finish(self, further: Mapping[str, object]) -> dict[str, object]:
        """Write the lists of texts, and metadata.json last; `further` says what else belongs into it. Returns it.

        Raises:
            ValueError: more texts were left out than may be, over all shards.
        """
        said = {part: json.loads(self._record(part).read_text()) for part in self.plan.parts}
        skipped = {part: found["skipped"] for part, found in said.items()}
        self._check_all(skipped)
        listed = {split: self._write_list(split, skipped) for split in self.plan.counts}
        width = np.load(self._shard(0), mmap_mode="r").shape[1]
        scale = self._scale(listed["train"], width) if "train" in listed else {}
        self._write_fitted(scale)
        known = listed["train"].text if "train" in listed else []
        metadata = {
            "version": VERSION, "latent_dim": width, "shard_size": self.plan.shard_size,
            "num_shards": len(self.plan.parts), "counts": {split: len(found.text) for split, found in listed.items()},
            **self.encoder.metadata, **further, "skipped": sum(map(len, skipped.values())),
            "cut_by_encoder": sum(found["cut"] for found in said.values()),
            "also_in_train": {split: int(np.isin(found.text, known).sum()) for split, found in listed.items()
                              if split != "train"},
            "plan": self.plan.fingerprint, **scale, "sha256": self._digests(said),
        }  # fmt: skip
        with whole_file(self.out / METADATA) as file:
            file.write((json.dumps(metadata, indent=1, ensure_ascii=False) + "\n").encode())
        shutil.rmtree(self.out / _PROGRESS)
        for left in self.out.rglob("*.partial"):
            left.unlink()
        return metadata

    def _write_list(self, split: str, skipped: Mapping[Part, Mapping[str, str]]) -> Listing:
        """The list of a split's texts, as a file and in numbers."""
        text, shard, place = [], [], []
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

    def _write_fitted(self, scale: Mapping[str, list[float]]) -> None:
        """What was fitted goes into one file with mean and scale of train, where those are known."""
        if fitted := self.encoder.arrays():
            with whole_file(self.out / FITTED) as file:
                np.savez(file, **fitted, **{key: np.array(value) for key, value in scale.items()})

    def _digests(self, said: Mapping[Part, Mapping[str, Any]]) -> dict[str, str]:
        """Of all files; those of shards as they were written."""
        shards = {self._shard(part.number): found["sha256"] for part, found in said.items()}
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

    def _said(self, begun: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(begun.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"--out={self.out}: {begun.name} is damaged ({error}); delete the folder, and make it "
                             "again") from error  # fmt: skip

    def _record(self, part: Part) -> Path:
        return self.out / _PROGRESS / f"shard_{part.number:04d}.json"


def _encoded(encoder: Encoder, passages: Passages) -> tuple[np.ndarray, dict[int, str]]:
    """The vectors (float32) of those rows that have one, and what is wrong with the others: number -> why. Rows that
    the encoder refuses together are given to it one by one."""
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
    """A file to be written that appears under its name when all of it is on the disk, and never otherwise."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
