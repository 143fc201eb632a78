"""Types of settings, read from the source text of signatures: fast, because nothing is imported.

Once the components are imported, `common/values.py` reads their types instead. A mark must stand in the signature
itself, because an alias that contains it is not looked up here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

import yaml

from palimpsest.settings.names import PACKAGE, current
from palimpsest.settings.wiring import WIRING

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
REFERENCE = re.compile(r"\$\{([\w.]+)\}")


@cache
def annotation(target: str, argument: str) -> str:
    """Return the type of an argument of the class or function at the path `target`, as it is written; "" for none."""
    node = _definition(current(target))
    if isinstance(node, ast.ClassDef):
        inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        if not inits:
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return next((ast.unparse(f.annotation) for f in fields if ast.unparse(f.target) == argument), "")
        node = inits[0]
    if node is None:
        return ""
    for given in (*node.args.args, *node.args.kwonlyargs):
        if given.arg == argument and given.annotation is not None:
            return ast.unparse(given.annotation)
    return ""


@cache
def readers(key: str) -> tuple[tuple[str, str], ...]:
    """Return the arguments that a file in configs/ or the code hands a setting to: (target, argument)."""
    return _index().get(key, ())


def is_path(key: str) -> bool:
    """Return True if a setting is a path: ~ in it is the home folder."""
    return any(re.search(r"\b(FilePath|PresentPath)\b", text) for text in _annotations(key))


def takes_texts(key: str) -> bool:
    """Return True if a setting takes texts of any letters, or lists of such."""
    texts = r"\b(FilePath|PresentPath|FolderName|Name|str)\b"
    return any(re.search(texts, re.sub(r"Mapping\[.*?\]", "", text)) for text in _annotations(key))


def takes_lists(key: str) -> bool:
    """Return True if a setting takes a list."""
    return any("Sequence[" in text for text in _annotations(key))


def takes_numbers(key: str) -> bool:
    """Return True if a setting takes whole numbers."""
    return any(re.search(r"\b(int|Natural|AtLeastOne|Count)\b", text) for text in _annotations(key))


def marks(at: str, target: str | None, present: Collection[str]) -> frozenset[str]:
    """Return the marks (common/values.py) of a setting: those of the argument that stands at `at`, of the component
    `target`, or of the arguments that it is handed to, if there are any among the components `present`."""
    if target is not None:
        own = _marks_in(annotation(target, at.rpartition(".")[2])) - {"COPY"}
        return own - {"LATER"} | {"FREE"} if "LATER" in own else own
    everywhere = readers(at)
    here = [reader for reader in everywhere if current(reader[0]) in present or reader[0] in WIRING]
    found = [_marks_in(annotation(*reader)) for reader in here or everywhere]
    if not found:
        return frozenset()
    free = {"FREE"} if all("FREE" in own for own in found) else set()
    return frozenset().union(*found) - {"FREE", "LATER"} | free


def _marks_in(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\b(FREE|IF_SET|LATER|COPY)\b", text))


def _annotations(key: str) -> list[str]:
    found = [annotation(*reader) for reader in readers(key)]
    group, _, name = key.rpartition(".")
    own = [annotation(target, name) for target in _targets().get(group, ())]
    own += [text for other in _scanned()[2].get(key, ()) for text in _annotations(other)]
    return [text for text in (*found, *own) if text]


@cache
def _scanned() -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[str]], dict[str, list[str]]]:
    keys: dict[str, list[tuple[str, str]]] = {}
    refers: dict[str, list[str]] = {}
    targets: dict[str, list[str]] = {}
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


@cache
def _index() -> dict[str, tuple[tuple[str, str], ...]]:
    return {key: tuple(dict.fromkeys(found)) for key, found in _scanned()[0].items()}


def _targets() -> dict[str, list[str]]:
    """Return the components that stand at a place of the configuration."""
    return _scanned()[1]


def absolute(at: str, reference: str) -> str:
    """Return the key that an interpolation at `at` means; a dot at its beginning is the group that it stands in."""
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
    """Return the source of a class, function or method of ours; of a sampler made of a step, that of the step."""
    if not target.startswith(PACKAGE):
        return None
    parts = target.removeprefix(PACKAGE).split(".")
    for end in range(len(parts) - 1, 0, -1):
        file = ROOT.joinpath(*parts[:end]).with_suffix(".py")
        if file.is_file():
            return _within(_tree(file), parts[end:])
    return None


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _within(tree: ast.Module, names: list[str]) -> ast.ClassDef | ast.FunctionDef | None:
    node = tree
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
