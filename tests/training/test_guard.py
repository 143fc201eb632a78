"""The guard: a skipped update changes nothing, all ranks skip it alike, and too many end the run."""

from __future__ import annotations

import math
from dataclasses import replace

import lightning
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from palimpsest.experiment.experiment import Experiment
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from palimpsest.training.callbacks.guard import Guard, SpikeDetector
from palimpsest.training.updates import Updates
from tests.helpers.commands import TINY

RUN = [*TINY, "trainer.max_steps=6", "loader.batch_size=2", "sampling.num_sample_log=0", "optim.weight_decay=0.1",
       "trainer.log_every_n_steps=2", "trainer.val_check_interval=6"]  # fmt: skip


class Snapshots(lightning.Callback):
    """Copies of everything that an update changes, after every optimizer step."""

    def __init__(self) -> None:
        self.taken: list[dict] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.taken) + 1:
            pl_module.update_average()
            states = [p.state_dict()["state"] for p in getattr(trainer.optimizers[0], "parts", trainer.optimizers)]
            moments = [v.clone() for s in states for one in s.values() for v in one.values()]
            self.taken.append(
                {
                    "weights": [p.detach().clone() for p in pl_module.backbone.parameters()],
                    "average": [s.clone() for s in pl_module.ema.shadow_params],
                    "moments": moments,
                    "updates": pl_module.ema.num_updates,
                    "schedule": pl_module.lr_schedulers().last_epoch,
                }
            )


def with_bad_losses(monkeypatch, experiment, how: str, steps: set[int]):
    """Return a training whose loss or gradient is not finite in the second micro-batch of the given steps."""
    data = experiment.build.data()
    diffusion = experiment.build.diffusion(data)
    original = diffusion.objective.loss

    def loss(backbone, batch, noise):
        out = original(backbone, batch, noise)
        trained = diffusion.training and diffusion.global_step in steps
        bad = trained and int(batch["position"][0]) % 4 == 2  # the second micro-batch
        if bad and how == "gradient":
            nll_BL = out.nll_BL.clone()
            nll_BL.register_hook(lambda grad: grad * math.inf)
            return replace(out, nll_BL=nll_BL)
        # The derivative of x + inf is 1, so the backward pass alone would not notice.
        return replace(out, nll_BL=out.nll_BL + math.inf) if bad else out

    monkeypatch.setattr(diffusion.objective, "loss", loss)
    return diffusion, data


@pytest.mark.parametrize(("optimizer", "how"), [("adamw", "loss"), ("muon", "gradient")])
def test_a_skipped_update_changes_nothing_bit_for_bit_and_training_continues(
    tmp_path, monkeypatch, caplog, optimizer, how
):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(compose_config([*RUN, f"optim={optimizer}", "checkpointing.save_dir=run"]), "a test")
    diffusion, data = with_bad_losses(monkeypatch, experiment, how, {0, 3})
    trainer, snapshots = experiment.trainer("train"), Snapshots()
    trainer.callbacks.append(snapshots)
    trainer.fit(diffusion, datamodule=data)
    before, skipped, after = snapshots.taken[2:5]
    for name in ("weights", "average", "moments"):
        assert all(torch.equal(a, b) for a, b in zip(before[name], skipped[name], strict=True)), name
        assert not all(torch.equal(a, b) for a, b in zip(skipped[name], after[name], strict=True)), name
        assert all(torch.isfinite(a).all() for a in after[name])
    assert [taken["updates"] for taken in snapshots.taken] == [0, 1, 2, 2, 3, 4]
    assert [taken["schedule"] for taken in snapshots.taken] == [1, 2, 3, 4, 5, 6], "the learning rate advances"
    guard = next(c for c in trainer.callbacks if isinstance(c, Guard))
    assert (guard.skipped, guard.in_a_row) == (2, 0) == tuple(guard.state_dict().values())
    assert f"step 3: the {how} " in caplog.text and ("micro-batch 2 of 2" in caplog.text) == (how == "loss")


@pytest.mark.parametrize(("optimizer", "how"), [("adamw", "gradient"), ("muon", "loss")])
def test_too_many_in_a_row_end_the_training_and_save_the_batch(tmp_path, monkeypatch, optimizer, how):
    monkeypatch.chdir(tmp_path)
    overrides = [*RUN, f"optim={optimizer}", "training.max_skipped_steps=3", "checkpointing.save_dir=run"]
    experiment = Experiment(compose_config(overrides), "a test")
    diffusion, data = with_bad_losses(monkeypatch, experiment, how, {2, 3, 4})
    before = [p.detach().clone() for p in diffusion.backbone.parameters()]
    snapshots, trainer = Snapshots(), experiment.trainer("train")
    trainer.callbacks.append(snapshots)
    with pytest.raises(FloatingPointError, match=r"step 4: 3 updates in a row .*\n.*max_skipped_steps=3"):
        trainer.fit(diffusion, datamodule=data)
    assert all(map(torch.equal, (p.detach() for p in diffusion.backbone.parameters()), snapshots.taken[1]["weights"]))
    assert not all(map(torch.equal, before, snapshots.taken[1]["weights"]))
    saved = torch.load(tmp_path / "run/nonfinite/step=4-rank=0.pt", weights_only=True)
    assert saved["step"] == 4 and not math.isfinite(saved["gradient_norm"]) and "max_steps: 6" in saved["configuration"]
    assert [math.isfinite(loss) for loss in saved["losses"]] == [True, how == "gradient"]
    assert [batch["position"].tolist() for batch in saved["batches"]] == [[16, 17], [18, 19]]
    assert any("vocab_embed" in name for name in saved["gradients"])
    assert '"state": "failed"' in (tmp_path / "run/run.json").read_text()


def test_a_check_one_step_late_as_on_a_gpu_refers_to_the_right_step(tmp_path, monkeypatch):
    class Late(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            next(c for c in trainer.callbacks if isinstance(c, Guard))._check_at_once = False

    monkeypatch.chdir(tmp_path)
    for limit, last in ((1, 2), (3, 4)):
        overrides = [*RUN, "optim=adamw", f"training.max_skipped_steps={limit}", f"checkpointing.save_dir=run{limit}"]
        experiment = Experiment(compose_config(overrides), "a test")
        diffusion, data = with_bad_losses(monkeypatch, experiment, "loss", {2, 3, 4})
        trainer = experiment.trainer("train")
        trainer.callbacks.append(Late())
        with pytest.raises(FloatingPointError, match=f"step {last}: {limit} updates in a row"):
            trainer.fit(diffusion, datamodule=data)
        saved = torch.load(tmp_path / f"run{limit}/nonfinite/step={last}-rank=0.pt", weights_only=True)
        first = 4 * last
        assert [b["position"].tolist() for b in saved["batches"]] == [[first, first + 1], [first + 2, first + 3]]
        assert [math.isfinite(loss) for loss in saved["losses"]] == [True, False]


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer, updates = torch.optim.AdamW(net.parameters(), weight_decay=0.5, fused=True), Updates()
    wrapped = DistributedDataParallel(net)
    weights = []
    for step in range(3):
        loss = wrapped(torch.ones(1, 3) * (rank + 1)).sum()
        loss = loss + math.inf if (rank, step) == (1, 1) else loss
        updates.poison(loss)
        optimizer.zero_grad()
        loss.backward()
        updates.prepare(optimizer, 1.0)
        optimizer.step()
        weights.append((net.weight.detach().clone(), updates.made()))
    torch.save(weights, f"{folder}/rank{rank}.pt")


def test_a_bad_loss_on_one_rank_skips_the_update_on_all(tmp_path):
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for (a, made_a), (b, made_b) in zip(first, second, strict=True):
        assert torch.equal(a, b) and made_a == made_b
    assert [made for _, made in first] == [True, False, True]
    assert torch.equal(first[0][0], first[1][0]) and not torch.equal(first[1][0], first[2][0])


def test_clipping_is_that_of_torch():
    for max_norm in (0.1, 100.0, None):
        nets = [torch.nn.Linear(4, 4) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        for net in nets:
            net(torch.arange(8.0).reshape(2, 4)).square().sum().backward()
        optimizer, updates = torch.optim.AdamW(nets[0].parameters(), fused=True), Updates()
        updates.prepare(optimizer, max_norm)
        norm = torch.nn.utils.clip_grad_norm_(nets[1].parameters(), max_norm or math.inf)
        assert torch.equal(updates.norm, norm) and updates.made()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(*(net.parameters() for net in nets), strict=True))


@pytest.mark.parametrize("build", [
    lambda p: torch.optim.AdamW(p, weight_decay=0.5, fused=True), lambda p: torch.optim.SGD(p, weight_decay=0.5),
], ids=["fused", "any other"])  # fmt: skip
def test_parameters_with_a_gradient_that_is_not_finite_are_named(build):
    net = torch.nn.Linear(4, 4)
    optimizer, updates, before = build(net.parameters()), Updates(), net.weight.detach().clone()
    net(torch.ones(1, 4)).sum().backward()
    net.weight.grad[1, 2] = -math.inf
    updates.prepare(optimizer, 1.0)
    optimizer.step()
    assert not updates.made() and torch.equal(net.weight, before)
    assert updates.nonfinite_gradients(net.named_parameters()) == ["weight"]


def test_poison_changes_no_finite_gradient():
    x = torch.linspace(-1, 1, 5, requires_grad=True)
    gradients = []
    for poisoned in (False, True):
        loss = (x.exp() / 3).sum()
        Updates.poison(loss) if poisoned else None
        gradients += torch.autograd.grad(loss, x)
    assert torch.equal(*gradients)


def test_the_limit_is_not_part_of_the_identity_of_a_training():
    assert identity(compose_config([])) == identity(compose_config(["training.max_skipped_steps=3"]))


def test_a_spike_is_reported_once_and_noise_never():
    noise = torch.Generator().manual_seed(0)
    falling = [5 * 0.99**i + 0.1 * float(torch.randn((), generator=noise)) for i in range(200)]
    watch = SpikeDetector()
    assert not any(watch.begins(value) for value in falling)
    spike = [falling[-1] + 3, falling[-1] + 4, falling[-1] + 2.5, falling[-1], falling[-1], falling[-1] + 3]
    assert [watch.begins(value) for value in spike] == [True, False, False, False, False, True]
    flat = SpikeDetector()
    assert not any(flat.begins(value) for value in [1.0] * 20 + [1.001, math.nan])
