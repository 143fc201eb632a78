"""Short forms of values and lists of names for messages to users."""

import reprlib
from collections.abc import Sequence

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = 60
_SHORT.maxlong = 40
_SHORT.maxother = 60
_MOST_NAMES = 12
_LONGEST_NAME = 40
_LONGEST_MESSAGE = 500


def short_repr(value: object) -> str:
    """Return repr(value) with the middle of long values left out; `null` for None."""
    return "null" if value is None else _SHORT.repr(value)


def excerpt(error: BaseException) -> str:
    """Return the first line of an error's message, shortened and without control characters."""
    return plain(str(error).strip().partition("\n")[0])


def plain(value: object) -> str:
    """Return `value` as text, shortened and without control characters."""
    text = str(value)[: _LONGEST_MESSAGE + 1]
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


def listed(names: Sequence[object]) -> str:
    """Return the first names, separated by commas, and the total number if there are more."""
    some = [_name(str(name)) for name in names[:_MOST_NAMES]]
    more = [f"... ({len(names)} in all)"] if len(names) > _MOST_NAMES else []
    return ", ".join(some + more)


def _name(name: str) -> str:
    """Return a name, quoted if it would be unreadable or misread without quotation marks."""
    if len(name) > _LONGEST_NAME or name != name.strip() or not name.isprintable() or not name:
        return short_repr(name)
    return name
