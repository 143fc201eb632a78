"""What a configuration may not say: numbers that are none, settings that mean nothing together.

Every refusal names the key, its value and the remedy, before anything is read or built.
"""

from __future__ import annotations

import logging
import math

from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)


def law(cfg: DictConfig) -> str:
    """The objective's name as typed: subs, d3pm, sedd, ar, bd3lm."""
    name = cfg.parameterization._target_.rpartition(".")[2].lower()
    return "bd3lm" if name == "blockdiffusion" else name


def trains(cfg: DictConfig) -> bool:
    """Whether the command trains, or may."""
    return cfg.mode._target_ in ("tasks.train.train", "tasks.classify.classify")


# Numbers that are handed on far before they are used: a word in their place is a mistake to name here.
WHOLE = ("seed", "T", "sampling.steps", "sampling.stride_length", "sampling.num_strides", "sampling.tokens_per_step",
         "sampling.num_sample_batches", "sampling.num_sample_log", "sampling.samples_per_prompt", "sampling.top_k",
         "sampling.context", "eval.num_draws", "eval.max_draws", "eval.perplexity_batch_size", "classify.num_draws",
         "classify.num_examples", "classify.patience", "classify.pretrain_steps", "trainer.max_steps", "model.length",
         "block_size", "data.segment_room", "loader.batch_size", "loader.global_batch_size", "trainer.num_nodes",
         "trainer.accumulate_grad_batches", "lr_scheduler.num_warmup_steps", "lr_scheduler.num_rewarmup_steps",
         "plateau.patience", "plateau.cooldown", "training.max_skipped_steps", "loader.num_workers",
         "loader.prefetch_factor", "latents.dim", "latents.tokens", "latents.fit_rows", "latents.window",
         "latents.batch_size", "latents.seed")  # fmt: skip
REAL = ("sampling.temperature", "sampling.nucleus_p", "sampling.min_entropy", "eval.target_se", "training.ema",
        "training.sampling_eps", "training.sampling_eps_min", "training.sampling_eps_max", "training.clip_search_delta",
        "classify.confidence", "classify.label_dropout", "lr_scheduler.min_ratio", "lr_scheduler.peak_decay",
        "lr_scheduler.decay_share", "plateau.factor", "plateau.floor", "plateau.min_delta", "latents.noise",
        "latents.max_overlap")  # fmt: skip
FLAGS = ("classify.calibrate", "classify.baselines", "training.start_from_counts", "training.gradient_checkpointing",
         "training.resample", "training.fix_clipping", "sampling.first_hitting", "sampling.kv_cache",
         "sampling.var_length", "loader.pin_memory", "loader.persistent_workers")  # fmt: skip


NEVER_NULL = ("lr_scheduler.", "plateau.", "loader.global_batch_size", "trainer.max_steps")


def check_numbers(cfg: DictConfig) -> None:
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
    if isinstance(cfg.classify.compare, str):
        raise ValueError(
            f"classify.compare={cfg.classify.compare} must be a list: classify.compare='[{cfg.classify.compare}]'"
        )
    if cfg.seed < 0:
        raise ValueError(f"seed={cfg.seed} must be 0 or more")
    for key in ("patience", "pretrain_steps"):
        if cfg.classify[key] is not None and cfg.classify[key] < 1:
            raise ValueError(f"classify.{key}={cfg.classify[key]} must be at least 1")


def refuse_contradictions(cfg: DictConfig) -> None:
    """Raises ValueError for settings that can not all be meant, with the reason."""
    training, name = cfg.training, law(cfg)
    unread = {
        "time_conditioning": cfg.time_conditioning and name == "ar",
        "T": cfg.T and name in ("ar", "sedd"),
        "subs_masking": cfg.subs_masking and name in ("ar", "sedd"),
        "training.importance_sampling": training.importance_sampling and name in ("ar", "d3pm"),
        "training.change_of_variables": training.change_of_variables and name not in ("subs", "bd3lm"),
        "training.loss_weight": training.loss_weight != "elbo" and name not in ("subs", "bd3lm"),
        "training.resample": training.resample and name == "ar",
        "classify.masks": cfg.classify.masks == "independent" and name == "ar",
        "training.masking": name == "ar" and not cfg.masking._target_.endswith("Bernoulli"),
    }
    for key, contradicts in unread.items():
        if contradicts:
            value = cfg.masking._target_ if key == "training.masking" else OmegaConf.select(cfg, key)
            raise ValueError(f"{key}={value} means nothing to parameterization={name}; leave it out")
    if cfg.classify.sharing not in ("per_class", "conditional"):
        raise ValueError(f"classify.sharing={cfg.classify.sharing} is unknown; choose per_class or conditional")
    if cfg.classify.sharing == "conditional":
        _check_conditional(cfg)
    _check_start(cfg)
    _check_blocks(cfg, name)
    if cfg.data.get("fill") and cfg.mode._target_ == "tasks.classify.classify":
        raise ValueError(
            f"data.fill={cfg.data.fill}: mode=classify compares texts whose length is shown; leave it null"
        )
    if cfg.data.long_texts == "drop" and cfg.mode._target_ == "tasks.classify.classify":
        raise ValueError(
            "data.long_texts=drop: mode=classify would be judged by the short texts alone; use windows or truncate"
        )
    clipped = cfg.noise._target_.endswith(".Clipped")
    if clipped and (name not in ("subs", "bd3lm") or not cfg.masking._target_.endswith("Bernoulli") or cfg.T):
        raise ValueError(
            "noise=clipped limits the mask rates of parameterization=subs training.masking=bernoulli T=0; "
            f"with parameterization={name}, {cfg.masking._target_}, T={cfg.T} it would do nothing"
        )
    if name == "sedd" and not cfg.time_conditioning:
        raise ValueError(
            "parameterization=sedd with time_conditioning=false: the scale of its scores is a function of t, which the "
            "network then can not see; set time_conditioning=true"
        )
    if training.importance_sampling and training.change_of_variables:
        raise ValueError(
            "training.importance_sampling=true and training.change_of_variables=true are two forms of the same change; "
            "keep one"
        )
    if training.change_of_variables and not cfg.time_conditioning:
        raise ValueError(
            "training.change_of_variables=true changes what a time-conditioned network is shown, and "
            "time_conditioning=false shows it nothing; use training.importance_sampling=true"
        )
    if not cfg.masking._target_.endswith("Bernoulli") and (training.importance_sampling or cfg.T):
        raise ValueError(
            f"training.masking={cfg.masking._target_} integrates t out, so that T={cfg.T} and "
            f"training.importance_sampling={training.importance_sampling} have nothing to act on; leave them out"
        )


def check_schedule(cfg: DictConfig) -> None:
    """The learning-rate schedule and the length of the training must belong together.

    Raises ValueError where the schedule counts to another end, or warms up from a negative step. Warns of a warm-up
    that the training never leaves: it may be a trial.
    """
    steps, schedule = cfg.trainer.max_steps, cfg.lr_scheduler
    total, warmup = schedule.get("num_training_steps", steps), schedule.get("num_warmup_steps", 0)
    if total != steps:
        raise ValueError(
            f"lr_scheduler.num_training_steps={total} contradicts trainer.max_steps={steps}, where the training ends; "
            "leave the first out, it follows the second"
        )
    if warmup < 0:
        raise ValueError(f"lr_scheduler.num_warmup_steps={warmup} must be 0 or more")
    if trains(cfg) and warmup >= steps > 0:
        log.warning(
            "lr_scheduler.num_warmup_steps=%d is not below trainer.max_steps=%d: the whole training is warm-up, and "
            "the learning rate never reaches optim.lr; set lr_scheduler.num_warmup_steps=%d or so",
            warmup, steps, steps // 20,
        )  # fmt: skip


def _check_conditional(cfg: DictConfig) -> None:
    network = cfg.backbone._target_
    if network not in ("models.dit.DiT", "models.ar.AR"):
        raise ValueError(
            f"classify.sharing=conditional needs a network that can be told a class, backbone=dit or ar; {network} can "
            "not, so use classify.sharing=per_class"
        )
    if cfg.data.label is not None:
        raise ValueError(
            f"classify.sharing=conditional is one network for all classes, and data.label={cfg.data.label} is one "
            "class; leave one of them out"
        )
    if not 0 <= cfg.classify.label_dropout <= 1:
        raise ValueError(f"classify.label_dropout={cfg.classify.label_dropout} must lie in [0, 1]")
    if cfg.data.wrap:
        raise ValueError(
            "classify.sharing=conditional with data.wrap=true: a chunk of several texts has no class to be told; set "
            "data.wrap=false"
        )


# What draws noise in a block, and means nothing where blocks have one token, which is always masked.
_NOISE = {"training.importance_sampling": False, "training.change_of_variables": False, "training.resample": False,
          "time_conditioning": False, "T": 0, "training.clip_search_widths": []}  # fmt: skip


def _check_blocks(cfg: DictConfig, name: str) -> None:
    size, length, training = cfg.block_size, cfg.model.length, cfg.training
    limits = (training.sampling_eps_min, training.sampling_eps_max)
    bernoulli = cfg.masking._target_.endswith("Bernoulli") and not cfg.T
    if training.resample and not cfg.masking._target_.endswith("Bernoulli"):
        raise ValueError(
            f"training.resample=true limits the masks that training.masking=bernoulli draws; {cfg.masking._target_} "
            "has no such; leave it out"
        )
    if name != "bd3lm":
        if size != length:
            raise ValueError(f"block_size={size} means nothing to parameterization={name}; add algo=bd3lm")
        if cfg.sampler._target_.startswith("samplers.block."):
            raise ValueError(
                f"sampling.predictor=block writes texts of algo=bd3lm, and parameterization={name} is sampled "
                "otherwise; use ddpm_cache, analytic or ar"
            )
        if cfg.sampling.var_length:
            raise ValueError(f"sampling.var_length=true means nothing to parameterization={name}; leave it out")
        if limits != (0.001, 1.0) or training.clip_search_widths:
            raise ValueError(
                f"training.sampling_eps_min={limits[0]} training.sampling_eps_max={limits[1]} "
                f"training.clip_search_widths={training.clip_search_widths} are for algo=bd3lm; with parameterization="
                f"{name} use noise=clipped noise.sampling_eps_min= noise.sampling_eps_max="
            )
        return
    if cfg.data.get("segments"):
        _check_segments(cfg)
    if size < 1 or length % size:
        nearest = _nearest_divisors(size, length)
        raise ValueError(
            f"block_size={size} must divide model.length={length} into whole blocks; the nearest that do: {nearest}"
        )
    if (limits != (0.001, 1.0) or training.clip_search_widths) and not bernoulli:
        raise ValueError(
            f"training.sampling_eps_min, sampling_eps_max and clip_search_widths limit the mask rates of "
            f"training.masking=bernoulli T=0; with {cfg.masking._target_} T={cfg.T} they would do nothing"
        )
    typed = [f"{key}={OmegaConf.select(cfg, key)}" for key, off in _NOISE.items() if OmegaConf.select(cfg, key) != off]
    if size == 1 and (typed or not bernoulli):
        raise ValueError(
            f"block_size=1 leaves nothing to draw (the only token of a block is masked), so {' '.join(typed)} "
            f"{cfg.masking._target_} would do nothing; leave it out"
        )
    if not cfg.sampler._target_.startswith("samplers.block.") and size != length:
        raise ValueError(
            f"algo=bd3lm with block_size={size} writes block after block, and {cfg.sampler._target_} anywhere in a "
            "text; use sampling.predictor=block"
        )
    if cfg.sampling.var_length and not cfg.data.wrap and not cfg.data.get("fill"):
        raise ValueError(
            "sampling.var_length=true with data.wrap=false: a model of single texts is told their lengths, and has not "
            "learned to end them; use data.wrap=true or data.fill=eos"
        )


def _check_segments(cfg: DictConfig) -> None:
    """What means nothing where the blocks are the segments of a text."""
    reasons = {
        "block_size": (cfg.block_size != cfg.model.length, "blocks are the parts of a text, whatever their lengths"),
        "sampling.predictor": (not cfg.sampler._target_.startswith("samplers.block."),
                               "texts are written part after part, which only sampling.predictor=block does"),
        "sampling.var_length": (cfg.sampling.var_length, "the rooms of a text's parts are fixed"),
        "sampling.context": (cfg.sampling.context is not None, "every part sees all before it"),
    }  # fmt: skip
    for key, (contradicts, reason) in reasons.items():
        if contradicts:
            value = cfg.sampler._target_ if key == "sampling.predictor" else OmegaConf.select(cfg, key)
            raise ValueError(f"{key}={value} contradicts data.segments=true: {reason}; leave it out")


def _nearest_divisors(size: int, length: int) -> str:
    divisors = [k for k in range(1, length + 1) if length % k == 0]
    below, above = [k for k in divisors if k < size], [k for k in divisors if k > size]
    return " and ".join(str(k) for k in (*below[-1:], *above[:1]))


def _check_start(cfg: DictConfig) -> None:
    """Weights have one beginning."""
    pretrain, sharing = cfg.classify.pretrain, cfg.classify.sharing
    for key in ("training.from_pretrained", "eval.checkpoint_path"):
        if pretrain and OmegaConf.select(cfg, key):
            raise ValueError(
                f"classify.pretrain={pretrain} trains what the models start from, and {key}="
                f"{OmegaConf.select(cfg, key)} names it; leave one of them out"
            )
    if pretrain and cfg.mode._target_ == "tasks.train.train" and sharing == "per_class" and cfg.data.label is None:
        raise ValueError(
            f"classify.pretrain={pretrain} starts the models of classes, and mode=train without data.label trains one "
            "model of all texts; set data.label, mode=classify or classify.sharing=conditional"
        )
    if cfg.training.start_from_counts and cfg.training.from_pretrained:
        raise ValueError(
            "training.start_from_counts=true is where new weights begin, and training.from_pretrained="
            f"{cfg.training.from_pretrained} brings others; leave one of them out"
        )
