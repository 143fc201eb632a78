# ruff: noqa: E501 - command lines are kept whole
"""Names and paths are taken literally; a key that + adds must be read by something, or it is refused as unknown."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from palimpsest.models.compatibility import refuse_unsupported
from palimpsest.models.reference_settings import OBJECTIVES
from palimpsest.settings.command_line import compose_config, explain, translate
from palimpsest.settings.declared import CONFIGS, takes_texts
from palimpsest.settings.reading import Readers

NAMES = ("李明.txt", "заметки.txt", "o'brien.txt", "notes (1).txt", "a,b.txt", "#1 ~ {best} [of] 50%.txt", "v=2/tok", "1e3",
         'the "old" one', "a & b; c", "Größe/été.ckpt", "{label}/last.ckpt", "nan", "back\\slash's", "tab\tand <this> | !")  # fmt: skip
KEYS = ("data.path", "output_dir", "checkpointing.save_dir", "checkpointing.resume_ckpt_path", "eval.checkpoint_path",
        "data.tokenizer_name_or_path", "data.cache_dir", "eval.gen_ppl_eval_model_name_or_path", "wandb.name",
        "training.from_pretrained", "data.text_column", "backbone.name_or_path", "latents.path", "hydra.sweep.dir",
        "+data.source.hub_config")  # fmt: skip


def read(argument: str, *beside: str) -> object:
    """Return the value of an argument as Hydra reads it."""
    words = translate([argument, *beside])
    assert translate(words) == words, "a process that is started with them translates them again"
    return OverridesParser.create().parse_override(words[0]).value()


@pytest.mark.parametrize("key", KEYS)
def test_names_are_taken_literally(key):
    for name in NAMES:
        assert read(f"{key}={name}") == name


def test_what_hydra_reads_as_a_text_stays_hydras():
    for typed, meant in [("null", None), ("'quoted, name'", "quoted, name"), ("${output_dir}/x", "${output_dir}/x"),
                         ("a\\,b", "a,b"), ("${output_dir}/李", "${output_dir}/李"), ("s3://bucket/run", "s3://bucket/run")]:  # fmt: skip
        assert read(f"checkpointing.save_dir={typed}") == meant


def test_the_home_folder_is_written_out_in_paths_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/李")
    assert read("data.path=~/a b.txt") == "/home/李/a b.txt" == os.path.expanduser("~/a b.txt")
    assert read("wandb.name=~") == "~" and read("data.path=~") == "/home/李"


def test_lists_keep_their_commas_and_their_entries_are_names():
    assert read('classify.compare=[outputs/a b,李/x=1,"q,r",o\'b]') == ["outputs/a b", "李/x=1", "q,r", "o'b"]
    assert read("data.label_names=[плохо,хорошо]") == ["плохо", "хорошо"]
    assert read("classify.compare=[]") == [] and read("wandb.tags=[a,b]") == ["a", "b"]
    assert read("sampling.edit_class=7") == 7


@pytest.mark.parametrize("flag", ["--multirun", "-m", "hydra.mode=MULTIRUN"])
def test_commas_sweep_where_the_command_sweeps(flag):
    typed = {"data.path=a.txt,b.txt": "data.path=a.txt,b.txt", "data.path=李.txt,b.txt": 'data.path="李.txt",b.txt',
             "data.path='a,b.txt'": "data.path='a,b.txt'", "seed=1,2": "seed=1,2",
             "output_dir=choice(a,b)": "output_dir=choice(a,b)", 'data.path="a,1",ü': 'data.path="a,1","ü"'}  # fmt: skip
    assert translate([*typed, flag])[: len(typed)] == list(typed.values())


@pytest.mark.parametrize("line", [
    "algo=bd3lm block_size=8 --cfg job", "seed=1 -m optim.lr=1e-3,1e-2", "--multirun seed=1,2 T=0", "-c job seed=1 T=3",
    "seed=1 --package data algo=ar --cfg=job T=2", "T=1 --info config seed=1", "T=1 --pack data a=1",
    "--config-name x sampling.semi_ar=true -p data seed=1 --resolve", "seed=1 --config-dir a=b T=1", "seed=1 -h",
])  # fmt: skip
def test_flags_stand_anywhere(line):
    words, parser = line.split(), get_args_parser()
    meant = parser.parse_intermixed_args(words)
    read = parser.parse_args(translate(words))
    assert sorted(read.overrides) == sorted(translate(meant.overrides)) and len(read.overrides) > 0
    assert {**vars(read), "overrides": None} == {**vars(meant), "overrides": None}


def test_every_key_of_a_path_or_a_name_is_among_them():
    cfg = compose_config(["data=text", "data.path=李.txt", "output_dir=結果", "wandb.name=заметки", "data.cache_dir=été #1",
                          "checkpointing.save_dir=a (b)", "classify.compare=[x=1]", "hydra.run.dir=a (b)"])  # fmt: skip
    assert (cfg.data.path, cfg.output_dir, cfg.wandb.name, cfg.data.cache_dir) == (
        "李.txt",
        "結果",
        "заметки",
        "été #1",
    )
    assert cfg.checkpointing.save_dir == "a (b)" and cfg.classify.compare == ["x=1"]
    for key in (
        "logger.csv.save_dir",
        "callbacks.checkpoint_monitor.dirpath",
        "data.validation_path",
        "latents.prompt",
    ):
        assert takes_texts(key)


@pytest.mark.parametrize(("arguments", "said"), [
    (["+trainer.max_stpes=3"], "trainer.max_stpes. Did you mean trainer.max_steps"),
    (["++optim.learning_rate=1"], "optim.learning_rate.\n  what optim has: .*lr"),
    (["+trainer.max_epochs=3"], "trainer.max_epochs"),  # Lightning has it, and it is set here
    (["++trainer={gpus: 2}"], "trainer.gpus"),
    (["+backbone.num_classes=3"], "backbone.num_classes"),  # given by the code
    (["+modle.length=3"], "modle.length"),
    (["+seed.x=1"], "seed.x"),
    (["+data.segments=true"], "data.segments. It is a key of data=gsm8k, gsm8k_plan"),
    (["+noise.base.epps=0"], "noise.base.epps"),
    (["+latents.dim=3"], "latents.dim. It is a key of latents="),
    (["+callbacks.extra.monitor=x"], "callbacks.extra.monitor"),
    (["+sampler.watch=1"], "sampler.watch"),
])  # fmt: skip
def test_what_nothing_reads_is_not_added(arguments, said):
    with pytest.raises(ValueError, match=f"(?s)there is no key {said}"):
        compose_config(arguments)


def test_an_error_in_a_process_that_loads_data_is_told_like_any_other():
    told = "data.path=a.jsonl, line 7: there is no text; leave it out"
    trace = 'Original Traceback (most recent call last):\n  File "x.py", line 3, in f\n    raise ValueError('
    assert (
        explain(ValueError(f"Caught ValueError in DataLoader worker process 0.\n{trace}\nValueError: {told}")) == told
    )


def test_the_keys_that_are_listed_are_those_of_what_was_chosen(monkeypatch):
    typed = ["sampling.predictor=entropy_bounded", "sampler.gama=1"]
    monkeypatch.setattr("sys.argv", ["main.py", *typed])
    with pytest.raises(HydraException) as caught:
        compose_config(typed)
    said = explain(caught.value)
    assert "Did you mean sampler.gamma?" in said and "skip_idle" not in said


def test_arguments_that_are_there_are_added():
    cfg = compose_config([
        "data=imdb", "logger=wandb", "+trainer.deterministic=true", "++optim.lr=3", "+lr_scheduler.num_cycles=0.5",
        "+callbacks.learning_rate_monitor.log_weight_decay=true", "+data.source.seed=3", "+logger.wandb.entity=us",
        "+callbacks.timer._target_=lightning.pytorch.callbacks.Timer", "+callbacks.timer.interval=step",
        "+data.source.files.extra=extra.parquet", "lr_scheduler=cosine_decay_warmup",
    ])  # fmt: skip
    assert cfg.trainer.deterministic and cfg.optim.lr == 3 and cfg.data.source.files.extra == "extra.parquet"


def test_what_can_not_be_read_says_how_to_quote_it():
    with pytest.raises(Exception, match="李") as caught:
        compose_config(["seed=李"])
    assert "seed='\"李\"'" in explain(caught.value)
    with pytest.raises(HydraException) as caught:
        compose_config(["optim.lr"])
    assert explain(caught.value) == "optim.lr has no value; type optim.lr=..."


@pytest.mark.parametrize(("argument", "said"), [
    ("experiment=imdb_clasifier_cpu", "did you mean imdb_classifier_cpu"), ("logger=null", "csv_tensorboard"),
    ("model=null", "choose one of: medium"), ("+data=1", "choose one of: ag_news"), ("sampling.predictor=3", "ddpm"),
    ("experiment=imdb_classifier,none", "is unknown"), ("~seed", "would remove a key"),
    ("callbacks=[checkpoint_monitor,gradient_share]", "did you mean gradient_shares"), ("~data.path", "would remove"),
    ("sampling.predictor=first_hiting", "did you mean first_hitting"), ("data=cifar10", "choose one of: ag_news"),
    ("model=tiny,smal", "smal is unknown; did you mean small"), ("algo=mdlm,bd4lm", "is unknown; what exists"),
])  # fmt: skip
def test_what_chooses_no_file_of_a_group_is_refused(argument, said):
    with pytest.raises(ValueError, match=re.escape(argument) + f".*{said}"):
        translate([argument])


@pytest.mark.parametrize("line", [
    "model=choice(tiny,small) -m", "model=tiny,small -m", "model='tiny'", "data=reviews.yaml", "data=${other}",
    "--config-dir mine model=mine", "hydra.searchpath=[mine] model=mine",
])  # fmt: skip
def test_choices_that_hydra_knows_are_left_to_it(line):
    assert sorted(translate(line.split())) == sorted(line.split())


@pytest.mark.parametrize(("theirs", "ours"), [
    ("algo=duo algo.curriculum.end=5 algo.curriculum.start=0", "training.curriculum_end=5 parameterization=duo"),
    ("algo.curriculum.gumbel_tau_log10_start=-3.0", "training.gumbel_tau_log10_start=-3.0"),
    ("algo.curriculum.gumbel_tau_log10_end=-3.0", "training.gumbel_tau_log10_end=-3.0"),
    ("noise=log-linear prior=none sampling.use_float64=True", "noise=loglinear"),
    ("sampling.p_nucleus=0.9 training.finetune_path=x.ckpt", "sampling.nucleus_p=0.9 training.from_pretrained=x.ckpt"),
    ("sampling.predictor=ancestral sampling.noise_removal=greedy", "sampler=ddpm sampling.noise_removal=true"),
    ("sampling.predictor=ancestral_cache sampling.noise_removal=none", "sampler=ddpm_cache sampling.noise_removal=false"),
    ("sampling.predictor=ancestral,analytic -m", "sampler=ddpm,analytic -m"),
    ("sampling.noise_removal=ancestral", "sampling.noise_removal=true"),
    ("algo=d3pm algo.T=500", "T=500 parameterization=d3pm"),
    ("algo=bd3lm algo.T=500", "sampling.steps=500 parameterization=bd3lm"),
    ("algo=mdlm algo.cross_attn=false algo.var_min=False algo.subs_masking=true", "subs_masking=true parameterization=subs"),
    ("mode=ppl_eval sampling.num_sample_batches=0", "mode=ppl_eval eval.generate_samples=false"),
    ("mode=sample_eval sampling.num_sample_batches=0", "mode=sample_eval sampling.num_sample_batches=0"),
    ("algo=duo_base sampling.predictor=ancestral sampling.noise_removal=ancestral",
     "sampler=uniform sampling.noise_removal=false parameterization=udlm"),
    ("algo=ar sampling.predictor=ancestral", "sampler=ar parameterization=ar"),
    ("algo=mdlm,sedd -m", "parameterization=subs,sedd -m"),
])  # fmt: skip
def test_spellings_of_duo_are_ours(theirs, ours):
    assert translate(theirs.split()) == ours.split() == translate(ours.split())


@pytest.mark.parametrize(("line", "said"), [
    ("sampling.use_float64=false", "sampling.use_float64=false: here it is always true"), ("prior=image", "always none"),
    ("eval.checkpoint_path=x.ckpt sampling.noise_removal=ancestral", "type the objective of eval.checkpoint_path beside it"),
    ("algo=bd3lm algo.cross_attn=false", "here it is always true"),
    ("algo=sedd sampling.noise_removal=greedy", "noise_removal=greedy .*parameterization=sedd.*noise_removal=true"),
    ("sampling.predictor=analytic sampling.noise_removal=greedy", "predictor=analytic draws it"),
])  # fmt: skip
def test_spellings_of_duo_without_a_meaning_are_refused(line, said):
    with pytest.raises(ValueError, match=said):
        translate(line.split())


@pytest.mark.parametrize(("line", "said"), [
    ("algo.curriculum.ends=3", "no key algo.curriculum.ends. Did you mean algo.curriculum.end?"),
    ("algo.foo=3", "no key algo.foo.\n  what algo has: T, backbone"), ("prior.width=3", "no key prior.width."),
])  # fmt: skip
def test_an_unknown_key_is_named_whole(line, said):
    with pytest.raises(HydraException) as caught:
        compose_config(line.split())
    assert said in explain(caught.value, line.split())


def test_lists_of_objectives_are_whole():
    text = (CONFIGS / "config.yaml").read_text(encoding="utf-8")
    objectives = {path.stem for path in (CONFIGS / "parameterization").glob("*.yaml")} - {"subs"} | {"mdlm", "duo_base"}
    comment = re.search(r"- parameterization:.*?\n  - ", text, re.DOTALL)[0]
    assert objectives <= set(re.findall(r"\w+", comment))
    assert objectives == set(re.search(r"algo=(\S+\|\S+)\.", text)[1].split("|"))
    file = SimpleNamespace(path="x.ckpt", unsupported="distillation")
    with pytest.raises(ValueError, match="choose a checkpoint") as caught:
        refuse_unsupported(file)
    assert set(OBJECTIVES.values()) <= set(re.findall(r"\w+", str(caught.value)))


def test_one_study_at_a_time():
    with pytest.raises(ValueError, match="takes one study, not 2"):
        translate(["experiment=imdb_classifier", "experiment=roberta_wikitext2"])
    assert translate(["experiment=null"]) == ["experiment=null"]


def test_blanks_around_a_path_stay():
    assert compose_config(["data=text", "data.path= lead/t.txt"]).data.path == " lead/t.txt"


@pytest.mark.parametrize("argument", [
    "+trainer.detect_anomaly=7", "+trainer.benchmark=foo", "+trainer.deterministic=foo",
    "+trainer.min_steps=-3", "+trainer.profiler=x", "+trainer.gradient_clip_algorithm=x",
    "trainer.limit_train_batches=3",
])  # fmt: skip
def test_arguments_of_the_trainer_are_checked_as_ours_are(argument):
    with pytest.raises(ValueError, match=argument.lstrip("+") + " must be"):
        Readers(compose_config([argument])).refuse_wrong()
