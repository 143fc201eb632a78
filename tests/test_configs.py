# ruff: noqa: E501 - command lines are kept whole
"""Every configuration composes, builds and takes a training step; every mistake gets one clear answer."""

from __future__ import annotations

import runpy
import subprocess
import sys

import pytest

from palimpsest.settings.command_line import compose_config, explain, translate
from tests.helpers.commands import ROOT, TINY, run, run_main

GROUPS = sorted(path.parent.name for path in (ROOT / "configs").glob("*/*.yaml"))
CHOICES = sorted({(path.parent.name, path.stem) for path in (ROOT / "configs").glob("*/*.yaml")})
OPTUNA = "needs Optuna: pip install hydra-optuna-sweeper==1.3.0"
BUILDS = {"data": ["reviews"], "mode": [], "optim": ["adamw"]}


@pytest.mark.parametrize(("group", "choice"), [c for c in CHOICES if c[0] != "texts"], ids=lambda v: v)
def test_every_choice_composes(group, choice):
    if choice == "optuna_reviews":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason=OPTUNA)
    value = f"[{choice}]" if group == "callbacks" else choice
    cfg = compose_config([f"{group}={value}"])
    assert cfg.seed == 1
    if group == "model":
        assert cfg.model.name == choice
    if group == "data":
        assert cfg.data.name == choice
        renamed = compose_config([f"data={choice}", "data.name=mine"]).data
        assert (renamed.train, renamed.valid).count(choice) == 0 or choice.startswith("openwebtext")


@pytest.mark.parametrize("overrides", [
    ["noise=cosine"], ["noise=linear"], ["noise=geometric"], ["noise=cosinesqr"], ["time_conditioning=true"],
    ["training.ema=0"], ["training.antithetic_sampling=false"], ["lr_scheduler=constant_warmup"], ["~logger"],
    ["callbacks=[]"], ["loader.batch_size=2"], ["sampling.predictor=ddpm"], ["data.label=1"], ["strategy=ddp"],
    ["trainer.precision=bf16-mixed", "optim=adamw"], ["data.tokenizer_name_or_path=byte", "model.length=512"],
    ["data.tokenizer_name_or_path=char", "model.length=512"], ["model.mask_padding=false"],
    ["data.tokenizer_name_or_path=bpe", "data.vocab_size=300", "model.length=256"], ["data.wrap=true"],
    ["data.score_special=true"], ["backbone=dimamba"], ["parameterization=ar"], ["parameterization=sedd"],
    ["parameterization=d3pm", "T=20"], ["parameterization=d3pm", "subs_masking=true", "time_conditioning=true"],
    ["T=50"], ["training.masking=exact_count"], ["training.masking=complementary"], ["training.loss_weight=uniform"],
    ["training.importance_sampling=true"], ["training.change_of_variables=true", "time_conditioning=true"],
    ["noise=clipped"], ["eval.estimator=uniform"], ["eval.estimator=stratified"], ["eval.estimator=exact_count"],
    ["eval.estimator=complementary"], ["eval.target_se=0.05", "eval.max_draws=8"], ["sampling.predictor=analytic"],
    ["sampling.predictor=first_hitting"], ["sampling.predictor=ordered", "sampling.order=entropy"],
    ["sampling.temperature=0.5", "sampling.top_k=5", "sampling.nucleus_p=0.9"], ["parameterization=ar", "optim=adamw"],
], ids=" ".join)  # fmt: skip
def test_every_setting_trains_measures_and_samples(tmp_path, monkeypatch, overrides):
    monkeypatch.chdir(tmp_path)
    results = run(*TINY, *overrides, "data.cache_dir=cache")
    assert 0 < results["nll_nats_per_token"].value < 20
    gap = results["gap_nats_per_token"]
    comparable = not any(word in " ".join(overrides) for word in ("tokenizer", "wrap", "score_special"))
    assert (gap is not None) == comparable
    assert gap is None or gap.value > -4 * gap.se, "a bound below the true entropy is a bug"
    assert list(tmp_path.rglob("report.html")) and list(tmp_path.rglob("last.ckpt"))


def test_modes_on_one_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for mode, wanted in [("train", "perplexity"), ("ppl_eval", "bits_per_token"), ("sample_eval", "unigram_entropy_nats"),
                         ("classify", "accuracy")]:  # fmt: skip
        results = run(*TINY, f"mode={mode}", "loader.eval_batch_size=4")
        assert wanted in results
    lines = next(tmp_path.rglob("samples.jsonl")).read_text().splitlines()
    assert len(lines) == 4
    assert {p.name for p in (next(tmp_path.glob("outputs/reviews/*"))).glob("label=*")} == {"label=0", "label=1"}


def test_command_lines_of_the_references_compose():
    for line in [
        "mode=sample_eval eval.checkpoint_path=kuleshov-group/mdlm-owt model.length=1024 sampling.predictor=ddpm_cache "
        "sampling.steps=1000 loader.eval_batch_size=1 sampling.num_sample_batches=10",
        "mode=ppl_eval model=small data=gsm8k_baseline model.length=512 eval.checkpoint_path=/path/x.ckpt loader.batch_size=16",
        "model=small data=wikitext2 parameterization=subs wandb.name=mdlm trainer.devices=8 loader.global_batch_size=256 "
        "loader.batch_size=32 model.attn_backend=flash_attn time_conditioning=False +wandb.offline=true",
        "mode=classify data=imdb", "mode=train data=imdb data.label=0", "logger=wandb wandb.offline=true",
        "model=small parameterization=d3pm T=1000", "model=small-ar backbone=ar parameterization=ar",
        "parameterization=sedd time_conditioning=True sampling.predictor=analytic eval.compute_generative_perplexity=True",
        "backbone=dimamba model=tiny-dimamba", "training.importance_sampling=True training.antithetic_sampling=False",
        "sampling.semi_ar=True sampling.stride_length=512 sampling.num_strides=2 sampling.steps=1000 model.length=1024",
        "sampling.semi_ar=False sampling.predictor=first_hitting", "noise=geometric training.change_of_variables=True",
        "wandb=null data.cache_dir=/x eval.generate_samples=False eval.perplexity_batch_size=4 seed=7",
        "mode=sample_eval algo=mdlm algo.backbone=hf_dit eval.checkpoint_path=kuleshov-group/mdlm-owt model.length=1024",
        "mode=classify data=imdb algo=ar algo.backbone=hf_causal backbone.name_or_path=gpt2 model.length=512 optim.lr=5e-5",
        "eval.estimator=duel sampling.order=confidence", "eval.estimator=importance_weighted eval.num_draws=16",
        "optim.lr=1e-3 optim.weight_decay=0.01 optim.beta1=0.9 optim.beta2=0.99 optim.eps=1e-8 training.ema=0.999",
        "checkpointing.save_dir=/x checkpointing.resume_from_ckpt=False callbacks.checkpoint_every_n_steps.every_n_train_steps=5",
    ]:  # fmt: skip
        compose_config(line.split())


def test_the_references_spellings_are_choices():
    assert translate(["sampling.predictor=ddpm", "seed=2"]) == ["sampler=ddpm", "seed=2"]
    assert translate(["sampling.semi_ar=True", "eval.estimator=duel"]) == ["estimator=duel", "sampler=semi_ar"]
    assert translate(["sampling.semi_ar=False", "training.masking=exact_count"]) == ["masking=exact_count"]
    for order in (
        ["sampling.semi_ar=true", "sampling.predictor=ddpm_cache"],
        ["sampler=ddpm", "sampling.semi_ar=True"],
    ):
        assert translate(order) == ["sampler=semi_ar"]
    with pytest.raises(ValueError, match="sampling.semi_ar=true.*sampler=first_hitting"):
        translate(["sampling.semi_ar=true", "sampling.predictor=first_hitting"])
    with pytest.raises(ValueError, match="sampling.semi_ar=foo"):
        translate(["sampling.semi_ar=foo"])


def test_algo_is_another_spelling_of_parameterization_and_backbone():
    for algo, law in {"mdlm": "subs", "sedd": "sedd", "d3pm": "d3pm", "ar": "ar"}.items():
        assert translate([f"algo={algo}", "seed=2"]) == ["seed=2", f"parameterization={law}"]
        assert compose_config([f"algo={algo}"]) == compose_config([f"parameterization={law}"])
    for backbone in ("dit", "ar", "dimamba", "hf_dit", "hf_causal"):
        assert translate([f"algo.backbone={backbone}"]) == [f"backbone={backbone}"]
    assert (
        compose_config(["algo=ar", "algo.backbone=hf_causal"]).backbone._target_
        == "palimpsest.models.hf_causal.hf_causal"
    )
    assert translate(["parameterization=subs", "algo=mdlm", "backbone=dit", "algo.backbone=dit"]) == [
        "parameterization=subs",
        "backbone=dit",
    ]
    assert compose_config(["algo=mdlm", "parameterization=subs", "algo=mdlm"]).T == 0


@pytest.mark.parametrize(("arguments", "said"), [
    (["algo=bd4lm"], "algo=bd4lm is unknown; what exists: algo=mdlm, algo=duo_base, algo=ar, algo=bd3lm, algo=d3pm"),
    (["algo="], "algo= is unknown"),
    (["algo.backbone=gpt"], "algo.backbone=gpt is unknown; what exists: .*algo.backbone=dit, .*algo.backbone=hf_dit"),
    (["algo=mdlm", "parameterization=sedd"], "algo=mdlm parameterization=sedd contradict .*means parameterization=subs"),
    (["algo=mdlm", "algo=ar"], "algo=mdlm algo=ar contradict each other"),
    (["backbone=ar", "algo.backbone=dit"], "algo.backbone=dit backbone=ar contradict each other"),
])  # fmt: skip
def test_algos_that_mean_nothing_or_two_things_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        translate(arguments)


def test_texts_on_the_command_line_are_taken_as_they_are():
    for text in ('It was {{5}} and [MASK], "really".', "plain words", "a: b = c, d"):
        assert compose_config([f"sampling.template={text}"]).sampling.template == text
    assert compose_config(["sampling.prefix=null"]).sampling.prefix is None


def test_an_objective_brings_what_it_needs_and_what_is_typed_wins():
    assert compose_config(["parameterization=ar"]).backbone._target_ == "palimpsest.models.ar.AR"
    assert compose_config(["parameterization=ar"]).sampler._target_ == "palimpsest.samplers.autoregressive.sample"
    sedd = compose_config(["parameterization=sedd"])
    assert sedd.time_conditioning and sedd.sampler._target_ == "palimpsest.samplers.analytic.sample"
    assert (
        compose_config(["parameterization=sedd", "sampler=ddpm"]).sampler._target_
        == "palimpsest.samplers.ancestral.sample"
    )
    assert (
        compose_config(["parameterization=d3pm"]).T == 1000 and compose_config(["parameterization=d3pm", "T=5"]).T == 5
    )


@pytest.mark.parametrize(("arguments", "said"), [
    (["model.hiden_size=3"], "model.hiden_size. Did you mean model.hidden_size"),
    (["mood=train"], "mode"),
    (["data=imbd"], "imdb"),
    (["sampling.predictor=magic"], "ddpm_cache"),
    (["trainer.max_stps=3"], "Did you mean trainer.max_steps"),
    (["data.segments=true"], "It is a key of data=gsm8k, gsm8k_plan."),
])  # fmt: skip
def test_unknown_keys_and_choices_list_what_exists(arguments, said):
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - Hydra raises several kinds
        compose_config(arguments)
    assert said in explain(caught.value)


@pytest.mark.parametrize(("arguments", "said"), [
    (["data.label=7"], "data.label=7"),
    (["model.length=20"], "model.length=20"),
    (["mode=ppl_eval"], "mode=train"),
    (["mode=ppl_eval", "eval.checkpoint_path=nowhere.ckpt"], "eval.checkpoint_path=nowhere.ckpt"),
    (["loader.global_batch_size=5", "loader.batch_size=2"], "loader.batch_size=2"),
    (["trainer.accumulate_grad_batches=7"], "trainer.accumulate_grad_batches=7"),
    (["model.n_heads=3"], "model.n_heads"),
    (["training.ema=1.5"], "training.ema=1.5"),
    (["eval.num_draws=0"], "eval.num_draws=0"),
    (["noise.eps=2"], "noise.eps=2"),
    (["sampling.steps=0"], "sampling.steps=0"),
    (["data=text"], "data.path"),
    (["data=labelled", "data.path=missing.csv", "data.tokenizer_name_or_path=byte"], "missing.csv"),
    (["mode=classify", "data.label=0"], "data.label=0"),
    (["model.attn_backend=flash"], "model.attn_backend=flash"),
    (["parameterization=ar", "backbone=dit"], "parameterization=ar backbone=ar"),
    (["backbone=ar"], "parameterization=ar backbone=ar"), (["algo=ar", "algo.backbone=dit"], "parameterization=ar"),
    (["parameterization=ar", "backbone=hf_causal"], "backbone.name_or_path="),
    (["parameterization=ar", "T=10"], "T=10"),
    (["parameterization=ar", "training.masking=exact_count"], "masking=exact_count means nothing"),
    (["parameterization=ar", "eval.estimator=complementary"], "eval.estimator=auto"),
    (["parameterization=ar", "sampling.predictor=ddpm"], "sampling.predictor=ar"),
    (["parameterization=ar", "time_conditioning=true"], "time_conditioning=true"),
    (["parameterization=sedd", "time_conditioning=false"], "time_conditioning=true"),
    (["parameterization=sedd", "T=10"], "T=10"),
    (["parameterization=sedd", "training.loss_weight=uniform"], "training.loss_weight=uniform"),
    (["parameterization=sedd", "sampling.predictor=first_hitting"], "sampling.predictor=analytic"),
    (["parameterization=d3pm", "T=0"], "parameterization=d3pm with T=0"),
    (["parameterization=d3pm", "training.importance_sampling=true"], "training.importance_sampling or"),
    (["parameterization=d3pm", "training.masking=complementary"], "training.masking"),
    (["training.importance_sampling=true", "training.change_of_variables=true"], "keep one"),
    (["training.change_of_variables=true"], "time_conditioning=false"),
    (["training.masking=exact_count", "training.importance_sampling=true"], "importance_sampling=true means nothing"),
    (["training.importance_sampling=true", "T=10"], "T=10"),
    (["T=10", "eval.estimator=complementary"], "T=10"),
    (["subs_masking=true", "parameterization=sedd"], "subs_masking=true"),
    (["training.loss_weight=heavy"], "training.loss_weight=heavy"),
    (["noise=clipped", "noise.sampling_eps_min=0.9"], "noise.sampling_eps_min=0.9"),
    (["eval.estimator=complementary", "eval.num_draws=3"], "num_draws=3"),
    (["eval.target_se=-1"], "eval.target_se=-1"),
    (["eval.target_se=0.1", "eval.max_draws=1"], "eval.max_draws=1"),
    (["T=1.5"], "T=1.5"), (["sampling.steps=abc"], "sampling.steps=abc"), (["seed=-1"], "seed=-1"),
    (["sampling.temperature=hot"], "sampling.temperature=hot"), (["eval.num_draws=abc"], "eval.num_draws=abc"),
    (["noise=clipped", "parameterization=d3pm"], "noise=clipped"),
    (["noise=clipped", "training.masking=exact_count"], "noise=clipped"),
    (["parameterization=ar", "sampling.predictor=ordered"], "sampling.predictor=ar"),
    (["parameterization=ar", "sampling.predictor=first_hitting"], "sampling.predictor=ar"),
    (["sampling.predictor=ordered", "sampling.tokens_per_step=0"], "sampling.tokens_per_step=0"),
    (["sampling.temperature=-1"], "sampling.temperature=-1"),
    (["sampling.prefix=a", "sampling.template=b"], "sampling.prefix=a"),
    (["sampling.template=nothing"], "sampling.template=nothing"),
    (["sampling.predictor=ordered", "sampling.order=up"], "up"),
])  # fmt: skip
def test_mistakes_name_the_key_and_the_value(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - explain() is what is tested
        run(*TINY, *arguments)
    assert said in explain(caught.value)


def test_a_checkpoint_of_another_network_or_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*TINY)
    path = next(tmp_path.rglob("last.ckpt"))
    ask = ["mode=ppl_eval", f"eval.checkpoint_path='{path}'", *TINY]
    with pytest.raises(ValueError, match="add: .*model.n_blocks=1"):
        run(*ask, "model.n_blocks=2")
    with pytest.raises(ValueError, match="add: parameterization=subs"):
        run(*ask, "parameterization=d3pm")
    with pytest.raises(ValueError, match="another tokenizer"):
        run(*ask, "data.tokenizer_name_or_path=byte")


def test_a_mistake_on_the_command_line_is_one_message(tmp_path):
    done = run_main("model.hiden_size=3", cwd=tmp_path)
    assert done.returncode == 2 and "Did you mean model.hidden_size" in done.stderr and "Traceback" not in done.stderr


def test_help_teaches(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(ROOT / "main.py"), "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(sys.argv[0], run_name="__main__")
    text = capsys.readouterr().out
    for word in ("mode=classify", "sampling.predictor", "train", "ppl_eval", "sample_eval", "DATA_DIR"):
        assert word in text


def test_the_references_run_directory_is_ours():
    assert compose_config(["hydra.run.dir=somewhere"]).checkpointing.save_dir == "somewhere"


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.s[hb]*")), ids=lambda path: path.name)
def test_scripts_are_sound(script):
    text = script.read_text()
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    if script.suffix == ".sbatch":  # a frame around the script of the same name
        assert script.with_suffix(".sh").name in text and script.with_suffix(".sh").exists()
    elif "settings=(" in text:
        compose_config(text.split("settings=(")[1].split(")")[0].split())
