"""Small networks, those of the references' golden numbers, and the comparison of trained weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config

from palimpsest.classification.models import ClassModel
from palimpsest.experiment.experiment import Experiment
from palimpsest.models.ar import AR
from palimpsest.models.checkpoints import load_inert
from palimpsest.models.dimamba import DiMamba
from palimpsest.models.dit import DiT
from palimpsest.models.hf_causal import HFCausal

EVEN = np.log([0.5, 0.5])  # log-prior of two classes


def networks() -> dict[str, torch.nn.Module]:
    """One untrained network of each kind that is trained on tokens alone, by its name."""
    sizes = {"hidden_size": 16, "n_blocks": 3, "dropout": 0.3}
    config = GPT2Config(vocab_size=11, n_embd=16, n_layer=3, n_head=2, n_positions=16)
    return {
        "dit": DiT(11, cond_dim=8, n_heads=2, num_classes=2, **sizes), "ar": AR(11, n_heads=2, **sizes),
        "dimamba": DiMamba(11, cond_dim=8, **sizes), "hf_causal": HFCausal(config, 11, dropout=0.3),
    }  # fmt: skip


def reference_dit(meta: dict) -> DiT:
    """The network that a golden.json describes."""
    model = meta["model"]
    return DiT(
        meta["vocab_size"],
        model["hidden_size"],
        model["cond_dim"],
        model["n_blocks"],
        model["n_heads"],
        model["dropout"],
        time_conditioning=meta["time_conditioning"],
        mask_padding=False,
    ).eval()


def close(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    """Return True if numbers agree with the reference's to four digits."""
    return bool(((ours - reference).abs() <= 1e-4 * (1 + reference.abs())).all())


def same_weights(a: Path, b: Path) -> bool:
    """Weights, their average, and the optimizer's moments, bit for bit."""
    a, b = load_inert(a), load_inert(b)
    if a["global_step"] != b["global_step"] or a["ema"]["num_updates"] != b["ema"]["num_updates"]:
        return False
    tensors = [[*c["state_dict"].values(), *c["ema"]["shadow_params"], *moments(c)] for c in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


def moments(checkpoint: dict) -> list[torch.Tensor]:
    """Every tensor in the state of the optimizers."""
    states = [state for part in checkpoint["optimizer_states"][0]["parts"] for state in part["state"].values()]
    return [value for state in states for value in state.values() if torch.is_tensor(value)]


def assert_close_weights(a: Path, b: Path, atol: float) -> None:
    """Assert that two checkpoints are of one step and hold the same weights and averages, but for rounding."""
    a, b = load_inert(a), load_inert(b)
    assert a["global_step"] == b["global_step"] and a["TextData"] == b["TextData"]
    for name, tensor in a["state_dict"].items():
        torch.testing.assert_close(tensor, b["state_dict"][name], rtol=0, atol=atol, msg=name)
    for ours, theirs in zip(a["ema"]["shadow_params"], b["ema"]["shadow_params"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def random_network(e: Experiment, seed: int) -> object:
    """An untrained model whose predictions depend on the seed."""
    diffusion = e.build.diffusion(e.build.data()).eval()
    torch.nn.init.normal_(diffusion.backbone.head.weight, generator=torch.Generator().manual_seed(seed))
    return diffusion


def two_models(e: Experiment) -> list[ClassModel]:
    """Two classes, each with an untrained model of its own."""
    return [ClassModel(random_network(e, seed)) for seed in (0, 1)]
