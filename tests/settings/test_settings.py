# ruff: noqa: E501 - command lines are kept whole
"""Each value of each configuration is accepted and means something, or is refused in one message; nothing else."""

from __future__ import annotations

import math
import re
import shlex
from copy import deepcopy
from functools import lru_cache

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from palimpsest.common.values import real, shown, whole
from palimpsest.experiment import running
from palimpsest.settings.command_line import compose_config, explain, translate
from palimpsest.settings.identity import identity
from tests.helpers.commands import ROOT

CONFIGS = ROOT / "configs"
NONSENSE = ("nonsense", math.nan, math.inf, -1, 0, 1.5, 10**30, 2**63, True, None, [], {}, "", "${nowhere}", "结果",
            ["x"])  # fmt: skip
EVERY = 9  # each leaf meets every ninth value; which ones, goes round
# What a choice needs beside it.
BESIDE = {"process=hybrid": ["parameterization=gidd"], "sampler=uniform": ["parameterization=udlm"],
    "latents": ["algo=mmldlm"], "backbone=mmdit": ["algo=mmldlm", "latents=lsa"], "backbone=ar": ["algo=ar"],
    "parameterization=mmldlm": ["latents=lsa"], "backbone=hf_causal": ["algo=ar"], "backbone=hf_mlm": ["algo=mlm"],
    "sampler=ar": ["algo=ar"], "sampler=block": ["algo=bd3lm"], "sampler=block_unmask": ["algo=bd3lm"],
    "latents=hf": ["latents.name_or_path=some-encoder"], "latents=self": ["latents.checkpoint_path=x.ckpt"],
    "latents=file": ["latents.path=shards"], "callbacks=gradient_shares": ["algo=mmldlm", "latents=lsa"],
    "masking=rates": ["algo=mlm"], "sampler=semi_ar": ["data.wrap=true"],
}  # fmt: skip


def leaves(node: object, prefix: str) -> list[str]:
    """Keys of the values in a yaml, except the words of Hydra."""
    if not isinstance(node, dict) or not node:
        return [prefix]
    found = []
    for name, child in node.items():
        if not name.startswith("_") and name not in ("defaults", "hydra"):
            found += leaves(child, f"{prefix}.{name}".lstrip("."))
    return found


def written() -> dict[str, list[str]]:
    """Choice -> the keys that its file has and no file before it."""
    seen, found = set(), {}
    for path in [CONFIGS / "config.yaml", *sorted(CONFIGS.glob("*/*.yaml"))]:
        group = path.parent.name if path.parent.name != "texts" else "data"  # which every data set has in it
        whole = group == "configs" or "# @package _global_" in path.read_text()
        content = OmegaConf.to_container(OmegaConf.load(path))
        keys = [key for key in leaves(content, "" if whole else group) if key not in seen | {""}]
        seen |= set(keys)
        choice = f"{group}={path.stem if path.parent.name == group else 'reviews'}" if group != "configs" else "seed=1"
        if keys and not re.fullmatch(rf"{group}", " ".join(keys)):
            found.setdefault(choice, []).extend(keys)
    return found


WRITTEN = written()


def refusal(cfg, *typed: str) -> str | None:
    """Return the message that refuses a configuration and its typed words; None if it is accepted."""
    try:
        running.checked(cfg, "a test", typed)
    except (HydraException, OmegaConfBaseException, ValueError, OSError, FloatingPointError) as error:
        return explain(error)
    return None


def sensible(key: str, value: object, usual: object) -> bool:
    """Return True if a value is plausible instead of `usual`."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, dict) or isinstance(usual, dict):
        return value == usual or (value is None and "noising" in key)
    if isinstance(value, int) and value >= 2**63 and isinstance(usual, str | bool):
        return False
    if value is None or usual is None:
        return True
    kinds = {bool: bool, int: int | float, float: int | float, str: str | int | list, list: list | str}
    return isinstance(value, kinds[type(usual)]) and (isinstance(usual, bool) or not isinstance(value, bool))


def complaint(key: str, value: object, usual: object, said: str | None) -> str | None:
    """Return what is wrong with the message about key=value; None if nothing is."""
    if said is None:
        return None if sensible(key, value, usual) else "accepted"
    typed = {None: "null", True: "true", False: "false"}.get(value, value) if isinstance(value, bool | None) else value
    value_said = str(typed) in said or (not value and f"{key}=" in said) or isinstance(value, list)
    last = key.rpartition(".")[2]
    remedy = re.search(r"must|;|choose|use|leave|need|may|add|write", said)
    return None if (key in said or f"{last}={typed}" in said) and value_said and remedy and len(said) < 700 else said


@pytest.mark.parametrize("choice", WRITTEN)
def test_nonsense_is_refused_in_one_message(choice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "metadata.json").write_text("{}")
    group, _, name = choice.partition("=")
    asked = f"callbacks=[checkpoint_every_n_steps,checkpoint_monitor,{name}]" if group == "callbacks" else choice
    cfg = compose_config([*BESIDE.get(group, []), *BESIDE.get(choice, []), asked])
    assert refusal(cfg) is None
    wrong = []
    for number, key in enumerate(WRITTEN[choice]):
        above, _, last = key.rpartition(".")
        parent = OmegaConf.select(cfg, above) if above else cfg
        usual = OmegaConf.to_container(parent)[last]
        resolved = OmegaConf.select(cfg, key)
        resolved = OmegaConf.to_container(resolved) if OmegaConf.is_config(resolved) else resolved
        for value in NONSENSE[number % EVERY :: EVERY]:
            if value == {} and isinstance(resolved, dict):
                continue  # the group as it is
            OmegaConf.update(cfg, key, value, merge=False)
            what = complaint(key, value, resolved, refusal(cfg, f"{key}={shown(value)}"))
            wrong += [f"{key}={value}: {what}"] if what else []
            OmegaConf.update(cfg, key, usual, merge=False)
    assert not wrong, "\n".join(wrong)


def test_what_is_typed_comes_to_the_same_check():
    for typed in ("eval.disable_ema=x", "subs_masking=1e999", "data.insert_train_special=nan", "classify.prior=nan",
                  "training.ema=-1", "trainer.max_steps=1e999", "sampling.order=up", "model.hidden_size=null",
                  "loader=null", "noise._target_=null", "optim.lr='1e-3'"):  # fmt: skip
        said = refusal(compose_config([typed]), typed)
        assert said and typed.partition("=")[0] in said and "must" in said


JOINT, CAUSAL, MASKED = "algo=mmldlm backbone=mmdit latents=", "algo=ar backbone=hf_causal", "algo=mlm backbone=hf_mlm"
BELOW_ONE, INSIDE_ONE, SHARE = "a number in [0, 1)", "a number in (0, 1)", "a number in [0, 1]"
NOT_NEGATIVE, POSITIVE = "a number in [0, inf)", "a number in (0, inf)"
FROM_0, FROM_1, OR_NULL = "a whole number from 0 to", "a whole number from 1 to", "2147483647 or null"
BACKENDS = "one of: auto, sdpa, flash_attn, flex"
FLAG = "true or false"
LIST = "a list of at least one entry such as"
ORDERS = "left_to_right, confidence, margin, entropy"
# What is chosen, a key, values that it does not take, and what they must be.
OUT_OF_RANGE = [
    ("", "model.attn_backend", "magic", BACKENDS),
    ("algo=ar", "model.attn_backend", "magic", BACKENDS),
    (CAUSAL, "model.attn_backend", "flex", "one of: auto, sdpa"),
    (MASKED, "model.attn_backend", "flash_attn", "one of: auto, sdpa"),
    (CAUSAL, "model.dropout", "1.5", f"{BELOW_ONE} or null"),
    (CAUSAL, "backbone.name_or_path", "", "a path or a name or null"),
    (MASKED, "model.dropout", "1.5", f"{BELOW_ONE} or null"),
    (MASKED, "backbone.from_scratch", "none", FLAG),
    (MASKED, "backbone.new_head", "none", FLAG),
    (f"{JOINT}lsa", "model.latent_size", "0", f"{FROM_1} 65536 or null"),
    (f"{JOINT}lsa", "backbone.text_as_dit", "none", FLAG),
    (f"{JOINT}self", "latents.batch_size", "0", FROM_1),
    ("", "training.ema", "1", BELOW_ONE),
    ("", "training.freeze", "text true 3", f"{LIST} [embeddings,blocks]"),
    ("", "training.max_skipped_steps", "0", FROM_1),
    ("", "trainer.devices", "0 -1 1.5 true many", f"one of: auto or {FROM_1}"),
    ("strategy=ddp", "strategy.timeout_minutes", "0 10081 0.001 true soon null", "a number in [0.01, 10080]"),
    ("strategy=fsdp", "strategy.timeout_minutes", "0 10081 0.001 true soon null", "a number in [0.01, 10080]"),
    ("", "checkpointing.keep_last", "0", FROM_1),
    ("", "checkpointing.milestone_every", "-5", f"{FROM_1} {OR_NULL}"),
    ("", "checkpointing.every_minutes", "0", f"{POSITIVE} or null"),
    ("", "checkpointing.max_failed_saves", "0", f"{FROM_1} {OR_NULL}"),
    ("", "callbacks.checkpoint_every_n_steps.every_n_train_steps", "-1", f"{FROM_0} {OR_NULL}"),
    ("callbacks=[gradient_variance]", "callbacks.gradient_variance.every_n_steps", "0", FROM_1),
    (f"{JOINT}lsa callbacks=[gradient_shares]", "callbacks.gradient_shares.every_n_steps", "0", FROM_1),
    ("algo=mlm callbacks=[masking_rates]", "callbacks.masking_rates.rates", "[] [0] [1.5] [true] [half]", LIST),
    ("plateau=cut", "plateau.patience", "0", FROM_1),
    ("plateau=cut", "plateau.cooldown", "-1", FROM_0),
    ("plateau=cut", "plateau.factor", "0", INSIDE_ONE),
    ("plateau=cut", "plateau.floor", "0", INSIDE_ONE),
    ("plateau=cut", "plateau.min_delta", "-1", NOT_NEGATIVE),
    ("lr_scheduler=cosine", "lr_scheduler.num_warmup_steps", "-1", FROM_0),
    ("lr_scheduler=cosine", "lr_scheduler.min_ratio", "-1", SHARE),
    ("lr_scheduler=wsd", "lr_scheduler.min_ratio", "-1", SHARE),
    ("lr_scheduler=wsd", "lr_scheduler.decay", "steep", "one of: 1-sqrt, linear, cosine"),
    ("lr_scheduler=wsd", "lr_scheduler.decay_share", "0", "a number in (0, 1]"),
    ("lr_scheduler=restarts", "lr_scheduler.num_rewarmup_steps", "0", FROM_1),
    ("lr_scheduler=restarts", "lr_scheduler.peak_decay", "-1", SHARE),
    ("lr_scheduler=restarts", "lr_scheduler.periods", "5 [] [0] [1.5] [true]", f"{LIST} [10000,20000]"),
    ("noise=loglinear", "noise.eps", "-0.1", BELOW_ONE),
    ("noise=cosine", "noise.eps", "-0.1", BELOW_ONE),
    ("noise=cosinesqr", "noise.eps", "-0.1", BELOW_ONE),
    ("noise=linear", "noise.sigma_min", "0", POSITIVE),
    ("noise=geometric", "noise.sigma_min", "0", POSITIVE),
    ("algo=gidd", "process.word_share", "0", INSIDE_ONE),
    ("", "T", "-1", FROM_0),
    ("algo=d3pm", "T", "-1", FROM_0),
    ("", "training.loss_weight", "elbow", "one of: elbo, uniform"),
    ("", "training.sampling_eps", "1", BELOW_ONE),
    ("algo=mlm", "training.masking_rates", "all [] [0] [1.5] [true] [half]", LIST),
    ("algo=mlm", "training.masking_rate_min", "-1", SHARE),
    ("algo=mlm", "training.masking_rate_max", "1.5", SHARE),
    ("algo=mlm", "training.masking_rate_per", "token", "one of: sample, batch"),
    ("algo=duo", "parameterization.curriculum_end", "-1", FROM_0),
    (f"{JOINT}lsa", "training.latent_target", "noise", "one of: v, x0, eps"),
    (f"{JOINT}lsa", "training.latent_loss", "l1", "one of: mse, huber, mse_cosine, cosine"),
    (f"{JOINT}lsa", "training.latent_cosine_weight", "-1", NOT_NEGATIVE),
    (f"{JOINT}lsa", "training.text_weight", "-1", NOT_NEGATIVE),
    (f"{JOINT}lsa", "training.latent_weight", "-1", NOT_NEGATIVE),
    ("", "sampling.steps", "0", FROM_1),
    ("", "sampling.temperature", "-1", NOT_NEGATIVE),
    ("", "sampling.top_k", "0", f"{FROM_1} {OR_NULL}"),
    ("", "sampling.nucleus_p", "0", "a number in (0, 1]"),
    ("sampling.predictor=analytic", "sampling.steps", "0", FROM_1),
    ("sampling.predictor=unmask", "sampling.steps", "0", FROM_1),
    ("sampling.predictor=unmask", "sampling.schedule", "sine", "one of: linear, cosine, exponential"),
    ("sampling.predictor=unmask", "sampling.order", "alphabet", f"one of: {ORDERS}, random"),
    ("sampling.predictor=unmask", "sampling.threshold", "0", "a number in (0, 1] or null"),
    ("sampling.predictor=unmask", "sampling.remask", "all", "one of: none, low_confidence, remdm"),
    ("sampling.predictor=unmask", "sampling.remask_eta", "-1", SHARE),
    ("sampling.predictor=ordered", "sampling.order", "up random", f"one of: {ORDERS}"),
    ("sampling.predictor=ordered", "sampling.tokens_per_step", "0", FROM_1),
    ("eval.estimator=duel", "sampling.order", "up random", f"one of: {ORDERS}"),
    ("eval.estimator=duel", "sampling.tokens_per_step", "0", FROM_1),
    ("sampling.predictor=entropy_bounded", "sampling.gamma", "-1", NOT_NEGATIVE),
    ("sampling.semi_ar=true", "sampling.stride_length", "0", FROM_1),
    ("sampling.semi_ar=true", "sampling.num_strides", "-1", FROM_0),
    ("algo=bd3lm", "sampling.min_entropy", "-1", f"{NOT_NEGATIVE} or null"),
    ("algo=udlm", "sampling.steps", "0", FROM_1),
    ("algo=udlm", "sampling.corrector", "best", "one of: random, informed"),
    ("algo=udlm", "sampling.corrector_steps", "-1", FROM_0),
    ("algo=udlm", "sampling.corrector_tokens", "0", FROM_1),
    ("algo=udlm", "sampling.self_correction_steps", "-1", FROM_0),
    (f"mode=sample_eval {JOINT}lsa", "sampling.latent_steps", "0", FROM_1),
    (f"mode=sample_eval {JOINT}lsa", "sampling.latent_eta", "-1", SHARE),
    (f"mode=sample_eval {JOINT}lsa", "sampling.joint_order", "up", "one of: simultaneous, latent_first"),
    (f"mode=sample_eval {JOINT}lsa", "sampling.edit_positions", "best", "one of: random, entropy, suffix, contrast"),
    (f"mode=sample_eval {JOINT}lsa", "sampling.edit_rate", "-1", SHARE),
    (f"mode=sample_eval {JOINT}lsa", "sampling.edit_target", "up", "one of: shift, centroid, neighbour, slerp"),
    (f"mode=sample_eval {JOINT}lsa", "sampling.edit_path", "1", "a whole number from 2 to"),
    ("mode=sample_eval", "sampling.guidance", "-1", NOT_NEGATIVE),
    ("mode=sample_eval", "sampling.guidance_by", "magic", "one of: network, unigrams"),
    ("mode=sample_eval", "sampling.samples_per_prompt", "0", FROM_1),
    ("mode=sample_eval", "sampling.num_sample_batches", "-1", f"{FROM_1} 1000000 or null"),
    ("mode=sample_eval", "sampling.show_delay", "-1", "a number in [0, 3600]"),
    ("mode=sample_eval", "eval.perplexity_batch_size", "0", FROM_1),
    ("mode=ppl_eval", "eval.num_draws", "0", FROM_1),
    ("mode=ppl_eval", "eval.target_se", "0", f"{POSITIVE} or null"),
    ("mode=classify", "classify.num_draws", "0", FROM_1),
    ("mode=classify", "classify.confidence", "0.5", "a number in (0.5, 1]"),
    ("mode=classify", "classify.masks", "own", "one of: common, independent"),
    (f"{JOINT}lsa", "latents.dim", "0", FROM_1),
    (f"{JOINT}lsa", "latents.tokens", "0", FROM_1),
    (f"{JOINT}lsa", "latents.fit_rows", "0", FROM_1),
    (f"{JOINT}synthetic", "latents.attributes", "class", f"{LIST} [negative,positive]"),
    (f"{JOINT}synthetic", "latents.noise", "-1", BELOW_ONE),
    (f"{JOINT}synthetic", "latents.seed", "-1", FROM_0),
    (f"{JOINT}hf", "latents.pooling", "max", "one of: mean, cls, last, null"),
    (f"{JOINT}hf", "latents.long_texts", "drop", "one of: error, cut"),
    (f"{JOINT}hf", "latents.normalize", "none", f"{FLAG} or null"),
    (f"{JOINT}hf", "latents.window", "0", f"{FROM_1} {OR_NULL}"),
    (f"{JOINT}hf", "latents.batch_size", "0", FROM_1),
    (f"{JOINT}file", "latents.max_overlap", "-1", SHARE),
    (f"{JOINT}file", "latents.dim", "0", f"{FROM_1} {OR_NULL}"),
    ("", "model.length", "0", FROM_1),
    ("", "training.prefix_length", "-1", FROM_0),
    ("", "data.score_special", "3", f"{FLAG} or null"),
    ("", "data.long_texts", "cut", "one of: truncate, windows, drop, error"),
    ("", "data.max_train_texts", "0", f"{FROM_1} {OR_NULL}"),
    ("", "data.max_valid_texts", "0", f"{FROM_1} {OR_NULL}"),
    ("", "data.max_test_texts", "0", f"{FROM_1} {OR_NULL}"),
    ("data=gsm8k", "data.fill", "pad", "one of: eos or null"),
    ("data=gsm8k_plan", "data.segments", "none", FLAG),
    ("data=gsm8k_plan", "data.segment_room", "1", "a whole number from 2 to"),
    ("data=gsm8k_plan", "data.source.plan", "wild", "one of: operations, operators"),
    ("data=gsm8k", "data.source.validation_share", "0 1 -1", f"{INSIDE_ONE} or null"),
    ("data=text8", "data.source.chunk", "0", FROM_1),
    ("data=wikitext2", "+data.protocol", "mdlm", "one of: reference or null"),
    ("data=wikitext2", "+data.num_proc", "0", f"{FROM_1} {OR_NULL}"),
    ("data=text", "data.validation_share", "1", BELOW_ONE),
    ("data.streaming=true", "streaming.lanes", "0", FROM_1),
    ("data.streaming=true", "streaming.shuffle_buffer", "0", FROM_1),
    ("data.streaming=true", "streaming.sample_texts", "0", FROM_1),
    ("", "loader.num_workers", "-1", f"{FROM_0} {OR_NULL}"),
    ("", "loader.prefetch_factor", "0", FROM_1),
    ("", "loader.batch_size", "0", f"{FROM_1} {OR_NULL}"),
    ("", "loader.eval_batch_size", "0", f"{FROM_1} {OR_NULL}"),
    ("", "loader.global_batch_size", "0", FROM_1),
    (
        "",
        "loader.batch_ramp",
        "8 [] [8,64] [[0,1.5]] [[0,8,9]] [[0]]",
        f"{LIST} [[0,64],[1000,256]]; each entry a pair",
    ),
    ("", "trainer.accumulate_grad_batches", "0", f"{FROM_1} {OR_NULL}"),
    ("", "trainer.num_nodes", "0", FROM_1),
    ("", "trainer.max_steps", "0", FROM_1),
]


@lru_cache
def composed(chosen: str) -> DictConfig:
    return compose_config(chosen.split())


def with_one(chosen: str, typed: list[str]) -> DictConfig:
    """The configuration of `typed`, whose last word sets one value; composed once for all values where that does."""
    word = OverridesParser.create().parse_override(translate(typed[-1:])[0])
    cfg = deepcopy(composed(chosen))
    if word.is_add() or word.is_delete() or OmegaConf.select(cfg, word.key_or_group, throw_on_missing=False) is None:
        return compose_config(typed)
    value = word.value()
    OmegaConf.update(cfg, word.key_or_group, str(value) if isinstance(value, QuotedString) else value, merge=False)
    return cfg


@pytest.mark.parametrize(("chosen", "key", "wrong", "said"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused(chosen, key, wrong, said):
    for value in wrong.split(" "):
        typed = [*chosen.split(), f"{key}={value}"]
        found = refusal(with_one(chosen, typed), *typed) or "it is accepted"
        assert found.startswith(f"{key.lstrip('+')}={value} must be {said}"), found


@pytest.mark.parametrize("line", [
    "wandb=null", "wandb.name=mdlm wandb.tags=[a,b] +wandb.offline=true", "block_size=128 model.length=128",
    "block_size=1024 data=openwebtext-split model.length=1024 wandb=null",
])  # fmt: skip
def test_published_settings_without_an_effect_are_accepted(line, capsys):
    words = translate(line.split())
    cfg = compose_config(line.split())
    assert refusal(cfg, *words) is None
    of_wandb = " ".join(word for word in words if word.startswith("wandb"))
    said = f"{of_wandb}: wandb is not used; logger=wandb uses it\n" if of_wandb else ""
    assert capsys.readouterr().err == said
    others = [word for word in words if not word.startswith(("wandb", "block_size"))]
    assert identity(cfg) == identity(compose_config(others))


@pytest.mark.parametrize(("line", "said"), [
    ("wandb.offline=7", "wandb.offline=7 must be true or false"), ("wandb=null logger=wandb", "wandb"),
    ("block_size=64 model.length=128", "block_size=64 means nothing to parameterization=subs"),
    ("algo=bd3lm sampling.noise_removal=false", "noise_removal=false means nothing to parameterization=bd3lm with sampling.predictor=block: it is read by sampler=analytic|ddpm"),
    ("algo=ar sampling.steps=4", "sampling.steps=4 means nothing to parameterization=ar with sampling.predictor=ar"),
    ("mode=sample_eval sampling.predictor=first_hitting sampling.steps=4", "with sampling.predictor=first_hitting: it is"),
    ("sampling.predictor=first_hitting sampling.gamma=1", "with sampling.predictor=first_hitting: it is read by sampler="),
    ("sampling.predictor=unmask sampling.order=margin sampling.threshold=0.9", "threshold=0.9 goes by confidence, and sampling.order=margin"),
    ("sampling.predictor=unmask sampling.order=margin sampling.remask=low_confidence", "remask=low_confidence goes by confidence"),
    ("algo=bd3lm sampling.predictor=block_unmask sampling.order=margin sampling.threshold=0.9", "leave one of them out"),
])  # fmt: skip
def test_settings_that_would_mean_something_else_are_refused(line, said):
    assert said in refusal(compose_config(line.split()), *translate(line.split()))


def test_two_limits_of_mask_rates_and_a_correction_without_a_bound_are_refused():
    for line, said in [
        ("algo=bd3lm block_size=4 noise=clipped training.sampling_eps_min=0.2", "noise=clipped both limit the mask rates"),
        ("training.time_density=bell_corrected training.loss_weight=uniform", "use training.time_density=bell, or training.loss_weight=elbo"),
        ("data.tokenizer_folder=x", "data.tokenizer_folder=x is for tokenizers that are files"),
        ("data=text data.path=x data.prompt_column=text", "data.prompt_column=text is the column of the texts"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, HydraException), match=said):
            experiment = running.checked(compose_config(translate(line.split())), "test")
            _ = experiment.build.data().tokenizer


_EDITING = "algo=mmldlm backbone=mmdit latents=lsa mode=sample_eval sampling.direction=edit"


@pytest.mark.parametrize(("line", "off", "on"), [
    ("algo=udlm sampling.corrector_tokens=4", "sampling.corrector_steps=0; set sampling.corrector_steps", "sampling.corrector_steps=1"),
    ("algo=udlm sampling.corrector=informed", "sampling.corrector_steps=0; set sampling.corrector_steps", "sampling.corrector_steps=1"),
    ("algo=bd3lm data.fill=eos sampling.min_entropy=3", "sampling.var_length=false; add sampling.var_length=true", "sampling.var_length=true"),
    ("mode=sample_eval sampling.predictor=unmask sampling.order=random sampling.remask_eta=0.1", "sampling.remask=none; add sampling.remask=remdm", "sampling.remask=remdm"),
    ("T=1000 training.sampling_eps=0.1", "T=1000; add T=0", "T=0"),
    ("algo=mlm training.masking_rate_per=batch training.antithetic_sampling=false", "training.masking_rate_per=batch; add training.masking_rate_per=sample", "training.masking_rate_per=sample"),
    ("mode=sample_eval sampling.temperature=0 sampling.top_k=5", "sampling.temperature=0; set sampling.temperature", "sampling.temperature=0.5"),
    ("mode=sample_eval sampling.predictor=ar algo=ar sampling.temperature=0 sampling.nucleus_p=0.9", "sampling.temperature=0; set sampling.temperature", "sampling.temperature=0.5"),
    ("mode=ppl_eval eval.max_draws=64", "eval.target_se=null; set eval.target_se", "eval.target_se=0.1"),
    ("mode=classify classify.label_dropout=0.2", "classify.sharing=per_class; add classify.sharing=conditional", "classify.sharing=conditional"),
    ("mode=sample_eval sampling.show_delay=0.2", "sampling.show=false; add sampling.show=true", "sampling.show=true"),
    (f"{_EDITING} sampling.edit_target=centroid sampling.edit_alpha=0.5", "sampling.edit_target=centroid; add sampling.edit_target=shift or sampling.edit_target=slerp", "sampling.edit_target=slerp"),
    (f"{_EDITING.replace('edit', 'l2t')} sampling.edit_rate=0.5", "sampling.direction=l2t; add sampling.direction=edit", "sampling.direction=edit"),
    (f"{_EDITING} sampling.joint_order=latent_first", "sampling.direction=edit; add sampling.direction=joint", "sampling.direction=joint"),
])  # fmt: skip
def test_a_setting_that_another_one_switches_off_is_refused(line, off, on):
    def said(line: str) -> str | None:
        words = translate(line.split())
        return refusal(compose_config(words), *words)

    typed = line.split()[-1]
    assert said(line) == f"{typed} means nothing with {off}, or leave it out"
    key = on.partition("=")[0]
    assert said(" ".join([*(w for w in line.split() if not w.startswith(f"{key}=")), on])) is None


@pytest.mark.parametrize(("line", "said"), [
    ("algo=udlm eval.estimator=duel", "any token may be noise; use eval.estimator=auto"),
    ("algo=gidd eval.estimator=importance_weighted", "any token may be noise; use eval.estimator=auto"),
    ("algo=bd3lm eval.estimator=duel", "block after block; use eval.estimator=auto"),
    ("algo=ar eval.estimator=duel", "with an exact likelihood; use eval.estimator=auto"),
    ("algo=sedd eval.estimator=importance_weighted", "no mean over orders; use eval.estimator=auto"),
    ("algo=d3pm eval.estimator=importance_weighted", "no mean over orders; use eval.estimator=auto"),
    ("algo=sedd sampling.predictor=first_hitting", "(subs, mlm, mmldlm and the blocks of bd3lm); use sampling.predictor=analytic"),
    ("algo=d3pm sampling.predictor=first_hitting", "use sampling.predictor=analytic"),
    ("algo=udlm time_conditioning=false", "parameterization=udlm with time_conditioning=false"),
    ("algo=gidd time_conditioning=false", "parameterization=gidd with time_conditioning=false"),
    ("algo=duo time_conditioning=false", "parameterization=duo with time_conditioning=false"),
    ("algo=duo backbone=dimamba", "algo=duo needs a network that reads mixtures of tokens, and DiMamba does not"),
    ("parameterization=ar backbone=dit", "the backbone DiT do not fit"),
    ("algo=bd3lm backbone=dimamba", "needs a network that reads texts in blocks, and DiMamba does not"),
    ("algo=mmldlm backbone=dit latents=lsa", "needs a network that reads texts and latents, and DiT does not"),
    ("algo=bd3lm block_size=4 sampling.context=6", "sampling.context=6 must be a multiple of block_size=4"),
    ("mode=sample_eval sampling.predictor=semi_ar", "sampling.predictor=semi_ar (also typed as sampling.semi_ar=true)"),
    ("sampling.semi_ar=true", "use wrapped data (data.wrap=true)"),
    ("sampling.semi_ar=true sampling.template={{5}}", "use wrapped data (data.wrap=true)"),
    ("mode=sample_eval algo=ar classify.sharing=conditional classify.class=0", "writes from left to right; leave it out, and use data.label="),
    ("mode=sample_eval algo=bd3lm classify.sharing=conditional classify.class=0", "writes block after block; leave it out, and use data.label="),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused_before_anything_is_trained(line, said):
    assert said in (refusal(compose_config(line.split()), *translate(line.split())) or "accepted")


@pytest.mark.parametrize("line", [
    "eval.estimator=importance_weighted", "algo=mlm eval.estimator=duel", "algo=mlm sampling.predictor=first_hitting",
    "algo=mmldlm latents=lsa sampling.predictor=first_hitting", "mode=ppl_eval algo=duo backbone=dimamba", "algo=duo",
    "algo=duo backbone=dimamba algo.curriculum_end=0", "mode=ppl_eval sampling.semi_ar=true", "sampling.semi_ar=true data.wrap=true",
    "sampling.semi_ar=true eval.generate_samples=false", "mode=sample_eval algo=udlm classify.sharing=conditional classify.class=0",
    "mode=sample_eval algo=bd3lm block_size=128 model.length=128 sampling.predictor=ddpm_cache classify.sharing=conditional classify.class=0",
    "algo=ar classify.sharing=conditional classify.class=0",
    "mode=sample_eval sampling.semi_ar=true data.wrap=true 'sampling.template=The [MASK] .'",
])  # fmt: skip
def test_parts_that_fit_are_accepted(line):
    words = shlex.split(line)
    assert refusal(compose_config(words), *translate(words)) is None


@pytest.mark.parametrize("line", [
    "mode=classify sampling.steps=4", "algo=bd3lm sampling.steps=4", "sampling.predictor=unmask sampling.order=margin",
    "mode=sample_eval algo=mmldlm latents=lsa sampling.direction=joint sampling.steps=4 sampling.noise_removal=false",
    "sampling.predictor=unmask sampling.threshold=0.9", "sampling.predictor=unmask sampling.order=confidence sampling.threshold=0.9",
    "sampling.predictor=unmask eval.estimator=duel sampling.order=margin sampling.threshold=0.9",
])  # fmt: skip
def test_settings_of_a_sampler_that_reads_them_are_accepted(line):
    assert refusal(compose_config(line.split()), *translate(line.split())) is None


def test_types_take_their_numbers_and_nothing_else():
    for kind, taken, refused in (
        (whole(1, 9), [1, 9], [0, 10, -1, 1.5, 2.0, True, "2", None]),
        (real("[0, 1)"), [0, 0.5], [1, -0.1, True, "0.5", None, math.nan]),
        (real("(0, inf)"), [1, 1e300], [0, -1, math.inf, math.nan, 10**400]),
    ):
        assert all(map(kind.accepts, taken)) and not any(map(kind.accepts, refused))
