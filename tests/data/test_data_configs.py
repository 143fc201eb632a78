"""Public data sets: each configuration requests the right Hub data, reads the same texts from a local folder in the
documented layout, streams no further than its limit, and trains."""

from __future__ import annotations

import json
import os
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
from hydra.utils import instantiate

from palimpsest.data.streaming import Order
from palimpsest.data.tokenizers import decode
from palimpsest.dataloader import Loading
from palimpsest.settings.command_line import compose_config, explain
from tests.helpers.commands import ROOT, TINY, run
from tests.helpers.texts import SETTINGS as KNOWN
from tests.helpers.texts import text_data

REAL_DATA = os.environ.get("DATA_DIR")
REFERENCE = [
    "ag_news", "lambada", "lm1b", "lm1b-gpt2", "lm1b-streaming", "lm1b-wrap", "openwebtext", "openwebtext-split",
    "openwebtext-streaming", "ptb", "scientific_papers_arxiv", "scientific_papers_pubmed", "text8", "text8-crop",
    "wikitext103", "wikitext2",
]  # fmt: skip
PARQUET = "refs/convert/parquet"
LM1B = ("billion-word-benchmark/lm1b", None, PARQUET)
TEXT8 = ("afmck/text8", None, None)


@dataclass
class Asked:
    """The Hub request of a configuration, and examples of its raw and detokenised texts."""

    repository: tuple[str, str | None, str | None]  # id, configuration, revision
    splits: dict[str, str]
    column: str = "text"
    detokenizer: str | None = None
    raw: str = "Text {} , as it is ."
    cooked: str = "Text {} , as it is ."
    extra: dict[str, list] = field(default_factory=dict)


OWN = {"train": "train", "validation": "validation", "test": "test"}
WIKI = {"detokenizer": "wikitext", "raw": " Text {} , as it @-@ is . \n", "cooked": " Text {}, as it-is."}
SCIENCE = {"splits": OWN, "column": "article", "detokenizer": "scientific_papers", "raw": "text {} , as ( it ) is",
           "cooked": "text {}, as (it) is"}  # fmt: skip
NEWS = {"detokenizer": "lm1b", "raw": "Text {} , as it is .", "cooked": "Text {}, as it is.",
        "splits": {"train": "train[30000:]", "validation": "train[:30000]", "test": "test"}}  # fmt: skip
ASKED = {
    "lambada": Asked(("EleutherAI/lambada_openai", "default", None), {"validation": "test", "test": "test"},
                     detokenizer="lambada", raw="“Text {}” as it is ", cooked='\n"Text {}" as it is'),
    "lm1b": Asked(LM1B, **NEWS), "lm1b-gpt2": Asked(LM1B, **NEWS), "lm1b-wrap": Asked(LM1B, **NEWS),
    "lm1b-streaming": Asked(LM1B, **NEWS),
    "openwebtext": Asked(("Skylion007/openwebtext", None, None), {"train": "train"}),
    "openwebtext-streaming": Asked(("Skylion007/openwebtext", None, None), {"train": "train"}),
    "openwebtext-split": Asked(("Skylion007/openwebtext", None, None),
                               {"train": "train[:-100000]", "validation": "train[-100000:]"}),
    "ptb": Asked(("ptb-text-only/ptb_text_only", None, PARQUET), OWN, "sentence", "ptb",
                 "text {} is n't for $ N million", "text {} isn't for $1 million"),
    "scientific_papers_arxiv": Asked(("ccdv/arxiv-summarization", "document", None), **SCIENCE),
    "scientific_papers_pubmed": Asked(("ccdv/pubmed-summarization", "document", None), **SCIENCE),
    "wikitext103": Asked(("Salesforce/wikitext", "wikitext-103-raw-v1", None), OWN, **WIKI),
    "wikitext2": Asked(("Salesforce/wikitext", "wikitext-2-raw-v1", None), OWN, **WIKI),
    "ag_news": Asked(("fancyzhx/ag_news", None, None), {"test": "test"}, extra={"label": [0]}),
}  # fmt: skip


def rows_of(asked, count=40):
    texts = [asked.raw.format(i) for i in range(count)]
    others = {name: values * count for name, values in asked.extra.items()} | {"other": [1] * count}
    return datasets.Dataset.from_dict({asked.column: texts} | others)


def sliced(rows, expression):
    name, _, part = expression.partition("[")
    start, _, stop = part.rstrip("]").partition(":")
    return rows.select(range(*slice(int(start or 0), int(stop) if stop else None).indices(len(rows))))


def module(name, tmp_path, *overrides, **settings):
    data = compose_config([f"data={name}", *overrides])
    known = KNOWN - {"cache_dir"}
    values = {key: value for key, value in data.data.items() if key in known} | settings
    source = instantiate(data.data.source)
    return text_data(source, length=data.model.length, cache_dir=tmp_path / "cache", **values)


def source_of(name, *overrides):
    return instantiate(compose_config([f"data={name}", *overrides]).data.source)


def shrunk(name):
    """Return overrides that make the fixed slices fit 40 rows."""
    if name.startswith("lm1b"):
        files = {"train": "train*.*[10:]", "validation": "train*.*[:10]"}
    elif name == "openwebtext-split":
        files = {"train": "train*.*[:-10]", "validation": "train*.*[-10:]"}
    else:
        return []
    return [f"data.source.files.{split}='{file}'" for split, file in files.items()]


def write_folder(root, name, kind="parquet"):
    """Write the 40 rows of each split in the layout of the configuration's header."""
    asked, source = ASKED[name], compose_config([f"data={name}"]).data.source
    source = source.sources.openwebtext if "sources" in source else source
    folder = root / source.folder
    folder.mkdir(parents=True)
    for stem in ("train", "valid", "test"):
        rows = rows_of(asked)
        if kind == "parquet":
            rows.to_parquet(folder / f"{stem}.parquet")
        elif kind == "jsonl":
            (folder / f"{stem}.jsonl").write_text("\n".join(map(json.dumps, rows.to_list())))
        else:
            (folder / f"{stem}.txt").write_text("\n\n".join(text.rstrip("\n") for text in rows[asked.column]))


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.delenv("DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("the Hub was asked"))


def test_all_data_sets_of_the_reference_are_there():
    assert set(REFERENCE) <= {path.stem for path in (ROOT / "configs" / "data").glob("*.yaml")}
    assert set(ASKED) | {"text8", "text8-crop"} == set(REFERENCE)


def test_the_table_of_data_sets_names_each_with_its_hub_id():
    table = (ROOT / "docs" / "data.md").read_text().split("\n## ")[0]
    assert {path.stem for path in (ROOT / "configs" / "data").glob("*.yaml")} <= set(re.findall("`([^`]*)`", table))
    for name, asked in ASKED.items():
        (line,) = [line for line in table.split("\n") if line.startswith(f"| `{name}` ")]
        assert asked.repository[0] in line or "as `" in line, name
    assert "afmck/text8" in table
    assert "docs/data.md" in (ROOT / "README.md").read_text()


# -------------------------------------------------------------------------------- the Hub


@pytest.mark.parametrize("name", sorted(ASKED))
def test_the_hub_is_asked_for_the_right_thing(name, monkeypatch):
    asked, calls = ASKED[name], []

    def load_dataset(hub_id, config, *, split, revision):
        calls.append(((hub_id, config, revision), split))
        return sliced(rows_of(asked, 40), split.replace("30000", "10").replace("100000", "10"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = source_of(name)
    for split, expression in asked.splits.items():
        texts = source.load(split)["text"][:]
        assert calls.pop() == (asked.repository, expression)
        numbers = sliced(
            datasets.Dataset.from_dict({"i": list(range(40))}),
            expression.replace("30000", "10").replace("100000", "10"),
        )["i"]
        assert sorted(texts) == sorted(asked.cooked.format(i) for i in numbers)
        assert source.detokenizer_of(split) == asked.detokenizer
    with pytest.raises(ValueError, match="there is no split 'valid'; there are"):
        source.load("valid")


LAYOUTS = {  # where the repositories keep their files: converted by the Hub, plain, listed in the card
    "lm1b": "plain_text/{}/0000.parquet",
    "ptb": "penn_treebank/{}/0000.parquet",
    "openwebtext-split": "data/{}-00000-of-00080.parquet",
    "wikitext2": "wikitext-2-raw-v1/{}-00000-of-00001.parquet",
    "scientific_papers_arxiv": "document/{}-00000-of-00015.parquet",
    "lambada": "default/{}/0000.parquet",
}


def write_repository(root, name):
    """Write a folder with the layout of the Hub repository, which `datasets` reads by the same rules."""
    asked = ASKED[name]
    for split in {expression.partition("[")[0] for expression in asked.splits.values()}:
        path = root / LAYOUTS[name].format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows_of(asked).to_parquet(path)
    if asked.repository[1]:
        folder = LAYOUTS[name].split("/")[0]
        card = f"---\nconfigs:\n- config_name: {asked.repository[1]}\n  data_files:\n"
        for split in set(asked.splits.values()):
            card += f"  - split: {split}\n    path: {folder}/{split}{'/' if name == 'lambada' else '-'}*\n"
        (root / "README.md").write_text(card + "---\n")


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_real_library_reads_such_a_repository(name, tmp_path, monkeypatch):
    """Covers split expressions, configurations and streaming, without a stand-in."""
    monkeypatch.setattr(datasets, "load_dataset", datasets.load.load_dataset)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "kept")
    asked = ASKED[name]
    write_repository(tmp_path / "repository", name)
    repository = [f"data.source.hub_id='{tmp_path / 'repository'}'", "data.source.hub_revision=null"]
    small = [f"data.source.hub_splits.{split}='{expression.replace('30000', '10').replace('100000', '10')}'"
             for split, expression in asked.splits.items()]  # fmt: skip
    source = source_of(name, *repository[: 1 + (asked.repository[2] is not None)], *small)
    every = [asked.cooked.format(i) for i in range(40)]
    for split, expression in asked.splits.items():
        start, _, stop = expression.replace("30000", "10").replace("100000", "10").partition("[")[2].partition(":")
        expected = every[slice(int(start or 0), int(stop.rstrip("]")) if stop.rstrip("]") else None)]
        assert source.load(split)["text"][:] == expected
        if "-" not in expression:
            assert source.stream(split, 3)["text"][:] == expected[:3]


def test_openwebtext_is_validated_on_wikitext103(monkeypatch):
    def load_dataset(hub_id, config, *, split, revision):
        assert (hub_id, config, split) == ("Salesforce/wikitext", "wikitext-103-raw-v1", "validation")
        return rows_of(ASKED["wikitext103"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = source_of("openwebtext")
    assert source.splits == ("train", "validation", "test")
    assert source.load("validation")["text"][3] == " Text 3, as it-is."
    assert (source.detokenizer_of("train"), source.detokenizer_of("validation")) == (None, "wikitext")
    assert source_of("openwebtext", "data.valid=openwebtext").splits == ("train",)
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - Hydra wraps it
        source_of("openwebtext", "data.valid=ptb")
    assert "data.valid=ptb is none of openwebtext, wikitext103" in explain(caught.value)


def test_neither_folder_nor_hub_is_one_message(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for load in (lambda: source_of("ptb").load("test"), lambda: source_of("ptb").stream("test", 3)):
        with pytest.raises(FileNotFoundError, match=r"ptb_text_only.*\$DATA_DIR/ptb/.*reachable.*Couldn't reach"):
            load()


# -------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
@pytest.mark.parametrize("name", sorted(set(ASKED) - {"ag_news"}))
def test_the_folder_gives_the_same_texts(name, kind, tmp_path, monkeypatch):
    write_folder(tmp_path, name, kind)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    asked, source = ASKED[name], source_of(name, *shrunk(name))
    for split, expression in asked.splits.items():
        every = [asked.cooked.format(i) for i in range(40)]
        part = expression.replace("30000", "10").replace("100000", "10").partition("[")[2].rstrip("]").split(":")
        bounds = [int(bound) if bound else None for bound in part] if len(part) == 2 else [None, None]
        assert source.load(split)["text"][:] == every[slice(*bounds)]


def test_shards_are_read_in_their_order(tmp_path, monkeypatch):
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    for shard in (1, 0, 2):
        rows_of(ASKED["openwebtext"]).select(range(10 * shard, 10 * shard + 10)).to_parquet(
            folder / f"train-0000{shard}-of-00003.parquet"
        )
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    source = source_of("openwebtext-split", *shrunk("openwebtext-split"))
    assert source.load("validation")["text"][:] == [f"Text {i} , as it is ." for i in range(20, 30)]
    assert len(source.load("train")) == 20


def test_a_split_smaller_than_its_slice_is_an_error(tmp_path, monkeypatch):
    write_folder(tmp_path, "lm1b")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"train\*\.\*\[30000:\] holds no text"):
        source_of("lm1b").load("train")


SETTINGS = {"data.tokenizer_name_or_path": "byte", "model.length": 48}


@pytest.mark.parametrize("name", sorted(set(ASKED) - {"ag_news", "lambada"}))
def test_it_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "data", name)
    if name.startswith("openwebtext") and name != "openwebtext-split":
        write_folder(tmp_path / "data", "wikitext103")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    results = run(f"data={name}", *shrunk(name), "model=tiny", *TINY, *settings)
    assert results["unigram_nats_per_token"] is not None
    kept = json.loads(next(tmp_path.rglob("results.json")).read_text())
    wanted = "wikitext" if name in ("openwebtext", "openwebtext-streaming") else ASKED[name].detokenizer
    assert kept["protocol"]["detokenizer"] == wanted and kept["protocol"]["packing"]["eos"]


def test_lambada_measures_a_model_of_other_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lambada", "ptb"):
        write_folder(tmp_path / "data", name)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    settings = ["model=tiny", *TINY, *(f"{key}={value}" for key, value in SETTINGS.items())]
    checkpoint = run("data=ptb", *settings)["checkpoint"]
    measure = ["data=lambada", "mode=ppl_eval", f"eval.checkpoint_path='{checkpoint}'", *settings]
    results = run(*measure)
    assert results["unigram_nats_per_token"] is None and results["texts"] > 0
    assert next(tmp_path.rglob("ppl_eval/*/report.html")).stat().st_size > 1000
    with pytest.raises(ValueError, match="no split 'train'; there are validation, test"):
        run("data=lambada", *settings)


# -------------------------------------------------------------------------------- streaming


class Tap:
    """A Hub that counts the rows it sends."""

    def __init__(self, asked, sent=1000):
        self.asked, self.size, self.rows, self.calls = asked, sent, 0, []

    def __call__(self, hub_id, config, *, split, revision, streaming):
        assert streaming and "[" not in split, "datasets cannot slice what it streams"
        self.calls.append(((hub_id, config, revision), split))

        def rows():
            for row in rows_of(self.asked, self.size):
                self.rows += 1
                yield row

        return datasets.IterableDataset.from_generator(rows)


def test_streaming_stops_at_the_limit(tmp_path, monkeypatch):
    tap = Tap(ASKED["openwebtext"])
    monkeypatch.setattr(datasets, "load_dataset", tap)
    data = module("openwebtext-streaming", tmp_path, max_train_texts=7)
    assert data.texts("train")["text"][:] == [f"Text {i} , as it is ." for i in range(7)]
    assert tap.calls == [(ASKED["openwebtext"].repository, "train")] and tap.rows == 7


def test_streaming_skips_what_is_held_out(tmp_path, monkeypatch):
    tap = Tap(ASKED["lm1b"])
    monkeypatch.setattr(datasets, "load_dataset", tap)
    expressions = ["data.source.hub_splits.train='train[30:]'", "data.source.hub_splits.validation='train[:30]'"]
    data = module("lm1b-streaming", tmp_path, *expressions, max_train_texts=7, max_valid_texts=50)
    assert data.texts("train")["text"][:] == [f"Text {i}, as it is." for i in range(30, 37)]
    assert len(data.texts("validation")) == 30
    assert [split for _, split in tap.calls] == ["train", "train"]


def test_streaming_counts_texts_not_blank_lines(tmp_path, monkeypatch):
    def load_dataset(*args, **kwargs):
        return datasets.Dataset.from_dict({"text": ["", " = A = \n", " \n", " b \n", "c \n"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = module("wikitext2", tmp_path, streaming=True, max_valid_texts=2)
    assert data.texts("validation")["text"][:] == [" = A =", " b"]


def test_the_streaming_configs_train_on_everything_and_measure_on_a_part():
    for name in ("openwebtext-streaming", "lm1b-streaming"):
        data = compose_config([f"data={name}"]).data
        assert (
            data.streaming and data.max_train_texts is None and None not in (data.max_valid_texts, data.max_test_texts)
        )


@pytest.mark.parametrize("name", ["openwebtext-streaming", "lm1b-streaming"])
def test_a_stream_of_the_hub_is_that_of_the_folder(name, tmp_path, monkeypatch):
    """Two epochs, in which every text that is not held out comes twice; nothing is downloaded but by and by."""
    monkeypatch.setattr(datasets, "load_dataset", Tap(ASKED[name], sent=40))
    limits = {"global_batch_size": 4, "max_steps": 15 if name == "lm1b-streaming" else 20, "loading": Loading(0),
              "wrap": False, "long_texts": "truncate", "insert_train_special": False, "insert_train_eos": False,
              "tokenizer_name_or_path": "byte", "stream": Order(lanes=1)}  # fmt: skip
    cut = (
        [
            f"data.source.{key}.train='{value}'"
            for key, value in (("hub_splits", "train[10:]"), ("files", "train*.*[10:]"))
        ]
        if name == "lm1b-streaming"
        else []
    )
    found = []
    for place in ("hub", "folder"):
        if place == "folder":
            write_folder(tmp_path, name, "jsonl")
            monkeypatch.setenv("DATA_DIR", str(tmp_path))
        data = module(name, tmp_path / "cache", "model.length=64", *cut, **limits)
        ids = [row[mask] for batch in data.train_dataloader() for row, mask in
               zip(batch["input_ids"], batch["attention_mask"], strict=True)]  # fmt: skip
        found.append([data.tokenizer.decode(row) for row in ids])
    every = [ASKED[name].cooked.format(i) for i in range(10 if cut else 0, 40)]
    assert found[0] == found[1] and sorted(found[0]) == sorted(every * 2)


@pytest.mark.parametrize(("name", "settings", "message"), [
    ("openwebtext-split", {"max_train_texts": 5}, r"train\[:-100000\], which counts from the end"),
    ("imdb", {"max_train_texts": 5}, r"train split of stanfordnlp/imdb is held out"),
    ("reviews", {"max_train_texts": 5}, r"made or cut as a whole"),
    ("text8", {"max_train_texts": 5}, r"made or cut as a whole"),
])  # fmt: skip
def test_what_cannot_be_streamed(name, settings, message, tmp_path):
    with pytest.raises(ValueError, match=r"data\.streaming=true.*" + message):
        module(name, tmp_path, streaming=True, **settings).texts("train")
    if name in ("imdb", "reviews"):
        with pytest.raises(ValueError, match=r"data\.streaming=true.* set it to false"):
            module(name, tmp_path, streaming=True, long_texts="truncate").train_dataloader()


def test_measured_splits_need_a_limit(tmp_path):
    with pytest.raises(ValueError, match=r"validation has none: set data\.max_valid_texts"):
        module("wikitext2", tmp_path, streaming=True).texts("validation")


# -------------------------------------------------------------------------------- text8

SIZES = ["data.source.sizes={train: 600, validation: 100, test: 84}", "model.length=16"]
WHOLE = "".join("abcdefghijklmnopqrstuvwxyz "[(i * i + i // 7) % 27] for i in range(784))


def write_text8(root, layout):
    folder = root / "text8"
    folder.mkdir()
    if layout == "original":
        (folder / "text8").write_text(WHOLE)
    elif layout == "zip":
        with zipfile.ZipFile(folder / "text8.zip", "w") as archive:
            archive.writestr("text8", WHOLE)
    else:
        for name, part in (("train", WHOLE[:600]), ("validation", WHOLE[600:700]), ("test", WHOLE[700:])):
            (folder / f"{name}.txt").write_text(part + "\n")


@pytest.mark.parametrize("layout", ["original", "zip", "parts", "hub"])
def test_text8_is_cut_into_characters(layout, tmp_path, monkeypatch):
    if layout == "hub":
        parts = {"train": WHOLE[:600], "validation": WHOLE[600:700], "test": WHOLE[700:]}

        def load_dataset(hub_id, config, *, split, revision):
            assert (hub_id, config, revision) == TEXT8
            return datasets.Dataset.from_dict({"text": [parts[split]]})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    else:
        write_text8(tmp_path, layout)
        monkeypatch.setenv("DATA_DIR", str(tmp_path))
    data = module("text8", tmp_path, *SIZES)
    assert (data.vocabulary.size, data.vocabulary.mask_id) == (35, 4)
    for split, text in (("train", WHOLE[:600]), ("validation", WHOLE[600:700]), ("test", WHOLE[700:])):
        assert "".join(data.texts(split)["text"]) == text
        rows = data.split(split)["input_ids"]
        assert all(len(ids) == 16 for ids in rows) and len(rows) == len(text) // 16
        assert "".join(decode(data.tokenizer, ids) for ids in rows) == text[: len(text) // 16 * 16]


def test_text8_of_another_size_is_refused(tmp_path, monkeypatch):
    write_text8(tmp_path, "original")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"text8 has 784 characters; text8 has 100,000,000"):
        source_of("text8").load("train")
    (tmp_path / "text8" / "text8").unlink()
    (tmp_path / "text8" / "train.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"train split of text8 has 600 characters, not 9"):
        source_of("text8", *SIZES).load("train")


def test_each_visit_crops_a_double_row_anew(tmp_path, monkeypatch):
    """Each visit sees a different crop, which does not depend on batches, devices or a resume."""
    write_text8(tmp_path, "original")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    settings = {"global_batch_size": 6, "max_steps": 30, "seed": 3}
    data = module("text8-crop", tmp_path, *SIZES, **settings)
    seen, rows = {}, {}
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape == (6, 16)
        for position, row, ids in zip(batch["position"], batch["sample_id"], batch["input_ids"], strict=True):
            seen[int(position)] = decode(data.tokenizer, ids)
            rows.setdefault(int(row), set()).add(seen[int(position)])
    assert set(rows) == set(range(600 // 32))
    starts = set()
    for row, crops in rows.items():
        text = WHOLE[32 * row : 32 * row + 32]
        assert len(crops) > 5, "a different crop at each visit"
        assert all(crop in text for crop in crops)
        starts |= {text.index(crop) for crop in crops}
    assert starts == set(range(17)), "from the first start to the last"

    small = module("text8-crop", tmp_path, *SIZES, **settings, batch_size=2)
    small.load_state_dict({"consumed_samples": 60})
    for batch in small.train_dataloader():
        for position, ids in zip(batch["position"], batch["input_ids"], strict=True):
            assert seen[int(position)] == decode(small.tokenizer, ids)
    plain = module("text8", tmp_path, *SIZES)
    for split in ("train", "validation", "test"):
        assert data.split(split)["input_ids"][:].tolist() == plain.split(split)["input_ids"][:].tolist()


def test_a_crop_has_no_begin_and_no_end(tmp_path):
    for settings in ({"insert_train_special": True}, {"wrap": False}):
        with pytest.raises(ValueError, match=r"data\.random_crop=true.*data\.insert_train_special=false"):
            module("text8-crop", tmp_path, **settings)


@pytest.mark.parametrize("name", ["text8", "text8-crop"])
def test_text8_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text8(tmp_path, "parts")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    results = run(f"data={name}", "model=tiny", *SIZES, *TINY)
    assert 0 < results["nll_nats_per_token"].value < 20


# -------------------------------------------------------------------------------- rows as in the references


@pytest.mark.skipif(REAL_DATA is None, reason="needs DATA_DIR with bert_tokenizer/ and gpt2_tokenizer/")
def test_lm1b_rows_are_sentences_and_lm1b_wrap_packs_them(tmp_path, monkeypatch):
    write_folder(tmp_path, "lm1b")
    for tokenizer in ("bert_tokenizer", "gpt2_tokenizer"):
        (tmp_path / tokenizer).symlink_to(Path(REAL_DATA).absolute() / tokenizer)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    batch = next(iter(module("lm1b", tmp_path, *shrunk("lm1b"), global_batch_size=4).train_dataloader()))
    assert (batch["input_ids"][:, 0] == 101).all() and batch["input_ids"].shape[1] <= 16
    assert (batch["input_ids"] == 102).sum(-1).tolist() == [1] * 4 and "attention_mask" in batch
    for name, begin, end in (("lm1b-wrap", 101, 102), ("lm1b-gpt2", 50256, 50256)):
        batch = next(iter(module(name, tmp_path, *shrunk(name), global_batch_size=2).train_dataloader()))
        assert batch["input_ids"].shape == (2, 128) and "attention_mask" not in batch
        assert (batch["input_ids"][:, 0] == begin).all() and (batch["input_ids"][:, -1] == end).all()
        assert (batch["input_ids"][:, 1:-1] == end).any(), "sentences end within a row"
