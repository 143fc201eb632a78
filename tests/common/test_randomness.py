"""Keyed noise: uniform, independent of batch, padding and order."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy import stats

from palimpsest.common.randomness import KeyedNoise, evaluation_noise, hash_seed, training_noise

# False-alarm rate of each statistical test here (seeds are fixed, so a failure repeats).
ALPHA = 1e-4


def test_numbers_are_uniform_and_uncorrelated():
    u = KeyedNoise(3, torch.arange(400)).uniform(250)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > ALPHA
    for a, b in [(u[:, :-1], u[:, 1:]), (u[:-1], u[1:])]:
        r = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
        assert abs(r) * np.sqrt(a.numel()) < stats.norm.isf(ALPHA / 2)


def test_every_part_of_the_address_matters():
    base = KeyedNoise(3, torch.tensor([7])).uniform(8)
    again = KeyedNoise(3, torch.tensor([7]))
    assert torch.equal(base, again.uniform(8))
    assert not torch.equal(base, again.uniform(8)), "a second call must give new numbers"
    for other in [
        KeyedNoise(4, torch.tensor([7])),
        KeyedNoise(3, torch.tensor([8])),
        KeyedNoise(3, torch.tensor([7]), draw=1),
    ]:
        assert not torch.equal(base, other.uniform(8))


def test_rows_do_not_depend_on_their_batch_or_padding():
    whole = KeyedNoise(1, torch.arange(10)).uniform(16)
    part = KeyedNoise(1, torch.arange(4, 10)).uniform(24)
    assert torch.equal(whole[4:], part[:, :16])


def test_training_times_are_antithetic_over_the_global_batch():
    times = training_noise(0, torch.arange(64, 128), 64).time()
    assert torch.equal((times * 64).long(), torch.arange(64))
    halves = [training_noise(0, torch.arange(start, start + 32), 64).time() for start in (64, 96)]
    assert torch.equal(times, torch.cat(halves)), "two devices must draw what one would"


def test_evaluation_times_are_stratified_over_draws_and_uniform_for_each_sample():
    draws = torch.stack([evaluation_noise(0, torch.arange(100), k, 8).time() for k in range(8)])
    assert torch.equal((draws * 8).long().sort(0).values, torch.arange(8)[:, None].expand(8, 100)), (
        "one in each stratum"
    )
    one_sample = [float(evaluation_noise(seed, torch.tensor([5])).time()) for seed in range(500)]
    assert stats.kstest(one_sample, "uniform").pvalue > ALPHA


def test_the_first_draws_of_a_design_are_a_fair_and_spread_out_sample():
    times = torch.stack([evaluation_noise(0, torch.arange(4000), k, 64).time() for k in range(8)])
    for first in times[:2]:
        assert stats.kstest(first, "uniform").pvalue > ALPHA
    around = torch.cat([times, times.min(0, keepdim=True).values + 1]).sort(0).values.diff(dim=0)
    assert around.max() < 2 / 8 + 1 / 64, "no gap on the circle is wider than two strata of eight"
    ids, text = torch.arange(6), torch.tensor([0, 0, 0, 1, 1, 1])
    shared = evaluation_noise(0, ids, 3, 8, group_B=text)
    assert len(shared.time().unique()) == 2 and len(shared.uniform(5).unique()) == 30


def test_parts_of_parts_have_numbers_of_their_own():
    """Addresses of up to three parts below six are equal only if they differ by trailing zeros, the row itself."""

    def at(address: tuple[int, ...]) -> KeyedNoise:
        noise = evaluation_noise(0, torch.arange(2))
        for number in address:
            noise = noise.part(number)
        return noise

    addresses = [address for depth in range(4) for address in itertools.product(range(6), repeat=depth)]
    found = {}
    for address in addresses:
        shortest = tuple(np.trim_zeros(address, "b"))
        numbers = (*at(address).uniform(2).flatten().tolist(), *at(address).time().tolist())
        assert found.setdefault(shortest, numbers) == numbers
    for column in zip(*found.values(), strict=True):
        assert len(set(column)) == len(found)
    nested = evaluation_noise(0, torch.arange(2)).part(4).parts(3)
    alone = [at((4, number)) for number in range(3)]
    assert torch.equal(nested.uniform(5).reshape(2, 3, 5), torch.stack([noise.uniform(5) for noise in alone], 1))
    assert torch.equal(nested.time().reshape(2, 3), torch.stack([noise.time() for noise in alone], 1))


def test_hash_seed_is_a_63_bit_number_that_depends_on_order():
    assert 0 <= hash_seed(1, 2) < 2**63
    assert hash_seed(1, 2) != hash_seed(2, 1) != hash_seed(2, 1, 0)
