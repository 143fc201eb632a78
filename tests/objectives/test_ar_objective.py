"""The autoregressive objective: a distribution over texts, a sampler of it, a cache that changes nothing."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.common.randomness import KeyedNoise
from palimpsest.estimators.any_order import AnyOrder
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.estimators.ordered import Ordered
from palimpsest.models.ar import AR as Causal
from palimpsest.models.checkpoints import read_checkpoint
from palimpsest.objectives.ar import AR
from palimpsest.objectives.base import Model
from palimpsest.objectives.mask_sampling import Complementary
from palimpsest.process import Absorbing
from palimpsest.samplers import autoregressive
from palimpsest.samplers.base import TokenChoice
from tests.helpers.laws import assert_follows, batch_of, texts
from tests.helpers.networks import close

VOCAB, MASK, BOS = 4, 3, 0


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    net = Causal(VOCAB, hidden_size=16, n_blocks=2, n_heads=2, dropout=0.0).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return AR(Absorbing(MASK)).model(net.eval())


def after_bos(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full((len(rows), 1), BOS), rows], dim=1)


def exact(model: Model, length: int) -> dict[tuple, float]:
    every = after_bos(texts(VOCAB, length, MASK))
    with torch.no_grad():
        nll = model.objective.loss(model.backbone, batch_of(every)).nll_BL.double().sum(-1)
    return {tuple(row): math.exp(-value) for row, value in zip(every.tolist(), nll.tolist(), strict=True)}


def test_texts_have_probabilities_that_sum_to_one(model):
    assert sum(exact(model, 3).values()) == pytest.approx(1.0, abs=1e-6)


def test_the_loss_is_the_chain_rule_and_never_looks_ahead(model):
    x = after_bos(torch.randint(MASK, (5, 6)))
    loss = model.objective.loss(model.backbone, batch_of(x))
    log_p = model.denoise(x, None)
    torch.testing.assert_close(loss.nll_BL[:, 1:].double(), -log_p.gather(-1, x[:, 1:, None]).squeeze(-1).double())
    assert (loss.nll_BL[:, 0] == 0).all() and not loss.mask_BL[:, 0].any()
    other = x.clone()
    other[:, 4:] = (other[:, 4:] + 1) % MASK
    torch.testing.assert_close(loss.nll_BL[:, :4], model.objective.loss(model.backbone, batch_of(other)).nll_BL[:, :4])


def test_padding_is_not_scored_and_changes_nothing(model):
    x = after_bos(torch.randint(MASK, (5, 6)))
    padded = model.objective.loss(model.backbone, batch_of(x, padding=3))
    short = model.objective.loss(model.backbone, batch_of(x[:, :4]))
    torch.testing.assert_close(padded.nll_BL[:, :4], short.nll_BL)
    assert (padded.nll_BL[:, 4:] == 0).all() and int(padded.mask_BL.sum()) == 15


@pytest.mark.parametrize("kv_cache", [True, False])
def test_samples_follow_the_exact_law(model, kv_cache):
    x = after_bos(torch.full((20_000, 3), MASK))
    out = autoregressive.sample(model, x, KeyedNoise(0, torch.arange(20_000)), kv_cache=kv_cache)
    assert_follows(out.ids_BL, exact(model, 3))
    assert (out.evaluations_B == 3).all() and out.step_BL.unique().tolist() == [0, 1, 2, 3]


def test_the_cache_gives_the_same_tokens(model):
    x = after_bos(torch.full((6, 12), MASK))
    x[:, 1:4] = torch.tensor([1, 2, 0])
    out = [autoregressive.sample(model, x, KeyedNoise(0, torch.arange(6)), kv_cache=cache, choice=TokenChoice(0.7))
           for cache in (True, False)]  # fmt: skip
    assert torch.equal(out[0].ids_BL, out[1].ids_BL)
    assert torch.equal(out[0].ids_BL[:, :4], x[:, :4]) and (out[0].evaluations_B == 9).all()
    alone = [autoregressive.sample(model, x[i : i + 1], KeyedNoise(0, torch.tensor([i])), choice=TokenChoice(0.7))
             for i in range(6)]  # fmt: skip
    assert torch.equal(out[0].ids_BL, torch.cat([one.ids_BL for one in alone]))


def test_its_estimator_is_exact_and_others_are_refused(model):
    batch = batch_of(after_bos(torch.randint(MASK, (5, 6))))
    found = Nelbo()(model, batch, seed=0, num_draws=8)
    assert Nelbo().exact(model) and Nelbo().label(model, 8) == "exact" and found.nll_BK.shape == (5, 1)
    assert (found.evaluations_B == 1).all() and (found.tokens_B == 6).all()
    with pytest.raises(ValueError, match="parameterization=ar.*exact"):
        Nelbo(Complementary())(model, batch, 0, 2)
    for estimator in (Ordered(), AnyOrder()):
        with pytest.raises(ValueError, match="parameterization=ar"):
            estimator(model, batch, 0, 2)


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize(("variant", "file", "nlls"), [
    ("mdlm_ar", "mdlm.ckpt", "nll_per_token"), ("bd3lms_ar", "bd3lm.ckpt", "nlls"),
])  # fmt: skip
def test_golden_numbers(fixtures_dir, variant, file, nlls, weights):
    folder = fixtures_dir / variant
    meta, golden = json.loads((folder / "golden.json").read_text()), load_file(folder / "golden.safetensors")
    size = meta["model"]
    net = Causal(meta["vocab_size"], size["hidden_size"], size["n_blocks"], size["n_heads"], dropout=0.0).eval()
    read_checkpoint(folder / file).load_into(net, use_ema=weights == "ema")
    batch = {"input_ids": golden["x0"], "attention_mask": golden["attention_mask"].bool()}
    loss = AR(Absorbing(meta["mask_index"])).loss(net, batch)
    assert close(loss.nll_BL[:, 1:], golden[f"{weights}.{nlls}"])
    assert close(loss.mean(), golden[f"{weights}.token_nll"])
    possible = golden[f"{weights}.logprobs"] > -900  # the reference writes -1000 where we write -inf
    assert close(
        AR(Absorbing(meta["mask_index"])).denoise(net, golden["x0"])[possible], golden[f"{weights}.logprobs"][possible]
    )
