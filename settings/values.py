"""Type and range checks for the values of a configuration, before anything is read or built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

LARGEST = 2**31 - 1  # of whole numbers that have no closer limit
COUNT = 10**6  # of numbers of which as many entries are made: a slip of the finger must not fill the memory


@dataclass(frozen=True)
class Setting:
    """The values that a key takes.

    said: completes the message "KEY=VALUE must be ...". typed: "name" or "path" where the command line takes the value
    letter by letter; None: as Hydra reads it.
    """

    said: str
    accepts: Callable[[object], bool]
    typed: str | None = None


def shown(value: object) -> str:
    """A value as it is typed, cut where it is long."""
    if isinstance(value, list):
        text = f"[{','.join(map(shown, value))}]"
    elif value is None:
        text = "null"
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def whole(least: int = 0, most: int = LARGEST) -> Setting:
    """Whole numbers from `least` to `most`."""
    return Setting(f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def real(interval: str) -> Setting:
    """Numbers in an interval such as "[0, 1)"; never nan or infinite."""
    low, high = map(float, interval[1:-1].split(","))

    def accepts(value: object) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value):
            return False
        above = value >= low if interval[0] == "[" else value > low
        return above and (value <= high if interval[-1] == "]" else value < high)

    return Setting("a number" if interval == "(-inf, inf)" else f"a number in {interval}", accepts)


def one_of(*names: object) -> Setting:
    """The values themselves; True is not 1."""
    known = [(type(name), name) for name in names]
    return Setting(f"one of: {', '.join(map(shown, names))}", lambda v: (type(v), v) in known)


def list_of(entry: Setting, least: int = 0, example: str = "") -> Setting:
    """Lists of at least so many entries."""
    said = f"a list{' of at least one entry' if least else ''} such as {example}; each entry {entry.said}"
    return Setting(said, lambda v: isinstance(v, list) and len(v) >= least and all(map(entry.accepts, v)), entry.typed)


def either(*settings: Setting) -> Setting:
    """What any of them takes."""
    typed = next((s.typed for s in settings if s.typed), None)
    return Setting(" or ".join(s.said for s in settings), lambda v: any(s.accepts(v) for s in settings), typed)


NULL = Setting("null", lambda v: v is None)


def maybe(setting: Setting) -> Setting:
    """The same, or null."""
    return either(setting, NULL)


FLAG = Setting("true or false", lambda v: type(v) is bool)
TEXT = Setting("a text", lambda v: isinstance(v, str), "name")
NAME = Setting("a name", lambda v: isinstance(v, str) and v.strip() != "", "name")
FOLDER = Setting(
    "a name of at most 200 characters without / and \\, and not .. (a run's folder is called so)",
    lambda v: isinstance(v, str) and v.strip(" .") != "" and len(v) <= 200 and v.isprintable()
    and not any(letter in v for letter in "/\\"), "name",
)  # fmt: skip
PATH = Setting("a path or a name", lambda v: isinstance(v, str), "path")
PRESENT_PATH = Setting("a path or a name", lambda v: isinstance(v, str) and v.strip() != "", "path")
GROUP = Setting("a group of settings; set one of its keys", lambda v: v == {})
SHARE = real("[0, 1]")
RATES = list_of(real("(0, 1]"), 1, "[1.0,0.5,0.1]")

# The keys that take these values. A key's entry is its longest ending that stands here; `files.*`: every key of files.
_TABLE: tuple[tuple[Setting, str], ...] = (
    # sizes of networks
    (maybe(whole(1, 2**16)), "hidden_size cond_dim n_blocks n_heads latent_size"),
    (whole(1, 2**20), "length latent_tokens chunk block_size"),
    (maybe(real("[0, 1)")), "dropout"),
    (one_of("sdpa", "flash_attn", "flex"), "attn_backend"),
    (maybe(FLAG), "mask_padding time_conditioning score_special normalize"),
    # switches
    (FLAG, """subs_masking noise_removal kv_cache first_hitting var_length show html gif antithetic_sampling skip_idle
        importance_sampling change_of_variables start_from_counts gradient_checkpointing resample fix_clipping
        search.fixed disable_ema generate_samples compute_generative_perplexity calibrate baselines resume_from_ckpt
        goes_on offline pin_memory persistent_workers find_unused_parameters ignore_bos text_as_dit from_scratch
        new_head drop_empty insert_train_eos insert_train_special insert_valid_eos insert_valid_special random_crop
        segments data.streaming wrap drop_blank shuffle auto_insert_metric_name enable_version_counter"""),
    # counts
    (whole(0, 2**32 - 1), "seed"),
    (whole(0), "T num_shown prefix_length num_warmup_steps cooldown curriculum_end"),
    (whole(0, COUNT), "num_sample_log num_examples num_strides corrector_steps self_correction_steps"),
    (whole(1, COUNT), "samples_per_prompt num_draws max_draws"),
    (whole(1), """stride_length tokens_per_step corrector_tokens perplexity_batch_size
        global_batch_size eval_global_batch_size prefetch_factor lanes shuffle_buffer sample_texts keep_last
        max_steps num_training_steps num_rewarmup_steps every_n_steps log_every_n_steps val_check_interval
        flush_logs_every_n_steps tokens fit_rows latents.batch_size max_skipped_steps plateau.patience pretrain_steps
        sizes.*"""),
    (whole(1, COUNT), "num_train_per_class num_validation_per_class num_test_per_class"),
    (whole(1, COUNT), "sampling.steps inner.steps sampler.steps directed.steps latent_steps latent.steps"),
    (whole(2, COUNT), "edit_path edit.path"),
    (maybe(whole(2)), "segment_room"),
    (whole(-1), "num_sanity_val_steps save_top_k"),
    (maybe(whole(0)), "data.label num_workers every_n_train_steps"),
    (maybe(whole(0, COUNT)), "mode.num_samples"),
    (maybe(whole(1, COUNT)), "num_samples num_sample_batches num_batches"),
    (maybe(whole(1)), """top_k context max_length vocab_size dim window
        max_train_texts max_valid_texts max_test_texts batch_size eval_batch_size accumulate_grad_batches
        milestone_every max_failed_saves classify.patience num_proc"""),
    (maybe(list_of(list_of(whole(0), 2, "[1000,256]"), 1, "[[0,64],[1000,256]]")), "batch_ramp"),
    (list_of(whole(1), 1, "[10000,20000]"), "periods"),
    # numbers
    (SHARE, """remask_eta latent_eta latent.eta edit_rate edit.rate masking_rate_min masking_rate_max rate_min rate_max
        sampling_eps_min sampling_eps_max label_dropout min_ratio peak_decay max_overlap"""),
    (real("[0, 1)"), "ema sampling_eps noise.eps base.eps beta1 beta2 latents.noise test_share"),
    (maybe(real("[0, 1)")), "validation_share"),
    (real("(0, 1]"), "nucleus_p decay_share"),
    (maybe(real("(0, 1]")), "threshold"),
    (real("(0, 1)"), "word_share plateau.factor plateau.floor"),
    (real("(0.5, 1]"), "confidence"),
    (real("[0.001, 1]"), "clip_search_delta search.delta"),
    (real("[0, inf)"), """temperature guidance guided.weight gamma text_weight latent_weight latent_cosine_weight
        cosine_weight min_delta lr matrix_lr optim.eps weight_decay"""),
    (maybe(real("[0, inf)")), "min_entropy gradient_clip_val"),
    (maybe(real("(0, inf)")), "target_se every_minutes"),
    (real("(0, inf)"), "sigma_min sigma_max"),
    (real("(-inf, inf)"), "edit_alpha edit.alpha"),
    (real("[-12, 12]"), "gumbel_tau_log10_start gumbel_tau_log10_end"),
    (real("[0, 3600]"), "show_delay"),
    (real("[0.01, 10080]"), "timeout_minutes"),
    (list_of(real("(0, 1]"), 0, "[0.5,0.6,0.7]"), "clip_search_widths search.widths"),
    (RATES, "callbacks.masking_rates.rates"),
    (either(RATES, one_of("continuous")), "training.masking_rates masking.rates"),
    (real("[0, inf)"), "joint_modes.* modes.*"),
    (Setting("null or weights such as {l2t: 1, t2l: 1}", lambda v: v is None), "joint_modes"),
    # words
    (one_of("left_to_right", "confidence", "margin", "entropy", "random"), "order"),
    (one_of("linear", "cosine", "exponential"), "schedule"),
    (one_of("none", "low_confidence", "remdm"), "remask"),
    (one_of("random", "informed"), "corrector"),
    (one_of("network", "unigrams"), "guidance_by guided.by"),
    (one_of("joint", "l2t", "t2l", "edit", None), "direction"),
    (one_of("simultaneous", "latent_first"), "joint_order"),
    (one_of("random", "entropy", "suffix", "contrast"), "edit_positions edit.positions"),
    (one_of("shift", "centroid", "neighbour", "slerp"), "edit_target edit.target"),
    (one_of("elbo", "uniform"), "loss_weight"),
    (one_of("sample", "batch"), "masking_rate_per masking.per"),
    (one_of("v", "x0", "eps"), "latent_target latent.target"),
    (one_of("mse", "huber", "mse_cosine", "cosine"), "latent_loss latent.loss"),
    (one_of("per_class", "conditional"), "sharing"),
    (one_of("common", "independent"), "masks"),
    (one_of("1-sqrt", "linear", "cosine"), "lr_scheduler.decay"),
    (one_of("truncate", "windows", "drop", "error"), "long_texts"),
    (one_of("error", "cut"), "latents.long_texts"),
    (one_of("eos", None), "fill"),
    (one_of("reference", None), "protocol"),
    (one_of("mean", "cls", "last", None), "pooling"),
    (one_of("operations", "operators"), "plan judge.kind"),
    (one_of("min", "max"), "checkpoint_monitor.mode"),
    (one_of("step", "epoch", None), "logging_interval"),
    (either(one_of("uniform", "empirical"), list_of(SHARE, 2, "[0.3,0.7]")), "prior"),
    # texts, names, paths
    (maybe(TEXT), "prefix template prompt document_start"),
    (FOLDER, "data.name model.name"),
    (NAME, """csv.name tensorboard.name train valid validation test text_column classify.split
        hub_id monitor filename files.* hub_splits.*"""),
    (maybe(NAME), """project notes group job_type wandb.name id split pretrain prompt_column label_column
        hub_config hub_revision detokenizer backbone.config mask_token"""),
    (PRESENT_PATH, """output_dir cache_dir tokenizer_name_or_path gen_ppl_eval_model_name_or_path scorer_name dirpath
        folder"""),
    (maybe(PATH), """checkpoint_path from_pretrained resumed resume_ckpt_path save_dir name_or_path data.path
        source.path latents.path validation_path test_path tokenizer_folder"""),
    (list_of(PATH, 0, "[outputs/.../classify/test]"), "compare"),
    (either(NAME, list_of(NAME, 1, "[question,answer]")), "text_columns"),
    (maybe(list_of(TEXT, 1, "['{question}',' {answer}']")), "parts"),
    (maybe(list_of(NAME, 1, "[negative,positive]")), "label_names attributes"),
    (list_of(NAME, 0, "[unsupervised]"), "unlabelled"),
    (maybe(list_of(NAME, 1, "[embeddings,blocks]")), "freeze"),
    (maybe(either(NAME, list_of(NAME, 0, "[first,second]"))), "tags"),
    (maybe(either(whole(0), NAME)), "edit_class edit.to_class classify.class to_class"),
    (maybe(either(whole(0), TEXT)), "version"),
    # arguments of lightning.Trainer
    (one_of("auto", "cpu", "gpu", "cuda"), "accelerator"),
    (either(one_of("auto"), whole(1, 2**16)), "devices"),
    (whole(1, 2**16), "num_nodes"),
    (either(FLAG, whole(1)), "fast_dev_run"),
    (either(whole(0), SHARE), "limit_train_batches limit_val_batches limit_test_batches"),
    (one_of(None, "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "32", "16", "64", "bf16", 16,
            32, 64), "precision"),
    (either(FLAG, one_of("link"), NULL), "save_last"),
    (maybe(FLAG), "trainer.benchmark trainer.sync_batchnorm trainer.detect_anomaly trainer.enable_autolog_hparams"),
    (either(FLAG, one_of("warn"), NULL), "trainer.deterministic"),
    (maybe(whole(1)), "trainer.min_steps trainer.min_epochs"),
    (whole(0), "trainer.reload_dataloaders_every_n_epochs"),
    (either(whole(0), SHARE), "trainer.overfit_batches trainer.limit_predict_batches"),
    (one_of("norm", "value", None), "trainer.gradient_clip_algorithm"),
    (one_of("simple", "advanced", "pytorch", None), "trainer.profiler"),
    (maybe(NAME), "trainer.model_registry trainer.max_time"),
    (maybe(PATH), "trainer.default_root_dir"),
    # groups, which have keys of their own
    (GROUP, """process loader streaming sampling training eval classify checkpointing trainer mode model backbone noise
        masking
        estimator sampler parameterization optim lr_scheduler strategy data source sources choice how inner ending race
        beside views guided directed latent edit token_choice base search within parameterization.text
        parameterization.schedule
        within.schedule text.schedule files hub_splits sizes noising"""),
    (maybe(GROUP), "parameterization.modes wandb callbacks logger latents plateau estimator.noising truth judge"),
)  # fmt: skip
_SETTINGS = {key: setting for setting, keys in _TABLE for key in keys.split()}
_TARGET = re.compile(r"\w+(\.\w+)+")
_CIRCLE = "Recursive interpolation detected"
# Words of Hydra's own.
_OF_HYDRA = ("_partial_", "_convert_", "_args_", "_recursive_")


@cache
def setting_of(key: str) -> Setting | None:
    """The values that a key takes; None for one that no file in configs/ has."""
    parts = key.split(".")
    for start in range(len(parts)):
        ending = parts[start:]
        for name in (ending, [*ending[:-1], "*"]):
            if found := _SETTINGS.get(".".join(name)):
                return found
    return None


def _leaves(node: dict[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Keys and values, interpolations as they are written."""
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_numbers(cfg: DictConfig) -> None:
    """Raise ValueError for the first value that its key does not take, with the key, the value and what is possible."""
    leaves = dict(_leaves(OmegaConf.to_container(cfg)))
    refers = {key: value for key, value in leaves.items() if isinstance(value, str) and "${" in value}
    for key, value in leaves.items():
        if key not in refers:
            _check(key, value)
    for key, value in _referred(cfg, refers).items():  # later, so that a mistake is named where it was typed
        _check(key, value)
    _check_open_sizes(cfg)


def _referred(cfg: DictConfig, refers: dict[str, str]) -> dict[str, object]:
    """The values behind interpolations. A group is checked where it stands."""
    values, failed = {}, {}
    for key in refers:
        try:
            value = OmegaConf.select(cfg, key)
            values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_list(value) else value
        except (OmegaConfBaseException, RecursionError) as error:
            failed[key] = str(error).splitlines()[0]
    for key in failed:  # where it begins: what refers to it fails too
        if not any(f"${{{other}}}" in refers[key] for other in failed if failed[other] == failed[key] != _CIRCLE):
            raise ValueError(f"{key}={refers[key]} must be a value, or refer to a key that exists: {failed[key]}")
    return {key: {} if OmegaConf.is_dict(value) else value for key, value in values.items()}


def _check(key: str, value: object) -> None:
    name = key.rpartition(".")[2]
    if name in _OF_HYDRA:
        return
    if name == "_target_":
        if not isinstance(value, str) or not _TARGET.fullmatch(value):
            raise ValueError(f"{key}={shown(value)} must be the dotted name of a class or function, as in configs/")
        return
    setting = setting_of(key)
    if setting is not None and not setting.accepts(value):
        raise ValueError(f"{key}={shown(value)} must be {setting.said}")


# Null: as the file of a published network says.
_OPEN = ("hidden_size", "cond_dim", "n_blocks", "n_heads", "dropout", "mask_padding")


def _check_open_sizes(cfg: DictConfig) -> None:
    """Refuse sizes that are left open where no file is named that has them."""
    keys = ["time_conditioning", *(f"model.{name}" for name in _OPEN)]
    null = [key for key in keys if OmegaConf.select(cfg, key, default=0) is None]
    if null and "resumed" not in cfg.backbone:
        raise ValueError(
            f"{null[0]}=null must be typed: only backbone=hf_dit, hf_causal and hf_mlm find it in the file of a "
            f"published network, and {cfg.backbone.get('_target_')} has none"
        )
