"""The tokens that an edit rewrites."""

from __future__ import annotations

import torch

from palimpsest.common.randomness import KeyedNoise
from palimpsest.evaluation.edited_tokens import select
from palimpsest.noise_schedule import LogLinear
from palimpsest.process import Absorbing
from tests.helpers.joint import LENGTH, MASK, SHAPE, VOCAB

ROWS = 5


class Opinions:
    """Says of each place how sure the text is, and of its token how well the latent explains it; of nothing else."""

    process = Absorbing(MASK)
    vocab_size = VOCAB
    schedule = LogLinear()

    def __init__(self) -> None:
        self.asked = []

    def denoise(self, x_BL, t_B, at, **cond):
        assert (at.take(x_BL) == MASK).all(), "of a token that it sees a network of masks says nothing"
        self.asked.append((at.mask_BL, cond))
        place_N = at.place_N.double()
        sure_N = (1 + place_N) / 20
        if "latent" in cond:  # the source's latent explains early places better
            sure_N = 0.9 - place_N / 20 * (at.of_rows(cond["latent"].flatten(1)[:, 0]) > 0)
        rest_N1 = ((1 - sure_N) / (VOCAB - 2))[:, None]
        return torch.cat([sure_N[:, None], rest_N1.expand(-1, VOCAB - 2), 0 * rest_N1], 1).log()


def test_positions_are_chosen_by_rule_within_the_budget_and_never_special_tokens():
    x, z = torch.zeros(ROWS, LENGTH, dtype=torch.long), torch.ones(ROWS, *SHAPE)
    eligible = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    eligible[:, 0], eligible[1:, -1] = False, False
    ask = {"eligible_BL": eligible, "generator": KeyedNoise(3, torch.arange(ROWS)), "source": z, "target": -z}
    for positions in ("random", "entropy", "suffix", "contrast"):
        for rate in (0.0, 0.3, 0.5, 1.0):
            found = select(Opinions(), x, positions=positions, rate=rate, **ask)
            count = found.masked_BL.sum(-1)
            assert not (found.masked_BL & ~eligible).any()
            assert count.tolist() == [int(rate * n + 1e-9) for n in eligible.sum(-1).tolist()]
            torch.testing.assert_close(found.share_B, count / eligible.sum(-1).double())
    at = lambda positions, source=z, target=-z: (
        select(  # noqa: E731
            Opinions(), x, positions=positions, rate=0.5, **{**ask, "source": source, "target": target}
        )
        .masked_BL[0]
        .nonzero()[:, 0]
        .tolist()
    )
    assert at("suffix") == [5, 6, 7, 8] and at("entropy") == [1, 2, 3, 4]
    assert at("contrast", -z, z) == [5, 6, 7, 8] and at("contrast", z, -z) == [1, 2, 3, 4]
    asked = Opinions()
    select(asked, x, positions="entropy", rate=0.5, **ask)
    looked = torch.stack([at_BL for at_BL, cond in asked.asked if not cond]).sum(0)
    assert len(asked.asked) == 8 and (looked == 4 * eligible).all()  # without a latent, every place equally often
