"""What the page says in words, and how it frames pages of the reports."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from palimpsest.settings.command_line import explain

# What a user may have got wrong, as in command_line.clear_errors; all else is a mistake of ours.
REFUSALS = (HydraException, OmegaConfBaseException, ValueError, OSError, FloatingPointError)
# A frame is as high as its page.
_FIT = """const page = this.contentDocument.documentElement, fit = () => {
  this.style.height = `${Math.ceil(page.getBoundingClientRect().height)}px`; };
new this.contentWindow.ResizeObserver(fit).observe(page); fit();"""


def told(text: str, warnings: Sequence[str] = ()) -> str:
    """A line, and what was warned of."""
    return f'<p class="said">{escape(text)}</p>' + "".join(
        f'<p class="said warned">{escape(warning)}</p>' for warning in warnings
    )


def refused(error: BaseException) -> str:
    """Why something was not done."""
    return f'<p class="said refused" role="alert">{escape(explain(error))}</p>'


def framed(page: str, title: str) -> str:
    """A page of its own within the page."""
    return f'<iframe class="framed" title="{escape(title)}" srcdoc="{escape(page)}" onload="{escape(_FIT)}"></iframe>'
