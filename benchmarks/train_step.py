"""Tokens per second and peak memory of a training step, against the plain objective on the same trunk and optimizer.

The plain objective is that of the reference implementations: it projects every position, takes a log-softmax over
(B, L, V), gathers and weights. Each runs in its own process, so that peak memory is its own; both alternate, and ratios
are of pairs.

    python benchmarks/train_step.py                    # hidden 256, 6 blocks, 4 heads, L 256, V 50258, batch 8, fp32
"""

import torch
from torch import nn

from palimpsest.benchmarks.shared import in_own_processes, new_parser, peak_mib, ratios, report, spread, training_steps
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.base import TokenLoss
from palimpsest.objectives.mask_sampling import Draw
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing

SIZE = {"hidden_size": 256, "cond_dim": 128, "n_blocks": 6, "n_heads": 4, "dropout": 0.1}
LENGTH, VOCAB, BATCH = 256, 50_258, 8


class PlainSubs(Subs):
    """The same objective as the references compute it."""

    def loss_at(self, backbone: nn.Module, batch: dict, draw: Draw) -> TokenLoss:
        xt_BL, level = draw.xt_BL, self.schedule(draw.t_B)
        logits_BLV = backbone(xt_BL, level.sigma.float())
        logits_BLV[..., self.process.mask_id] += -1e6
        log_p_BLV = logits_BLV - logits_BLV.logsumexp(-1, keepdim=True)
        visible_BL = xt_BL != self.process.mask_id
        log_p_BLV[visible_BL] = -1e6
        log_p_BLV[visible_BL, xt_BL[visible_BL]] = 0.0
        nll_BL = -log_p_BLV.gather(-1, batch["input_ids"][..., None]).squeeze(-1) * level.elbo_weight.float()[:, None]
        return TokenLoss(nll_BL, torch.ones_like(xt_BL, dtype=torch.bool))


class NoVocabulary(Subs):
    """The trunk alone: the minimum for both."""

    def loss_at(self, backbone: nn.Module, batch: dict, draw: Draw) -> TokenLoss:
        hidden_BLD = backbone.encode(draw.xt_BL, self.schedule(draw.t_B).sigma.float())
        return TokenLoss(hidden_BLD.sum(-1), torch.ones_like(draw.xt_BL, dtype=torch.bool))


class Floor(NoVocabulary):
    """The trunk, three products with the vocabulary's matrix for the masked positions, and its update by the optimizer:
    what no projection avoids."""

    def loss_at(self, backbone: nn.Module, batch: dict, draw: Draw) -> TokenLoss:
        loss = super().loss_at(backbone, batch, draw)
        with torch.no_grad():
            weight_VD, num_masked = backbone.head.weight, int(self.process.is_corrupted(draw.xt_BL).sum())
            grad_VD, hidden_ND = torch.zeros_like(weight_VD), torch.randn(num_masked, weight_VD.shape[1])
            for hidden_CD in hidden_ND.split(166):
                logits_VC = weight_VD @ hidden_CD.T
                logits_VC.T @ weight_VD
                grad_VD.addmm_(logits_VC, hidden_CD)
        weight_VD.grad = grad_VD
        return loss


LAWS = {"ours": Subs, "plain": PlainSubs, "floor": Floor, "trunk": NoVocabulary}


def measure(law: str, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    net = DiT(VOCAB, **SIZE)
    objective = LAWS[law](LogLinear(), Absorbing(VOCAB - 1))
    batch = {"input_ids": torch.randint(VOCAB - 1, (BATCH, LENGTH))}
    seconds, _ = training_steps(net, lambda noise: objective.loss(net, batch, noise).mean(), BATCH, steps)
    return {"tokens_per_s": BATCH * LENGTH / seconds, "peak_mib": peak_mib()}


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    found = in_own_processes(measure, {law: (law, args.steps) for law in LAWS}, args.pairs)
    speed = found["tokens_per_s"]
    memory = found["peak_mib"]
    for law, values in speed.items():
        low, median, high = spread(values)
        peak = spread(memory[law])[1]
        print(f"{law:6} {median:8.0f} tokens/s (from {low:.0f} to {high:.0f}), peak {peak:.0f} MiB")
    report(
        "train_step",
        device="cpu",
        pairs=args.pairs,
        speedup=ratios(speed["ours"], speed["plain"]),
        memory_ratio=ratios(memory["ours"], memory["plain"])[1],
        seconds_over_floor=ratios(speed["floor"], speed["ours"]),
    )


if __name__ == "__main__":
    main()
