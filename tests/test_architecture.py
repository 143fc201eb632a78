"""The plan of the house, held: which way imports point and who reads the configuration."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT

ROOMS = ("objectives", "samplers", "estimators", "tasks", "models", "text", "callbacks", "classification", "reporting",
         "engine", "app")  # fmt: skip
SHARED = {"randomness", "metrics"}  # numbers and their errors: they import nothing of ours
MAY_IMPORT = {
    "randomness": set(),
    "files": set(),
    "messages": set(),
    "metrics": set(),
    "noise_schedule": set(),
    "process": {"randomness"},
    "gaussian_process": set(),
    "denoisers": {"process", "gaussian_process", "noise_schedule"},
    "optimizers": set(),
    "lr_schedules": set(),
    "command_line": {"instantiation", "number_checks"},
    "contradictions": {"denoisers", "direction_checks", "instantiation", "process"},
    "number_checks": set(),
    "direction_checks": set(),
    "text": {"text", "files", "messages"},
    "models": {"models", "files", "messages"},
    "reporting": {"reporting"},
    "callbacks": {"callbacks", "files"},
    "engine": {"engine", "callbacks", "models", "files"},
    "identity": {"contradictions", "command_line", "messages"},
    "instantiation": set(),
    "file_settings": {"command_line", "contradictions", "models"},
    "machine": {"dataloader", "engine"},
    "classification": {"classification", "metrics"},
    "dataloader": {"text"},
    "objectives": {"objectives", "models", "denoisers", "process", "gaussian_process", "noise_schedule"} | SHARED,
    "samplers": {"samplers", "denoisers", "process", "gaussian_process", "noise_schedule"} | SHARED,
    "estimators": {"estimators", "denoisers", "objectives", "samplers", "process"} | SHARED,
    "diffusion": {"engine", "denoisers", "objectives", "process", "models"} | SHARED,
    "tasks": {
        "tasks",
        "callbacks",
        "classification",
        "denoisers",
        "diffusion",
        "estimators",
        "files",
        "objectives",
        "samplers",
        "reporting",
        "text",
    }
    | SHARED,
    "main": {
        "command_line",
        "contradictions",
        "dataloader",
        "diffusion",
        "engine",
        "estimators",
        "file_settings",
        "files",
        "identity",
        "instantiation",
        "machine",
        "models",
        "number_checks",
        "objectives",
        "process",
        "direction_checks",
        "tasks",
        "text",
    },  # fmt: skip
}
MAY_IMPORT["app"] = {"app", "main"} | MAY_IMPORT["main"] | MAY_IMPORT["tasks"]  # a page over all; nothing imports it
# May read the configuration.
CONFIGURED = {"main", "command_line", "contradictions", "number_checks", "direction_checks", "identity", "machine",
              "instantiation", "file_settings"}  # fmt: skip
FILES = sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))])


def room_of(path: Path) -> str:
    return path.stem if path.parent == ROOT else path.parent.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_doors_open_one_way(path):
    tree = ast.parse(path.read_text())
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    ours = imported & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[room_of(path)], f"{path.name} may not import {ours - MAY_IMPORT[room_of(path)]}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if not (p.parent == ROOT and p.stem in CONFIGURED)], ids=lambda p: p.stem
)
def test_only_main_reads_the_configuration(path):
    names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.arg)}
    assert not names & {"cfg", "DictConfig", "OmegaConf"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_thing_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.name == "__init__.py", "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_no_yaml_holds_a_program():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert "${eval:" not in path.read_text() and "__import__" not in path.read_text()


BELOW_THE_TOKENIZER = ("objectives", "samplers", "estimators", "tasks", "classification", "callbacks", "reporting",
                       "app", "denoisers.py", "diffusion.py")  # fmt: skip


def test_the_mask_is_known_to_its_process_and_to_the_tokenizer_alone():
    """Whatever else speaks of a mask's id asks the process for it, or says `blank_id`, which every process has."""
    files = [
        file
        for name in BELOW_THE_TOKENIZER
        for file in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "mask_id":
                owner = ast.unparse(node.value).rpartition(".")[2]
                assert owner in ("process", "vocabulary"), f"{file.name}:{node.lineno}: {ast.unparse(node)}"
            assert not (isinstance(node, ast.arg) and node.arg == "mask_id"), f"{file.name}:{node.lineno}: an argument"


def test_nothing_is_probed():
    """Networks, objectives, denoisers and samplers declare what they can do (models/backbone.py, denoisers.py)."""
    for room in ("objectives", "samplers", "estimators"):
        for file in (ROOT / room).glob("*.py"):
            assert "hasattr(" not in file.read_text(encoding="utf-8"), file
    for file in (ROOT / "diffusion.py", ROOT / "denoisers.py"):
        text = file.read_text(encoding="utf-8")
        assert "hasattr(" not in text and "getattr(" not in text, file
