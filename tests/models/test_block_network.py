"""Block diffusion's network: the reference's numbers, the layout against one dense mask, caches against full passes."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from palimpsest.common.positions import Positions
from palimpsest.models import attention, block_attention
from palimpsest.models.block_attention import QKV, attend_blocks, flex_blocks, takes_flex, visible
from palimpsest.models.checkpoints import read_checkpoint
from palimpsest.models.dit import DiT

VOCAB = 7


def mask_of(length: int, size: int) -> Tensor:
    """(2L, 2L) over [noised ; clean], True where the row may see the column."""
    place = torch.arange(2 * length)
    block, noised = place % length // size, place < length
    return visible(block[:, None], block, noised[:, None], noised)


@pytest.mark.parametrize("size", [4, 8])
def test_the_mask_is_the_references(fixtures_dir, size):
    golden = load_file(fixtures_dir / f"bd3lms_bd3lm_bs{size}" / "golden.safetensors")
    assert torch.equal(mask_of(32, size), golden["raw.block_diff_mask"].bool())


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_logits_are_the_references(fixtures_dir, size, weights):
    folder = fixtures_dir / f"bd3lms_bd3lm_bs{size}"
    golden = load_file(folder / "golden.safetensors")
    checkpoint = read_checkpoint(folder / "bd3lm.ckpt")
    sizes = json.loads((folder / "golden.json").read_text())
    model = sizes["model"]
    net = DiT(sizes["vocab_size"], model["hidden_size"], model["cond_dim"], model["n_blocks"], model["n_heads"]).eval()
    checkpoint.load_into(net, use_ema=weights == "ema")
    near = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        x0, xt = golden["x0"], golden["raw.xt_used"]
        hidden = net.encode_blocks(xt, x0, size, torch.zeros(len(x0), x0.shape[1] // size))
        torch.testing.assert_close(net.head(hidden), golden[f"{weights}.logits"], **near)
        x = golden["raw.sample_x"]
        earlier, block = x[:, :-size], x[:, -size:]
        cache = net.new_block_cache(len(x), x.shape[1])
        net.remember(earlier, size, cache)
        logits = net.head(net.encode_after(block, torch.zeros(len(x)), cache))
    torch.testing.assert_close(logits, golden[f"{weights}.sample_logits_last_block_cache"], **near)
    torch.testing.assert_close(logits, golden[f"{weights}.sample_logits_nocache"][:, -size:], **near)


@pytest.mark.parametrize("size", [4, 8])
def test_hub_models_give_the_references_logits(fixtures_dir, size):
    folder = fixtures_dir / f"hf_bd3lm_bs{size}"
    golden = load_file(folder / "golden.safetensors")
    checkpoint = read_checkpoint(folder)
    assert checkpoint.settings["block_size"] == size and checkpoint.settings["parameterization"] == "bd3lm"
    net = DiT(40, 64, 32, 2, 2).eval()
    checkpoint.load_into(net)
    xt, x0 = golden["input_ids"].chunk(2, dim=1) if "input_ids" in golden else (golden["xt"], golden["x0"])
    with torch.no_grad():
        logits = net.head(net.encode_blocks(xt, x0, size, torch.zeros(len(x0), x0.shape[1] // size)))
    torch.testing.assert_close(logits, golden["logits"], rtol=1e-4, atol=1e-4)


def dense(noised: QKV, clean: QKV, size: int, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The plain form: one softmax over both streams under one dense mask."""
    length, earlier = noised.k.shape[1], clean.k.shape[1]
    seen = mask_of(length, size)[: length + earlier, : length + earlier]
    if key_mask is not None:
        seen = seen & torch.cat([key_mask, key_mask[:, :earlier]], dim=1)[:, None, None]
    q, k, v = (torch.cat([getattr(noised, x), getattr(clean, x)], dim=1).transpose(1, 2) for x in "qkv")
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
    return out[:, :length], out[:, length:]


def streams(length: int, size: int) -> tuple[QKV, QKV]:
    torch.manual_seed(0)
    earlier = (length - 1) // size * size
    noised, clean = (
        [torch.randn(2, n, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)] for n in (length, earlier)
    )
    return QKV(*noised), QKV(*clean)


@pytest.mark.parametrize("backend", ["sdpa", "flash_attn", "flex"])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("length", "size"), [(24, 1), (24, 3), (24, 12), (22, 4), (24, 24)])
def test_every_backend_is_the_dense_mask(monkeypatch, length, size, padding, backend):
    """Outputs and gradients, over several chunks; flash-attn's kernel and flex's compilation are stood in for."""
    from torch.nn.attention.flex_attention import flex_attention

    def flash_attn(q, k, v, scale=None):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)

    def attend(q, k, v, key_mask, backend, causal=False):
        mask = None if key_mask is None else key_mask[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).transpose(1, 2)

    monkeypatch.setattr(block_attention, "_CHUNK", 8)
    monkeypatch.setattr(block_attention, "_flash_kernel", flash_attn)
    monkeypatch.setattr(attention, "_FLASH_DTYPES", (torch.float64,))
    monkeypatch.setattr(block_attention, "_flex_kernel", lambda: flex_attention)
    monkeypatch.setattr(block_attention, "attend", attend)
    noised, clean = streams(length, size)
    key_mask = None
    if padding:
        key_mask = torch.ones(2, length, dtype=torch.bool)
        key_mask[1, -padding:] = False
    wanted = dense(noised, clean, size, key_mask)
    learned = [x for s in (noised, clean) for x in (s.q, s.k, s.v)]
    weights = [torch.randn_like(x) for x in wanted]
    real = torch.ones(2, length, 1, 1) if key_mask is None else key_mask[..., None, None]
    total = sum((x * w * real[:, : x.shape[1]]).sum() for x, w in zip(wanted, weights, strict=True))
    gradients = torch.autograd.grad(total, learned)
    if backend == "flex" and clean.k.shape[1]:
        with torch.no_grad():
            got = flex_blocks(length, clean.k.shape[1], size, key_mask, torch.device("cpu")).attend(noised, clean)
    else:
        got = attend_blocks(noised, clean, size, key_mask, backend)
        total = sum((x * w * real[:, : x.shape[1]]).sum() for x, w in zip(got, weights, strict=True))
        for ours, theirs in zip(torch.autograd.grad(total, learned, allow_unused=True), gradients, strict=True):
            torch.testing.assert_close(ours if ours is not None else torch.zeros_like(theirs), theirs)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours * real[:, : ours.shape[1]], theirs * real[:, : theirs.shape[1]])


def test_a_mask_of_flex_that_a_validation_makes_serves_a_training():
    """A tensor made in inference mode could not be saved for a backward pass."""
    block_attention._flex_mask.cache_clear()
    with torch.inference_mode():
        mask = block_attention._flex_mask(16, 8, 8, 4, torch.device("cpu"))
    assert not mask.kv_num_blocks.is_inference() and not mask.kv_indices.is_inference()


def test_flex_is_the_default_on_a_gpu_that_compiles_it(monkeypatch):
    monkeypatch.setattr(block_attention, "_has_triton", lambda: True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert takes_flex("auto", gpu, 32) and not takes_flex("auto", cpu, 32) and not takes_flex("auto", gpu, 8)
    assert takes_flex("flex", cpu, 8) and not takes_flex("sdpa", gpu, 32)
    monkeypatch.setattr(block_attention, "_has_triton", lambda: False)
    assert not takes_flex("auto", gpu, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("segments", [False, True])
def test_on_a_gpu_flex_trains_like_torchs_own_attention(segments):
    found = []
    for backend in ("auto", "sdpa"):
        torch.manual_seed(0)
        net = DiT(VOCAB, 64, 4, 2, 2, dropout=0.0, attn_backend=backend)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        net = net.cuda()
        x0 = torch.randint(VOCAB - 1, (3, 40))
        blocks = (torch.arange(40) // 5).expand(3, -1).cuda() if segments else 5
        hidden = net.encode_blocks(masked(x0).cuda(), x0.cuda(), blocks, torch.rand(3, 8).cuda())
        hidden.square().sum().backward()
        found.append([hidden.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_flex_does_not_train_on_a_cpu():
    with pytest.raises(ValueError, match="model.attn_backend=flex.*not train.*sdpa"):
        flex_blocks(8, 4, 4, None, torch.device("cpu")).attend(*streams(8, 4))


def masked(x0: Tensor, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.where(torch.rand(x0.shape) < 0.5, VOCAB - 1, x0)


@pytest.mark.parametrize("settings", [{}, {"time_conditioning": True}, {"num_classes": 2}, {"mask_padding": False}])
@pytest.mark.parametrize("size", [1, 4, 10])
def test_cached_blocks_are_those_of_the_full_pass(random_dit, size, settings):
    net = random_dit(VOCAB, **settings)
    x0 = torch.randint(VOCAB - 1, (3, 10))
    xt, sigma = masked(x0), torch.rand(3, -(-10 // size), dtype=torch.float64)
    cond = {"class_id": torch.tensor([0, 1, -1])} if "num_classes" in settings else {}
    full = net.encode_blocks(xt, x0, size, sigma, **cond)
    at = torch.rand(xt.shape) < 0.5
    torch.testing.assert_close(net.encode_blocks(xt, x0, size, sigma, Positions(at), **cond), full[at])
    with torch.no_grad():
        cache = net.new_block_cache(3, 10)
        for number, start in enumerate(range(0, 10, size)):
            rows = slice(start, min(start + size, 10))
            block = net.encode_after(xt[:, rows], sigma[:, number], cache, **cond)
            torch.testing.assert_close(block, full[:, rows])
            some = torch.tensor([2, 0])
            told_some = {name: value[some] for name, value in cond.items()}
            part = net.encode_after(
                xt[some, rows], sigma[some, number], cache, some, Positions(at[some, rows]), **told_some
            )
            torch.testing.assert_close(part, full[:, rows][some][at[some, rows]])
            if rows.stop < 10:
                net.remember(x0[:, rows], size, cache, **cond)
        at_once = net.new_block_cache(3, 10)
        net.remember(x0[:, : (9 // size) * size], size, at_once, **cond)
        for layer in range(2):
            none = torch.zeros(3, 0, 2, 8, dtype=torch.float64)
            for one, other in zip(at_once.append(layer, none, none), cache.append(layer, none, none), strict=True):
                torch.testing.assert_close(one, other)


def test_a_window_is_the_same_read_at_once_and_block_by_block(random_dit, monkeypatch):
    """Also over the drops of what is too old, and in the last layer, whose keys have seen windows of windows."""
    monkeypatch.setattr("palimpsest.models.kv_cache.MOST_AT_ONCE", 4)
    monkeypatch.setattr("palimpsest.models.blocks.MOST_AT_ONCE", 6)
    net, x0 = random_dit(VOCAB), torch.randint(VOCAB - 1, (2, 42))
    with torch.no_grad():
        slow, fast, whole = (
            net.new_block_cache(2, 42, window=6),
            net.new_block_cache(2, 42, 6),
            net.new_block_cache(2, 42),
        )
        for start in range(0, 40, 2):
            net.remember(x0[:, start : start + 2], 2, slow)
        net.remember(x0[:, :40], 2, fast)
        net.remember(x0[:, :40], 2, whole)
        assert slow.position == fast.position == 40 and slow.capacity == 16
        block, sigma = torch.full((2, 2), VOCAB - 1), torch.zeros(2)
        got = [net.encode_after(block, sigma, cache) for cache in (slow, fast, whole)]
    torch.testing.assert_close(got[0], got[1])
    assert (got[0] - got[2]).abs().max() > 1e-6


def test_distances_are_all_that_counts(random_dit):
    """A text behind a window's width of others is read as at the beginning: no rotation has to be redone."""
    net, x0 = random_dit(VOCAB), torch.randint(VOCAB - 1, (1, 8))
    with torch.no_grad():
        cache = net.new_block_cache(1, 100, window=0)
        here = net.encode_after(x0, torch.zeros(1), cache)
        cache.position = 64
        torch.testing.assert_close(net.encode_after(x0, torch.zeros(1), cache), here)


def test_no_block_learns_from_what_comes_later(random_dit):
    net, size, length = random_dit(VOCAB), 3, 12
    x0 = torch.randint(VOCAB - 1, (1, length))
    embedded: list[Tensor] = []
    embed = net.vocab_embed.forward

    def record(tokens: Tensor) -> Tensor:
        embedded.append(embed(tokens).detach().requires_grad_())
        return embedded[-1]

    net.vocab_embed.forward = record
    hidden = net.encode_blocks(masked(x0), x0, size, torch.zeros(1, 4))
    noised, clean = embedded
    for block in range(4):
        rows = slice(block * size, (block + 1) * size)
        of_noised, of_clean = torch.autograd.grad(hidden[:, rows].square().sum(), [noised, clean], retain_graph=True)
        assert (of_clean[:, block * size :] == 0).all() and (block == 0 or (of_clean[:, : block * size] != 0).any())
        seen = of_noised.abs().sum(-1)[0] > 0
        assert seen.nonzero().squeeze(-1).tolist() == list(range(rows.start, rows.stop))


class Looped(DiT):
    """A DiT whose blocks are passed twice."""

    @property
    def order(self):
        return [*self.blocks, *self.blocks]


def test_a_network_that_passes_its_blocks_again_does_so_in_every_pass():
    torch.manual_seed(3)
    net = Looped(9, 16, 8, 2, 2, dropout=0.0).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    x, sigma = torch.randint(9, (2, 8)), torch.zeros(2).double()
    with torch.no_grad():
        whole = net.encode(x, sigma)
        at_once = net.encode_blocks(x, x, 8, sigma[:, None])
        after = net.encode_after(x, sigma, net.new_block_cache(2, 8))
        once = DiT.encode(net, x, sigma)
    torch.testing.assert_close(at_once, whole)
    torch.testing.assert_close(after, whole)
    assert torch.equal(once, whole), "the loop is in `order`, which every pass follows"
    net.__class__ = DiT
    with torch.no_grad():
        assert not torch.allclose(net.encode(x, sigma), whole)
