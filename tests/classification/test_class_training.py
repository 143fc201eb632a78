"""Training the models of generative classification: one network for all classes, a shared start, a start at token
frequencies, an end by patience, and what is reused or refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import palimpsest
from palimpsest.classification.models import class_models, pretraining_splits
from palimpsest.common.randomness import KeyedNoise
from palimpsest.data.sources import HubOrFolder
from palimpsest.data.unigram import token_counts, unigram_nll
from palimpsest.diffusion import Diffusion
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import _shares_of_classes, fit, initialise
from palimpsest.experiment.weights import Weights
from palimpsest.models.checkpoints import load_inert, read_checkpoint, read_progress
from palimpsest.models.class_conditioning import UNCONDITIONAL
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from tests.helpers.commands import TINY, run
from tests.helpers.networks import same_weights
from tests.helpers.texts import text_data

RUN = [*TINY, "checkpointing.save_dir=run", "sampling.num_sample_log=0", "trainer.max_steps=4",
       "trainer.val_check_interval=2"]  # fmt: skip
CONDITIONAL = [*RUN, "classify.sharing=conditional"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def experiment(*overrides: str) -> Experiment:
    return Experiment(compose_config([*RUN, *overrides]), "a test")


def count_steps(monkeypatch) -> list:
    """What `Diffusion.training_step` is called with from now on, one entry per call."""
    calls, real = [], Diffusion.training_step

    def step(self, batch, batch_idx):
        calls.append((self, batch))
        return real(self, batch, batch_idx)

    monkeypatch.setattr(Diffusion, "training_step", step)
    return calls


def forced_nll(monkeypatch, values: list[float]) -> list[float]:
    """Validations find these values of val/nll in turn, whatever the weights; what is left of them is returned."""
    left = list(values)

    def end(self):
        self._ema_context.__exit__(None, None, None)
        self.log("val/nll", torch.tensor(left.pop(0), dtype=torch.float64))

    monkeypatch.setattr(Diffusion, "on_validation_epoch_end", end)
    return left


# -------------------------------------------------------------------------------- one network for all classes


def test_a_conditional_network_is_told_all_but_the_asked_share(monkeypatch):
    told, real = [], Diffusion.with_conditioning

    def spy(self, batch, dropped_B=None):
        out = real(self, batch, dropped_B)
        if dropped_B is not None:
            told.append((batch["label"].clone(), out["class_id"].clone(), batch["position"].clone()))
        return out

    monkeypatch.setattr(Diffusion, "with_conditioning", spy)
    exp = experiment("classify.sharing=conditional", "classify.label_dropout=0.25", "loader.global_batch_size=64")
    models = class_models(exp, exp.build.data(), "", False)
    label, class_id, position = (torch.cat(parts) for parts in zip(*told, strict=True))
    untold = class_id == UNCONDITIONAL
    assert len(label) == 256 and abs(float(untold.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 256) ** 0.5
    assert torch.equal(class_id[~untold], label[~untold])
    assert torch.equal(untold, KeyedNoise(1, position, draw=-4).uniform() < 0.25), "keyed by place in the stream"
    assert [m.class_id for m in models] == [0, 1] and models[0].diffusion is models[1].diffusion
    batch = next(iter(exp.build.data().eval_dataloader("test")))
    assert (
        models[1].with_conditioning(batch)["class_id"].tolist() == [1] * len(batch["input_ids"])
        and "class_id" not in batch
    )
    assert sorted(p.name for p in Path("run").iterdir() if p.is_dir() and p.name.startswith("label")) == []
    again = class_models(exp, exp.build.data(), str(Path("run/checkpoints/best.ckpt")), False)
    assert len(again) == 2
    with pytest.raises(ValueError, match="one model per class"):
        class_models(exp, exp.build.data(), "run/label={label}.ckpt", False)


# -------------------------------------------------------------------------------- classes trained against each other

EVERY_STEP = [*CONDITIONAL, "trainer.log_every_n_steps=1"]
HYBRID = [*EVERY_STEP, "classify.discriminative_weight=2"]


def logged(folder: str) -> dict[str, list[float]]:
    with next(Path(folder).rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


def test_a_training_that_compares_classes_logs_them_and_ends_with_its_last_weights(capsys):
    alone, fitted = experiment(*EVERY_STEP), experiment(*HYBRID, "checkpointing.save_dir=hybrid")
    plain = read_checkpoint(alone.fit())
    path = fitted.fit()
    assert "compared from the first step" in capsys.readouterr().out
    assert path.name == "last.ckpt" and fitted.runs.patience() is None and alone.runs.patience() == 5
    found = logged("hybrid")
    assert len(found["train/class_cross_entropy"]) == 4 and len(found["val/class_accuracy"]) == 2
    assert all(0 <= share <= 1 for share in found["train/class_accuracy"] + found["val/class_accuracy"])
    assert found["train/nll"][0] == logged("run")["train/nll"][0], "the likelihood is logged without the other term"
    assert any(not torch.equal(p, plain.state[name]) for name, p in read_checkpoint(path).state.items())


def test_windows_are_compared_with_the_prior_of_windows():
    """With that of the texts, classes of longer texts would be told from others by their length, once a window."""
    data = experiment(*HYBRID, "data.long_texts=windows", "model.length=24").build.data()
    window_label_R, text_label_M = data.split("train")["label"], data.texts("train")["label"]
    per_window_C, per_text_C = (
        np.bincount(window_label_R) / len(window_label_R),
        np.bincount(text_label_M) / len(text_label_M),
    )
    assert _shares_of_classes(data).numpy() == pytest.approx(per_window_C) and per_window_C != pytest.approx(per_text_C)


def test_a_resumed_training_compares_classes_as_an_uninterrupted_one():
    settings = [*HYBRID, "model.dropout=0.2", "lr_scheduler=constant_warmup"]
    whole = experiment(*settings, "checkpointing.save_dir=whole").fit()
    begun = [*settings, "checkpointing.save_dir=begun"]
    experiment(*begun, "trainer.max_steps=2").fit()
    assert same_weights(whole, experiment(*begun).fit())


def test_classes_that_cannot_be_compared_are_refused_before_a_shared_start_and_only_where_they_are(monkeypatch):
    steps = count_steps(monkeypatch)
    one_class = ["data.label_noise=0", "data.source.num_train_per_class=1", "data.max_train_texts=1"]
    with pytest.raises(
        ValueError, match="classify.discriminative_weight compares classes, and there is no training text of [a-z]+;"
    ):
        experiment(*HYBRID, *one_class, "loader.global_batch_size=1", "classify.pretrain=all").fit()
    assert not steps
    experiment(*CONDITIONAL, *one_class, "loader.global_batch_size=1", "checkpointing.save_dir=one").fit()


def test_the_weight_is_part_of_a_run_only_where_it_is_set():
    key = "classify.discriminative_weight"
    assert key not in identity(compose_config(CONDITIONAL))
    assert identity(compose_config(HYBRID))[key] == 2
    shared = experiment(*HYBRID, "classify.pretrain=all", "optim.class_lr=0.1").pretraining
    plain = experiment(*CONDITIONAL, "classify.pretrain=all").pretraining
    assert identity(shared.build.cfg) == identity(plain.build.cfg), "a shared start knows no classes"
    with pytest.raises(ValueError, match="classify.discriminative_weight=2 compares the classes of one network"):
        experiment("classify.discriminative_weight=2").build.check()


def test_the_shared_start_may_learn_faster():
    faster = [*HYBRID, "classify.pretrain=all", "classify.pretrain_lr_factor=8", "optim=muon"]
    optim = experiment(*faster).build.cfg.optim
    shared = experiment(*faster).pretraining.build.cfg.optim
    assert (shared.lr, shared.matrix_lr, shared.beta1) == (8 * optim.lr, 8 * optim.matrix_lr, optim.beta1)
    assert "classify.pretrain_lr_factor" not in identity(compose_config([*HYBRID, "classify.pretrain=all"]))
    assert identity(compose_config(faster))["classify.pretrain_lr_factor"] == 8
    with pytest.raises(ValueError, match="pretrain_lr_factor=8 is for a shared start; add classify.pretrain=all"):
        experiment("classify.pretrain_lr_factor=8").build.check()
    with pytest.raises(ValueError, match="classify.pretrain_steps=3 is for a shared start; add classify.pretrain=all"):
        experiment("classify.pretrain_steps=3").build.check()


def test_a_rate_of_the_classes_is_refused_before_a_shared_start_where_the_network_is_told_none():
    with pytest.raises(ValueError, match="optim.class_lr=0.1 is for a network that is told classes; add"):
        experiment("mode=classify", "optim.class_lr=0.1", "classify.pretrain=all").build.check()


BIGRAMS = [*HYBRID, "classify.bigrams=20", "training.start_from_counts=true"]


def test_biases_of_pairs_are_fitted_kept_and_reloaded():
    exp = experiment(*BIGRAMS, "classify.pretrain=all", "classify.pretrain_steps=2")
    path = exp.fit()
    state = read_checkpoint(path).state
    assert state["bigrams.bias_CP"].shape == (2, 20) and state["bigrams.bias_CP"].any()
    (network,) = {m.diffusion for m in class_models(exp, exp.build.data(), str(path), False)}
    assert torch.equal(network.backbone.bigrams.bias_CP, state["bigrams.bias_CP"])
    assert "bigrams.bias_CP" not in read_checkpoint(exp.pretraining.runs.model_path()).state
    first_P, second_P = state["bigrams.first_P"], state["bigrams.second_P"]
    assert torch.equal(first_P.sort().values, first_P) and second_P[state["bigrams.by_second_P"]].diff().min() >= 0
    resumed = experiment(*BIGRAMS, "classify.pretrain=all", "classify.pretrain_steps=2", "trainer.max_steps=6").fit()
    assert torch.equal(read_checkpoint(resumed).state["bigrams.bias_CP"], state["bigrams.bias_CP"])
    palimpsest.load(path).log_likelihood(["a dull film ."])
    assert palimpsest.load_classifier("run").predict(["a dull film ."]).probability.shape == (1, 2)


@pytest.mark.parametrize(("overrides", "message"), [
    (["classify.bigrams=20", "classify.sharing=conditional"], "classify.bigrams=20 is fitted to tell classes apart"),
    ([*HYBRID, "classify.bigrams=20"], "bigrams=20.*add classify.discriminative_weight=0.2 and training.start_from"),
    ([*BIGRAMS, "algo=bd3lm", "block_size=4"], "classify.bigrams=20 means nothing to parameterization=bd3lm"),
    ([*BIGRAMS, "algo=ar"], "classify.bigrams=20 means nothing to parameterization=ar"),
])  # fmt: skip
def test_biases_of_pairs_are_refused_where_nothing_reads_them(overrides, message):
    with pytest.raises(ValueError, match=message):
        experiment(*overrides).build.check()


# -------------------------------------------------------------------------------- the shared start


def averaged(path: Path) -> list[torch.Tensor]:
    return load_inert(path)["ema"]["shadow_params"]


def starts(monkeypatch) -> dict:
    """The parameters that every training begins with, by the label of its data."""
    found, real = {}, Weights.load_initial

    def spy(self, diffusion, data, shared):
        out = real(self, diffusion, data, shared)
        found[data.label] = ([p.detach().clone() for p in diffusion.backbone.parameters()],
                             [s.clone() for s in diffusion.ema.shadow_params])  # fmt: skip
        return out

    monkeypatch.setattr(Weights, "load_initial", spy)
    return found


@pytest.mark.parametrize("sharing", ["per_class", "conditional"])
def test_both_classes_start_from_the_average_of_one_pretraining(monkeypatch, sharing):
    steps, found = count_steps(monkeypatch), starts(monkeypatch)
    exp = experiment("classify.pretrain=all", "classify.pretrain_steps=3", f"classify.sharing={sharing}")
    class_models(exp, exp.build.data(), "", False)
    shared = averaged(exp.pretraining.runs.model_path())
    assert load_inert("run/pretrained/checkpoints/last.ckpt")["global_step"] == 3
    labels = [None] if sharing == "conditional" else [0, 1]
    assert len(steps) == 3 + 4 * len(labels)
    assert all("label" not in batch for _, batch in steps[:3]) and all("label" in batch for _, batch in steps[3:])
    for label in labels:
        for mine in found[label]:
            assert all(torch.equal(a, b) for a, b in zip(mine, shared, strict=True))
    last = load_inert("run/pretrained/checkpoints/last.ckpt")
    assert last["identity"]["configuration"]["data.train_splits"] == ["train"]
    before = len(steps)
    class_models(exp, exp.build.data(), "", False)
    assert len(steps) == before, "what is complete is reused"


def test_an_unfinished_shared_start_is_none(capsys):
    """As trainer.max_time would end it."""
    words = ["classify.pretrain=all", "classify.pretrain_steps=30", "classify.sharing=conditional"]
    with pytest.raises(ValueError, match=r"the shared start is unfinished: .* has \d+ of classify.pretrain_steps=30"):
        fit(experiment(*words, "++trainer.max_time=00:00:00:00"))
    assert "trainer.max_time or a callback ended it" in capsys.readouterr().out
    fit(experiment(*words))
    assert load_inert("run/pretrained/checkpoints/last.ckpt")["global_step"] == 30


def test_training_one_class_does_what_classification_does_for_it():
    one = ["classify.pretrain=all", "data.label=0", "mode=train"]
    run(*RUN, *one)
    whole = experiment("classify.pretrain=all", "checkpointing.save_dir=other", "mode=classify")
    class_models(whole, whole.build.data(), "", False)
    for path in ("pretrained/checkpoints/last.ckpt", "label=0/checkpoints/last.ckpt", "label=0/checkpoints/best.ckpt"):
        a, b = (load_inert(Path(folder) / path)["state_dict"] for folder in ("run", "other"))
        assert all(torch.equal(a[name], b[name]) for name in a), path
    assert not Path("run/label=1").exists()


def test_pretraining_is_part_of_what_makes_a_run_only_where_it_is_asked_for():
    plain = identity(compose_config([]))
    assert not {"classify.pretrain", "classify.pretrain_steps", "training.start_from_counts"} & set(plain)
    asked = identity(compose_config(["classify.pretrain=all", "training.start_from_counts=true", "mode=classify"]))
    assert asked["classify.pretrain"] == "all" and asked["classify.pretrain_steps"] == 2000
    assert asked["training.start_from_counts"] is True
    assert "unsupervised" not in json.dumps(identity(compose_config(["data=imdb"])))
    assert "unsupervised" in json.dumps(identity(compose_config(["data=imdb", "classify.pretrain=all"])))


@pytest.mark.parametrize(("pretrain", "splits"), [
    ("all", ["train"]), ("unsupervised", ["unsupervised"]), ("all+unsupervised", ["train", "unsupervised"]),
])  # fmt: skip
def test_which_splits_are_named(pretrain, splits):
    assert pretraining_splits(pretrain, ("train", "validation", "test", "unsupervised")) == splits


@pytest.mark.parametrize("pretrain", ["nothing", "test", "all+validation", "train", "all+unsupervised+more", ""])
def test_an_unknown_split_lists_those_that_exist(pretrain):
    with pytest.raises(ValueError, match="is none of all, unsupervised, all.unsupervised .*train, validation"):
        pretraining_splits(pretrain, ("train", "validation", "test", "unsupervised"))


def write_imdb(folder: Path) -> None:
    words = ["good", "bad", "film", "plot", "actor"]
    texts = [f"{words[i % 5]} {words[i // 5 % 5]} {i}" for i in range(60)]
    (folder / "imdb").mkdir()
    for name, part in (("train", texts[:30]), ("test", texts[30:40])):
        labels = [i % 2 for i in range(len(part))]
        datasets.Dataset.from_dict({"text": part, "label": labels}).to_parquet(folder / "imdb" / f"{name}.parquet")
    unlabelled = [*texts[40:], texts[30], texts[31]]  # two texts of the test split among them
    datasets.Dataset.from_dict({"text": unlabelled}).to_parquet(folder / "imdb" / "unsupervised.parquet")


def test_another_split_is_trained_on_without_labels_and_without_texts_that_are_measured(tmp_path, monkeypatch):
    write_imdb(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    cfg = compose_config(["data=imdb"]).data.source
    source = HubOrFolder(**{key: value for key, value in cfg.items() if key != "_target_"})
    assert source.splits == ("train", "validation", "test", "unsupervised")
    assert all(("label" in source.load(split).column_names) == (split != "unsupervised") for split in source.splits)
    settings = {"length": 16, "tokenizer_name_or_path": "byte", "wrap": False, "insert_train_special": False,
                "insert_valid_special": False, "long_texts": "truncate", "cache_dir": "cache"}  # fmt: skip
    data = text_data(source, train_splits=["train", "unsupervised"], **settings)
    train = set(source.load("train")["text"][:])
    joined = data.texts("train")
    added = set(source.load("unsupervised")["text"][:]) - set(source.load("test")["text"][:])
    assert set(joined["text"][:]) == train | added and len(added) == 20
    assert len(joined) == len(train) + 20 and len(set(joined["text_id"][:])) == len(joined)
    assert len(set(data.split("train")["sample_id"][:].tolist())) == len(joined)
    assert all("label" not in data.split(split).column_names for split in ("train", "validation"))
    limited = text_data(source, train_splits=["train", "unsupervised"], max_train_texts=3, **settings)
    assert len(limited.texts("train")) == 6


def test_the_hub_is_not_asked_for_labels_of_a_split_without_any(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["a b", "c d"], "label": [-1, -1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    cfg = compose_config(["data=imdb"]).data.source
    monkeypatch.setenv("DATA_DIR", "")
    source = HubOrFolder(**{key: value for key, value in cfg.items() if key != "_target_"})
    assert source.load("unsupervised").column_names == ["text", "text_id"]


@pytest.mark.parametrize(("overrides", "said"), [
    (["classify.pretrain=all", "training.from_pretrained=x", "mode=classify"], "all.*training.from_pretrained=x"),
    (["classify.pretrain=all", "eval.checkpoint_path=x", "mode=classify"], "all.*eval.checkpoint_path=x"),
    (["classify.pretrain=all"], "classify.pretrain=all.*data.label"),
    (["classify.pretrain=other", "mode=classify"], "pretrain=other is none of all .*train, validation"),
    (["training.start_from_counts=true", "training.from_pretrained=x"], "start_from_counts=true"),
    (["training.start_from_counts=true", "backbone=dimamba"], "output layer of DiMamba has no bias"),
    (["classify.patience=0"], "classify.patience=0 must be a whole number from 1"),
    (["classify.sharing=conditional", "data.wrap=true"], "data.wrap=true"),
    (["mode=train", "data.label=0", "callbacks=[checkpoint_every_n_steps]"], "callbacks=checkpoint_monitor"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")  # fmt: skip
def test_contradictions_are_refused(overrides, said):
    with pytest.raises(ValueError, match=said):
        run(*RUN, *overrides)


# -------------------------------------------------------------------------------- a start at token frequencies


def law_of(counts_V: np.ndarray, mask_id: int) -> np.ndarray:
    smoothed_V = counts_V + 1.0
    smoothed_V[mask_id] = 0
    with np.errstate(divide="ignore"):
        return np.log(smoothed_V / smoothed_V.sum())


def nll_at_start(exp, diffusion, data, class_id: int | None) -> np.ndarray:
    """Nats per validation text, from the first prediction for all its tokens masked; by length of the split."""
    total = {}
    for batch in data.eval_dataloader("validation"):
        scored_BL = batch["attention_mask"] & ~batch["observed"]
        x_BL = batch["input_ids"].masked_fill(scored_BL, diffusion.objective.process.mask_id)
        cond = {} if class_id is None else {"class_id": torch.full((len(x_BL),), class_id)}
        with torch.no_grad():
            log_p = diffusion.model.denoise(x_BL, torch.ones(len(x_BL)), attention_mask=batch["attention_mask"], **cond)
        nats_B = -(log_p.gather(-1, batch["input_ids"][..., None])[..., 0] * scored_BL).sum(-1)
        total |= dict(zip(batch["sample_id"].tolist(), nats_B.tolist(), strict=True))
    return np.array([total[int(i)] for i in data.split("validation")["sample_id"]])


def expected_nll(data, law_V: np.ndarray) -> np.ndarray:
    frame = set(data.collate.frame_ids.tolist())
    return np.array(
        [-sum(law_V[i] for i in ids.tolist() if i not in frame) for ids in data.split("validation")["input_ids"]]
    )


def slow_counts(data, rows) -> np.ndarray:
    counts_V = np.zeros(data.vocabulary.size)
    for ids in rows:
        np.add.at(counts_V, ids, 1)
    counts_V[data.collate.frame_ids] = 0
    return counts_V


@pytest.mark.parametrize("label", [0, 1])
def test_a_class_begins_exactly_at_its_unigram_law(label):
    exp = experiment("training.start_from_counts=true", "data.max_train_texts=200")
    data = exp.build.data(label)
    diffusion = exp.build.diffusion(data)
    initialise(exp, diffusion, data, None)
    law_V = law_of(slow_counts(data, data.split("train")["input_ids"]), diffusion.objective.process.mask_id)
    found_M = nll_at_start(exp, diffusion, data, None)
    np.testing.assert_allclose(found_M, expected_nll(data, law_V), rtol=1e-5)
    np.testing.assert_allclose(found_M, unigram_nll(data, "validation"), rtol=1e-3)
    with diffusion.averaged():
        np.testing.assert_allclose(nll_at_start(exp, diffusion, data, None), found_M, rtol=1e-6)
    assert diffusion.ema.num_updates == 0


def by_class(data) -> dict[int | None, np.ndarray]:
    rows = data.split("train")
    ids, label = list(rows["input_ids"]), np.asarray(rows["label"])
    counts = {k: slow_counts(data, [row for row, of in zip(ids, label, strict=True) if of == k]) for k in (0, 1)}
    return {**counts, UNCONDITIONAL: counts[0] + counts[1]}


def test_a_conditional_network_begins_at_the_law_of_each_class_and_untold_at_that_of_all():
    exp = experiment("training.start_from_counts=true", "classify.sharing=conditional", "data.max_train_texts=200")
    data = exp.build.data()
    diffusion = exp.build.diffusion(data)
    initialise(exp, diffusion, data, None)
    counts = by_class(data)
    np.testing.assert_array_equal(token_counts(data, by_class=True), np.stack([counts[0], counts[1]]))
    for class_id, counts_V in counts.items():
        found_M = nll_at_start(exp, diffusion, data, class_id)
        expected_M = expected_nll(data, law_of(counts_V, diffusion.objective.process.mask_id))
        np.testing.assert_allclose(found_M, expected_M, rtol=1e-5)


def test_a_pretrained_class_exchanges_the_law_of_the_pretraining_for_its_own():
    exp = experiment("training.start_from_counts=true", "classify.pretrain=all", "data.max_train_texts=200")
    shared = fit(exp.pretraining)
    data = exp.build.data(1)
    diffusion, plain = exp.build.diffusion(data), exp.build.diffusion(data)
    initialise(exp, diffusion, data, shared)
    plain.start_from(read_checkpoint(shared))
    mask_id = diffusion.objective.process.mask_id
    all_V = slow_counts(data, exp.pretraining.build.data().split("train")["input_ids"]) + 1
    own_V = slow_counts(data, data.split("train")["input_ids"]) + 1
    wanted_V = np.log(own_V / own_V.sum()) - np.log(all_V / all_V.sum())
    moved_V = (diffusion.backbone.head.bias - plain.backbone.head.bias).detach().numpy()
    np.testing.assert_allclose(moved_V, wanted_V, atol=1e-5)
    assert np.abs(wanted_V[np.arange(len(wanted_V)) != mask_id]).max() > 0.1
    assert torch.equal(diffusion.backbone.head.weight, plain.backbone.head.weight)


# -------------------------------------------------------------------------------- the end by patience


PATIENT = ["data.label=0", "classify.patience=2", "trainer.max_steps=20"]


def test_training_stops_without_a_better_validation_and_the_best_weights_are_the_model(monkeypatch, capsys):
    left = forced_nll(monkeypatch, [3.0, 2.0, 2.5, 2.1, 1.0])
    exp = experiment(*PATIENT)
    path = fit(exp)
    assert path.name == "best.ckpt" and load_inert(path)["global_step"] == 4
    assert load_inert(path.with_name("last.ckpt"))["global_step"] == 8 and left == [1.0]
    steps = count_steps(monkeypatch)
    monkeypatch.setattr(Experiment, "trainer", lambda *_: pytest.fail("a complete run was begun again"))
    assert fit(experiment(*PATIENT)) == path and not steps
    assert "complete" in capsys.readouterr().out
    trained = experiment(*PATIENT).weights.trained(exp.build.data(), "", disable_ema=False)
    shadow = averaged(path)
    assert all(torch.equal(p, s) for p, s in zip(trained.backbone.parameters(), shadow, strict=True))


def test_a_resume_goes_on_counting_and_keeps_the_best_also_where_the_folder_was_moved(monkeypatch):
    left = forced_nll(monkeypatch, [2.0, 2.5, 2.4, 1.0])
    fit(experiment(*PATIENT, "trainer.max_steps=4", "classify.patience=3"))
    assert read_progress(Path("run/label=0/checkpoints/last.ckpt")).validations_without_improvement == 1
    shutil.move("run", "moved")
    moved = ["checkpointing.save_dir=moved"]
    path = fit(experiment(*PATIENT, *moved))
    assert path == Path("moved/label=0/checkpoints/best.ckpt") and load_inert(path)["global_step"] == 2
    assert load_inert(path.with_name("last.ckpt"))["global_step"] == 6 and left == [1.0], "the patience of now holds"
    path = fit(experiment(*PATIENT, *moved, "classify.patience=3", "trainer.max_steps=8"))
    assert load_inert(path)["global_step"] == 8, "with more patience it goes on, and finds better weights"


def test_the_best_weights_are_used_also_where_training_ran_to_its_end(monkeypatch):
    forced_nll(monkeypatch, [2.0, 3.0])
    assert load_inert(fit(experiment("data.label=0")))["global_step"] == 2


@pytest.mark.parametrize(("overrides", "name"), [
    (["data.label=0", "trainer.val_check_interval=100"], "last.ckpt"), ([], "last.ckpt"),
    (["data.label=0", "classify.patience=null"], "last.ckpt"), (["classify.sharing=conditional"], "best.ckpt"),
], ids=" ".join)  # fmt: skip
def test_the_last_weights_are_used_where_nothing_was_validated_or_no_class_is_trained(overrides, name):
    assert fit(experiment(*overrides)).name == name


def test_killed_while_it_validates_it_validates_again(monkeypatch):
    often = [*PATIENT, "callbacks.checkpoint_every_n_steps.every_n_train_steps=1"]
    forced_nll(monkeypatch, [2.0, 2.5])
    with pytest.raises(IndexError):
        fit(experiment(*often))  # the third validation finds nothing
    last = read_progress(Path("run/label=0/checkpoints/last.ckpt"))
    assert (last.step, last.validations_without_improvement) == (5, 1)
    left = forced_nll(monkeypatch, [2.6, 1.0])
    path = fit(experiment(*often))
    assert left == [1.0]
    assert load_inert(path)["global_step"] == 2 and load_inert(path.with_name("last.ckpt"))["global_step"] == 6


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_killed_anywhere_it_counts_every_validation_once(monkeypatch, step):
    left = forced_nll(monkeypatch, [2.0, 2.5, 2.4, 1.0])
    often = [*PATIENT, "callbacks.checkpoint_every_n_steps.every_n_train_steps=2"]
    real = Diffusion.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == step:
            raise RuntimeError("killed")
        return real(self, batch, batch_idx)

    monkeypatch.setattr(Diffusion, "training_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit(experiment(*often))
    last = read_progress(Path("run/label=0/checkpoints/last.ckpt"))
    assert last.step == step // 2 * 2 and last.validations_without_improvement == (step >= 4) and last.best is not None
    monkeypatch.setattr(Diffusion, "training_step", real)
    path = fit(experiment(*often))
    assert left == [1.0] and load_inert(path)["global_step"] == 2
    assert load_inert(path.with_name("last.ckpt"))["global_step"] == 6


# -------------------------------------------------------------------------------- what exists already


def test_a_training_with_other_settings_is_refused_with_what_differs(monkeypatch):
    fit(experiment("data.label=0"))
    other = ["data.label=0", "optim.lr=0.5", "model.dropout=0.3"]
    with pytest.raises(ValueError) as caught:
        fit(experiment(*other))
    said = str(caught.value)
    lines = [line.strip() for line in said.splitlines()[1:-1]]
    assert lines == [
        "backbone.dropout: there 0.0, here 0.3",
        "model.dropout: there 0.0, here 0.3",
        "optim.lr: there 0.004, here 0.5",
    ]
    assert "checkpointing.save_dir" in said.splitlines()[-1]
    with pytest.raises(ValueError, match="tokenizer: there .*, here "):
        fit(experiment("data.label=0", "data.tokenizer_name_or_path=byte", "model.length=512"))
    fit(experiment("data.label=0", "trainer.max_steps=5", "classify.num_draws=3"))  # budgets may change
    shutil.copytree("run/label=0", "run/label=1")
    with pytest.raises(ValueError, match="data.label: there 0, here 1"):
        fit(experiment(), 1)
    assert fit(experiment(*other, "checkpointing.resume_from_ckpt=false")).exists()


def test_going_on_in_the_middle_of_the_second_class_ends_where_an_uninterrupted_run_does(monkeypatch):
    overrides = ["classify.pretrain=all", "training.start_from_counts=true", "model.dropout=0.1",
                 "callbacks.checkpoint_every_n_steps.every_n_train_steps=1"]  # fmt: skip
    whole = experiment(*overrides, "checkpointing.save_dir=whole")
    class_models(whole, whole.build.data(), "", False)
    real = Diffusion.training_step

    def killed(self, batch, batch_idx):
        if self.identity["label"] == 1 and self.global_step == 2:
            raise RuntimeError("killed")
        return real(self, batch, batch_idx)

    monkeypatch.setattr(Diffusion, "training_step", killed)
    exp = experiment(*overrides)
    with pytest.raises(RuntimeError, match="killed"):
        class_models(exp, exp.build.data(), "", False)
    assert read_progress(Path("run/label=1/checkpoints/last.ckpt")).step == 2
    monkeypatch.setattr(Diffusion, "training_step", real)
    steps = count_steps(monkeypatch)
    class_models(exp, exp.build.data(), "", False)
    assert len(steps) == 2
    for path in ("label=0", "label=1"):
        a, b = (load_inert(Path(folder) / path / "checkpoints/last.ckpt") for folder in ("run", "whole"))
        assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"])
        assert all(torch.equal(x, y) for x, y in zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True))
