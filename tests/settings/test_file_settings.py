"""Settings of a published model come from its file: all are read, compared, and used unless typed."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from palimpsest.common.metrics import Estimate
from palimpsest.data.collate import Collate
from palimpsest.experiment import running
from palimpsest.experiment.from_checkpoint import complete
from palimpsest.models.checkpoints import read_checkpoint, read_settings
from palimpsest.models.dit import DiT
from palimpsest.objectives.base import TokenDiffusion
from palimpsest.process import Absorbing
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from tests.helpers.commands import refused
from tests.helpers.draws import draw_at

# What kuleshov-group/bd3lms and s-sahoo/duo put into their files, as far as it says what a model is.
MODEL = {"hidden_size": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2, "length": 24, "dropout": 0.1}
BD3LMS = {"algo": {"name": "mdlm", "backbone": "dit", "parameterization": "subs", "time_conditioning": True, "T": 0,
                   "causal_attention": False, "ignore_bos": True, "cross_attn": False},
          "block_size": "${model.length}", "model": MODEL, "noise": {"type": "loglinear", "sigma_max": 20},
          "data": {"tokenizer_name_or_path": "gpt2"}}  # fmt: skip
DUO = {"algo": {"name": "sedd", "backbone": "dit", "parameterization": "score", "time_conditioning": True, "T": 0,
                "subs_masking": False, "causal_attention": False, "ignore_bos": False},
       "model": MODEL, "noise": {"type": "log-linear", "eps": 0.01}}  # fmt: skip
MDLM = {"parameterization": "subs", "backbone": "dit", "time_conditioning": False, "T": 0, "subs_masking": False,
        "model": MODEL, "noise": {"type": "loglinear"}, "training": {"change_of_variables": False}}  # fmt: skip


def reference_file(path: Path, config: dict[str, object], **changes: object) -> Path:
    """Write a `.ckpt` of a reference project with another `algo.X` (algo_X=...) or top-level setting."""
    config = json.loads(json.dumps(config))
    for key, value in changes.items():
        group, _, name = key.partition("_") if key.startswith("algo_") else ("", "", key)
        (config[group] if group else config)[name] = value
    net = DiT(40, hidden_size=16, cond_dim=8, n_blocks=1, n_heads=2)
    state = {f"backbone.{name}": tensor for name, tensor in net.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "global_step": 7, "hyper_parameters": {"config": config}}, path)
    return path


def composed(path: Path, *arguments: str):
    return compose_config(complete(["mode=ppl_eval", f"eval.checkpoint_path={path}", *arguments]))


def completed(path: Path, *arguments: str) -> set[str]:
    typed = ["mode=ppl_eval", f"eval.checkpoint_path={path}", *arguments]
    return set(complete(typed)) - set(typed)


# -------------------------------------------------------------------------------- the reference's numbers


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("name", ["bd3lms_mdlm_tc", "duo_mdlm", "duo_sedd", "duo_ar"])
def test_golden_numbers_without_a_setting_typed(fixtures_dir, name, weights):
    golden = load_file(fixtures_dir / name / "golden.safetensors")
    path = next((fixtures_dir / name).glob("*.ckpt"))
    cfg = composed(path)
    objective = instantiate(cfg.parameterization, process=Absorbing(39))
    net = instantiate(cfg.backbone, vocab_size=40).eval()
    read_checkpoint(path).load_into(net, use_ema=weights == "ema")
    x0, near = golden["x0"], {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        if name == "duo_ar":
            nll = objective.loss(net, {"input_ids": x0}).nll_BL[:, 1:]
        elif name == "bd3lms_mdlm_tc":  # weighed by 1 / t under alpha = 1 - t
            xt, rate_B = golden["xt_used"], golden["t"][:, 0].double()
            t_B = objective.schedule.t_from_alpha(1 - rate_B)
            log_p = objective.denoise(net, xt, t_B).gather(-1, x0[..., None]).squeeze(-1)
            nll = -log_p / rate_B.float()[:, None]
        else:
            nll = objective.loss_at(net, {"input_ids": x0}, draw_at(golden["xt"], golden["t"].double())).nll_BL
    wanted = golden[f"{weights}.{'loss' if name.startswith('bd3lms') else 'nll'}_per_token"]
    torch.testing.assert_close(nll, wanted, **near)


@pytest.mark.parametrize(("name", "law", "words"), [
    ("mdlm_d3pm_subsmask", "d3pm", {"subs_masking=true", "T=1000", "time_conditioning=true"}),
    ("mdlm_sedd", "sedd", {"time_conditioning=true"}),
    ("mdlm_ar", "ar", {"backbone=ar", "model.length=32"}),
    ("bd3lms_ar", "ar", {"backbone=ar"}),
    ("bd3lms_sedd", "sedd", {"training.ignore_bos=true", "time_conditioning=true"}),
    ("bd3lms_bd3lm_bs4", "bd3lm", {"block_size=4", "training.ignore_bos=true"}),
    ("hf_bd3lm_bs8", "bd3lm", {"block_size=8", "model.hidden_size=64"}),
    ("hf_mdlm", "subs", {"model.cond_dim=32", "time_conditioning=false"}),
])  # fmt: skip
def test_the_older_fixtures_need_no_setting_either(fixtures_dir, name, law, words):
    path = next((fixtures_dir / name).glob("*.ckpt"), fixtures_dir / name)
    found = completed(path)
    assert words | {f"parameterization={law}"} <= found
    assert law != "ar" or not any(word.startswith(("model.cond_dim", "time_conditioning")) for word in found)


def test_a_foreign_model_is_measured_under_its_own_protocol(tmp_path, monkeypatch, fixtures_dir, caplog):
    monkeypatch.chdir(tmp_path)
    lines = [" ".join(random.Random(i).choices(["ad", "bk", "cr", "fm", "gt"], k=40)) for i in range(30)]
    (tmp_path / "toy.txt").write_text("\n".join(lines))
    path = fixtures_dir / "bd3lms_mdlm_tc" / "bd3lm.ckpt"
    ask = ["mode=ppl_eval", f"eval.checkpoint_path={path}", "data=text", "data.path=toy.txt", "eval.num_draws=1",
           f"data.tokenizer_name_or_path={fixtures_dir / 'tokenizers' / 'dev'}", "trainer.accelerator=cpu",
           "checkpointing.save_dir=run"]  # fmt: skip
    run = lambda *more: running.run(compose_config(complete([*ask, *more])), "a test")  # noqa: E731
    measured = run()
    told = json.loads((tmp_path / "run/ppl_eval/validation/results.json").read_text())["protocol"]
    assert told["parameterization"] == "subs" and told["time_conditioning"] is True
    assert told["length"] == told["trained_length"] == 64 and "was trained on" not in caplog.text
    assert told["distribution"] == "p(rest | first token)"
    assert measured["tokens"] == 63 * measured["texts"], "the first token of a row is given"
    run("model.length=32")
    told = json.loads((tmp_path / "run/ppl_eval/validation/results.json").read_text())["protocol"]
    assert (told["length"], told["trained_length"]) == (32, 64)
    assert "was trained on texts of 64 tokens" in caplog.text
    other = f"data.tokenizer_name_or_path={fixtures_dir / 'tokenizers' / 'dev_midmask'}"
    with pytest.raises(ValueError, match="another tokenizer than .*dev_midmask.*set data.tokenizer_name_or_path"):
        run(other)


# -------------------------------------------------------------------------------- what a file says


def test_every_setting_of_bd3lms_is_taken(tmp_path):
    assert completed(reference_file(tmp_path / "x.ckpt", BD3LMS)) == {
        "parameterization=subs",
        "backbone=dit",
        "model.hidden_size=16",
        "model.cond_dim=8",
        "model.n_blocks=1",
        "model.n_heads=2",
        "model.length=24",
        "noise=loglinear",
        "noise.eps=0.001",
        "time_conditioning=true",
        "training.ignore_bos=true",
    }
    blocks = {"algo_name": "bd3lm", "algo_cross_attn": True, "algo_time_conditioning": False}
    found = completed(reference_file(tmp_path / "y.ckpt", BD3LMS, **blocks))
    assert {"parameterization=bd3lm", "block_size=24", "time_conditioning=false"} <= found


def test_names_of_duo_and_mdlm(tmp_path):
    duo = completed(reference_file(tmp_path / "x.ckpt", DUO))
    assert {"parameterization=sedd", "noise.eps=0.01"} <= duo and "training.ignore_bos=false" not in duo
    discrete = completed(
        reference_file(
            tmp_path / "y.ckpt", DUO, algo_name="d3pm", algo_parameterization="mean", algo_T=500, algo_subs_masking=True
        )
    )
    assert {"parameterization=d3pm", "T=500", "subs_masking=true"} <= discrete
    for name in ("duo", "duo_base"):
        uniform = completed(
            reference_file(
                tmp_path / f"{name}.ckpt",
                DUO,
                algo_name=name,
                algo_parameterization="mean",
                algo_time_conditioning=True,
            )
        )
        assert {"parameterization=udlm", "time_conditioning=true"} <= uniform
    noise = {"type": "geometric", "sigma_min": 1e-3, "sigma_max": 10}
    changed = {"time_conditioning": True, "noise": noise, "training": {"change_of_variables": True}}
    mdlm = completed(reference_file(tmp_path / "z.ckpt", MDLM, **changed))
    assert {
        "noise=geometric",
        "noise.sigma_min=0.001",
        "noise.sigma_max=10",
        "training.change_of_variables=true",
    } <= mdlm


@pytest.mark.parametrize(("config", "changes", "said"), [
    (DUO, {"algo_name": "distillation"}, r"objective is distillation \(uniform-state"),
    (DUO, {"algo_name": "../../evil"}, "objective is ../../evil"),
    (DUO, {"algo_backbone": "unet"}, "network has backbone=unet"),
    (BD3LMS, {"algo_cross_attn": True}, "network has cross_attn=True"),
    (BD3LMS, {"algo_name": "bd3lm"}, "network has cross_attn=False"),
    (BD3LMS, {"algo_causal_attention": True}, "network has causal_attention=True"),
    (BD3LMS, {"model": {**MODEL, "length": 10**12}}, "model.length=1000000000000, which is not a valid value"),
    (BD3LMS, {"model": {**MODEL, "length": True}}, "model.length=True, which is not a valid value"),
])  # fmt: skip
def test_what_does_not_exist_here_is_refused_by_name(tmp_path, config, changes, said):
    path = reference_file(tmp_path / "x.ckpt", config, **changes)
    with pytest.raises(ValueError, match=said):
        completed(path)


def test_a_hub_folder_of_duo_is_uniform_state_diffusion(tmp_path):
    save_file({"backbone.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "DUO", "hidden_dim": 8}))
    assert {"parameterization=udlm", "time_conditioning=true", "model.hidden_size=8"} <= completed(tmp_path)


def test_only_listed_choices_and_plain_values_are_taken(tmp_path):
    evil = {"noise": {"type": "../../../tmp/evil"}, "optim": {"_target_": "os.system"}}
    found = completed(reference_file(tmp_path / "x.ckpt", MDLM, **evil))
    assert not any("evil" in word or "optim" in word or word.startswith("noise=") for word in found)
    with pytest.raises(ValueError, match="says T="):
        completed(reference_file(tmp_path / "y.ckpt", MDLM, T="1 mode=train"))


# -------------------------------------------------------------------------------- what is typed


def test_all_differences_are_said_at_once(tmp_path):
    path = reference_file(tmp_path / "x.ckpt", BD3LMS)
    with pytest.raises(ValueError) as caught:
        completed(path, "model=tiny", "time_conditioning=false", "parameterization=sedd", "training.ignore_bos=false")
    said = str(caught.value)
    assert "leave parameterization, model=, time_conditioning, training.ignore_bos out, or type:" in said
    for word in ("parameterization=subs", "model.hidden_size=16", "model.cond_dim=8", "model.n_blocks=1",
                 "model.n_heads=2", "time_conditioning=true", "training.ignore_bos=true", "gpt2, 40 ids"):  # fmt: skip
        assert word in said, word


def test_what_is_typed_as_in_the_file_stays(tmp_path):
    path = reference_file(tmp_path / "x.ckpt", BD3LMS)
    typed = ["model.hidden_size=16", "time_conditioning=true", "algo=mlm", "model.length=12", "T=50"]
    found = completed(path, *[word.replace("algo=mlm", "parameterization=mlm") for word in typed])
    assert not {word.partition("=")[0] for word in found} & {"model.hidden_size", "parameterization", "model.length"}


def test_a_noise_schedule_may_differ_where_the_network_does_not_see_it(tmp_path):
    blind, seeing = (reference_file(tmp_path / f"{tc}.ckpt", MDLM, time_conditioning=tc) for tc in (False, True))
    assert "noise=loglinear" not in completed(blind, "noise=cosine")
    with pytest.raises(ValueError, match="leave noise out, or type: noise=loglinear"):
        completed(seeing, "noise=cosine")


def test_trainings_sweeps_and_own_files_stay_as_typed(tmp_path):
    path = reference_file(tmp_path / "x.ckpt", MDLM)
    for arguments in (["mode=train", f"eval.checkpoint_path={path}"], ["mode=ppl_eval"],
                      ["-m", "mode=ppl_eval", f"eval.checkpoint_path={path},{path}"]):  # fmt: skip
        assert complete(arguments) == arguments
    net = DiT(40, hidden_size=16, cond_dim=8, n_blocks=1, n_heads=2)
    state = {f"backbone.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"state_dict": state, "identity": {"configuration": {"model.hidden_size": 16}}}, tmp_path / "own.ckpt")
    assert not completed(tmp_path / "own.ckpt")
    assert "model.hidden_size=16" in completed(path, "--cfg=job"), "Hydra's own flags are let through"


# -------------------------------------------------------------------------------- where a file lies


def test_folders_and_weight_files_are_found(tmp_path, fixtures_dir):
    path = reference_file(tmp_path / "run/checkpoints/last.ckpt", MDLM)
    for named in (path.parent.parent, path.parent):
        assert read_settings(named).path == path
    shutil.copy(path, tmp_path / "one.ckpt")
    assert read_settings(tmp_path).path == tmp_path / "one.ckpt"
    shutil.copy(path, tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match=r"holds 2 checkpoints and none named last.ckpt; name one, .*one.ckpt"):
        read_settings(tmp_path)
    hub = fixtures_dir / "hf_mdlm"
    assert read_checkpoint(hub / "model.safetensors").settings == read_checkpoint(hub).settings


# -------------------------------------------------------------------------------- a given first token


def test_the_first_token_is_given():
    rows = {"input_ids": [[3, 4, 5], [6, 7, 8]], "length": [3, 3]}
    wrapped = Collate(3, None, first_given=True)(rows)
    assert wrapped["observed"].tolist() == [[True, False, False]] * 2
    padded = Collate(8, 0, first_given=True)(rows)
    assert padded["observed"].sum(-1).tolist() == [1, 1] and padded["observed"][:, 0].all()
    assert "observed" not in Collate(3, None)(rows)


def test_runs_of_before_keep_their_folders():
    assert "training.ignore_bos" not in identity(compose_config([]))
    assert identity(compose_config(["algo.ignore_bos=true"]))["training.ignore_bos"] is True
    for key in ("algo.ignore_bos", "parameterization.ignore_bos"):
        known = identity(compose_config(["algo=bd3lm", f"{key}=false"]))
        assert known["parameterization.ignore_bos"] is False and "training.ignore_bos" not in known
    known = identity(compose_config(["algo=bd3lm"]))
    assert known["parameterization.ignore_bos"] is True and "training.ignore_bos" not in known


def test_large_perplexities_can_be_read():
    assert str(Estimate(math.log(1234567), 0.1).exp()) == "1,234,567 ± 123,457"
    assert str(Estimate(3.5, 0.01)) == "3.5000 ± 0.0100" and Estimate(1e4, 1.0).exp().value == math.inf


def test_a_given_first_token_means_nothing_left_to_right():
    refused(
        "training.ignore_bos=true means nothing to parameterization=ar",
        "parameterization=ar",
        "training.ignore_bos=true",
    )
    refused("training.ignore_bos=3 must be true or false", "training.ignore_bos=3")


def test_masked_diffusion_gives_it_to_every_objective(random_dit):
    from palimpsest.common.randomness import KeyedNoise
    from palimpsest.noise_schedule import LogLinear
    from palimpsest.objectives.subs import Subs

    batch = Collate(4, None, first_given=True)({"input_ids": [[0, 1, 2, 3]], "length": [4]})
    objective: TokenDiffusion = Subs(LogLinear(), Absorbing(4))
    loss = objective.loss(random_dit(5), batch, KeyedNoise(0, torch.arange(1)))
    assert loss.mask_BL.tolist() == [[False, True, True, True]] and loss.nll_BL[0, 0] == 0
