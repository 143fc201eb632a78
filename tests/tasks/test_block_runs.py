# ruff: noqa: E501 - command lines are kept whole
"""Block diffusion from the command line: modes, starts from other models, resumes, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.experiment.experiment import Experiment
from palimpsest.models.checkpoints import load_inert, read_checkpoint
from palimpsest.models.dit import DiT
from palimpsest.settings.command_line import compose_config, translate
from tests.helpers.commands import TINY, refused, run

BLOCK = [
    *TINY,
    "algo=bd3lm",
    "block_size=4",
    "loader.eval_batch_size=4",
    "optim=adamw",
    "~logger",
    "lr_scheduler=constant_warmup",
    "eval.generate_samples=false",
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".cache").symlink_to(cache)
    return tmp_path


@pytest.mark.parametrize("size", [1, 4])
def test_every_mode_works_with_blocks_of_any_size(here, size):
    settings = [*BLOCK, f"block_size={size}"]
    trained = run(*settings)
    measured = run(*settings, "mode=ppl_eval")
    assert trained["gap_nats_per_token"].value > 0, "a bound below the true entropy is a bug"
    kind = json.loads(next(here.rglob("ppl_eval/*/results.json")).read_text())["protocol"]
    assert kind["parameterization"] == "bd3lm" and kind["kind"] == ("exact likelihood" if size == 1 else "NELBO")
    assert measured["monte_carlo_se"] == 0 if size == 1 else measured["monte_carlo_se"] > 0
    run(*settings, "mode=sample_eval")
    ids = next(here.rglob("samples.jsonl")).read_bytes()
    run(*settings, "mode=sample_eval", "sampling.kv_cache=false")
    others = next(here.rglob("samples.jsonl")).read_text().splitlines()
    for ours, theirs in zip(ids.decode().splitlines(), others, strict=True):
        assert json.loads(ours)["ids"] == json.loads(theirs)["ids"]


def test_classification_works_with_blocks(here):
    conditional = [*BLOCK, "mode=classify", "classify.sharing=conditional", "classify.baselines=false"]
    assert 0 <= run(*conditional)["accuracy"].value <= 1


@pytest.mark.parametrize("overrides", [
    ["training.resample=true", "training.sampling_eps_min=0.3", "training.sampling_eps_max=0.8", "model.dropout=0.1"],
    ["noise=cosine", "time_conditioning=true", "training.change_of_variables=true", "model.mask_padding=false"],
    ["training.masking=complementary", "eval.estimator=complementary", "training.loss_weight=uniform", "block_size=72"],
    ["T=20", "eval.generate_samples=true", "sampling.first_hitting=false", "sampling.top_k=5"],
], ids=" ".join)  # fmt: skip
def test_settings_of_training_and_sampling_hold_in_blocks(here, overrides):
    assert run(*BLOCK, *overrides)["gap_nats_per_token"].value > 0


def test_the_limits_are_searched_saved_and_resumed_exactly(here):
    search = [*BLOCK, "training.clip_search_widths=[0.3,0.5]", "training.clip_search_delta=0.1", "trainer.max_steps=6",
              "trainer.val_check_interval=2", "callbacks.checkpoint_every_n_steps.every_n_train_steps=2"]  # fmt: skip
    run(*search, "checkpointing.save_dir=whole")
    run(*search, "checkpointing.save_dir=parts", "trainer.max_steps=2")
    first = load_inert(here / "parts/checkpoints/last.ckpt")["state_dict"]
    limits = [float(first[f"sampling_eps_{end}"]) for end in ("min", "max")]
    assert limits != [1e-3, 1.0] and limits[1] - limits[0] <= 0.5 + 1e-9
    run(*search, "checkpointing.save_dir=parts")
    whole, parts = (load_inert(here / f"{name}/checkpoints/last.ckpt")["state_dict"] for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    read_checkpoint(here / "parts/checkpoints/last.ckpt")
    run(*search[:-3], "checkpointing.save_dir=fixed", "training.fix_clipping=true", "trainer.val_check_interval=2")
    fixed = load_inert(here / "fixed/checkpoints/last.ckpt")["state_dict"]
    assert float(fixed["sampling_eps_min"]) == 1e-3 and float(fixed["sampling_eps_max"]) == 1.0


def test_the_variance_of_the_gradient_is_logged_and_changes_nothing(here):
    plain = [*(a for a in BLOCK if a != "~logger"), "trainer.log_every_n_steps=1", "model.dropout=0.1"]
    run(*plain, "checkpointing.save_dir=without")
    run(
        *plain,
        "checkpointing.save_dir=with",
        "callbacks=[checkpoint_every_n_steps,gradient_variance]",
        "callbacks.gradient_variance.every_n_steps=1",
    )
    table = next((here / "with").rglob("metrics.csv")).read_text()
    assert "train/gradient_variance" in table and "train/gradient_noise" in table
    ours, theirs = (load_inert(here / f"{name}/checkpoints/last.ckpt")["state_dict"] for name in ("with", "without"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_training_starts_from_masked_diffusion_and_from_other_blocks(here):
    run(*TINY, "optim=adamw", "~logger", "checkpointing.save_dir=mdlm")
    path = "mdlm/checkpoints/last.ckpt"
    start = [*BLOCK, "optim.lr=0", f"training.from_pretrained={path}"]
    run(*start, "checkpointing.save_dir=four")
    run(
        *BLOCK,
        "block_size=8",
        "optim.lr=0",
        "training.from_pretrained=four/checkpoints/last.ckpt",
        "checkpointing.save_dir=eight",
    )
    want, *got = (read_checkpoint(here / name / "checkpoints/last.ckpt") for name in ("mdlm", "four", "eight"))
    for checkpoint in got:
        for ours, theirs in zip(checkpoint.ema["shadow_params"], want.ema["shadow_params"], strict=True):
            torch.testing.assert_close(ours, theirs)
    refused(
        "add: .*block_size=4",
        *BLOCK,
        "block_size=8",
        "mode=ppl_eval",
        "eval.checkpoint_path=four/checkpoints/last.ckpt",
    )
    refused("add: .*parameterization=subs", *BLOCK, "mode=ppl_eval", f"eval.checkpoint_path={path}")
    refused("add: .*parameterization=bd3lm", *TINY, "mode=ppl_eval", "eval.checkpoint_path=four/checkpoints/last.ckpt")


WRAPPED = ["data.wrap=true", "model.length=64", "data.max_train_texts=200"]


def test_texts_longer_than_the_training_and_of_their_own_length(here):
    settings = [*BLOCK, *WRAPPED]
    run(*settings, "checkpointing.save_dir=x")
    sample = [*settings, "mode=sample_eval", "eval.checkpoint_path=x/checkpoints/last.ckpt", "checkpointing.save_dir=x"]
    run(*sample, "model.length=160")
    rows = [json.loads(line) for line in (here / "x/sample_eval/samples.jsonl").read_text().splitlines()]
    assert all(len(row["ids"]) == 160 for row in rows)
    protocol = json.loads((here / "x/sample_eval/results.json").read_text())["protocol"]
    assert protocol["context"] == 64
    run(*sample, "model.length=160", "sampling.var_length=true", "loader.eval_batch_size=16")
    rows = [json.loads(line) for line in (here / "x/sample_eval/samples.jsonl").read_text().splitlines()]
    lengths = {len(row["ids"]) for row in rows}
    assert len(lengths) > 1 and max(lengths) <= 160
    refused("model.length=160 is longer.*mode=sample_eval", *sample[:-1], "mode=ppl_eval", "model.length=160")
    run(*sample, "sampling.prefix=the film was")
    first = json.loads((here / "x/sample_eval/samples.jsonl").read_text().splitlines()[0])
    assert first["text"].startswith("the film")


def test_a_hub_model_is_measured_sampled_and_fine_tuned(here):
    size = Experiment(compose_config([]), "a test").build.data().vocabulary.size
    torch.manual_seed(0)
    net = DiT(size, hidden_size=16, cond_dim=8, n_blocks=1, n_heads=2)
    (here / "hub").mkdir()
    state = {f"backbone.{name}": tensor for name, tensor in net.state_dict().items()}
    state |= {"sampling_eps_min": torch.tensor(1e-3), "sampling_eps_max": torch.tensor(1.0)}
    save_file(state, here / "hub/model.safetensors")
    config = {"model_type": "bd3lm", "vocab_size": size, "model_length": 72, "hidden_dim": 16, "cond_dim": 8,
              "n_blocks": 1, "n_heads": 2, "dropout": 0.0, "block_size": 8, "cross_attn": True, "adaln": True,
              "causal": False, "time_conditioning": False, "attn_backend": "flex", "var_min": True,
              "sampling_eps_min": 1e-3, "sampling_eps_max": 1.0}  # fmt: skip
    (here / "hub/config.json").write_text(json.dumps(config))
    sizes = tuple(f"model.{name}=" for name in ("hidden_size", "cond_dim", "n_blocks", "n_heads"))
    asked = [*(a for a in BLOCK if not a.startswith((*sizes, "block_size"))), "algo.backbone=hf_dit", "block_size=8"]
    run(*asked, "mode=ppl_eval", "eval.checkpoint_path=hub")
    run(*asked, "mode=sample_eval", "eval.checkpoint_path=hub", "sampling.num_sample_batches=1")
    run(*asked, "block_size=4", "training.from_pretrained=hub")
    refused("add: .*block_size=8", *asked, "block_size=4", "mode=ppl_eval", "eval.checkpoint_path=hub")
    shutil.copytree(here / "hub", here / "causal")
    (here / "causal/config.json").write_text(json.dumps({**config, "causal": True}))
    refused("causal=True in its config.json", *asked, "mode=ppl_eval", "eval.checkpoint_path=causal")


def test_the_references_command_lines_compose():
    for line in [
        "loader.global_batch_size=512 model=small algo=bd3lm algo.clip_search_widths=[0.5,0.6,0.7,0.8,0.9] data=lm1b-wrap "
        "model.length=128 block_size=4 wandb.name=bd3lm mode=train model.attn_backend=flex training.resample=True "
        "training.from_pretrained=/x.ckpt data.insert_train_special=False",
        "mode=sample_eval model=small algo=bd3lm algo.T=5000 algo.backbone=hf_dit data=openwebtext-split model.length=2048 "
        "block_size=16 eval.checkpoint_path=kuleshov-group/bd3lm-owt-block_size16 wandb=null sampling.nucleus_p=0.9 "
        "sampling.kv_cache=true sampling.logdir=/x/samples loader.eval_batch_size=1 sampling.num_sample_batches=25",
        "mode=sample_eval algo=bd3lm block_size=16 data=openwebtext-split model.length=131072 sampling.var_length=true",
        "mode=ppl_eval algo=bd3lm block_size=16 data=gsm8k_baseline model=small model.length=512 +data.insert_valid_eos=False "
        "algo.var_min=True algo.cross_attn=true algo.sampler=semi_ar algo.fix_clipping=false algo.clip_search_delta=0.05",
        "algo=bd3lm block_size=8 algo.ignore_bos=false algo.mdlm_loss_scale=true training.sampling_eps_min=0.3",
    ]:  # fmt: skip
        compose_config(line.split())
    assert translate(["algo.mdlm_loss_scale=false", "algo.T=0", "algo.T=50"]) == ["noise.eps=0", "sampling.steps=50"]


@pytest.mark.parametrize(("arguments", "said"), [
    (["algo=bd3lm", "block_size=7"], "block_size=7 must divide model.length=72.*nearest that do: 6 and 8"),
    (["algo=bd3lm", "block_size=100"], "block_size=100 must divide.*nearest that do: 72"),
    (["algo=bd3lm", "block_size=0"], "block_size=0 must be a whole number from 1"),
    (["block_size=4"], "block_size=4 means nothing to parameterization=subs: it is read by parameterization=bd3lm"),
    (["algo=bd3lm", "block_size=four"], "block_size=four must be a whole number"),
    (["algo=bd3lm", "block_size=4", "backbone=dimamba"], "needs a network that reads texts in blocks.*DiMamba"),
    (["algo=bd3lm", "block_size=4", "sampling.predictor=ddpm"], "writes block after block.*sampling.predictor=block"),
    (["algo=bd3lm", "block_size=1", "training.resample=true"], "block_size=1 leaves nothing to draw"),
    (["algo=bd3lm", "block_size=4", "sampling.var_length=true"], "sampling.var_length=true with data.wrap=false"),
    (["sampling.var_length=true"], "sampling.var_length=true means nothing to parameterization=subs"),
    (["training.sampling_eps_min=0.3"], "means nothing to parameterization=subs: it is read by parameterization=bd3lm"),
    (["algo=bd3lm", "block_size=4", "training.sampling_eps_min=0.9", "training.sampling_eps_max=0.3"], "0 <= min < max"),
    (["algo=bd3lm", "block_size=4", "training.sampling_eps_min=0.3", "masking=exact_count"], "would do nothing"),
    (["algo=bd3lm", "block_size=4", "training.clip_search_widths=[2]"], r"clip_search_widths=\[2\] must be .* in \(0, 1\]"),
    (["algo=bd3lm", "block_size=4", "training.clip_search_widths=[0.5]", "training.clip_search_delta=1e-9"],
     "delta=1e-09 must be a number in"),
    (["algo=bd3lm", "block_size=4", "training.clip_search_widths=0.5"], "clip_search_widths=0.5 must be a list"),
    (["algo=bd3lm", "block_size=4", "training.clip_search_widths=[abc]"], r"must be a list .* each entry a number"),
    (["algo=bd3lm", "block_size=4", "training.fix_clipping=true"], "training.fix_clipping=true measures"),
    (["algo=bd3lm", "block_size=null"], "block_size=null must be a whole number"),
    (["algo=bd3lm", "block_size=4", "algo.ignore_bos=3"], "ignore_bos=3 must be true or false"),
    (["algo=bd3lm", "block_size=4", "algo.var_min=false"], "algo.var_min=false: here it is always true"),
    (["sampling.context=16"], "sampling.context=16 means nothing to parameterization=subs"),
    (["training.masking=exact_count", "training.resample=true"], "training.resample=true means nothing .* masking=bernoulli"),
    (["algo=bd3lm", "block_size=4", "callbacks=[gradient_variance]", "callbacks.gradient_variance.every_n_steps=0"],
     "every_n_steps=0 must be a whole number from 1"),
    (["sampling.predictor=block"], "writes texts of algo=bd3lm"),
    (["algo=bd3lm", "data.document_mask=true"], "data.document_mask=true: parameterization=bd3lm reads whole rows"),
    (["backbone=dimamba", "data.document_mask=true"], "data.document_mask=true: backbone=DiMamba reads whole rows"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_what_can_not_be_meant_is_refused_with_the_reason(here, arguments, said):
    refused(said, *(BLOCK if "algo=bd3lm" in arguments else TINY), *arguments)
