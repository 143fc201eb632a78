"""Numbers and switches of a configuration that are none."""

from __future__ import annotations

import math

from omegaconf import DictConfig, OmegaConf

# Numbers that are handed on far before they are used: a word in their place is a mistake to name here.
WHOLE = ("seed", "T", "sampling.steps", "sampling.stride_length", "sampling.num_strides", "sampling.tokens_per_step",
         "sampling.num_sample_batches", "sampling.num_sample_log", "sampling.samples_per_prompt", "sampling.top_k",
         "sampling.context", "sampling.num_samples", "sampling.max_length", "sampling.latent_steps",
         "sampling.edit_path", "eval.num_draws", "eval.max_draws",
         "eval.perplexity_batch_size", "classify.num_draws",
         "classify.num_examples", "classify.patience", "classify.pretrain_steps", "trainer.max_steps", "model.length",
         "block_size", "data.segment_room", "loader.batch_size", "loader.global_batch_size", "trainer.num_nodes",
         "trainer.accumulate_grad_batches", "lr_scheduler.num_warmup_steps", "lr_scheduler.num_rewarmup_steps",
         "plateau.patience", "plateau.cooldown", "training.max_skipped_steps", "loader.num_workers",
         "loader.prefetch_factor", "training.prefix_length", "latents.dim", "latents.tokens", "latents.fit_rows",
         "latents.window", "latents.batch_size", "latents.seed")  # fmt: skip
REAL = ("sampling.temperature", "sampling.nucleus_p", "sampling.threshold", "sampling.remask_eta",
        "sampling.latent_eta", "sampling.guidance", "sampling.edit_rate", "sampling.edit_alpha",
        "sampling.min_entropy", "eval.target_se", "training.ema",
        "training.text_weight", "training.latent_weight", "training.latent_cosine_weight",
        "training.sampling_eps", "training.sampling_eps_min", "training.sampling_eps_max", "training.clip_search_delta",
        "classify.confidence", "classify.label_dropout", "lr_scheduler.min_ratio", "lr_scheduler.peak_decay",
        "lr_scheduler.decay_share", "plateau.factor", "plateau.floor", "plateau.min_delta",
        "sampling.show_delay", "latents.noise", "latents.max_overlap")  # fmt: skip
FLAGS = ("classify.calibrate", "classify.baselines", "training.start_from_counts", "training.gradient_checkpointing",
         "training.resample", "training.fix_clipping", "sampling.first_hitting", "sampling.kv_cache",
         "sampling.var_length", "loader.pin_memory", "loader.persistent_workers", "sampling.show", "sampling.html",
         "sampling.gif")  # fmt: skip

# Arrays and lists of so many entries are made: a slip of the finger must not fill the memory.
COUNTS = ("sampling.steps", "sampling.latent_steps", "sampling.num_samples", "sampling.num_sample_batches",
          "sampling.num_sample_log", "sampling.samples_per_prompt", "sampling.edit_path", "sampling.num_strides",
          "eval.num_draws", "eval.max_draws", "classify.num_draws", "classify.num_examples")  # fmt: skip
MOST = 10**6
LARGEST_SEED = 2**32 - 1  # of numpy and lightning

NEVER_NULL = ("block_size", "lr_scheduler.", "plateau.", "loader.global_batch_size", "trainer.max_steps",
              "sampling.steps", "sampling.remask_eta", "sampling.show_delay", "training.prefix_length",
              "sampling.latent_", "sampling.guidance", "sampling.edit_rate", "sampling.edit_alpha",
              "sampling.edit_path")  # fmt: skip


def check_numbers(cfg: DictConfig) -> None:  # noqa: C901
    """Raises ValueError for a word, or a broken number, where a (whole) number belongs."""
    for key in (*WHOLE, *REAL):
        value = OmegaConf.select(cfg, key, default="absent")  # a key of a choice that is not made
        kinds = int if key in WHOLE else (int, float)
        if value == "absent" or (value is None and not key.startswith(NEVER_NULL)):
            continue
        if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
            raise ValueError(f"{key}={'null' if value is None else value} must be a "
                             f"{'whole ' if key in WHOLE else ''}number")  # fmt: skip
    for key in FLAGS:
        if not isinstance(OmegaConf.select(cfg, key), bool):
            raise ValueError(f"{key}={OmegaConf.select(cfg, key)} must be true or false")
    widths = cfg.training.clip_search_widths
    if not OmegaConf.is_list(widths) or not all(type(width) in (int, float) for width in widths):
        raise ValueError(f"training.clip_search_widths={widths} must be a list of numbers, e.g. [0.5,0.6,0.7]")
    if isinstance(cfg.classify.compare, str):
        raise ValueError(
            f"classify.compare={cfg.classify.compare} must be a list: classify.compare='[{cfg.classify.compare}]'"
        )
    for key in COUNTS:
        if (OmegaConf.select(cfg, key) or 0) > MOST:
            raise ValueError(f"{key}={OmegaConf.select(cfg, key)} must be at most {MOST:,}")
    if not 0 <= cfg.seed <= LARGEST_SEED:
        raise ValueError(f"seed={cfg.seed} must lie in 0..{LARGEST_SEED}")
    for key in ("patience", "pretrain_steps"):
        if cfg.classify[key] is not None and cfg.classify[key] < 1:
            raise ValueError(f"classify.{key}={cfg.classify[key]} must be at least 1")
