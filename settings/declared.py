"""Types of settings, read from the source text of signatures, which is fast because nothing is imported.

Once the components are imported, `common/values.py` reads their types instead. A mark must be in the signature itself,
because an alias that contains it is not resolved here.
"""

import ast
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import yaml

from palimpsest.settings.names import PACKAGE, current_path
from palimpsest.settings.wiring import WIRING

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
REFERENCE = re.compile(r"\$\{([\w.]+)\}")


@cache
def annotation(target: str, argument: str) -> str:
    """Return the source text of the type of an argument of the component `target`; "" if there is none."""
    node = _definition(current_path(target))
    if isinstance(node, ast.ClassDef):
        inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        if not inits:
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return next((ast.unparse(f.annotation) for f in fields if ast.unparse(f.target) == argument), "")
        node = inits[0]
    if node is None:
        return ""
    given = [one for one in (*node.args.args, *node.args.kwonlyargs) if one.arg == argument and one.annotation]
    return ast.unparse(given[0].annotation) if given else ""


@cache
def readers(key: str) -> tuple[tuple[str, str], ...]:
    """Return the arguments that receive a setting from configs/ or the code: (target, argument)."""
    return tuple(dict.fromkeys(_scanned()[0].get(key, ())))


def is_path(key: str) -> bool:
    """Return True if a setting is a path, in which ~ is the home folder."""
    return any(re.search(r"\b(FilePath|PresentPath)\b", text) for text in _annotations(key))


def takes_texts(key: str) -> bool:
    """Return True if a setting accepts arbitrary texts, or lists of them."""
    texts = r"\b(FilePath|PresentPath|FolderName|Name|str)\b"
    return any(re.search(texts, re.sub(r"Mapping\[.*?\]", "", text)) for text in _annotations(key))


def takes_lists(key: str) -> bool:
    """Return True if a setting accepts a list."""
    return any("Sequence[" in text for text in _annotations(key))


def takes_numbers(key: str) -> bool:
    """Return True if a setting accepts whole numbers."""
    return any(re.search(r"\b(int|Natural|AtLeastOne|Count)\b", text) for text in _annotations(key))


def marks(at: str, target: str | None, present: Collection[str]) -> frozenset[str]:
    """Return the marks (common/values.py) of a setting.

    Args:
        at: key of the setting.
        target: component whose argument it is; None for a setting of no component, which takes the marks of the
            arguments that receive it.
        present: components of the configuration; if some of them receive it, others do not count.
    """
    if target is not None:
        own = _marks_in(annotation(target, at.rpartition(".")[2])) - {"COPY"}
        return own - {"ADDED_LATER"} | {"FREE"} if "ADDED_LATER" in own else own
    everywhere = readers(at)
    here = [reader for reader in everywhere if current_path(reader[0]) in present or reader[0] in WIRING]
    found = [_marks_in(annotation(*reader)) for reader in here or everywhere]
    if not found:
        return frozenset()
    free = {"FREE"} if all("FREE" in own for own in found) else set()
    return frozenset().union(*found) - {"FREE", "ADDED_LATER"} | free


def _marks_in(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\b(FREE|IF_SET|ADDED_LATER|COPY)\b", text))


def _annotations(key: str) -> list[str]:
    found = [annotation(*reader) for reader in readers(key)]
    group, _, name = key.rpartition(".")
    own = [annotation(target, name) for target in _scanned()[1].get(group, ())]
    own += [text for other in _scanned()[2].get(key, ()) for text in _annotations(other)]
    return [text for text in (*found, *own) if text]


@cache
def _scanned() -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[str]], dict[str, list[str]]]:
    """Return, for each key of configs/, its readers, its components, and the keys that it refers to."""
    keys: dict[str, list[tuple[str, str]]] = {}
    targets: dict[str, list[str]] = {}
    refers: dict[str, list[str]] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        content = _Loader(text).get_single_data() or {}
        inside = path.parent != CONFIGS and "@package _global_" not in text
        for place, target, arguments in _components(content, path.parent.name if inside else ""):
            targets.setdefault(place, []).append(target)
            for argument, value in arguments.items():
                if isinstance(value, str) and (reference := REFERENCE.fullmatch(value)):
                    key = absolute(f"{place}.{argument}", reference[1])
                    keys.setdefault(key, []).append((target, argument))
                    refers.setdefault(f"{place}.{argument}", []).append(key)
    for target, wired in WIRING.items():
        for argument, key in wired.items():
            keys.setdefault(key, []).append((target, argument))
    return keys, targets, refers


def absolute(at: str, reference: str) -> str:
    """Return the key that an interpolation at `at` refers to; leading dots are relative to its group."""
    dots = len(reference) - len(reference.lstrip("."))
    return ".".join([*at.split(".")[:-dots], reference[dots:]]) if dots else reference


def _components(node: object, place: str) -> Iterator[tuple[str, str, dict[str, object]]]:
    if not isinstance(node, dict):
        return
    if isinstance(node.get("_target_"), str):
        yield place, node["_target_"], {name: value for name, value in node.items() if not name.startswith("_")}
    for name, value in node.items():
        yield from _components(value, f"{place}.{name}" if place else str(name))


def _definition(target: str) -> ast.ClassDef | ast.FunctionDef | None:
    """Return the source of one of our classes, functions or methods; for a sampler made from a step, the step's."""
    if not target.startswith(PACKAGE):
        return None
    parts = target.removeprefix(PACKAGE).split(".")
    for end in range(len(parts) - 1, 0, -1):
        file = ROOT.joinpath(*parts[:end]).with_suffix(".py")
        if file.is_file():
            return _definition_in(_tree(file), parts[end:])
    return None


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _definition_in(node: ast.Module, names: list[str]) -> ast.ClassDef | ast.FunctionDef | None:
    for name in names:
        found = [part for part in node.body if isinstance(part, ast.ClassDef | ast.FunctionDef) and part.name == name]
        assigned = [part for part in node.body if isinstance(part, ast.Assign)]
        made = [part.value for part in assigned if ast.unparse(part.targets[0]) == name]
        if not found and made and isinstance(made[0], ast.Call):  # sample = sampler_of(Step, Process)
            step = ast.unparse(made[0].args[0])
            found = [part for part in node.body if isinstance(part, ast.ClassDef) and part.name == step]
        if not found:
            return None
        node = found[0]
    return node
