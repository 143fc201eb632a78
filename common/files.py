"""Files by path or by address, and whether they still are what was written.

A place is a path of this machine (`Path`) or an address as fsspec spells them (`s3://bucket/run`, `memory://run`).

A sealed file carries the SHA-256 of its content inside itself, so that no kill can part the two: a checkpoint is a zip
archive, and the digest is the archive's comment, which every reader of zip archives skips.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat
import struct
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.utils import get_protocol

Place = Path | str
PARTIAL = ".partial"  # ends the name of a file that is still being written

_MARK = b"palimpsest sha256 "
_DIGITS = 64
_COMMENT = len(_MARK) + _DIGITS
_END = struct.Struct("<4s4H2LH")  # a zip archive's last record: its signature first, the length of the comment last
_END_SIGNATURE = b"PK\x05\x06"
_CHUNK = 1 << 22


# -------------------------------------------------------------------------------- places


def place(path: str | Path, key: str = "checkpointing.save_dir") -> Place:
    """The place that was typed under `key`; file:///x is the path /x.

    Raises:
        ValueError: an address of a kind that fsspec does not know, or whose package is missing.
    """
    text = str(path)
    if "://" not in text:
        return Path(path)
    if get_protocol(text) in ("file", "local"):
        return Path(url_to_fs(text)[1])
    try:
        url_to_fs(text)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{key}={text}: {error}. Addresses are those of fsspec (s3:// needs the package s3fs, gs:// gcsfs); "
            "install what is missing, or name a folder of this machine"
        ) from error
    return text.rstrip("/")


def is_remote(where: Place) -> bool:
    """Whether it is an address, not a path of this machine."""
    return isinstance(where, str)


def below(folder: Place, *names: str) -> Place:
    """The place of that name in `folder`."""
    return "/".join([folder, *names]) if is_remote(folder) else folder.joinpath(*names)


def name_of(where: Place) -> str:
    """The last part of a place."""
    return str(where).rpartition("/")[2] if is_remote(where) else where.name


def folder_of(where: Place) -> Place:
    """What a place lies in."""
    return where.rpartition("/")[0] if is_remote(where) else where.parent


def filesystem(address: str) -> AbstractFileSystem:
    """Who keeps `address`, with nothing remembered of what lay there earlier."""
    fs = url_to_fs(address)[0]
    fs.invalidate_cache()
    return fs


def exists(where: Place) -> bool:
    """Whether there is anything at a place."""
    return filesystem(where).exists(where) if is_remote(where) else where.exists()


def newest_first(folder: Place, ending: str = "") -> list[Place]:
    """The files in `folder` with that ending, the latest written first; of one time, the last by name."""
    found: list[tuple[float, str]] = []
    if is_remote(folder):
        fs = filesystem(folder)
        paths = fs.ls(folder, detail=False) if fs.exists(folder) else []
        found = [(fs.modified(path).timestamp(), name_of(path)) for path in paths if path.endswith(ending)]
    else:
        for path in folder.glob(f"*{ending}"):
            with suppress(FileNotFoundError):  # a training that runs lets go of old files
                found.append((path.stat().st_mtime_ns, path.name))
    return [below(folder, name) for _, name in sorted(found, reverse=True)]


def remove(where: Place) -> None:
    """Delete a file; what is gone already stays so."""
    with suppress(FileNotFoundError):
        filesystem(where).rm_file(where) if is_remote(where) else where.unlink()


def rename(source: Place, target: Place) -> None:
    """Give a file another name."""
    filesystem(source).mv(source, target) if is_remote(source) else os.replace(source, target)


def alias(source: Place, target: Place) -> None:
    """`target` becomes the content of `source`, at once: a second name of the same file where the file system has
    such, else a copy. Raises OSError; `target` is what it was then."""
    if is_remote(source):
        filesystem(source).copy(source, target)
        return
    partial = target.with_name(target.name + PARTIAL)
    partial.unlink(missing_ok=True)
    try:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, target)
    finally:  # also where both were names of one file already: rename does nothing then
        partial.unlink(missing_ok=True)
    sync_folder(target.parent)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk too, where its file system knows how."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def open_to_read(where: Place) -> BinaryIO:
    """The file at a place. From an address all of it is fetched first.

    Raises:
        ValueError: it is a pipe, a device or a folder. Reading some of them would never end.
        OSError: it cannot be opened.
    """
    if is_remote(where):
        return io.BytesIO(filesystem(where).cat_file(where))
    handle = os.open(where, os.O_RDONLY | os.O_NONBLOCK)  # without waiting for somebody who writes into a pipe
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{where} is not a file, but a folder, a pipe or a device; name the file itself")
    return open(handle, "rb")


def check_regular(folder: Path) -> None:
    """Check that what lies in a folder, links followed, are files and folders.

    Raises:
        ValueError: something is a pipe or a device, which a library would read without end.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is not a file, but a pipe or a device; remove it")


def version(where: Place) -> str:
    """A word that changes when the file at a place is written anew."""
    if is_remote(where):
        return str(filesystem(where).ukey(url_to_fs(where)[1]))
    status = where.stat()
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


# -------------------------------------------------------------------------------- seals


class Seal:
    """A stream to write a zip archive to: hashes what passes on to `file`, and `close` ends it with the digest.

    What goes wrong in `file` is kept in `error`, and the rest is swallowed: an error in the middle would be raised
    within the C++ of torch.save, whose own clean-up then writes, and fails, once more.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None
        self._hash, self._held = hashlib.sha256(), b""

    def write(self, data: bytes) -> int:
        data = memoryview(data).cast("B")
        if len(data) >= 2:  # the archive's last two bytes are the length of its comment
            self._pass(self._held)
            self._pass(data[:-2])
            self._held = bytes(data[-2:])
        else:
            held = self._held + bytes(data)
            self._pass(held[:-2])
            self._held = held[-2:]
        return len(data)

    def flush(self) -> None:
        """What is held back has to wait."""

    def close(self) -> None:
        """Say the length of the comment, then the comment. Raises OSError for what went wrong on the way."""
        assert self._held == b"\0\0", "the archive has a comment already"
        self._pass(_COMMENT.to_bytes(2, "little") + _MARK)
        self._pass(self._hash.hexdigest().encode())
        if self.error is not None:
            raise self.error

    def _pass(self, data: bytes | memoryview) -> None:
        if self.error is not None:
            return
        self._hash.update(data)
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error


def check_seal(where: Place) -> bool:
    """Whether the file is sealed, after its content was held against the seal; False for files that have none.

    Raises:
        ValueError: the content is not what was sealed, or the seal itself is damaged.
        OSError: it cannot be read.
    """
    return _check_once(str(where), version(where))


@lru_cache(maxsize=256)
def _check_once(where: str, version: str) -> bool:
    """A version of a file that is intact stays so."""
    with open_to_read(place(where)) as file:
        return check_content(file, where)


def check_content(file: BinaryIO, name: str) -> bool:
    """`check_seal` of an open file, which is called `name` in messages; it is left at its beginning."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _COMMENT - _END.size))
    tail = file.read()
    file.seek(0)
    comment = tail[-_COMMENT:]
    if not comment.startswith(_MARK):
        if _MARK in tail or _announces_seal(tail):
            raise ValueError(f"{name} is corrupt: its seal is damaged")
        return False
    left, digest = size - _DIGITS, hashlib.sha256()
    while left:
        chunk = file.read(min(_CHUNK, left))
        if not chunk:
            raise ValueError(f"{name} became shorter while it was read; try again")
        digest.update(chunk)
        left -= len(chunk)
    file.seek(0)
    if digest.hexdigest().encode() != comment[-_DIGITS:]:
        raise ValueError(f"{name} is corrupt: its content is not what was written (its SHA-256 differs)")
    return True


def _announces_seal(tail: bytes) -> bool:
    """Whether an archive ends there with a comment of the length of a seal, though no seal is in its place."""
    start = tail.rfind(_END_SIGNATURE)
    if start < 0 or len(tail) - start < _END.size:
        return False
    return _END.unpack_from(tail, start)[-1] == _COMMENT
