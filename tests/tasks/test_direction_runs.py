"""Conditional generation from the command line: all modes run, edits keep what they must, controls differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from palimpsest.data.passages import special_ids
from palimpsest.evaluation import conditional_generation, editing
from palimpsest.evaluation.drawing import SamplingContext
from palimpsest.experiment.experiment import Experiment
from palimpsest.scripts import generate
from palimpsest.settings.command_line import compose_config
from tests.helpers.commands import TINY, refused, run

FEW = ["data.max_train_texts=64", "data.max_valid_texts=12", "sampling.steps=3", "sampling.latent_steps=2",
       "data.source.num_train_per_class=2000", "data.source.num_validation_per_class=20",
       "data.source.num_test_per_class=20"]  # fmt: skip
JOINT = [*TINY, *FEW, "algo=mmldlm", "latents=synthetic", "optim=adamw", "training.ema=0",
         "lr_scheduler=constant_warmup", "loader.eval_batch_size=8",
         "callbacks=[]", "~logger", "noise.eps=0"]  # fmt: skip
SAMPLE = [*JOINT, "mode=sample_eval", "checkpointing.save_dir=run"]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with a run: six steps at a rate that leaves a network which reads its latents, however badly."""
    folder = tmp_path_factory.mktemp("directions")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(*JOINT, "optim.lr=0.03", "trainer.max_steps=6", "checkpointing.save_dir=run")
        yield folder


def samples(here: Path, direction: str) -> list[dict]:
    return [json.loads(line) for line in (here / "run/sample_eval" / direction / "samples.jsonl").open()]


def test_likelihoods_with_true_shuffled_and_no_latents_are_paired(here):
    found = run(*JOINT, "mode=ppl_eval", "checkpointing.save_dir=run", "eval.target_se=1e-9", "eval.max_draws=4")
    true, other, none = (found[f"nll_{name}_latents"].value for name in ("true", "shuffled", "no"))
    assert found["latent_gain"].value == pytest.approx(other - true) and found["latent_gain"].value != 0
    assert found["latent_gain_over_none"].value == pytest.approx(none - true)
    assert found["nll_nats_per_token"].value == none  # what is called the likelihood is that of the text alone
    assert 0 < found["latent_gain"].se < found["nll_true_latents"].se


def test_a_network_that_ignores_the_latent_gains_nothing_and_writes_the_same(here):
    silent = [*JOINT, "optim.lr=0", "trainer.max_steps=1", "checkpointing.save_dir=silent"]
    run(*silent)
    found = run(*silent, "mode=ppl_eval")
    assert found["latent_gain"].value == 0 == found["latent_gain"].se
    assert found["latent_gain_over_none"].value == 0
    found = run(*silent, "mode=sample_eval", "sampling.direction=l2t")
    assert str(found["true"]) == str(found["shuffled"]) == str(found["none"])
    assert found["true"]["retrieval"][1]["value"] == pytest.approx(found["true"]["retrieval"][1]["chance"])


def test_every_direction_writes_what_it_found(here):
    for direction, more in (("l2t", ["sampling.guidance=2"]), ("t2l", ["sampling.latent_eta=1"]), ("joint", []),
                            ("joint", ["sampling.joint_order=latent_first"])):  # fmt: skip
        found = run(*SAMPLE, f"sampling.direction={direction}", *more)
        folder, rows = here / "run/sample_eval" / direction, samples(here, direction)
        assert (
            len(rows) == 8 and (folder / "report.html").exists() and rows[0]["text" if direction != "l2t" else "true"]
        )
        known = json.loads((folder / "results.json").read_text())
        assert known["protocol"]["direction"] == direction and known["protocol"]["latents"]["encoder"] == "synthetic"
        if direction == "l2t":
            assert {"token_f1", "bleu", "cosine", "retrieval", "attributes"} <= found["none"].keys()
        else:
            latents = np.load(folder / "latents.npy")
            assert latents.shape[:2] == (8, 1) and latents.dtype == np.float32 and np.isfinite(latents).all()
        if direction == "t2l":  # as the encoder has them, not standardised: one-hot vectors have a norm
            assert found["moments"]["real"]["norm"] == pytest.approx(11**0.5, rel=0.1)


def test_a_checkpoint_with_latents_is_enough_to_write_from(here):
    typed = ["--checkpoint", "run/checkpoints/last.ckpt", "--steps", "2", "--num-samples", "2"]
    args = generate.parser().parse_intermixed_args([*typed, "eval.split=validation", "sampling.direction=l2t"])
    assert run(*generate.arguments(args), "checkpointing.save_dir=written")["texts"] == 2


def test_what_weights_were_trained_for_is_asked_of_them(here):
    other = [*JOINT, "mode=ppl_eval", "eval.checkpoint_path=run/checkpoints/last.ckpt", "checkpointing.save_dir=other"]
    refused("add: training.joint_modes=null", *other, "training.joint_modes={l2t: 1, joint: 2}")
    one = [*JOINT, "training.joint_modes={l2t: 1, latent: 1}", "trainer.max_steps=1", "checkpointing.save_dir=one"]
    run(*one)
    other[-2] = "eval.checkpoint_path=one/checkpoints/last.ckpt"
    refused("add: 'training.joint_modes={l2t: 1, latent: 1}'", *other)
    first = ["mode=sample_eval", "sampling.direction=joint", "sampling.joint_order=latent_first"]
    assert run(*one, *first)["network_evaluations_per_sample"] > 0, "first a latent, then a text from it: both trained"


def test_texts_are_edited_towards_a_class_that_they_are_not_of(here):
    run(
        *SAMPLE,
        "sampling.direction=edit",
        "sampling.edit_path=2",
        "sampling.edit_class=negative",
        "sampling.edit_target=centroid",
    )
    rows = samples(here, "edit")
    assert len(rows) > 2 and all(row["class"] == "positive" and row["wanted"] == "negative" for row in rows)
    assert any(row["true"] != row["shuffled"] for row in rows), "another's is the latent of another text, no centroid"


def test_centroids_have_the_length_of_the_encoder_s_vectors(here):
    data = Experiment(compose_config([*SAMPLE]), "a test").build.data()
    latents, label = (
        data.latents.of("train")[np.arange(len(data.split("train")))],
        np.asarray(data.split("train")["label"]),
    )
    vectors, rules = data.latents.vectors(latents), conditional_generation.EditRules(target="centroid")
    found = editing.new_latents(rules, latents[:2], label[:2], np.array([1, 0]), data)
    mean = np.stack([vectors[label == k].mean(0) for k in (1, 0)])
    wanted = mean / np.linalg.norm(mean, axis=1, keepdims=True) * np.linalg.norm(vectors, axis=1).mean()
    np.testing.assert_allclose(data.latents.vectors(found), wanted, atol=1e-5)


@pytest.mark.parametrize("target", ["shift", "neighbour"])
def test_an_edit_touches_nothing_but_its_masks(here, target):
    ask = [*SAMPLE, "sampling.direction=edit", "sampling.edit_path=2", "sampling.edit_positions=contrast",
           "sampling.edit_rate=0.4", f"sampling.edit_target={target}"]  # fmt: skip
    found, rows = run(*ask), samples(here, "edit")
    for row in rows:
        old, new = np.array(row["source_ids"]), np.array(row["ids"])
        kept = ~np.isin(np.arange(len(old)), row["masked"])
        assert (old[kept] == new[kept]).all() and len(old) == len(new) and kept[0] and kept[-1]
        assert (old != new).sum() <= len(row["masked"]) <= 0.4 * len(old) and row["class"] != row["wanted"]
    assert 0 < found["true"]["changed"]["value"] <= found["masked"].value <= 0.4
    assert {"control", "way", "distance"} <= found["shuffled"].keys() & found["none"].keys()
    assert found["none"]["way"]["mts"]["value"] == 0 and "exact posterior" in found["judge"]
    if target == "shift":
        run(*ask, "loader.eval_batch_size=4", "sampling.num_sample_batches=2")
        assert [row["ids"] for row in samples(here, "edit")] == [row["ids"] for row in rows]


def test_an_edit_starts_at_the_masked_share_and_is_conditioned_on_the_target(here, monkeypatch):
    seen, fill, barred, bar = [], SamplingContext.sample, set(), editing.WithoutTokens
    monkeypatch.setattr(editing, "WithoutTokens", lambda model, ids: (barred.add(ids), bar(model, ids))[1])
    monkeypatch.setattr(SamplingContext, "sample", lambda *args: (seen.append(args[3]), fill(*args))[1])
    run(*SAMPLE, "sampling.direction=edit", "sampling.edit_path=2", "sampling.edit_rate=0.33", "sampling.edit_alpha=2")
    rows, (true, shuffled, none, *_) = samples(here, "edit"), seen
    shares = [len(row["masked"]) / (len(row["ids"]) - 2) for row in rows]  # begin and end are never masked
    assert true["begin_B"].tolist() == pytest.approx(shares) and max(shares) < 0.33
    data = Experiment(compose_config([*SAMPLE]), "a test").build.data()
    places = [data.split("validation")["sample_id"].index(row["sample_id"]) for row in rows]
    moved = (true["latent"].numpy() - data.latents.of("validation")[np.array(places)])[:, 0]
    means = [
        data.latents.of("train")[np.flatnonzero(np.array(data.split("train")["label"]) == k)].mean(0) for k in (0, 1)
    ]
    sign = np.array([1 if row["wanted"] == "positive" else -1 for row in rows])[:, None]
    np.testing.assert_allclose(moved, 2 * sign * (means[1] - means[0]), atol=1e-4)
    own = data.latents.of("validation")[np.array(places)]
    whose = [int(np.abs(own - other).sum((1, 2)).argmin()) for other in shuffled["latent"].numpy()]
    np.testing.assert_array_equal(shuffled["latent"].numpy(), own[whose])
    assert sorted(whose) == [*range(len(rows))] and not any(m == other for m, other in enumerate(whose))
    assert (none["latent_t"] == 1).all()
    assert barred == {tuple(sorted(special_ids(data.vocabulary)))}, "an end in the midst of a text is no edit"


def test_latents_are_drawn_from_own_other_and_no_texts_and_written_as_the_encoder_has_them(here, monkeypatch):
    asked = []
    nothing = lambda setting, rows, blanks, names_M, text_M, how: (
        asked.append((names_M.tolist(), text_M.tolist(), how.guidance)),
        np.zeros((len(names_M), *setting.data.latents.shape)),
    )[1]
    monkeypatch.setattr(conditional_generation, "latents_of", nothing)
    run(*SAMPLE, "sampling.direction=t2l", "sampling.guidance=2")
    (own, true, strong), (_, shuffled, as_strong), (_, _, silent) = asked
    assert all(names == own for names, _, _ in asked), "the same noise whatever is told"
    assert true == [*range(8)] == sorted(shuffled) and all(a != b for a, b in zip(true, shuffled, strict=True))
    assert strong == as_strong == 2 and silent == 0
    latents = np.load(here / "run/sample_eval/t2l/latents.npy")
    assert np.linalg.norm(latents[0]) > 1, "the mean of train, which is that of eleven shares"


@pytest.mark.parametrize(("ask", "said"), [
    (["sampling.direction=l2t", "sampling.prefix=the plot"], "sampling.prefix=the plot: with sampling.direction=l2t"),
    (["sampling.direction=t2l", "training.joint_modes={l2t: 1}"], "does not train it; it needs joint or t2l"),
    (["sampling.direction=l2t", "sampling.guidance=2", "training.joint_modes={l2t: 1}"], "which .* never trains"),
    (["sampling.direction=joint", "training.joint_modes={l2t: 1, latent: 1}"], "needs joint"),
    (["sampling.direction=joint", "sampling.joint_order=latent_first", "training.joint_modes={l2t: 1, text: 1}"],
     "it needs joint or latent"),
    (["training.joint_modes=joint"], "training.joint_modes=joint must be names with their values"),
    (["training.freeze=true"], "training.freeze=true must be a list"),
    (["latents.attributes=class"], "latents.attributes=class must be a list"),
], ids=lambda value: "" if isinstance(value, str) else " ".join(value))  # fmt: skip
def test_what_can_not_be_meant_is_refused(tmp_path, monkeypatch, ask, said):
    monkeypatch.chdir(tmp_path)
    mode = ["mode=sample_eval"] if "direction" in ask[0] else ["mode=train"]
    with pytest.raises(ValueError, match=said):
        run(*JOINT, *mode, *ask)


def test_an_edit_of_nothing_is_the_text(here):
    found = run(*SAMPLE, "sampling.direction=edit", "sampling.edit_path=2", "sampling.edit_rate=0")
    assert all(row["ids"] == row["source_ids"] for row in samples(here, "edit"))
    assert found["true"]["changed"]["value"] == 0 == found["true"]["distance"]["value"]
    assert found["true"]["control"]["value"] == found["judged_wanted_before"]["value"]


def test_classification_by_latents(here):
    found = run(
        *JOINT,
        "mode=classify",
        "classify.sharing=conditional",
        "classify.patience=null",
        "sampling.num_sample_log=0",
        "classify.num_examples=0",
        "checkpointing.save_dir=told",
    )
    method = found["methods"]["nearest class centroid of the text's latent"]
    assert 0 <= method["accuracy"].value <= 1 and method["network_evaluations_per_text"] == 2


@pytest.mark.parametrize(("arguments", "said"), [
    (["sampling.direction=up"], "sampling.direction=up must be one of: joint, l2t"),
    (["sampling.direction=edit", "sampling.predictor=first_hitting"], "sampling.predictor=ddpm"),
    (["sampling.direction=joint", "sampling.guidance=2"], "joint_order=latent_first"),
    (["sampling.direction=edit", "sampling.edit_target=moon"], "sampling.edit_target=moon"),
    (["sampling.direction=edit", "sampling.edit_class=7"], "sampling.edit_class=7"),
    (["sampling.direction=edit", "data.label=1"], "data.label=1"),
    (["sampling.direction=l2t", "eval.split=null"], "eval.split=null"),
    (["sampling.latent_steps=null"], "sampling.latent_steps=null"),
    (["sampling.direction=l2t", "algo=mdlm", "latents=none", "backbone=dit"], "add algo=mmldlm"),
])  # fmt: skip
def test_what_means_nothing_is_refused(here, arguments, said):
    plain = [word for word in SAMPLE if not ("algo=mdlm" in arguments and word.startswith(("algo", "latents")))]
    refused(said, *plain, *arguments)
