"""The documentation: its site builds without a warning and without a network, and it names what exists."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import palimpsest
from tests.helpers.commands import ROOT

PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name not in ("log.md", "changelog.md")]


def test_the_site_builds_and_opens_without_a_network(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(module, reason="the site of the documentation: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert len(pages) >= len(PAGES)
    for name, page in pages.items():
        fetched = re.findall(r'<(?:script|img|iframe)[^>]*src="https?:[^"]*"|<link[^>]*stylesheet[^>]*https?:', page)
        assert not fetched and "arithmatex" not in page, name
    assert "<math" in pages["method.html"] and 'class="mermaid"' not in "".join(pages.values())
    documented = set(re.findall(r'id="palimpsest\.(?:\w+\.)*(\w+)"', pages["reference.html"]))
    assert set(palimpsest.__all__) <= documented


def test_the_navigation_and_the_pages_are_the_same():
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    there |= {f"notebooks/{path.stem}.md" for path in (ROOT / "docs/notebooks").glob("*.ipynb")}
    assert there <= listed
    assert listed <= there


def test_the_reference_lists_what_the_library_exports():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    for home, names in palimpsest._HOMES.items():
        blocks = re.findall(rf"::: palimpsest\.{home}\n.*?members: \[(.*?)\]", text, re.S)
        listed = {name for block in blocks for name in block.split(", ")}
        assert set(names) <= listed, f"{home}: {set(names) - listed}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    if page.name == "migrating.md":
        pytest.skip("it names files of other projects")
    text = re.sub(r"```.*?```|`[^`]*NAME[^`]*`|`samplers/mine.py`", "", page.read_text(encoding="utf-8"), flags=re.S)
    for name in re.findall(r"`((?:[a-z_0-9]+/)+[\w.-]+\.(?:py|sh|yaml|txt|jsonl|log|sbatch)|[a-z_]+\.py)`", text):
        assert (ROOT / name).exists(), name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_classification_by_hand_runs(capsys):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "classification.md").read_text("utf-8"), re.S)
    small = program.replace("STEPS, TEXTS, DRAWS = 300, 1000, 16", "STEPS, TEXTS, DRAWS = 2, 8, 2")
    assert small != program
    exec(compile(small, "classification.md", "exec"), {})
    assert len(re.findall(r"accuracy [01]\.\d", capsys.readouterr().out)) == 3
