"""Conditional generation: texts from latents, latents from texts, and both jointly.

Each result is compared with two controls under the same noise: conditioned on the latent (or text) of another row, and
unconditional. Shape suffixes: B batch, M texts, K latent tokens, D numbers of each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.metrics import mean
from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import COUNT, Count, Name, Natural, Needs, Share, real, whole
from palimpsest.dataloader import TextData
from palimpsest.denoisers import Denoiser, JointDenoiser
from palimpsest.evaluation.drawing import SampledTokens, SamplingContext, SamplingResult
from palimpsest.evaluation.latent_measures import Agreement, Reader, agreement, bleu, partners, token_f1
from palimpsest.evaluation.likelihood import GroundTruth
from palimpsest.evaluation.sample_quality import Comparison, compare, real_texts
from palimpsest.evaluation.sampling_inputs import masked_row, padded, rows_to_fill
from palimpsest.samplers import gaussian, joint
from palimpsest.samplers.base import TokenChoice, with_model
from palimpsest.samplers.gaussian import LatentSteps
from palimpsest.samplers.joint import with_guidance
from palimpsest.samplers.trace import Trace, Watcher

VARIANTS = ("true", "shuffled", "none")  # condition: the true latent (or text), that of another row, none


@dataclass(frozen=True)
class EditRules:
    """Rules of editing (evaluation/editing.py). Raises ValueError if target=slerp and `alpha` is outside [0, 1]."""

    positions: Literal["random", "entropy", "suffix", "contrast"] = "random"  # which tokens are masked
    rate: Share = 0.3  # share of all tokens
    target: Literal["shift", "centroid", "neighbour", "slerp"] = "shift"  # how the target latent is found
    alpha: Annotated[float, real("(-inf, inf)"), Needs("target", ("shift", "slerp"))] = 1.0  # step size
    to_class: Natural | Name | None = None  # number or name of the target class; None: the one after the text's own
    path: Annotated[int, whole(2, COUNT)] = 5  # points of the latent path on which SSS and MTS are measured

    def __post_init__(self) -> None:
        if self.target == "slerp" and not 0 <= self.alpha <= 1:
            raise ValueError(f"sampling.edit_alpha={self.alpha} must be in [0, 1] for edit_target=slerp")


@dataclass(frozen=True)
class ConditionalSettings:
    """Settings of conditional generation. Raises ValueError for guidance without a condition."""

    direction: Literal["joint", "l2t", "t2l", "edit"] | None = None
    joint_order: Annotated[Literal["simultaneous", "latent_first"], Needs("direction", ("joint",))] = "simultaneous"
    latent: LatentSteps = LatentSteps()
    steps: Count = 128  # of joint_order=simultaneous, as `choice` and `noise_removal`; else the sampler's own
    choice: TokenChoice = TokenChoice()
    noise_removal: bool = True
    edit: Annotated[EditRules, Needs("direction", ("edit",))] = field(default_factory=EditRules)

    def __post_init__(self) -> None:
        if self.direction == "joint" and self.joint_order == "simultaneous" and self.latent.guidance != 1:
            raise ValueError(
                f"sampling.guidance={self.latent.guidance} needs a condition, and "
                "joint_order=simultaneous has none; use 1, or joint_order=latent_first"
            )


@dataclass(frozen=True)
class ChosenRows:
    """M rows of a split."""

    key_M: np.ndarray  # sample ids, which key the noise
    ids: list[np.ndarray]  # as packed
    rows: list[np.ndarray]  # as the network sees them, without padding
    blanks: list[np.ndarray]  # `rows` with every token masked that may be
    latent_MKD: np.ndarray
    label_M: np.ndarray | None  # None without labels


def choose(data: TextData, split: str, number: int, seed: int, blank_id: int, unlike: int | None = None) -> ChosenRows:
    """Choose `number` random rows of a split (at most all), none of class `unlike`, as the seed determines."""
    table = data.split(split)
    order = KeyedNoise(seed, torch.arange(len(table)), draw=-7).uniform().argsort().numpy()
    if unlike is not None:
        order = order[np.asarray(table["label"])[order] != unlike]
    chosen = np.sort(order[:number])
    columns = [table[[int(i)]] for i in chosen]
    rows = []
    for column in columns:
        row = data.collate(column)["input_ids"][0].numpy()
        rows.append(row if data.fill or data.wrap else row[: int(column["length"][0])])
    labels = np.asarray(table["label"])[chosen] if "label" in table.column_names else None
    blanks = [masked_row(data, column, blank_id, causal=False, keep_observed=True) for column in columns]
    ids = [np.asarray(column["input_ids"][0]) for column in columns]
    return ChosenRows(np.asarray(table["sample_id"])[chosen], ids, rows, blanks, data.latents.of(split)[chosen], labels)


@dataclass(frozen=True)
class ConditionalContext(SamplingContext):
    """A `SamplingContext` for conditional generation."""

    settings: ConditionalSettings = ConditionalSettings()
    split: str = ""
    number: int = 0
    truth: GroundTruth | None = None  # the exact distribution of the corpus, if known

    def chosen(self, unlike: int | None = None) -> ChosenRows:
        """Return the chosen rows, without those of class `unlike`."""
        return choose(self.data, self.split, self.number, self.seed, self.blank_id, unlike)

    def sample_masked(
        self,
        rows: Sequence[np.ndarray],
        key_M: np.ndarray,
        conditioning: Mapping[str, Tensor],
        wrap_model: Callable[[Denoiser], Denoiser] = lambda model: model,
        watched: bool = False,
    ) -> list[SampledTokens]:
        """Sample the masked tokens of `rows` with the changed model; `watched` lets `watch` observe it."""
        drawing = replace(self.drawing, sampler=with_model(self.drawing.sampler, wrap_model))
        context = replace(self, drawing=drawing, watch=self.watch if watched else None)
        return context.sample(rows, key_M, conditioning)


@dataclass(frozen=True)
class ConditionalResult(SamplingResult):
    """The result of conditional generation."""

    agreement: Mapping[str, Agreement] = field(default_factory=dict)  # with the wanted latents, by condition
    latent_MKD: np.ndarray | None = None  # sampled, standardised


@dataclass(frozen=True)
class JointResult(ConditionalResult):
    """Texts sampled jointly with their latents."""

    comparison: Comparison | None = None  # quality of these and of real texts


@dataclass(frozen=True)
class ConditionalRequest:
    """A request for conditional generation. Raises ValueError without a split to take texts from, or for one text."""

    settings: ConditionalSettings
    split: str | None
    number: int
    truth: GroundTruth | None  # the exact distribution of the corpus, if known
    generate: Callable[[ConditionalContext], ConditionalResult]  # samples and measures

    def __post_init__(self) -> None:
        if self.split is None:
            raise ValueError("eval.split=null: conditional generation takes texts and latents from a split; choose one")
        if self.number < 2:
            raise ValueError(f"sampling.num_samples={self.number}: latents of other texts are compared; ask for two")

    @property
    def folder(self) -> str:
        """Folder of the results."""
        return self.settings.direction

    def __call__(self, context: SamplingContext) -> ConditionalResult:
        """Sample with guidance, and measure."""
        data, drawing = context.data, context.drawing
        guided = replace(drawing, sampler=with_guidance(drawing.sampler, self.settings.latent.guidance))
        fields = {"settings": self.settings, "split": self.split, "number": self.number, "truth": self.truth}
        result = self.generate(ConditionalContext(**{**vars(context), "drawing": guided, **fields}))
        context.save_rows(result.rows)
        protocol = {**asdict(self.settings), "data": data.name, "split": self.split,
                 "tokenizer": data.vocabulary.fingerprint, "latents": data.latents.metadata}  # fmt: skip
        return replace(result, protocol=protocol)


def unconditional(latent_MKD: np.ndarray) -> dict[str, Tensor]:
    """Return the conditioning of unconditional generation: latents that are all noise."""
    return {"latent": torch.from_numpy(latent_MKD), "latent_t": torch.ones(len(latent_MKD), dtype=torch.float64)}


def latent_conditions(true_MKD: np.ndarray, other_MKD: np.ndarray) -> dict[str, dict[str, Tensor]]:
    """Return the conditioning of each text for each of `VARIANTS`."""
    true, other = torch.from_numpy(true_MKD), torch.from_numpy(other_MKD)
    return {"true": {"latent": true}, "shuffled": {"latent": other}, "none": unconditional(true_MKD)}


def latent_to_text(context: ConditionalContext) -> ConditionalResult:
    """Sample texts conditioned on true, shuffled and no latents; compare all of them with the true texts."""
    chosen, reader = context.chosen(), Reader(context.data)
    partner_M = partners(len(chosen.ids), context.seed)
    conditions = latent_conditions(chosen.latent_MKD, chosen.latent_MKD[partner_M])
    sampled = {name: context.sample_masked(chosen.blanks, chosen.key_M, conditions[name], watched=name == "true")
             for name in VARIANTS}  # fmt: skip
    reference_ids, missing = [reader.content(ids) for ids in chosen.ids], reader.missing
    references = [reader.text(ids) for ids in chosen.ids]
    true_MA = reader.attributes(chosen.ids)
    agreements, results = {}, {}
    for name, generated in sampled.items():
        ids = [text.ids for text in generated]
        f1 = mean(token_f1([reader.content(row) for row in ids], reference_ids))
        results[name] = {"token_f1": f1, "bleu": bleu([reader.text(row) for row in ids], references)}
        if not missing:
            agreements[name] = agreement(reader.latents(ids), chosen.latent_MKD, reader.attributes(ids), true_MA)
            results[name] |= asdict(agreements[name])
    decoded = {name: [reader.text(text.ids) for text in generated] for name, generated in sampled.items()}
    rows = [{"sample_id": int(chosen.key_M[m]), "reference": references[m], **{n: decoded[n][m] for n in VARIANTS},
             "ids": text.ids, "steps": text.steps, "evaluations": text.evaluations}
            for m, text in enumerate(sampled["true"])]  # fmt: skip
    evaluations = float(np.mean([text.evaluations for text in sampled["true"]]))
    results = {"texts": len(references), **results, "encoder_missing": missing or None,
               "network_evaluations_per_sample": evaluations}  # fmt: skip
    return ConditionalResult(results, rows, sampled["true"], {}, agreements)


def text_to_latent(context: ConditionalContext) -> ConditionalResult:
    """Sample latents conditioned on true, shuffled and no texts; compare all of them with the true latents."""
    chosen, reader = context.chosen(), Reader(context.data)
    partner_M, every_M = partners(len(chosen.ids), context.seed), np.arange(len(chosen.ids))
    how = context.settings.latent
    conditions = {"true": (every_M, how), "shuffled": (partner_M, how), "none": (every_M, replace(how, guidance=0.0))}
    texts = (chosen.rows, chosen.blanks, chosen.key_M)
    sampled = {name: latents_of(context, *texts, *conditions[name]) for name in VARIANTS}
    true_MKD = chosen.latent_MKD
    true_MA = reader.attributes_of(chosen.latent_MKD)
    agreements = {
        name: agreement(found_MKD, true_MKD, reader.attributes_of(found_MKD), true_MA)
        for name, found_MKD in sampled.items()
    }
    rows = [{"sample_id": int(name), "text": reader.text(ids)}
            for name, ids in zip(chosen.key_M, chosen.ids, strict=True)]  # fmt: skip
    moments = {name: _moments(context.data, latent) for name, latent in (("drawn", sampled["true"]),
                                                                         ("real", chosen.latent_MKD))}  # fmt: skip
    results = {"texts": len(rows), **{name: asdict(agreements[name]) for name in VARIANTS}, "moments": moments,
               "network_evaluations_per_sample": how.evaluations}  # fmt: skip
    return ConditionalResult(results, rows, [], {}, agreements, sampled["true"])


def latents_of(
    context: SamplingContext,
    rows: Sequence[np.ndarray],
    blanks: Sequence[np.ndarray],
    key_M: np.ndarray,
    text_M: np.ndarray,
    how: LatentSteps,
) -> np.ndarray:
    """Sample latents (M, K, D) conditioned on the texts `rows[text_M[m]]`, with the noise of row m."""
    model, pad_id = context.diffusion.model, context.data.vocabulary.pad_id

    def sample_part(part: slice) -> list[np.ndarray]:
        device = context.diffusion.device
        x_BL, cond = padded([rows[m] for m in text_M[part]], pad_id)
        hidden_BL, _ = padded([blanks[m] for m in text_M[part]], pad_id)
        noise = KeyedNoise(context.seed, torch.from_numpy(key_M[part]).to(device)).part(1)
        conditioning = {name: value.to(device) for name, value in cond.items()}
        latent_BKD = gaussian.sample(model, x_BL.to(device), noise, how, masked_BL=hidden_BL.to(device), **conditioning)
        return list(latent_BKD.cpu().numpy())

    return np.stack(context.in_batches(sample_part, len(key_M)))


def _moments(data: TextData, latent_MKD: np.ndarray) -> dict[str, float]:
    norm_M = np.linalg.norm(data.latents.restore(latent_MKD).reshape(len(latent_MKD), -1), axis=1)
    return {"mean": float(latent_MKD.mean()), "standard deviation": float(latent_MKD.std(axis=0).mean()),
            "norm": float(norm_M.mean()), "spread of norms": float(norm_M.std())}  # fmt: skip


def generate_jointly(context: ConditionalContext) -> ConditionalResult:
    """Sample texts with their latents unconditionally; compare them with real texts and with each other."""
    data, drawing = context.data, context.drawing
    seed, reader = context.seed, Reader(data)
    rows = rows_to_fill(context.diffusion, data, drawing.inputs, context.number, seed)
    key_M = np.arange(len(rows))

    def sample_part(part: slice) -> list[tuple[SampledTokens, np.ndarray]]:
        sampled_latents: list[Tensor] = []
        sampler = _joint_sampler(context.settings, drawing.sampler, sampled_latents)
        watch = context.watch if part.start == 0 else None
        joint_context = replace(context, drawing=replace(drawing, sampler=sampler))
        sampled = joint_context.sample_batch(rows[part], key_M[part], watch, {})
        return list(zip(sampled, sampled_latents[0].cpu().numpy(), strict=True))

    pairs = context.in_batches(sample_part, len(rows))
    sampled, latent_MKD = [text for text, _ in pairs], np.stack([latent for _, latent in pairs])
    ids = [text.ids for text in sampled]
    comparison = compare(ids, real_texts(data, context.split, len(ids), seed), data, None)
    agreements: dict[str, Agreement] = {}
    if not reader.missing:
        read_MKD = reader.latents(ids)
        read_MA = reader.attributes(ids)
        for name, latent_of_M in (("true", key_M), ("shuffled", partners(len(ids), seed))):
            wanted_MKD = latent_MKD[latent_of_M]
            agreements[name] = agreement(read_MKD, wanted_MKD, read_MA, reader.attributes_of(wanted_MKD))
    evaluations = float(np.mean([text.evaluations for text in sampled]))
    results = {**comparison.results(), "agreement": {name: asdict(f) for name, f in agreements.items()},
               "encoder_missing": reader.missing or None, "network_evaluations_per_sample": evaluations}  # fmt: skip
    table_rows = [{"sample": m, "text": reader.text(text.ids), "ids": text.ids, "steps": text.steps,
              "evaluations": text.evaluations} for m, text in enumerate(sampled)]  # fmt: skip
    return JointResult(results, table_rows, sampled, {}, agreements, latent_MKD, comparison)


def _joint_sampler(
    settings: ConditionalSettings, sampler: Callable[..., Trace], sampled_latents: list[Tensor]
) -> Callable[..., Trace]:
    """Return a text sampler that also samples latents, which it appends to `sampled_latents`."""
    latent_steps = settings.latent

    def simultaneous(model: JointDenoiser, x_BL: Tensor, noise: KeyedNoise, **cond: Tensor) -> Trace:
        how = {"steps": settings.steps, "choice": settings.choice, "noise_removal": settings.noise_removal}
        text, latent_BKD = joint.sample(model, x_BL, noise, eta=latent_steps.eta, **how, **cond)
        sampled_latents.append(latent_BKD)
        return text

    def latent_first(
        model: JointDenoiser, x_BL: Tensor, noise: KeyedNoise, watch: Watcher | None = None, **cond: Tensor
    ) -> Trace:
        marginal = replace(latent_steps, guidance=0.0)
        latent_BKD = gaussian.sample(model, x_BL, noise.part(1), marginal, masked_BL=x_BL, **cond)
        sampled_latents.append(latent_BKD)
        out = sampler(model, x_BL, noise, watch=watch, **cond, latent=latent_BKD)
        out.evaluations_B += marginal.evaluations
        return out

    return simultaneous if settings.joint_order == "simultaneous" else latent_first
