"""Order of rows: epochs of training, and the shares of the ranks in evaluation. Pure functions."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np

MIXED = 1000  # positions among which each data set of a mixture has its share
_MIXTURE = 3  # first key of the permutations of a mixture (data/streaming.py has others)


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of the rows in an epoch, (n,) int64.

    Rows are sorted by a hash (splitmix64) of (seed, epoch, row), so the order does not depend on a library's version.
    """
    key = _mix(np.array([seed % 2**64, epoch], dtype=np.uint64))
    salt = _mix(key[0] ^ _mix(key[1:] + np.uint64(0x9E3779B97F4A7C15)))
    order = np.argsort(_mix(np.arange(num_rows, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt), kind="stable")
    order.setflags(write=False)
    return order


@lru_cache(maxsize=16)  # data sets of a mixture
def _orders(num_rows: int, seed: int) -> Callable[[int], np.ndarray]:
    return lru_cache(maxsize=2)(partial(epoch_order, num_rows, seed))


def shuffled(num: int, *keys: int) -> np.ndarray:
    """Return the permutation of 0, ..., num - 1 that the keys name, (n,) int64, by the same hash."""
    salt = np.zeros(1, dtype=np.uint64)
    for key in keys:
        salt = _mix(salt * np.uint64(0x9E3779B97F4A7C15) + np.array([key % 2**64], dtype=np.uint64))
        salt = salt + np.uint64(1)
    return np.argsort(_mix(np.arange(num, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the output function of splitmix64 (Steele, Lea & Flood 2014) elementwise, modulo 2**64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def rows_at(positions: Sequence[int], num_rows: int, seed: int) -> np.ndarray:
    """Return the row at each position of the stream, (P,) int64."""
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), num_rows)
    rows = np.empty_like(places)
    for epoch in np.unique(epochs):
        rows[epochs == epoch] = _orders(num_rows, seed)(int(epoch))[places[epochs == epoch]]
    return rows


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Return how many of MIXED positions each data set of a mixture has, (K,), by the largest remainders."""
    exact = MIXED * np.asarray(weights, dtype=np.float64) / sum(weights)
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: MIXED - whole.sum()]] += 1
    return whole


def mixed_rows_at(positions: Sequence[int], sizes: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """Return the row at each position of a mixture, (P,) int64; the data sets, of `sizes` rows, follow one another.

    Each has its quota of every MIXED positions, at places by (seed, position // MIXED), and its rows come in the order
    of `rows_at`, as if it were alone.
    """
    quota, firsts = quotas(weights), np.cumsum([0, *sizes[:-1]])
    blocks, places = np.divmod(np.asarray(positions, dtype=np.int64), MIXED)
    rows = np.empty_like(places)
    for block in np.unique(blocks):
        kinds = np.repeat(np.arange(len(quota)), quota)[shuffled(MIXED, seed, _MIXTURE, int(block))]
        for kind, first in enumerate(firsts):
            rank = np.cumsum(kinds == kind) - 1
            at = (blocks == block) & (kinds[places] == kind)
            rows[at] = first + rows_at(block * quota[kind] + rank[places[at]], sizes[kind], seed)
    return rows


def draws_at(positions: Sequence[int], counts: Sequence[int] | np.ndarray, seed: int) -> np.ndarray:
    """Return a number in [0, counts[p]) for each position of the stream, (P,) int64.

    It is a hash of (seed, position), so it does not depend on batches, devices or a resume.
    """
    key = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) ^ np.uint64(0xD1B54A32D192ED03))
    drawn = _mix(key ^ _mix(np.asarray(positions, dtype=np.uint64)))
    return (drawn % np.asarray(counts).astype(np.uint64)).astype(np.int64)


def evaluation_batches(order: np.ndarray, batch_size: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Return the batches of one rank, which takes `order[rank::world]`; all ranks together take every row once.

    All ranks get the same number of batches, some of them smaller, if each has at least one row per batch; sharded
    models (FSDP) would wait forever otherwise.
    """
    mine = order[rank::world]
    count = -(-len(order[::world]) // batch_size)
    if -(-len(mine) // batch_size) < count <= len(mine):
        return [part.tolist() for part in np.array_split(mine, count)]
    return [mine[start : start + batch_size].tolist() for start in range(0, len(mine), batch_size)]
