"""The package: as a wheel, installed to be edited, in a plain clone, and beside folders of the same names."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import palimpsest
from palimpsest.app import __main__ as app
from tests.helpers.commands import ROOT

SKIPPED = shutil.ignore_patterns(
    ".git", ".venv", "outputs", ".cache", "__pycache__", ".pytest_cache", ".ruff_cache", "*.egg-info", "build"
)
FOREIGN = {
    "models": "raise ImportError('the models of somebody else')",
    "text": "",
    "data": "raise ImportError('theirs')",
}


def test_what_the_package_says_of_itself_is_what_its_project_file_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert palimpsest.__version__ == project["version"]
    assert project["optional-dependencies"]["app"] == [app._NEEDED]


def run(python: Path, *words: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Return the output of a Python process, which must succeed."""
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DATA_DIR")}
    done = subprocess.run(
        [python, *map(str, words)], cwd=cwd, capture_output=True, text=True, env={**plain, **(env or {})}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of what is in the repository, under a name of its own."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("clone") / "somewhere", ignore=SKIPPED))


def venv(folder: Path) -> Path:
    """The Python of a clean environment that has what this one has, but no palimpsest."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib"))  # a .pth within it is not followed
    return python


def install(python: Path, *words: object) -> None:
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", "--disable-pip-version-check", *words]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True)


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder of somebody whose own folders are called as rooms of ours."""
    for name, text in FOREIGN.items():
        (tmp_path / "notebook" / name).mkdir(parents=True)
        (tmp_path / "notebook" / name / "__init__.py").write_text(text)
    return tmp_path / "notebook"


WHERE = "import palimpsest, palimpsest.models.dit as dit; print(palimpsest.__file__); print(dit.DiT.__module__)"


def test_a_wheel_brings_all_that_runs(clone, tmp_path, elsewhere):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        clone,
    ]
    subprocess.run([str(word) for word in command], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"palimpsest"}
    ours = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    apart = ("tests", "benchmarks", "docs", ".github", "requirements.yaml")
    kinds = (".py", ".yaml", ".css", ".js", ".j2")
    carried = [name for name in ours if name.endswith(kinds) and name.split("/")[0] not in apart]
    assert not {f"palimpsest/{name}" for name in carried} - set(names)
    python = venv(tmp_path / "env")
    install(python, wheel)
    place, module = run(python, "-c", WHERE, cwd=elsewhere).split()
    assert str(tmp_path / "env") in place and module == "palimpsest.models.dit"
    said = run(python.with_name("palimpsest"), "--help", cwd=elsewhere)
    assert "mode=classify" in said


def test_an_editable_install_is_the_folder(clone, tmp_path, elsewhere):
    python = venv(tmp_path / "env")
    install(python, "-e", clone)
    place, _ = run(python, "-c", WHERE, cwd=elsewhere).split()
    assert Path(place) == clone / "__init__.py"


def test_a_plain_clone_runs_and_is_itself_whatever_is_installed(clone, tmp_path, elsewhere):
    python = venv(tmp_path / "env")
    said = run(python, clone / "main.py", "data=reviews", "--cfg", "job", "--package", "data.source", cwd=elsewhere)
    assert "palimpsest.corpora.reviews.GeneratedReviews" in said
    program = f"import sys; sys.argv = ['main.py']; import runpy; runpy.run_path({str(clone / 'main.py')!r}); {WHERE}"
    assert run(sys.executable, "-c", program, cwd=elsewhere).split()[0] == str(clone / "__init__.py")


def test_the_packages_of_the_wheel_are_the_rooms():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    rooms = {
        ".".join(["palimpsest", *Path(name).parent.parts])
        for name in files
        if Path(name).parts[0] not in ("tests", "benchmarks")
    }
    assert set(listed) == rooms | {"palimpsest.configs"}


def test_nothing_is_imported_by_its_bare_name():
    """Else two copies of one module would live side by side."""
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    bare = {Path(name).parts[0].removesuffix(".py") for name in files} - {"tests", "benchmarks"}
    for name in files:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "sys.path" not in text or name.startswith("tests/"), name
        for node in ast.walk(ast.parse(text)):
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            module += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            allowed = {"main"} if name == "tests/conftest.py" else set()
            assert not {one.split(".")[0] for one in module} & bare - allowed, f"{name}: {module}"
