"""mode=ppl_eval: the likelihood of a split, with its error and its protocol."""

from __future__ import annotations

import math
from dataclasses import asdict

from palimpsest.common.values import FilePath, Name
from palimpsest.objectives.base import latent_hidden
from palimpsest.report import plots
from palimpsest.report.report import Report
from palimpsest.tasks.base import Experiment, Likelihood, likelihood, mode, write_results
from palimpsest.tasks.latent_gain import latent_gain, untrained_marginal
from palimpsest.tasks.scoring import Scores, score


def protocol(experiment: Experiment, data: object, split: str, scores: Scores) -> dict[str, object]:
    """What must be equal for two perplexities to be comparable, and what they are of."""
    return {
        **experiment.protocol, "kind": "exact likelihood" if scores.label == "exact" else scores.kind,
        "data": data.name, "data_protocol": data.protocol or "ours", "split": split,
        "label": data.label, "tokenizer": data.vocabulary.fingerprint,
        "detokenizer": data.detokenizer(split), "length": data.length, "wrap": data.wrap,
        "packing": asdict(data.packing(split)), "prompted": data.prompted, "fill": data.fill, "estimator": scores.label,
        "prefix_length": data.prefix_length, "score_special": data.score_special,
        "law": _law(data, causal=experiment.protocol["parameterization"] == "ar"),
        "network_evaluations_per_text": float(scores.evaluations_M.mean()),
        "latents": data.latents and data.latents.fingerprint,
    }  # fmt: skip


def _law(data: object, causal: bool) -> str:
    """What a likelihood of these rows is of: what is scored, and what is given beside the beginning of a row."""
    endings = not causal and not data.fill and not data.score_special
    given = {"prompt": data.prompted, "first token": data.first_given,
             f"first {data.prefix_length} tokens": data.prefix_length,
             "where its special tokens stand": endings}  # fmt: skip
    said = ", ".join(name for name, is_so in given.items() if is_so)
    beginning = data.prompted or data.first_given or data.prefix_length
    return f"p({'rest' if beginning else 'text'}{' | ' if said else ''}{said})"


def report_likelihood(report: Report, measured: Likelihood, split: str, remark: str) -> None:
    """The section that every report with a likelihood has."""
    report.section(f"Likelihood on the {split} split", " ".join(part for part in (remark, _method(measured)) if part))
    report.metrics(measured.metrics())
    truth = measured.truth.value if measured.truth else None
    report.figure(
        plots.likelihood_against_truth(measured.ladder(), truth, "nats/token"),
        f"Nats per token with 95% intervals over {measured.scores.units.name}; lower is better.",
        "Likelihood of the models",
    )  # fmt: skip
    if measured.scores.num_masked_MP.size:
        report.figure(
            plots.nll_by_mask_rate(*measured.scores.by_mask_rate()),
            "How hard a masked token is to guess against how many of its neighbours are masked too.",
            "Cross-entropy against mask rate",
        )


_PREAMBLE = {
    "NELBO": "The NELBO bounds the true negative log-likelihood from above. ",
    "importance-weighted any-order bound": "Another bound on the negative log-likelihood of the same weights, tighter "
    "than the NELBO and never to be compared with one. ",
    "exact likelihood of the ordered sampler (DUEL)": "The exact likelihood of the sampler that fills masks in this "
    "order, which is another model than the diffusion: never to be compared with a NELBO. ",
}
_ERRORS = "Errors are standard errors over {}."
_NOISY_ERRORS = "Errors are standard errors over {} and contain the noise of the masks."
_FILLED = (
    " Rows are filled behind their texts with EOS, which the model has to write too, since it is not shown where a "
    "text ends: the nats are those of text, EOS and fill, the tokens those of the text and its EOS."
)
_TRUTH = " The corpus knows its own probabilities, so its entropy on these very texts is exact."


def _method(measured: Likelihood) -> str:
    kind = "The likelihood is exact. " if measured.scores.label == "exact" else _PREAMBLE[measured.scores.kind]
    scores = measured.scores
    filled = _FILLED if not scores.causal and (scores.maskable_M > scores.tokens_M).any() else ""
    errors = (_ERRORS if scores.exact else _NOISY_ERRORS).format(scores.units)
    return kind + errors + filled + (_TRUTH if measured.truth else "")


@mode(measures=True)
def ppl_eval(
    experiment: Experiment, *, checkpoint_path: FilePath | None, disable_ema: bool, split: Name
) -> dict[str, object]:
    """Score every text of `split`; write results.json and report.html. What is reported is p(text); of texts with
    latents also what these say (tasks/latent_gain.py)."""
    data = experiment.build.data()
    diffusion = experiment.weights.trained(data, checkpoint_path, disable_ema)
    trainer = experiment.trainer("ppl_eval")
    scores = score(
        trainer, diffusion, data.eval_dataloader(split, trainer=trainer), experiment.build.estimator,
        experiment.build.precision,
        experiment.seed, latent_hidden,
    )  # fmt: skip
    gain = None
    if data.latents is not None:
        asked = (experiment.build.estimator, experiment.build.precision, experiment.seed, scores)
        gain = latent_gain(trainer, diffusion, data, split, *asked)
    measured = likelihood(data, split, scores, experiment.build.truth)
    # Numbers of different kinds and splits never overwrite one another.
    kind = "" if scores.kind == "NELBO" else f"-{scores.label.split(',')[0].replace(' ', '_').lower()}"
    folder = experiment.runs.folder() / "ppl_eval" / f"{split}{kind}"
    results = {
        "nll_nats_per_token": measured.model, "monte_carlo_se": scores.monte_carlo_se,
        "bits_per_token": measured.model.scaled(1 / math.log(2)),
        "perplexity": measured.model.exp(), "unigram_nats_per_token": measured.unigram,
        "true_nats_per_token": measured.truth, "gap_nats_per_token": measured.gap, "texts": len(scores.tokens_M),
        "units": scores.units.name, "num_units": len(scores.units),
        "tokens": int(scores.tokens_M.sum()), "network_evaluations_per_text": float(scores.evaluations_M.mean()),
    }  # fmt: skip
    results |= gain.results() if gain else {}
    told = protocol(experiment, data, split, scores) | {"trained_length": diffusion.provenance.length}
    write_results(folder, {**results, "protocol": told, "command": experiment.command})
    report = Report("Perplexity", f"{data.name}, {split} split", experiment.command, experiment.facts)
    report_likelihood(report, measured, split, untrained_marginal(diffusion.objective))
    if gain:
        gain.report(report, data.latents.metadata)
    report.code(experiment.build.settings, "configuration")
    report.write(folder / "report.html")
    print(
        f"\n{data.name} {split}: {len(scores.tokens_M)} texts, {int(scores.tokens_M.sum())} tokens, {scores.label}, "
        f"{scores.evaluations_M.mean():.1f} network evaluations a text"
        + ("" if scores.exact else f", Monte Carlo error {scores.monte_carlo_se:.2g} nats/token")
    )
    print(
        f"NLL {measured.model} nats/token | {results['bits_per_token']} bits/token | perplexity {results['perplexity']}"
        f" (errors over {scores.units})"
    )
    if measured.truth:
        print(f"true entropy {measured.truth} nats/token | above it by {measured.gap} (paired)")
    if gain:
        print(gain)
    if remark := untrained_marginal(diffusion.objective):
        print(remark)
    print(f"{folder / 'report.html'}")
    return results
