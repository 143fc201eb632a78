"""Speed of a training step of block diffusion against its plain form, and of sampling with and without a KV cache.

The plain form is that of the reference: [x_t ; x_0] in one pass of 2 L tokens under one dense mask (SDPA), the
vocabulary projected at all 2 L positions, log-softmax over (B, L, V). Each form runs in its own process; both
alternate, and ratios are of pairs. With --vocab 1000 the vocabulary is cheap, which shows the gain from the trunk
alone. Sampling is timed for blocks at five positions of the text and interpolated between them.

    python benchmarks/block_attention.py train         # hidden 256, 6 blocks, 4 heads, L 256, V 50258, batch 8, fp32
    python benchmarks/block_attention.py sample        # the same network, L 1024, batch 4, first hitting
"""

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palimpsest.benchmarks.shared import in_own_processes, new_parser, peak_mib, ratios, report, spread, training_steps
from palimpsest.common.randomness import KeyedNoise
from palimpsest.models.attention import apply_rotary, rotary_angles
from palimpsest.models.block_attention import visible
from palimpsest.models.dit import DiT
from palimpsest.models.layers import modulate, over_positions
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.block import BlockDiffusion
from palimpsest.objectives.mask_sampling import Bernoulli
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers import first_hitting

SIZE = {"hidden_size": 256, "cond_dim": 128, "n_blocks": 6, "n_heads": 4}
LENGTH, VOCAB, BATCH = 256, 50_258, 8
LAWS = ("ours", "plain")


def plain_hidden(net: DiT, xt_BL: Tensor, x0_BL: Tensor, seen: Tensor) -> Tensor:
    """Return the hidden states of the network on [x_t ; x_0] under a dense mask, (B, 2 L, D)."""
    length = xt_BL.shape[1]
    angles = tuple(torch.cat([table, table]) for table in rotary_angles(net.rotary_emb.inv_freq, length))
    c_BC, x = net.conditioning(torch.zeros(len(xt_BL))), net.vocab_embed(torch.cat([xt_BL, x0_BL], dim=1))
    for layer in net.blocks:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = layer.adaLN_modulation(c_BC).chunk(6, dim=-1)
        qkv = layer.attn_qkv(modulate(layer.norm1(x), shift_a, scale_a)).unflatten(-1, (3, layer.n_heads, -1))
        q, k, v = qkv.unbind(dim=2)
        q, k, v = (y.transpose(1, 2) for y in (apply_rotary(q, *angles), apply_rotary(k, *angles), v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        x = x + over_positions(gate_a, x) * layer.project(attended)
        x = x + over_positions(gate_m, x) * layer.transform(modulate(layer.norm2(x), shift_m, scale_m))
    return net.output_layer.normed(x, c_BC)


def dense_mask(size: int) -> Tensor:
    place = torch.arange(2 * LENGTH)
    block, noised = place % LENGTH // size, place < LENGTH
    return visible(block[:, None], block, noised[:, None], noised)


def plain_loss(net: DiT, x0_BL: Tensor, noise: KeyedNoise, size: int, seen: Tensor) -> Tensor:
    blocks, mask_id = x0_BL.reshape(-1, size), net.vocab_size - 1
    every = torch.ones_like(blocks, dtype=torch.bool)
    (look,) = Bernoulli()(LogLinear(), blocks, every, Absorbing(mask_id), noise.parts(LENGTH // size))
    xt_BL, t_BL = look.xt_BL.reshape(x0_BL.shape), look.t_B.reshape(len(x0_BL), -1).repeat_interleave(size, dim=1)
    logits_BLV = net.head(plain_hidden(net, xt_BL, x0_BL, seen))[:, :LENGTH]
    logits_BLV[..., mask_id] += -1e6
    log_p_BLV = logits_BLV - logits_BLV.logsumexp(-1, keepdim=True)
    visible_BL = xt_BL != mask_id
    log_p_BLV[visible_BL] = -1e6
    log_p_BLV[visible_BL, xt_BL[visible_BL]] = 0.0
    nll_BL = -log_p_BLV.gather(-1, x0_BL[..., None]).squeeze(-1) / t_BL.float()
    return nll_BL.mean()


def measure(law: str, size: int, vocab: int, steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    net = DiT(vocab, **SIZE, dropout=0.1)
    objective = BlockDiffusion(Absorbing(vocab - 1), partial(Subs, LogLinear()), size, ignore_bos=False)
    seen = dense_mask(size)
    x0_BL = torch.randint(vocab - 1, (BATCH, LENGTH))

    def loss(noise: KeyedNoise) -> Tensor:
        if law == "plain":
            return plain_loss(net, x0_BL, noise, size, seen)
        return objective.loss(net, {"input_ids": x0_BL}, noise).mean()

    seconds, losses = training_steps(net, loss, BATCH, steps)
    return {"tokens_per_s": BATCH * LENGTH / seconds, "peak_mib": peak_mib(), "loss": losses[0]}


def train(sizes: list[int], vocab: int, steps: int, pairs: int) -> None:
    for size in sizes:
        found = in_own_processes(measure, {law: (law, size, vocab, steps) for law in LAWS}, pairs)
        speed = found["tokens_per_s"]
        report(
            "block_train_step",
            device="cpu",
            pairs=pairs,
            block_size=size,
            length=LENGTH,
            vocab=vocab,
            **{f"tokens_per_s_{law}": round(spread(values)[1]) for law, values in speed.items()},
            speedup=ratios(speed["ours"], speed["plain"]),
            memory_ratio=found["peak_mib"]["ours"][0] / found["peak_mib"]["plain"][0],
            first_loss=[found["loss"][law][0] for law in LAWS],
        )


@torch.no_grad()
def sample(sizes: list[int], length: int, batch: int) -> None:
    torch.manual_seed(0)
    net = DiT(VOCAB, **SIZE, dropout=0.0).eval()
    nn.init.normal_(net.head.weight, std=0.02)
    for size in sizes:
        model = BlockDiffusion(Absorbing(VOCAB - 1), partial(Subs, LogLinear()), size, False).model(net)
        x_BL, seconds, equal = torch.randint(VOCAB - 1, (batch, length)), {True: [], False: []}, True
        places = [round(i * (length - size) / 4) // size * size for i in range(5)]
        for start in places:
            drawn = {}
            for cached in (True, False):
                earlier = x_BL[:, :start]
                if cached:
                    earlier = model.new_block_cache(batch, length)
                    model.remember(x_BL[:, :start], earlier)  # done step by step while the text grew: not timed
                begin = time.perf_counter()
                blank = torch.full((batch, size), VOCAB - 1)
                noise = KeyedNoise(0, torch.arange(batch))
                out = first_hitting.sample(model.after(earlier), blank, noise, row=torch.arange(batch))
                if cached and start + size < length:
                    model.remember(out.ids_BL, earlier)
                seconds[cached].append(time.perf_counter() - begin)
                drawn[cached] = out.ids_BL
            equal &= torch.equal(drawn[True], drawn[False])
        whole = {cached: sum((a + b) / 2 for a, b in zip(found, found[1:], strict=False)) / 4 * length / size
                 for cached, found in seconds.items()}  # fmt: skip
        report(
            "block_sampling",
            device="cpu",
            block_size=size,
            length=length,
            batch=batch,
            seconds_cached=whole[True],
            seconds_uncached=whole[False],
            speedup=whole[False] / whole[True],
            equal_tokens=equal,
            extrapolated_from_blocks=len(places),
        )


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("what", choices=("train", "sample"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    if args.what == "sample":
        sample(args.sizes, args.length, args.batch)
    else:
        train(args.sizes, args.vocab, args.steps, args.pairs)


if __name__ == "__main__":
    main()
