"""What a configuration may not say: settings that mean nothing together.

Every refusal names the key, its value and the remedy, before anything is read or built.
"""

from __future__ import annotations

import inspect
import logging
from typing import get_type_hints

from omegaconf import DictConfig, OmegaConf

from palimpsest.denoisers import mismatch
from palimpsest.process import Resampling
from palimpsest.settings.direction_checks import check_direction
from palimpsest.settings.instantiation import located

log = logging.getLogger(__name__)


def law(cfg: DictConfig) -> str:
    """The objective's name as typed: subs, d3pm, sedd, ar, bd3lm, mmldlm; algo=mlm trains that of subs."""
    name = cfg.parameterization._target_.rpartition(".")[2].lower()
    return {"blockdiffusion": "bd3lm", "masked_lm": "subs", "jointdiffusion": "mmldlm"}.get(name, name)


def is_mlm(cfg: DictConfig) -> bool:
    """Whether it is algo=mlm."""
    return cfg.parameterization._target_.endswith(".masked_lm")


def objective_class(cfg: DictConfig) -> type:
    """Return the class of the objective; the function `masked_lm` builds a SUBS objective."""
    build = located(cfg.parameterization._target_)
    return build if isinstance(build, type) else get_type_hints(build)["return"]


def _check_sampler(cfg: DictConfig, name: str) -> None:
    build = located(cfg.process._target_)
    sample = located(cfg.sampler._target_)
    objective = objective_class(cfg)
    if not inspect.ismethod(build):
        raise ValueError(f"process._target_={cfg.process._target_} must be the method `of` of a process in process.py")
    process = build.__self__
    if process not in objective.processes:
        own = " or ".join(one.__name__.lower() for one in objective.processes)
        raise ValueError(
            f"process={process.__name__.lower()} is not that of parameterization={name}, which is of {own}; "
            "leave process= out: the objective brings its own"
        )
    if "processes" not in vars(sample):
        raise ValueError(
            f"sampling.predictor={cfg.sampler._target_} does not say of which process it writes texts; "
            "make it with sampler_of(Step, Absorbing), as CONTRIBUTING.md shows"
        )
    if process not in sample.processes:
        fitting = "uniform" if issubclass(process, Resampling) else "ddpm_cache"
        raise ValueError(
            f"sampling.predictor={cfg.sampler._target_.split('.')[-2]} writes texts of the process "
            f"{sample.processes[0].__name__}, and parameterization={name} is of {process.__name__}; use "
            f"sampling.predictor={fitting}"
        )
    if not issubclass(objective.binds_to, sample.denoiser):
        raise ValueError(mismatch(sample.__module__, objective.binds_to, sample.denoiser))


def trains(cfg: DictConfig) -> bool:
    """Whether the command trains, or may."""
    return cfg.mode._target_ in ("palimpsest.tasks.train.train", "palimpsest.tasks.classify.classify")


# Of masking=rates, with the values under which they say nothing.
_RATES = {"masking_rates": [round(1 - k / 10, 1) for k in range(10)], "masking_rate_min": 0.1, "masking_rate_max": 1.0,
          "masking_rate_per": "sample"}  # fmt: skip


def refuse_contradictions(cfg: DictConfig) -> None:
    """Raises ValueError for settings that can not all be meant, with the reason."""
    training, name = cfg.training, law(cfg)
    any_token = issubclass(objective_class(cfg).processes[0], Resampling)  # any may be noise, and time is continuous
    unread = {
        "time_conditioning": cfg.time_conditioning and name == "ar",
        "T": cfg.T and (any_token or name in ("ar", "sedd")),
        "subs_masking": cfg.subs_masking and (any_token or name in ("ar", "sedd")),
        "training.importance_sampling": training.importance_sampling and name in ("ar", "d3pm"),
        "training.change_of_variables": training.change_of_variables and name not in ("subs", "bd3lm"),
        "training.loss_weight": training.loss_weight != "elbo" and name not in ("subs", "bd3lm"),
        "training.resample": training.resample and (any_token or name == "ar"),
        "training.ignore_bos": training.ignore_bos and name == "ar",
        "classify.masks": cfg.classify.masks == "independent" and name == "ar",
        "training.masking": name == "ar" and not cfg.masking._target_.endswith("Bernoulli"),
    }
    _check_sampler(cfg, name)
    for key, contradicts in unread.items():
        if contradicts:
            value = cfg.masking._target_ if key == "training.masking" else OmegaConf.select(cfg, key)
            raise ValueError(f"{key}={value} means nothing to parameterization={name}; leave it out")
    if cfg.classify.sharing not in ("per_class", "conditional"):
        raise ValueError(f"classify.sharing={cfg.classify.sharing} is unknown; choose per_class or conditional")
    if cfg.classify.sharing == "conditional":
        _check_conditional(cfg)
    _check_start(cfg)
    _check_sampling(cfg, name)
    _check_latents(cfg, name)
    check_direction(cfg, name)
    _check_blocks(cfg, name)
    _check_rates(cfg)
    _check_masked_lm(cfg)
    if cfg.data.get("fill") and cfg.mode._target_ == "palimpsest.tasks.classify.classify":
        raise ValueError(
            f"data.fill={cfg.data.fill}: mode=classify compares texts whose length is shown; leave it null"
        )
    if cfg.data.long_texts == "drop" and cfg.mode._target_ == "palimpsest.tasks.classify.classify":
        raise ValueError(
            "data.long_texts=drop: mode=classify would be judged by the short texts alone; use windows or truncate"
        )
    _check_noise(cfg, name)


def _check_noise(cfg: DictConfig, name: str) -> None:
    training = cfg.training
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
    _check_precision(cfg)
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


def _check_precision(cfg: DictConfig) -> None:
    if trains(cfg) and cfg.trainer.precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision={cfg.trainer.precision} keeps weights in 16 bits, where most updates of a training are "
            f"rounded away; use trainer.precision={cfg.trainer.precision.replace('true', 'mixed')}"
        )


def _check_latents(cfg: DictConfig, name: str) -> None:
    """Latents and the objective that reads them come together."""
    if cfg.latents and name != "mmldlm":
        raise ValueError(
            f"latents={cfg.latents._target_}: parameterization={name} makes nothing of latents; add "
            "algo=mmldlm backbone=mmdit, or set latents=none"
        )
    if name == "mmldlm" and not cfg.latents:
        raise ValueError("algo=mmldlm is of texts and their latents; add latents=lsa, synthetic, self, hf or file")


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


def _check_sampling(cfg: DictConfig, name: str) -> None:
    sampling, sampler = cfg.sampling, cfg.sampler._target_
    length, number = sampling.max_length, sampling.num_samples
    if number is not None and number < 1:
        raise ValueError(f"sampling.num_samples={number} must be at least 1, or null for sampling.num_sample_batches")
    if length is not None and not 1 <= length <= cfg.model.length:
        raise ValueError(f"sampling.max_length={length} must lie in 1..{cfg.model.length} (model.length)")
    if length is not None and sampler.startswith("palimpsest.samplers.semi_autoregressive."):
        raise ValueError(
            f"sampling.max_length={length} contradicts sampling.predictor=semi_ar, whose texts have model.length + "
            "sampling.stride_length x sampling.num_strides tokens; leave it out"
        )
    if (cfg.sampler.get("how") or cfg.sampler.get("inner", {}).get("how")) is None:
        return
    by_confidence = {"threshold": sampling.threshold is not None, "remask": sampling.remask == "low_confidence"}
    for key, chosen in by_confidence.items():
        if chosen and sampling.order in ("random", "left_to_right", "entropy"):
            raise ValueError(
                f"sampling.{key}={sampling[key]} goes by confidence, and sampling.order={sampling.order} does not; "
                "leave one of them out"
            )
    if sampling.threshold is not None and sampling.schedule != "linear":
        raise ValueError(
            f"sampling.threshold={sampling.threshold} says how many tokens a step writes, and so does "
            f"sampling.schedule={sampling.schedule}; leave one of them out"
        )


def _check_conditional(cfg: DictConfig) -> None:
    network = located(cfg.backbone._target_)
    if not (isinstance(network, type) and network.takes_classes):
        raise ValueError(
            f"classify.sharing=conditional needs a network that can be told a class, backbone=dit, ar or mmdit; "
            f"{cfg.backbone._target_} can not, so use classify.sharing=per_class"
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


def _check_rates(cfg: DictConfig) -> None:
    """Keys of masking=rates that nobody would read."""
    rates = cfg.masking._target_.endswith(".Rates")
    continuous = cfg.training.masking_rates == "continuous"
    typed = {f"training.{key}": cfg.training[key] for key, unset in _RATES.items() if cfg.training[key] != unset}
    if typed and not rates:
        listing = " ".join(f"{key}={value}" for key, value in typed.items())
        raise ValueError(f"{listing}: training.masking=rates draws from them, and {cfg.masking._target_} does not; "
                         "add training.masking=rates (algo=mlm brings it), or leave them out")  # fmt: skip
    limits = [key for key in typed if key.endswith(("_min", "_max"))]
    if limits and not continuous:
        raise ValueError(
            f"{limits[0]}={typed[limits[0]]} limits training.masking_rates=continuous, and they are a list; leave one "
            "of them out"
        )


def _check_masked_lm(cfg: DictConfig) -> None:
    """What algo=mlm, backbone=hf_mlm and a given prefix can not go with."""
    published, prefix = cfg.backbone._target_.endswith(".hf_mlm"), cfg.training.prefix_length
    if is_mlm(cfg) and cfg.data.get("score_special"):
        raise ValueError(
            "data.score_special=true contradicts algo=mlm, which never masks special tokens; leave it out, or use "
            f"algo=mdlm training.masking=rates training.loss_weight=uniform training.prefix_length={prefix}"
        )
    if is_mlm(cfg) and cfg.data.get("fill"):
        raise ValueError(
            f"data.fill={cfg.data.fill} lets a model write where a text ends, and algo=mlm never masks special tokens; "
            "set data.fill=null, or use algo=mdlm"
        )
    if published and cfg.time_conditioning:
        raise ValueError(
            f"time_conditioning=true means nothing to backbone=hf_mlm, which has no place for it (parameterization="
            f"{law(cfg)}); leave it out, or use backbone=dit"
        )
    if published and cfg.model.get("mask_padding") is False:
        raise ValueError("model.mask_padding=false: backbone=hf_mlm always hides padding; leave it out")
    if prefix and cfg.mode._target_ == "palimpsest.tasks.classify.classify":
        log.warning(
            "training.prefix_length=%d: classes are compared by what follows the first %d tokens of each row, and what "
            "these say of the class is left out; training.prefix_length=0 reads whole texts", prefix, prefix,
        )  # fmt: skip


# What draws noise in a block, and means nothing where blocks have one token, which is always masked.
_NOISE = {"training.importance_sampling": False, "training.change_of_variables": False, "training.resample": False,
          "time_conditioning": False, "T": 0, "training.clip_search_widths": []}  # fmt: skip


def _check_blocks(cfg: DictConfig, name: str) -> None:  # noqa: C901
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
        for key in ("var_length", "context"):
            if cfg.sampling[key]:
                value = str(cfg.sampling[key]).lower()
                raise ValueError(f"sampling.{key}={value} means nothing to parameterization={name}; leave it out")
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
    if training.fix_clipping and not training.clip_search_widths:
        raise ValueError("training.fix_clipping=true measures the intervals of training.clip_search_widths=[], which "
                         "are none; name some, e.g. [0.5,0.6,0.7]")  # fmt: skip
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
    if not cfg.sampler._target_.startswith("palimpsest.samplers.block.") and size != length:
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
        "sampling.predictor": (not cfg.sampler._target_.startswith("palimpsest.samplers.block."),
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
    if (
        pretrain
        and cfg.mode._target_ == "palimpsest.tasks.train.train"
        and sharing == "per_class"
        and cfg.data.label is None
    ):
        raise ValueError(
            f"classify.pretrain={pretrain} starts the models of classes, and mode=train without data.label trains one "
            "model of all texts; set data.label, mode=classify or classify.sharing=conditional"
        )
    published = None if cfg.backbone.get("from_scratch") else cfg.backbone.get("name_or_path")
    for key, brings in (
        ("training.from_pretrained", cfg.training.from_pretrained),
        ("backbone.name_or_path", published),
    ):
        if cfg.training.start_from_counts and brings:
            raise ValueError(
                f"training.start_from_counts=true is where new weights begin, and {key}={brings} brings others; leave "
                "one of them out"
            )
