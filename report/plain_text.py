"""Plain text to HTML: control characters become visible, spacing is kept, `backticks` set code."""

import re

from markupsafe import Markup, escape

# Invalid in HTML, and interpreted by terminals.
_CONTROL = {code: "\ufffd" for code in [*range(9), 11, 12, *range(14, 32), *range(127, 160)]}


def visible(text: str) -> str:
    """Replace control characters by a replacement sign, except tabs and line ends."""
    return text.translate(_CONTROL)


def split_lead(token: str) -> tuple[str, str]:
    """Return the white space before a decoded token, and the token; white space alone is all token.

    Coloured blocks leave the leading space out, so that neighbours do not merge.
    """
    token = visible(token)
    body = token.lstrip()
    lead = token[: len(token) - len(body)] if body else ""
    return lead, body or token


def inline(text: str) -> Markup:
    """Return escaped text in which `backticks` set code."""
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(visible(text)))))


def paragraphs(text: str) -> list[Markup]:
    """Return the parts of `text` between blank lines, each as `inline`."""
    return [inline(part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip()]
