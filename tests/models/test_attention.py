"""Attention without a mask: padding and documents as runs of positions, for kernels that take no mask."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from palimpsest.models import attention
from palimpsest.models.ar import AR
from palimpsest.models.attention import attend, seen_keys
from palimpsest.models.dit import DiT
from palimpsest.models.transformer import TransformerBlock

ROWS, LENGTH, VOCAB = 3, 8, 11
PADDING = torch.arange(LENGTH) < torch.tensor([[5], [8], [1]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0] * 8, [0, 1, 2, 3, 4, 5, 6, 7]])


class StandIn(ModuleType):
    """The functions of flash-attn that are used, by torch, and how often the one for runs was called."""

    def __init__(self) -> None:
        super().__init__("flash_attn")
        self.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
        self.packed = 0

    def flash_attn_func(self, q, k, v, causal=False):
        assert q.dtype != torch.float32, "flash-attn refuses it"
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    def flash_attn_varlen_func(self, q, k, v, starts_q, starts_k, longest_q, longest_k, causal=False):
        self.packed += 1
        assert starts_q.dtype == torch.int32 and starts_q[0] == 0 and starts_q[-1] == len(q) == len(k)
        assert torch.equal(starts_q, starts_k) and starts_q.diff().min() >= 0
        assert starts_q.diff().max() <= longest_q == longest_k
        runs = [slice(*ends) for ends in itertools.pairwise(starts_q.tolist())]
        return torch.cat([self.flash_attn_func(q[run][None], k[run][None], v[run][None], causal)[0] for run in runs])


@pytest.fixture
def kernels(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(attention, "_FLASH_DTYPES", (torch.bfloat16, torch.float64))
    return stand_in


CASES = {
    "padding": {"attention_mask": PADDING},
    "documents": {"document": DOCUMENTS},
    "both": {"attention_mask": PADDING, "document": DOCUMENTS},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("network", [DiT, AR])
def test_a_network_is_the_same_with_runs_as_with_a_mask(kernels, network, case):
    """Hidden states and gradients agree, and every block calls the kernel."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "n_blocks": 3, "n_heads": 2, "dropout": 0.0}
    net = network(VOCAB, **sizes, **({"cond_dim": 4} if network is DiT else {}), attn_backend="flash_attn").double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch, real_BL = CASES[case], CASES[case].get("attention_mask", torch.ones(ROWS, LENGTH, dtype=torch.bool))
    x_BL = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    weights = torch.randn(ROWS, LENGTH, 16, dtype=torch.float64) * real_BL[..., None]

    def found(backend: str) -> list[torch.Tensor]:
        for block in net.modules():
            if isinstance(block, TransformerBlock):
                block.attn_backend = backend
        hidden = net.encode(x_BL, torch.zeros(ROWS, dtype=torch.float64), **batch)
        return [
            hidden[real_BL],
            *torch.autograd.grad((hidden * weights).sum(), list(net.parameters()), allow_unused=True),
        ]

    for ours, masked in zip(found("flash_attn"), found("sdpa"), strict=True):
        assert (ours is None) == (masked is None)
        if ours is not None:
            torch.testing.assert_close(ours, masked)
    runs = "document" in batch or network is DiT  # a causal network never looks at padding
    assert kernels.packed == (3 if runs else 0)


def test_in_float32_as_in_sampling_sdpa_takes_the_place_of_flash_attn(kernels):
    net = DiT(VOCAB, 16, 4, 2, 2, dropout=0.0, attn_backend="flash_attn")
    x_BL, noise_B = torch.randint(VOCAB, (ROWS, LENGTH)), torch.zeros(ROWS)
    assert net.encode(x_BL, noise_B).dtype == torch.float32  # with flash-attn the stand-in would refuse it
    with torch.autocast("cpu", torch.bfloat16):
        net.encode(x_BL, noise_B, attention_mask=PADDING)
    assert kernels.packed == 2


def test_where_runs_start():
    """With padding there are two in each row, whatever the lengths, so that shapes stay; one of them may be empty."""
    assert seen_keys(PADDING, None, "flash_attn").starts.tolist() == [0, 5, 8, 16, 16, 17, 24]
    assert seen_keys(None, DOCUMENTS, "flash_attn").starts.tolist() == [0, 3, 5, 8, *range(16, 25)]
    assert seen_keys(PADDING, None, "sdpa").starts is None and seen_keys(None, None, "flash_attn") is None


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is None,
    reason="needs an NVIDIA GPU and flash-attn",
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_agrees_with_the_mask(case, causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(ROWS, LENGTH, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    batch = {name: x.cuda() for name, x in CASES[case].items()}
    seen = seen_keys(batch.get("attention_mask"), batch.get("document"), "flash_attn")
    by_mask = attend(q, k, v, seen.mask, "sdpa", causal)
    by_runs = attend(q, k, v, seen.mask, "flash_attn", causal, seen.starts)
    real_BL = batch.get("attention_mask", torch.ones(ROWS, LENGTH, dtype=torch.bool, device="cuda"))
    torch.testing.assert_close(by_runs[real_BL], by_mask[real_BL], atol=2e-2, rtol=2e-2)
