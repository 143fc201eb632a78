"""The MMDiT: its text stream is a DiT, its latents have no position, and both streams attend to each other."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from palimpsest.common.positions import Positions
from palimpsest.models.dit import DiT
from palimpsest.models.layers import modulate
from palimpsest.models.mmdit import MMDiT
from palimpsest.models.mmdit_layers import HeadNorm
from palimpsest.settings.command_line import compose_config
from tests.helpers.joint import LENGTH, MASK, SHAPE, VOCAB, batch, network

B = 4
ROWS = batch(B)
X, PADDED, LATENT = ROWS["input_ids"], ROWS["attention_mask"], ROWS["latent"]
SIGMA, HALF = torch.linspace(0.2, 2.0, B), torch.full((B,), 0.5, dtype=torch.float64)


@torch.no_grad()
def both(net: MMDiT, tokens=X, sigma=SIGMA, mask=PADDED, latent=LATENT, latent_t=HALF, **more):
    return net.encode_both(tokens, sigma, mask, latent=latent, latent_t=latent_t, **more)


def test_queries_and_keys_are_normed_in_both_streams_and_every_block():
    net = network()
    named = dict(net.named_parameters())
    for block, stream, which in itertools.product(range(2), ("", "latent."), "qk"):
        assert named[f"blocks.{block}.{stream}{which}_norm.weight"].shape == (16,)
    before = both(net)
    with torch.no_grad():
        for block in net.blocks:
            for qkv in (block.attn_qkv, block.latent.attn_qkv):
                qkv.weight[:16] *= 7  # queries
                qkv.weight[16:32] *= 5  # keys
    for ours, theirs in zip(both(net), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_head_is_normed_by_itself_with_gains_of_its_own():
    norm, x = HeadNorm(2, 3), torch.randn(4, 2, 3)
    torch.nn.init.normal_(norm.weight)
    wanted = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.view(2, 3)
    torch.testing.assert_close(norm(x), wanted)


def by_hand(net: MMDiT) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole network written out, one head and one row at a time."""
    c, e = net.conditioning(SIGMA, HALF)
    x, z = net.vocab_embed(X), net.latent_input(LATENT)
    angle = torch.arange(LENGTH)[:, None] * net.rotary_emb.inv_freq
    turn = torch.polar(torch.ones_like(angle), angle)
    for block in net.blocks:
        m, n = block.adaLN_modulation(c)[:, None].chunk(6, -1), block.latent.adaLN_modulation(e)[:, None].chunk(6, -1)
        text = block.attn_qkv(block.norm1(x) * (1 + m[1]) + m[0]).view(B, LENGTH, 3, 2, 8)
        latent = block.latent.attn_qkv(block.latent.norm1(z) * (1 + n[1]) + n[0]).view(B, SHAPE[0], 3, 2, 8)
        seen = torch.zeros(B, LENGTH + SHAPE[0], 2, 8)
        for row, head in itertools.product(range(B), range(2)):
            qk = []
            for which, name in enumerate(("q_norm", "k_norm")):
                gain = getattr(block, name).weight.view(2, 8)[head]
                of_text = F.rms_norm(text[row, :, which, head], (8,), eps=1e-5) * gain
                of_text = torch.complex(of_text[:, :4], of_text[:, 4:]) * turn
                gain = getattr(block.latent, name).weight.view(2, 8)[head]
                of_latent = F.rms_norm(latent[row, :, which, head], (8,), eps=1e-5) * gain
                qk.append(torch.cat([torch.cat([of_text.real, of_text.imag], -1), of_latent]))
            score = qk[0] @ qk[1].T / 8**0.5
            score[:, :LENGTH].masked_fill_(~PADDED[row], -torch.inf)
            seen[row, :, head] = score.softmax(-1) @ torch.cat([text[row, :, 2, head], latent[row, :, 2, head]])
        seen = seen.flatten(-2)
        x, z = x + m[2] * block.attn_out(seen[:, :LENGTH]), z + n[2] * block.latent.attn_out(seen[:, LENGTH:])
        x = x + m[5] * block.mlp(block.norm2(x) * (1 + m[4]) + m[3])
        z = z + n[5] * block.latent.mlp(block.latent.norm2(z) * (1 + n[4]) + n[3])
    return net.output_layer.normed(x, c), net.latent_output(z, e)


@torch.no_grad()
def test_the_network_is_what_it_says():
    net = network()
    for ours, theirs in zip(both(net), by_hand(net), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net.encode(X, SIGMA, PADDED, latent=LATENT, latent_t=HALF), both(net)[0])
    at = X < 3
    for found, whole in zip(both(net, at=Positions(at)), (both(net)[0][at], both(net)[1]), strict=True):
        torch.testing.assert_close(found, whole)


def test_latent_tokens_are_told_apart():
    """They are parts of one ordered vector: without a sign of which is which, most of it is lost."""
    net = network()
    hidden, message = both(net)
    turned, said_turned = both(net, latent=LATENT.flip(1))
    assert not torch.allclose(hidden, turned, atol=1e-2) and not torch.allclose(message.flip(1), said_turned, atol=1e-2)
    same, said_same = both(net, latent=LATENT[:, :1].expand_as(LATENT))
    assert (said_same[:, 0] - said_same[:, 1]).abs().max() > 0.01
    assert "latent_input.which_KE" not in dict(MMDiT(7, 16, 8, 1, 2, latent_shape=(1, 5)).named_parameters())


def test_latents_have_no_place_in_the_text_and_are_not_averaged():
    net = network()
    net.latent_input.which_KE.data.zero_()
    hidden, message = both(net)
    turned, said_turned = both(net, latent=LATENT.flip(1))
    torch.testing.assert_close(hidden, turned)
    torch.testing.assert_close(message.flip(1), said_turned)
    assert (message[:, 0] - message[:, 1]).abs().max() > 0.01
    assert not torch.allclose(hidden, both(net, latent=LATENT[:, :1].expand_as(LATENT))[0], atol=1e-3)
    moved = both(net, tokens=X.roll(1, 1), mask=torch.ones_like(PADDED))[1]
    assert not torch.allclose(moved, both(net, mask=torch.ones_like(PADDED))[1], atol=1e-3), "the text has places"


def test_padding_changes_nothing_in_either_stream():
    net = network()
    longer, mask = F.pad(X, (0, 4), value=MASK), F.pad(PADDED, (0, 4))
    hidden, message = both(net, tokens=longer, mask=mask)
    torch.testing.assert_close(hidden[:, :LENGTH][PADDED], both(net)[0][PADDED], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(message, both(net)[1], rtol=1e-4, atol=1e-4)


def test_a_latent_of_which_nothing_is_known_is_no_latent():
    net, one, zero = network(), torch.ones(B, dtype=torch.float64), torch.zeros(B, dtype=torch.float64)
    nothing = both(net, latent=None, latent_t=None)
    for other in (LATENT, torch.full_like(LATENT, torch.inf)):
        for ours, theirs in zip(both(net, latent=other, latent_t=one), nothing, strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(both(net, latent_t=None), both(net, latent_t=zero), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.allclose(both(net, latent=0 * LATENT, latent_t=zero)[0], nothing[0], atol=1e-3)


def features(net: MMDiT, sigma: torch.Tensor, latent_t: torch.Tensor) -> list[torch.Tensor]:
    """The features of the times in the two time embedders, before their first layer."""
    seen = []
    embedders = (net.times.of_text, net.times.of_latent)
    hooks = [one.mlp[0].register_forward_pre_hook(lambda _, x: seen.append(x[0])) for one in embedders]
    net.conditioning(sigma, latent_t)
    for hook in hooks:
        hook.remove()
    return seen


def test_times_are_told_apart():
    """Sinusoids of a raw t all look alike: the cosine of t = 0.1 and 0.5 is then 0.995."""
    t = torch.tensor([0.1, 0.5], dtype=torch.float64)
    for found in features(network(), -torch.log1p(-t).float(), t):
        assert F.cosine_similarity(found[0], found[1], dim=0) < 0.5
    near = torch.tensor([0.998, 0.9985], dtype=torch.float64)  # one number in bfloat16
    of_latent = features(network(), torch.ones(2), near)[1]
    assert (of_latent[0] - of_latent[1]).abs().max() > 0.1 and of_latent.dtype == torch.float32


@torch.no_grad()
def test_each_time_has_a_way_of_its_own_into_both_streams():
    net = network()
    for one, other in itertools.combinations(
        [net.conditioning(SIGMA, HALF), net.conditioning(2 * SIGMA, HALF), net.conditioning(SIGMA, HALF / 2)], 2
    ):
        assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(one, other, strict=True))
    blind = network(time_conditioning=False)
    for a, b in zip(blind.conditioning(SIGMA, HALF), blind.conditioning(9 * SIGMA, HALF), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(blind.conditioning(SIGMA, HALF)[0], blind.conditioning(SIGMA, HALF / 2)[0], atol=1e-3)


@torch.no_grad()
def test_the_norm_of_a_noised_latent_is_not_erased():
    entrance = network().latent_input
    assert not torch.allclose(entrance(3 * LATENT), entrance(LATENT), atol=0.1)


@torch.no_grad()
def test_a_new_network_begins_with_blocks_that_change_nothing_and_latents_that_say_nothing():
    net = MMDiT(VOCAB, 16, 8, 2, 2, latent_shape=SHAPE, dropout=0.0)
    hidden, message = both(net)
    c, _ = net.conditioning(SIGMA, HALF)
    assert torch.equal(hidden, net.output_layer.normed(net.vocab_embed(X), c)) and not message.any()
    for layer in (block.adaLN_modulation for block in net.blocks):
        assert torch.equal(modulate(hidden, *layer(c).chunk(6, -1)[:2]), hidden)


def a_dit(**settings: object) -> DiT:
    torch.manual_seed(1)
    net = DiT(VOCAB, 16, 8, 2, 2, dropout=0.0, **settings)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


@pytest.mark.parametrize("settings", [{}, {"time_conditioning": True, "num_classes": 2}], ids=["", "time, classes"])
@torch.no_grad()
def test_the_text_stream_begins_as_a_text_only_network_bit_by_bit(settings):
    dit = a_dit(**settings)
    torch.manual_seed(0)
    net = MMDiT(
        VOCAB,
        16,
        8,
        2,
        2,
        latent_shape=SHAPE,
        latent_size=12,
        dropout=0.0,
        text_as_dit=True,
        **{"time_conditioning": False, **settings},
    ).eval()
    ours, theirs = dict(net.text_stream.named_parameters()), dict(dit.named_parameters())
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    assert all(net.get_parameter(name) is p for name, p in ours.items())
    net.part_of(dit.state_dict()).load_state_dict(dit.state_dict())
    cond = {"class_id": torch.tensor([0, 1, -1, 0])} if settings else {}
    for at in (None, Positions(X < 3)):
        wanted = dit.encode(X, SIGMA, PADDED, at, **cond)
        for latent, time in ((LATENT, HALF), (LATENT, None), (None, None)):
            assert torch.equal(net.encode(X, SIGMA, PADDED, at=at, latent=latent, latent_t=time, **cond), wanted)
    for block in net.blocks:
        torch.nn.init.ones_(block.adaLN_gate.bias)
    assert not torch.allclose(net.encode(X, SIGMA, PADDED, latent=LATENT, **cond), dit.encode(X, SIGMA, PADDED, **cond))
    assert net.part_of(net.state_dict()) is net


def test_a_text_only_network_can_not_start_a_stream_that_norms():
    with pytest.raises(ValueError, match="add backbone.text_as_dit=true"):
        network().part_of(a_dit().state_dict())


@pytest.mark.parametrize(("settings", "message"), [
    ({"latent_shape": None}, "choose latents= and add algo=mmldlm"), ({"latent_shape": (0, 5)}, "K >= 1"),
    ({"n_heads": 5}, "model.n_heads"),
])  # fmt: skip
def test_impossible_networks_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(
            VOCAB, **{"hidden_size": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2, "latent_shape": SHAPE, **settings}
        )
    with pytest.raises(ValueError, match=r"latents of shape \(3, 5\)"):
        network().encode(X, SIGMA, latent=torch.zeros(B, 3, 5))


@pytest.mark.parametrize(("size", "millions"), [("toy", 2.4), ("stable", 9.5), ("tiny", 57), ("small", 184),
                                                ("base", 643)])  # fmt: skip
def test_sizes_are_those_of_the_specification(size, millions):
    model = compose_config(["backbone=mmdit", f"model=mmdit-{size}"]).model
    sizes = {name: model[name] for name in ("hidden_size", "latent_size", "cond_dim", "n_heads")}
    with torch.device("meta"):
        (block,) = MMDiT(VOCAB, n_blocks=1, latent_shape=(1, 32), **sizes).blocks
    assert model.n_blocks * sum(p.numel() for p in block.parameters()) == pytest.approx(millions * 1e6, rel=0.02)


def test_latents_stay_in_float32_under_autocast():
    net = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, message = both(net)
    assert message.dtype == torch.float32
    torch.testing.assert_close(message, both(net)[1], rtol=0.1, atol=0.1)
