"""Learning-rate schedules: values at selected steps, the same curve after a resume, invalid settings refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from palimpsest.experiment.building import Builder
from palimpsest.experiment.running import checked
from palimpsest.settings.command_line import CONFIGS, compose_config, explain
from tests.helpers.commands import TINY, run

STEPS = 100
OWN = ("cosine", "wsd", "restarts")


def build(name: str, *settings: str, steps: int = STEPS):
    """Return an optimizer with rates 1 and 10 and its scheduler; 10 steps of warm-up unless `settings` differ."""
    file = OmegaConf.load(CONFIGS / "lr_scheduler" / f"{name}.yaml")
    typed = OmegaConf.from_dotlist(["num_warmup_steps=10", *settings])
    cfg = OmegaConf.create({"lr_scheduler": OmegaConf.merge(file, typed), "trainer": {"max_steps": steps}})
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in (1.0, 10.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return optimizer, instantiate(cfg.lr_scheduler)(optimizer)


def curve(optimizer, scheduler, steps: int) -> list[float]:
    """Return the rate of each of the next steps; that of the second group is always ten times it."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(10 * rates[-1], rel=1e-12)
        optimizer.step()
        scheduler.step()
    return rates


PERIODS = ["periods=[40,30]", "num_rewarmup_steps=5", "peak_decay=0.5"]


@pytest.mark.parametrize(("name", "settings", "expected"), [
    # step -> rate, by hand. The two schedules of the references begin at 0; half of 100 steps after the warm-up is 55.
    ("constant", ["num_warmup_steps=0"], {0: 1, 1: 1, 50: 1, 99: 1}),
    ("constant_warmup", [], {0: 0, 5: 0.5, 9: 0.9, 10: 1, 55: 1, 99: 1}),
    ("cosine_decay_warmup", [], {0: 0, 5: 0.5, 10: 1, 55: 0.5, 99: 0.5 * (1 + -0.99939083)}),
    ("cosine", [], {0: 0.1, 4: 0.5, 9: 1, 54: 0.1 + 0.9 * 0.5, 99: 0.1}),
    ("cosine", ["num_warmup_steps=0", "min_ratio=0"], {0: 0.99975328, 49: 0.5, 99: 0}),
    ("wsd", [], {0: 0.1, 9: 1, 10: 1, 79: 1, 84: 0.1 + 0.9 * 0.5, 99: 0.1}),
    ("wsd", ["decay=linear", "min_ratio=0"], {79: 1, 80: 0.95, 89: 0.5, 99: 0}),
    ("wsd", ["decay=cosine", "decay_share=0.5"], {49: 1, 74: 0.1 + 0.9 * 0.5, 99: 0.1}),
    # Periods of 40, 30 and 30 steps with peaks 1, 0.5 and 0.25, each after 5 steps up from 0.1.
    ("restarts", PERIODS, {0: 0.1, 9: 1, 24: 0.1 + 0.9 * 0.5, 39: 0.1, 40: 0.18, 44: 0.5, 69: 0.1, 74: 0.25, 99: 0.1}),
], ids=lambda v: v if isinstance(v, str) else "")  # fmt: skip
def test_values(name, settings, expected):
    rates = curve(*build(name, *settings), STEPS)
    assert {step: rates[step] for step in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", OWN)
def test_our_schedules_move_from_the_first_step_on_and_never_jump(name):
    rates = curve(*build(name, *(PERIODS if name == "restarts" else [])), STEPS)
    assert min(rates) >= 0.1 - 1e-12 and max(rates) == pytest.approx(1)
    assert max(abs(b - a) for a, b in zip(rates, rates[1:], strict=False)) < 0.21
    optimizer, scheduler = build(name, *(PERIODS if name == "restarts" else []))
    assert curve(optimizer, scheduler, STEPS + 5)[STEPS:] == pytest.approx([0.1] * 5), "past the end it stays there"


@pytest.mark.parametrize("name", ["constant", "constant_warmup", "cosine_decay_warmup", *OWN])
def test_a_resume_continues_the_same_curve(name):
    settings = PERIODS if name == "restarts" else []
    whole = curve(*build(name, *settings), STEPS)
    for stop in (1, 7, 47, 85):
        optimizer, scheduler = build(name, *settings)
        curve(optimizer, scheduler, stop)
        saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
        optimizer, scheduler = build(name, *settings)
        optimizer.load_state_dict(saved[0])
        scheduler.load_state_dict(saved[1])
        assert curve(optimizer, scheduler, STEPS - stop) == whole[stop:]


def test_an_extended_wsd_equals_a_longer_one():
    short, long = (curve(*build("wsd", steps=steps), 80) for steps in (100, 400))
    assert short == long


@pytest.mark.parametrize(("name", "setting", "message"), [
    ("cosine", "num_warmup_steps=100", "lr_scheduler.num_warmup_steps=100 must be below trainer.max_steps=100"),
    ("wsd", "decay_share=0.95", "do not fit into trainer.max_steps=100"),
    ("restarts", "periods=[10]", "a period of 10 steps leaves none after its warm-up"),
    ("restarts", "peak_decay=0.05", "lr_scheduler.peak_decay=0.05"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(name, setting, message):
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - Hydra wraps it
        build(name, setting)
    assert message in explain(caught.value)


@pytest.mark.parametrize(("arguments", "message"), [
    (["lr_scheduler=cosine", "lr_scheduler.num_warmup_steps=2"], "lr_scheduler.num_warmup_steps=2"),
    (["lr_scheduler=cosine", "lr_scheduler.min_ratio=low"], "lr_scheduler.min_ratio=low must be a number"),
    (["lr_scheduler=wsd", "lr_scheduler.num_training_steps=7"], "contradicts trainer.max_steps=2"),
    (["lr_scheduler=constant", "lr_scheduler.num_warmup_steps=-1"], "lr_scheduler.num_warmup_steps=-1"),
])  # fmt: skip
def test_settings_are_refused_before_data_are_read(monkeypatch, arguments, message):
    monkeypatch.setattr(Builder, "data", lambda *_: pytest.fail("it went on"))
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - explain() is what is tested
        run(*TINY, *arguments)
    assert message in explain(caught.value)


def test_a_training_of_warm_up_only_gets_a_warning_with_its_remedy(caplog):
    with caplog.at_level(logging.WARNING):
        checked(compose_config(["data=wikitext2", "trainer.max_steps=500"]), "a test")
    assert "num_warmup_steps=2500 is not below trainer.max_steps=500" in caplog.text
    assert "set lr_scheduler.num_warmup_steps=25 or so" in caplog.text
    caplog.clear()
    for fine in (["data=wikitext2"], [], ["trainer.max_steps=5", "mode=ppl_eval"]):
        checked(compose_config(fine), "a test")
    assert not caplog.text
