"""Texts with latents made by hand, for networks and objectives of both."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

from palimpsest.common.randomness import KeyedNoise, training_noise
from palimpsest.data.collate import Collate
from palimpsest.dataloader import TextData
from palimpsest.models.mmdit import MMDiT
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.gaussian import GaussianDiffusion
from palimpsest.objectives.joint import JointDiffusion
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing

VOCAB, MASK, LENGTH = 7, 6, 9
SHAPE = (2, 5)


def network(seed: int = 0, scale: float = 0.3, **settings: object) -> MMDiT:
    """A small network with random weights everywhere, also where training starts from zero; of several widths, so that
    no two can be taken for each other."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "cond_dim": 8, "n_blocks": 2, "n_heads": 2, "latent_size": 12, "dropout": 0.0}
    net = MMDiT(VOCAB, latent_shape=SHAPE, **{**sizes, **settings})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return net.eval()


def objective(modes: Mapping[str, float] | None = None, **settings: object) -> JointDiffusion:
    latent = settings.pop("latent", GaussianDiffusion())
    return JointDiffusion(Absorbing(MASK), partial(Subs, LogLinear()), latent, modes, latent_tokens=LENGTH, **settings)


def batch(rows: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of which every other is padded by three, with latents."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, LENGTH, dtype=torch.bool)
    mask[::2, -3:] = False
    return {"input_ids": torch.randint(MASK, (rows, LENGTH), generator=generator), "attention_mask": mask,
            "latent": torch.randn(rows, *SHAPE, generator=generator)}  # fmt: skip


class LatentText(TextData):
    """Any texts, with latents that are a function of their tokens."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        mean, std = np.zeros(SHAPE), np.ones(SHAPE)
        facts = {"fingerprint": "by hand", "mean": mean.tolist(), "std": std.tolist()}
        self.latents = SimpleNamespace(
            shape=SHAPE,
            fingerprint="by hand",
            mean=mean,
            std=std,
            facts=facts,
            metadata={},
            of=lambda split: _Nothing(),
        )

    @property
    def collate(self) -> _WithLatents:
        return _WithLatents(super().collate)


LatentText.__qualname__ = "TextData"  # by which checkpoints name it


class _Nothing:
    """Rows without latents of their own, which the batch gets from its tokens."""

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros((len(rows), *SHAPE), dtype=np.float32)


class _WithLatents:
    def __init__(self, plain: Collate) -> None:
        self.plain, self.frame_ids, self.leading = plain, plain.frame_ids, plain.leading

    def __call__(self, columns: dict) -> dict[str, torch.Tensor]:
        return with_latents(self.plain(columns))


def with_latents(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    waves = torch.arange(1, 1 + SHAPE[0] * SHAPE[1]) * 0.7
    latent_BKD = (batch["input_ids"][:, 1:4].sum(-1, keepdim=True) * waves).sin() * 2**0.5
    return {**batch, "latent": latent_BKD.float().unflatten(-1, SHAPE)}


def noise(rows: int, seed: int = 0) -> KeyedNoise:
    """The noise of the rows of a training batch."""
    return training_noise(seed, torch.arange(rows), rows)
