"""Exports: transformers computes bit for bit what we compute, from code that needs nothing of this project."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from palimpsest.data.tokenizers import load_tokenizer, vocabulary
from palimpsest.experiment import running
from palimpsest.models.checkpoints import read_checkpoint
from palimpsest.models.dit import DiT
from palimpsest.models.hf_dit import build
from palimpsest.models.modeling_mdlm import MDLM, MDLMConfig
from palimpsest.scripts.export_hf import CODE, export
from palimpsest.settings.command_line import compose_config
from tests.helpers import commands
from tests.helpers.commands import ROOT

RUN = ["model.hidden_size=16", "model.cond_dim=8", "model.n_blocks=2", "model.n_heads=2", "model.dropout=0.1",
       "time_conditioning=true", "trainer.accelerator=cpu", "trainer.max_steps=6", "loader.global_batch_size=4",
       "optim=adamw", "optim.lr=0.1", "lr_scheduler=constant_warmup", "lr_scheduler.num_warmup_steps=0",
       "data.max_train_texts=32", "data.max_valid_texts=8", "eval.num_draws=1", "sampling.num_sample_log=0",
       "loader.eval_batch_size=8", "checkpointing.save_dir=run", "data.cache_dir=cache"]  # fmt: skip

# The use of an export without this project, in an isolated interpreter.
EXTERNAL_USE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.modeling_outputs import MaskedLMOutput
folder, again, asked, answered = sys.argv[1:]
asked = load_file(asked)
given = {"input_ids": asked["ids"], "timesteps": asked["sigma"], "attention_mask": asked["mask"]}
answers = {}
for name, path in (("first", folder), ("again", again)):
    model, info = AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        out = model(**given)
        assert isinstance(out, MaskedLMOutput)
        answers[name] = out.logits
        answers[name + "_whole"] = model(asked["ids"], asked["sigma"]).logits
    model.save_pretrained(again)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
answers["ids"] = torch.tensor(tokenizer("the plot is brilliant", add_special_tokens=False)["input_ids"])
save_file(answers, answered)
"""


def run(*arguments: str) -> dict[str, object]:
    return commands.run(*RUN, *arguments)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a trained run and its tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run()
    (tokenizer,) = (path.parent for path in folder.glob("cache/tokenizer-*/tokenizer.json"))
    tokenizer.rename(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def exported(trained) -> Path:
    assert export(str(trained / "run/checkpoints/last.ckpt"), trained / "out") == []
    return trained / "out"


def ours(checkpoint: Path, use_ema: bool = True) -> DiT:
    read = read_checkpoint(checkpoint)
    net = build(read.settings).eval()
    read.load_into(net, use_ema)
    return net


def test_transformers_computes_what_we_compute_bit_for_bit(tmp_path, trained, exported):
    net = ours(trained / "run/checkpoints/last.ckpt")
    torch.manual_seed(0)
    asked = {"ids": torch.randint(net.vocab_size, (3, 20)), "sigma": torch.rand(3) * 5,
             "mask": (torch.arange(20) < torch.tensor([[20], [9], [14]])).long()}  # fmt: skip
    save_file(asked, tmp_path / "asked")
    arguments = [str(exported), str(tmp_path / "again"), str(tmp_path / "asked"), str(tmp_path / "answered")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-I", "-c", EXTERNAL_USE, *arguments], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, **threads})  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = load_file(tmp_path / "answered")
    with torch.no_grad():
        wanted = net(asked["ids"], asked["sigma"], asked["mask"].bool())
        whole = net(asked["ids"], asked["sigma"])
    for name in ("first", "again"):
        assert torch.equal(answers[name], wanted) and torch.equal(answers[f"{name}_whole"], whole), name
    assert not torch.equal(wanted, whole), "the padding mask has an effect"
    tokenizer = load_tokenizer(str(trained / "tokenizer"))
    assert answers["ids"].tolist() == tokenizer("the plot is brilliant", add_special_tokens=False)["input_ids"]
    for folder in (exported, tmp_path / "again"):
        restored = ours(folder).state_dict()
        assert all(torch.equal(restored[name], tensor) for name, tensor in net.state_dict().items())


def test_the_average_is_exported_unless_raw_is_set(tmp_path, trained, exported):
    last = trained / "run/checkpoints/last.ckpt"
    export(str(last), tmp_path / "raw", raw=True)
    states = {}
    for name, folder, use_ema in (("ema", exported, True), ("raw", tmp_path / "raw", False)):
        states[name] = load_file(folder / "model.safetensors")
        for key, tensor in ours(last, use_ema).state_dict().items():
            assert torch.equal(states[name][f"backbone.{key}"], tensor), (name, key)
    name = "backbone.vocab_embed.embedding"
    assert not torch.equal(states["ema"][name], states["raw"][name])


def test_the_code_is_ours_and_needs_no_optional_package(exported):
    imported = set()
    for name in CODE:
        text = (exported / name).read_text()
        room = "models" if (ROOT / "models" / name).exists() else "common"
        ours = (ROOT / room / name).read_text()
        assert text == re.sub(r"\nfrom palimpsest\.(models|common)\.", "\nfrom .", ours), name
        imported |= set(get_imports(exported / name))
        assert {f"{module}.py" for module in get_relative_imports(exported / name)} <= set(CODE)
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert "local" not in (exported / "tokenizer_config.json").read_text()
    assert {p.name for p in exported.iterdir()} == {
        *CODE,
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_an_export_has_the_likelihood_of_its_checkpoint(trained, exported, monkeypatch):
    monkeypatch.chdir(trained)
    before = run("mode=ppl_eval")["nll_nats_per_token"].value
    own = [word for word in RUN if not word.startswith(("model.", "time_conditioning"))]
    ask = [*own, "mode=ppl_eval", "backbone=hf_dit", f"eval.checkpoint_path={exported}"]
    assert running.run(compose_config(ask), "a test")["nll_nats_per_token"].value == before
    ask.append(f"data.tokenizer_name_or_path={exported}")
    assert running.run(compose_config(ask), "a test")["nll_nats_per_token"].value == before
    known = vocabulary(load_tokenizer(str(trained / "tokenizer"))).fingerprint
    assert vocabulary(load_tokenizer(str(exported))).fingerprint == known
    config = json.loads((exported / "config.json").read_text())
    assert config["tokenizer_fingerprint"] == known
    assert config["model_length"] == 72 and config["time_conditioning"] is True and config["dropout"] == 0.1
    with pytest.raises(ValueError, match="another tokenizer"):
        running.run(
            compose_config([*ask[:-1], "data.tokenizer_name_or_path=byte", "data.long_texts=truncate"]), "a test"
        )


def test_reference_checkpoints_export_to_the_references_layout(tmp_path, fixtures_dir, caplog):
    path, published = fixtures_dir / "mdlm_subs" / "mdlm.ckpt", fixtures_dir / "hf_mdlm"
    tokenizer = fixtures_dir / "tokenizers" / "dev"
    assert export(str(path), tmp_path / "out", str(tokenizer)) == []
    assert (tmp_path / "out" / "tokenizer.json").exists()
    wanted, got = (load_file(folder / "model.safetensors") for folder in (published, tmp_path / "out"))
    assert list(wanted) == list(got) and all(torch.equal(got[name], wanted[name]) for name in wanted)
    wanted, got = (json.loads((folder / "config.json").read_text()) for folder in (published, tmp_path / "out"))
    sizes = ("vocab_size", "model_length", "hidden_dim", "cond_dim", "n_blocks", "n_heads", "dropout")
    assert all(got[key] == wanted[key] for key in (*sizes, "time_conditioning", "model_type", "architectures"))
    export(str(fixtures_dir / "mdlm_subs_tc" / "mdlm.ckpt"), tmp_path / "tc")
    assert json.loads((tmp_path / "tc" / "config.json").read_text())["time_conditioning"] is True
    assert "no tokenizer was written" in caplog.text
    export(str(tmp_path / "out"), tmp_path / "twice")
    twice = load_file(tmp_path / "twice" / "model.safetensors")
    assert all(torch.equal(twice[name], tensor) for name, tensor in load_file(published / "model.safetensors").items())


def test_sizes_are_read_off_the_tensors_if_a_file_has_no_settings(tmp_path):
    torch.manual_seed(0)
    net = DiT(7, hidden_size=24, cond_dim=6, n_blocks=3, n_heads=4)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "x.ckpt")
    assumed = export(str(tmp_path / "x.ckpt"), tmp_path / "out")
    assert assumed == ["model.length=1024", "model.dropout=0.1", "time_conditioning=False"]
    assert build(read_checkpoint(tmp_path / "out").settings).settings == net.settings


def test_invalid_arguments_are_refused(tmp_path, trained, fixtures_dir):
    last, out = str(trained / "run/checkpoints/last.ckpt"), tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="--checkpoint=nowhere.ckpt"):
        export("nowhere.ckpt", out)
    with pytest.raises(ValueError, match="--tokenizer=byte has 261 ids"):
        export(last, out, "byte")
    shutil.copytree(trained / "tokenizer", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace(" brilliant", " brillant"))
    with pytest.raises(ValueError, match="--tokenizer=.*other is not the one"):
        export(last, out, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="parameterization=ar"):
        export(str(fixtures_dir / "mdlm_ar" / "mdlm.ckpt"), out)
    assert not out.exists()
    out.mkdir()
    (out / "precious").write_text("")
    with pytest.raises(ValueError, match="--output=.*not an empty directory"):
        export(last, out)
    done = subprocess.run([sys.executable, str(ROOT / "scripts/export_hf.py"), "--checkpoint", last, "--output",
                           str(out)], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "choose a new one" in done.stderr and "Traceback" not in done.stderr


def test_a_time_conditioned_model_needs_timesteps_and_a_fresh_one_starts_as_ours():
    config = MDLMConfig(vocab_size=5, hidden_dim=8, cond_dim=4, n_blocks=1, n_heads=2)
    ids = torch.randint(5, (2, 6))
    model = MDLM(config).eval()
    assert torch.equal(model(ids).logits, model(ids, torch.ones(2)).logits)
    assert (model.backbone.head.weight == 0).all(), "transformers does not initialise the weights"
    with pytest.raises(ValueError, match="timesteps=None"):
        MDLM(MDLMConfig(**{**config.to_dict(), "time_conditioning": True}))(ids)
