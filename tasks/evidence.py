"""Which tokens of a text spoke for which class: the text's log-likelihood ratio, token by token.

Shape suffixes: B batch, L length, M texts, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from objectives.base import scored_mask
from randomness import evaluation_noise
from reporting.evidence import Evidence
from tasks.class_models import Hypothesis
from text.tokenizers import token_strings

_ROWS = 16  # of a batch


def token_evidence(
    hypotheses: Sequence[Hypothesis], data: object, split: str, row_numbers: Sequence[int], num_draws: int, seed: int
) -> np.ndarray:
    """Nats of each token in -log p(row | class), with the same masks for every class, mean over `num_draws` draws:
    float64 (rows, C, L), nan on tokens that are not scored. The sum over L is the row's likelihood."""
    found = []
    for start in range(0, len(row_numbers), _ROWS):
        rows = data.split(split)[[int(i) for i in row_numbers[start : start + _ROWS]]]
        found.append(_batch_evidence(hypotheses, data.collate(rows), num_draws, seed))
    length = max(part.shape[2] for part in found)
    widened = [np.pad(part, ((0, 0), (0, 0), (0, length - part.shape[2])), constant_values=np.nan) for part in found]
    return np.concatenate(widened)


@torch.inference_mode()
def _batch_evidence(
    hypotheses: Sequence[Hypothesis], batch: Mapping[str, Tensor], num_draws: int, seed: int
) -> np.ndarray:
    device = hypotheses[0].diffusion.device
    batch = {name: column.to(device) for name, column in batch.items()}
    by_class = []
    for hypothesis in hypotheses:
        told, model = hypothesis.told(batch), hypothesis.diffusion.model
        draws = 1 if model.objective.exact else num_draws
        losses = [model.loss(told, evaluation_noise(seed, batch["sample_id"], k, draws)) for k in range(draws)]
        nats_BL = sum(loss.nll_BL.double() for loss in losses) / draws
        scored_BL = losses[0].mask_BL if model.objective.exact else scored_mask(batch)
        by_class.append(nats_BL.masked_fill(~scored_BL, torch.nan))
    return torch.stack(by_class, dim=1).cpu().numpy()


def shown_evidence(
    hypotheses: Sequence[Hypothesis], data: object, split: str, chosen: Mapping[int, tuple[str, int, int]],
    num_draws: int, seed: int,
) -> list[Evidence]:  # fmt: skip
    """Texts as the report colours them.

    chosen: row number in the split (of a text's first window) -> (title, class spoken for, class spoken against).
    """
    if not chosen:
        return []
    nats = token_evidence(hypotheses, data, split, list(chosen), num_draws, seed)
    shown = []
    for (row, (title, winner, rival)), nats_CL in zip(chosen.items(), nats, strict=True):
        ids = [int(i) for i in data.split(split)[row]["input_ids"]]
        ratio_L = nats_CL[rival, : len(ids)] - nats_CL[winner, : len(ids)]
        tokens = tuple(token_strings(data.tokenizer, ids))
        names = (data.label_names[winner], data.label_names[rival])
        shown.append(Evidence(title, tokens, tuple(ratio_L.tolist()), names))
    return shown
