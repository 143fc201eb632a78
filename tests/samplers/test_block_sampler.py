"""Sampling block after block: its law by enumeration, the cache, windows, endings, given tokens, what it costs."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from palimpsest.common.randomness import KeyedNoise
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.base import Model
from palimpsest.objectives.block import BlockDiffusion
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers import ancestral, block, first_hitting
from palimpsest.samplers.base import TokenChoice
from palimpsest.samplers.block import text_length, unigram_entropy
from tests.helpers.blocks import causal_law, likelihood_of_blocks
from tests.helpers.laws import assert_follows, texts

VOCAB, MASK = 4, 3
MANY = 12_000


def model_of(net, size: int, **kwargs) -> Model:
    return BlockDiffusion(Absorbing(MASK), partial(Subs, LogLinear()), size, ignore_bos=False, **kwargs).model(net)


def run(model, x, seed=0, first=0, inner=first_hitting.sample, **settings):
    return block.sample(model, x, KeyedNoise(seed, torch.arange(first, first + len(x))), inner=inner, **settings)


def blank(rows: int, length: int) -> torch.Tensor:
    return torch.full((rows, length), MASK)


@pytest.mark.parametrize(("size", "length"), [(1, 3), (2, 4), (3, 4)])
def test_samples_follow_the_law_that_the_likelihood_is_of(random_dit, size, length):
    net, every = random_dit(VOCAB), texts(VOCAB, length, MASK)
    with torch.no_grad():
        log_p = causal_law(net, 1, every).sum(-1) if size == 1 else likelihood_of_blocks(net, size, every)
    law = dict(zip(map(tuple, every.tolist()), log_p.double().exp().tolist(), strict=True))
    out = run(model_of(net, size), blank(MANY, length))
    assert_follows(out.ids_BL, law)
    assert (out.step_BL >= 1).all() and out.num_steps == length


def test_a_fine_grid_of_times_samples_the_same_law(random_dit):
    net, every = random_dit(VOCAB), texts(VOCAB, 3, MASK)
    with torch.no_grad():
        log_p = likelihood_of_blocks(net, 2, every)
    law = dict(zip(map(tuple, every.tolist()), log_p.double().exp().tolist(), strict=True))
    inner = partial(ancestral.sample, steps=200, skip_idle=True)
    assert_follows(run(model_of(net, 2), blank(3000, 3), inner=inner).ids_BL, law)
    few = run(model_of(net, 2), blank(64, 4), inner=partial(ancestral.sample, steps=1, skip_idle=True))
    assert (few.evaluations_B <= 2 * 2 + 1).all(), "one step per block, one look at what is left, one block remembered"


@pytest.mark.parametrize("settings", [{}, {"time_conditioning": True}, {"num_classes": 2}])
@pytest.mark.parametrize("inner", [first_hitting.sample, partial(ancestral.sample, steps=3, skip_idle=True)])
@pytest.mark.parametrize("size", [1, 4])
def test_the_cache_changes_no_token(random_dit, size, inner, settings):
    model, x = model_of(random_dit(VOCAB, **settings), size), blank(6, 12)
    x[0, :5], x[1, 0], x[2, 11] = 1, 2, 0
    cond = {"class_id": torch.tensor([0, 1, -1, 0, 1, 0])} if "num_classes" in settings else {}
    mask = torch.ones(6, 12, dtype=torch.bool)
    mask[3, 9:], mask[4, 4:] = False, False
    x[~mask] = 0
    for choice in (TokenChoice(), TokenChoice(0.7, top_k=2, nucleus_p=0.9)):
        with_cache, without = (
            run(model, x, inner=partial(inner, choice=choice), kv_cache=kv, attention_mask=mask, **cond)
            for kv in (True, False)
        )
        assert torch.equal(with_cache.ids_BL, without.ids_BL) and torch.equal(with_cache.step_BL, without.step_BL)
        assert not (with_cache.ids_BL == MASK).any()
    assert torch.equal(with_cache.ids_BL[x != MASK], x[x != MASK])


def test_a_sample_does_not_depend_on_its_batch(random_dit):
    model, together = model_of(random_dit(VOCAB), 4), blank(5, 8)
    together[0, :2], together[3, 1] = 1, 2
    out = run(model, together)
    for row in range(5):
        alone = run(model, together[row : row + 1], first=row)
        assert torch.equal(alone.ids_BL[0], out.ids_BL[row]) and alone.evaluations_B[0] == out.evaluations_B[row]


@pytest.mark.parametrize("kv_cache", [True, False])
def test_a_window_is_the_law_up_to_its_width_and_the_same_with_and_without_cache(random_dit, monkeypatch, kv_cache):
    for room in ("models.kv_cache", "models.blocks"):
        monkeypatch.setattr(f"{room}.MOST_AT_ONCE", 4)
    model = model_of(random_dit(VOCAB), 2)
    whole = run(model, blank(40, 30), kv_cache=kv_cache)
    window = run(model, blank(40, 30), kv_cache=kv_cache, context=8)
    assert torch.equal(window.ids_BL[:, :8], whole.ids_BL[:, :8])
    assert not torch.equal(window.ids_BL, whole.ids_BL)
    if not kv_cache:
        assert torch.equal(window.ids_BL, run(model, blank(40, 30), context=8).ids_BL)
    with pytest.raises(ValueError, match="sampling.context=7 must be a multiple of block_size=2"):
        run(model, blank(2, 30), context=7)


END = 2


def end_of(ids: torch.Tensor, given: int = 1, min_entropy: float | None = 4.0) -> int | None:
    return text_length(ids, torch.arange(len(ids)) >= given, END, min_entropy)


def test_endings_are_the_references(fixtures_dir):
    """The reference's five kinds of text, of 512 tokens, and what it made of them."""
    golden = json.loads((fixtures_dir / "bd3lms_aux.json").read_text())["stop_conditions"]
    torch.manual_seed(0)
    many = torch.arange(512) % 200 + 10  # 200 types: 5.2 nats
    few, constant = torch.randint(3, 42, (512,)), many.clone()
    constant[256:] = 7
    two, one, early = many.clone(), many.clone(), many.clone()
    two[[0, 300]], one[0], early[[0, 238]] = END, END, END
    for name, ids in {
        "random_39_vocab": few,
        "two_eos_at_0_and_300": two,
        "one_eos_at_0": one,
        "constant_tail": constant,
        "200_types": early,
    }.items():
        known = golden[f"{name}|var_length=True"]
        assert abs(unigram_entropy(ids[256:]) - known["entropy_last256_nats"]) < 0.2
        found = end_of(ids)
        assert (found is not None) == known["stop"] and (found or 512) == known["out_len"]


def test_endings_ask_for_enough_text_and_leave_out_what_was_given():
    constant = torch.full((256,), 7)
    assert end_of(constant) is None and end_of(torch.cat([constant, constant[:1]])) == 1
    assert end_of(torch.cat([constant, constant]), min_entropy=None) is None
    prompted = torch.cat([constant, constant])
    assert end_of(prompted, given=300) is None and end_of(prompted, given=256) == 256, "what was given is not cut off"
    prompt = torch.tensor([5, END, 6, 7, END])
    assert end_of(prompt, given=2) == 5 and end_of(prompt, given=5) is None


class Counting:
    """A network that says which rows it was asked for, and how often."""

    def __init__(self, net):
        self.net, self.asked, self.read = net, [], 0

    def __getattr__(self, name):
        return getattr(self.net, name)

    def encode_after(self, tokens, *args, **kwargs):
        self.asked.append(len(tokens))
        return self.net.encode_after(tokens, *args, **kwargs)

    def remember(self, tokens, *args, **kwargs):
        self.read += len(tokens)
        return self.net.remember(tokens, *args, **kwargs)


@pytest.mark.parametrize("kv_cache", [True, False])
def test_rows_end_by_themselves_and_then_cost_nothing(random_dit, kv_cache):
    net = Counting(random_dit(VOCAB))
    model, x = model_of(net, 2), blank(24, 20)
    out = run(model, x, var_length=True, stop_id=END, kv_cache=kv_cache)
    full = run(model_of(random_dit(VOCAB), 2), x)
    lengths = out.length_B.tolist()
    assert len(set(lengths)) > 4
    for row, length in enumerate(lengths):
        ids = out.ids_BL[row].tolist()
        assert ids[:length] == full.ids_BL[row, :length].tolist(), "what is written is what a full text begins with"
        assert ids[:length].index(END) == length - 1 if END in ids[:length] else length == 20
        blocks = -(-length // 2)
        assert int(out.evaluations_B[row]) == 2 * blocks + (blocks - (length > 18)) * kv_cache - (
            kv_cache and length <= 18
        )
        assert (out.ids_BL[row, 2 * blocks :] == MASK).all()
    assert sum(net.asked) == sum(2 * -(-n // 2) for n in lengths)


def test_a_prefix_is_read_at_once(random_dit):
    net = Counting(random_dit(VOCAB))
    x = blank(3, 12)
    x[:, :9] = 1
    out = run(model_of(net, 4), x)
    assert (out.ids_BL[:, :9] == 1).all() and net.read == 3 and net.asked == [3, 3, 3]
    assert (out.evaluations_B == 4).all() and (out.step_BL[:, :9] == 0).all()


def test_given_text_behind_a_gap_is_refused(random_dit):
    x = blank(2, 8)
    x[:, 7] = 1
    run(model_of(random_dit(VOCAB), 2), x)  # the end of the text may be given
    x[0, 4] = 1
    with pytest.raises(ValueError, match="sampling.prefix instead of sampling.template"):
        run(model_of(random_dit(VOCAB), 2), x)
    run(model_of(random_dit(VOCAB), 8), x)


def test_other_models_are_not_written_in_blocks(random_dit):
    with pytest.raises(ValueError, match="writes texts of algo=bd3lm.*sampling.predictor=ddpm_cache"):
        run(Subs(LogLinear(), Absorbing(MASK)).model(random_dit(VOCAB)), blank(1, 4))
