"""Hooks of mkdocs for `make docs`: the site needs no network, and the API reference finds the package.

Equations become MathML, which browsers show without a script. The one script that the theme fetches, which makes the
search work from disk, is served from docs/javascripts.
"""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / ".cache" / "docs" / "palimpsest"
_SCRIPT = re.compile(r'src="https://[^"]*/iframe-worker/shim"')
_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.S)


def on_startup(**_: object) -> None:
    """Copy the package to a folder of its own name, which a clone need not have; mkdocstrings reads it there."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.suffix == ".py":
            shutil.copy(path, PACKAGE)
        elif (path / "__init__.py").exists() and path.name not in ("tests", "benchmarks"):
            shutil.copytree(path, PACKAGE / path.name, ignore=shutil.ignore_patterns("__pycache__"))


def on_files(files: Files, config: MkDocsConfig, **_: object) -> Files:
    """Make a page of each notebook, with what its cells gave when it was last run."""
    from mkdocs.structure.files import File

    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(json.loads(path.read_text(encoding="utf-8")), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let links to notebooks lead to their pages; in the repository they lead to the notebooks themselves."""
    return re.sub(r"\((notebooks/\w+)\.ipynb\)", r"(\1.md)", markdown)


def notebook_page(notebook: dict, name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the pictures that it shows, by file name."""
    parts = []
    pictures = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = f"{name}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode(data["image/png"])
                parts.append(f"![output of the cell above]({picture})")
                continue
            text = "".join(output.get("text", data.get("text/plain", "")))
            if text.strip() and output.get("name") != "stderr":
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.append(f"The notebook itself is `docs/notebooks/{name}.ipynb`.")
    return "\n\n".join(parts) + "\n", pictures


def on_page_content(content: str, **_: object) -> str:
    """Replace the equations of a page, which pymdownx.arithmatex has marked, by MathML."""
    from latex2mathml.converter import convert

    def mathml(found: re.Match) -> str:
        tag, bracket, latex = found.groups()
        display = "block" if bracket == "[" else "inline"
        return f'<{tag} class="equation">{convert(html.unescape(latex), display=display)}</{tag}>'

    return _EQUATION.sub(mathml, content)


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Let a page take the search's script from the site itself."""
    return _with_own_script(output, "../" * page.url.count("/"))


def on_post_template(output_content: str, template_name: str, **_: object) -> str:
    """Do the same as `on_post_page` for 404.html."""
    return _with_own_script(output_content, "") if template_name.endswith(".html") else output_content


def _with_own_script(page: str, root: str) -> str:
    return _SCRIPT.sub(f'src="{root}javascripts/iframe-worker.js"', page)
