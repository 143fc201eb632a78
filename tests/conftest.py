"""Shared fixtures: the real data and the reference implementations' golden numbers, where they lie; small networks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed
from tokenizers import Tokenizer

import main  # noqa: F401 - makes the folder of this checkout the package, wherever another one is installed
from palimpsest.data.built_tokenizers import BUILDERS
from palimpsest.data.cache import texts_fingerprint
from palimpsest.models.dit import DiT
from palimpsest.report import svg
from tests.helpers.commands import ROOT, TINY, experiment
from tests.helpers.composing import compositions_are_remembered

os.environ.setdefault("HF_HUB_OFFLINE", "1")
GOLDEN = ROOT / "tests/golden"
SERIALISE = svg._svg
_LONGEST = ("settings/test_settings", "test_configs", "test_readme", "training/test_distributed", "models/test_hub",
            "data/test_data_configs", "tasks/test_block_runs", "settings/test_fingerprints", "app/test_app",
            "training/test_signals", "models/test_hf_causal", "training/test_resume", "training/test_faults",
            "classification/test_class_training", "estimators/test_estimators", "tasks/test_direction_runs",
            "training/test_slurm", "test_package", "test_contributing", "data/test_streaming", "test_notebooks",
            "settings/test_sweeps", "scripts/test_generate", "scripts/test_screen",
            "training/test_training_metrics")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first. `make test` gives whole modules to its three processes, in this order."""
    place = {f"tests/{name}.py": number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


@pytest.fixture(autouse=True, scope="session")
def processes_import_this_checkout(tmp_path_factory):
    """Processes that a test starts have the package from here too, wherever another one is installed."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "palimpsest").symlink_to(ROOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture(autouse=True, scope="session")
def files_of_the_configuration_are_composed_once():
    with compositions_are_remembered():
        yield


@pytest.fixture(autouse=True, scope="session")
def vocabularies_are_built_once():
    """Most tests train on one corpus in a folder of their own; building its vocabulary takes longer than training."""
    build, built = BUILDERS["word"], {}

    def once(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        texts = list(texts)
        key = texts_fingerprint(texts), vocab_size
        if key not in built:
            built[key] = build(texts, vocab_size).to_str()
        return Tokenizer.from_str(built[key])

    BUILDERS["word"] = once
    yield
    BUILDERS["word"] = build


@pytest.fixture(autouse=True, scope="session")
def most_figures_are_not_serialised():
    """Writing a figure as SVG takes a third of a small run. The runs of README and guides, and all commands in
    processes of their own, write theirs; so do the tests of the pages (`real_figures`)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(svg, "_svg", lambda *_: '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 6 3"/>')
        yield


@pytest.fixture
def real_figures(monkeypatch):
    monkeypatch.setattr(svg, "_svg", SERIALISE)


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A training with strategy=ddp leaves one, which processes that are forked later would find."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def data_dir() -> Path:
    if "DATA_DIR" not in os.environ:
        pytest.skip("needs real data: set DATA_DIR to a folder with imdb/, wikitext2/, gpt2_tokenizer/, ...")
    return Path(os.environ["DATA_DIR"])


@pytest.fixture
def fixtures_dir(data_dir: Path) -> Path:
    path = data_dir.parent / "fixtures"
    if not path.exists():
        pytest.skip("needs the reference implementations' golden numbers: a folder fixtures/ beside DATA_DIR")
    return path


@pytest.fixture
def random_dit():
    """A small DiT with random weights everywhere, also where training starts from zero; float64, so that identities
    are tight."""

    def build(vocab_size: int = 5, seed: int = 0, **kwargs) -> DiT:
        torch.manual_seed(seed)
        net = DiT(vocab_size, hidden_size=16, cond_dim=8, n_blocks=2, n_heads=2, dropout=0.0, **kwargs).double()
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return net.eval()

    return build


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of tokenizers and rows for the tests of one module."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def untrained(tmp_path, monkeypatch, cache):
    """An untrained model on a few reviews, built from overrides."""
    monkeypatch.chdir(tmp_path)

    def build(*overrides: str):
        built = experiment(*TINY, f"data.cache_dir={cache}", *overrides)
        data = built.build.data()
        diffusion = built.build.diffusion(data).eval()
        torch.nn.init.normal_(diffusion.backbone.head.weight, generator=torch.Generator().manual_seed(0))
        return built, data, diffusion

    return build


@pytest.fixture
def gsm8k(tmp_path, monkeypatch):
    """Forty small problems of the same form as the real ones, and twelve to answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    (tmp_path / "gsm8k").mkdir()
    for split, numbers in (("train", range(40)), ("test", range(12, 24))):
        rows = [{"question": f"Ann has {n} pens and buys {n % 7} more{' pens' * (n % 3)}. How many are there?",
                 "answer": f"There are <<{n}+{n % 7}={n + n % 7}>>{n + n % 7} pens.\n#### {n + n % 7}"}
                for n in numbers]  # fmt: skip
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path
