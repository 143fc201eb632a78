"""DiMamba: the scan against the plain loop, the mixer against transformers' Mamba, the references' names, padding."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from palimpsest.models.dimamba import DiMamba
from palimpsest.models.dit import DiT
from palimpsest.models.mamba import BiMamba, Mamba
from palimpsest.models.selective_scan import kernel_available, kernel_scan, selective_scan, torch_scan
from palimpsest.training.optimizers import muon

VOCAB = 7


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere, also where training starts from zero; float64."""
    torch.manual_seed(0)
    net = net.double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return net


def random_dimamba(**kwargs) -> DiMamba:
    return randomised(DiMamba(VOCAB, hidden_size=16, cond_dim=8, n_blocks=2, dropout=0.0, **kwargs))


def scan_inputs(length: int, batch: int = 2, width: int = 3, state: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(length)
    u, delta = torch.randn(2, batch, length, width, dtype=torch.float64)
    b, c = torch.randn(2, batch, length, state, dtype=torch.float64)
    A = -torch.rand(width, state, dtype=torch.float64) * 3
    return [x.requires_grad_() for x in (u, F.softplus(delta).detach(), A, b, c)]


def plain_scan(u, delta, A, b, c):
    h, ys = torch.zeros(len(u), *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        h = (delta[:, t, :, None] * A).exp() * h + (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
        ys.append((h * c[:, t, None]).sum(-1))
    return torch.stack(ys, dim=1)


# ------------------------------------------------------------------------------------ the scan


@pytest.mark.parametrize("length", [1, 2, 3, 9, 10, 37])
def test_the_scan_is_the_recurrence_with_its_gradients(length):
    inputs, weight = scan_inputs(length), torch.randn(2, length, 3, dtype=torch.float64)
    ours, wanted = selective_scan(*inputs), plain_scan(*inputs)
    torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, wanted)]
    for got, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-10, atol=1e-10)


def test_the_scans_backward_pass_is_its_derivative():
    assert torch.autograd.gradcheck(selective_scan, scan_inputs(5, batch=2, width=2, state=3))


def test_half_precision_comes_back_as_it_went_in_and_is_summed_in_float32():
    u, delta, A, b, c = (x.detach().float() for x in scan_inputs(40))
    half = [x.bfloat16() for x in (u, delta, b, c)]
    D, z, bias = torch.ones(3), torch.ones_like(u), torch.zeros(3)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch_scan(half[0], half[1], A, half[2], half[3], D, z.bfloat16(), bias)
    wide = [x.float() for x in half]
    wanted = torch_scan(wide[0], wide[1], A, wide[2], wide[3], D, z, bias)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, wanted.bfloat16())


def test_a_missing_kernel_is_said_once(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    kernel_available.cache_clear()
    with pytest.warns(UserWarning, match="pip install mamba-ssm"):
        assert not kernel_available()
    assert not kernel_available()
    kernel_available.cache_clear()


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("mamba_ssm") is None,
    reason="needs a CUDA device and the package mamba_ssm",
)
def test_the_kernel_of_mamba_ssm_gives_the_same_numbers_and_gradients():
    inputs = [x.detach().float().cuda().requires_grad_() for x in scan_inputs(50, width=32, state=16)]
    u, delta, A, b, c = inputs
    extra = [torch.randn(shape, device="cuda", requires_grad=True) for shape in ((32,), u.shape, (32,))]
    results = []
    for scan in (kernel_scan, torch_scan):
        out = scan(u, delta, A, b, c, *extra)
        results.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *extra])])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------ the mixers


def test_the_mixer_is_the_mamba_of_transformers_with_its_gradients():
    config = MambaConfig(vocab_size=5, hidden_size=24, state_size=16, conv_kernel=4, expand=2, num_hidden_layers=1)
    theirs, ours = MambaMixer(config, layer_idx=0), Mamba(24)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter) if name != "A_log" else 0.1 * torch.rand_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 21, 24)
    results = []
    for mixer in (ours, theirs):
        mixer.zero_grad()
        given = x.clone().requires_grad_()
        out = mixer(given)
        out.square().sum().backward()
        results.append({"out": out, "x": given.grad} | {name: p.grad for name, p in mixer.named_parameters()})
    assert results[0].keys() == results[1].keys()
    for name, wanted in results[1].items():
        scale = float(wanted.detach().abs().max())
        torch.testing.assert_close(results[0][name], wanted, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_both_directions_share_projections_and_add_up():
    mixer, x = randomised(BiMamba(16)), torch.randn(2, 11, 16, dtype=torch.float64)
    wanted = mixer.mamba_fwd(x) + mixer.mamba_rev(x.flip(1)).flip(1)
    torch.testing.assert_close(mixer(x), wanted, rtol=1e-10, atol=1e-10)
    forth, back = mixer.mamba_fwd, mixer.mamba_rev
    assert forth.in_proj is back.in_proj and forth.out_proj is back.out_proj
    for name in ("A_log", "D", "conv1d", "x_proj", "dt_proj"):
        assert getattr(forth, name) is not getattr(back, name)


def test_the_mixer_starts_as_mamba_does():
    mixer = Mamba(64)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    step = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.999 < step.min() < 3e-3 and 3e-2 < step.max() < 1e-1 * 1.001
    assert mixer.dt_rank == 4 and mixer.dt_proj.weight.abs().max() <= 0.5


# ------------------------------------------------------------------------------------ the network


def test_parameter_names_and_shapes_of_the_reference():
    """Written from the reference's source: tiny-dimamba's sizes, with fewer blocks."""
    with torch.device("meta"):
        net = DiMamba(50258, hidden_size=512, cond_dim=128, n_blocks=2)
    mixer = {
        "A_log": (1024, 16), "D": (1024,), "in_proj.weight": (2048, 512), "conv1d.weight": (1024, 1, 4),
        "conv1d.bias": (1024,), "x_proj.weight": (64, 1024), "dt_proj.weight": (1024, 32), "dt_proj.bias": (1024,),
        "out_proj.weight": (512, 1024),
    }  # fmt: skip
    trunk = {"embeddings.word_embeddings.weight": (50258, 512)}
    for block in range(2):
        for direction in ("mamba_fwd", "mamba_rev"):
            trunk |= {f"layers.{block}.mixer.{direction}.{name}": shape for name, shape in mixer.items()}
        trunk |= {
            f"layers.{block}.norm.weight": (512,), f"layers.{block}.adaLN_modulation.weight": (1536, 128),
            f"layers.{block}.adaLN_modulation.bias": (1536,),
        }  # fmt: skip
    trunk |= {
        "adaLN_modulation_final.weight": (1024, 128), "adaLN_modulation_final.bias": (1024,), "norm_f.weight": (512,),
    }  # fmt: skip
    wanted = {
        "sigma_map.mlp.0.weight": (128, 256), "sigma_map.mlp.0.bias": (128,),
        "sigma_map.mlp.2.weight": (128, 128), "sigma_map.mlp.2.bias": (128,),
    }  # fmt: skip
    wanted |= {f"model.bimamba.backbone.{name}": shape for name, shape in trunk.items()}
    wanted["model.lm_head.weight"] = (50258, 512)
    ours = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert list(ours.items()) == list(wanted.items()), "names and shapes, in order"
    tied = ("mamba_rev.in_proj.weight", "mamba_rev.out_proj.weight")
    trained = [name for name in wanted if not name.endswith(tied)]
    assert [name for name, _ in net.named_parameters()] == trained, "the order of the EMA: tied weights once"


def test_a_fresh_network_starts_as_the_reference_does():
    torch.manual_seed(0)
    net = DiMamba(1000, hidden_size=64, cond_dim=8, n_blocks=4)
    trunk = net.model["bimamba"]["backbone"]
    assert trunk.embeddings["word_embeddings"].weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = 1 / math.sqrt(128) / math.sqrt(4)
    assert all(0.95 * bound < layer.mixer.mamba_rev.out_proj.weight.abs().max() <= bound for layer in trunk.layers), (
        "1 / sqrt(blocks) of torch's own bound, once although the weight is shared"
    )
    x = torch.randint(1000, (2, 5))
    hidden = net.eval().encode(x, torch.zeros(2))
    torch.testing.assert_close(hidden, trunk.norm_f(trunk.embeddings["word_embeddings"](x)))


def test_forward_is_encode_then_head():
    net, x, sigma = random_dimamba(), torch.randint(VOCAB, (2, 6)), torch.rand(2).double()
    torch.testing.assert_close(net(x, sigma), net.head(net.encode(x, sigma)))
    assert net.vocab_size == VOCAB and not net.causal


def test_every_position_sees_every_other():
    net, x, sigma = random_dimamba(), torch.randint(VOCAB, (1, 6)), torch.zeros(1).double()
    for position in range(6):
        changed = x.clone()
        changed[0, position] = (x[0, position] + 1) % VOCAB
        assert ((net(x, sigma) - net(changed, sigma)).abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pads", [1, 3, 30])
def test_padding_changes_nothing_in_either_direction(pads, left):
    net, x, sigma = random_dimamba(), torch.randint(VOCAB, (2, 6)), torch.zeros(2).double()
    padding = torch.randint(VOCAB, (2, pads))
    padded = torch.cat([padding, x] if left else [x, padding], dim=1)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    text = slice(pads, None) if left else slice(0, 6)
    mask[:, text] = True
    torch.testing.assert_close(net(padded, sigma, mask)[:, text], net(x, sigma), rtol=0, atol=1e-10)


def test_rows_of_different_lengths_share_a_batch():
    net, sigma = random_dimamba(), torch.zeros(1).double()
    rows = [torch.randint(VOCAB, (1, length)) for length in (3, 8, 5)]
    batch = torch.cat([F.pad(row, (0, 8 - row.shape[1])) for row in rows])
    mask = torch.stack([torch.arange(8) < row.shape[1] for row in rows])
    together = net(batch, sigma.expand(3), mask)
    for row, got in zip(rows, together, strict=True):
        torch.testing.assert_close(got[: row.shape[1]], net(row, sigma)[0], rtol=0, atol=1e-10)


def test_the_reference_behaviour_reads_padding():
    net, x, sigma = random_dimamba(mask_padding=False), torch.randint(VOCAB, (2, 6)), torch.zeros(2).double()
    padded, mask = F.pad(x, (0, 3)), torch.arange(9).expand(2, 9) < 6
    assert not torch.allclose(net(padded, sigma, mask)[:, :6], net(x, sigma))


def test_without_time_conditioning_sigma_is_not_seen():
    x = torch.randint(VOCAB, (2, 6))
    for conditioning in (False, True):
        net = random_dimamba(time_conditioning=conditioning)
        same = torch.allclose(net(x, torch.zeros(2)), net(x, torch.ones(2)))
        assert same is not conditioning


def test_muon_takes_the_matrices_of_the_blocks():
    settings = {"lr": 1e-3, "matrix_lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    for net, per_block in [
        (DiT(5, hidden_size=8, cond_dim=4, n_blocks=3, n_heads=2), 4),  # qkv, out, two of the MLP
        (DiMamba(5, hidden_size=8, cond_dim=4, n_blocks=3), 6),  # in and out once, x and dt per direction
    ]:
        matrices, rest = muon(net, **settings).param_groups
        assert len(matrices["params"]) == 3 * per_block and all(p.ndim == 2 for p in matrices["params"])
        assert len(matrices["params"]) + len(rest["params"]) == len(list(net.parameters()))
