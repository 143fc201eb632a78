"""The plateau factor: a cut after its patience, none while validation improves, the same after a resume."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from palimpsest.diffusion import Diffusion
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.checkpoints import load_inert
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from palimpsest.training.callbacks.plateau import Plateau
from palimpsest.training.lr_schedules import cosine
from tests.helpers.commands import TINY

NAN = math.nan


@pytest.mark.parametrize(("settings", "values", "cuts"), [
    ({"patience": 3}, [5, 4, 3, 2, 1, 0.5], []),
    ({"patience": 3}, [5, 5, 5, 5], [3]),
    ({"patience": 3, "cooldown": 0}, [5] * 8, [3, 6]),
    ({"patience": 3, "cooldown": 2}, [5] * 9, [3, 8]),
    ({"patience": 2}, [5, 6, 4, 6, 3, 6], []),
    ({"patience": 2, "cooldown": 0}, [5, NAN, NAN, 4], [2]),
    ({"patience": 2, "cooldown": 0, "min_delta": 0.1}, [5, 4.95, 4.92, 4.8], [2]),
    ({"patience": 1, "cooldown": 0, "factor": 0.5, "floor": 0.25}, [5] * 6, [1, 2]),
    ({"patience": 1, "cooldown": 2}, [5, 5, 4, 5, 5], [1, 4]),
])  # fmt: skip
def test_when_it_cuts(settings, values, cuts):
    plateau = Plateau(**settings)
    assert [place for place, value in enumerate(values) if plateau.update(value)] == cuts
    assert plateau.state.factor == pytest.approx(0.5 ** len(cuts))


def test_the_floor_holds():
    plateau = Plateau(patience=1, cooldown=0, factor=0.3, floor=0.2)
    factors = [plateau.state.factor for _ in range(6) if plateau.update(1.0) or True]
    assert factors == pytest.approx([1.0, 0.3, 0.2, 0.2, 0.2, 0.2])


def fitted(values: list[float], plateau: Plateau) -> list[float]:
    """Return the rates of 20 steps under a cosine; the first steps are followed by validations with `values`."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    scheduler = cosine(optimizer, 20, 2)
    trainer = SimpleNamespace(
        sanity_checking=False,
        callback_metrics={},
        global_step=0,
        strategy=SimpleNamespace(broadcast=lambda x: x),
        lr_scheduler_configs=[SimpleNamespace(scheduler=scheduler)],
    )
    rates = []
    for step in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        if step < len(values):
            trainer.callback_metrics["val/nll"] = torch.tensor(values[step])
            plateau.on_validation_end(trainer, None)
    return rates


def test_a_cut_scales_all_later_steps_and_only_those():
    plain, cut = fitted([5, 4, 3, 2], Plateau(patience=2)), fitted([5, 5, 5, 4], Plateau(patience=2))
    assert cut[:3] == plain[:3]
    assert cut[3:] == pytest.approx([0.5 * rate for rate in plain[3:]])


def test_every_rank_uses_the_value_of_rank_0():
    plateau, sent = Plateau(patience=1), []
    strategy = SimpleNamespace(broadcast=lambda value: sent.append(value) or 3.0)
    trainer = SimpleNamespace(sanity_checking=False, callback_metrics={"val/nll": 7.0}, strategy=strategy)
    plateau.on_validation_end(trainer, None)
    assert sent == [7.0] and plateau.state.best == 3.0


# The rate is far too high, so val/nll rises and cuts are certain.
RISING = [*TINY, "plateau=cut", "plateau.patience=1", "plateau.cooldown=0", "lr_scheduler=cosine", "optim=adamw",
          "optim.lr=0.3", "trainer.max_steps=12", "trainer.val_check_interval=2", "sampling.num_sample_log=0",
          "callbacks.checkpoint_every_n_steps.every_n_train_steps=2", "training.ema=0",
          *(f"data.source.num_{split}_per_class=20" for split in ("train", "validation", "test"))]  # fmt: skip


def train(folder: str) -> None:
    fit(Experiment(compose_config([*RISING, f"checkpointing.save_dir={folder}"]), "a test"))


def test_a_resumed_run_has_the_same_rates_counts_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("whole")
    step = Diffusion.training_step

    def killed(self, batch, batch_idx):
        if self.global_step == 9:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Diffusion, "training_step", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train("killed")
    assert load_inert(tmp_path / "killed/checkpoints/last.ckpt")["global_step"] == 8
    monkeypatch.setattr(Diffusion, "training_step", step)
    train("killed")
    whole, resumed = (load_inert(tmp_path / f"{name}/checkpoints/last.ckpt") for name in ("whole", "killed"))
    assert whole["callbacks"]["Plateau"] == resumed["callbacks"]["Plateau"]
    assert whole["callbacks"]["Plateau"]["factor"] < 0.6, "there was no cut"
    assert whole["lr_schedulers"] == resumed["lr_schedulers"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name])


def test_the_plateau_is_part_of_the_identity():
    plain, cut = (identity(compose_config(given)) for given in ([], ["plateau=cut"]))
    assert not any(key.startswith("plateau") for key in plain) and cut["plateau.patience"] == 5


def test_it_needs_validations_and_a_scalable_schedule():
    with pytest.raises(ValueError, match="trainer.limit_val_batches=0 leaves none"):
        Plateau().on_fit_start(SimpleNamespace(limit_val_batches=0), None)
    other = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)]), 10)
    configs = [SimpleNamespace(scheduler=other)]
    with pytest.raises(ValueError, match="lr_scheduler is a CosineAnnealingLR"):
        Plateau().on_fit_start(SimpleNamespace(limit_val_batches=1.0, lr_scheduler_configs=configs), None)
