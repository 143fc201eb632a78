"""Editing by latents: some tokens of a text are masked and written anew under another latent, the rest stays as it is.

Shape suffixes: M texts, K latent tokens, D numbers of each, C classes, P points of a way.
"""

from __future__ import annotations

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
from palimpsest.evaluation.centroids import Centroids, Nearest, fit_centroids, slerp
from palimpsest.evaluation.directions import (
    VARIANTS,
    Chosen,
    DirectedSetting,
    EditRules,
    Outcome,
    hidden,
    latents_told,
)
from palimpsest.evaluation.drawing import Drawn
from palimpsest.evaluation.latent_measures import Reader, cosines, edits, flat, partners
from palimpsest.evaluation.naive_bayes import naive_bayes
from palimpsest.evaluation.sampling_inputs import padded
from palimpsest.samplers.positions import Selection, select

_CHUNK = 4096
_WAY_TEXTS = 64  # SSS and MTS look at so many texts, each at every point of its way


def labelled_latents(data: TextData) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Latents of the train split with their labels, some at a time: ((N, K, D), (N,))."""
    latents, label_M = data.latents.of("train"), np.asarray(data.split("train")["label"])
    for start in range(0, len(label_M), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(label_M)))
        yield latents[rows], label_M[rows]


def new_latents(
    rules: EditRules, source_MKD: np.ndarray, label_M: np.ndarray, wanted_M: np.ndarray, data: TextData
) -> np.ndarray:
    """(M, K, D) float32: the latent that each text is to get, found among the encoder's own vectors. Standardised ones
    have no mean: a centroid of them that is rescaled to their length would be nothing but what sets its class apart,
    three times as strong as in any text."""
    vectors, source_MW = data.latents.vectors, data.latents.vectors(source_MKD)
    train = ((vectors(latent_NKD), label_N) for latent_NKD, label_N in labelled_latents(data))
    if rules.target == "neighbour":
        nearest = Nearest(source_MW, wanted_M)
        for vector_NW, label_N in train:
            nearest.see(vector_NW, label_N)
        found_MW = nearest.found_MD
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
    """Of the class that is named, None where none is.

    Raises:
        ValueError: there is no such class.
    """
    known = {None: None, **{str(k): k for k in range(len(names))}, **{name: k for k, name in enumerate(names)}}
    typed = None if to_class is None else str(to_class)
    if typed not in known:
        raise ValueError(f"{key}={to_class} is none of the classes of these texts: {', '.join(names)}")
    return known[typed]


@dataclass(frozen=True)
class Judging:
    """What says of which class a text is. posterior: token ids -> p(class | text), (M, C); zeros for a text that no
    class could have. readable: whether it can tell such texts."""

    name: str
    posterior: Callable[[Sequence[Sequence[int]]], np.ndarray]
    readable: bool


def judging(setting: DirectedSetting, reader: Reader) -> Judging:
    """The corpus's own exact posterior where it has one, else naive Bayes on the training texts."""
    data, truth = setting.data, setting.truth
    if truth is not None:

        def exact(rows: Sequence[Sequence[int]]) -> np.ndarray:
            return np.nan_to_num(truth.posterior([reader.text(row) for row in rows]))

        return Judging("the corpus's exact posterior", exact, True)
    train = data.split("train")
    ids = [np.asarray(reader.content(row)) for row in train["input_ids"]]
    predict = naive_bayes(ids, np.asarray(train["label"]), data.vocabulary.size)
    return Judging("naive Bayes, uni- and bigrams",
                   lambda rows: predict([np.asarray(reader.content(row)) for row in rows]), False)  # fmt: skip


@dataclass(frozen=True)
class Edited:
    """What an edit amounts to. control: texts that are judged to be of the wanted class; of_read: of those that the
    judge can read, None where it can read any, or none. changed: share of a text's tokens that are other ones.
    distance: of edit, in tokens. unread: share of texts that the judge can not read, None where it can read any.
    toward: cosine of the edited text's latent with the wanted one, None without an encoder."""

    control: Share
    of_read: Share | None
    changed: Estimate
    distance: Estimate
    unread: float | None
    toward: Estimate | None


@dataclass(frozen=True)
class Way:
    """Texts at points of the great circle between a text's latent and the wanted one. sss: mean cosine of the latents
    of neighbouring texts, of those that both have one; None without an encoder, or any such. seen: the share of
    neighbours that do. mts: share of steps on which p(wanted class) strictly rises."""

    sss: Estimate | None
    seen: float
    mts: Estimate


@dataclass(frozen=True)
class Edit(Outcome):
    """Texts that were edited. edited, ways: by what was told. before: the share of texts that were judged to be of the
    wanted class already. masked: the share of their tokens that was masked."""

    edited: Mapping[str, Edited] = field(default_factory=dict)
    ways: Mapping[str, Way] = field(default_factory=dict)
    before: Share | None = None
    judge: Judging | None = None
    masked: Estimate | None = None


class Editor:
    """Edits of some rows, all with the same masks and the same noise, whatever latent they are told."""

    def __init__(self, setting: DirectedSetting, chosen: Chosen, target_MKD: np.ndarray) -> None:
        self.setting, self.chosen, self.target_MKD = setting, chosen, target_MKD
        eligible = special_ids(setting.data.vocabulary)
        self.eligible = [(blank != row) & ~np.isin(row, list(eligible))
                         for blank, row in zip(chosen.blanks, chosen.rows, strict=True)]  # fmt: skip
        found = setting.in_batches(self._select, len(chosen.rows))
        self.masked, shares, evaluations = (list(column) for column in zip(*found, strict=True))
        self.share_M, self.selecting = np.array(shares), float(np.mean(evaluations))

    def _select(self, here: slice) -> list[tuple[np.ndarray, float, int]]:
        setting, rows, device = self.setting, self.chosen.rows[here], self.setting.diffusion.device
        rules, chosen = setting.directed.edit, self.chosen
        x_BL, cond = padded(rows, setting.data.vocabulary.pad_id)
        may_BL, _ = padded([may.astype(np.int64) for may in self.eligible[here]], 0)
        noise = KeyedNoise(setting.seed, torch.from_numpy(chosen.names_M[here]).to(device)).part(2)
        source, target = (torch.from_numpy(z_MKD[here]).to(device) for z_MKD in (chosen.latent_MKD, self.target_MKD))
        cond = {name: value.to(device) for name, value in cond.items()}
        found: Selection = select(
            setting.diffusion.model, x_BL.to(device), may_BL.bool().to(device), noise, positions=rules.positions,
            rate=rules.rate, source=source, target=target, **cond,
        )  # fmt: skip
        masked_BL, share_B, spent_B = found.masked_BL.cpu(), found.share_B.tolist(), found.evaluations_B.tolist()
        return [(masked_BL[i, : len(row)].numpy(), share_B[i], spent_B[i]) for i, row in enumerate(rows)]

    def write(self, told: Mapping[str, Tensor], some: np.ndarray | None = None, seen: bool = False) -> list[Drawn]:
        """The texts (or `some` of them), each told what `told` says of it. What is not masked stays; the sampler begins
        at the time at which the share that is masked is expected."""
        chosen, some = self.chosen, np.arange(len(self.chosen.rows)) if some is None else some
        blank_id, schedule = self.setting.blank_id, self.setting.diffusion.model.schedule
        rows = [np.where(self.masked[m], blank_id, chosen.rows[m]) for m in some]
        if not any(self.masked[m].any() for m in some):
            return [_untouched(chosen.ids[m].tolist()) for m in some]
        special = tuple(sorted(special_ids(self.setting.data.vocabulary)))
        begin_M = schedule.t_from_alpha(1 - torch.from_numpy(self.share_M[some])).clamp(0.0, 1.0)
        told = {**told, "begin_B": begin_M}
        return self.setting.written(rows, chosen.names_M[some], told, lambda model: WithoutTokens(model, special), seen)


def _untouched(ids: list[int]) -> Drawn:
    given = len(ids)
    return Drawn(ids, [0] * given, [1.0] * given, list(range(given)), 0, 0)


def edit(setting: DirectedSetting) -> Outcome:
    """Texts written over towards another class, beside the same told the latent of some other text, and none.

    Raises:
        ValueError: there are no classes to go to, or not two texts that are of another.
    """
    data, rules, reader = setting.data, setting.directed.edit, Reader(setting.data)
    if data.label_names is None:
        raise ValueError(f"sampling.direction=edit takes texts to another class, and those of data={data.name} have "
                         "none; choose data with labels")  # fmt: skip
    to_class = class_number(rules.to_class, data.label_names)
    chosen = setting.chosen(unlike=to_class)
    label_M = chosen.label_M
    wanted_M = (label_M + 1) % len(data.label_names) if to_class is None else np.full_like(label_M, to_class)
    other_MKD = chosen.latent_MKD[partners(len(chosen.ids), setting.seed)]
    target_MKD = new_latents(rules, chosen.latent_MKD, label_M, wanted_M, data)
    editor, judge = Editor(setting, chosen, target_MKD), judging(setting, reader)
    told = latents_told(target_MKD, other_MKD)
    drawn = {name: editor.write(told[name], seen=name == "true") for name in VARIANTS}
    found = {name: _edited(drawn[name], editor, wanted_M, reader, judge) for name in VARIANTS}
    before = share(judge.posterior(chosen.ids).argmax(1) == wanted_M)
    some = np.arange(min(_WAY_TEXTS, len(chosen.ids)))
    ways = {name: _way(told[name], editor, some, wanted_M, reader, judge) for name in VARIANTS}
    masked, names = mean(editor.share_M), data.label_names
    rows = [{"sample_id": int(chosen.names_M[m]), "class": names[chosen.label_M[m]], "wanted": names[wanted_M[m]],
             "source": reader.text(chosen.ids[m]), "masked": np.flatnonzero(editor.masked[m]).tolist(),
             **{name: reader.text(drawn[name][m].ids) for name in VARIANTS}, "ids": drawn["true"][m].ids,
             "source_ids": chosen.ids[m].tolist()} for m in range(len(chosen.ids))]  # fmt: skip
    results = {
        "texts": len(rows), "judge": judge.name, "judged_wanted_before": asdict(before),
        "masked": masked, "network_evaluations_for_positions": editor.selecting,
        "network_evaluations_per_sample": float(np.mean([text.evaluations for text in drawn["true"]])),
        **{name: {**asdict(found[name]), "way": asdict(ways[name])} for name in VARIANTS}, "way_texts": len(some),
    }  # fmt: skip
    return Edit(results, rows, drawn["true"], {}, edited=found, ways=ways, before=before, judge=judge, masked=masked)


def _edited(drawn: Sequence[Drawn], editor: Editor, wanted_M: np.ndarray, reader: Reader, judge: Judging) -> Edited:
    ids = [text.ids for text in drawn]
    posterior_MC = judge.posterior(ids)
    changed_M = np.array([(old != np.array(new)).sum() / max(may.sum(), 1) for old, new, may in
                          zip(editor.chosen.ids, ids, editor.eligible, strict=True)])  # fmt: skip
    old, new = ([reader.content(row) for row in rows] for rows in (editor.chosen.ids, ids))
    read_M = posterior_MC.sum(1) > 0
    right_M = (posterior_MC.argmax(1) == wanted_M) & read_M
    of_read = share(right_M[read_M]) if judge.readable and read_M.any() else None
    unread = float((~read_M).mean()) if judge.readable else None
    toward = None if reader.missing else mean(cosines(reader.latents(ids), editor.target_MKD))
    return Edited(share(right_M), of_read, mean(changed_M), mean(edits(new, old)), unread, toward)


def _way(
    told: Mapping[str, Tensor], editor: Editor, some: np.ndarray, wanted_M: np.ndarray, reader: Reader, judge: Judging
) -> Way:
    """Of `some` texts, from their own latent to that of `told`, or nowhere where that is hidden."""
    known, latents = editor.setting.data.latents, []
    ends = [known.vectors(end_MKD[some]) for end_MKD in (editor.chosen.latent_MKD, told["latent"].numpy())]
    p_MP = []
    for point in np.linspace(0.0, 1.0, editor.setting.directed.edit.path):
        latent_MKD = known.space.standardise(slerp(*ends, point))
        now = hidden(latent_MKD) if "latent_t" in told else {"latent": torch.from_numpy(latent_MKD)}
        ids = [text.ids for text in editor.write(now, some)]
        p_MP.append(judge.posterior(ids)[np.arange(len(some)), wanted_M[some]])
        latents += [] if reader.missing else [reader.latents(ids)]
    return smoothness(latents, np.stack(p_MP, axis=1))


def smoothness(latents: Sequence[np.ndarray], p_MP: np.ndarray) -> Way:
    """SSS and MTS of texts along a way. latents: (M, K, D) for each of P points, zeros for a text that has none, or
    nothing at all. p_MP: p(wanted class). Both are 1 for texts that move nowhere if a step that stays counts as a rise;
    here it does not."""
    mts = mean((np.diff(p_MP, axis=1) > 0).mean(1))
    if not latents:
        return Way(None, 0.0, mts)
    has_MP = np.stack([flat(latent_MKD).any(1) for latent_MKD in latents], axis=1)
    cosine_MS = np.stack([cosines(a, b) for a, b in itertools.pairwise(latents)], axis=1)
    seen_MS = has_MP[:, 1:] & has_MP[:, :-1]
    some_M = seen_MS.any(1)
    sss_M = ((cosine_MS * seen_MS).sum(1)[some_M] / seen_MS.sum(1)[some_M]).round(12)  # 1 is exactly 1
    return Way(mean(sss_M) if some_M.any() else None, float(seen_MS.mean()), mts)
