"""algo=mlm: mask rates and their law, what is never masked, and that what is measured is a bound."""

from __future__ import annotations

import csv
import itertools
import json
import math
from functools import partial

import lightning
import numpy as np
import pytest
import torch
from transformers import BertConfig

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import evaluation_noise, training_noise
from palimpsest.data.collate import Collate
from palimpsest.data.unigram import unigram_nll
from palimpsest.evaluation.drawing import draw
from palimpsest.experiment.experiment import Experiment
from palimpsest.models.hf_mlm import HFMaskedLM
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.base import Model, scored_mask
from palimpsest.objectives.mask_sampling import ExactCount
from palimpsest.objectives.mlm import MaskedLM, Rates, cross_entropy_at
from palimpsest.objectives.sedd import SEDD
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.report import plots
from palimpsest.settings.command_line import compose_config
from palimpsest.training.callbacks.masking_rates import MaskingRates
from tests.helpers import commands
from tests.helpers.commands import TINY
from tests.helpers.laws import any_order_law, batch_of, exact_bound

FEW = [f"data.source.num_{split}_per_class=20" for split in ("train", "validation", "test")]
VOCAB, MASK = 5, 4
SCHEDULE = LogLinear(eps=0.0)


def draw_masks(mask_sampler: Rates, rows: int, length: int = 12, step: int = 0, scored: torch.Tensor | None = None):
    """(x_t, t, scale) of an optimizer step of so many rows of zeros."""
    x0 = torch.zeros(rows, length, dtype=torch.long)
    scored = torch.ones_like(x0, dtype=torch.bool) if scored is None else scored
    return mask_sampler(
        SCHEDULE, x0, scored, Absorbing(MASK), training_noise(3, torch.arange(rows) + step * rows, rows)
    )[0]


def test_rates_of_a_list_are_equally_likely_and_masks_follow_them():
    rates = [1.0, 0.6, 0.1]
    drawn = draw_masks(Rates(rates), 6000, 40)
    counts = [int(((drawn.t_B - rate).abs() < 1e-9).sum()) for rate in rates]
    assert counts == [2000] * 3, "spread evenly over the rows of a step"
    share = (drawn.xt_BL == MASK).double().mean(-1)
    for rate in rates:
        here = share[(drawn.t_B - rate).abs() < 1e-9]
        se = math.sqrt(rate * (1 - rate) / 40 / len(here))
        assert abs(here.mean() - rate) <= 5 * se + 40 * (1 - rate) ** 40 / 40
    alone = draw_masks(Rates(rates, antithetic_sampling=False), 6000)
    assert 0 < abs(int((alone.t_B == 1).sum()) - 2000) < 200


def test_continuous_rates_fill_their_interval_evenly():
    t = draw_masks(Rates("continuous", 0.2, 0.7), 5000).t_B.sort().values
    assert t[0] > 0.2 and t[-1] <= 0.7
    assert (t - torch.linspace(0.2, 0.7, 5000)).abs().max() < 1e-3


def test_a_row_has_a_mask_wherever_it_can_have_one():
    scored = torch.zeros(300, 12, dtype=torch.bool)
    scored[:200, 3:7] = True
    xt = draw_masks(Rates([0.01]), 300, scored=scored).xt_BL
    counts = (xt == MASK).sum(-1)
    assert (counts[:200] >= 1).all() and (counts[:200] == 1).sum() > 190 and not counts[200:].any()
    assert not (xt == MASK)[~scored].any() and len((xt[:200] == MASK).double().argmax(-1).unique()) == 4


def test_one_rate_for_a_whole_step_whichever_device_and_micro_batch():
    mask_sampler = Rates("continuous", 0.0, 0.99, per="batch")
    steps = [draw_masks(mask_sampler, 8, step=step).t_B for step in range(20)]
    assert all(len(t.unique()) == 1 for t in steps) and len(torch.stack(steps)[:, 0].unique()) == 20
    place = torch.arange(8)
    rows = torch.zeros(8, 12, dtype=torch.long)
    parts = [mask_sampler(SCHEDULE, rows[at], rows[at] == 0, Absorbing(MASK),
                     training_noise(3, 16 + place[at], torch.full((4,), 8), place[at]))[0]
             for at in (slice(0, 4), slice(4, 8))]  # fmt: skip
    whole = draw_masks(mask_sampler, 8, step=2)
    assert torch.equal(torch.cat([part.t_B for part in parts]), whole.t_B)
    assert torch.equal(torch.cat([part.xt_BL for part in parts]), whole.xt_BL)
    shared = training_noise(3, torch.arange(8), 8)
    assert torch.equal(shared.rows(torch.tensor([2, 5])).shared(), shared.shared()[:2])
    assert torch.equal(shared.parts(3).shared(), shared.shared()[:1].expand(24))


def test_limits_that_leave_no_rate_are_refused():
    with pytest.raises(ValueError, match="masking_rate_min=0.8 must be below training.masking_rate_max=0.2"):
        Rates(rate_min=0.8, rate_max=0.2)


@pytest.mark.parametrize(("time", "per"), [(False, "sample"), (True, "batch")])
def test_rates_from_0_to_1_train_by_the_bound(random_dit, time, per):
    """5 standard errors, for networks that see the time and that do not."""
    net, x0 = random_dit(VOCAB, time_conditioning=time), torch.tensor([[2, 0, 3]])
    objective = MaskedLM(SCHEDULE, Absorbing(MASK), Rates("continuous", 0, 1, per), loss_weight="elbo")
    rows = 8000
    noise = training_noise(0, torch.arange(rows), 1 if per == "batch" else rows)
    with torch.no_grad():
        nll = objective.loss(net, batch_of(x0.expand(rows, -1)), noise).nll_BL.double().sum(-1)
    assert abs(float(nll.mean()) - exact_bound(objective, net, x0)) < 5 * float(nll.std()) / math.sqrt(rows)


@pytest.mark.parametrize("build", [
    partial(Subs, SCHEDULE, Absorbing(MASK)), partial(SEDD, SCHEDULE, Absorbing(MASK)),
    partial(MaskedLM, SCHEDULE, Absorbing(MASK), loss_weight="elbo"),
], ids=["mdlm", "sedd", "mlm"])  # fmt: skip
def test_rates_that_do_not_cover_the_bound_are_refused(build):
    build(Rates("continuous", 0, 1))
    for mask_sampler in (Rates([1.0, 0.5]), Rates("continuous", 0.1, 1.0)):
        with pytest.raises(ValueError, match="training.loss_weight=elbo with training.masking=rates.*do not cover"):
            build(mask_sampler)


def test_what_is_measured_of_a_masked_lm_is_the_bound_by_enumeration():
    """The NELBO is the mean over all orders of the chain rule along each; of -log, so the mean of the logs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    net = HFMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=8, **sizes), VOCAB).double().eval()
    for parameter in net.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    objective, x0 = MaskedLM(LogLinear(eps=0.0), Absorbing(MASK), Rates([1.0, 0.1])), torch.tensor([[2, 0, 3]])
    assert objective.loss_name == "cross_entropy" and objective.bound(None).loss_name == "nll"
    model, nats = Model(objective.bound(None), net), 0.0
    for order in itertools.permutations(range(3)):
        x = torch.full((1, 3), MASK)
        for place in order:
            log_p = model.denoise(
                x, torch.tensor([0.5], dtype=torch.float64), Positions(torch.arange(3)[None] == place)
            )
            nats, x[0, place] = nats - float(log_p[0, x0[0, place]]) / 6, x0[0, place]
    assert exact_bound(objective.bound(None), net, x0) == pytest.approx(nats, rel=1e-5)
    loss = objective.bound(ExactCount()).loss(
        net, batch_of(x0.expand(3000, -1)), evaluation_noise(0, torch.arange(3000))
    )
    assert abs(float(loss.nll_BL.double().sum(-1).mean()) - nats) < 5 * float(loss.nll_BL.sum(-1).std()) / 3000**0.5
    law = any_order_law(model, 3, VOCAB)
    assert nats >= -math.log(law[(2, 0, 3)]) and sum(law.values()) == pytest.approx(1)


def test_the_loss_is_the_mean_over_the_masked_tokens(random_dit):
    net, x0 = random_dit(VOCAB), torch.randint(4, (6, 9))
    objective, noise = (
        MaskedLM(SCHEDULE, Absorbing(MASK), Rates([0.5])),
        partial(training_noise, 0, torch.arange(6), 6),
    )
    loss = objective.loss(net, batch_of(x0), noise())
    xt = objective.mask_sampler(SCHEDULE, x0, torch.ones_like(x0, dtype=torch.bool), Absorbing(MASK), noise())[0].xt_BL
    log_p = net(xt, torch.zeros(6)).double()
    log_p[..., MASK] = -torch.inf
    wanted = -log_p.log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1)[xt == MASK]
    assert loss.mask_BL.sum() == (xt == MASK).sum() and float(loss.mean()) == pytest.approx(float(wanted.mean()))
    nats, tokens = cross_entropy_at(objective, net, batch_of(x0), 1.0, noise())
    assert tokens == 54 and float(nats) == pytest.approx(float(loss.nll_BL.new_tensor(everything(net, x0))), rel=1e-5)


def everything(net, x0: torch.Tensor) -> float:
    log_p = net(torch.full_like(x0, MASK), torch.zeros(len(x0))).double()
    log_p[..., MASK] = -torch.inf
    return -float(log_p.log_softmax(-1).gather(-1, x0[..., None]).sum())


def test_prefix_and_special_tokens_are_given_in_wrapped_and_in_padded_rows():
    bos, eos, unk = 1, 2, 3
    rows = [np.array([bos, 9, 8, 7, eos, 6, unk, eos]), np.array([9, 8, bos, 7, 6, 5, 9, unk])]
    columns = {"input_ids": rows, "length": np.array([8, 8]), "sample_id": np.arange(2)}
    wrapped = Collate(8, None, {bos, eos, 0}, prefix=2, bos_id=bos)(columns)
    assert wrapped["observed"].int().tolist() == [[1, 1, 1, 0, 1, 0, 0, 1], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert Collate(8, None, prefix=2, bos_id=bos)(columns)["observed"].int().tolist()[0] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert "observed" not in Collate(8, None)(columns)
    columns = {"input_ids": [rows[0][:5], rows[1]], "length": np.array([5, 8]), "sample_id": np.arange(2)}
    padded = Collate(8, 0, {bos, eos}, prefix=2, bos_id=bos)(columns)
    assert padded["observed"].int().tolist() == [[1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    long = Collate(8, 0, {bos, eos}, prefix=7, bos_id=bos)(columns)
    assert scored_mask(long).sum(-1).tolist() == [0, 1], "a text within the prefix has nothing to learn"


@pytest.mark.parametrize("overrides", [[], ["data.wrap=true", "model.length=32"],
                                       ["sampling.prefix=dull", "data.wrap=true", "model.length=32"],
                                       ["parameterization=ar", "training.prefix_length=5"]], ids=" ".join)  # fmt: skip
def test_a_batch_masks_nothing_that_is_given_and_a_sample_keeps_it(untrained, overrides):
    built = untrained(*FEW, *(["algo=mlm"] if "parameterization=ar" not in overrides else []), *overrides)
    _, data, diffusion = built
    batch = next(iter(data.train_dataloader()))
    special = torch.isin(batch["input_ids"], torch.tensor(sorted(data.vocabulary.special_ids)))
    begun = (batch["input_ids"][:, 0] == data.vocabulary.bos_id).int()
    if diffusion.fills_masks:
        noise, scored = training_noise(1, batch["position"], 4), scored_mask(batch)
        drawn = diffusion.objective.mask_sampler(
            SCHEDULE, batch["input_ids"], scored, Absorbing(data.vocabulary.mask_id), noise
        )[0]
        masked = drawn.xt_BL == data.vocabulary.mask_id
        assert masked.any(-1).all() and not (masked & special).any()
        assert all(not masked[row, : 5 + begun[row]].any() for row in range(4))
    texts = draw(diffusion, data, built[0].build.drawing(), 3, 3, seed=1)
    begin = int(data.vocabulary.bos_id == texts[0].ids[0])
    steps = [text.steps[begin : begin + 7] for text in texts]
    wanted = data.tokenizer(built[0].build.drawing().inputs.prefix or "", add_special_tokens=False)["input_ids"]
    number = len(wanted) or 5  # of what was typed, nothing of the lender's stays behind it
    assert all(step[:number] == [0] * number for step in steps)
    assert all(step[number] > 0 for step in steps)


def test_the_unigram_baseline_is_of_the_same_tokens(untrained):
    data = untrained(*FEW, "algo=mlm", "training.prefix_length=3")[1]
    rows, nats = data.split("validation"), unigram_nll(data, "validation")
    counts = np.ones(data.vocabulary.size)
    for ids in data.split("train")["input_ids"]:
        np.add.at(counts, ids[4:-1], 1)
    counts[[data.vocabulary.bos_id, data.vocabulary.eos_id]] = 0
    ids = rows["input_ids"][0]
    assert nats[0] == pytest.approx(-np.log(counts[ids[4:-1]] / counts.sum()).sum())


def test_trains_measures_and_classifies_and_says_what_it_is(tmp_path, monkeypatch, real_figures):
    monkeypatch.chdir(tmp_path)
    monitored = "callbacks=[checkpoint_every_n_steps,checkpoint_monitor,masking_rates]"
    ask = [*TINY, *FEW, "algo=mlm", monitored, "trainer.val_check_interval=1", "trainer.log_every_n_steps=1"]
    commands.run(*ask)
    logged = [row for row in csv.DictReader(next(tmp_path.rglob("metrics.csv")).open())]
    names = {name for row in logged for name, value in row.items() if value}
    assert {"val/cross_entropy_at_100", "val/cross_entropy_at_50", "val/cross_entropy_at_10", "val/nll"} <= names
    assert "train/cross_entropy" in names and not any("train/nll" in name or "train/ppl" in name for name in names)
    report = next(tmp_path.rglob("report.html")).read_text()
    assert "Cross-entropy of the masked tokens of the validation texts" in report and "10 % masked" in report
    measured = commands.run(*ask, "mode=ppl_eval")
    protocol = json.loads(next(tmp_path.rglob("ppl_eval/*/results.json")).read_text())["protocol"]
    assert protocol["kind"] == "NELBO" and protocol["prefix_length"] == 5 and protocol["parameterization"] == "subs"
    assert protocol["distribution"] == "p(rest | first 5 tokens, where its special tokens stand)"
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    other = [*TINY, *FEW, f"eval.checkpoint_path={checkpoint}", "mode=ppl_eval", "algo=mdlm"]
    same = commands.run(*other, "training.prefix_length=5")
    assert same["nll_nats_per_token"] == measured["nll_nats_per_token"]
    assert commands.run(*other)["tokens"] > same["tokens"]
    assert 0 <= commands.run(*ask, "mode=classify")["accuracy"].value <= 1


def test_validation_by_rate_sees_the_same_masks_every_time(untrained):
    _, data, diffusion = untrained(*FEW, "algo=mlm")
    batch = next(iter(data.val_dataloader()))
    once, again = (diffusion.cross_entropy_at(batch, 0.5) for _ in range(2))
    assert torch.equal(once[0], again[0]) and 0.3 < once[1] / scored_mask(batch).sum() < 0.7
    assert diffusion.cross_entropy_at(batch, 1.0)[1] == scored_mask(batch).sum()


def test_validation_by_rate_is_refused_where_it_means_nothing(untrained):
    with pytest.raises(ValueError, match=r"callbacks.masking_rates.rates=\[0.5, 0.5\] names a rate twice"):
        MaskingRates([0.5, 0.5])
    for law in ("parameterization=ar", "T=4"):
        with pytest.raises(ValueError, match="callbacks=masking_rates masks any tokens of a text"):
            MaskingRates().on_fit_start(lightning.Trainer(accelerator="cpu", logger=False), untrained(*FEW, law)[2])


def test_the_figure_labels_its_lines():
    series = [("10 %", [[1, 2.0], [2, 1.5]]), ("50 %", [[1, 3.0], [2, np.nan]]), ("100 %", np.empty((0, 2)))]
    axes = plots.losses_over_time(series, "cross-entropy", smooth=False).axes[0]
    assert {"10 %", "50 %"} <= {text.get_text() for text in axes.texts} and len(axes.lines) == 2


@pytest.mark.parametrize(("said", "arguments"), [
    ("masking_rates=.* means nothing .*: it is read by masking=rates", ["training.masking_rates=[0.5]"]),
    ("masking_rate_per=batch means nothing .* it is read by masking=rates", ["training.masking_rate_per=batch"]),
    ("masking_rate_max=0.5 limit training.masking_rates=continuous", ["algo=mlm", "training.masking_rate_max=0.5"]),
    ("these draws do not cover", ["algo=mlm", "training.loss_weight=elbo"]),
    ("data.score_special=true contradicts algo=mlm", ["algo=mlm", "data.score_special=true"]),
    ("data.fill=eos lets a model write", ["algo=mlm", "data.fill=eos"]),
    ("T=7", ["algo=mlm", "T=7"]), ("training.prefix_length=-1", ["training.prefix_length=-1"]),
    ("training.prefix_length=72 must leave something of model.length=72", ["training.prefix_length=72"]),
    ("training.prefix_length=71 must leave something of model.length=72", ["training.prefix_length=71"]),
    ("training.prefix_length=few must be a whole", ["training.prefix_length=few"]),
    ("means nothing to parameterization=ar", ["algo=ar", "training.masking=rates"]),
    ("resample=true means nothing .* masking=bernoulli", ["algo=mlm", "training.resample=true"]),
    ("importance_sampling=true means nothing .* masking=bernoulli", ["algo=mlm", "training.importance_sampling=true"]),
])  # fmt: skip
def test_what_can_not_be_meant_is_refused(tmp_path, monkeypatch, said, arguments):
    monkeypatch.chdir(tmp_path)
    commands.refused(said, *TINY, *FEW, *arguments)


def test_fingerprints_know_what_determines_the_weights_and_nothing_else():
    folder = lambda *typed: str(Experiment(compose_config([*typed]), "a test").runs.folder())  # noqa: E731
    different = [["algo=mlm"], ["algo=mlm", "training.prefix_length=0"], ["algo=mlm", "training.masking_rates=[0.5]"],
                 ["training.prefix_length=5"]]  # fmt: skip
    assert len({folder(*typed) for typed in different}) == len(different)
    assert folder() == folder("data.score_special=false") != folder("data.score_special=true")
    assert compose_config(["algo=mlm"]).training.prefix_length == 5
    assert compose_config(["training.prefix_length=2", "algo=mlm"]).training.prefix_length == 2


def test_a_rate_for_every_class_on_real_reviews(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    results = commands.run(
        *TINY,
        "mode=classify",
        "data=imdb",
        "algo=mlm",
        "training.prefix_length=0",
        "model=tiny",
        "model.length=64",
        "model.hidden_size=16",
        "model.n_blocks=1",
        "model.n_heads=2",
        "data.tokenizer_name_or_path=byte",
        "sampling.num_sample_log=0",
    )
    assert 0 <= results["accuracy"].value <= 1 and len(list(tmp_path.rglob("last.ckpt"))) == 2
