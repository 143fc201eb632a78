"""The plan of the house, held: which way imports point, who reads the configuration, and what is kept private."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

# From the ground up: a room imports from rooms before it. Rooms of one line do not know each other.
FLOORS = (
    {"common"},
    {"process", "gaussian_process", "noise_schedule", "settings", "models"},
    {"denoisers", "data"},
    {"objectives", "samplers", "corpora", "training", "latents"},
    {"estimators", "dataloader", "diffusion"},
    {"evaluation", "classification"},
    {"report"},
    {"tasks"},
    {"experiment"},
    {"scripts", "main", "new"},
    {"app"},
)
# Two rooms of one floor that do: the first may import the second.
BESIDE = {("latents", "corpora"), ("classification", "evaluation"), ("main", "scripts")}
MAY_READ = {"experiment", "settings", "main"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its path in the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = (
        listed.stdout.split()
        if listed.returncode == 0
        else [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*.py")
            if not path.relative_to(ROOT).parts[0].startswith(".")
        ]
    )
    kept = [name for name in names if Path(name).parts[0] not in ("tests", "benchmarks") and (ROOT / name).exists()]
    return {name: ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in kept}


def room(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def imports(name: str) -> set[str]:
    """The rooms that a module imports from."""
    found = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("palimpsest"):
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
    return found - {room(name)}


@pytest.mark.parametrize("name", modules())
def test_doors_open_one_way(name):
    here = room(name)
    if here == "__init__":
        return
    floor = {one: number for number, rooms in enumerate(FLOORS) for one in rooms}
    assert here in floor, f"{here} is no room of FLOORS"
    wrong = {other for other in imports(name) if floor[other] >= floor[here] and (here, other) not in BESIDE}
    assert not wrong, f"{name} may not import {wrong}"


@pytest.mark.parametrize("name", modules())
def test_only_what_builds_reads_the_configuration(name):
    if room(name) in MAY_READ:
        return
    names = {node.id for node in ast.walk(modules()[name]) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(modules()[name]) if isinstance(node, ast.arg)}
    assert not names & {"cfg", "DictConfig", "OmegaConf"}


@pytest.mark.parametrize("name", modules())
def test_every_public_thing_says_what_it_is(name):
    tree = modules()[name]
    assert ast.get_docstring(tree) or name.endswith("__init__.py"), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_no_yaml_holds_a_program():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert "${eval:" not in path.read_text() and "__import__" not in path.read_text()


BELOW_THE_TOKENIZER = ("objectives", "samplers", "estimators", "evaluation", "tasks", "classification", "report",
                       "app", "denoisers", "diffusion")  # fmt: skip


def test_the_mask_is_known_to_its_process_and_to_the_tokenizer_alone():
    """Whatever else speaks of a mask's id asks the process for it, or says `blank_id`, which every process has."""
    for name in modules():
        if room(name) not in BELOW_THE_TOKENIZER:
            continue
        for node in ast.walk(modules()[name]):
            if isinstance(node, ast.Attribute) and node.attr == "mask_id":
                owner = ast.unparse(node.value).rpartition(".")[2]
                assert owner in ("process", "vocabulary"), f"{name}:{node.lineno}: {ast.unparse(node)}"
            assert not (isinstance(node, ast.arg) and node.arg == "mask_id"), f"{name}:{node.lineno}: an argument"


def test_nothing_is_probed():
    """Networks, objectives, denoisers and samplers declare what they can do (models/backbone.py, denoisers.py)."""
    for name in modules():
        text = (ROOT / name).read_text(encoding="utf-8")
        if room(name) in ("objectives", "samplers", "estimators", "diffusion", "denoisers"):
            assert "hasattr(" not in text, name
        if room(name) in ("diffusion", "denoisers"):
            assert "getattr(" not in text, name


def test_nobody_compares_the_names_of_targets():
    """Components are asked for their properties; no code compares the names of their classes."""
    for name, tree in modules().items():
        for node in ast.walk(tree):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            methods = (
                [node.func.value]
                if isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and (node.func.attr in ("startswith", "endswith"))
                else []
            )
            for side in (*sides, *methods):
                compared = isinstance(side, ast.Attribute) and side.attr == "_target_"
                assert not compared, f"{name}:{node.lineno}: {ast.unparse(node)}"
