"""Checks that the chosen parts fit together, by what they declare; they run before data are read."""

import logging
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from palimpsest.denoisers import BlockDenoiser, ClassGuided, mismatch
from palimpsest.diffusion import check_reads
from palimpsest.estimators.base import Estimator
from palimpsest.estimators.nelbo import Nelbo, comparison_mask_sampler
from palimpsest.experiment.directions import check_direction
from palimpsest.objectives.base import Objective
from palimpsest.process import Process, Resampling
from palimpsest.samplers.block import check_context
from palimpsest.samplers.first_hitting import UNFIT
from palimpsest.samplers.semi_autoregressive import UNFULL
from palimpsest.samplers.unmasking import not_by_confidence
from palimpsest.settings.command_line import key_of
from palimpsest.settings.instantiation import resolve_target
from palimpsest.tasks.base import Mode

log = logging.getLogger(__name__)


def check_parts(
    cfg: DictConfig, objective: Objective, process: Process, network: type, sampler: Callable, estimator: Estimator
) -> None:
    """Refuse parts of a configuration that do not fit together.

    Raises:
        ValueError: with the setting, its value and the remedy.
    """
    mode = resolve_target(cfg.mode._target_).mode
    _check_process(objective, process)
    _check_sampler(cfg, objective, process, sampler)
    _check_guidance(cfg, objective, sampler, mode)
    _check_measuring(objective, estimator, mode.compares)
    check_reads(objective, network)
    _check_network(cfg, objective, network)
    if mode.trains:
        objective.check_network(network)
    _check_blocks(cfg, objective)
    if cfg.latents and not objective.reads_latents:
        raise ValueError(
            f"latents={cfg.latents._target_}: parameterization={objective.name} makes nothing of latents; add "
            "algo=mmldlm backbone=mmdit, or set latents=none"
        )
    if objective.reads_latents and not cfg.latents:
        raise ValueError("algo=mmldlm is of texts and their latents; add latents=lsa, synthetic, self, hf or file")
    if objective.causal and cfg.training.ignore_bos:
        raise ValueError(f"training.ignore_bos=true means nothing to parameterization={objective.name}; leave it out")
    if objective.exact and cfg.classify.masks == "independent":
        raise ValueError(f"classify.masks=independent means nothing to parameterization={objective.name}; leave it out")
    check_direction(cfg, objective)
    _check_special(cfg, objective)
    _check_starts(cfg, mode)
    _check_schedule(cfg, mode.trains)
    if cfg.classify.sharing == "conditional":
        _check_conditional(cfg, network)
    _check_class_comparison(cfg, objective)
    if mode.compares:
        _check_comparing(cfg)


def _check_class_comparison(cfg: DictConfig, objective: Objective) -> None:
    """Refuse settings of classes where the network is told none, or where no classes are compared."""
    weight, bigrams = cfg.classify.discriminative_weight, cfg.classify.bigrams
    class_lr = cfg.optim.get("class_lr")
    if class_lr and cfg.classify.sharing != "conditional":
        raise ValueError(
            f"optim.class_lr={class_lr} is for a network that is told classes; add classify.sharing=conditional, or "
            "leave it out"
        )
    if weight and cfg.classify.sharing != "conditional":
        raise ValueError(
            f"classify.discriminative_weight={weight} compares the classes of one network; add "
            "classify.sharing=conditional, or leave it out"
        )
    if bigrams and not objective.reads_bigrams:
        raise ValueError(
            f"classify.bigrams={bigrams} means nothing to parameterization={objective.name}, which does not read pairs "
            "of tokens; leave it out, or use parameterization=subs or algo=mlm"
        )
    if bigrams and cfg.classify.sharing != "conditional":
        raise ValueError(
            f"classify.bigrams={bigrams} belongs to one network for all classes; add classify.sharing=conditional, or "
            "leave it out"
        )
    if bigrams and not cfg.eval.checkpoint_path and not (weight and cfg.training.start_from_counts):
        raise ValueError(
            f"classify.bigrams={bigrams} is fitted to tell classes apart; add classify.discriminative_weight=0.2 and "
            "training.start_from_counts=true, or leave it out"
        )


def check_typed(cfg: DictConfig, words: Sequence[str]) -> None:
    """Refuse a typed value that is the default of a setting, which nothing would follow.

    Raises:
        ValueError: sampling.order=margin with positions that go by confidence.
    """
    how = cfg.sampler.get("how") or (cfg.sampler.get("inner") or {}).get("how")
    typed = any(key_of(word) == "sampling.order" for word in words)
    if how is None or not typed or how.order == "confidence" or "order" in cfg.estimator:
        return
    by_confidence = {"threshold": how.threshold is not None, "remask": how.remask == "low_confidence"}
    for key, chosen in by_confidence.items():
        if chosen:
            raise ValueError(not_by_confidence(key, how[key], how.order))


def _check_comparing(cfg: DictConfig) -> None:
    """Refuse texts by which classes cannot be compared."""
    prefix = cfg.training.prefix_length
    if cfg.data.get("fill"):
        raise ValueError(
            f"data.fill={cfg.data.fill}: mode=classify compares texts whose length is shown; leave it null"
        )
    if cfg.data.long_texts == "drop":
        raise ValueError(
            "data.long_texts=drop: mode=classify would be judged by the short texts alone; use windows or truncate"
        )
    if prefix:
        log.warning(
            "training.prefix_length=%d: classes are compared by what follows the first %d tokens of each row, and what "
            "these say of the class is left out; training.prefix_length=0 reads whole texts",
            prefix,
            prefix,
        )


def _check_process(objective: Objective, process: Process) -> None:
    if not isinstance(process, Process):
        raise ValueError("process= must build a forward process of process.py, with its method `of`")
    if type(process) not in objective.processes:
        own = " or ".join(one.__name__.lower() for one in objective.processes)
        raise ValueError(
            f"process={type(process).__name__.lower()} is not that of parameterization={objective.name}, which is of "
            f"{own}; leave process= out: the objective brings its own"
        )


def _check_sampler(cfg: DictConfig, objective: Objective, process: Process, sample: Callable) -> None:
    name, kind = cfg.sampler._target_, type(process)
    if "processes" not in vars(sample):
        raise ValueError(
            f"sampling.predictor={name} does not say of which process it writes texts; make it with "
            "sampler_of(Step, Absorbing), as CONTRIBUTING.md shows"
        )
    if kind not in sample.processes:
        fitting = "uniform" if issubclass(kind, Resampling) else "ddpm_cache"
        raise ValueError(
            f"sampling.predictor: samplers/{name.split('.')[-2]}.py writes texts of the process "
            f"{sample.processes[0].__name__}, and parameterization={objective.name} is of {kind.__name__}; use "
            f"sampling.predictor={fitting}"
        )
    if not issubclass(objective.model_class, sample.denoiser):
        raise ValueError(mismatch(sample.__module__, objective.model_class, sample.denoiser))
    if sample.independent and not objective.independent_unmasking:
        raise ValueError(UNFIT)
    length = cfg.sampling.max_length
    if length is not None and not 1 <= length <= cfg.model.length:
        raise ValueError(f"sampling.max_length={length} must lie in 1..{cfg.model.length} (model.length)")
    if length is not None and sample.lengthens:
        raise ValueError(
            f"sampling.max_length={length} contradicts sampling.predictor=semi_ar, whose texts have model.length + "
            "sampling.stride_length x sampling.num_strides tokens; leave it out"
        )
    full_rows = cfg.data.wrap or cfg.data.get("fill")
    if sample.lengthens and _writes(cfg) and not full_rows:
        raise ValueError(UNFULL)


def _writes(cfg: DictConfig) -> bool:
    """Return True if the command samples texts."""
    mode = resolve_target(cfg.mode._target_).mode
    shows = mode.trains and cfg.sampling.num_sample_log > 0 and (mode.compares or cfg.eval.generate_samples)
    return mode.writes or shows


def _check_guidance(cfg: DictConfig, objective: Objective, sample: Callable, mode: Mode) -> None:
    """Refuse guidance for a sampler that needs more of a model than a guided one has."""
    to_class = cfg.classify["class"]
    if to_class is None or not mode.writes or issubclass(ClassGuided, sample.denoiser):
        return
    order = "from left to right" if objective.causal else "block after block"
    anywhere = "" if objective.causal else ", or block_size=model.length sampling.predictor=ddpm_cache"
    raise ValueError(
        f"classify.class={to_class} guides models that write anywhere in a text, and parameterization={objective.name} "
        f"writes {order}; leave it out, and use data.label= for the model of one class{anywhere}"
    )


def _check_measuring(objective: Objective, estimator: Estimator, compares: bool) -> None:
    """Refuse an objective that eval.estimator cannot measure. compares: classes are compared."""
    estimator.check(objective)
    if compares and isinstance(estimator, Nelbo):
        objective.bound(comparison_mask_sampler(estimator, objective))


def _check_network(cfg: DictConfig, objective: Objective, network: type) -> None:
    """Refuse a network that cannot see the time if the objective needs it, or the other way round."""
    sees_time = "time_conditioning" in cfg.backbone
    if objective.needs_time and not (cfg.time_conditioning and sees_time):
        raise ValueError(
            f"parameterization={objective.name} with time_conditioning=false: what it predicts is a function of t, "
            "which the network then cannot see; set time_conditioning=true, with a network that has a place for it, "
            "such as backbone=dit"
        )
    if cfg.time_conditioning and not sees_time:
        raise ValueError(
            f"time_conditioning=true means nothing to backbone={network.__name__} with parameterization="
            f"{objective.name}; leave it out, or use backbone=dit"
        )
    if cfg.trainer.compile and not network.compiles:
        raise ValueError(f"trainer.compile=true: {network.__name__} does not support it; leave it out")
    if objective.change_of_variables and not cfg.time_conditioning:
        raise ValueError(
            "training.change_of_variables=true changes what a time-conditioned network is shown, and "
            "time_conditioning=false shows it nothing; use training.importance_sampling=true"
        )

    if cfg.data.get("document_mask"):
        by_blocks = issubclass(objective.model_class, BlockDenoiser)
        if by_blocks or not network.separates_documents:
            part = f"parameterization={objective.name}" if by_blocks else f"backbone={network.__name__}"
            raise ValueError(
                f"data.document_mask=true: {part} reads whole rows; set it to false, or use backbone=dit with "
                "parameterization=subs, mlm, sedd, d3pm, udlm or gidd, or parameterization=ar"
            )


def _check_blocks(cfg: DictConfig, objective: Objective) -> None:
    """Refuse a sampler or rows that do not fit block diffusion."""
    if not issubclass(objective.model_class, BlockDenoiser):
        return
    sampler, size = resolve_target(cfg.sampler._target_), cfg.block_size
    by_blocks = issubclass(sampler.denoiser, BlockDenoiser)
    if objective.exact and cfg.time_conditioning:
        raise ValueError(
            "time_conditioning=true means nothing to blocks of one token, which are always masked; leave it out"
        )
    if cfg.data.get("segments"):
        _check_segments(cfg, by_blocks)
    elif not by_blocks and size != cfg.model.length:
        raise ValueError(
            f"algo=bd3lm with block_size={size} writes block after block, and {cfg.sampler._target_} anywhere in a "
            "text; use sampling.predictor=block"
        )
    elif by_blocks:
        check_context(cfg.sampling.context, size)
    if cfg.sampling.var_length and not cfg.data.wrap and not cfg.data.get("fill"):
        raise ValueError(
            "sampling.var_length=true with data.wrap=false: a model of single texts is told their lengths, and has not "
            "learned to end them; use data.wrap=true or data.fill=eos"
        )


def _check_segments(cfg: DictConfig, by_blocks: bool) -> None:
    """Refuse settings without a meaning if the blocks are the segments of a text."""
    size = cfg.block_size
    sampling = cfg.sampling
    only_block = "texts are written part after part, which only sampling.predictor=block does"
    for key, value, contradicts, reason in (
        ("block_size", size, size != cfg.model.length, "blocks are the parts of a text, whatever their lengths"),
        ("sampling.predictor", cfg.sampler._target_, not by_blocks, only_block),
        ("sampling.var_length", sampling.var_length, sampling.var_length, "the rooms of a text's parts are fixed"),
        ("sampling.context", sampling.context, sampling.context is not None, "every part sees all before it"),
    ):
        if contradicts:
            raise ValueError(f"{key}={value} contradicts data.segments=true: {reason}; leave it out")


def _check_special(cfg: DictConfig, objective: Objective) -> None:
    """Refuse data whose special tokens must be predicted, for an objective that never masks them."""
    if not objective.masks_special and cfg.data.get("score_special"):
        raise ValueError(
            "data.score_special=true contradicts algo=mlm, which never masks special tokens; leave it out, or use "
            f"algo=mdlm training.masking=rates training.loss_weight=uniform training.prefix_length="
            f"{cfg.training.prefix_length}"
        )
    if not objective.masks_special and cfg.data.get("fill"):
        raise ValueError(
            f"data.fill={cfg.data.fill} lets a model write where a text ends, and algo=mlm never masks special tokens; "
            "set data.fill=null, or use algo=mdlm"
        )


def _check_starts(cfg: DictConfig, mode: Mode) -> None:
    """Refuse two sources of the weights that a training starts from."""
    pretrain = cfg.classify.pretrain
    for key, path in (
        ("training.from_pretrained", cfg.training.from_pretrained),
        ("eval.checkpoint_path", cfg.eval.checkpoint_path),
    ):
        if pretrain and path:
            raise ValueError(
                f"classify.pretrain={pretrain} trains what the models start from, and {key}={path} names it; leave one "
                "of them out"
            )
    for name, default in (("pretrain_lr_factor", 1), ("pretrain_steps", cfg.trainer.max_steps)):
        if cfg.classify[name] != default and not pretrain:
            raise ValueError(
                f"classify.{name}={cfg.classify[name]} is for a shared start; add classify.pretrain=all, or leave it "
                "out"
            )
    of_all = mode.trains and not mode.compares and cfg.classify.sharing == "per_class" and cfg.data.label is None
    if pretrain and of_all:
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


def _check_schedule(cfg: DictConfig, trains: bool) -> None:
    """Refuse a schedule that counts to another end than the training; warn of a warm-up that the training never
    leaves: it may be a trial."""
    steps, schedule = cfg.trainer.max_steps, cfg.lr_scheduler
    total, warmup = schedule.get("num_training_steps", steps), schedule.get("num_warmup_steps", 0)
    if total != steps:
        raise ValueError(
            f"lr_scheduler.num_training_steps={total} contradicts trainer.max_steps={steps}, where the training ends; "
            "leave the first out, it follows the second"
        )
    if trains and warmup >= steps > 0:
        log.warning(
            "lr_scheduler.num_warmup_steps=%d is not below trainer.max_steps=%d: the whole training is warm-up, and "
            "the learning rate never reaches optim.lr; set lr_scheduler.num_warmup_steps=%d or so",
            warmup,
            steps,
            steps // 20,
        )


def _check_conditional(cfg: DictConfig, network: type) -> None:
    if not network.takes_classes:
        raise ValueError(
            "classify.sharing=conditional needs a network that can be told a class, backbone=dit, ar, hf_mlm or mmdit; "
            f"{cfg.backbone._target_} cannot, so use classify.sharing=per_class"
        )
    if cfg.data.label is not None:
        raise ValueError(
            f"classify.sharing=conditional is one network for all classes, and data.label={cfg.data.label} is one "
            "class; leave one of them out"
        )
    if cfg.data.wrap:
        raise ValueError(
            "classify.sharing=conditional with data.wrap=true: a chunk of several texts has no class to be told; set "
            "data.wrap=false"
        )
