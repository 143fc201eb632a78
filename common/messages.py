"""Values and lists of names in messages to users, cut to a readable length."""

import reprlib
from collections.abc import Sequence

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 3, 60, 40, 60
_MOST_NAMES = 12
_LONGEST_NAME = 40
_LONGEST_MESSAGE = 500


def shown(value: object) -> str:
    """Return a value as Python writes it, without the middle of what is long; `null` for None."""
    return "null" if value is None else _SHORT.repr(value)


def excerpt(error: BaseException) -> str:
    """Return the first line of an error's message, cut where it is long, without characters that steer a terminal."""
    return plain(str(error).strip().partition("\n")[0])


def plain(value: object) -> str:
    """Return `value` as text, cut where it is long, without characters that steer a terminal."""
    text = str(value)[: _LONGEST_MESSAGE + 1]
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


def listed(names: Sequence[object]) -> str:
    """Return the first names, separated by commas, and how many more there are."""
    some = [_name(str(name)) for name in names[:_MOST_NAMES]]
    more = [f"... ({len(names)} in all)"] if len(names) > _MOST_NAMES else []
    return ", ".join(some + more)


def _name(name: str) -> str:
    """A name, in quotation marks where it would not be seen as it is."""
    if len(name) > _LONGEST_NAME or name != name.strip() or not name.isprintable() or not name:
        return shown(name)
    return name
