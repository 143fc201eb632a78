"""The stream of training samples is exact, evaluation sees every row once, padding is neither token nor
mask."""

import logging
import os
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from palimpsest.data.order import draws_at, epoch_order, evaluation_batches, rows_at
from palimpsest.data.stream import batch_arithmetic
from palimpsest.dataloader import Loading, PositionBatchSampler, with_texts
from palimpsest.evaluation.likelihood import _definition
from palimpsest.settings.command_line import compose_config
from tests.helpers.commands import ROOT
from tests.helpers.texts import SETTINGS, text_data

N = 37


class Listed:
    """A source of given texts: N in train, the first 11 in the others; two classes."""

    splits = ("train", "validation", "test")
    label_names = ("even", "odd")

    def __init__(self, texts=None):
        self.texts = texts or [f"text {'very ' * (i % 5)}{i}" for i in range(N)]

    def load(self, split):
        texts = self.texts if split == "train" else self.texts[:11]
        return datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(len(texts))]})


def data(tmp_path, source=None, *, rank=0, world=1, **settings):
    defaults = {
        "length": 32, "tokenizer_name_or_path": "word", "wrap": False, "insert_train_special": False,
        "insert_valid_special": False, "global_batch_size": 8, "max_steps": 10, "cache_dir": tmp_path,
        "seed": 5, "eval_batch_size": 4,
    }  # fmt: skip
    loading = Loading(num_workers=settings.pop("num_workers", 0))
    module = text_data(source or Listed(), loading=loading, **(defaults | settings))
    if world > 1:
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world, max_steps=10, global_step=0)
    return module


def positions(loader):
    return [batch["position"].tolist() for batch in loader]


# -------------------------------------------------------------------------------- batch arithmetic


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((32, None, 1, 1), (32, 1)),
        ((32, 8, 1, 1), (8, 4)),
        ((512, 32, 8, 2), (32, 1)),
        ((512, None, 8, 1, 16), (16, 4)),
        ((96, None, 1, 1, 20), (16, 6)),
        ((7, None, 1, 1, 4), (1, 7)),
    ],
)
def test_batch_arithmetic(given, expected):
    assert batch_arithmetic(*given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (10, None, 4, 1),
            r"loader\.global_batch_size=10 is not a multiple of the 4 devices \(trainer\.devices=4.*8 or 12",
        ),
        (
            (32, 5, 2, 1),
            r"loader\.batch_size=5 does not divide the 16 rows.*global_batch_size=32.*1, 2, 4, 8, 16",
        ),
        ((8, 16, 1, 1), r"loader\.batch_size=16 does not divide the 8 rows"),
    ],
)
def test_batch_arithmetic_that_does_not_divide(given, message):
    with pytest.raises(ValueError, match=message):
        batch_arithmetic(*given)


# -------------------------------------------------------------------------------- the stream


def test_every_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(N, 0, e) for e in range(4)] + [epoch_order(N, 1, 0)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    stream = rows_at(range(3 * N), N, 7)
    assert stream.tolist() == [i for e in range(3) for i in epoch_order(N, 7, e)]


def test_the_order_is_uniform():
    """Place of row 0 over 4000 epochs, 8 places: chi-square with 7 degrees; false alarm 1e-6 (seeds are
    fixed)."""
    counts = np.bincount([epoch_order(8, 3, e).tolist().index(0) for e in range(4000)], minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 40.5


def test_the_order_of_the_stream_is_for_ever():
    """A change here breaks the exact resume of every run in flight."""
    assert epoch_order(10, 1, 0).tolist() == GOLDEN


GOLDEN = [7, 3, 1, 5, 4, 2, 8, 9, 0, 6]


def test_draws_are_uniform_and_belong_to_their_position():
    """Starts of random crops: 8,000 positions, 8 places: chi-square with 7 degrees; false alarm 1e-6."""
    drawn = draws_at(range(8000), np.full(8000, 8), seed=3)
    counts = np.bincount(drawn, minlength=8)
    assert len(counts) == 8 and ((counts - 1000) ** 2 / 1000).sum() < 40.5
    assert draws_at([5, 17], [8, 8], seed=3).tolist() == drawn[[5, 17]].tolist()
    assert draws_at(range(8000), np.full(8000, 8), seed=4).tolist() != drawn.tolist()
    assert draws_at(range(10), np.full(10, 257), seed=1).tolist() == GOLDEN_STARTS


GOLDEN_STARTS = [226, 250, 143, 16, 42, 149, 101, 2, 135, 42]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_each_step_takes_its_positions_whatever_the_devices(world, batch_size, tmp_path):
    steps: dict[int, list[int]] = {}
    rows: dict[int, int] = {}
    for rank in range(world):
        module = data(tmp_path, rank=rank, world=world, batch_size=batch_size)
        loader = module.train_dataloader()
        accumulate = 8 // world // (batch_size or 8 // world)
        assert len(loader) == 10 * accumulate
        for m, batch in enumerate(loader):
            steps.setdefault(m // accumulate, []).extend(batch["position"].tolist())
            rows.update(zip(batch["position"].tolist(), batch["sample_id"].tolist(), strict=True))
    assert {s: sorted(p) for s, p in steps.items()} == {s: list(range(8 * s, 8 * s + 8)) for s in range(10)}
    assert [rows[p] for p in range(80)] == rows_at(range(80), N, 5).tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_goes_on_where_it_stopped(num_workers, tmp_path):
    whole = positions(data(tmp_path, batch_size=4).train_dataloader())
    assert [p for batch in whole for p in batch] == list(range(80))
    module = data(tmp_path, batch_size=4, num_workers=num_workers)
    module.load_state_dict({"consumed_samples": 24})
    loader = module.train_dataloader()
    assert len(loader) == len(whole) == 20
    assert positions(loader) == whole[6:]
    assert module.state_dict()["consumed_samples"] == 24


def test_workers_change_nothing(tmp_path):
    plain, fetched = (list(data(tmp_path, num_workers=n).train_dataloader()) for n in (0, 2))
    for a, b in zip(plain, fetched, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_resume_with_another_stream_is_an_error(tmp_path):
    module = data(tmp_path)
    module.load_state_dict({"consumed_samples": 16, "global_batch_size": 16, "seed": 5})
    with pytest.raises(
        ValueError, match=r"loader\.global_batch_size=8, but .* begun with loader\.global_batch_size=16"
    ):
        module.train_dataloader()
    module.load_state_dict({"consumed_samples": 16, "global_batch_size": 8, "seed": 4})
    with pytest.raises(ValueError, match="seed=5, but"):
        module.train_dataloader()
    with pytest.raises(ValueError, match="after 12 samples"):
        PositionBatchSampler(8, 4, 10, consumed=12)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch, _):
        self.seen += batch["position"].tolist()
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch, _):
        self.validated += batch["sample_id"].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(tmp_path, module, ckpt_path=None, max_steps=10, **kwargs):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    model = Recorder()
    callbacks = [ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1, filename="{step}")]
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=2,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        val_check_interval=8,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        **kwargs,
    )
    trainer.fit(model, module, ckpt_path=ckpt_path, weights_only=ckpt_path is not None or None)
    return model, trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_in_the_middle(tmp_path):
    whole, _ = fit(tmp_path, data(tmp_path, batch_size=4))
    assert whole.seen == list(range(80))
    assert sorted(whole.validated) == sorted([*range(11)] * 2)
    rest, trainer = fit(tmp_path, data(tmp_path, batch_size=4), ckpt_path=tmp_path / "ckpt" / "step=6.ckpt")
    assert trainer.global_step == 10
    assert rest.seen == list(range(48, 80))
    assert torch.equal(rest.weight, whole.weight)


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_outruns_the_stream_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.max_steps=11, but the data were set up for 10"):
        fit(tmp_path, data(tmp_path, batch_size=4), max_steps=11)
    fit(tmp_path, data(tmp_path, batch_size=4), fast_dev_run=True)


# -------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_evaluation_sees_every_row_once(world, wrap, tmp_path):
    seen, counts = [], set()
    for rank in range(world):
        module = data(tmp_path, rank=rank, world=world, wrap=wrap, length=8 if wrap else 32)
        batches = list(module.eval_dataloader("test"))
        assert all(1 <= len(batch["input_ids"]) <= 4 for batch in batches)
        seen += [i for batch in batches for i in batch["sample_id"].tolist()]
        counts.add(len(batches))
    assert sorted(seen) == list(range(len(module.split("test"))))
    assert len(counts) == 1 or world == 20


def test_ranks_get_equally_many_batches_where_they_can():
    for n in range(2, 60):
        for world in (2, 3, 4):
            for size in (2, 3, 4):
                parts = [evaluation_batches(np.arange(n), size, rank, world) for rank in range(world)]
                assert sorted(i for part in parts for batch in part for i in batch) == list(range(n))
                assert len({len(part) for part in parts}) == 1 or n < world + world


# -------------------------------------------------------------------------------- batches


def test_padded_batches_follow_the_contract(tmp_path):
    module = data(tmp_path, eval_batch_size=5)
    lengths = []
    for batch in module.val_dataloader():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape
        assert all(
            batch[key].dtype == torch.int64 and len(batch[key]) == len(ids) for key in ("sample_id", "text_id", "label")
        )
        assert "position" not in batch
        longest = int(mask.sum(dim=1).max())
        assert ids.shape[1] == min(-(-longest // 8) * 8, 32)
        for row in range(len(ids)):
            stored = module.split("validation")[int(batch["sample_id"][row])]
            assert ids[row][mask[row]].tolist() == stored["input_ids"].tolist(), (
                "no token is padding, no padding a token"
            )
            assert (ids[row][~mask[row]] == module.vocabulary.pad_id).all()
            assert mask[row].tolist() == sorted(mask[row].tolist(), reverse=True)
        lengths += mask.sum(dim=1).tolist()
    assert lengths == sorted(lengths, reverse=True)


def test_padding_stays_within_the_model(tmp_path):
    module = data(tmp_path, length=9)
    assert {batch["input_ids"].shape[1] for batch in module.train_dataloader()} <= {8, 9}


def test_wrapped_batches_follow_the_contract(tmp_path):
    module = data(tmp_path, wrap=True, length=10)
    for batch in module.train_dataloader():
        assert batch.keys() == {"input_ids", "sample_id", "position"} and batch["input_ids"].shape == (8, 10)
    for batch in module.val_dataloader():
        assert batch.keys() == {"input_ids", "sample_id", "first_document", "last_document"}
    one_class = data(tmp_path, wrap=True, length=10, label=1)
    assert all((batch["label"] == 1).all() for batch in one_class.train_dataloader())


@pytest.mark.parametrize("special", [False, True])
def test_wrapped_rows_know_their_documents(tmp_path, special):
    """A document ends with the end token; one that is cut begins anew in the next row."""
    module = data(tmp_path, wrap=True, length=10, document_mask=True, insert_train_special=special)
    for batch in module.train_dataloader():
        for ids, documents in zip(batch["input_ids"], batch["document"], strict=True):
            ends = (ids == module.vocabulary.eos_id).tolist()
            assert documents.tolist() == [sum(ends[:place]) for place in range(10)]
    assert all("document" in batch for batch in module.val_dataloader())
    assert _definition(module, causal=False) == "p(text), documents apart"
    assert _definition(data(tmp_path, wrap=True, length=10), causal=False) == "p(text)"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wrap": False}, "set data.wrap=true"),
        ({"wrap": True, "insert_train_eos": False}, "by their end tokens"),
        ({"wrap": True, "source": "lines"}, "are lines of documents"),
    ],
)
def test_documents_that_cannot_be_kept_apart_are_refused(tmp_path, settings, said):
    source = Listed()
    if settings.pop("source", None):
        source.document_start = "= "
    with pytest.raises(ValueError, match=f"data.document_mask=true.*{said}"):
        data(tmp_path, source, document_mask=True, **settings)


def test_one_class_shares_the_tokenizer_and_the_names_of_rows(tmp_path):
    both, odd, few = (
        data(tmp_path),
        data(tmp_path, label=1),
        data(tmp_path, max_train_texts=6, max_test_texts=2),
    )
    assert both.vocabulary == odd.vocabulary == few.vocabulary
    assert odd.split("train")["sample_id"][:].tolist() == list(range(1, N, 2))
    assert set(odd.texts("train")["label"]) == {1}
    assert len(few.split("train")) == 6 and len(few.split("test")) == 2 and len(few.split("validation")) == 11
    all_rows, some = (
        {int(row["sample_id"]): row["input_ids"].tolist() for row in module.split("test")} for module in (both, few)
    )
    assert some.items() <= all_rows.items()
    assert both.label_names == ("even", "odd")


def test_train_and_valid_settings_are_apart(tmp_path):
    module = data(tmp_path, insert_train_special=True, insert_valid_eos=False)
    v = module.vocabulary
    train, valid = module.split("train")[0]["input_ids"], module.split("validation")[0]["input_ids"]
    assert train[0] == v.bos_id and train[-1] == v.eos_id
    assert valid.tolist() == train[1:-1].tolist()


def test_long_texts_are_never_cut_in_silence(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"train split: .*longer than model\.length=5"):
        data(tmp_path, length=5).split("train")
    with caplog.at_level(logging.WARNING):
        data(tmp_path, length=5, long_texts="truncate").split("train")
    assert "are longer than model.length=5; tokens left out: " in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": 2}, r"data\.label=2 is not one of the labels: 0 \(even\), 1 \(odd\)"),
        ({"streaming": True}, r"data\.streaming=true"),
        ({"name": "imdb", "train": "imdb", "valid": "wikitext103"}, r"data\.valid=wikitext103"),
        ({"batch_size": 3}, r"loader\.batch_size=3 does not divide"),
        ({"vocab_size": 3}, r"data\.vocab_size=3 is too small"),
    ],
)
def test_bad_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        data(tmp_path, **settings).train_dataloader()


# -------------------------------------------------------------------------------- configs/data

CONFIGS = sorted((ROOT / "configs" / "data").glob("*.yaml"))


def configured(path, tmp_path, changes=(), **settings):
    data = compose_config([f"data={path.stem}", *(f"data.{change}" for change in changes)]).data
    known = SETTINGS - {"cache_dir"}
    values = {key: value for key, value in data.items() if key in known}
    return text_data(instantiate(data.source), cache_dir=tmp_path, **(values | settings))


def test_every_config_is_there():
    wanted = {"reviews", "imdb", "ag_news", "wikitext2", "gsm8k_baseline", "text", "labelled"}
    assert wanted <= {path.stem for path in CONFIGS}


def test_the_default_config(tmp_path):
    small = [f"source.num_{split}_per_class=8" for split in ("train", "validation", "test")]
    module = configured(CONFIGS[0].with_stem("reviews"), tmp_path, small, length=72, global_batch_size=4)
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape[0] == 4 and batch["attention_mask"].any(dim=1).all()
    for text, ids in zip(module.texts("test")["text"], module.split("test")["input_ids"], strict=True):
        known = module.tokenizer.decode(ids[1:-1].tolist())
        assert known == text or module.figures["test"]["unknown"]


def test_a_tokenizer_that_knows_nearly_nothing_is_refused_but_one_odd_text_is_not(tmp_path):
    texts = ["".join(chr(97 + int(digit)) for digit in str(100 + i)) for i in range(N)]  # N different words
    with pytest.raises(ValueError, match=r"data\.tokenizer_name_or_path=word does not know 36 of 37 .* train split"):
        data(tmp_path, Listed(texts), vocab_size=6).split("train")
    module = data(tmp_path)
    strange = with_texts(module, "questions", ["w x y z"])
    assert strange.figures["questions"]["unknown"] == strange.figures["questions"]["encoded"] == 4


def test_a_text_without_tokens_is_refused_where_answers_are_in_the_order_of_the_texts(tmp_path):
    with pytest.raises(ValueError, match=r"text 1 \(''\) has no tokens; correct it, or leave it out"):
        with_texts(data(tmp_path, wrap=False, drop_empty=True), "questions", ["w", "", "x"])


@pytest.mark.parametrize("kind", ["text", "labelled"])
def test_user_file_configs(kind, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("text,label\n" + "".join(f"the {i}th text,{'ab'[i % 2]}\n" for i in range(60)))
    module = configured(
        CONFIGS[0].with_stem(kind),
        tmp_path,
        [f"path={path}"],
        length=16,
        tokenizer_name_or_path="bpe",
        vocab_size=300,
    )
    assert module.label_names == (("a", "b") if kind == "labelled" else None)
    assert len(list(module.val_dataloader())) >= 1
    assert ("attention_mask" in next(iter(module.train_dataloader()))) == (kind == "labelled")


@pytest.mark.skipif("DATA_DIR" not in os.environ, reason="needs DATA_DIR with the public data sets")
@pytest.mark.parametrize("name", ["imdb", "ag_news", "wikitext2", "gsm8k_baseline"])
def test_public_configs(name, tmp_path):
    module = configured(CONFIGS[0].with_stem(name), tmp_path, length=128, global_batch_size=4, max_valid_texts=200)
    batch = next(iter(module.val_dataloader()))
    assert batch["input_ids"].max() < module.vocabulary.size and (batch["input_ids"] != module.vocabulary.mask_id).all()
    assert ("label" in batch) == (name in ("imdb", "ag_news"))
    assert module.vocabulary.mask_id == 50257 != module.vocabulary.pad_id
