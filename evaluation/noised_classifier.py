"""A classifier of noised texts, p(class | x_t): the guide of D-CBG (Schiff et al., arXiv 2412.10193, section 3.4).

It is a small network that is trained on noised training texts when it is first needed, and kept in data.cache_dir.

Shape suffixes: B batch, L length, N selected positions, D width, V vocabulary, C classes.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise
from palimpsest.data.cache import cached_folder
from palimpsest.data.tables import size_of
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion
from palimpsest.models.dit import DiT
from palimpsest.noise_schedule import NoiseSchedule
from palimpsest.objectives.base import MAX_SIGMA, Batch, scored_mask
from palimpsest.process import Process

_SIZE = {"hidden_size": 128, "cond_dim": 32, "n_blocks": 2, "n_heads": 4, "dropout": 0.1}
_ROWS = 64  # of a step
_LR = 1e-3
_MEASURED = 1024  # largest number of validation rows that its accuracy is measured on


class NoisedClassifier(nn.Module):
    """A small diffusion transformer; the mean of its hidden states decides the class.

    Args:
        schedule: amount of noise at time t, which the network is shown.
    """

    def __init__(self, vocab_size: int, num_classes: int, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.body = DiT(vocab_size, **_SIZE, time_conditioning=True)
        self.classes = nn.Linear(_SIZE["hidden_size"], num_classes)

    def forward(self, x_BL: Tensor, t_B: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return log p(class | x_t), (B, C)."""
        sigma_B = self.schedule(t_B).sigma.clamp(max=MAX_SIGMA).float()
        here_BL = torch.ones_like(x_BL) if attention_mask is None else attention_mask
        hidden_BLD = self.body.encode(x_BL, sigma_B, here_BL.bool())
        here_BL1 = here_BL[..., None].to(hidden_BLD.dtype)
        return self.classes((hidden_BLD * here_BL1).sum(1) / here_BL1.sum(1)).log_softmax(-1)

    def gain(
        self, x_BL: Tensor, t_B: Tensor, class_id: int, at: Positions, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return the derivative of log p(class | x_t) by the amount of each token at the N positions `at`, (N, V)."""
        seen = []

        def watch(_: nn.Module, __: tuple, embedded_BLD: Tensor) -> Tensor:
            seen.append(embedded_BLD.detach().requires_grad_())
            return seen[0]

        hook = self.body.vocab_embed.register_forward_hook(watch)
        with torch.inference_mode(False), torch.enable_grad(), hook:
            x_BL, t_B = x_BL.clamp(min=0).clone(), t_B.clone()
            mask = None if attention_mask is None else attention_mask.clone()
            (slope_BLD,) = torch.autograd.grad(self(x_BL, t_B, mask)[:, class_id].sum(), seen)
        return at.take(slope_BLD) @ self.body.vocab_embed.embedding.T


def fit_classifier(
    classifier: NoisedClassifier, process: Process, rows: Callable[[int], Batch], steps: int, seed: int
) -> None:
    """Train on texts that are noised up to times drawn evenly.

    Args:
        rows: number -> a batch of that many rows with `input_ids` and `label`, drawn at random.
    """
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=_LR)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    classifier.train()
    progress = trange(steps, desc="train a classifier of noised texts", mininterval=1)
    for step in progress:
        batch = rows(_ROWS)
        loss = F.nll_loss(_of_noised(classifier, process, batch, seed, step), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        decay.step()
        if step % 20 == 0:
            progress.set_postfix(cross_entropy=f"{float(loss):.3f}")
    classifier.eval().requires_grad_(False)


def _of_noised(classifier: NoisedClassifier, process: Process, batch: Batch, seed: int, draw: int) -> Tensor:
    """Return log p(class | x_t) at a time drawn for each row, (B, C)."""
    x0_BL = batch["input_ids"]
    noise = KeyedNoise(seed, torch.arange(len(x0_BL), device=x0_BL.device), draw=draw)
    t_B = noise.time()
    x_BL = process.corrupt(x0_BL, classifier.schedule(t_B).alpha, noise, scored_mask(batch))
    return classifier(x_BL, t_B, batch.get("attention_mask"))


def noised_classifier(diffusion: Diffusion, data: TextData, steps: int, seed: int) -> tuple[NoisedClassifier, float]:
    """Return a classifier of texts with the noise of a model, and its accuracy on noised validation texts.

    Raises ValueError for rows without classes.
    """
    if "label" not in data.split("train").column_names:
        raise ValueError(
            f"sampling.guidance_by=classifier learns from texts with classes, and rows of data={data.name} "
            "data.wrap=true have none; set data.wrap=false"
        )
    process, schedule = diffusion.objective.process, diffusion.objective.schedule.full_range
    new = partial(NoisedClassifier, diffusion.backbone.vocab_size, len(data.label_names), schedule)
    known = diffusion.identity["configuration"]
    kinds = ("data.", "noise.", "process.", "parameterization", "model.length")
    settings = {key: value for key, value in known.items() if key.startswith(kinds)}
    settings |= {"tokenizer": data.vocabulary.fingerprint, "texts": size_of(data.texts("train")), "steps": steps}

    def batch(split: str, rows: np.ndarray) -> Batch:
        return {name: column.to(diffusion.device) for name, column in data.collate(data.split(split)[rows]).items()}

    def build(folder: Path) -> dict[str, float]:
        rng, train = np.random.default_rng(seed), len(data.split("train"))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            classifier = new().to(diffusion.device)
            draw = lambda number: batch("train", rng.integers(train, size=number))
            fit_classifier(classifier, process, draw, steps, seed)
        safetensors.torch.save_file(classifier.state_dict(), folder / "classifier.safetensors")
        number = min(len(data.split("validation")), _MEASURED)
        right = []
        for part, rows in enumerate(np.array_split(np.arange(number), -(-number // _ROWS))):
            measured = batch("validation", rows)
            log_p_BC = _of_noised(classifier, process, measured, seed, -1 - part)
            right.append(log_p_BC.argmax(-1) == measured["label"])
        return {"accuracy": float(torch.cat(right).double().mean())}

    folder, figures = cached_folder(data.cache_dir, "noised-classifier", {**settings, "seed": seed, **_SIZE}, build)
    classifier = new().to(diffusion.device)
    classifier.load_state_dict(safetensors.torch.load_file(folder / "classifier.safetensors"))
    return classifier.eval().requires_grad_(False), figures["accuracy"]
