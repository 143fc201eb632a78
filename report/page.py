"""Self-contained pages from templates, written atomically."""

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
    """Render `template`, a file in this folder, with `content`; texts are escaped."""
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
    """Write `page` to `path` in the first process; lone surrogates (torn bytes of a tokenizer) are replaced."""
    write_atomically(path, page.encode("utf-8", errors="replace"))


def _content_hash(text: str) -> str:
    """Return the source expression of the content security policy for this inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(str(text).encode()).digest()).decode('ascii')}"
