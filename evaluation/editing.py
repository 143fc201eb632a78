"""Editing by latents: some tokens of a text are masked and resampled conditioned on another latent.

Shape suffixes: M texts, K latent tokens, D numbers of each, C classes, P points of a path.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from palimpsest.common.metrics import Estimate, Share, mean, share
from palimpsest.common.randomness import KeyedNoise
from palimpsest.data.passages import special_ids
from palimpsest.dataloader import TextData
from palimpsest.denoisers import WithoutTokens
from palimpsest.evaluation.centroids import Centroids, fit_centroids, nearest_of_class, slerp
from palimpsest.evaluation.conditional_generation import (
    VARIANTS,
    ChosenRows,
    ConditionalContext,
    ConditionalResult,
    EditRules,
    latent_conditions,
    unconditional,
)
from palimpsest.evaluation.drawing import SampledTokens
from palimpsest.evaluation.edited_tokens import Selection, select
from palimpsest.evaluation.latent_measures import Reader, cosines, edits, flat, partners
from palimpsest.evaluation.naive_bayes import naive_bayes
from palimpsest.evaluation.sampling_inputs import padded

_CHUNK = 4096
_PATH_TEXTS = 64  # SSS and MTS use so many texts, each at every point of its path


def labelled_latents(data: TextData) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield latents of the train split with their labels, in chunks: ((N, K, D), (N,))."""
    latents, label_M = data.latents.of("train"), np.asarray(data.split("train")["label"])
    for start in range(0, len(label_M), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(label_M)))
        yield latents[rows], label_M[rows]


def new_latents(
    rules: EditRules, source_MKD: np.ndarray, label_M: np.ndarray, wanted_M: np.ndarray, data: TextData
) -> np.ndarray:
    """Return the target latent of each text, (M, K, D) float32.

    Targets are found among the encoder's own vectors: standardised vectors have no mean, so a rescaled class centroid
    of them would exaggerate the class about threefold.
    """
    vectors, source_MW = data.latents.vectors, data.latents.vectors(source_MKD)
    train = ((vectors(latent_NKD), label_N) for latent_NKD, label_N in labelled_latents(data))
    if rules.target == "neighbour":
        found_MW = nearest_of_class(train, source_MW, wanted_M)
    else:
        found_MW = _by_centroids(rules, source_MW, label_M, wanted_M, fit_centroids(train, len(data.label_names)))
    return data.latents.space.standardise(found_MW)


def _by_centroids(
    rules: EditRules, source_MW: np.ndarray, label_M: np.ndarray, wanted_M: np.ndarray, centroids: Centroids
) -> np.ndarray:
    if rules.target == "shift":
        return source_MW + rules.alpha * (centroids.mean_CD[wanted_M] - centroids.mean_CD[label_M])
    target_MW = centroids.rescaled_CD[wanted_M]
    return slerp(source_MW, target_MW, rules.alpha) if rules.target == "slerp" else target_MW


def class_number(to_class: int | str | None, names: Sequence[str], key: str = "sampling.edit_class") -> int | None:
    """Return the number of a class given by number or name; None for None.

    Raises ValueError if there is no such class.
    """
    numbers = {None: None, **{str(k): k for k in range(len(names))}, **{name: k for k, name in enumerate(names)}}
    typed = None if to_class is None else str(to_class)
    if typed not in numbers:
        raise ValueError(f"{key}={to_class} is none of the classes of these texts: {', '.join(names)}")
    return numbers[typed]


@dataclass(frozen=True)
class TextClassifier:
    """Classifies edited texts."""

    name: str
    posterior: Callable[[Sequence[Sequence[int]]], np.ndarray]  # ids -> p(class | text), (M, C); 0 if impossible
    readable: bool  # whether it recognises impossible texts


def text_classifier(context: ConditionalContext, reader: Reader) -> TextClassifier:
    """Return the exact posterior of the corpus if it is known, else naive Bayes on the training texts."""
    data, truth = context.data, context.truth
    if truth is not None:

        def exact(rows: Sequence[Sequence[int]]) -> np.ndarray:
            return np.nan_to_num(truth.posterior([reader.text(row) for row in rows]))

        return TextClassifier("the corpus's exact posterior", exact, True)
    train = data.split("train")
    ids = [reader.content(row) for row in train["input_ids"]]
    predict = naive_bayes(ids, np.asarray(train["label"]), data.vocabulary.size)
    return TextClassifier("naive Bayes, uni- and bigrams", lambda rows: predict(list(map(reader.content, rows))), False)


@dataclass(frozen=True)
class EditMeasures:
    """Measures of edited texts."""

    control: Share  # texts classified as the target class
    of_read: Share | None  # the same among possible texts; None if unknown
    changed: Estimate  # share of a text's tokens
    distance: Estimate  # edit distance in tokens
    unread: float | None  # share of impossible texts; None if unknown
    toward: Estimate | None  # cosine of the edited text's latent with the target; None without an encoder


@dataclass(frozen=True)
class LatentPath:
    """Measures of texts along the great circle from a text's latent to the target latent."""

    sss: Estimate | None  # mean cosine of neighbouring latents; None without an encoder or such latents
    seen: float  # share of neighbours that both have a latent
    mts: Estimate  # share of steps on which p(target class) strictly rises


@dataclass(frozen=True)
class EditResult(ConditionalResult):
    """Edited texts."""

    edited: Mapping[str, EditMeasures] = field(default_factory=dict)  # by condition
    paths: Mapping[str, LatentPath] = field(default_factory=dict)  # by condition
    before: Share | None = None  # texts classified as the target class before
    classifier: TextClassifier | None = None


class Editor:
    """Edits rows with the same masks and the same noise, whatever the conditioning."""

    def __init__(
        self, context: ConditionalContext, chosen: ChosenRows, target_MKD: np.ndarray, wanted_M: np.ndarray
    ) -> None:
        self.context, self.chosen = context, chosen
        self.target_MKD, self.wanted_M = target_MKD, wanted_M
        self.reader = Reader(context.data)
        self.classifier = text_classifier(context, self.reader)
        special = list(special_ids(context.data.vocabulary))
        self.eligible = [(blank != row) & ~np.isin(row, special)
                         for blank, row in zip(chosen.blanks, chosen.rows, strict=True)]  # fmt: skip
        selected = context.in_batches(self._select, len(chosen.rows))
        self.masked, shares, evaluations = (list(column) for column in zip(*selected, strict=True))
        self.share_M, self.selection_evaluations = np.array(shares), float(np.mean(evaluations))

    def _select(self, part: slice) -> list[tuple[np.ndarray, float, int]]:
        context, chosen = self.context, self.chosen
        rules, device = context.settings.edit, context.diffusion.device
        rows = chosen.rows[part]
        x_BL, cond = padded(rows, context.data.vocabulary.pad_id)
        eligible_BL, _ = padded([eligible.astype(np.int64) for eligible in self.eligible[part]], 0)
        noise = KeyedNoise(context.seed, torch.from_numpy(chosen.key_M[part]).to(device)).part(2)
        cond["source"], cond["target"] = map(torch.from_numpy, (chosen.latent_MKD[part], self.target_MKD[part]))
        cond = {name: value.to(device) for name, value in cond.items()}
        model = context.diffusion.model
        eligible_BL = eligible_BL.bool().to(device)
        how = {"positions": rules.positions, "rate": rules.rate}
        selected: Selection = select(model, x_BL.to(device), eligible_BL, noise, **how, **cond)
        masked_BL = selected.masked_BL.cpu()
        share_B, evaluations_B = selected.share_B.tolist(), selected.evaluations_B.tolist()
        return [(masked_BL[i, : len(row)].numpy(), share_B[i], evaluations_B[i]) for i, row in enumerate(rows)]

    def write(
        self, conditioning: Mapping[str, Tensor], some: np.ndarray | None = None, watched: bool = False
    ) -> list[SampledTokens]:
        """Write new tokens at the masked positions of the texts; the other tokens stay.

        Sampling begins at the time whose expected share of masks is that of the text.

        Args:
            conditioning: class or latent of each text, for the network.
            some: numbers of the texts to edit; None for all.
            watched: show the texts while they are written.
        """
        chosen, some = self.chosen, np.arange(len(self.chosen.rows)) if some is None else some
        blank_id, schedule = self.context.blank_id, self.context.diffusion.model.schedule
        rows = [np.where(self.masked[m], blank_id, chosen.rows[m]) for m in some]
        if not any(self.masked[m].any() for m in some):
            texts = [chosen.ids[m].tolist() for m in some]
            return [SampledTokens(ids, [0] * len(ids), [1.0] * len(ids), list(range(len(ids))), 0, 0) for ids in texts]
        special = tuple(sorted(special_ids(self.context.data.vocabulary)))
        begin_M = schedule.t_from_alpha(1 - torch.from_numpy(self.share_M[some])).clamp(0.0, 1.0)
        conditioning = {**conditioning, "begin_B": begin_M}
        return self.context.sample_masked(
            rows, chosen.key_M[some], conditioning, lambda model: WithoutTokens(model, special), watched
        )

    def measure(self, sampled: Sequence[SampledTokens]) -> EditMeasures:
        """Compare edited texts with the original ones."""
        ids, reader = [text.ids for text in sampled], self.reader
        posterior_MC = self.classifier.posterior(ids)
        changed_M = [
            (old != np.array(new)).sum() / max(eligible.sum(), 1)
            for old, new, eligible in zip(self.chosen.ids, ids, self.eligible, strict=True)
        ]
        old, new = ([reader.content(row) for row in rows] for rows in (self.chosen.ids, ids))
        read_M = posterior_MC.sum(1) > 0
        right_M = (posterior_MC.argmax(1) == self.wanted_M) & read_M
        of_read = share(right_M[read_M]) if self.classifier.readable and read_M.any() else None
        unread = float((~read_M).mean()) if self.classifier.readable else None
        toward = None if reader.missing else mean(cosines(reader.latents(ids), self.target_MKD))
        return EditMeasures(share(right_M), of_read, mean(changed_M), mean(edits(new, old)), unread, toward)

    def path(self, conditioning: Mapping[str, Tensor], some: np.ndarray) -> LatentPath:
        """Measure the path of `some` texts from their own latent to that of `conditioning`."""
        encoder, latents = self.context.data.latents, []
        ends = [encoder.vectors(end_MKD[some]) for end_MKD in (self.chosen.latent_MKD, conditioning["latent"].numpy())]
        p_MP = []
        for point in np.linspace(0.0, 1.0, self.context.settings.edit.path):
            latent_MKD = encoder.space.standardise(slerp(*ends, point))
            here = unconditional(latent_MKD) if "latent_t" in conditioning else {"latent": torch.from_numpy(latent_MKD)}
            ids = [text.ids for text in self.write(here, some)]
            p_MP.append(self.classifier.posterior(ids)[np.arange(len(some)), self.wanted_M[some]])
            latents += [] if self.reader.missing else [self.reader.latents(ids)]
        return smoothness(latents, np.stack(p_MP, axis=1))


def edit(context: ConditionalContext) -> ConditionalResult:
    """Edit texts towards another class; compare with edits under the latent of another text, and under none.

    Raises ValueError if the data have no classes, or fewer than two texts of other classes.
    """
    data, rules = context.data, context.settings.edit
    if data.label_names is None:
        raise ValueError(
            f"sampling.direction=edit needs classes, and the texts of data={data.name} have none; "
            "choose data with labels"
        )
    to_class = class_number(rules.to_class, data.label_names)
    chosen = context.chosen(unlike=to_class)
    label_M = chosen.label_M
    wanted_M = (label_M + 1) % len(data.label_names) if to_class is None else np.full_like(label_M, to_class)
    other_MKD = chosen.latent_MKD[partners(len(chosen.ids), context.seed)]
    target_MKD = new_latents(rules, chosen.latent_MKD, label_M, wanted_M, data)
    editor = Editor(context, chosen, target_MKD, wanted_M)
    classifier, reader = editor.classifier, editor.reader
    conditioning = latent_conditions(target_MKD, other_MKD)
    sampled = {name: editor.write(conditioning[name], watched=name == "true") for name in VARIANTS}
    measures = {name: editor.measure(sampled[name]) for name in VARIANTS}
    before = share(classifier.posterior(chosen.ids).argmax(1) == wanted_M)
    some = np.arange(min(_PATH_TEXTS, len(chosen.ids)))
    paths = {name: editor.path(conditioning[name], some) for name in VARIANTS}
    names = data.label_names
    rows = [{"sample_id": int(chosen.key_M[m]), "class": names[chosen.label_M[m]], "wanted": names[wanted_M[m]],
             "source": reader.text(chosen.ids[m]), "masked": np.flatnonzero(editor.masked[m]).tolist(),
             **{name: reader.text(sampled[name][m].ids) for name in VARIANTS}, "ids": sampled["true"][m].ids,
             "source_ids": chosen.ids[m].tolist()} for m in range(len(chosen.ids))]  # fmt: skip
    results = {
        "texts": len(rows), "judge": classifier.name, "judged_wanted_before": asdict(before),
        "masked": mean(editor.share_M), "network_evaluations_for_positions": editor.selection_evaluations,
        "network_evaluations_per_sample": float(np.mean([text.evaluations for text in sampled["true"]])),
        **{name: {**asdict(measures[name]), "way": asdict(paths[name])} for name in VARIANTS}, "way_texts": len(some),
    }  # fmt: skip
    return EditResult(
        results, rows, sampled["true"], {}, edited=measures, paths=paths, before=before, classifier=classifier
    )


def smoothness(latents: Sequence[np.ndarray], p_MP: np.ndarray) -> LatentPath:
    """Return SSS and MTS of texts along a path of P points. MTS counts strict rises, so that constant texts score 0.

    latents: (M, K, D) for each point, zeros for a text without one; empty without an encoder. p_MP: p(target class).
    """
    mts = mean((np.diff(p_MP, axis=1) > 0).mean(1))
    if not latents:
        return LatentPath(None, 0.0, mts)
    has_MP = np.stack([flat(latent_MKD).any(1) for latent_MKD in latents], axis=1)
    cosine_MS = np.stack([cosines(a, b) for a, b in itertools.pairwise(latents)], axis=1)
    seen_MS = has_MP[:, 1:] & has_MP[:, :-1]
    some_M = seen_MS.any(1)
    sss_M = ((cosine_MS * seen_MS).sum(1)[some_M] / seen_MS.sum(1)[some_M]).round(12)  # 1 is exactly 1
    return LatentPath(mean(sss_M) if some_M.any() else None, float(seen_MS.mean()), mts)
