"""scripts/generate.py: the settings that a checkpoint carries, the keys of options, and sampled texts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from palimpsest.models.checkpoints import Checkpoint, read_settings
from palimpsest.models.compatibility import check_compatible
from palimpsest.scripts import generate
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.declared import CONFIGS
from palimpsest.settings.identity import identity, overrides
from tests.helpers.commands import TINY, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run whose network, tokenizer and schedule are not the defaults."""
    folder = tmp_path_factory.mktemp("generate")
    run(
        *TINY,
        "data.tokenizer_name_or_path=bpe",
        "data.vocab_size=300",
        "model.length=64",
        "data.long_texts=truncate",
        "noise=cosine",
        f"data.cache_dir={folder / 'cache'}",
        f"checkpointing.save_dir={folder / 'run'}",
        "sampling.num_sample_log=0",
        "data.label=1",
    )
    return folder / "run" / "label=1"


def arguments(*typed: str) -> dict[str, str]:
    """The arguments of main.py as a dictionary."""
    args = generate.parser().parse_intermixed_args(list(typed))
    return dict(word.split("=", 1) for word in generate.arguments(args))


@pytest.mark.parametrize("typed", [
    ["data=imdb", "model=tiny", "data.tokenizer_name_or_path=bpe", "data.vocab_size=500", "noise=cosine", "T=10",
         "parameterization=d3pm", "subs_masking=true", "time_conditioning=true", "masking=exact_count", "T=0"],
    ["algo=bd3lm", "block_size=8", "model.length=64", "training.resample=true", "data=gsm8k", "data.label=null"],
    ["parameterization=ar", "data=labelled", "data.path='/a b/{c}=d,\"e\".csv'", "classify.sharing=conditional"],
    ["algo=mlm", "backbone=hf_mlm", "backbone.from_scratch=true", "data=reviews", "training.prefix_length=0"],
    ["algo=mmldlm", "latents=synthetic", "latents.attributes=[class,topic]", "noise.eps=0",
     "training.joint_modes={l2t: 1, text: 2}"],
    ["algo=mmldlm", "latents=hf", "latents.name_or_path=some-encoder", "latents.dim=8", "model=mmdit-toy"],
], ids=["d3pm", "bd3lm", "ar", "mlm", "mmldlm synthetic", "mmldlm hf"])  # fmt: skip
def test_a_configuration_is_restored_from_its_identity(typed):
    known = json.loads(json.dumps(identity(compose_config(typed))))
    found = identity(compose_config(overrides(known)))
    assert not {key for key in set(found) - set(known) if key.startswith(("training.", "data."))}, "unset stays unset"
    assert {key: value for key, value in known.items() if not key.startswith(("optim", "lr_s", "loader", "seed"))} == {
        key: found.get(key) for key in known if not key.startswith(("optim", "lr_s", "loader", "seed"))
    }


def test_settings_found_in_a_published_network_are_not_repeated():
    known = identity(compose_config(["algo=mlm", "backbone=hf_mlm", "backbone.name_or_path=tiny", "data=reviews"]))
    words = overrides({**known, "backbone.config_json": '{"model_type": "bert"}'})
    assert "backbone=hf_mlm" in words and not any("config_json" in word for word in words)
    assert compose_config(words).backbone.name_or_path == "tiny"


def test_a_checkpoint_cannot_name_code_to_run():
    known = identity(compose_config([]))
    for key, value in (("backbone._target_", "os.system"), ("data.source._target_", "subprocess.run"),
                       ("noise.eps", "${oc.env:HOME}")):  # fmt: skip
        with pytest.raises(ValueError, match="which no file in configs/ names"):
            overrides({**known, key: value})


def test_options_become_keys(trained):
    keys = arguments(
        "--checkpoint",
        str(trained),
        "--prefix",
        "the plot",
        "--sampling",
        "topk",
        "--temperature",
        "0.7",
        "--schedule",
        "cosine",
        "--order",
        "entropy",
        "--steps",
        "64",
        "--num-samples",
        "3",
        "--max-length",
        "48",
        "--remask",
        "remdm",
        "--seed",
        "5",
        "--show",
        "sampling.show_delay=0",
    )
    assert keys["sampler"] == "unmask" and keys["noise"] == "cosine" and keys["data.label"] == "1"
    assert keys["data.vocab_size"] == "300" and keys["model.hidden_size"] == "16"
    wanted = {"top_k": "50", "temperature": "0.7", "schedule": "cosine", "order": "entropy", "steps": "64",
              "num_samples": "3", "max_length": "48", "remask": "remdm", "show": "true", "show_delay": "0",
              "prefix": '"the plot"'}  # fmt: skip
    assert {key: keys[f"sampling.{key}"] for key in wanted} == wanted and keys["seed"] == "5"
    compose_config([f"{key}={value}" for key, value in keys.items()])


def test_a_typed_key_overrides_an_option(trained):
    keys = arguments(
        "--checkpoint", str(trained), "--steps", "4", "sampling.predictor=first_hitting", "sampling.steps=9"
    )
    assert "sampler" not in keys and keys["sampling.predictor"] == "first_hitting" and keys["sampling.steps"] == "9"


@pytest.mark.parametrize(("typed", "message"), [
    (["--sampling", "greedy", "--top-k", "5"], "--top-k 5 belongs to --sampling topk"),
    (["--sampling", "greedy", "--temperature", "0.5"], "means nothing to --sampling greedy"),
    (["--sampling", "topk", "--top-p", "0.5"], "--top-p 0.5 belongs to --sampling nucleus"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_refused(trained, typed, message):
    with pytest.raises(ValueError, match=message):
        arguments("--checkpoint", str(trained), *typed)


@pytest.mark.parametrize(("model", "sampler"), [
    ({"parameterization": "subs"}, "unmask"), ({"parameterization": "ar"}, "ar"),
    ({"parameterization": "udlm"}, "uniform"), ({"parameterization": "gidd"}, "uniform"),
    ({"parameterization": "bd3lm", "block_size": 4, "model.length": 8}, "block_unmask"),
    ({"parameterization": "bd3lm", "block_size": 8, "model.length": 8}, "unmask"),
    ({"parameterization": "bd3lm", "block_size": 8, "model.length": 8, "data.segments": True}, "block_unmask"),
])  # fmt: skip
def test_the_sampler_fits_the_model(model, sampler):
    assert generate.predictor(model) == sampler


def test_for_a_foreign_checkpoint_the_message_names_what_is_missing(tmp_path, monkeypatch, capsys):
    torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, tmp_path / "theirs.ckpt")
    with pytest.raises(SystemExit) as ended:
        generate.generate(["--checkpoint", str(tmp_path / "theirs.ckpt")])
    output = capsys.readouterr().err
    assert ended.value.code == 2 and "does not carry the configuration" in output and "mode=sample_eval" in output


@pytest.mark.parametrize("text", [
    "C:\\new ${seed} ${oc.env:HOME}", '"Hello" he said\n\tand left', "null", '"Hello"', "'tis", "a\\${x}\\",
    "{{[=,]}} 🙂 ",
])  # fmt: skip
def test_a_prefix_is_taken_letter_by_letter(text):
    assert compose_config([f"sampling.prefix={generate.quoted('sampling.prefix', text)}"]).sampling.prefix == text
    if text not in ("null", '"Hello"'):  # which main.py reads as Hydra does
        assert compose_config([f"sampling.prefix={text}"]).sampling.prefix == text


def test_what_main_refuses_is_one_message(trained, monkeypatch, capsys):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr("sys.argv", ["generate.py"])
    with pytest.raises(SystemExit) as ended:
        generate.generate(["--checkpoint", str(trained), "--template", "the {{-3}} and [MASK]"])
    output = capsys.readouterr().err
    assert ended.value.code == 2 and "where no gap follows" in output and "Traceback" not in output
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_texts_from_a_checkpoint(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("argv", "stdout", "stderr"):  # main.py replaces them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    generate.generate([
        "--checkpoint", str(trained), "--prefix", "the plot is", "--sampling", "topk", "--top-k", "20", "--temperature",
        "0.7", "--schedule", "cosine", "--steps", "8", "--num-samples", "3", "--max-length", "24", "--remask", "remdm",
        "--show", "--gif", "trainer.accelerator=cpu",
    ])  # fmt: skip
    out, err = capsys.readouterr()
    folder = tmp_path / "outputs" / "generated" / "label=1" / "sample_eval"
    assert {"denoising.html", "denoising.gif", "report.html", "samples.jsonl"} <= {p.name for p in folder.iterdir()}
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["text"].startswith("the plot is") and len(row["ids"]) <= 24 for row in rows)
    assert all(row["text"] in out for row in rows) and str(folder.relative_to(tmp_path) / "denoising.html") in out
    assert "step 0, " in err and "masks left" in err and "\x1b" not in err
    results = json.loads((folder / "results.json").read_text())
    checkpoint = read_settings(trained / "checkpoints" / "last.ckpt")
    assert results["protocol"]["sampler"] == "palimpsest.samplers.unmasking.sample" and checkpoint.step == 2


def test_a_mask_token_is_typed_as_it_is_and_kept_by_checkpoints():
    plain, named = (identity(compose_config(["data=text", *more])) for more in ([], ["data.mask_token=[MASK]"]))
    assert named == {**plain, "data.mask_token": "[MASK]"}, "older checkpoints have no such key"
    assert identity(compose_config(overrides(named)))["data.mask_token"] == "[MASK]"
    data = SimpleNamespace(vocabulary=SimpleNamespace(fingerprint="ours", size=9, own_size=9), latents=None)
    checkpoint = Checkpoint("x.ckpt", {}, identity={"configuration": named, "tokenizer": "theirs"}, settings=named)
    with pytest.raises(ValueError, match=r"another mask token; add: 'data\.mask_token=\[MASK\]'"):
        check_compatible(checkpoint, plain, (), data)


@pytest.mark.parametrize(("law", "sampler"), [
    ("udlm", "uniform"), ("gidd", "uniform"), ("ar", "ar"), ("subs", "unmask"), ("sedd", "unmask"), ("mine", "uniform"),
])  # fmt: skip
def test_each_model_has_the_sampler_of_its_process(law, sampler, tmp_path, monkeypatch):
    shutil.copytree(CONFIGS / "parameterization", tmp_path / "parameterization")
    shutil.copy(CONFIGS / "parameterization/udlm.yaml", tmp_path / "parameterization/mine.yaml")
    monkeypatch.setattr("palimpsest.settings.command_line.CONFIGS", tmp_path)
    assert generate.predictor({"parameterization": law, "block_size": 8, "model.length": 8}) == sampler
