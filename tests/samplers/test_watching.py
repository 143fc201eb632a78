"""What every sampler shows and records of what it writes: frames, steps, and the model's probability of each token."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from palimpsest.common.randomness import KeyedNoise
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.ar import AR
from palimpsest.objectives.base import Model
from palimpsest.objectives.block import BlockDiffusion
from palimpsest.objectives.d3pm import D3PM
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers import (
    analytic,
    ancestral,
    autoregressive,
    block,
    entropy_bounded,
    first_hitting,
    ordered,
    semi_autoregressive,
    unmasking,
)
from palimpsest.samplers.base import TokenChoice
from palimpsest.samplers.trace import Trace
from tests.helpers.decoders import Toy, Watched

MASK = 3


def blocks(net, size: int) -> Model:
    return BlockDiffusion(Absorbing(MASK), partial(Subs, LogLinear()), size, ignore_bos=False).model(net)


def subs(net) -> Model:
    return Model(Subs(LogLinear(), Absorbing(MASK)), net)


ancestors = partial(ancestral.sample, steps=6, skip_idle=True)
SAMPLERS = {
    "ddpm": (subs, partial(ancestral.sample, steps=6, skip_idle=False)),
    "ddpm_cache": (subs, ancestors),
    "unfinished": (subs, partial(ancestors, noise_removal=False, eps=0.5)),
    "analytic": (lambda net: Model(D3PM(LogLinear(), Absorbing(MASK), T=10), net), partial(analytic.sample, steps=6)),
    "first_hitting": (subs, partial(first_hitting.sample)),
    "ordered": (subs, partial(ordered.sample, order="margin", tokens_per_step=2)),
    "entropy_bounded": (subs, partial(entropy_bounded.sample, gamma=0.5)),
    "unmask": (subs, partial(unmasking.sample, steps=5)),
    "block": (partial(blocks, size=4), partial(block.sample, inner=first_hitting.sample)),
    "block of steps": (partial(blocks, size=4), partial(block.sample, inner=ancestors, kv_cache=False)),
    "segments": (partial(blocks, size=8), partial(block.sample, inner=first_hitting.sample,
                 segment_ends=torch.tensor([[3], [5], [6]]))),
    "semi_ar": (subs, partial(semi_autoregressive.sample, inner=ancestors, stride_length=3, num_strides=2)),
    "ar": (lambda net: AR(Absorbing(MASK)).model(net), partial(autoregressive.sample, kv_cache=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_frames_agree_with_the_steps_and_the_last_with_the_text(random_dit, name):
    build, sampler = SAMPLERS[name]
    x, frames = torch.full((3, 8), MASK), Watched()
    x[0, :3], x[1, 0], x[2, 0] = 1, 2, 0
    noise = lambda: KeyedNoise(5, torch.arange(3))  # noqa: E731
    model = build(random_dit(4, time_conditioning=name == "analytic"))
    choice = TokenChoice(temperature=0.5, top_k=2)
    if "inner" in sampler.keywords:
        sampler = partial(sampler, inner=partial(sampler.keywords["inner"], choice=choice))
    else:
        sampler = partial(sampler, choice=choice)
    out, alone = sampler(model, x, noise(), watch=frames), sampler(model, x, noise())
    for part in ("ids_BL", "step_BL", "confidence_BL", "evaluations_B"):
        assert torch.equal(getattr(out, part), getattr(alone, part)), f"watching changes {part}"
    written = out.step_BL > 0
    assert frames and [frame.num_steps for frame in frames] == sorted({frame.num_steps for frame in frames})
    for frame in frames:
        there = written & (out.step_BL <= frame.num_steps)
        assert torch.equal(frame.ids_BL[there], out.ids_BL[there])
        assert torch.equal(frame.confidence_BL[there], out.confidence_BL[there])
        assert (frame.ids_BL[written & ~there] == MASK).all() and (frame.confidence_BL[written & ~there] == 0).all()
    assert {int(step) for step in out.step_BL[written]} <= {frame.num_steps for frame in frames}
    given = torch.zeros_like(written)
    given[:, : x.shape[1]] = x != MASK
    assert (out.confidence_BL[given] == 1).all() and (out.step_BL[given] == 0).all()
    left = out.ids_BL == MASK
    assert (out.confidence_BL[left] == 0).all() and (out.step_BL[left] == 0).all()
    assert left.any() == (name == "unfinished")
    assert ((out.confidence_BL[written] > 0) & (out.confidence_BL[written] <= 1)).all()
    assert out.confidence_BL.dtype == torch.float32 and len(out.confidence_BL[written].unique()) > 5


@pytest.mark.parametrize("sampler", [
    first_hitting.sample, partial(ordered.sample, order="entropy"),
    partial(ancestral.sample, steps=500, skip_idle=True),
    partial(unmasking.sample, steps=9, how=unmasking.Unmasking(order="left_to_right")),
], ids=["first_hitting", "ordered", "ancestral", "unmask"])  # fmt: skip
def test_confidences_of_tokens_written_one_by_one_multiply_to_the_probability_of_the_text(sampler):
    toy = Toy(2, 4)
    x = torch.full((40, 4), 2)
    out: Trace = sampler(toy, x, KeyedNoise(1, torch.arange(40)), choice=TokenChoice(temperature=0.5))
    one_by_one = torch.tensor([len(set(steps)) == 4 for steps in out.step_BL.tolist()])
    wanted = [toy.law[tuple(row)] for row in out.ids_BL[one_by_one].tolist()]
    assert len(wanted) > 30 and out.confidence_BL[one_by_one].double().prod(-1).tolist() == pytest.approx(wanted, 1e-5)
