"""trainer.compile=true: the encoder is one graph, with the same numbers, and is not compiled again over a run."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

from palimpsest.common.randomness import KeyedNoise, training_noise
from palimpsest.denoisers import ClassGuided
from palimpsest.models import block_attention, compiling, segment_attention
from palimpsest.models.compiling import compile_encoder
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.duo import Duo
from palimpsest.objectives.mask_sampling import Bernoulli
from palimpsest.objectives.subs import Subs
from palimpsest.objectives.udlm import UDLM
from palimpsest.process import Absorbing, Uniform
from palimpsest.samplers import first_hitting
from tests.helpers.blocks import block
from tests.helpers.commands import TINY, run

VOCAB, MASK = 7, 6


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Graphs are captured as for any backend, and run by Python, which takes no minute to compile."""
    monkeypatch.setattr(compiling, "_BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


OBJECTIVES = {
    "subs": lambda: Subs(LogLinear(), Absorbing(MASK), Bernoulli()),
    "bd3lm": lambda: block(4, noising=Bernoulli(), mask_id=MASK),
    "udlm": lambda: UDLM(LogLinear(), Uniform(VOCAB)),
    "duo": lambda: Duo(LogLinear(), Uniform(VOCAB)),
}


@pytest.mark.parametrize("recomputing", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_encoder_of_all_training_steps_is_one_graph(random_dit, graphs, name, recomputing):
    plain, objective = random_dit(VOCAB, time_conditioning=True).float().train(), OBJECTIVES[name]()
    compiled = copy.deepcopy(plain)
    if recomputing:
        compiled.recompute_blocks()
    compile_encoder(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for step in range(6):  # each with other numbers of masks
        batch = {"input_ids": torch.randint(MASK, (4, 12)), "attention_mask": torch.arange(12).expand(4, -1) < 11}
        batch |= {"step": torch.tensor(step)} if name == "duo" else {}
        found = []
        for network in (plain, compiled):
            network.zero_grad()
            loss = objective.loss(network, batch, training_noise(0, torch.arange(4) + 4 * step, 4)).mean()
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in network.parameters())])
        torch.testing.assert_close(*found)
        assert not graphs["graph_break"] and graphs["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("segments", [False, True])
def test_flex_is_part_of_one_graph_also_where_blocks_are_recomputed(monkeypatch, graphs, segments):
    """A GPU is imitated: torch refuses to train with flex on a CPU, although it can without compiling its kernel."""

    def attend(q, k, v, mask, score_mod=None):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention.flex_attention(q, k, v, score_mod=score_mod, block_mask=mask).transpose(1, 2)

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    for module in (block_attention, segment_attention):
        monkeypatch.setattr(module, "flex_attend", attend)
    found, blocks = [], (torch.arange(12) // 4).expand(4, -1) if segments else 4
    for backend in ("sdpa", "flex"):
        torch.manual_seed(0)
        network = DiT(VOCAB, 16, 4, 3, 2, dropout=0.0, attn_backend=backend)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if backend == "flex":
            network.recompute_blocks()
            compile_encoder(network)
        x0 = torch.randint(MASK, (4, 12))
        hidden = network.encode_blocks(x0.masked_fill(torch.rand(4, 12) < 0.5, MASK), x0, blocks, torch.rand(4, 3))
        hidden.sum().backward()
        found.append([hidden.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not graphs["graph_break"] and graphs["stats"]["unique_graphs"] == 1


def test_a_compiled_training_is_measured_and_sampled(tmp_path, monkeypatch, graphs):
    monkeypatch.chdir(tmp_path)
    results = run(*TINY, "trainer.compile=true")
    assert results["nll_nats_per_token"].value > 0 and graphs["stats"]["unique_graphs"] >= 1
    assert run(*TINY, "mode=sample_eval", "trainer.compile=true")  # finds the same folder


def test_padded_rows_of_all_lengths_take_two_graphs(random_dit, graphs):
    network = random_dit(VOCAB, time_conditioning=True).float().train()
    compile_encoder(network)
    for length in (8, 16, 24, 32, 40):
        here = torch.arange(length).expand(4, -1) < torch.tensor([[length], [3], [5], [7]])
        network.encode(torch.randint(MASK, (4, length)), torch.rand(4), attention_mask=here).sum().backward()
    assert not graphs["graph_break"] and graphs["stats"]["unique_graphs"] == 2


def test_a_cuda_graph_is_replayed_on_a_gpu_without_gradients_only():
    states = torch.ones(2)
    encode = compiling._replaying(lambda x: "compiled", lambda x: states)
    cpu = torch.zeros(2)
    gpu = SimpleNamespace(is_cuda=True)
    assert encode(gpu) == "compiled"
    with torch.no_grad():
        assert encode(cpu) == "compiled"
        found = encode(gpu)
    states.zero_()  # the next replay
    assert found.tolist() == [1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_replayed_graphs_write_the_same_texts(random_dit, monkeypatch, guidance):
    monkeypatch.setattr(compiling, "_BACKEND", "inductor")
    plain = random_dit(VOCAB, num_classes=2).float().cuda().eval()
    compiled = copy.deepcopy(plain)
    compile_encoder(compiled)
    rows_B, blank_BL = torch.arange(4, device="cuda"), torch.full((4, 12), MASK, device="cuda")

    def texts(network):
        model = Model(Subs(LogLinear(), Absorbing(MASK)), network)
        guided = ClassGuided(model, class_id=1, weight=guidance)
        with torch.inference_mode():
            return first_hitting.sample(guided, blank_BL, KeyedNoise(0, rows_B)).ids_BL

    assert (texts(compiled) == texts(plain)).float().mean() > 0.9  # sums are in another order


def test_other_networks_refuse_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="trainer.compile=true: AR does not support it"):
        run(*TINY, "algo=ar", "trainer.compile=true")


def test_flash_attn_is_not_compiled():
    net = DiT(VOCAB, 16, 4, 1, 2)
    net.blocks[0].attn_backend = "flash_attn"
    with pytest.raises(ValueError, match="trainer.compile=true.*model.attn_backend=sdpa"):
        compile_encoder(net)
