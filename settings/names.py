"""Import paths of components: the current path, and the stable one that fingerprints keep when a module moves."""

PACKAGE = "palimpsest."
# Moved modules: the path that runs, checkpoints and users' files know -> the current path.
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
    "models.hidden_states": "latents.hidden_states",
    "objectives.mlm.masked_lm": "objectives.mlm.MaskedLM",
    "objectives.noising": "objectives.mask_sampling",
    "optimizers": "training.optimizers",
    "text.exact_denoiser": "corpora.exact_denoiser",
    "text.grammar": "corpora.grammar",
    "text.gsm8k": "corpora.gsm8k",
    "text.judging": "corpora.answer_checking",
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
# Modules that were top-level before there was a package.
_UNMOVED = frozenset({"app", "classification", "dataloader", "diffusion", "estimators", "models", "noise_schedule",
                      "objectives", "process", "samplers", "tasks"})  # fmt: skip


def current_path(name: str) -> str:
    """Return the current path of a component, given its current path or one of an earlier version."""
    plain = name.removeprefix(PACKAGE)
    found = _longest(plain, MOVED) or (plain if plain.partition(".")[0] in _UNMOVED else None)
    return name if found is None else PACKAGE + found


def permanent_path(name: str) -> str:
    """Return the path that fingerprints and checkpoints contain, which no move changes."""
    if not name.startswith(PACKAGE):
        return name
    name = name.removeprefix(PACKAGE)
    return _longest(name, _BACK) or name


def _longest(name: str, table: dict[str, str]) -> str | None:
    """Return `name` with its longest prefix in `table` replaced; None if there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:end])) in table:
            return ".".join([table[prefix], *parts[end:]])
    return None
