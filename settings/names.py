"""Import paths of components: the current one, and the one that fingerprints keep when a module moves."""

from __future__ import annotations

PACKAGE = "palimpsest."
# Modules that lie elsewhere now: the name under which runs, checkpoints and users' files know them -> where they are.
MOVED = {
    "callbacks": "training.callbacks",
    "engine": "training",
    "classification.methods.Beside": "classification.methods.ComparedMethods",
    "classification.scoring.Race": "classification.scoring.SequentialTest",
    "tasks.class_scoring": "classification.scoring",
    "tasks.class_scoring.Race": "classification.scoring.SequentialTest",
    "tasks.classify.Beside": "classification.methods.ComparedMethods",
    "tasks.directions": "evaluation.conditional_generation",
    "tasks.directions.Directed": "evaluation.conditional_generation.ConditionalSettings",
    "tasks.guidance": "evaluation.guidance",
    "tasks.watching": "report.views",
    "lr_schedules": "training.lr_schedules",
    "objectives.mlm.masked_lm": "objectives.mlm.MaskedLM",
    "optimizers": "training.optimizers",
    "text.exact_denoiser": "corpora.exact_denoiser",
    "text.grammar": "corpora.grammar",
    "text.gsm8k": "corpora.gsm8k",
    "text.judging": "corpora.judging",
    "text.latent_attributes": "latents.attributes",
    "text.latent_hf": "latents.hf",
    "text.latent_lsa": "latents.lsa",
    "text.latent_shards": "latents.shards",
    "text.review_attributes": "corpora.review_attributes",
    "text.reviews": "corpora.reviews",
    "text.sources.GeneratedReviews": "corpora.reviews.GeneratedReviews",
    "text.text8": "corpora.text8",
    "text": "data",
    "transformers.get_constant_schedule_with_warmup": "training.lr_schedules.constant",
    "transformers.get_cosine_schedule_with_warmup": "training.lr_schedules.cosine_to_zero",
}
_BACK = {new: old for old, new in MOVED.items()}
# Rooms and modules that were importable by these names before there was a package.
_STAYED = frozenset({"app", "classification", "dataloader", "diffusion", "estimators", "models", "noise_schedule",
                     "objectives", "process", "samplers", "tasks"})  # fmt: skip


def current(name: str) -> str:
    """Return the path of what `name` names, which may be the name of an earlier version."""
    found = _longest(name, MOVED)
    if found is not None:
        return PACKAGE + found
    return PACKAGE + name if name.partition(".")[0] in _STAYED else name


def lasting(name: str) -> str:
    """Return the name of `name` that fingerprints and checkpoints hold, which no move changes."""
    if not name.startswith(PACKAGE):
        return name
    name = name.removeprefix(PACKAGE)
    return _longest(name, _BACK) or name


def _longest(name: str, table: dict[str, str]) -> str | None:
    """Return `name` with its longest beginning that `table` knows replaced; None where it knows none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (beginning := ".".join(parts[:end])) in table:
            return ".".join([table[beginning], *parts[end:]])
    return None
