"""Reports of likelihoods: of a split, and under true, shuffled and no latents."""

from collections.abc import Mapping

import numpy as np

from palimpsest.evaluation.latent_gain import LatentGain
from palimpsest.evaluation.likelihood import Likelihood
from palimpsest.objectives.joint import JointDiffusion
from palimpsest.report import plots
from palimpsest.report.formatting import Metric
from palimpsest.report.report import Report
from palimpsest.report.style import by_mask_rate


def likelihood_section(report: Report, measured: Likelihood, split: str, remark: str) -> None:
    """Write the section that every report with a likelihood has."""
    report.section(f"Likelihood on the {split} split", " ".join(part for part in (remark, _method(measured)) if part))
    report.metrics(likelihood_metrics(measured))
    likelihood_figure(report, measured, "Likelihood of the models", "; lower is better.")
    mask_rate_figure(report, measured, "Cross-entropy of a masked token against the share of masked tokens.")


def likelihood_figure(report: Report, measured: Likelihood, alt: str, more: str = ".") -> None:
    """Add the figure that compares model, unigram likelihood and true entropy."""
    rows = [("this model", measured.model.value, measured.model.se)]
    if measured.unigram:
        rows.insert(0, ("unigram", measured.unigram.value, measured.unigram.se))
    truth = measured.truth.value if measured.truth else None
    caption = f"Nats per token with 95% intervals over {measured.scores.units.name}{more}"
    report.figure(plots.likelihood_against_truth(rows, truth), caption, alt)


def mask_rate_figure(report: Report, measured: Likelihood, caption: str) -> None:
    """Add the figure of the cross-entropy against the share of masks, if there were masks."""
    if measured.scores.num_masked_MP.size:
        rates, found = measured.scores.by_mask_rate()
        values = [one.value for one in found]
        errors = [one.se for one in found]
        figure = by_mask_rate(rates, values, errors, "loss (nats per masked token)")
        report.figure(figure, caption, "Cross-entropy against mask rate")


def likelihood_metrics(measured: Likelihood) -> list[Metric]:
    """Return the numbers of a likelihood, with their errors."""
    bits = measured.model.scaled(1 / np.log(2))
    method = f"{measured.scores.label}; error over {measured.scores.units}"
    rows = [
        Metric.of("NLL", measured.model, "nats/token", method),
        Metric.of("bits", bits, "bits/token"),
        Metric.of("perplexity", measured.model.exp()),
    ]
    if not measured.scores.exact:
        error = measured.scores.monte_carlo_se
        rows.append(Metric("Monte Carlo error", error, None, "nats/token", "of the NLL, from the draws alone"))
    if measured.unigram:
        rows.append(Metric.of("unigram model", measured.unigram, "nats/token"))
    if measured.truth and measured.gap:
        excess = measured.gap.scaled(100 / measured.truth.value)
        rows.append(Metric.of("true entropy", measured.truth, "nats/token", "exact, same texts"))
        rows.append(Metric.of("above the truth", excess, "%", f"paired over {measured.scores.units.name}"))
    return rows


def truth_line(measured: Likelihood) -> list[str]:
    """Return the line for a terminal on the gap to the true entropy, if known."""
    if not measured.truth:
        return []
    return [f"true entropy {measured.truth} nats/token | above it by {measured.gap} (paired)"]


def likelihood_lines(measured: Likelihood, title: str, gain: LatentGain | None) -> str:
    """Return the lines for a terminal. title: the data and their split."""
    scores = measured.scores
    unit = "row" if scores.text_id_M is None else "text"
    about = (
        f"{title}: {scores.num_texts} {unit}s, {int(scores.tokens_M.sum())} tokens, {scores.label}, "
        f"{scores.evaluations_per_text:.1f} network evaluations a {unit}"
    )
    noise = "" if scores.exact else f", Monte Carlo error {scores.monte_carlo_se:.2g} nats/token"
    bits = measured.model.scaled(1 / np.log(2))
    numbers = (
        f"NLL {measured.model} nats/token | {bits} bits/token | perplexity {measured.model.exp()} (errors over "
        f"{scores.units})"
    )
    lines = [about + noise, numbers, *truth_line(measured)]
    if gain:
        lines.append(
            f"latents: their own {gain.true}, others' {gain.shuffled}, none {gain.none} nats/token | "
            f"latent gain {gain.gain}, over none {gain.over_none} (paired)"
        )
    return "\n".join(lines)


def gain_section(report: Report, gain: LatentGain, facts: Mapping[str, object]) -> None:
    """Write the section on the latent gain. facts: of the encoder."""
    report.section("Latent gain", _ABOUT_GAIN)
    rows = [("their own", gain.true), ("those of other texts", gain.shuffled), ("none", gain.none)]
    cells = [(name, Metric.of("", found)) for name, found in rows]
    report.table(["latents", "nats/token"], cells, ", ".join(f"{key}: {value}" for key, value in facts.items()))
    report.metrics(
        [
            Metric.of("latent gain", gain.gain, "nats/token", "others' minus their own"),
            Metric.of("over none", gain.over_none, "nats/token"),
        ]
    )


def untrained_marginal(objective: object) -> str:
    """Return a warning if the network never learned the likelihood of texts without latents; else an empty text."""
    if not isinstance(objective, JointDiffusion) or {"text", "joint"} & set(objective.shares):
        return ""
    return (
        f"The modes of this training ({', '.join(objective.shares)}) never drop a text's latent, so the network did "
        "not learn the likelihood of texts alone."
    )


_PREAMBLE = {
    "NELBO": "The NELBO bounds the true negative log-likelihood from above. ",
    "importance-weighted any-order bound": "Another bound on the negative log-likelihood of the same weights, tighter "
    "than the NELBO and never to be compared with one. ",
    "exact likelihood of the ordered sampler (DUEL)": "The exact likelihood of the sampler that fills masks in this "
    "order, which is another model than the diffusion: never to be compared with a NELBO. ",
}
_EOS_PADDED = (
    " Rows are padded with EOS, which the model has to generate too, because it is not shown where a text ends: the "
    "nats are those of text, EOS and padding, the tokens those of the text and its EOS."
)
_TRUTH = " The corpus knows its own probabilities, so its entropy on these very texts is exact."


def _method(measured: Likelihood) -> str:
    """Return how the likelihood was measured, in words."""
    kind = "The likelihood is exact. " if measured.scores.label == "exact" else _PREAMBLE[measured.scores.kind]
    scores = measured.scores
    padded = _EOS_PADDED if not scores.causal and (scores.maskable_M > scores.tokens_M).any() else ""
    noise = "" if scores.exact else " and contain the noise of the masks"
    errors = f"Errors are standard errors over {scores.units}{noise}."
    return kind + errors + padded + (_TRUTH if measured.truth else "")


_ABOUT_GAIN = (
    "The bound of each text given its own latent, that of another text, and none, on the same masks. The "
    "latent gain, others' minus their own, is above zero if the network uses its latents; its error is that of the "
    "paired difference."
)
