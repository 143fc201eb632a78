"""The global batch: its arithmetic and its ramp; the size of micro-batches does not change a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from palimpsest.common.randomness import training_noise
from palimpsest.data.stream import BatchPlan, PositionBatchSampler, batch_arithmetic
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.fitting import fit
from palimpsest.models.backbone import Backbone
from palimpsest.models.checkpoints import load_inert
from palimpsest.objectives.base import TokenLoss
from palimpsest.objectives.reduction import StepLoss
from palimpsest.report.training import history
from palimpsest.settings.command_line import compose_config
from tests.helpers.commands import FEW, FIT, TINY, run
from tests.helpers.networks import assert_close_weights, networks, same_weights


def trained(folder: str, *overrides: str) -> Path:
    """Return last.ckpt of a training with these settings."""
    return fit(Experiment(compose_config([*FIT, *overrides, f"checkpointing.save_dir={folder}"]), "a test"))


# -------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ((512, None, 3, 2), {}, r"not a multiple of the 6 devices .*devices=3 x trainer.num_nodes=2.*510 or 516"),
        ((5040, 11, 1), {}, r"loader.batch_size=11 does not divide.*give one of 10, 12$"),
        ((64, None, 2), {"accumulate": 5}, r"trainer.accumulate_grad_batches=5 does not divide the 32 rows.*4, 8"),
        ((64, 8, 2), {"accumulate": 2}, r"makes it 4; leave one of them out, or set loader.global_batch_size=32"),
        ((64, 8, 2), {"ramp": [[0, 12], [9, 64]]}, r"batch_ramp: the 12 samples from step 0 .* the 8 .*give 8 or 16"),
        ((64, None, 1), {"ramp": [[0, 8], [9, 32]]}, r"ends with 32 .* loader.global_batch_size=64"),
        ((64, None, 1), {"ramp": [[1, 8], [9, 64]]}, r"the first step must be 0"),
        ((64, None, 1), {"ramp": [[0, 8], [9, 16], [9, 64]]}, r"steps must grow"),
        ((64, None, 1), {"ramp": [[0, 0], [9, 64]]}, r"at least 1 sample"),
        ((64, None, 1), {"ramp": [[0, 8], [9, 32], [12, 16], [20, 64]]}, r"shrinks.* up to .*=64; .*such as "
         r"\[\[0,8\],\[9,32\],\[12,32\],\[20,64\]\]"),
        ((64, None, 1), {"ramp": [[0, 128], [9, 64]]}, r"shrinks.*such as \[\[0,64\],\[9,64\]\]"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_a_size_that_does_not_divide_is_refused_with_the_nearest_that_does(given, settings, message):
    with pytest.raises(ValueError, match=message):
        batch_arithmetic(*given, **settings)


def test_a_typed_accumulation_is_used():
    assert batch_arithmetic(64, None, 2, accumulate=4) == (8, 4)
    assert batch_arithmetic(64, 8, 2, accumulate=4, ramp=[[0, 16], [5, 64]]) == (8, 4)


def test_the_plan_is_a_function_of_the_step():
    plan, sizes = BatchPlan.of(8, [[0, 2], [3, 4], [5, 8]]), [2, 2, 2, 4, 4, 8, 8]
    starts = [sum(sizes[:step]) for step in range(len(sizes))]
    assert [plan.size(step) for step in range(7)] == sizes and [plan.start(step) for step in range(7)] == starts
    assert [plan.step_after(start) for start in starts] == list(range(7))
    with pytest.raises(ValueError, match="after 7 samples, which is no whole number"):
        plan.step_after(7)
    place, size = plan.place(torch.arange(sum(sizes)))
    assert place.tolist() == [k for n in sizes for k in range(n)] and size.tolist() == [
        n for n in sizes for _ in range(n)
    ]
    times = training_noise(0, torch.arange(14, 22), *reversed(plan.place(torch.arange(14, 22)))).time()
    assert sorted((times * 8).long().tolist()) == list(range(8)), "one time in each eighth"
    assert BatchPlan.of(8).ramp is None and BatchPlan.of(8, [[0, 8]]).ramp is None


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_of_a_ramp_take_every_position_once(world):
    samplers = [PositionBatchSampler(8, 4, 7, rank, world, 10, [[0, 2], [3, 4], [5, 8]]) for rank in range(world)]
    assert len(samplers[0]) == 7 * (3 - world)
    assert sorted(p for sampler in samplers for batch in sampler for p in batch) == list(range(10, 30))


# -------------------------------------------------------------------------------- sizes of micro-batches


def test_a_step_weights_every_token_equally():
    """Rows of 1, 2 and 5 scored tokens: the gradient of three micro-batches is that of one batch."""
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    tokens = torch.arange(15, dtype=torch.float64).view(3, 5) + 1
    mask = torch.arange(5) < torch.tensor([1, 2, 5])[:, None]
    whole = TokenLoss(weight**2 * tokens * mask, mask)
    (expected,) = torch.autograd.grad(whole.mean(), weight)
    step = StepLoss()
    for row in (slice(0, 1), slice(1, 2), slice(2, 3)):
        (step.add(TokenLoss(weight**2 * tokens[row] * mask[row], mask[row])) / 3).backward()
    rows_per_token = step.rows_per_token(lambda sums: sums)
    assert float(weight.grad * rows_per_token) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("more", [[], ["training.loss_weight=uniform", "training.gradient_checkpointing=true"],
                                  ["parameterization=ar"]], ids=" ".join)  # fmt: skip
def test_no_size_of_micro_batches_changes_the_weights_on_padded_data(tmp_path, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    sizes = (4, 1) if more else (4, 2, 1)
    paths = [trained(f"b{size}", f"loader.batch_size={size}", "optim=adamw", *more) for size in sizes]
    logged = [history(Path(f"b{size}")) for size in sizes]
    for path, curve in zip(paths[1:], logged[1:], strict=True):
        assert_close_weights(paths[0], path, atol=1e-6)
        for name in ("train/nll", "train/cross_entropy", "val/nll", "train/batch_samples"):
            assert name not in logged[0] or curve[name] == pytest.approx(logged[0][name], rel=1e-6)


def test_the_optimizer_receives_the_gradient_of_the_mean_over_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, same = [], ["trainer.max_steps=1", "trainer.gradient_clip_val=0"]

    def spy(self, optimizer):
        found.extend(p.grad.clone() for p in self.backbone.parameters())

    monkeypatch.setattr(Diffusion, "on_before_optimizer_step", spy)
    trained("run", *same, "loader.batch_size=1")
    experiment = Experiment(compose_config([*FIT, *same]), "a test")
    data = experiment.build.data()
    diffusion, batch = experiment.build.diffusion(data), next(iter(data.train_dataloader()))
    diffusion.objective.loss(diffusion.backbone, batch, training_noise(1, batch["position"], 4)).mean().backward()
    for ours, expected in zip(found, diffusion.backbone.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.grad, rtol=1e-4, atol=1e-7)


def test_a_ramp_continues_in_its_stage_after_a_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ramp = ["loader.batch_ramp=[[0,2],[2,4]]", "loader.batch_size=2", "trainer.val_check_interval=100",
            "lr_scheduler=constant_warmup", "lr_scheduler.num_warmup_steps=1", "checkpointing.keep_last=9",
            "callbacks.checkpoint_every_n_steps.every_n_train_steps=1"]  # fmt: skip
    whole = trained("whole", *ramp, "trainer.max_steps=5")
    out = capsys.readouterr().out
    assert "each optimizer step: 2 samples = 1 process(es) x 2 micro-batch(es) x 1 (ramp: 2 from step 0, 4 from" in out
    assert "from step 2 on each optimizer step: 4 samples" in out
    assert history(Path("whole"))["train/batch_samples"][:, 1].tolist() == [2, 2, 4, 4, 4]
    assert load_inert(whole)["TextData"]["consumed_samples"] == 2 * 2 + 3 * 4
    after_one_step = f"checkpointing.resume_ckpt_path={whole.with_name('step-00000001.ckpt')}"
    trained("parts", *ramp, "trainer.max_steps=3", after_one_step)
    assert same_weights(trained("parts", *ramp, "trainer.max_steps=5"), whole)
    other = [*ramp, "loader.batch_ramp=[[0,2],[3,4]]", "trainer.max_steps=6"]
    with pytest.raises(ValueError, match="batch_ramp"):
        trained("parts", *other)


@pytest.mark.parametrize(("more", "message"), [
    (["trainer.max_steps=2"], r"batch_ramp=\[\[0, 2\], \[2, 4\]\] reaches .*=4 at step 2, and trainer.max_steps=2 "
                              r"ends.* set trainer.max_steps to more than 2, .*batch_ramp=null"),
    (["mode=classify", "classify.pretrain=all", "classify.pretrain_steps=1"], "set classify.pretrain_steps to more"),
])  # fmt: skip
def test_a_ramp_beyond_the_end_of_the_training_is_refused_before_data_are_read(tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextData, "split", lambda *_: pytest.fail("it read data"))
    ramp = [*FIT, "loader.batch_ramp=[[0,2],[2,4]]", "checkpointing.save_dir=run"]
    with pytest.raises(ValueError, match=message):
        run(*ramp, *more)
    with pytest.raises(ValueError, match="trainer.max_steps=2 ends"):
        PositionBatchSampler(4, 4, 2, ramp=[[0, 2], [2, 4]])
    with pytest.raises(FileNotFoundError, match="no trained model"):  # a measurement does not train
        run(*ramp, "mode=ppl_eval", "trainer.max_steps=2")


def test_a_run_resumes_with_other_micro_batches(tmp_path, monkeypatch):
    """3 steps of one micro-batch, then of four; with Lightning's own counts a step would be smaller."""
    monkeypatch.chdir(tmp_path)
    same = ["optim=adamw", "lr_scheduler=constant_warmup", "lr_scheduler.num_warmup_steps=1"]
    trained("parts", *same, "trainer.max_steps=3", "loader.batch_size=4")
    parts = trained("parts", *same, "trainer.max_steps=6", "loader.batch_size=1")
    assert_close_weights(trained("whole", *same, "trainer.max_steps=6"), parts, atol=1e-6)
    assert [int(step) for step in history(Path("parts"))["val/nll"][:, 0]] == [2, 4, 6], "every 2 optimizer steps"


# -------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("name", ["dit", "ar", "dimamba", "hf_causal"])
def test_checkpointing_saves_memory_and_changes_neither_loss_nor_gradient(name):
    torch.manual_seed(0)
    net = networks()[name]
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, found = torch.randint(0, 11, (2, 9)), []
    for again in (False, True):
        if again:
            net.recompute_blocks()
        kept = []
        torch.manual_seed(1)  # of the dropout
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            loss = net(x, torch.zeros(2)).log_softmax(-1).square().mean()
        net.zero_grad()
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None], sum(kept)))
        calls = []
        hook = net.blocks[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        net.eval()
        net(x, torch.zeros(2)).sum().backward()
        net.train()
        hook.remove()
        assert len(calls) == 1, "evaluation computes nothing twice"
    (loss, grads, kept), (loss_again, grads_again, kept_again) = found
    assert torch.equal(loss, loss_again) and all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))
    assert kept_again < 0.6 * kept


def test_a_network_without_support_is_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing=true: Backbone does not support it"):
        Backbone().recompute_blocks()


# -------------------------------------------------------------------------------- all parameters in the loss


@pytest.mark.parametrize("overrides", [
    [], ["parameterization=d3pm", "T=20"], ["parameterization=sedd"], ["parameterization=ar"], ["backbone=dimamba"],
    ["training.masking=complementary"], ["classify.sharing=conditional"], ["training.loss_weight=uniform"],
    ["parameterization=ar", "classify.sharing=conditional"],
], ids=" ".join)  # fmt: skip
def test_every_parameter_contributes_to_every_loss(tmp_path, monkeypatch, overrides):
    """DistributedDataParallel needs it without find_unused_parameters, also for unconditional batches."""
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(compose_config([*TINY, *FEW, *overrides]), "a test")
    data = experiment.build.data()
    diffusion = experiment.build.diffusion(data)
    batch = next(iter(data.train_dataloader()))
    noise = training_noise(1, batch["position"], 4)
    for told in (batch, {name: column for name, column in batch.items() if name != "label"}):
        diffusion.zero_grad()
        diffusion.objective.loss(diffusion.backbone, diffusion.with_conditioning(told), noise).mean().backward()
        assert [name for name, p in diffusion.named_parameters() if p.grad is None] == []
