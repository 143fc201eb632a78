"""Test of both directions of the joint objective on synthetic texts with known latents: a minute of one core.

A text has four attributes of three values; each contributes three tokens, drawn from two words of that value. Its
latent is the one-hot attributes under a fixed orthogonal map, with noise, standardised. l2t samples texts given true,
other and no latents; reported is the share of tokens that show the latent's attributes. t2l samples latents by DDIM
given true, other and masked texts; reported is how often the nearest of the 81 latents is the text's. The likelihood is
that of the text given its latent, another one and none, with the true entropies.

With --independent the latents are those of other texts, which measures the cost of an uninformative second stream. Each
network is compared with one trained on texts alone, for as many text steps, from the same seeds.

    python benchmarks/joint_toy.py
    python benchmarks/joint_toy.py --independent 5
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial

import torch
from torch import Tensor

from palimpsest.benchmarks.shared import new_parser, report
from palimpsest.common.randomness import KeyedNoise, training_noise
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.gaussian_process import cosine_level
from palimpsest.models.mmdit import MMDiT
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.gaussian import LATEST, GaussianDiffusion
from palimpsest.objectives.joint import MODE_SHARES, JointDiffusion
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers.ancestral import sample

ATTRIBUTES, VALUES, WORDS, TOKENS = 4, 3, 2, 3
MASK = ATTRIBUTES * VALUES * WORDS
LENGTH, WIDTH = ATTRIBUTES * TOKENS, 16


def texts(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return attributes (rows, ATTRIBUTES) and tokens (rows, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(VALUES, (rows, ATTRIBUTES), generator=generator)
    word = torch.randint(WORDS, (rows, LENGTH), generator=generator)
    of_attribute = torch.arange(ATTRIBUTES).repeat_interleave(TOKENS)
    return values, (of_attribute * VALUES + values[:, of_attribute]) * WORDS + word


def latents(values: Tensor, noise: float = 0.0) -> Tensor:
    """Return latents (rows, 1, WIDTH) with variances near 1."""
    one_hot = torch.nn.functional.one_hot(values, VALUES).flatten(1).double() - 1 / VALUES
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).double())[0]
    clean = one_hot @ turn[: one_hot.shape[1]]
    scale = math.sqrt(ATTRIBUTES * (1 - 1 / VALUES) / WIDTH)
    return ((clean / scale) + noise * torch.randn(clean.shape)).float()[:, None]


def train(
    steps: int, settings: argparse.Namespace, seed: int = 0, modes: dict | None = None, independent: bool = False
) -> tuple[MMDiT, JointDiffusion, dict[str, float]]:
    torch.manual_seed(seed)
    rows = settings.rows
    net = MMDiT(MASK + 1, 64, 64, 3, 4, latent_shape=(1, WIDTH), dropout=0.0)
    of_latents = GaussianDiffusion(settings.target, settings.loss)
    law = JointDiffusion(Absorbing(MASK), partial(Subs, LogLinear()), of_latents, modes=modes, latent_tokens=LENGTH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        values, x = texts(rows, step + 1 + 10**6 * seed)
        batch = {"input_ids": x, "latent": latents(values.roll(1, 0) if independent else values, 0.1)}
        loss = law.loss(net, batch, training_noise(1 + seed, torch.arange(step * rows, (step + 1) * rows), rows))
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval(), law, {name: round(float(s / n), 3) for name, (s, n) in loss.means.items() if n}


@torch.no_grad()
def to_text(net: MMDiT, law: JointDiffusion, values: Tensor, latent: Tensor | None) -> float:
    """Return the share of sampled tokens that are a word of the attribute's value."""
    masks = torch.full((len(values), LENGTH), MASK)
    told = {} if latent is None else {"latent": latent}
    model = law.bound(None).model(net)
    out = sample(model, masks, KeyedNoise(7, torch.arange(len(values))), steps=32, skip_idle=False, **told)
    shown = out.ids_BL // WORDS - torch.arange(ATTRIBUTES).repeat_interleave(TOKENS) * VALUES
    return float((shown == values.repeat_interleave(TOKENS, 1)).double().mean())


@torch.no_grad()
def to_latent(net: MMDiT, law: JointDiffusion, values: Tensor, x: Tensor, t: float, steps: int = 50) -> float:
    """Return how often the nearest latent is that of the attributes, by deterministic DDIM."""
    z = KeyedNoise(8, torch.arange(len(x))).normal(1, WIDTH).float()
    grid = torch.linspace(LATEST, 0.0, steps + 1, dtype=torch.float64).expand(len(x), -1)
    text_t = torch.full((len(x),), t, dtype=torch.float64)
    for now, then in zip(grid.T, grid.T[1:], strict=False):
        said = law.model(net).predict_latent(z, now, x, text_t)
        level = cosine_level(then).like(z)
        z = level.alpha * said.x0_BKD + level.sigma * said.eps_BKD
    every = torch.cartesian_prod(*[torch.arange(VALUES)] * ATTRIBUTES)
    nearest = torch.cdist(z[:, 0], latents(every)[:, 0]).argmin(1)
    return float((every[nearest] == values).all(1).double().mean())


@torch.no_grad()
def nats(net: MMDiT, law: JointDiffusion, x: Tensor, **told: Tensor) -> Tensor:
    """Return the bound of each text, nats per token, (M,)."""
    batch = {"input_ids": x, "sample_id": torch.arange(len(x)), **told}
    return Nelbo()(law.bound(None).model(net), batch, 0, 8).nll_BK.mean(1) / LENGTH


def independent(settings: argparse.Namespace) -> None:
    """Print the bounds of texts by networks trained with uninformative latents, and by networks without latents."""
    x, reads_text = texts(512, 0)[1], 1 - sum(MODE_SHARES[name] for name in ("t2l", "latent"))
    hidden = {"latent": torch.zeros(len(x), 1, WIDTH), "latent_t": torch.ones(len(x), dtype=torch.float64)}
    table = []
    for seed in range(settings.independent):
        joint = train(settings.steps, settings, seed, independent=True)
        alone = train(round(settings.steps * reads_text), settings, seed, {"text": 1.0})
        table.append([float(nats(*trained[:2], x, **hidden).mean()) for trained in (joint, alone)])
    found_S2 = torch.tensor(table)
    difference_S = found_S2[:, 0] - found_S2[:, 1]
    report(
        "joint_toy",
        steps=settings.steps,
        rows=settings.rows,
        seeds=settings.independent,
        nats_per_token={"joint": found_S2[:, 0].tolist(), "alone": found_S2[:, 1].tolist()},
        difference=float(difference_S.mean()),
        se=float(difference_S.std() / len(difference_S) ** 0.5) if len(difference_S) > 1 else None,
        true_nats_per_token=round(math.log(WORDS) + math.log(VALUES) / TOKENS, 4),
    )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--target", default="v")
    parser.add_argument("--loss", default="mse")
    parser.add_argument("--independent", type=int, default=0, metavar="SEEDS", help="latents that say nothing")
    settings = parser.parse_args()
    if settings.independent:
        independent(settings)
    else:
        directions(settings)


def directions(settings: argparse.Namespace) -> None:
    """Print the measurements of a network trained on texts and their latents, in all directions."""
    start = time.process_time()
    net, law, last = train(settings.steps, settings)
    seconds = round(time.process_time() - start, 1)
    values, x = texts(512, 0)
    z, masks = latents(values, 0.1), torch.full_like(x, MASK)
    one = torch.ones(len(x), dtype=torch.float64)
    told = {"true": {"latent": z}, "other": {"latent": z.roll(1, 0)}, "none": {"latent": z, "latent_t": one}}
    line = {
        "steps": settings.steps, "rows": settings.rows, "target": settings.target, "loss": settings.loss,
        "training_cpu_seconds": seconds,
        "l2t_tokens": {"true": to_text(net, law, values, z), "other": to_text(net, law, values, z.roll(1, 0)),
                       "none": to_text(net, law, values, None)},
        "t2l_texts": {"true": to_latent(net, law, values, x, 0.0),
                      "other": to_latent(net, law, values, x.roll(1, 0), 0.0),
                      "none": to_latent(net, law, values, masks, 1.0)},
        "nats_per_token": {name: round(float(nats(net, law, x, **more).mean()), 4) for name, more in told.items()},
        "true_nats_per_token": {"given the latent": round(math.log(WORDS), 4),
                                "alone": round(math.log(WORDS) + math.log(VALUES) / TOKENS, 4)},
        "last_step": last,
    }  # fmt: skip
    report("joint_toy", **line)


if __name__ == "__main__":
    main()
