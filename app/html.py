"""HTML of the messages in the app, and of framed reports."""

from collections.abc import Sequence
from html import escape

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from palimpsest.settings.command_line import explain

# Errors that a user may cause, as in command_line.clear_errors; all others are bugs.
USER_ERRORS = (HydraException, OmegaConfBaseException, ValueError, OSError, FloatingPointError)
# The frame becomes as high as its page.
_FIT = """const page = this.contentDocument.documentElement, fit = () => {
  this.style.height = `${Math.ceil(page.getBoundingClientRect().height)}px`; };
new this.contentWindow.ResizeObserver(fit).observe(page); fit();"""


def message(text: str, warnings: Sequence[str] = ()) -> str:
    """Return a line of text, followed by warnings."""
    return f'<p class="said">{escape(text)}</p>' + "".join(
        f'<p class="said warned">{escape(warning)}</p>' for warning in warnings
    )


def error_message(error: BaseException) -> str:
    """Return an explanation of an error."""
    return f'<p class="said refused" role="alert">{escape(explain(error))}</p>'


def framed(page: str, title: str) -> str:
    """Return a page embedded in a frame."""
    return f'<iframe class="framed" title="{escape(title)}" srcdoc="{escape(page)}" onload="{escape(_FIT)}"></iframe>'
