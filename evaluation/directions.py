"""Conditional generation: texts from latents, latents from texts, both together.

Every direction is held against two controls with the same noise: told the latent (or the text) of another row, and told
nothing. Shape suffixes: B batch, M texts, K latent tokens, D numbers of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.metrics import mean
from palimpsest.common.randomness import KeyedNoise
from palimpsest.common.values import COUNT, Count, Name, Natural, Share, real, whole
from palimpsest.dataloader import TextData
from palimpsest.denoisers import Denoiser
from palimpsest.evaluation.drawing import Drawn, Sampled, Setting
from palimpsest.evaluation.latent_measures import Agreement, Reader, agreement, bleu, partners, token_f1
from palimpsest.evaluation.likelihood import GroundTruth
from palimpsest.evaluation.sample_quality import Comparison, compare, real_texts
from palimpsest.evaluation.sampling_inputs import masked_row, padded, rows_to_fill
from palimpsest.samplers import gaussian, joint
from palimpsest.samplers.base import TokenChoice
from palimpsest.samplers.gaussian import LatentSteps
from palimpsest.samplers.joint import with_guidance
from palimpsest.samplers.trace import Trace, Watcher

VARIANTS = ("true", "shuffled", "none")  # what is told: the latent (or text) itself, that of another row, nothing


@dataclass(frozen=True)
class EditRules:
    """How texts are edited (evaluation/editing.py). positions, rate: which tokens, and how many of all. target: what
    latent a text is to get; alpha: how far towards it; to_class: number or name of the class, None: that behind the
    text's own. path: points of the way to it that SSS and MTS are measured on.

    Raises:
        ValueError: a share of a way, `alpha` of target=slerp, outside [0, 1].
    """

    positions: Literal["random", "entropy", "suffix", "contrast"] = "random"
    rate: Share = 0.3
    target: Literal["shift", "centroid", "neighbour", "slerp"] = "shift"
    alpha: Annotated[float, real("(-inf, inf)")] = 1.0
    to_class: Natural | Name | None = None
    path: Annotated[int, whole(2, COUNT)] = 5

    def __post_init__(self) -> None:
        if self.target == "slerp" and not 0 <= self.alpha <= 1:
            raise ValueError(f"sampling.edit_alpha={self.alpha} is a share of the way for edit_target=slerp, in [0, 1]")


@dataclass(frozen=True)
class Directed:
    """What `sampling` says of directions. steps, choice, noise_removal: of joint_order=simultaneous, where text and
    latent share a grid; else the sampler's own hold.

    Raises:
        ValueError: guidance where nothing is given.
    """

    direction: Literal["joint", "l2t", "t2l", "edit"] | None = None
    joint_order: Literal["simultaneous", "latent_first"] = "simultaneous"
    latent: LatentSteps = LatentSteps()
    steps: Count = 128
    choice: TokenChoice = TokenChoice()
    noise_removal: bool = True
    edit: EditRules = field(default_factory=EditRules)

    def __post_init__(self) -> None:
        if self.direction == "joint" and self.joint_order == "simultaneous" and self.latent.guidance != 1:
            raise ValueError(f"sampling.guidance={self.latent.guidance} pushes towards what is given, and "
                             "joint_order=simultaneous gives nothing; use 1, or joint_order=latent_first")  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """M rows of a split. names_M: their sample ids, by which their noise is keyed. ids: as packed; rows: as a network
    sees them, without padding; blanks: the same with every token masked that may be. label_M: None without labels."""

    names_M: np.ndarray
    ids: list[np.ndarray]
    rows: list[np.ndarray]
    blanks: list[np.ndarray]
    latent_MKD: np.ndarray
    label_M: np.ndarray | None


def choose(data: TextData, split: str, number: int, seed: int, blank_id: int, unlike: int | None = None) -> Chosen:
    """`number` rows of a split (all, if it has fewer), a random choice that depends on the seed alone; none of class
    `unlike`."""
    table = data.split(split)
    order = KeyedNoise(seed, torch.arange(len(table)), draw=-7).uniform().argsort().numpy()
    if unlike is not None:
        order = order[np.asarray(table["label"])[order] != unlike]
    some = np.sort(order[:number])
    columns = [table[[int(i)]] for i in some]
    rows = []
    for column in columns:
        row = data.collate(column)["input_ids"][0].numpy()
        rows.append(row if data.fill or data.wrap else row[: int(column["length"][0])])
    labels = np.asarray(table["label"])[some] if "label" in table.column_names else None
    blanks = [masked_row(data, column, blank_id, causal=False, lends=True) for column in columns]
    ids = [np.asarray(column["input_ids"][0]) for column in columns]
    return Chosen(np.asarray(table["sample_id"])[some], ids, rows, blanks, data.latents.of(split)[some], labels)


@dataclass(frozen=True)
class DirectedSetting(Setting):
    """What every direction works with. truth: the exact distribution of the corpus, if it is known."""

    directed: Directed = Directed()
    split: str = ""
    number: int = 0
    truth: GroundTruth | None = None

    def chosen(self, unlike: int | None = None) -> Chosen:
        """Return the rows that are looked at, none of class `unlike`."""
        return choose(self.data, self.split, self.number, self.seed, self.blank_id, unlike)

    def written(
        self, rows: Sequence[np.ndarray], names_M: np.ndarray, told: Mapping[str, Tensor],
        changed: Callable[[Denoiser], Denoiser] = lambda model: model, seen: bool = False,
    ) -> list[Drawn]:  # fmt: skip
        """Return texts of `rows`, their masks filled in.

        Args:
            changed: what the sampler is to draw from, of the model.
            seen: whether these are the texts that are watched being written.
        """
        sampler = self.drawing.sampler

        def sample(model: Denoiser, *args: object, **cond: object) -> Trace:
            return sampler(changed(model), *args, **cond)

        watch = self.watch if seen else None
        return replace(self, drawing=replace(self.drawing, sampler=sample), watch=watch).fill(rows, names_M, told)


@dataclass(frozen=True)
class Outcome(Sampled):
    """What a direction found. agreement: with what was wanted, by what was told. latent_MKD: those that were drawn,
    standardised."""

    agreement: Mapping[str, Agreement] = field(default_factory=dict)
    latent_MKD: np.ndarray | None = None


@dataclass(frozen=True)
class Joint(Outcome):
    """What was found of texts that were drawn with their latents. comparison: their quality beside real texts."""

    comparison: Comparison | None = None


@dataclass(frozen=True)
class Direction:
    """The request to draw in a direction. find: what draws and measures; truth: as for `DirectedSetting`.

    Raises:
        ValueError: there is no split to take texts from.
    """

    directed: Directed
    split: str | None
    number: int
    truth: GroundTruth | None
    find: Callable[[DirectedSetting], Outcome]

    def __post_init__(self) -> None:
        if self.split is None:
            raise ValueError("eval.split=null: a direction takes its texts and latents from a split; choose one")

    @property
    def folder(self) -> str:
        """The folder of the results."""
        return self.directed.direction

    def __call__(self, setting: Setting) -> Outcome:
        """Draw with guidance, and measure."""
        data, drawing = setting.data, setting.drawing
        guided = replace(drawing, sampler=with_guidance(drawing.sampler, self.directed.latent.guidance))
        more = {"directed": self.directed, "split": self.split, "number": self.number, "truth": self.truth}
        outcome = self.find(DirectedSetting(**{**vars(setting), "drawing": guided, **more}))
        setting.keep(outcome.rows)
        known = {**asdict(self.directed), "data": data.name, "split": self.split,
                 "tokenizer": data.vocabulary.fingerprint, "latents": data.latents.metadata}  # fmt: skip
        return replace(outcome, protocol=known)


def hidden(latent_MKD: np.ndarray) -> dict[str, Tensor]:
    """What a text is told that is told nothing of its latent."""
    return {"latent": torch.from_numpy(latent_MKD), "latent_t": torch.ones(len(latent_MKD), dtype=torch.float64)}


def latents_told(true_MKD: np.ndarray, other_MKD: np.ndarray) -> dict[str, dict[str, Tensor]]:
    """What each text is told of a latent: the one meant for it, that of another text, none."""
    true, other = torch.from_numpy(true_MKD), torch.from_numpy(other_MKD)
    return {"true": {"latent": true}, "shuffled": {"latent": other}, "none": hidden(true_MKD)}


def l2t(setting: DirectedSetting) -> Outcome:
    """Texts given true latents, beside those given shuffled ones and none; all held against the latents' own texts."""
    chosen, reader = setting.chosen(), Reader(setting.data)
    partner_M = partners(len(chosen.ids), setting.seed)
    told = latents_told(chosen.latent_MKD, chosen.latent_MKD[partner_M])
    drawn = {name: setting.written(chosen.blanks, chosen.names_M, told[name], seen=name == "true")
             for name in VARIANTS}  # fmt: skip
    wanted, missing = [reader.content(ids) for ids in chosen.ids], reader.missing
    names, texts = reader.attribute_names, [reader.text(ids) for ids in chosen.ids]
    shown_MA = reader.attributes(chosen.ids) if names else None
    found, results = {}, {}
    for name, written in drawn.items():
        ids = [text.ids for text in written]
        f1 = mean(token_f1([reader.content(row) for row in ids], wanted))
        results[name] = {"token_f1": f1, "bleu": bleu([reader.text(row) for row in ids], texts)}
        if not missing:
            told_of = (names, reader.attributes(ids), shown_MA) if names else None
            found[name] = agreement(reader.latents(ids), chosen.latent_MKD, told_of)
            results[name] |= asdict(found[name])
    spelt = {name: [reader.text(text.ids) for text in written] for name, written in drawn.items()}
    rows = [{"sample_id": int(chosen.names_M[m]), "reference": texts[m], **{n: spelt[n][m] for n in VARIANTS},
             "ids": drawn["true"][m].ids, "steps": drawn["true"][m].steps, "evaluations": drawn["true"][m].evaluations}
            for m in range(len(texts))]  # fmt: skip
    evaluations = float(np.mean([text.evaluations for text in drawn["true"]]))
    results = {"texts": len(texts), **results, "encoder_missing": missing or None,
               "network_evaluations_per_sample": evaluations}  # fmt: skip
    return Outcome(results, rows, drawn["true"], {}, found)


def t2l(setting: DirectedSetting) -> Outcome:
    """Latents given texts, beside those given other texts and none; all held against the texts' own latents."""
    chosen, reader = setting.chosen(), Reader(setting.data)
    partner_M, every_M = partners(len(chosen.ids), setting.seed), np.arange(len(chosen.ids))
    how = setting.directed.latent
    asked = {"true": (every_M, how), "shuffled": (partner_M, how), "none": (every_M, replace(how, guidance=0.0))}
    drawn = {name: latents_of(setting, chosen.rows, chosen.blanks, chosen.names_M, *asked[name]) for name in VARIANTS}
    names = reader.attribute_names
    told = {name: (names, reader.attributes_of(found), reader.attributes_of(chosen.latent_MKD)) if names else None
            for name, found in drawn.items()}  # fmt: skip
    found = {name: agreement(drawn[name], chosen.latent_MKD, told[name]) for name in VARIANTS}
    rows = [{"sample_id": int(name), "text": reader.text(ids)}
            for name, ids in zip(chosen.names_M, chosen.ids, strict=True)]  # fmt: skip
    moments = {name: _moments(setting.data, latent) for name, latent in (("drawn", drawn["true"]),
                                                                         ("real", chosen.latent_MKD))}  # fmt: skip
    evaluations = how.steps * (1 if how.guidance in (0, 1) else 2)
    results = {"texts": len(rows), **{name: asdict(found[name]) for name in VARIANTS}, "moments": moments,
               "network_evaluations_per_sample": evaluations}  # fmt: skip
    return Outcome(results, rows, [], {}, found, drawn["true"])


def latents_of(
    setting: Setting, rows: Sequence[np.ndarray], blanks: Sequence[np.ndarray], names_M: np.ndarray,
    text_M: np.ndarray, how: LatentSteps,
) -> np.ndarray:  # fmt: skip
    """(M, K, D) latents drawn given the text `rows[text_M[m]]`, under the noise of row m."""
    model, pad_id = setting.diffusion.model, setting.data.vocabulary.pad_id

    def draw_from(here: slice) -> list[np.ndarray]:
        device = setting.diffusion.device
        x_BL, cond = padded([rows[m] for m in text_M[here]], pad_id)
        hidden_BL, _ = padded([blanks[m] for m in text_M[here]], pad_id)
        noise = KeyedNoise(setting.seed, torch.from_numpy(names_M[here]).to(device)).part(1)
        told = {name: value.to(device) for name, value in cond.items()}
        out = gaussian.sample(model, x_BL.to(device), noise, how, masked_BL=hidden_BL.to(device), **told)
        return list(out.latent_BKD.cpu().numpy())

    return np.stack(setting.in_batches(draw_from, len(names_M)))


def _moments(data: TextData, latent_MKD: np.ndarray) -> dict[str, float]:
    norm_M = np.linalg.norm(data.latents.restore(latent_MKD).reshape(len(latent_MKD), -1), axis=1)
    return {"mean": float(latent_MKD.mean()), "standard deviation": float(latent_MKD.std(axis=0).mean()),
            "norm": float(norm_M.mean()), "spread of norms": float(norm_M.std())}  # fmt: skip


def both(setting: DirectedSetting) -> Outcome:
    """Texts with their latents out of nothing, held against real texts and against each other."""
    data, reader, seed, directed = setting.data, Reader(setting.data), setting.seed, setting.directed
    drawing = setting.drawing
    rows = rows_to_fill(setting.diffusion, data, drawing.given, setting.number, seed)
    names_M = np.arange(len(rows))

    def draw_from(here: slice) -> list[tuple[Drawn, np.ndarray]]:
        kept: list[Tensor] = []
        watch, sampler = setting.watch if here.start == 0 else None, _both(directed, drawing.sampler, kept)
        drawn = replace(setting, drawing=replace(drawing, sampler=sampler)).draw_batch(
            rows[here], names_M[here], watch, {}
        )
        return list(zip(drawn, kept[0].cpu().numpy(), strict=True))

    pairs = setting.in_batches(draw_from, len(rows))
    drawn, latent_MKD = [text for text, _ in pairs], np.stack([latent for _, latent in pairs])
    ids = [text.ids for text in drawn]
    comparison = compare(ids, real_texts(data, setting.split, len(ids), seed), data, None)
    missing, names, found = reader.missing, reader.attribute_names, dict[str, Agreement]()
    if not missing:
        read_MKD, partner_M = reader.latents(ids), partners(len(ids), seed)
        for name, other_M in (("true", names_M), ("shuffled", partner_M)):
            wanted = latent_MKD[other_M]
            told = (names, reader.attributes(ids), reader.attributes_of(wanted)) if names else None
            found[name] = agreement(read_MKD, wanted, told)
    evaluations = float(np.mean([text.evaluations for text in drawn]))
    results = {**comparison.results(), "agreement": {name: asdict(f) for name, f in found.items()},
               "encoder_missing": missing or None, "network_evaluations_per_sample": evaluations}  # fmt: skip
    lines = [{"sample": m, "text": reader.text(text.ids), "ids": text.ids, "steps": text.steps,
              "evaluations": text.evaluations} for m, text in enumerate(drawn)]  # fmt: skip
    return Joint(results, lines, drawn, {}, found, latent_MKD, comparison)


def _both(directed: Directed, sampler: Callable[..., Trace], kept: list[Tensor]) -> Callable[..., Trace]:
    """A sampler of texts that draws latents too, and leaves them in `kept`."""
    how = directed.latent

    def simultaneous(model: object, x_BL: Tensor, noise: KeyedNoise, **cond: Tensor) -> Trace:
        out = joint.sample(
            model, x_BL, noise, steps=directed.steps, eta=how.eta, choice=directed.choice,
            noise_removal=directed.noise_removal, **cond,
        )  # fmt: skip
        kept.append(out.latent_BKD)
        return out.text

    def latent_first(
        model: object, x_BL: Tensor, noise: KeyedNoise, watch: Watcher | None = None, **cond: Tensor
    ) -> Trace:
        marginal = replace(how, guidance=0.0)
        drawn = gaussian.sample(model, x_BL, noise.part(1), marginal, masked_BL=x_BL, **cond)
        kept.append(drawn.latent_BKD)
        out = sampler(model, x_BL, noise, watch=watch, **cond, latent=drawn.latent_BKD)
        out.evaluations_B += drawn.evaluations_B
        return out

    return simultaneous if directed.joint_order == "simultaneous" else latent_first
