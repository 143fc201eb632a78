"""Types of settings, for use in signatures: `rate: Share`, `order: Literal["random", "margin"]`.

Most settings have a plain type: bool, int, float, str, `Literal`, `X | None`, a sequence. `Annotated` with a `Setting`
describes the others. `setting_of` reads a type; `hints` reads a signature.
"""

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, Union, get_args, get_origin

LARGEST = 2**31 - 1  # largest whole number, unless a setting has a smaller limit
COUNT = 10**6  # largest number of entries to allocate, so that a typing error cannot fill the memory


@dataclass(frozen=True)
class Setting:
    """The values that a setting accepts.

    Attributes:
        description: description that completes the message "KEY=VALUE must be ...".
    """

    description: str
    accepts: Callable[[object], bool]


def shown(value: object) -> str:
    """Return a value as a user types it, shortened if it is long."""
    if isinstance(value, list):
        text = f"[{','.join(map(shown, value))}]"
    elif value is None:
        text = "null"
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(least: int = 0, most: int = LARGEST) -> Setting:
    """Accept the whole numbers from `least` to `most`."""
    return Setting(f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def real(interval: str) -> Setting:
    """Accept the finite numbers in an interval such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))

    def accepts(value: object) -> bool:
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            return False
        above = value >= low if interval[0] == "[" else value > low
        return above and (value <= high if interval[-1] == "]" else value < high)

    return Setting("a number" if interval == "(-inf, inf)" else f"a number in {interval}", accepts)


def one_of(*names: object) -> Setting:
    """Accept exactly these values; True is not 1."""
    known = [(type(name), name) for name in names]
    return Setting(f"one of: {', '.join(map(shown, names))}", lambda v: (type(v), v) in known)


def list_of(entry: Setting, least: int = 0, example: str = "") -> Setting:
    """Accept lists of at least `least` entries."""
    description = f"a list{' of at least one entry' if least else ''} such as {example}; each entry {entry.description}"
    return Setting(description, lambda v: isinstance(v, list) and len(v) >= least and all(map(entry.accepts, v)))


def either(*settings: Setting) -> Setting:
    """Accept what any of these settings accepts."""
    return Setting(" or ".join(s.description for s in settings), lambda v: any(s.accepts(v) for s in settings))


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_folder(value: object) -> bool:
    plain = isinstance(value, str) and value.strip(" .") != "" and len(value) <= 200 and value.isprintable()
    return plain and not any(letter in value for letter in "/\\")


NULL = Setting("null", lambda v: v is None)
FLAG = Setting("true or false", lambda v: type(v) is bool)
TEXT = Setting("a text", lambda v: isinstance(v, str))
NAME = Setting("a name", _is_name)
FOLDER = Setting("a name of at most 200 characters without / and \\, and not ..", _is_folder)
PATH = Setting("a path or a name", lambda v: isinstance(v, str))
PRESENT_PATH = Setting("a path or a name", _is_name)
GROUP = Setting("a group of settings; set one of its keys", lambda v: isinstance(v, dict))
RATES = list_of(real("(0, 1]"), 1, "[1.0,0.5,0.1]")
ALL_TEXTS = Setting(
    "1.0, because a training that resumes needs all its batches; data.max_train_texts limits the texts",
    lambda v: type(v) is float and v == 1,
)
STAGE = Setting(
    "a pair: an optimizer step, and the samples per step from there on",
    lambda v: isinstance(v, list) and len(v) == 2 and all(map(whole(0).accepts, v)),
)

Share = Annotated[float, real("[0, 1]")]
BelowOne = Annotated[float, real("[0, 1)")]
InsideOne = Annotated[float, real("(0, 1)")]
AboveZeroShare = Annotated[float, real("(0, 1]")]
NotNegative = Annotated[float, real("[0, inf)")]
Positive = Annotated[float, real("(0, inf)")]
Natural = Annotated[int, whole(0)]
AtLeastOne = Annotated[int, whole(1)]
Count = Annotated[int, whole(1, COUNT)]
Seed = Annotated[int, whole(0, 2**32 - 1)]
Size = Annotated[int, whole(1, 2**16)]
Length = Annotated[int, whole(1, 2**20)]
AttentionBackend = Literal["auto", "sdpa", "flash_attn", "flex"]
Name = Annotated[str, NAME]
FolderName = Annotated[str, FOLDER]
FilePath = Annotated[str, PATH]
PresentPath = Annotated[str, PRESENT_PATH]
Rates = Annotated[Sequence[float], RATES]
BatchRamp = Annotated[Sequence[Sequence[int]], list_of(STAGE, 1, "[[0,64],[1000,256]]")]

# Marks of settings, for settings/identity.py. A setting that a training depends on is in its fingerprint unless marked.
FREE = "not in the fingerprint: it may change when a training resumes"
IF_SET = "not in the fingerprint while it is empty, because it is newer than some trainings"
ADDED_LATER = "not in the fingerprint: it was added later, and the key that it is copied from is in the fingerprint"
COPY = "in the fingerprint as this argument, not as the key that it is copied from"


@dataclass(frozen=True)
class Needs:
    """The mark of an argument that another setting brings into use.

    Attributes:
        setting: argument of the same component, or a key of the configuration.
        values: the values with which the marked argument is read; none: all but 0, false and null.
    """

    setting: str
    values: tuple[object, ...] = ()

    def met_by(self, value: object) -> bool:
        return value in self.values if self.values else bool(value)


_PLAIN = {bool: FLAG, int: whole(-LARGEST), float: real("(-inf, inf)"), str: TEXT, type(None): NULL}


@cache
def setting_of(hint: object) -> Setting | None:
    """Return the values that a type accepts; None for a group of settings or an unrestricted type."""
    if get_origin(hint) is Annotated:
        own = next((mark for mark in hint.__metadata__ if isinstance(mark, Setting)), None)
        return own or setting_of(hint.__origin__)
    if get_origin(hint) is Literal:
        return one_of(*get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        parts = [setting_of(part) for part in get_args(hint)]
        literals = [value for part in get_args(hint) if get_origin(part) is Literal for value in get_args(part)]
        if literals and len(parts) == 2 and NULL in parts:
            return one_of(*literals, None)
        return None if None in parts else either(*parts)
    return _PLAIN.get(hint)


def entry_of(hint: object) -> object | None:
    """Return the value type of a mapping; None for other types."""
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Mapping:
            return get_args(part)[1]
    return None


def maybe_group(hint: object) -> Setting | None:
    """Return the values that stand for one of our components (a group, or null if allowed); None for other types."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    built = [part for part in parts if part is not type(None)]
    if not all(
        get_origin(part) is Callable or getattr(part, "__module__", "").startswith("palimpsest") for part in built
    ):
        return None
    return either(GROUP, NULL) if type(None) in parts else GROUP


def needs(hint: object) -> Needs | None:
    """Return the setting that brings an argument of this type into use, if it names one."""
    found = hint.__metadata__ if get_origin(hint) is Annotated else ()
    return next((mark for mark in found if isinstance(mark, Needs)), None)


@cache
def hints(build: Callable) -> Mapping[str, object]:
    """Return the arguments that a class or function accepts by name, with their types.

    If it passes on **arguments, they are looked up in the next class that has an `__init__`.
    """
    if dataclasses.is_dataclass(build):
        known = typing.get_type_hints(build, include_extras=True)
        return {field.name: known[field.name] for field in dataclasses.fields(build) if field.init}
    is_class = inspect.isclass(build)
    inits = [cls.__dict__["__init__"] for cls in build.__mro__ if "__init__" in cls.__dict__] if is_class else [build]
    found: dict[str, object] = {}
    for init in inits:
        known = _annotations(init)
        parameters = inspect.signature(init).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) and parameter.name != "self":
                hint = parameter.annotation  # text, or the type itself for samplers made from steps
                hint = known.get(parameter.name, object) if isinstance(hint, str) else hint
                found.setdefault(parameter.name, hint)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _annotations(function: Callable) -> dict[str, object]:
    """Return the types of a function's arguments; nothing if they name imports for type checkers only."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError:
        return {}
