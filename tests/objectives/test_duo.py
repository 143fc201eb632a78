"""DUO's curriculum: the Gaussian whose argmax is the uniform-state process, and a training through it."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from palimpsest.common.randomness import KeyedNoise, evaluation_noise
from palimpsest.experiment import running
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.duo import Duo, gaussian_draw, signal_table
from palimpsest.objectives.udlm import UDLM
from palimpsest.process import Uniform
from palimpsest.settings.command_line import compose_config
from tests.helpers.commands import TINY, run
from tests.helpers.draws import draw_at
from tests.helpers.laws import FALSE_ALARM

V = 5


@pytest.mark.parametrize("vocab", [2, 5, 300])
@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.95])
def test_the_argmax_is_the_uniform_state_process(vocab, alpha):
    law = Duo(LogLinear(), Uniform(vocab))
    signal = law._signal(torch.tensor([alpha]).double())
    rows = 20_000 if vocab < 100 else 4_000
    x0 = torch.full((rows, 1), 1)
    found = gaussian_draw(x0, signal.expand(rows), vocab, KeyedNoise(3, torch.arange(rows))).argmax(-1).flatten()
    kept = int((found == 1).sum())
    assert stats.binomtest(kept, rows, alpha + (1 - alpha) / vocab).pvalue > FALSE_ALARM
    others = torch.bincount(found, minlength=vocab)[[v for v in range(vocab) if v != 1]]
    if vocab == 5:
        assert stats.chisquare(others.numpy()).pvalue > FALSE_ALARM, "what replaces a token is any other, evenly"


def test_the_table_goes_from_nothing_to_everything():
    signal, alpha = signal_table(50_258)
    assert alpha[0] == pytest.approx(0, abs=1e-9) and alpha[-1] > 1 - 1e-9
    assert (alpha.diff() >= 0).all() and (signal.diff() > 0).all()


def test_a_low_temperature_is_the_plain_loss_on_the_argmax_and_the_curriculum_ends(random_dit):
    net = random_dit(V, time_conditioning=True).float().train()
    batch = {
        "input_ids": torch.randint(V, (6, 7), generator=torch.Generator().manual_seed(0)),
        "observed": torch.arange(7).expand(6, -1) == 0,
    }
    noise = lambda: evaluation_noise(0, torch.arange(6))  # noqa: E731
    plain = UDLM(LogLinear(), Uniform(V)).loss(net, batch, noise()).nll_BL
    hard = Duo(LogLinear(), Uniform(V), None, 10, -9.0, -9.0)
    assert torch.equal(hard.loss(net, batch, noise()).nll_BL, plain), "measured, it is UDLM"
    assert torch.equal(hard.loss(net, {**batch, "step": torch.tensor(10)}, noise()).nll_BL, plain)
    early = {**batch, "step": torch.tensor(3)}
    (draw,) = hard.mask_sampler(hard.schedule, batch["input_ids"], ~batch["observed"], hard.process, noise())
    same = noise()
    hard.mask_sampler(hard.schedule, batch["input_ids"], ~batch["observed"], hard.process, same)
    network, xt = hard.network_input(net, early, draw, same)
    assert torch.equal(xt[:, 0], batch["input_ids"][:, 0])
    found = hard.loss_at(network, batch, draw_at(xt, draw.t_B)).nll_BL
    torch.testing.assert_close(found, hard.loss_at(net, batch, draw_at(xt, draw.t_B)).nll_BL, rtol=1e-4, atol=1e-5)
    soft = Duo(LogLinear(), Uniform(V), None, 10, 0.0, 0.0)
    network, _ = soft.network_input(net, early, draw, same)
    assert not torch.allclose(soft.loss_at(network, batch, draw_at(xt, draw.t_B)).nll_BL, found, rtol=1e-2)
    assert [Duo(LogLinear(), Uniform(V), None, 10).temperature(k) for k in (0, 5, 10)] == pytest.approx(
        [0.1, 10**-1.5, 0.01]
    )


def test_a_training_goes_through_the_curriculum_and_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "algo=duo", "algo.curriculum_end=1"]
    running.run(compose_config(words), "a training")
    assert run(*words, "mode=ppl_eval")
    assert run(*words, "mode=sample_eval")
    with pytest.raises(ValueError, match="curriculum_end=-1"):
        running.run(compose_config([*TINY, "algo=duo", "algo.curriculum_end=-1"]), "a training")
