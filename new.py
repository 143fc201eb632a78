"""python -m palimpsest.new objective|sampler|data NAME: write the files of a new part, which run as they are.

An objective and a sampler begin as the worked examples of CONTRIBUTING.md under a new name. In a clone without the
package installed: `python new.py ...`.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
_EXAMPLES = {"objective": ("plain", "Plain"), "sampler": ("left_to_right", "LeftToRight")}
_GROUPS = {"objective": "parameterization", "sampler": "sampler", "data": "data"}
_SECTIONS = ("What it is", "Equation and source", "Command", "Options", "What it costs", "Limits")

_DATA_YAML = """\
# {name}: say here what the texts are, where they come from and under which licence.
# $DATA_DIR/{name}/{{train,test}}.jsonl with a column `text`, else the Hub. A tenth of train is held out for validation.
defaults:
  - /texts@_here_: default
  - _self_
name: {name}
train: {name}
valid: {name}
source:
  _target_: palimpsest.data.sources.HubOrFolder
  hub_id: someone/{name}
  folder: {name}
  files: {{train: train.jsonl, test: test.jsonl}}
  hub_splits: {{train: train, test: test}}
  validation_share: 0.1
tokenizer_name_or_path: gpt2    # a Hub name or a folder; trained here: char, word, bpe (with vocab_size); byte
wrap: true
"""
_DATA_TEST = '''\
"""data={name} reads its files."""

from __future__ import annotations

import json

from palimpsest.experiment.experiment import Experiment
from palimpsest.settings.command_line import compose_config


def test_it_reads_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    (tmp_path / "{name}").mkdir()
    rows = [json.dumps({{"text": f"text number {{i}}"}}) for i in range(100)]
    (tmp_path / "{name}/train.jsonl").write_text("\\n".join(rows))
    (tmp_path / "{name}/test.jsonl").write_text("\\n".join(rows[:10]))
    words = ["data={name}", "data.tokenizer_name_or_path=byte", "model.length=32", f"data.cache_dir={{tmp_path}}/cache"]
    data = Experiment(compose_config(words), "a test").build.data()
    assert len(data.texts("validation")) == len(data.texts("test")) == 10 and len(data.texts("train")) >= 80
'''


def files(kind: str, name: str) -> dict[str, str]:
    """Return what is written for a new part: path in the repository -> text."""
    if kind == "data":
        made = {
            f"configs/data/{name}.yaml": _DATA_YAML.format(name=name),
            f"tests/data/test_{name}.py": _DATA_TEST.format(name=name),
        }
    else:
        old, old_class = _EXAMPLES[kind]
        new_class = "".join(part.capitalize() for part in name.split("_"))
        text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
        blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text, re.S)
        made = {
            path.replace(old, name): _renamed(body, {old_class: new_class, old: name})
            for path, body in blocks
            if Path(path).stem.removeprefix("test_") == old
        }
    page = "docs/data" if kind == "data" else f"docs/{kind}s"
    return {**made, f"{page}/{name}.md": _page(kind, name)}


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """Replace whole identifiers, also as a part of others."""
    for old, new in names.items():
        text = re.sub(rf"(?<![a-z]){old}(?![a-z])", new, text)
    return text


def _page(kind: str, name: str) -> str:
    """Return the page of a part, with the sections that all pages have."""
    example = f"```bash\npython main.py {_command(kind, name)}\n```"
    parts = [f"## {title}\n\n{example if title == 'Command' else 'To be written.'}" for title in _SECTIONS]
    return "\n\n".join([f"# {name}", *parts]) + "\n"


def _command(kind: str, name: str) -> str:
    return f"mode=sample_eval sampling.predictor={name}" if kind == "sampler" else f"{_GROUPS[kind]}={name}"


def _navigation(text: str, kind: str, name: str) -> str:
    """Return mkdocs.yml with the new page behind the last one of its kind."""
    lines = text.splitlines(keepends=True)
    folder = "data" if kind == "data" else f"{kind}s"
    known = [i for i, line in enumerate(lines) if re.search(rf": {folder}[/.]\S*md$", line.rstrip())]
    indent = lines[known[-1]].partition("-")[0]
    lines.insert(known[-1] + 1, f"{indent}- {name}: {folder}/{name}.md\n")
    return "".join(lines)


def write(kind: str, name: str, root: Path = ROOT) -> list[Path]:
    """Write the files of a new part into the repository at `root`; return their paths.

    Raises:
        ValueError: the name is no identifier, or one of the files exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"NAME={name} must be lower case letters, digits and _, as a file of Python is named")
    made = {root / path: text for path, text in files(kind, name).items()}
    there = [str(path.relative_to(root)) for path in made if path.exists()]
    if there:
        raise ValueError(f"NAME={name}: {', '.join(there)} exists; choose another name")
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    site = root / "mkdocs.yml"
    site.write_text(_navigation(site.read_text(encoding="utf-8"), kind, name), encoding="utf-8")
    return list(made)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the scaffold from the command line: write the files of a new objective, sampler or data set."""
    parser = argparse.ArgumentParser(prog="palimpsest.new", description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=list(_GROUPS))
    parser.add_argument("name")
    typed = parser.parse_args(arguments)
    if not (ROOT / "CONTRIBUTING.md").exists():
        parser.error(f"{ROOT} is no clone of the repository; run this in one, as python new.py ...")
    try:
        made = write(typed.kind, typed.name)
    except ValueError as error:
        parser.error(str(error))
    for path in made:
        print(path.relative_to(ROOT))
    print(f"\nrun it:  python main.py {_command(typed.kind, typed.name)}")
    own = next(path.relative_to(ROOT) for path in made if path.suffix == ".py")
    print(
        f"test it: {'python -m pytest' if own.parts[0] == 'tests' else 'make check'} {own}".replace(
            "check ", "check FILE="
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
