"""The zip archives of torch.save, read record by record, so that nothing in them can run or grow.

`torch.load` detects the type of a file by its content: it gives TorchScript to torch.jit.load, which runs its code and
bypasses any restricted unpickler. It is therefore never called: a single parser (`zipfile`) finds the records, and only
these are read.
"""

import io
import struct
import sys
import zipfile
from typing import BinaryIO

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER

from palimpsest.models import inert_pickle

_START = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s22x2H")  # local header of a record: signature; lengths of the name and of the extra field
_COUNT, _VERSION = struct.Struct("<q"), 1001  # of the older format
_MOST_PICKLED = 1 << 29  # bytes besides the tensors, such as the vocabulary of a tokenizer


def read(file: BinaryIO, weights: bool = True) -> object:
    """Return the object that was given to torch.save. Without `weights` its tensors have shapes only (device "meta").
    Raises ValueError, pickle.UnpicklingError, zipfile.BadZipFile and others if the archive is corrupt, compressed or
    TorchScript, or asks for something that models/inert_pickle.py refuses."""
    zipped = file.read(len(_START)) == _START
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return _read_zip(file, size, weights) if zipped else _read_old(file, size, weights)


def _read_zip(file: BinaryIO, size: int, weights: bool) -> object:
    records = _records(file, size)
    byteorder = _content(file, records["byteorder"], 16) if "byteorder" in records else b"little"
    _check_byteorder(byteorder == b"little")
    storages: dict[str, Tensor] = {}

    def storage(known: object) -> Tensor:
        dtype, key, count = _storage(known)
        info = records[f"data/{key}"]
        if count * dtype.itemsize != info.file_size:
            raise ValueError(f"its record data/{key} has {info.file_size:,} bytes, not {count:,} x {dtype.itemsize}")
        if key not in storages:
            storages[key] = _empty(count, dtype, weights)
            if weights:
                _read_into(file, info, _bytes_of(storages[key]))
        if storages[key].dtype != dtype:
            raise ValueError(f"its record data/{key} is of two types")
        return storages[key]

    return inert_pickle.load(io.BytesIO(_content(file, records["data.pkl"], _MOST_PICKLED)), size, storage)


def _read_old(file: BinaryIO, size: int, weights: bool) -> object:
    """Read the format from before torch 1.6: five pickles, then length and content of each storage."""
    storages: dict[str, Tensor] = {}
    left, pickled = size, _Bounded(file, size)

    def storage(known: object) -> Tensor:
        nonlocal left
        dtype, key, count = _storage(known)
        if key not in storages:
            left -= count * dtype.itemsize
            if left < 0:
                raise ValueError(f"its storage {key} is larger than the file")
            storages[key] = _empty(count, dtype, weights)
        if (storages[key].dtype, len(storages[key])) != (dtype, count):
            raise ValueError(f"its storage {key} is of two types or sizes")
        return storages[key]

    beginning = [inert_pickle.load(pickled, size, storage) for _ in range(2)]
    if beginning != [MAGIC_NUMBER, _VERSION]:
        raise ValueError("it is not a file of torch.save")
    system = inert_pickle.load(pickled, size, storage)
    _check_byteorder(isinstance(system, dict) and system.get("little_endian") is True)
    content = inert_pickle.load(pickled, size, storage)
    for key in inert_pickle.load(pickled, size, storage) if weights else ():
        (count,) = _COUNT.unpack(file.read(_COUNT.size))
        if count != len(storages[key]):
            raise ValueError(f"its storage {key} has {count:,} numbers, not {len(storages[key]):,}")
        _fill(file, _bytes_of(storages[key]))
    return content


class _Bounded:
    """A file whose `read` refuses to allocate more bytes than the file has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.readline = file.readline
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        if count > self._size:
            raise ValueError(f"it announces {count:,} bytes, and the file has {self._size:,}")
        return self._file.read(count)


def _storage(known: object) -> tuple[torch.dtype, str, int]:
    """Return type, name and length of the storage of a persistent id."""
    if type(known) is not tuple or not 5 <= len(known) <= 6:
        raise ValueError("it refers to something that is no storage")
    kind, dtype, key, _, count, *views = known
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or any(views):
        raise ValueError("it refers to something that is no storage")
    if type(count) is not int or count < 0:
        raise ValueError(f"its storage {key} has no length")
    return dtype, key, count


def _empty(count: int, dtype: torch.dtype, weights: bool) -> Tensor:
    return torch.empty(count, dtype=dtype, device="cpu" if weights else "meta")


def _bytes_of(storage: Tensor) -> memoryview:
    return memoryview(storage.view(torch.uint8).numpy()) if len(storage) else memoryview(b"")


def _check_byteorder(little: bool) -> None:
    if little != (sys.byteorder == "little"):
        raise ValueError("it was written on a machine of another byte order")


def _records(file: BinaryIO, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return the archive's records by their names within its one folder. Together they are no larger than the file."""
    infos = zipfile.ZipFile(file).infolist()
    folder = infos[0].filename.partition("/")[0]
    records = {info.filename.removeprefix(f"{folder}/"): info for info in infos}
    if "constants.pkl" in records or any(name.startswith("code/") for name in records):
        raise ValueError("it is a TorchScript program, which loading would run: refused")
    if any(info.compress_type or info.flag_bits & 1 for info in infos) or sum(i.file_size for i in infos) > size:
        raise ValueError("its records are compressed, encrypted or overlap, and those of torch.save never are: refused")
    if len(records) < len(infos):
        raise ValueError("two of its records have one name: refused")
    return records


def _content(file: BinaryIO, info: zipfile.ZipInfo, most: int) -> bytes:
    if info.file_size > most:
        raise ValueError(f"its record {info.filename} has {info.file_size:,} bytes, and at most {most:,} are read")
    content = bytearray(info.file_size)
    _read_into(file, info, memoryview(content))
    return bytes(content)


def _read_into(file: BinaryIO, info: zipfile.ZipInfo, buffer: memoryview) -> None:
    """Read a record into `buffer`, which has its length."""
    file.seek(info.header_offset)
    signature, *lengths = _LOCAL.unpack(file.read(_LOCAL.size))
    if signature != _START:
        raise ValueError(f"its record {info.filename} is not where the archive says")
    file.seek(sum(lengths), io.SEEK_CUR)
    _fill(file, buffer)


def _fill(file: BinaryIO, buffer: memoryview) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise EOFError("it ends within a tensor")
        buffer = buffer[count:]
