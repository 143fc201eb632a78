"""Text of users and models on its way into the page: control characters visible, spacing kept, code in `backticks`."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

# HTML has no place for these, and a terminal would obey them; a replacement sign keeps them visible.
_CONTROL = {code: "\ufffd" for code in [*range(9), 11, 12, *range(14, 32), *range(127, 160)]}


def visible(text: str) -> str:
    """`text` with a replacement sign for each control character, but for tabs and the ends of lines."""
    return text.translate(_CONTROL)


def split_lead(token: str) -> tuple[str, str]:
    """The white space before a decoded token and the token; one that is nothing but white space is all token.

    A coloured block around a token leaves its leading space out, or neighbours would merge into one.
    """
    token = visible(token)
    body = token.lstrip()
    lead = token[: len(token) - len(body)] if body else ""
    return lead, body or token


def inline(text: str) -> Markup:
    """Escaped text in which `backticks` set code."""
    return Markup(re.sub(r"`([^`\n]+)`", r"<code>\1</code>", str(escape(visible(text)))))


def paragraphs(text: str) -> list[Markup]:
    """The parts of `text` between blank lines, each as `inline`."""
    return [inline(part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip()]
