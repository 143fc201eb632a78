"""Metrics of a training: the logged numbers against sums by hand, and no reads between intervals."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
from pathlib import Path

import lightning
import pytest
import torch
from hydra.errors import InstantiationException
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from palimpsest.experiment.experiment import Experiment
from palimpsest.models.ar import AR
from palimpsest.models.checkpoints import load_inert
from palimpsest.models.dit import DiT
from palimpsest.report.training import history
from palimpsest.settings.command_line import compose_config, explain
from palimpsest.training import storage
from palimpsest.training.callbacks.hardware import TrainingFlops, compute_dtype, matmul_rate, memory
from palimpsest.training.callbacks.metrics import BUCKETS, TrainingMetrics, _Interval
from palimpsest.training.callbacks.progress import TextProgressBar
from palimpsest.training.callbacks.run_state import RunState, thinned
from palimpsest.training.logs import _run_id
from palimpsest.training.updates import Updates
from tests.helpers.commands import FEW, TINY, run, start_main, wait_for

RUN = [*TINY, "trainer.max_steps=7", "loader.batch_size=2", "trainer.log_every_n_steps=3", "sampling.num_sample_log=0",
       "trainer.val_check_interval=4", "checkpointing.save_dir=run"]  # fmt: skip


def trained(*overrides: str) -> tuple[lightning.Trainer, list[dict], list[float]]:
    """Return a short training, the outputs of its objective by micro-batch, and the gradient norm of each step."""
    experiment = Experiment(compose_config([*RUN, *overrides]), "a test")
    data = experiment.build.data()
    diffusion, seen, norms = experiment.build.diffusion(data), [], []
    original, prepare = diffusion.objective.loss, diffusion.updates.prepare

    def loss(backbone, batch, noise):
        out = original(backbone, batch, noise)
        tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        scored_B = (batch["attention_mask"] & ~batch["observed"]).sum(-1) if "observed" in batch else None
        seen.append({"nll": out.nll_BL.double().sum().item(), "scored": int(out.mask_BL.sum()), "tokens": tokens,
                     "rows": len(out.nll_BL), "scored_B": scored_B, **out.logs})  # fmt: skip
        return out

    def measured(optimizer, max_norm):
        grads = [p.grad.double().flatten() for p in diffusion.backbone.parameters() if p.grad is not None]
        norms.append(torch.cat(grads).norm().item())
        prepare(optimizer, max_norm)

    diffusion.objective.loss, diffusion.updates.prepare = loss, measured
    trainer = experiment.trainer("train")
    trainer.fit(diffusion, datamodule=data)
    return trainer, [one for one in seen if one["rows"] == 2], norms


def test_logged_numbers_equal_sums_by_hand(tmp_path, monkeypatch):
    """Seven steps of two micro-batches of two passes, logged after 3, 6 and 7, without the validation at step 4."""
    monkeypatch.chdir(tmp_path)
    trainer, seen, norms = trained("training.masking=complementary", "optim=adamw")
    logged = history(tmp_path / "run")
    assert len(seen) == 14 and len(norms) == 7
    total = lambda parts, name: sum(part[name] for part in parts)  # noqa: E731
    average, weight = 0.0, 0.0
    for row, (first, last) in enumerate([(0, 3), (3, 6), (6, 7)]):
        parts = seen[2 * first : 2 * last]
        value = lambda name: logged[name][row].tolist()  # noqa: B023, E731
        nll = total(parts, "nll") / total(parts, "scored")
        assert value("train/nll") == [last, pytest.approx(nll, rel=1e-6)]
        keep = 0.99 ** (last - first)
        average, weight = keep * average + (1 - keep) * nll, keep * weight + 1 - keep
        assert value("train/nll_ema")[1] == pytest.approx(average / weight, rel=1e-6)
        assert value("train/batch_tokens")[1] == pytest.approx(total(parts, "tokens") / (last - first))
        assert value("train/batch_samples")[1] == 4 and value("train/skipped_steps")[1] == 0
        assert value("train/grad_norm")[1] == pytest.approx(sum(norms[first:last]) / (last - first), rel=1e-5)
        assert value("train/grad_norm_max")[1] == pytest.approx(max(norms[first:last]), rel=1e-5)
        assert value("train/tokens_per_s")[1] / value("train/samples_per_s")[1] == pytest.approx(
            value("train/batch_tokens")[1] / 4
        )
        nats, masked = [0.0] * BUCKETS, [0.0] * BUCKETS
        for part in parts:
            for scored, m_P, ce_P in zip(part["scored_B"], part["num_masked"], part["cross_entropy"], strict=True):
                for m, ce in zip(m_P.tolist(), ce_P.tolist(), strict=True):
                    k = min(int(m / int(scored) * BUCKETS), BUCKETS - 1)
                    nats[k], masked[k] = nats[k] + ce, masked[k] + m
        for k in range(BUCKETS):
            found = dict(logged.get(f"train/nll_masked_{k / BUCKETS}-{(k + 1) / BUCKETS}", []))
            assert (last in found) == bool(masked[k])
            assert not masked[k] or found[last] == pytest.approx(nats[k] / masked[k], rel=1e-5)
    assert 0 < logged["train/mfu"][0, 1] < 1.5
    assert logged["train/lr"][:, 0].tolist() == [3, 6, 7] and not any(name.startswith("lr-") for name in logged)
    metrics = next(c for c in trainer.callbacks if isinstance(c, TrainingMetrics))
    assert metrics.latest["loss"] == pytest.approx(logged["train/nll"][-1, 1])
    assert next(c for c in trainer.callbacks if isinstance(c, TextProgressBar)).metrics is metrics


@pytest.mark.parametrize(("settings", "columns"), [
    (["optim=muon"], {"lr-MuonWithAdamW/pg1", "lr-MuonWithAdamW/pg2"}),
    (["optim=adamw", "+callbacks.learning_rate_monitor.log_weight_decay=true"],
     {"lr-AdamW", "lr-AdamW-weight_decay"}),
], ids=["rates that differ", "weight decay asked for"])  # fmt: skip
def test_rates_of_groups_are_logged_if_they_add_information_and_equal_ours(tmp_path, monkeypatch, settings, columns):
    monkeypatch.chdir(tmp_path)
    trained(*settings)
    logged = history(tmp_path / "run")
    assert {name for name in logged if name.startswith("lr-")} == columns
    ours, first = dict(logged["train/lr"]), dict(logged[min(columns)])
    assert all(ours[step] == pytest.approx(first[step]) for step in (3, 6)), "the rate of the step"


def test_a_causal_model_has_no_mask_rates_and_tensorboard_has_the_same_numbers(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    _, seen, _ = trained("parameterization=ar", "optim=adamw")
    logged = history(tmp_path / "run")
    assert not any("masked" in name for name in logged)
    nll = sum(part["nll"] for part in seen[:6]) / sum(part["scored"] for part in seen[:6])
    assert logged["train/nll"][0, 1] == pytest.approx(nll, rel=1e-6)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for name in ("train/nll", "train/mfu", "memory/peak_gib", "train/tokens_per_s"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx(logged[name][:, 1], rel=1e-6)


class NoReads(TorchDispatchMode):
    """A mode that raises if a tensor's value reaches the host or decides a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")
        return func(*args, **(kwargs or {}))


def test_between_intervals_the_host_reads_nothing():
    net = torch.nn.Linear(3, 2)
    optimizer, updates = torch.optim.AdamW(net.parameters(), fused=True), Updates()
    interval = _Interval(torch.device("cpu"))
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3, dtype=torch.bool)}
    with pytest.raises(AssertionError), NoReads():
        torch.ones(()).item()
    with NoReads():
        loss = net(torch.ones(1, 3)).sum()
        updates.poison(loss)
        loss.backward()
        updates.prepare(optimizer, 1.0)
        optimizer.step()
        outputs = {"nll": loss.detach(), "tokens": torch.tensor(4), "projected": torch.tensor(3),
                   "scored_B": torch.tensor([2, 0]), "num_masked": torch.tensor([[1, 2], [0, 0]]),
                   "cross_entropy": torch.tensor([[1.0, math.nan], [0.0, 0.0]])}  # fmt: skip
        for one in (batch, {"input_ids": batch["input_ids"]}):
            interval.add(outputs, one, 0.0)
        interval.add_update(updates.norm)
    totals = interval.over_ranks(lambda values: values, {})
    assert totals.sums["tokens"] == 12 and totals.sums[2] == 2.0 and totals.sums[BUCKETS + 4] == 0, "nan is left out"


def test_totals_are_sums_over_ranks_and_the_maximum_of_memory():
    interval = _Interval(torch.device("cpu"))
    interval.sums_S[:] = 2.0
    interval.rows, interval.steps, interval.largest_norm = 4, 2, torch.tensor(3.0, dtype=torch.float64)
    gather = lambda mine: torch.stack([mine, torch.where(torch.arange(len(mine)) < len(mine) - 1, mine, 9.0)])  # noqa: E731
    totals = interval.over_ranks(gather, {"memory/peak_gib": 5.0})
    assert totals.ranks == 2 and totals.sums["tokens"] == 4.0 and totals.sums["rows"] == 8
    assert totals.memory == {"memory/peak_gib": 9.0} and totals.largest_norm == 3.0
    values = totals.values("train/nll")
    assert values["train/batch_samples"] == 4.0 and values["train/grad_norm"] == 1.0


@pytest.mark.parametrize("kind", ["dit", "ar"])
def test_flops_by_formula_equal_those_counted_by_torch(kind):
    """Forward and backward of a row; the formula leaves out adaLN, which is once per row."""
    size = {"hidden_size": 32, "n_blocks": 3, "n_heads": 2, "dropout": 0.0}
    net = DiT(50, cond_dim=2, **size) if kind == "dit" else AR(50, **size)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    found, counter = TrainingFlops.of(net), FlopCounterMode(display=False)
    assert found.block_weights == 3 * 12 * 32**2 and found.attention_layers == 3
    with counter, sdpa_kernel(SDPBackend.MATH):
        hidden = net.encode(torch.ones(2, 64, dtype=torch.long), torch.zeros(2))
        net.head(hidden[:, :10]).sum().backward()
    assert counter.get_total_flops() == pytest.approx(found.of_blocks(2, 64) + found.of_projection(20), rel=0.01)


def test_device_figures():
    cpu = torch.device("cpu")
    assert 1e8 < matmul_rate(cpu, torch.float32) < 1e13
    assert matmul_rate(cpu, torch.float32) is matmul_rate(cpu, torch.float32), "measured once"
    assert 0.01 < memory(cpu)["memory/resident_gib"] <= memory(cpu)["memory/peak_gib"]
    assert compute_dtype("bf16-mixed") == torch.bfloat16 and compute_dtype("32-true") == torch.float32


def test_a_metric_of_another_callback_is_logged_with_the_rest(tmp_path, monkeypatch):
    class Waiting(lightning.Callback):
        def interval_metrics(self):
            return {"train/answer": 42.0}

    monkeypatch.chdir(tmp_path)
    experiment = Experiment(compose_config([*RUN, "trainer.max_steps=3", "optim=adamw"]), "a test")
    trainer = experiment.trainer("train")
    trainer.callbacks.append(Waiting())
    trainer.fit(experiment.build.diffusion(experiment.build.data()), datamodule=experiment.build.data())
    assert history(tmp_path / "run")["train/answer"].tolist() == [[3, 42]]
    known = json.loads((tmp_path / "run/run.json").read_text())
    assert known["state"] == "finished" and known["step"] == known["max_steps"] == 3
    assert known["metrics"]["train/answer"] == 42 and [point[0] for point in known["curve"]] == [3]
    state = next(c for c in trainer.callbacks if isinstance(c, RunState))
    state.on_exception(trainer, None, KeyboardInterrupt())
    assert json.loads(state.path.read_text())["state"] == "stopped"
    state.on_exception(trainer, None, RuntimeError("out of memory\nmore"))
    assert json.loads(state.path.read_text())["error"] == "RuntimeError: out of memory"
    state.path = Path("/proc/nowhere/run.json")  # a failed write does not end a training
    state.on_exception(trainer, None, RuntimeError("again"))


def test_run_json_names_only_checkpoints_that_were_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, named = storage.write_checkpoint, []
    known = lambda: json.loads((tmp_path / "run/run.json").read_text())["checkpoint"]  # noqa: E731

    def second_fails(checkpoint, where):
        named.append(known() and known()["step"])
        if len(named) == 2:
            raise OSError(errno.EIO, "the disk is broken")
        write(checkpoint, where)

    monkeypatch.setattr(storage, "write_checkpoint", second_fails)
    trained("trainer.max_steps=3", "callbacks.checkpoint_every_n_steps.every_n_train_steps=1")
    assert named == [None, 1, 1] and known()["step"] == 3


def test_the_history_of_a_killed_run_leaves_out_the_truncated_line(tmp_path):
    for version, text in enumerate(("step,train/nll,val/nll\n0,5.0,\n1,4.75,\n2,4.", "step,train/nll\n1,4.5\n")):
        (tmp_path / f"csv/version_{version}").mkdir(parents=True)
        (tmp_path / f"csv/version_{version}/metrics.csv").write_text(text)
    assert history(tmp_path)["train/nll"].tolist() == [[1, 5.0], [2, 4.5]]


def test_a_curve_keeps_its_ends_and_its_mean():
    curve = []
    for step in range(1, 1000):
        curve = thinned([*curve, [step, float(step)]])
    assert len(curve) <= 64 and curve[-1][0] == 999 and curve == sorted(curve)
    assert all(value <= step for step, value in curve)


WANDB = [*RUN, *FEW, "logger=wandb", "wandb.offline=true", "trainer.log_every_n_steps=1", "trainer.limit_val_batches=0",
         "callbacks.checkpoint_every_n_steps.every_n_train_steps=1"]  # fmt: skip


def test_without_wandb_the_message_names_the_package(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InstantiationException) as error:
        run(*WANDB)
    assert "pip install -U 'wandb" in explain(error.value)


def test_a_killed_and_restarted_run_is_one_run_of_wandb(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="needs Weights & Biases: pip install wandb")
    last = tmp_path / "run/checkpoints/last.ckpt"
    ids = lambda: [path.name.split("-")[-1] for path in sorted(tmp_path.glob("run/wandb/offline-run-*"))]  # noqa: E731
    process = start_main(*WANDB, "trainer.max_steps=1000000", cwd=tmp_path)
    wait_for(last.exists, process)
    process.kill()
    process.wait()
    monkeypatch.chdir(tmp_path)
    run(*WANDB, f"trainer.max_steps={load_inert(last)['global_step'] + 3}")
    assert "resuming from run/checkpoints/last.ckpt" in capsys.readouterr().out
    first, second = ids()
    assert first == second == (tmp_path / "run/wandb/run-id").read_text()
    run(*WANDB, "checkpointing.resume_from_ckpt=false")
    assert ids()[:2] == [first, first] and ids()[2] != first, "a new training is another run"


def test_the_trainings_of_one_command_are_separate_runs_of_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs Weights & Biases: pip install wandb")
    monkeypatch.chdir(tmp_path)
    run(*WANDB, "mode=classify", "trainer.max_steps=2", "classify.baselines=false")
    kept = [(tmp_path / f"run/label={label}/wandb/run-id").read_text() for label in (0, 1)]
    found = [path.name.split("-")[-1] for path in sorted(tmp_path.glob("run/label=*/wandb/offline-run-*"))]
    assert found == kept and kept[0] != kept[1]


def test_the_id_of_a_run_is_drawn_once_unless_it_starts_over(tmp_path):
    first = _run_id(tmp_path / "a", goes_on=True)
    assert _run_id(tmp_path / "a", goes_on=True) == first != _run_id(tmp_path / "b", goes_on=True)
    (tmp_path / "a/wandb/run-id").write_text("")  # invalid: an id has letters
    second = _run_id(tmp_path / "a", goes_on=False)
    assert second and second != first and _run_id(tmp_path / "a", goes_on=True) == second
