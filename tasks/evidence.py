"""Which tokens of a text spoke for which class: the text's log-likelihood ratio, token by token.

Shape suffixes: L length, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from palimpsest.common.randomness import evaluation_noise
from palimpsest.data.tokenizers import token_strings
from palimpsest.objectives.noising import Noising
from palimpsest.report.evidence import Evidence
from palimpsest.tasks.class_models import Hypothesis


@torch.inference_mode()
def token_evidence(
    hypotheses: Sequence[Hypothesis], data: object, split: str, draws: Mapping[int, int], of: int,
    noising: Noising | None, seed: int,
) -> list[np.ndarray]:  # fmt: skip
    """Nats of each token in -log p(row | class), float64 (C, L) for each row; nan on tokens that are not scored.

    draws: row number in the split -> how many of the `of` draws of the design it took when it was scored. With the
    `noising` and the seed of that measurement the sum over L is what it found for this row.
    """
    device, found = hypotheses[0].diffusion.device, []
    for row, taken in draws.items():
        batch = data.collate(data.split(split)[[row]])
        batch = {name: column.to(device) for name, column in batch.items()}
        by_class = []
        for hypothesis in hypotheses:
            told, network = hypothesis.told(batch), hypothesis.diffusion
            objective = network.objective.bound(noising)
            passes = 1 if objective.exact else objective.noising.passes
            numbers = range(1 if objective.exact else max(taken // passes, 1))
            ids_B, group_B = batch["sample_id"], batch.get("text_id")
            noises = [evaluation_noise(seed, ids_B, k, of // passes, group_B) for k in numbers]
            losses = [objective.loss(network.backbone, told, noise) for noise in noises]
            nats_L = sum(loss.nll_BL[0].double() for loss in losses) / len(losses)
            by_class.append(nats_L.masked_fill(~losses[0].mask_BL[0], torch.nan))
        found.append(torch.stack(by_class).cpu().numpy())
    return found


def shown_evidence(
    data: object, split: str, chosen: Mapping[int, tuple[str, int, int]], nats: Sequence[np.ndarray]
) -> list[Evidence]:
    """Texts as the report colours them.

    chosen: row number in the split -> (title, class spoken for, class spoken against). nats: of `token_evidence`.
    """
    shown = []
    for (row, (title, winner, rival)), nats_CL in zip(chosen.items(), nats, strict=True):
        ids = [int(i) for i in data.split(split)[row]["input_ids"]]
        ratio_L = nats_CL[rival, : len(ids)] - nats_CL[winner, : len(ids)]
        names = (data.label_names[winner], data.label_names[rival])
        shown.append(Evidence(title, tuple(token_strings(data.tokenizer, ids)), tuple(ratio_L.tolist()), names))
    return shown
