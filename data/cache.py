"""On-disk cache folders keyed by content: written atomically, by one writer at a time, and rebuilt when damaged.

Layout: `<cache_dir>/<kind>-<key>/` with the files of the entry and `entry.json`, which repeats the settings that made
the key and records the size and checksum of every file. The folder appears by one rename, so a killed process leaves no
partial entry.

`files.json` beside the entries remembers the digests of files of the user by size and modification time, so that a
corpus is hashed once.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

log = logging.getLogger(__name__)

_ENTRY = "entry.json"
_DIGESTS = "files.json"
_SETTLED = 2.0  # seconds: a file that changed since may change again without another modification time
_CHECKSUM_LIMIT = 256 * 2**20  # bytes; larger files are checked by size only, because reading them takes minutes


def fingerprint(settings: dict[str, Any]) -> str:
    """Return a hex digest of plain JSON settings, the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digests(paths: Iterable[Path], cache_dir: str | Path) -> list[tuple[str, str]]:
    """Return the name and the hex SHA-256 of each file; a file that has kept its size and time is not read again."""
    memory = Path(cache_dir).expanduser().absolute() / _DIGESTS
    known = _known_digests(memory)
    found, fresh = [], {}
    for path in map(Path.absolute, paths):
        stat, now = path.stat(), time.time()
        seen = [stat.st_size, stat.st_mtime_ns]
        remembered = known.get(str(path), [])
        digest = remembered[2] if remembered[:2] == seen else file_digest(path)
        if remembered[:2] != seen and now - stat.st_mtime > _SETTLED:
            fresh[str(path)] = [*seen, digest]
        found.append((path.name, digest))
    if fresh:
        _remember(memory, fresh)
    return found


def _known_digests(memory: Path) -> dict[str, list]:
    try:
        known = json.loads(memory.read_text())
        return {path: seen for path, seen in known.items() if len(seen) == 3}
    except (OSError, ValueError, TypeError, AttributeError):  # absent or damaged: the files are hashed again
        return {}


def _remember(memory: Path, fresh: dict[str, list]) -> None:
    """Add digests to `memory`. Of two processes that do so at once one may lose its additions, which costs a hash."""
    with writing_into(memory.parent), tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False) as file:
        json.dump({**_known_digests(memory), **fresh}, file)
    os.chmod(file.name, 0o644)  # like the entries: others may share the cache
    os.replace(file.name, memory)


def texts_fingerprint(texts: Iterable[str]) -> str:
    """Return a hex digest of the texts in order. Lengths are hashed too, so moving a boundary changes it."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def cached_folder(
    cache_dir: str | Path, kind: str, settings: dict[str, Any], build: Callable[[Path], dict[str, Any] | None]
) -> tuple[Path, dict[str, Any]]:
    """Return the cached folder of `kind` and `settings`, with the numbers stored beside it; build it if needed.

    `build(folder)` fills a new folder if the entry is missing or damaged, and may return JSON-serialisable figures. An
    exception in `build` leaves no entry. Raises ValueError if `cache_dir` cannot be written.
    """
    cache_dir = Path(cache_dir).expanduser().absolute()
    folder = cache_dir / f"{kind}-{fingerprint(settings)[:32]}"
    figures = _read_entry(folder, settings)
    if figures is not None:
        return folder, figures
    with writing_into(cache_dir):  # before the lock, which is beside the entry
        own = f".{folder.name}-{socket.gethostname()}-"  # a lock may hold on one machine only
    with _lock(folder) as alone:
        figures = _read_entry(folder, settings)  # another process may have built it while this one waited
        if figures is not None:
            return folder, figures
        with writing_into(cache_dir):
            for left in cache_dir.glob(f"{own}*") if alone else ():  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = tempfile.TemporaryDirectory(prefix=own, dir=cache_dir, ignore_cleanup_errors=True)
        with temporary as name:
            return folder, _build(Path(name), folder, settings, build)


@contextlib.contextmanager
def writing_into(cache_dir: Path) -> Iterator[None]:
    """Create the folder of the cache. Raises ValueError if it, or a file in it, cannot be written."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(f"data.cache_dir={cache_dir} cannot be written ({error}); give another folder") from error


def _build(
    temporary: Path, folder: Path, settings: dict[str, Any], build: Callable[[Path], dict[str, Any] | None]
) -> dict[str, Any]:
    figures = build(temporary) or {}
    files = {p.name: _file_record(p) for p in sorted(temporary.iterdir())}
    entry = {"settings": settings, "figures": figures, "files": files}
    (temporary / _ENTRY).write_text(json.dumps(entry, indent=1, sort_keys=True))
    temporary.chmod(0o755)
    if folder.exists():  # damaged, otherwise it would have been used
        log.warning("the cache entry %s is damaged and was built again", folder)
        with tempfile.TemporaryDirectory(prefix=".damaged-", dir=folder.parent, ignore_cleanup_errors=True) as aside:
            os.replace(folder, Path(aside) / "entry")
    try:
        os.replace(temporary, folder)
    except OSError:
        if _read_entry(folder, settings) is None:  # a second writer has not built it either
            raise
    return figures


def _file_record(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    return {"bytes": size} | ({"sha256": file_digest(path)} if size <= _CHECKSUM_LIMIT else {})


def _read_entry(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the figures of an intact entry; None for an absent or damaged one."""
    try:
        entry = json.loads((folder / _ENTRY).read_text())
        intact = all(_file_record(folder / name) == record for name, record in entry["files"].items())
        return entry["figures"] if intact and entry["settings"] == json.loads(json.dumps(settings)) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the entry's lock, so that processes do not build it twice; give whether it is held.

    A file system without locks is no reason to stop: an entry appears by one atomic rename, so it is never half there.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(folder.parent / f".{folder.name}.lock"))
            alone = True
        except (OSError, NotImplementedError) as error:  # filelock raises the latter if locks do not exist
            log.warning("no lock for %s (%s): processes that need it at once build it several times", folder, error)
            alone = False
        yield alone
