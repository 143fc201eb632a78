"""Random numbers that depend only on an address: (seed, key of the row, draw, call, place).

A torch.Generator produces numbers in order, so a sample's numbers depend on its batch, its rank and all earlier draws.
Here each number is a hash of its address (SplitMix64; Steele, Lea & Flood, OOPSLA 2014), the same integer on every
device. Masks therefore do not depend on batch size, number of devices, workers or a resume, and two models can be given
exactly the same masks.

Shape suffixes: B batch, P parts of a row, R selected rows.
"""

from __future__ import annotations

import copy
import math
from functools import lru_cache

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_BITS = (1 << 64) - 1
_GOLDEN_RATIO_CONJUGATE = 0.6180339887498949


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits, because torch has no unsigned 64-bit arithmetic but its int64 wraps
    around."""
    value &= _BITS
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right logically, without sign extension."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64, a bijection of the 64-bit integers."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)) * _signed(_MULTIPLIERS[1])
    return x ^ _shift(x, 31)


def hash_seed(*keys: int) -> int:
    """Return a 63-bit seed computed from integers, for generators that take one number."""
    state = 0
    for key in keys:  # `_mix` in Python integers, a hundred times faster than a tensor of one number
        state = ((state ^ key) + _GOLDEN) & _BITS
        state = (state ^ state >> 30) * _MULTIPLIERS[0] & _BITS
        state = (state ^ state >> 27) * _MULTIPLIERS[1] & _BITS
        state ^= state >> 31
    return state >> 1


def seed_generator_of(device: torch.device, seed: int) -> None:
    """Seed torch's generators of the CPU and of `device` with the numbers that torch.manual_seed gives.

    torch.manual_seed takes milliseconds: it queries every kind of accelerator and keeps a stack trace for unused ones.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


class KeyedNoise:
    """Uniform random numbers for a batch of rows, each row addressed by (seed, key, draw).

    Args:
        seed: the run's seed.
        key_B: int64 (B,), the row's identity: its sample id, or its position in the training stream.
        draw: number of the draw, if rows have several independent ones.
        time_B: float64 (B,) in [0, 1), the numbers that `time` returns, e.g. a low-discrepancy set.
        shared_B: float64 (B,) in [0, 1), what `shared` returns: equal for rows that are drawn together.
    """

    def __init__(
        self, seed: int, key_B: Tensor, draw: int = 0, time_B: Tensor | None = None, shared_B: Tensor | None = None
    ) -> None:
        self._state_B = _mix(_mix(key_B ^ hash_seed(seed)) ^ hash_seed(draw))
        self._calls, self._depth = 0, 0
        self._time_B, self._shared_B = time_B, shared_B

    def uniform(self, *shape: int) -> Tensor:
        """Return float64 (B, *shape) in [0, 1); each call gives new numbers.

        A number does not depend on `shape`, so further padding of a row leaves the numbers before it unchanged.
        """
        self._calls += 1
        stream_B = _mix(self._state_B ^ hash_seed(self._calls))
        size = torch.Size(shape)
        place = torch.arange(size.numel(), device=stream_B.device)
        bits = _mix(stream_B[:, None] + place * _signed(_GOLDEN))
        return (_shift(bits, 11).double() * 2.0**-53).reshape(len(stream_B), *size)

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal float64 (B, *shape) by inversion; each call gives new numbers."""
        return torch.special.ndtri(self.uniform(*shape) * (1 - 2.0**-53) + 2.0**-54)  # off the infinite ends

    def time(self) -> Tensor:
        """Return float64 (B,) in [0, 1): `time_B` if it was given, else uniform numbers."""
        return self.uniform() if self._time_B is None else self._time_B

    def shared(self) -> Tensor:
        """Return float64 (B,) in [0, 1), one number for all rows of an optimizer step, on every device and micro-batch.

        Rows of an evaluation draw share a number too. Rows created without `shared_B` have separate numbers.
        """
        return self.uniform() if self._shared_B is None else self._shared_B

    def parts(self, number: int) -> KeyedNoise:
        """Return noise for rows that are split into `number` parts; each part, in row-major order, becomes a row.

        The first part has the row's own numbers, and no part's numbers depend on how many there are. The times of a
        row's parts are its own time shifted along a Kronecker sequence. They are therefore spread evenly over the row,
        and the times of each part are spread over rows (or draws) as the rows' times are. Parts of parts have different
        numbers: part 2 of part 1 differs from part 1 of part 2.
        """
        return self._parts(torch.arange(number, device=self._state_B.device))

    def part(self, number: int) -> KeyedNoise:
        """Return noise for one part of every row, as in `parts`."""
        return self._parts(torch.full((1,), number, device=self._state_B.device))

    def _parts(self, part_P: Tensor) -> KeyedNoise:
        state_B1 = self._state_B[:, None]
        time_B = self._time_B
        shared_B = self._shared_B
        if self._depth == 0:
            state_BP = state_B1 ^ _mix(part_P)
        else:  # XOR alone commutes and cancels, so the parts of parts are mixed as well
            state_BP = _mix(state_B1 ^ _mix(part_P ^ hash_seed(self._depth)))
        state_b = torch.where(part_P > 0, state_BP, state_B1).flatten()
        if time_B is not None:  # no depth's shift between neighbouring parts is a multiple of another's
            shift = math.exp(self._depth) % 1.0 if self._depth else _GOLDEN_RATIO_CONJUGATE
            time_B = ((time_B[:, None] + part_P.double() * shift) % 1.0).flatten()
        shared_B = None if shared_B is None else shared_B.repeat_interleave(len(part_P))
        return self._with(state_b, time_B, shared_B, self._depth + 1)

    def rows(self, index_R: Tensor) -> KeyedNoise:
        """Return the noise of selected rows."""
        of_rows = (None if known_B is None else known_B[index_R] for known_B in (self._time_B, self._shared_B))
        return self._with(self._state_B[index_R], *of_rows, self._depth)

    def _with(self, state_B: Tensor, time_B: Tensor | None, shared_B: Tensor | None, depth: int) -> KeyedNoise:
        other = copy.copy(self)
        other._state_B, other._depth = state_B, depth
        other._time_B, other._shared_B = time_B, shared_B
        return other


def training_noise(
    seed: int, position_B: Tensor, global_batch_size: int | Tensor, place_B: Tensor | None = None
) -> KeyedNoise:
    """Return noise keyed by the positions of samples in the training stream.

    Times are antithetic over the *global* batch: each of its samples has a separate stratum (Kingma et al., arXiv
    2107.00630, appendix I.1), on whichever device and micro-batch it is.

    Args:
        place_B: index of each sample within its global batch; needed if batch sizes change during the stream.
    """
    place_B = position_B % global_batch_size if place_B is None else place_B
    jitter_B = KeyedNoise(seed, position_B, draw=-1).uniform()
    shared_B = KeyedNoise(seed, position_B - place_B, draw=-6).uniform()  # keyed by the step's first sample
    return KeyedNoise(seed, position_B, time_B=(place_B + jitter_B) / global_batch_size, shared_B=shared_B)


def evaluation_noise(
    seed: int, sample_id_B: Tensor, draw: int = 0, num_draws: int = 1, group_B: Tensor | None = None
) -> KeyedNoise:
    """Return the noise of one of `num_draws` draws for each sample, keyed by (seed, sample id, draw).

    Each draw takes its time from a different one of `num_draws` strata. The strata are visited in an order that spreads
    the first few draws out, from a random start for each sample, so that any number of first draws is a fair sample.
    Within a stratum the samples follow a Kronecker sequence with a random start: uniform for each sample, evenly spread
    over the data set. Samples of one group, such as the windows of a text, share their times.
    """
    group_B = sample_id_B if group_B is None else group_B
    start = KeyedNoise(seed, torch.tensor([draw], device=group_B.device), draw=-2).uniform()
    within_B = (start + group_B.double() * _GOLDEN_RATIO_CONJUGATE) % 1.0
    rotation_B = torch.floor(KeyedNoise(seed, group_B, draw=-5).uniform() * num_draws)
    stratum_B = (_spread_order(num_draws)[draw] + rotation_B) % num_draws
    return KeyedNoise(seed, sample_id_B, draw=draw, time_B=(stratum_B + within_B) / num_draws)


@lru_cache
def _spread_order(num: int) -> list[int]:
    """Return the ranks of 0, ..., num - 1 in van der Corput's sequence, whose first few members are far apart."""
    digits = max(1, (num - 1).bit_length())
    reversed_bits = [int(f"{k:0{digits}b}"[::-1], 2) for k in range(num)]
    by_value = sorted(range(num), key=reversed_bits.__getitem__)
    rank = [0] * num
    for place, k in enumerate(by_value):
        rank[k] = place
    return rank
