"""Texts in segments as the blocks of block diffusion: identities, exact enumeration, who sees whom, sampling."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise, evaluation_noise, training_noise
from palimpsest.models import block_attention
from palimpsest.models.segment_attention import segment_masks
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.block import BlockDiffusion
from palimpsest.objectives.mask_sampling import Bernoulli, ExactCount, TiltedCount
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers import ancestral, block, first_hitting
from tests.helpers.draws import draw_at
from tests.helpers.laws import assert_follows, batch_of, exact_bound, texts

VOCAB, MASK = 4, 3
ENDS = torch.tensor([[2, 5], [3, 5], [1, 6], [4, 4]])  # of rows of 9; the last one's second segment is empty


def objective_of(size: int = 100, noising=None, schedule=None, **kwargs) -> BlockDiffusion:
    return BlockDiffusion(
        Absorbing(MASK), partial(Subs, schedule or LogLinear(), noising=noising), size, ignore_bos=False, **kwargs
    )


def in_segments(x0: torch.Tensor, ends: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**batch_of(x0), "segment_ends": ends.expand(len(x0), -1), **more}


@pytest.mark.parametrize(("mask_sampler", "settings", "padding"), [
    (Bernoulli(), {"time_conditioning": True}, 0), (ExactCount(), {}, 2), (TiltedCount(), {"num_classes": 2}, 0),
], ids=["bernoulli, time", "exact_count, padding", "tilted_count, classes"])  # fmt: skip
def test_segments_of_k_tokens_are_blocks_of_k(random_dit, mask_sampler, settings, padding):
    """Number for number: loss, what is logged, gradients; the last of ten tokens are fewer."""
    net, x0, k = random_dit(VOCAB, **settings), torch.randint(MASK, (4, 10)), 4
    net.train()
    given = torch.zeros(4, 10, dtype=torch.bool)
    given[:, :k], given[1, 6] = True, True
    batch = {**batch_of(x0, padding), "observed": given}
    batch |= {"class_id": torch.tensor([0, 1, -1, 0])} if "num_classes" in settings else {}
    cut = {**batch, "segment_ends": torch.tensor([[4, 8]]).expand(4, -1)}
    found = []
    for objective, rows in ((objective_of(k, mask_sampler), batch), (objective_of(10, mask_sampler), cut)):
        loss = objective.loss(net, rows, training_noise(0, torch.arange(4), 4))
        net.zero_grad()
        loss.mean().backward()
        found.append((loss, [p.grad.clone() for p in net.parameters() if p.grad is not None]))
    (plain, wanted), (ours, gradients) = found
    torch.testing.assert_close(ours.nll_BL, plain.nll_BL)
    assert torch.equal(ours.mask_BL, plain.mask_BL) and ours.logs.keys() == plain.logs.keys()
    for name in plain.logs:
        torch.testing.assert_close(ours.logs[name], plain.logs[name])
    assert len(wanted) == len(gradients) > 10 and any(float(gradient.abs().max()) > 0 for gradient in gradients)
    for theirs, gradient in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(gradient, theirs)
    ours, plain = (
        o.block_losses(net, b, training_noise(0, torch.arange(4), 4))
        for o, b in ((objective_of(10, mask_sampler), cut), (objective_of(k, mask_sampler), batch))
    )
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_one_segment_is_masked_diffusion(random_dit):
    """Also where it begins behind an empty one, with the noise of the second."""
    net, x0 = random_dit(VOCAB, time_conditioning=True), torch.randint(MASK, (4, 6))
    plain, noise = Subs(LogLinear(), Absorbing(MASK)), partial(training_noise, 0, torch.arange(4), 4)
    for end, its_noise in ((6, noise()), (0, noise().part(1))):
        ours = objective_of().loss(net, in_segments(x0, torch.tensor([[end]])), noise())
        torch.testing.assert_close(ours.nll_BL, plain.loss(net, batch_of(x0), its_noise).nll_BL)


def test_in_a_network_of_one_layer_a_given_segment_is_a_given_prefix(random_dit):
    """There what the prefix sees is not seen by anyone; in two layers it is."""
    net, x0 = random_dit(VOCAB), torch.randint(MASK, (4, 9))
    given = torch.arange(9) < ENDS[:, 1:]
    segments, noise = in_segments(x0, ENDS[:, 1:], observed=given), partial(training_noise, 0, torch.arange(4), 4)

    def losses():
        for row in range(4):  # masked diffusion of what stands behind the prefix, with the noise of the second segment
            end = int(ENDS[row, 1])
            own, every = x0[row : row + 1, end:], torch.ones(1, 9 - end, dtype=torch.bool)
            noise_here = training_noise(0, torch.arange(4), 4).part(1).rows(torch.tensor([row]))
            (draw,) = Bernoulli()(LogLinear(), own, every, Absorbing(MASK), noise_here)
            xt = torch.cat([x0[row : row + 1, :end], draw.xt_BL], dim=1)
            rows = {name: value[row : row + 1] for name, value in {**batch_of(x0), "observed": given}.items()}
            yield Subs(LogLinear(), Absorbing(MASK)).loss_at(net, rows, draw_at(xt, draw.t_B)).nll_BL

    assert (torch.cat(list(losses())) - objective_of().loss(net, segments, noise()).nll_BL).abs().max() > 1e-3
    net.blocks = net.blocks[:1]
    torch.testing.assert_close(objective_of().loss(net, segments, noise()).nll_BL, torch.cat(list(losses())))


def test_the_mask_is_the_predicate_token_by_token():
    key_mask = torch.ones(4, 9, dtype=torch.bool)
    key_mask[1, 7:] = False
    segment = (torch.arange(9) >= ENDS[..., None]).sum(1)
    masks = segment_masks(segment, key_mask, "sdpa", 8)
    for row, query, key in itertools.product(range(4), range(9), range(9)):
        a, b, there = int(segment[row, query]), int(segment[row, key]), bool(key_mask[row, key])
        assert bool(masks.noised[row, 0, query, key]) == (b < a and there), "clean, before"
        assert bool(masks.noised[row, 0, query, 9 + key]) == (b == a and there), "noised, its own"
        assert bool(masks.clean[row, 0, query, key]) == (b <= a and there)


def test_flex_sees_the_same(random_dit, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(block_attention, "_flex_kernel", lambda: flex_attention)
    x0 = torch.randint(MASK, (4, 9))
    batch = {**in_segments(x0, ENDS), "attention_mask": torch.arange(9) < torch.tensor([[9], [8], [9], [7]])}
    with torch.no_grad():
        nets = (random_dit(VOCAB, attn_backend=backend) for backend in ("flex", "sdpa"))
        ours, plain = (objective_of().loss(net, batch, KeyedNoise(0, torch.arange(4))) for net in nets)
        torch.testing.assert_close(ours.nll_BL, plain.nll_BL)


def test_no_segment_learns_from_a_later_one_and_all_from_earlier_ones(random_dit):
    net, x0, ends = random_dit(VOCAB), torch.randint(MASK, (6, 9)), torch.tensor([[2, 5]])
    plan, execution = slice(2, 5), slice(5, 9)

    def loss_of(x):
        with torch.no_grad():
            return objective_of().loss(net, in_segments(x, ends), KeyedNoise(0, torch.arange(6))).nll_BL

    before, other, planned = loss_of(x0), x0.clone(), x0.clone()
    other[:, execution], planned[:, plan] = (x0[:, execution] + 1) % MASK, (x0[:, plan] + 1) % MASK
    assert torch.equal(loss_of(other)[:, :5], before[:, :5]), "no token of the execution tells the plan anything"
    assert (loss_of(other)[:, execution] != before[:, execution]).any()
    changed = loss_of(planned) != before
    assert not changed[:, :2].any() and changed[:, execution].any()


def law_of(net, x: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """log p(x) of the any-order sampler within each segment, by enumeration of the orders, (R,)."""
    objective, total, cuts = objective_of(), torch.zeros(len(x), dtype=torch.float64), [0, *ends, x.shape[1]]
    cond = {"segment_ends": torch.tensor([ends]).expand(len(x), -1)}
    for start, stop in itertools.pairwise(cuts):
        along, orders = [], list(itertools.permutations(range(start, stop)))
        for order in orders:
            row, log_p = x.clone(), torch.zeros(len(x), dtype=torch.float64)
            row[:, start:] = MASK
            for place in order:
                at = torch.zeros_like(row, dtype=torch.bool)
                at[:, place] = True
                answer = objective.denoise(net, row, torch.full((len(x),), 0.5), Positions(at), **cond)
                log_p += answer.gather(1, x[:, place, None]).squeeze(1)
                row[:, place] = x[:, place]
            along.append(log_p)
        total += torch.stack(along).logsumexp(0) - math.log(len(orders))
    return total


@torch.no_grad()
def test_the_law_sums_to_one_and_samples_follow_it(random_dit):
    net, every, ends = random_dit(VOCAB), texts(VOCAB, 4, MASK), [1, 3]
    p = law_of(net, every, ends).exp()
    assert abs(float(p.sum()) - 1) < 1e-6
    law = dict(zip(map(tuple, every.tolist()), p.tolist(), strict=True))
    out = run(model_of(net), torch.full((8000, 4), MASK), torch.tensor([ends]))
    assert_follows(out.ids_BL, law)
    with pytest.raises(ValueError, match="data.segments=true predicts block after block"):
        objective_of().denoise(
            net,
            torch.tensor([[0, MASK, 1, MASK]]),
            torch.ones(1),
            Positions(torch.tensor([[False, False, False, True]])),
            torch.tensor([[1, 3]]),
        )


@torch.no_grad()
def test_the_bound_is_unbiased_and_above_the_likelihood(random_dit):
    """Of two texts with segments of different lengths in one batch, by quadrature over t and enumeration of masks."""
    net, x0, ends = random_dit(VOCAB), torch.tensor([[0, 1, 2, 0, 1], [2, 2, 0, 1, 0]]), torch.tensor([[1, 3], [2, 4]])
    wanted = []
    for row, cuts in zip(x0, ends, strict=True):
        total, earlier = 0.0, []
        for start, stop in itertools.pairwise([0, *cuts.tolist(), 5]):
            law = objective_of().model(net).after(list(earlier))

            class Behind:
                encodes_positions, head = True, net.head

                def encode(self, tokens, sigma, at, law=law):
                    return law.backbone.encode(tokens, sigma, torch.zeros(len(tokens), dtype=torch.long), at)

            total += exact_bound(Subs(LogLinear(eps=0.0), Absorbing(MASK)), Behind(), row[None, start:stop], points=60)
            earlier.append((row[None, start:stop], torch.ones(1, stop - start, dtype=torch.bool)))
        wanted.append(total)
    wanted = torch.tensor(wanted, dtype=torch.float64)
    log_p = torch.cat([law_of(net, row[None], cuts.tolist()) for row, cuts in zip(x0, ends, strict=True)])
    assert (wanted >= -log_p - 1e-6).all()
    many, noise = 2000, evaluation_noise(1, torch.arange(4000))
    batch = {**batch_of(x0.repeat(many, 1)), "segment_ends": ends.repeat(many, 1)}
    nll_B = objective_of(noising=ExactCount(), schedule=LogLinear(eps=0.0)).loss(net, batch, noise).nll_BL.sum(-1)
    draws = nll_B.reshape(many, 2).double()
    assert ((draws.mean(0) - wanted).abs() < 5 * draws.std(0) / math.sqrt(many)).all()


def model_of(net) -> Model:
    return objective_of().model(net)


def run(model, x, ends, seed=0, first=0, inner=first_hitting.sample, **settings):
    noise = KeyedNoise(seed, torch.arange(first, first + len(x)))
    return block.sample(model, x, noise, inner=inner, segment_ends=ends.expand(len(x), -1), **settings)


def prompted(rows: int = 4) -> torch.Tensor:
    """The first segment given."""
    x = torch.randint(MASK, (rows, 9), generator=torch.Generator().manual_seed(0))
    return torch.where(torch.arange(9) < ENDS[:rows, :1], x, MASK)


@pytest.mark.parametrize(
    "settings", [{}, {"time_conditioning": True}, {"num_classes": 2}, {"mask_padding": False}], ids=str
)
@pytest.mark.parametrize("inner", [first_hitting.sample, partial(ancestral.sample, steps=3, skip_idle=True)])
def test_the_cache_changes_no_token_and_a_text_does_not_depend_on_its_batch(random_dit, inner, settings):
    model, x = model_of(random_dit(VOCAB, **settings)), prompted()
    cond = {"class_id": torch.tensor([0, 1, -1, 0])} if "num_classes" in settings else {}
    cached, read = (run(model, x, ENDS, inner=inner, kv_cache=kv, **cond) for kv in (True, False))
    assert torch.equal(cached.ids_BL, read.ids_BL) and torch.equal(cached.step_BL, read.step_BL)
    assert not (cached.ids_BL == MASK).any() and torch.equal(cached.ids_BL[x != MASK], x[x != MASK])
    assert torch.equal(cached.step_BL > 0, x == MASK)
    for row in range(4):
        alone = run(
            model,
            x[row : row + 1],
            ENDS[row : row + 1],
            first=row,
            inner=inner,
            **{name: value[row : row + 1] for name, value in cond.items()},
        )
        assert torch.equal(alone.ids_BL[0], cached.ids_BL[row]) and alone.evaluations_B[0] == cached.evaluations_B[row]
    if inner is first_hitting.sample:
        segment = (torch.arange(9) >= ENDS[..., None]).sum(1)
        last = [int(cached.step_BL[row][segment[row] == 1].max()) if row < 3 else 0 for row in range(4)]
        assert all((cached.step_BL[row][segment[row] == 2] > last[row]).all() for row in range(4)), (
            "one after the other"
        )
        assert (cached.evaluations_B == (x == MASK).sum(-1) + 2).all(), "a token each, and two segments remembered"


def test_what_is_sampled_behind_a_cache_has_the_probabilities_that_are_measured(random_dit):
    """`encode_after` of ragged segments against the two streams of `encode_blocks`."""
    net, x0 = random_dit(VOCAB, time_conditioning=True), torch.randint(MASK, (4, 9))
    segment = (torch.arange(9) >= ENDS[..., None]).sum(1)
    xt, sigma = torch.where(torch.rand(4, 9) < 0.5, MASK, x0), torch.rand(4, 3, dtype=torch.float64)
    with torch.no_grad():
        whole = net.encode_blocks(xt, x0, segment, sigma)
        cache = net.new_segment_cache(4)
        for number in range(3):
            at = segment == number
            here = torch.arange(int(at.sum(-1).max())) < at.sum(-1, keepdim=True)
            noised, clean = (torch.zeros(here.shape, dtype=torch.long).masked_scatter(here, x[at]) for x in (xt, x0))
            hidden = net.encode_after(noised, sigma[:, number], cache, attention_mask=here)
            torch.testing.assert_close(hidden[here], whole[at])
            some = torch.tensor([2, 0])
            part = net.encode_after(noised[some], sigma[some, number], cache, some, attention_mask=here[some])
            torch.testing.assert_close(part[here[some]], hidden[some][here[some]])
            net.remember_segment(clean, here, cache)


def test_segments_of_k_tokens_are_sampled_as_blocks_of_k(random_dit):
    net, x = random_dit(VOCAB), torch.full((5, 10), MASK)
    x[:, :4] = 1
    ours = run(model_of(net), x, torch.tensor([[4, 8]]))
    plain = block.sample(objective_of(4).model(net), x, KeyedNoise(0, torch.arange(5)), inner=first_hitting.sample)
    assert torch.equal(ours.ids_BL, plain.ids_BL) and torch.equal(ours.step_BL, plain.step_BL)
    assert torch.equal(ours.evaluations_B, plain.evaluations_B)


def test_given_text_behind_a_gap_is_refused(random_dit):
    x = prompted()
    x[0, 8] = 1
    with pytest.raises(ValueError, match="data.segments=true: segments are written from the first to the last"):
        run(model_of(random_dit(VOCAB)), x, ENDS)
