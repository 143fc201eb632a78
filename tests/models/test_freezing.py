"""Parts of a network that training leaves unchanged."""

from __future__ import annotations

import pytest
import torch

from palimpsest.experiment import running
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.backbone import Backbone
from palimpsest.models.checkpoints import load_inert, read_checkpoint
from palimpsest.models.ema import EMA
from palimpsest.models.freezing import freeze, refuse_frozen, summary
from palimpsest.settings.command_line import compose_config
from palimpsest.training.updates import Updates
from tests.helpers.commands import FEW, TINY
from tests.helpers.joint import network
from tests.helpers.networks import networks


@pytest.mark.parametrize("name", ["dit", "ar", "dimamba", "hf_causal", "mmdit"])
def test_every_network_names_its_parts(name):
    net = networks()[name] if name != "mmdit" else network(text_as_dit=True)
    parts = {part: {id(p) for module in modules for p in module.parameters()} for part, modules in net.parts.items()}
    assert {"embeddings", "blocks", "head"} <= parts.keys()
    everything = {id(p) for p in net.parameters()}
    assert set().union(*parts.values()) <= everything and all(parts.values())
    assert {id(p) for p in net.head.parameters()} <= parts["head"]
    assert {id(p) for block in net.blocks for p in block.parameters()} == parts["blocks"]
    freeze(net, ["blocks"])
    assert {id(p) for p in net.parameters() if not p.requires_grad} == parts["blocks"]
    if name == "mmdit":
        assert not parts["text"] & parts["latent"] and parts["text"] | parts["latent"] == everything
        assert parts["text"] == {id(p) for p in net.text_stream.parameters()}, "gates are the latent's: they open"


def test_unknown_parts_are_refused():
    net = network()
    for names, message in ((["tail"], "MMDiT has no part tail; what exists: blocks, conditioning, embeddings, head,"),
                        (["text", "latent"], "leaves nothing to train")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            freeze(net, names)
    with pytest.raises(ValueError, match="Backbone names no parts to freeze"):
        freeze(Backbone(), ["head"])
    refuse_frozen(net, {})
    with pytest.raises(ValueError, match="would keep random values in vocab_embed .*training.from_pretrained="):
        refuse_frozen(net, dict(net.named_parameters()))
    assert summary({"blocks.0.a.b": torch.zeros(2), "blocks.1.a.c": torch.zeros(3)}) == "blocks.*.a (5)"


@pytest.mark.parametrize(("overrides", "part", "inside"), [
    (["optim=adamw", "optim.weight_decay=0.1"], "blocks", "backbone.blocks."),
    (["optim=muon", "parameterization=ar"], "embeddings", "backbone.vocab_embed."),
], ids=["blocks of a dit", "embeddings of an ar"])  # fmt: skip
def test_frozen_tensors_are_the_same_bits_after_training(tmp_path, monkeypatch, overrides, part, inside):
    monkeypatch.chdir(tmp_path)
    settings = [*TINY, *FEW, *overrides, "model.dropout=0.1", "model.n_blocks=2"]
    experiment = lambda *more: Experiment(compose_config([*settings, *more]), "a test")  # noqa: E731
    first = read_checkpoint(fit(experiment("checkpointing.save_dir=first")))
    names = [name for name in first.state if not name.endswith("inv_freq")]
    freezing = [f"training.freeze=[{part}]", "checkpointing.save_dir=second"]
    with pytest.raises(ValueError, match="would keep random values"):
        fit(experiment(*freezing))
    seen, prepare = [], Updates.prepare
    spy = lambda self, optimizer, norm: seen.append(optimizer) or prepare(self, optimizer, norm)  # noqa: E731
    monkeypatch.setattr(Updates, "prepare", spy)
    last = load_inert(fit(experiment(*freezing, f"training.from_pretrained={first.path}")))
    start, state = dict(zip(names, first.ema["shadow_params"], strict=True)), last["state_dict"]
    average = dict(zip(names, last["ema"]["shadow_params"], strict=True))
    for name in start:
        kept = torch.equal(state[f"backbone.{name}"], start[name])
        assert kept == f"backbone.{name}".startswith(inside) == torch.equal(average[name], start[name]), name
    learned = {id(p) for group in seen[0].param_groups for p in group["params"]}
    assert len(learned) == sum(not f"backbone.{name}".startswith(inside) for name in start)
    # Evaluation needs no setting of what was frozen: weights and average are those of the whole network.
    running.run(
        compose_config([*settings, "mode=ppl_eval", "eval.checkpoint_path=second/checkpoints/last.ckpt"]), "a test"
    )


def test_an_average_takes_frozen_weights_as_they_are():
    net = network()
    freeze(net, ["text"])
    average = EMA(net.parameters(), 0.9)
    for _ in range(5):
        average.update(net.parameters())
    assert all(torch.equal(s, p) for s, p in zip(average.shadow_params, net.parameters(), strict=True))
