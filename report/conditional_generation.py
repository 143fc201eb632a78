"""Report of conditional generation: tables with the controls, and example texts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from palimpsest.common.metrics import Estimate, Share
from palimpsest.data.tokenizers import token_strings
from palimpsest.evaluation.conditional_generation import VARIANTS, ConditionalResult, JointResult
from palimpsest.evaluation.editing import EditResult
from palimpsest.evaluation.latent_measures import Agreement
from palimpsest.report.denoising import Sample
from palimpsest.report.formatting import Metric, percent
from palimpsest.report.free_texts import comparison_lines, comparison_section
from palimpsest.report.report import Report

TITLES = {"l2t": "Texts from latents", "t2l": "Latents from texts", "joint": "Texts with their latents",
          "edit": "Texts edited by their latents"}  # fmt: skip
_TITLES = {"true": "its own", "shuffled": "another's", "none": "none"}
_Rows = Sequence[Mapping[str, object]]
_ABOUT_CONTROLS = (
    "Two controls use the same noise: the condition of another text, and none. All know the length of a text. "
    "Retrieval: texts whose wanted latent is among the k nearest of all wanted ones, by cosine, with 95 % intervals."
)


def _cell(value: object) -> object:
    """Return a number as tables show it."""
    if isinstance(value, Share):
        return percent(value)
    return Metric.of("", value) if isinstance(value, Estimate) else value


def direction_report(
    report: Report, found: ConditionalResult, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the sections of `found`, with the texts of `samples`."""
    rows = found.rows[: max(len(samples), 1)]
    if isinstance(found, EditResult):
        _edits(report, found, rows, tokenizer)
    elif isinstance(found, JointResult):
        _joint(report, found, rows)
    elif found.protocol["direction"] == "l2t":
        _texts_from_latents(report, found, rows)
    else:
        _latents_from_texts(report, found)
    if samples:
        report.samples(samples)


def direction_lines(found: ConditionalResult) -> str:
    """Return the lines for a terminal."""
    if isinstance(found, EditResult):
        return _edit_lines(found)
    if isinstance(found, JointResult):
        return f"{comparison_lines(found.comparison)}\n{_agreement_lines({}, found.agreement)}"
    return _agreement_lines(found.results, found.agreement)


def titled(found: ConditionalResult, samples: Sequence[Sample]) -> list[Sample]:
    """Return `samples`, those of edits with titles that name the target class."""
    if not isinstance(found, EditResult):
        return list(samples)
    return [replace(sample, title=f"{row['class']} → {row['wanted']} · {len(row['masked'])} tokens written anew")
            for sample, row in zip(samples, found.rows, strict=False)]  # fmt: skip


def _texts_from_latents(report: Report, found: ConditionalResult, rows: _Rows) -> None:
    overlaps = {name: found.results[name] for name in VARIANTS}
    more = {name: {"token F1": one["token_f1"], "BLEU": one["bleu"]} for name, one in overlaps.items()}
    _agreement(report, found.agreement, more, found.results["encoder_missing"])
    _examples(
        report,
        ["the latent's own text", "written from it", "from another's", "from none"],
        [(row["reference"], *(row[name] for name in VARIANTS)) for row in rows],
    )


def _latents_from_texts(report: Report, found: ConditionalResult) -> None:
    moments = found.results["moments"]
    _agreement(report, found.agreement, {}, None)
    cells = [(side, *values.values()) for side, values in moments.items()]
    report.table(["latents", *moments["real"]], cells, "Standardised numbers; norms in the encoder's own scale.")


def _joint(report: Report, found: JointResult, rows: _Rows) -> None:
    comparison_section(report, found.comparison)
    _agreement(report, found.agreement, {}, found.results["encoder_missing"])
    _examples(report, ["texts"], [(row["text"],) for row in rows])


def _edits(report: Report, found: EditResult, texts: _Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    edited, paths = found.edited, found.paths
    report.section("Editing", _ABOUT_EDITS.format(found.classifier.name, 100 * found.before.value))
    report.metrics([Metric.of("tokens masked", found.results["masked"], "%", scale=100)])
    rows = [("control, %", *(_cell(edited[name].control) for name in VARIANTS)),
            ("tokens changed, share", *(_cell(edited[name].changed) for name in VARIANTS)),
            ("edit distance, tokens", *(_cell(edited[name].distance) for name in VARIANTS)),
            ("cosine with the wanted latent", *(_cell(edited[name].toward) for name in VARIANTS)),
            ("SSS", *(_cell(paths[name].sss) for name in VARIANTS)),
            ("neighbours that both have a latent, %", *(100 * paths[name].seen for name in VARIANTS)),
            ("MTS", *(_cell(paths[name].mts) for name in VARIANTS))]  # fmt: skip
    if found.classifier.readable:
        rows.insert(1, ("control of the texts that can be read, %", *(_cell(edited[n].of_read) for n in VARIANTS)))
        rows.append(("texts that the corpus could not write, %", *(100 * edited[n].unread for n in VARIANTS)))
    report.table(["condition", "the wanted latent", "another text's", "none"], rows)
    _examples(
        report,
        ["to be", "source", "edit", "without the latent"],
        [(row["wanted"], *marked(tokenizer, row["source_ids"], row["ids"]), row["none"]) for row in texts],
    )


def _agreement(
    report: Report, found: Mapping[str, Agreement], more: Mapping[str, Mapping[str, object]], missing: str | None
) -> None:
    """Add the agreement of the latents found with the wanted ones, by condition.

    Args:
        more: further figures, by condition and title.
        missing: why texts cannot be encoded.
    """
    figures = {name: {**more.get(name, {}), **_figures(found.get(name))} for name in VARIANTS}
    figures = {name: values for name, values in figures.items() if values}
    report.section("Agreement", _ABOUT_CONTROLS + (f" Texts were not encoded again: {missing}" if missing else ""))
    conditions = [_TITLES[name] for name in figures]
    titles = next(iter(figures.values()), {})
    rows = [(title, *(_cell(values[title]) for values in figures.values())) for title in titles]
    report.table(["condition", *conditions], rows)
    shares = [one.by_attribute for one in found.values()]
    if shares and shares[0]:
        lines = [(key, *(100 * share[key] for share in shares)) for key in shares[0]]
        report.table(["right, %", *conditions], lines, "By attribute.")


def _figures(one: Agreement | None) -> dict[str, object]:
    if one is None:
        return {}
    hits = {f"retrieval@{k}, % (chance {100 * hit.chance:.3g})": hit for k, hit in one.retrieval.items()}
    attributes = {"attributes": one.attributes} if one.attributes else {}
    unread = {"without a latent, %": 100 * one.unread}
    return {"cosine": one.cosine, "squared error": one.mse, **hits, **unread, **attributes}


def _agreement_lines(results: Mapping[str, object], found: Mapping[str, Agreement]) -> str:
    lines = []
    for name in VARIANTS:
        line = []
        of = results.get(name)
        if isinstance(of, Mapping) and "token_f1" in of:
            line.append(f"token F1 {of['token_f1']}, BLEU {of['bleu']:.4f}")
        if one := found.get(name):
            line.append(f"cosine {one.cosine}, " + ", ".join(_hits(k, hit) for k, hit in one.retrieval.items()))
            if one.attributes:
                line.append(f"attributes {one.attributes}")
        if line:
            lines.append(" ".join([f"{_TITLES[name]:>9}:", *line]))
    return "\n".join(lines)


def _hits(k: int, hit: Share) -> str:
    interval = f"[{100 * hit.low:.1f}, {100 * hit.high:.1f}]"
    return f"retrieval@{k} {100 * hit.value:.1f} % {interval} (chance {100 * hit.chance:.3g})"


def _examples(report: Report, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    report.section("Texts")
    report.table(list(header), rows)


def marked(tokenizer: PreTrainedTokenizerBase, source: Sequence[int], edited: Sequence[int]) -> tuple[str, str]:
    """Return both texts without special tokens, with differences between ⟦ and ⟧."""
    kept = [i for i, token in enumerate(source) if token not in tokenizer.all_special_ids]
    texts = []
    for ids, other in ((source, edited), (edited, source)):
        strings, pieces = token_strings(tokenizer, [int(ids[i]) for i in kept]), []
        for place, piece in zip(kept, strings, strict=True):
            word = piece.lstrip()
            lead = piece[: len(piece) - len(word)]
            pieces.append(piece if ids[place] == other[place] else f"{lead}⟦{word}⟧")
        texts.append("".join(pieces))
    return texts[0], texts[1]


def _edit_lines(found: EditResult) -> str:
    lines = [f"judged by {found.classifier.name}: {100 * found.before.value:.1f} % of the wanted class before"]
    for name in VARIANTS:
        one, path = found.edited[name], found.paths[name]
        lines.append(
            f"{name:>9}: control {100 * one.control.value:.1f} % [{100 * one.control.low:.1f}, "
            f"{100 * one.control.high:.1f}], tokens changed {one.changed}, edit distance {one.distance}, "
            f"toward {one.toward}, SSS {path.sss}, MTS {path.mts}"
        )
    return "\n".join(lines)


_ABOUT_EDITS = (
    "Some tokens of each text were masked and resampled under the wanted latent, others are unchanged. Controls "
    "use the same masks and noise with the latent of another text, and with none. Control: texts classified as "
    "the wanted class, by {}; {:.1f} % were before. SSS: mean cosine of neighbouring texts on the great circle between "
    "the old latent and the wanted one, if both have a latent; MTS: share of steps on which p(wanted class) strictly "
    "rises. Texts that ignore the latent have SSS 1 and MTS 0."
)
