"""Pages from templates: complete in themselves, written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.report.palette import FIRST_HUE, LAST_HUE


def render(template: str, **content: Any) -> str:
    """The page that `template`, a file beside this one, makes of `content`. Texts are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _content_hash
    environment.globals["hues"] = (FIRST_HUE, LAST_HUE)
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template(template).render(written=written, **content)


@rank_zero_only
def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` to `path` atomically: readers see the old file or the new one, never a part. Of several processes
    the first does it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def encoded(page: str) -> bytes:
    """UTF-8. Lone surrogates (torn bytes of a byte-level tokenizer) must not cost a finished run its report."""
    return page.encode("utf-8", errors="replace")


def _content_hash(text: str) -> str:
    """Source expression of the content security policy that admits exactly this inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode('ascii')}"
