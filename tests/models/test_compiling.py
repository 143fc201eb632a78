"""trainer.compile=true: one graph per block, the same numbers, no recompilation over a run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import training_noise
from palimpsest.models import compiling
from palimpsest.models.compiling import compile_blocks
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.mask_sampling import Bernoulli
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
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


def test_a_training_step_has_one_graph_per_kind_of_block_and_no_break(random_dit, graphs):
    plain, objective = random_dit(VOCAB).float(), Subs(LogLinear(), Absorbing(MASK), Bernoulli())
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    seen = []
    for step in range(8):  # each with other numbers of masks
        batch = {"input_ids": torch.randint(MASK, (4, 12)), "attention_mask": torch.arange(12).expand(4, -1) < 11}
        found = []
        for network in (plain, compiled):
            network.zero_grad()
            loss = objective.loss(network, batch, training_noise(0, torch.arange(4) + 4 * step, 4)).mean()
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in network.parameters())])
        torch.testing.assert_close(*found)
        seen.append(graphs["stats"]["unique_graphs"])
    assert not graphs["graph_break"]
    # All positions; and some of them, at first as many as there were, then any number.
    assert seen[-1] <= 3 and seen[-1] == seen[2], seen


def test_a_step_of_block_diffusion_is_compiled_too(random_dit, graphs):
    plain = random_dit(VOCAB).float()
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled)
    for _ in range(4):
        x, at = torch.randint(VOCAB, (3, 12)), torch.rand(3, 12) < 0.5
        hidden = [net.encode_blocks(x, x.flip(1), 4, torch.rand(3, 3), Positions(at)) for net in (plain, compiled)]
        torch.testing.assert_close(*hidden)
    assert graphs["stats"]["unique_graphs"] >= 2


def test_a_compiled_training_is_measured_and_sampled(tmp_path, monkeypatch, graphs):
    monkeypatch.chdir(tmp_path)
    results = run(*TINY, "trainer.compile=true")
    assert results["nll_nats_per_token"].value > 0 and graphs["stats"]["unique_graphs"] >= 1
    assert run(*TINY, "mode=sample_eval", "trainer.compile=true")  # finds the same folder


def test_other_networks_refuse_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="trainer.compile=true: AR does not support it"):
        run(*TINY, "algo=ar", "trainer.compile=true")
