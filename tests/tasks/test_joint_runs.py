"""algo=mmldlm from the command line to the weights: what is trained, logged, started from and refused."""

from __future__ import annotations

import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from palimpsest.common.randomness import evaluation_noise
from palimpsest.experiment import building
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.checkpoints import load_inert, read_checkpoint
from palimpsest.objectives.joint import MODE_SHARES
from palimpsest.process import Absorbing
from palimpsest.report import training
from palimpsest.report.training import history
from palimpsest.settings.command_line import compose_config, explain
from palimpsest.settings.identity import identity
from palimpsest.training.callbacks.gradient_shares import GradientShares
from palimpsest.training.updates import Updates
from tests.helpers.commands import FEW, TINY, run
from tests.helpers.joint import LatentText, batch, network, noise, objective, with_latents
from tests.helpers.networks import assert_close_weights

JOINT = [*TINY, *FEW, "algo=mmldlm", "latents=synthetic", "optim=adamw", "trainer.log_every_n_steps=1",
         "loader.global_batch_size=8", "trainer.val_check_interval=2"]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder, and texts with latents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(building, "TextData", LatentText)
    return tmp_path


def experiment(*overrides: str) -> Experiment:
    return Experiment(compose_config([*JOINT, *overrides]), "a test")


def trained(folder: str, *overrides: str) -> Path:
    return fit(experiment(*overrides, f"checkpointing.save_dir={folder}"))


def test_a_training_tells_both_terms_and_calls_neither_a_likelihood(here):
    shares = "callbacks.gradient_shares.every_n_steps=1"
    results = run(*JOINT, shares, "checkpointing.save_dir=run")
    assert 0 < results["nll_nats_per_token"].value < 20
    logged = history(here / "run")
    assert "train/loss" in logged and "train/nll" not in logged and "val/nll" in logged
    assert {f"train/share_{mode}" for mode in MODE_SHARES} <= logged.keys()
    for step in range(2):
        value = {name: points[step, 1] for name, points in logged.items() if len(points) == 2}
        assert value["train/text_term"] + value["train/latent_term"] == pytest.approx(value["train/loss"], rel=1e-5)
        assert value["train/grad_share_text"] + value["train/grad_share_latent"] == pytest.approx(1)
        assert value["train/latent_mse"] > 0 and abs(value["train/latent_cos"]) <= 1
    assert results["checkpoint"] and "never drop" not in (here / "run/report.html").read_text()


def test_a_training_from_latents_alone_says_that_it_did_not_learn_texts_alone(here, capsys):
    told = [*JOINT, "training.joint_modes={l2t: 1, t2l: 1}", "checkpointing.save_dir=run"]
    run(*told)
    run(*told, "mode=ppl_eval")
    for report in (here / "run/report.html", *here.glob("run/ppl_eval/*/report.html")):
        assert "(l2t, t2l) never drop a text" in report.read_text()
    assert capsys.readouterr().out.count("never drop a text's latent") == 2


@pytest.mark.parametrize(("name", "drawn"), [("train/nll", 1.5), ("train/text_loss", None)])
def test_the_entropy_of_texts_alone_is_no_line_beside_texts_with_latents(monkeypatch, name, drawn):
    logged = {name: np.array([[1, 2.0], [2, 1.9]]), "val/nll": np.array([[2, 1.2]]), "val/nll_se": np.array([[2, 0.1]])}
    monkeypatch.setattr(training, "history", lambda folder: logged)
    monkeypatch.setattr(training.plots, "loss_curve", lambda *points: points)
    report = Mock()
    training.add_loss_curve(report, Path(), 1.5)
    (_, _, truth), caption, _ = report.figure.call_args.args
    assert truth == drawn and ("texts alone" in caption) == (drawn is None)


def test_no_size_of_micro_batches_changes_the_weights_or_the_means(here):
    """The texts are padded, so that micro-batches hold different numbers of tokens; shares change no weights."""
    paths = [trained(f"b{size}", f"loader.batch_size={size}", *more)
             for size, more in ((8, []), (2, ["callbacks=[checkpoint_every_n_steps]"]))]  # fmt: skip
    assert_close_weights(*paths, atol=1e-6)
    logged = [history(Path(name)) for name in ("b8", "b2")]
    for name in ("loss", "text_term", "latent_term", "text_loss", "latent_loss", "latent_mse", "share_l2t"):
        assert logged[0][f"train/{name}"] == pytest.approx(logged[1][f"train/{name}"], rel=1e-5), name
    assert "train/grad_share_text" in logged[0] and "train/grad_share_text" not in logged[1]


def test_weights_are_float32_whatever_is_computed_in(here, monkeypatch):
    seen = []
    prepare = Updates.prepare

    def spy(self, optimizer, max_norm):
        seen.extend(p.grad.dtype for group in optimizer.param_groups for p in group["params"])
        prepare(self, optimizer, max_norm)

    monkeypatch.setattr(Updates, "prepare", spy)
    path = trained("run", "trainer.precision=bf16-mixed", "optim.lr=5e-5", "trainer.max_steps=3")
    state = load_inert(path)["state_dict"]
    assert set(seen) == {torch.float32} and {p.dtype for name, p in state.items()} == {torch.float32}
    # In bfloat16 a step of 5e-5 on a weight of 1 is none.
    assert 0 < (state["backbone.output_layer.norm_final.weight"] - 1).abs().max() < 1e-3
    with pytest.raises(ValueError, match="trainer.precision=bf16-true must be one of: 32-true, 16-mixed"):
        run(*JOINT, "trainer.precision=bf16-true")


def test_a_text_only_model_starts_the_text_stream_and_loses_nothing(here, monkeypatch, capsys):
    kept = [word for word in JOINT if word not in ("algo=mmldlm", "latents=synthetic")]
    alone = ["algo=mdlm", *kept, "checkpointing.save_dir=mdlm"]
    with monkeypatch.context() as plain:
        plain.setattr(building, "TextData", LatentText.__base__)
        mdlm = Experiment(compose_config([*alone, "optim.lr=0.01", "trainer.max_steps=6"]), "a test")
        path = fit(mdlm)
        texts = next(iter(mdlm.build.data().val_dataloader()))
        text_only = mdlm.weights.trained(mdlm.build.data(), str(path), disable_ema=False)
    start = [f"training.from_pretrained={path}", "time_conditioning=false"]
    with pytest.raises(ValueError, match="add: time_conditioning=False"):
        fit(experiment(start[0], "backbone.text_as_dit=true", "checkpointing.save_dir=x"))
    with pytest.raises(ValueError, match="add backbone.text_as_dit=true"):
        fit(experiment(*start, "checkpointing.save_dir=y"))
    joint = experiment(
        *start,
        "backbone.text_as_dit=true",
        "training.freeze=[text]",
        "optim.lr=0.01",
        "trainer.max_steps=4",
        "checkpointing.save_dir=joint",
    )
    data = joint.build.data()
    diffusion = joint.build.diffusion(data)
    joint.weights.load_initial(diffusion, data, None)
    assert "so initialized: blocks.*.latent" in capsys.readouterr().out
    names = texts["sample_id"]
    with torch.no_grad(), diffusion.averaged():
        wanted = text_only.objective.bound(None).loss(text_only.backbone, texts, evaluation_noise(1, names)).nll_BL
        for told in (with_latents(texts), texts):
            law = diffusion.eval().objective.bound(None)
            assert torch.equal(law.loss(diffusion.backbone, told, evaluation_noise(1, names)).nll_BL, wanted)
    before = {name: p.clone() for name, p in text_only.backbone.state_dict().items()}
    state = load_inert(fit(joint))["state_dict"]
    assert all(torch.equal(state[f"backbone.{name}"], p) for name, p in before.items()), "and frozen it stays that"
    assert state["backbone.blocks.0.adaLN_gate.weight"].any(), "the gates open"
    again = read_checkpoint("joint/checkpoints/last.ckpt")
    fresh = joint.build.diffusion(data)
    assert fresh.start_from(again) == {}


def test_gradient_shares_are_those_of_two_backward_passes():
    net, texts, law = network(), batch(8), objective(latent_weight=0.4)

    def gradient(term) -> torch.Tensor:
        net.zero_grad()
        term(law.loss(net, texts, noise(8))).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
        return torch.cat([grad.flatten() for grad in grads]).double()

    text, latent = gradient(lambda loss: loss.nll_BL.sum()), gradient(lambda loss: loss.row_B.sum())

    class Module:
        device_mesh, backbone = None, net

        def training_loss(self, batch):
            return law.loss(net, batch, noise(8))

    class Trainer:
        global_step, is_global_zero = 0, True
        precision_plugin = type("", (), {"train_step_context": staticmethod(torch.enable_grad)})

    shares = GradientShares(2)
    shares.on_train_batch_start(Trainer, Module(), texts, 0)
    found = shares.interval_metrics()
    assert found["train/grad_share_text"] == pytest.approx(float(text.norm() / (text.norm() + latent.norm())), rel=1e-4)
    assert found["train/grad_share_latent"] == pytest.approx(1 - found["train/grad_share_text"], rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(text, latent, dim=0)
    assert found["train/grad_cosine"] == pytest.approx(float(cosine), rel=1e-3, abs=1e-6)
    Trainer.global_step = 1
    shares.on_train_batch_start(Trainer, Module(), texts, 1)
    assert shares.interval_metrics() == {}


def test_what_is_typed_reaches_what_it_is_for():
    """Options that are read from somewhere else would do nothing, without a word."""
    cfg = compose_config(["algo=mmldlm", "model.length=50", "model.latent_size=48",
                          "training.joint_modes={l2t: 1, t2l: 3}", "training.text_weight=0.5",
                          "training.latent_weight=0.1", "training.latent_target=x0", "training.latent_loss=mse_cosine",
                          "training.latent_cosine_weight=0.3", "noise=cosine", "T=7",
                          "backbone.text_as_dit=true"])  # fmt: skip
    law = instantiate(cfg.parameterization, process=Absorbing(5))
    assert law.shares == {"l2t": 0.25, "t2l": 0.75} and law.process.mask_id == law.inner.process.mask_id == 5
    assert (law.text_weight, law.latent_weight, law.latent_tokens, law.T) == (0.5, 0.1, 50, 7)
    assert (law.latent.target, law.latent.form, law.latent.cosine_weight) == ("x0", "mse_cosine", 0.3)
    assert type(law.schedule).__name__ == "Cosine"
    net = instantiate(cfg.backbone, vocab_size=9, latent_shape=(1, 4))
    assert net.latent_size == 48 and net.text_as_dit and net.time_conditioning
    assert net.settings["model.latent_size"] == 48
    plain = identity(compose_config([]))
    assert not any("latent" in key or "joint" in key or "freeze" in key for key in plain), "no other run is renamed"
    assert identity(cfg)["training.joint_modes.t2l"] == 3 and identity(cfg)["parameterization"] == "mmldlm"


@pytest.mark.parametrize(("arguments", "said"), [
    (["backbone=dit"], "needs a network that reads texts and latents.*use backbone=mmdit"),
    (["algo=mdlm"], "parameterization=subs makes nothing of latents"),
    (["training.loss_weight=uniform"], "training.loss_weight=uniform means nothing to parameterization=mmldlm"),
    (["training.change_of_variables=true"], "training.change_of_variables=true means nothing"),
    (["training.joint_modes={both: 1}"], "both is unknown"),
    (["training.joint_modes={l2t: many}"], "training.joint_modes.l2t=many must be a number"),
    (["training.latent_loss=cosine"], "cosine with training.latent_target=v"),
    (["training.freeze=[txt]"], "MMDiT has no part txt; what exists: blocks, conditioning, embeddings, head, latent,"),
    (["training.freeze=[latent]"], "would keep random values in .*blocks.*latent"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_what_can_not_be_meant_is_refused_with_the_reason(here, arguments, said):
    words = [word for word in JOINT if not (arguments[0].startswith("algo=") and word.startswith("algo="))]
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - explain() is what is tested
        run(*words, *arguments)
    assert re.search(said, explain(caught.value))


def test_without_latents_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="add latents=lsa"):
        run(*(word for word in JOINT if word != "latents=synthetic"))
