"""File operations on local paths and remote URLs, and checksums inside checkpoint files.

A location is a local path (`Path`) or a URL in the notation of fsspec (`s3://bucket/run`, `memory://run`).

A sealed file carries the SHA-256 of its content inside itself, so that no interruption can separate the two. A
checkpoint is a zip archive, and its digest is the archive's comment, which every reader of zip archives skips.
"""

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

PathOrUrl = Path | str
PARTIAL = ".partial"  # ends the name of a file that is still being written

_MARK = b"palimpsest sha256 "
_DIGITS = 64
_COMMENT = len(_MARK) + _DIGITS
_END = struct.Struct("<4s4H2LH")  # a zip archive's last record: its signature first, the length of the comment last
_END_SIGNATURE = b"PK\x05\x06"
_CHUNK = 1 << 22


# -------------------------------------------------------------------------------- paths and URLs


def path_or_url(path: str | Path, key: str = "checkpointing.save_dir") -> PathOrUrl:
    """Return the path or URL that was typed under `key`; file:///x is the path /x.

    Raises:
        ValueError: fsspec does not know this kind of URL, or its package is not installed.
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
            f"{key}={text}: {error}. URLs are those of fsspec (s3:// needs the package s3fs, gs:// gcsfs); "
            "install the missing package, or name a local folder"
        ) from error
    return text.rstrip("/")


def is_remote(where: PathOrUrl) -> bool:
    """Return True for a URL, False for a local path."""
    return isinstance(where, str)


def join_path(folder: PathOrUrl, *names: str) -> PathOrUrl:
    """Append names to a path or URL."""
    return "/".join([folder, *names]) if is_remote(folder) else folder.joinpath(*names)


def basename(where: PathOrUrl) -> str:
    """Return the last part of a path or URL."""
    return str(where).rpartition("/")[2] if is_remote(where) else where.name


def parent_folder(where: PathOrUrl) -> PathOrUrl:
    """Return the folder that contains a path or URL."""
    return where.rpartition("/")[0] if is_remote(where) else where.parent


def filesystem(address: str) -> AbstractFileSystem:
    """Return the fsspec file system of a URL, with its directory cache emptied."""
    fs = url_to_fs(address)[0]
    fs.invalidate_cache()
    return fs


def exists(where: PathOrUrl) -> bool:
    """Return True if there is a file or folder at this path or URL."""
    return filesystem(where).exists(where) if is_remote(where) else where.exists()


def newest_first(folder: PathOrUrl, ending: str = "") -> list[PathOrUrl]:
    """Return the files in `folder` with that ending, newest first; files of equal age in reverse order of name."""
    found: list[tuple[float, str]] = []
    if is_remote(folder):
        fs = filesystem(folder)
        paths = fs.ls(folder, detail=False) if fs.exists(folder) else []
        found = [(fs.modified(path).timestamp(), basename(path)) for path in paths if path.endswith(ending)]
    else:
        for path in folder.glob(f"*{ending}"):
            with suppress(FileNotFoundError):  # a running training deletes old checkpoints
                found.append((path.stat().st_mtime_ns, path.name))
    return [join_path(folder, name) for _, name in sorted(found, reverse=True)]


def remove(where: PathOrUrl) -> None:
    """Delete a file if it exists."""
    with suppress(FileNotFoundError):
        filesystem(where).rm_file(where) if is_remote(where) else where.unlink()


def rename(source: PathOrUrl, target: PathOrUrl) -> None:
    """Rename a file."""
    filesystem(source).mv(source, target) if is_remote(source) else os.replace(source, target)


def link_or_copy(source: PathOrUrl, target: PathOrUrl) -> None:
    """Atomically replace `target` by a hard link to `source`, or by a copy where the file system has no hard links.

    Raises:
        OSError: the link and the copy failed; `target` is unchanged.
    """
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
    finally:  # also needed if both already named one file, because os.replace does nothing then
        partial.unlink(missing_ok=True)
    fsync_folder(target.parent)


def write_atomically(path: Path, data: bytes) -> None:
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


def fsync_folder(folder: Path) -> None:
    """Flush the directory entries of `folder` to disk, if its file system supports that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def open_regular(where: PathOrUrl) -> BinaryIO:
    """Open the file at a path or URL for reading. A remote file is downloaded completely first.

    Raises:
        ValueError: it is a pipe, a device or a folder. Reading some of these would never end.
        OSError: it cannot be opened.
    """
    if is_remote(where):
        return io.BytesIO(filesystem(where).cat_file(where))
    handle = os.open(where, os.O_RDONLY | os.O_NONBLOCK)  # do not wait for the writer of a pipe
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{where} is not a file, but a folder, a pipe or a device; name the file itself")
    return open(handle, "rb")


def check_regular(folder: Path) -> None:
    """Check that `folder` contains only files and folders, after following links.

    Raises:
        ValueError: it contains a pipe or a device, which a library would read without end.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is not a file, but a pipe or a device; remove it")


def version(where: PathOrUrl) -> str:
    """Return a string that changes whenever the file at a path or URL is rewritten."""
    if is_remote(where):
        return str(filesystem(where).ukey(url_to_fs(where)[1]))
    status = where.stat()
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


# -------------------------------------------------------------------------------- seals


class SealingStream:
    """Output stream for a zip archive that hashes what it passes on to `file`; `close` appends the digest.

    An error of `file` is kept in `error`, and later writes are ignored. An exception raised within the C++ code of
    torch.save would make its clean-up write, and fail, once more.
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
        """Do nothing: the last two bytes have to wait for `close`."""

    def close(self) -> None:
        """Write the length of the comment and the comment. Raises OSError if an earlier write failed."""
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


def check_seal(where: PathOrUrl) -> bool:
    """Return True if the file is sealed and its content agrees with the seal; False if it has no seal.

    Raises:
        ValueError: the content differs from what was sealed, or the seal itself is damaged.
        OSError: it cannot be read.
    """
    return _check_once(str(where), version(where))


@lru_cache(maxsize=256)
def _check_once(where: str, version: str) -> bool:
    """Check one version of a file; an intact version stays intact, so the result is cached."""
    with open_regular(path_or_url(where)) as file:
        return check_content(file, where)


def check_content(file: BinaryIO, name: str) -> bool:
    """Check the seal of an open file, called `name` in messages, and rewind it to its beginning."""
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
    """Return True if the archive ends with a comment as long as a seal, although there is no valid seal."""
    start = tail.rfind(_END_SIGNATURE)
    return start >= 0 and len(tail) - start >= _END.size and _END.unpack_from(tail, start)[-1] == _COMMENT
