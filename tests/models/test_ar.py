"""The AR transformer: reference names and numbers, causality, and a cache that changes nothing."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from palimpsest.common.randomness import KeyedNoise
from palimpsest.models.ar import AR
from palimpsest.models.attention import attend
from palimpsest.models.checkpoints import read_checkpoint
from palimpsest.models.dit import DiT
from palimpsest.objectives import ar
from palimpsest.process import Absorbing
from palimpsest.samplers.autoregressive import sample
from tests.helpers.networks import close


def random_ar(vocab_size: int = 7, **kwargs) -> AR:
    """A small AR with random weights everywhere, float64."""
    torch.manual_seed(0)
    net = AR(vocab_size, hidden_size=16, n_blocks=3, n_heads=2, dropout=0.0, **kwargs).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return net.eval()


def test_parameter_names_and_shapes_of_the_reference_small_model(fixtures_dir):
    with torch.device("meta"):
        net = AR(50258, hidden_size=768, n_blocks=12, n_heads=12)
    rows = list(csv.DictReader((fixtures_dir / "keys" / "mdlm_small_ar.tsv").open(), delimiter="\t"))
    assert rows
    ours = {f"backbone.{name}": "x".join(map(str, tensor.shape)) for name, tensor in net.state_dict().items()}
    assert [(row["key"], row["shape"]) for row in rows] == list(ours.items()), "names and shapes, in order"
    trainable = [row["key"] for row in rows if row["kind"] == "param"]
    assert [f"backbone.{name}" for name, _ in net.named_parameters()] == trainable, "the order of the EMA"
    assert sum(p.numel() for p in net.parameters()) == 162_246_482


def test_a_position_sees_no_later_token():
    net, x = random_ar(), torch.randint(7, (2, 9))
    changed = x.clone()
    changed[:, 4] = (x[:, 4] + 1) % 7
    differs_L = (net(x) - net(changed)).abs().amax((0, 2)) > 1e-6
    assert differs_L.tolist() == [False] * 4 + [True] * 5


def test_padding_on_the_right_and_sigma_change_nothing():
    net, x = random_ar(), torch.randint(7, (2, 6))
    padded = torch.cat([x, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = torch.arange(9).expand(2, 9) < 6
    torch.testing.assert_close(net(padded, torch.ones(2), mask)[:, :6], net(x), rtol=0, atol=1e-10)


def test_forward_is_encode_then_head():
    net, x = random_ar(), torch.randint(7, (2, 6))
    torch.testing.assert_close(net(x), net.head(net.encode(x)))
    assert net.vocab_size == 7 and net.causal and not DiT.causal


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 4, 2], [12], [1, 11]], ids=str)
@torch.no_grad()
def test_cached_in_any_chunks_equals_one_full_pass(chunks):
    net, x = random_ar(), torch.randint(7, (3, 12))
    cache, parts, start = net.new_cache(3, 12), [], 0
    for size in chunks:
        assert cache.length == start
        parts.append(net.encode(x[:, start : start + size], cache=cache))
        start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), net.encode(x), rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_cache_may_be_longer_than_the_text_and_its_unused_part_is_never_read():
    net, x = random_ar(), torch.randint(7, (2, 5))
    cache = net.new_cache(2, 50)
    cache.keys_NBLHD.fill_(torch.nan)
    cache.values_NBLHD.fill_(torch.nan)
    parts = [net.encode(x[:, :3], cache=cache), net.encode(x[:, 3:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), net.encode(x), rtol=0, atol=1e-10)


@torch.no_grad()
def test_tokens_beyond_the_cache_are_refused_and_change_nothing():
    net, x = random_ar(), torch.randint(7, (2, 6))
    cache = net.new_cache(2, 5)
    net.encode(x[:, :4], cache=cache)
    with pytest.raises(ValueError, match="room for 5 positions, 4 are filled, 2 more came"):
        net.encode(x[:, 4:], cache=cache)
    with pytest.raises(ValueError, match="batches of 2 rows, this one has 1"):
        net.encode(x[:1, 4:5], cache=cache)
    assert cache.length == 4
    torch.testing.assert_close(net.encode(x[:, 4:5], cache=cache), net.encode(x[:, :5])[:, 4:], rtol=0, atol=1e-10)


def test_the_sampler_writes_the_same_text_with_and_without_the_cache():
    model = ar.AR(Absorbing(6)).model(random_ar())
    x = torch.full((5, 20), 6)
    x[:, :2] = torch.tensor([0, 3])
    texts = [sample(model, x, KeyedNoise(0, torch.arange(5)), kv_cache=cached).ids_BL for cached in (True, False)]
    assert torch.equal(*texts) and (texts[0] < 6).all() and torch.equal(texts[0][:, :2], x[:, :2])


@torch.no_grad()
def test_under_autocast_the_cache_has_attentions_precision():
    net, x = random_ar().float(), torch.randint(7, (2, 6))
    with torch.autocast("cpu", torch.bfloat16):
        cache = net.new_cache(2, 6)
        parts = [net.encode(x[:, :4], cache=cache), net.encode(x[:, 4:], cache=cache)]
        full = net.encode(x)
    assert cache.keys_NBLHD.dtype == torch.bfloat16 and net.new_cache(2, 6).keys_NBLHD.dtype == torch.float32
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("queries", [1, 3, 6])
def test_causal_attention_aligns_the_queries_with_the_last_keys(queries, hidden):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, queries, 2, 4), *torch.randn(2, 2, 6, 2, 4)
    key_mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]]).bool() if hidden else None
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / 2
    seen = torch.arange(6) <= torch.arange(6 - queries, 6)[:, None]
    if hidden:
        seen = seen & key_mask[:, None, None]
    wanted = torch.einsum("bhlm,bmhd->blhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(attend(q, k, v, key_mask, "sdpa", causal=True), wanted)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match=r"model.hidden_size=18.*model.n_heads"):
        AR(5, hidden_size=18, n_blocks=1, n_heads=4)


# ------------------------------------------------------------------------------------ the reference's numbers


def reference_ar(folder, weights: str) -> tuple[AR, dict[str, torch.Tensor], int]:
    meta = json.loads((folder / "golden.json").read_text())
    model = meta["model"]
    net = AR(meta["vocab_size"], model["hidden_size"], model["n_blocks"], model["n_heads"], model["dropout"]).eval()
    read_checkpoint(next(folder.glob("*.ckpt"))).load_into(net, use_ema=weights == "ema")
    return net, load_file(folder / "golden.safetensors"), meta["mask_index"]


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("variant", ["mdlm_ar", "bd3lms_ar"])
def test_golden_numbers(fixtures_dir, variant, weights):
    net, golden, mask_id = reference_ar(fixtures_dir / variant, weights)
    logits = net(golden["x0"][:, :-1])
    assert close(logits, golden[f"{weights}.logits"])
    log_p = logits.index_fill(-1, torch.tensor([mask_id]), -torch.inf).log_softmax(-1)
    reference = golden[f"{weights}.logprobs"]
    possible = reference > -500  # one reference writes -1e3, the other -1e6 where we write -inf
    assert close(log_p[possible], reference[possible])
    assert (log_p[~possible] == -torch.inf).all() and (~possible).sum() == possible[..., 0].numel()


def test_golden_gradients(fixtures_dir):
    net, golden, mask_id = reference_ar(fixtures_dir / "mdlm_ar", "raw")
    logits = net(golden["x0"][:, :-1]).index_fill(-1, torch.tensor([mask_id]), -torch.inf)
    nll_BL = torch.nn.functional.cross_entropy(logits.transpose(1, 2), golden["x0"][:, 1:], reduction="none")
    weight_BL = golden["attention_mask"][:, 1:]
    ((nll_BL * weight_BL).sum() / weight_BL.sum()).backward()
    grads = load_file(fixtures_dir / "mdlm_ar" / "grads.safetensors")
    references = {k.removeprefix("grad."): v for k, v in grads.items() if k.startswith("grad.")}
    assert references.keys() == dict(net.named_parameters()).keys()
    for name, parameter in net.named_parameters():
        assert close(parameter.grad, references[name]), name
