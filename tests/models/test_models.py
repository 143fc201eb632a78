"""The DiT and its average: reference names and shapes, padding, split forward, EMA arithmetic."""

from __future__ import annotations

import csv
import itertools

import pytest
import torch

from palimpsest.common.positions import Positions
from palimpsest.models.ar import AR
from palimpsest.models.attention import apply_rotary, attend, rotary_angles
from palimpsest.models.dit import DiT
from palimpsest.models.ema import EMA
from palimpsest.objectives.ar import AR as AutoRegressive
from palimpsest.process import Absorbing


def test_parameter_names_and_shapes_of_the_reference_small_model(fixtures_dir):
    with torch.device("meta"):
        net = DiT(50258, hidden_size=768, cond_dim=128, n_blocks=12, n_heads=12)
    rows = list(csv.DictReader((fixtures_dir / "keys" / "mdlm_small_dit.tsv").open(), delimiter="\t"))
    assert rows
    ours = {f"backbone.{name}": "x".join(map(str, tensor.shape)) for name, tensor in net.state_dict().items()}
    assert [row[next(iter(row))] for row in rows] == list(ours), "names, in order"
    assert sum(p.numel() for p in net.parameters()) == 169_627_218


def test_forward_is_encode_then_head(random_dit):
    net, x, sigma = random_dit(), torch.randint(5, (2, 6)), torch.rand(2).double()
    torch.testing.assert_close(net(x, sigma), net.head(net.encode(x, sigma)))


def test_padding_changes_nothing_unless_the_reference_behaviour_is_asked_for(random_dit):
    x, sigma = torch.randint(5, (2, 6)), torch.zeros(2).double()
    padded = torch.cat([x, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.arange(9).expand(2, 9) < 6
    net = random_dit()
    torch.testing.assert_close(net(padded, sigma, mask)[:, :6], net(x, sigma))
    net = random_dit(mask_padding=False)
    assert not torch.allclose(net(padded, sigma, mask)[:, :6], net(x, sigma))


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 2, 2]])


@pytest.mark.parametrize("everywhere", [True, False])
def test_documents_are_read_as_if_alone(random_dit, everywhere):
    net, x, sigma = random_dit(), torch.randint(5, (2, 8)), torch.rand(2).double()
    at = None if everywhere else Positions(torch.rand(2, 8) < 0.5)
    wanted = torch.zeros(2, 8, 16).double()
    for row in range(2):
        for number in range(3):
            own = DOCUMENTS[row] == number
            wanted[row, own] = net.encode(x[row : row + 1, own], sigma[row : row + 1])[0]
    found = net.encode(x, sigma, at=at, document=DOCUMENTS)
    torch.testing.assert_close(found, wanted if at is None else at.take(wanted))
    padding = torch.ones(2, 8, dtype=torch.bool)
    padding[:, -1] = False
    padded = net.encode(x, sigma, padding, document=torch.zeros_like(DOCUMENTS))
    torch.testing.assert_close(padded, net.encode(x, sigma, padding))


def test_a_causal_likelihood_of_documents_in_a_row_is_that_of_each_alone():
    """The end of a document is the beginning of the next one: all that the next one reads of it."""
    torch.manual_seed(0)
    net = AR(6, hidden_size=16, n_blocks=2, n_heads=2, dropout=0.0).double().eval()
    torch.nn.init.normal_(net.head.weight)
    objective, end = AutoRegressive(Absorbing(5)), 0
    texts = [[1, 2, 3, end], [4, 4, end], [2, 1, 1, 3, end]]
    row = torch.tensor([[end, *itertools.chain.from_iterable(texts)]])
    ends = row == end
    together = objective.loss(net, {"input_ids": row, "document": ends.cumsum(1) - ends.long()})
    alone = [objective.loss(net, {"input_ids": torch.tensor([[end, *text]])}).nll_BL.sum() for text in texts]
    torch.testing.assert_close(together.nll_BL.sum(), sum(alone))
    joined = objective.loss(net, {"input_ids": row}).nll_BL
    assert not torch.allclose(joined, together.nll_BL), "without documents each token reads all before it"


def test_without_time_conditioning_sigma_is_not_seen(random_dit):
    x = torch.randint(5, (2, 6))
    for conditioning in (False, True):
        net = random_dit(time_conditioning=conditioning)
        same = torch.allclose(net(x, torch.zeros(2)), net(x, torch.ones(2)))
        assert same is not conditioning


def test_rotary_scores_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    tables = rotary_angles(1.0 / 100 ** (torch.arange(0, 8, 2).double() / 8), 12)
    rotated_q, rotated_k = (apply_rotary(v.expand(1, 12, 1, 8), *tables)[0, :, 0] for v in (q, k))
    scores = rotated_q @ rotated_k.T
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_attention_is_softmax_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 2, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / 2
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(attend(q, k, v, mask, "sdpa"), torch.einsum("bhlm,bmhd->blhd", weights, v))


def test_impossible_settings_are_refused(random_dit):
    with pytest.raises(ValueError, match=r"model.hidden_size=18.*model.n_heads"):
        DiT(5, hidden_size=18, cond_dim=8, n_blocks=1, n_heads=4)


def test_ema_follows_the_reference_rule():
    """Shadows of the constant sequence 1, 2, 3 as the reference computes them (decay .9999)."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema = EMA([parameter], decay=0.9999)
    for value, wanted in [(1.0, 0.8181818), (2.0, 1.7045455), (3.0, 2.6013987)]:
        parameter.data.fill_(value)
        ema.update([parameter])
        assert ema.shadow_params[0].item() == pytest.approx(wanted, rel=1e-6)


def test_ema_swaps_in_and_out_even_when_the_body_fails():
    parameter = torch.nn.Parameter(torch.zeros(2))
    ema = EMA([parameter], decay=0.5)
    parameter.data.fill_(4.0)
    with pytest.raises(RuntimeError), ema.swapped([parameter]):
        assert (parameter == 0).all()
        raise RuntimeError
    assert (parameter == 4).all()


def test_ema_of_another_model_is_refused_whole():
    ema = EMA([torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(3))], decay=0.5)
    other = EMA([torch.nn.Parameter(torch.ones(2))], decay=0.5)
    with pytest.raises(ValueError, match="do not fit"):
        ema.load_state_dict(other.state_dict())
    assert (ema.shadow_params[0] == 0).all()


@pytest.mark.parametrize("padded", [False, True])
def test_encoding_some_positions_is_encoding_all_and_choosing(random_dit, padded):
    net = random_dit(7, time_conditioning=True)
    x, sigma = torch.randint(7, (5, 9)), torch.rand(5).double()
    at = torch.rand(5, 9) < 0.4
    at[0], at[1] = False, True
    mask = torch.arange(9) < torch.tensor([9, 9, 7, 6, 8])[:, None] if padded else None
    chosen = net.encode(x, sigma, mask, at=Positions(at))
    torch.testing.assert_close(chosen, net.encode(x, sigma, mask)[at], rtol=1e-9, atol=1e-9)
    none = net.encode(x, sigma, mask, at=Positions(torch.zeros_like(at)))
    assert none.shape == (0, 16)
