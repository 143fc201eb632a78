"""Pages from templates: complete in themselves, written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from palimpsest.common.files import write_atomically
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
def write_page(path: Path, page: str) -> None:
    """Write `page` to `path`, in the first process. Lone surrogates (torn bytes of a byte-level tokenizer) must not
    cost a finished run its report."""
    write_atomically(path, page.encode("utf-8", errors="replace"))


def _content_hash(text: str) -> str:
    """Source expression of the content security policy that admits exactly this inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode('ascii')}"
