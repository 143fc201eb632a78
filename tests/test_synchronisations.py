"""How often a training step and a sampling step make the host wait for a GPU, counted on a CPU.

The host waits when it reads a number of the device: for the shape of a result, for a decision, or to copy data there.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise, training_noise
from palimpsest.models.ar import AR as CausalTransformer
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.ar import AR
from palimpsest.objectives.d3pm import D3PM
from palimpsest.objectives.gidd import GIDD
from palimpsest.objectives.mask_sampling import Bernoulli
from palimpsest.objectives.mlm import MaskedLM, Rates
from palimpsest.objectives.sedd import SEDD
from palimpsest.objectives.subs import Subs
from palimpsest.objectives.udlm import UDLM
from palimpsest.process import Absorbing, Hybrid, Uniform
from palimpsest.samplers import (
    ancestral,
    autoregressive,
    block,
    entropy_bounded,
    first_hitting,
    ordered,
    uniform,
    unmasking,
)
from palimpsest.samplers.base import TokenChoice
from palimpsest.samplers.unmasking import Unmasking
from tests.helpers.blocks import block as block_diffusion
from tests.helpers.joint import batch as joint_batch
from tests.helpers.joint import network as joint_network
from tests.helpers.joint import noise as joint_noise
from tests.helpers.joint import objective as joint_objective

VOCAB, MASK, ROWS, LENGTH = 12, 11, 5, 12
WAITING = {"nonzero", "_local_scalar_dense", "is_nonzero", "masked_select", "masked_scatter_backward", "equal",
           "unique_dim", "_unique2", "bincount"}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Waits(TorchDispatchMode):
    """Counts the waits in its context, in the backward pass too, which runs in the same thread on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __enter__(self) -> Waits:
        # Not operations of the dispatcher: reading a tensor as a list, and copying data to a device.
        self._patch = pytest.MonkeyPatch()
        to_list, from_data = torch.Tensor.tolist, torch.tensor

        def tensor(*args, **kwargs):
            self.seen += ["tensor"] * ("device" in kwargs)
            return from_data(*args, **kwargs)

        self._patch.setattr(torch.Tensor, "tolist", lambda x: self.seen.append("tolist") or to_list(x))
        self._patch.setattr(torch, "tensor", tensor)
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._patch.undo()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or counted:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_waits_are_seen_in_both_passes():
    x, mask = torch.randn(4, requires_grad=True), torch.tensor([True, False, True, True])
    with Waits() as waits:
        spread = torch.zeros(4).masked_scatter(mask, x[mask])
    assert waits.seen == ["index"]
    with Waits() as waits:
        spread.sum().backward()
        x.grad[mask] = 0
        assert bool(mask.any()) and mask.nonzero().tolist()
    assert waits.seen == ["masked_scatter_backward", "index_put", "index_put_", "_local_scalar_dense", "nonzero",
                          "tolist"]  # fmt: skip


def causal(vocab_size: int = VOCAB) -> CausalTransformer:
    torch.manual_seed(0)
    return CausalTransformer(vocab_size, hidden_size=16, n_blocks=2, n_heads=2, dropout=0.0)


def objectives() -> dict:
    masks = Absorbing(MASK, VOCAB)
    return {
        "subs": Subs(LogLinear(), masks),
        "mlm": MaskedLM(LogLinear(), masks, Rates()),
        "mlm, three rates": MaskedLM(LogLinear(), masks, Rates([0.2, 0.4, 0.6])),
        "bd3lm": block_diffusion(4, mask_id=MASK),
        "d3pm": D3PM(LogLinear(), masks, Bernoulli(T=20), T=20),
        "sedd": SEDD(LogLinear(), masks),
        "udlm": UDLM(LogLinear(), Uniform(VOCAB)),
        "gidd": GIDD(LogLinear(), Hybrid(MASK, VOCAB)),
        "ar": AR(masks),
    }


def padded_batch(step: int) -> dict[str, torch.Tensor]:
    """Texts of several lengths, so that neither padding nor the prompt is the same everywhere."""
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, 7, LENGTH, 3, LENGTH - 1])[:, None]
    observed = torch.arange(LENGTH) < torch.tensor([1, 2, 1, 1, 5])[:, None]
    return {"input_ids": torch.randint(MASK, (ROWS, LENGTH)), "attention_mask": mask, "observed": observed}


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize("name", objectives())
def test_a_training_step_waits_once(random_dit, name, classes):
    objective, more = objectives()[name], {"class_id": torch.arange(ROWS) % 2} if classes and name != "ar" else {}
    net = causal() if name == "ar" else random_dit(VOCAB, time_conditioning=True, num_classes=classes).float()
    for step in range(2):  # tables are made at the first
        batch, noise = {**padded_batch(step), **more}, training_noise(0, torch.arange(ROWS) + ROWS * step, ROWS)
        with Waits() as waits:
            objective.loss(net.train(), batch, noise).mean().backward()
    assert waits.seen == ["tolist"]


def test_a_training_step_of_texts_with_latents_waits_once():
    net, objective, batch = joint_network(), joint_objective(), joint_batch()
    with Waits() as waits:
        objective.loss(net, batch, joint_noise(8)).mean().backward()
    assert waits.seen == ["tolist"]


def steps_and_waits(sample, model, **settings) -> tuple[int, list[str]]:
    """The steps of a sampler that writes texts after one token, and its waits."""
    x = torch.full((ROWS, LENGTH), model.process.blank_id)
    x[:, 0] = 2
    with Waits() as waits:
        trace = sample(model, x, KeyedNoise(0, torch.arange(ROWS)), **settings)
    assert not (trace.ids_BL == model.process.blank_id).any()
    return trace.num_steps, waits.seen


def model_of(name: str, random_dit) -> object:
    net = causal() if name == "ar" else random_dit(VOCAB, time_conditioning=True).float()
    return objectives()[name].bound(None).model(net.eval())


PLANNED = {
    "ddpm": (ancestral.sample, {"steps": 20, "skip_idle": False}),
    "ddpm_cache": (ancestral.sample, {"steps": 20, "skip_idle": True}),
    "first_hitting": (first_hitting.sample, {}),
}


@pytest.mark.parametrize("name", PLANNED)
def test_no_step_waits_if_the_positions_are_known_before_the_first(random_dit, name):
    sample, settings = PLANNED[name]
    steps, waits = steps_and_waits(sample, model_of("subs", random_dit), **settings)
    assert steps > 10 and len(waits) <= 2, waits


@pytest.mark.parametrize("name", ["udlm", "gidd", "d3pm", "sedd"])
def test_a_step_waits_once_if_the_tokens_decide_what_is_written(random_dit, name):
    sample, settings = (uniform.sample, {}) if name in ("udlm", "gidd") else (ancestral.sample, {"skip_idle": True})
    steps, waits = steps_and_waits(sample, model_of(name, random_dit), steps=20, **settings)
    assert len(waits) <= steps + 1, waits


BY_PREDICTION = {
    "ordered": (ordered.sample, {"order": "margin"}),
    "ar": (autoregressive.sample, {}),
    "entropy_bounded": (entropy_bounded.sample, {"gamma": 0.1}),
    "unmask": (unmasking.sample, {"steps": 10}),
    "unmask, by confidence": (unmasking.sample, {"steps": 10, "how": Unmasking(order="confidence")}),
    "unmask, threshold": (unmasking.sample, {"steps": 10, "how": Unmasking(order="confidence", threshold=0.5)}),
}


@pytest.mark.parametrize("name", BY_PREDICTION)
def test_a_step_waits_once_if_the_prediction_decides_the_positions(random_dit, name):
    sample, settings = BY_PREDICTION[name]
    steps, waits = steps_and_waits(sample, model_of("ar" if name == "ar" else "subs", random_dit), **settings)
    assert len(waits) <= steps + 3, waits  # some before the first step


@pytest.mark.parametrize("exact", [True, False])
def test_block_sampling_waits_less_than_once_a_step(random_dit, exact):
    inner = block.within(exact, 8, TokenChoice())
    steps, waits = steps_and_waits(block.sample, model_of("bd3lm", random_dit), inner=inner)
    assert len(waits) <= 3 + 2 * LENGTH // 4 <= steps, waits


def test_positions_select_and_write_what_their_mask_does():
    torch.manual_seed(0)
    mask, x = torch.rand(ROWS, LENGTH) < 0.4, torch.randn(ROWS, LENGTH, 3)
    mask[2] = False
    at = Positions(mask)
    assert torch.equal(at.take(x), x[mask]) and torch.equal(torch.stack([at.row_N, at.place_N], 1), mask.nonzero())
    assert torch.equal(at.of_rows(x[:, 0]), x[:, :1].expand_as(x)[mask]) and len(at) == int(mask.sum())
    assert torch.equal(at.spread(x[mask][:, 0], 7.0), torch.where(mask, x[..., 0], 7.0))
    table = at.table_BQ
    assert table.shape == (ROWS, int(mask.sum(-1).max()))
    assert torch.equal(at.from_table(x.gather(1, table[..., None].expand(-1, -1, 3))), x[mask])
    rows, inside = at.compact()
    assert rows.tolist() == [0, 1, 3, 4] and torch.equal(inside.take(x[rows]), x[mask])
    some = Positions(mask & (torch.rand(ROWS, LENGTH) < 0.5))
    assert torch.equal(x[mask][at.find(some)], some.take(x))
    rest, part = at.without(some), at.in_rows(1, 4)
    assert torch.equal(rest.mask_BL, mask & ~some.mask_BL) and torch.equal(rest.take(x), x[rest.mask_BL])
    assert torch.equal(part.take(x), x[1:4][mask[1:4]]) and part.counts == [0, *at.counts[1:4], 0]
    number = torch.randint(-1, 5, (ROWS, LENGTH))
    for wanted, found in enumerate(Positions.by_number(number, 4)):
        assert torch.equal(found.take(x), x[number == wanted])
    for one, found in zip((mask, ~mask), Positions.of_each(mask, ~mask), strict=True):
        assert torch.equal(found.take(x), x[one])
    nowhere = Positions(torch.zeros_like(mask))
    assert nowhere.take(x).shape == (0, 3) and nowhere.table_BQ.shape == (ROWS, 1) and len(nowhere.compact()[0]) == 0
