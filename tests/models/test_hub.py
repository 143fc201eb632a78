"""Published models: names on the Hub, sizes out of their files, weights that a training starts from."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import palimpsest
from palimpsest.experiment.experiment import Experiment
from palimpsest.models.checkpoints import load_inert, read_checkpoint, read_settings
from palimpsest.models.dit import DiT
from palimpsest.models.hf_dit import hf_dit
from palimpsest.models.hub import locate
from palimpsest.settings.command_line import compose_config, translate
from palimpsest.settings.identity import identity
from tests.helpers.commands import refused, run, trained
from tests.helpers.published import made_up_words, write_labelled

SIZES = {"hidden_dim": 16, "cond_dim": 8, "n_blocks": 1, "n_heads": 2}
FEW = ["trainer.accelerator=cpu", "loader.global_batch_size=4", "eval.num_draws=1", "sampling.steps=4",
       "sampling.num_sample_log=0", "sampling.num_sample_batches=1", "lr_scheduler.num_warmup_steps=1",
       "loader.eval_batch_size=4", "classify.num_draws=2", "optim=adamw", "lr_scheduler=constant_warmup",
       "trainer.max_steps=1"]  # fmt: skip
CHAR = [*FEW, "data.max_train_texts=16", "data.max_valid_texts=4", "data.max_test_texts=4"]


def random_net(vocab_size: int, seed: int = 0, **kwargs) -> DiT:
    """A DiT of SIZES with random weights everywhere."""
    torch.manual_seed(seed)
    net = DiT(vocab_size, hidden_size=16, cond_dim=8, n_blocks=1, n_heads=2, **kwargs)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def hub_directory(path: Path, net: DiT, **config: object) -> Path:
    path.mkdir(parents=True)
    save_file({f"backbone.{k}": v for k, v in net.state_dict().items()}, path / "model.safetensors")
    known = {"model_type": "mdlm", "vocab_size": net.vocab_size, "model_length": 72, "dropout": 0.0, **SIZES, **config}
    (path / "config.json").write_text(json.dumps(known))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def vocab_size(tmp_path, monkeypatch, cache) -> int:
    """The vocabulary size of data=reviews. The working directory is empty except for a link to a shared cache."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".cache").symlink_to(cache)
    return Experiment(compose_config([]), "a test").build.data().vocabulary.size


# -------------------------------------------------------------------------------- names


def fake_hub(monkeypatch, files: dict[str, bytes], into: Path) -> list[list[str]]:
    """A Hub with one model; returns the list of what was asked for."""
    asked: list[list[str]] = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        into.mkdir(exist_ok=True)
        for file, content in files.items():
            if any(Path(file).match(pattern) for pattern in allow_patterns):
                (into / file).write_bytes(content)
        return str(into)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_hub_name_is_fetched_without_its_code(tmp_path, monkeypatch):
    files = {"config.json": b"{}", "model.safetensors": b"", "pytorch_model.bin": b"", "modeling_mdlm.py": b"evil"}
    asked = fake_hub(monkeypatch, files, tmp_path / "cache")
    assert locate("kuleshov-group/mdlm-owt", "eval.checkpoint_path") == tmp_path / "cache"
    assert {p.name for p in (tmp_path / "cache").iterdir()} == {"config.json", "model.safetensors"}
    assert len(asked) == 1, "weights are not fetched twice"


def test_pickled_weights_are_fetched_where_there_are_no_others(tmp_path, monkeypatch):
    fake_hub(monkeypatch, {"config.json": b"{}", "pytorch_model.bin": b""}, tmp_path / "cache")
    folder = locate("kuleshov-group/mdlm-owt", "eval.checkpoint_path")
    assert {p.name for p in folder.iterdir()} == {"config.json", "pytorch_model.bin"}


def test_a_local_path_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    (tmp_path / "kuleshov-group/mdlm-owt").mkdir(parents=True)
    assert locate("kuleshov-group/mdlm-owt", "eval.checkpoint_path") == Path("kuleshov-group/mdlm-owt")
    for missing in ("runs/x.ckpt", "./a/b", "/a/b", "a/b/c", "x.ckpt", "../x"):
        with pytest.raises(FileNotFoundError, match="eval.checkpoint_path=.*no such file"):
            locate(missing, "eval.checkpoint_path")


def test_without_a_network_both_ways_are_named(monkeypatch):
    def unreachable(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError) as caught:
        locate("a/b", "training.from_pretrained")
    assert str(caught.value).startswith("training.from_pretrained=a/b: there is no such directory here")
    assert "no connection" in str(caught.value) and "and more" not in str(caught.value)
    assert "--local-dir DIR) and set training.from_pretrained=DIR, or run this with access" in str(caught.value)


def test_main_takes_a_hub_name(tmp_path, monkeypatch, vocab_size):
    folder = hub_directory(tmp_path / "there", random_net(vocab_size))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    assert run(*CHAR, "mode=ppl_eval", "backbone=hf_dit", "eval.checkpoint_path=some/model")["texts"] == 4


# -------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_hf_dit_computes_what_the_reference_computes(tmp_path, fixtures_dir, weights):
    for name in ("config.json", weights):
        shutil.copy(fixtures_dir / "hf_mdlm" / name, tmp_path)
    golden = load_file(fixtures_dir / "hf_mdlm" / "golden.safetensors")
    net = hf_dit(vocab_size=40, length=32, checkpoint_path=str(tmp_path)).eval()
    read_checkpoint(tmp_path).load_into(net)
    with torch.no_grad():
        logits = net(golden["xt"], torch.zeros(len(golden["xt"])))
    assert ((logits - golden["logits"]).abs() <= 1e-4 * (1 + golden["logits"].abs())).all()


def test_missing_settings_have_the_references_defaults(tmp_path):
    net = DiT(5, 16, cond_dim=129, n_blocks=1, n_heads=2)
    folder = hub_directory(tmp_path / "m", net)
    config = json.loads((folder / "config.json").read_text())
    del config["cond_dim"], config["dropout"]
    (folder / "config.json").write_text(json.dumps(config))
    built = hf_dit(vocab_size=5, length=72, checkpoint_path=str(folder))
    assert built.settings == {**net.settings, "model.dropout": 0.1}
    assert built.time_conditioning is False and built.mask_padding is True


def test_typed_settings_of_hf_dit(tmp_path):
    folder = str(hub_directory(tmp_path / "m", random_net(5), time_conditioning=True, mask_padding=False))
    build = lambda **typed: hf_dit(vocab_size=5, length=8, checkpoint_path=folder, **typed)  # noqa: E731
    assert build().time_conditioning is True and build().mask_padding is False
    assert build(dropout=0.3, mask_padding=True, hidden_size=16).dropout == 0.3
    assert build(mask_padding=True).mask_padding is True
    with pytest.raises(
        ValueError, match="model.n_heads=4 contradicts eval.checkpoint_path=.*model.n_heads=2.*leave it"
    ):
        build(n_heads=4)
    with pytest.raises(ValueError, match="time_conditioning=False contradicts"):
        build(time_conditioning=False)
    with torch.device("meta"):
        assert build().head.weight.is_meta


@pytest.mark.parametrize(("arguments", "config", "message"), [
    ({"vocab_size": 6}, {}, "vocab_size=6, but eval.checkpoint_path=.* vocab_size=5: set data.tokenizer_name_"),
    ({"length": 73}, {}, "model.length=73 is longer than the 72 .*set model.length=72 or less"),
    ({}, {"model_type": "bert"}, "type bert"),
    ({}, {"n_heads": None}, "no number for model.n_heads"),
    ({}, {"n_blocks": "two"}, "no number for model.n_blocks"),
    ({"checkpoint_path": ""}, {}, "eval.checkpoint_path= or training.from_pretrained="),
    ({"checkpoint_path": "nowhere.ckpt"}, {}, "eval.checkpoint_path=nowhere.ckpt"),
])  # fmt: skip
def test_hf_dit_refuses(tmp_path, arguments, config, message):
    folder = hub_directory(tmp_path / "m", random_net(5), **config)
    stored = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        hf_dit(**{"vocab_size": 5, "length": 72, "checkpoint_path": str(folder), **arguments})


def test_hf_dit_of_a_lightning_file_of_elsewhere(fixtures_dir):
    net = hf_dit(vocab_size=40, length=32, checkpoint_path=str(fixtures_dir / "mdlm_subs" / "mdlm.ckpt"))
    assert net.settings["model.hidden_size"] == 64 and net.settings["model.cond_dim"] == 32


def test_a_broken_config_is_one_clear_error(tmp_path):
    folder = hub_directory(tmp_path / "m", random_net(5))
    for content, message in (("{", "no JSON"), ("[]", "no JSON object")):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_settings(folder)


def test_no_model_sizes_need_to_be_typed_but_contradictions_are_refused(tmp_path, vocab_size):
    folder = hub_directory(tmp_path / "m", random_net(vocab_size))
    ask = [*CHAR, "mode=sample_eval", "backbone=hf_dit", f"eval.checkpoint_path={folder}"]
    assert run(*ask)
    refused("other settings; add: model.hidden_size=16", *ask, "model.hidden_size=32")
    refused("model.length=100 is longer than the 72", *ask, "model.length=100")
    byte = ["data.tokenizer_name_or_path=byte", "data.max_train_texts=1", "data.long_texts=truncate"]
    refused(f"another tokenizer.*vocab_size={vocab_size}.*set data.tokenizer_name_or_path", *ask, *byte)


def test_settings_of_a_foreign_file_are_compared_with_the_configuration(fixtures_dir):
    known = read_checkpoint(fixtures_dir / "mdlm_subs_tc" / "mdlm.ckpt").settings
    assert known == {
        "vocab_size": 40,
        "model.hidden_size": 64,
        "model.cond_dim": 32,
        "model.n_blocks": 2,
        "model.n_heads": 2,
        "model.dropout": 0.1,
        "model.length": 32,
        "time_conditioning": True,
        "parameterization": "subs",
        "backbone": "dit",
        "T": 0,
        "noise": "loglinear",
        "noise.eps": 1e-3,
        "training.change_of_variables": False,
        "data.tokenizer_name_or_path": "gpt2",
    }
    assert read_settings(fixtures_dir / "mdlm_subs_tc" / "mdlm.ckpt").settings == known
    published = read_checkpoint(fixtures_dir / "hf_mdlm").settings
    assert published == {key: known[key] for key in published} | {"time_conditioning": False}
    objectives = {
        "mdlm_sedd": "sedd",
        "mdlm_d3pm": "d3pm",
        "mdlm_ar": "ar",
        "bd3lms_mdlm": "subs",
        "bd3lms_bd3lm_bs4": "bd3lm",
    }
    for folder, objective in objectives.items():
        assert read_settings(next((fixtures_dir / folder).glob("*.ckpt"))).settings["parameterization"] == objective
    assert read_checkpoint(fixtures_dir / "hf_bd3lm_bs4").settings["parameterization"] == "bd3lm"


# -------------------------------------------------------------------------------- reference checkpoints in every mode


@pytest.fixture
def toy(tmp_path, monkeypatch, fixtures_dir) -> list[str]:
    """A data set for the fixtures' networks: their tokenizer, two classes of made-up words."""
    monkeypatch.chdir(tmp_path)
    rows = made_up_words(rows_per_class=60, words_per_text=5)
    write_labelled(tmp_path / "toy.csv", rows)
    (tmp_path / "toy.txt").write_text("".join(f"{text}\n" for _, text in rows))
    return [*FEW, f"data.tokenizer_name_or_path={fixtures_dir / 'tokenizers' / 'dev'}", "model.mask_padding=false",
            "model.hidden_size=64", "model.cond_dim=32", "model.n_blocks=2", "model.n_heads=2",
            "model.length=32"]  # fmt: skip


TEXT, LABELLED = ["data=text", "data.path=toy.txt"], ["data=labelled", "data.path=toy.csv"]


def test_a_reference_checkpoint_is_measured_and_sampled(toy, fixtures_dir):
    path = fixtures_dir / "mdlm_subs" / "mdlm.ckpt"
    nll = {}
    for raw in ("true", "false"):
        ask = [*TEXT, *toy, f"eval.checkpoint_path={path}", f"eval.disable_ema={raw}"]
        nll[raw] = run("mode=ppl_eval", *ask)["nll_nats_per_token"].value
        assert run("mode=sample_eval", *ask)
    assert nll["true"] != nll["false"] and all(2 < value < 30 for value in nll.values())


def test_a_notebook_loads_a_reference_checkpoint(toy, fixtures_dir):
    words = [word for word in toy if not word.startswith("model.")]
    model = palimpsest.load(fixtures_dir / "mdlm_subs" / "mdlm.ckpt", *TEXT, "data.wrap=false", *words)
    found = model.log_likelihood(["some words"], draws=4)
    assert model.data.length == 32 and found.log_p[0] < 0 < found.tokens[0] and len(model.sample(1, length=6)) == 1


def test_the_weights_that_are_measured_are_the_references(toy, fixtures_dir):
    golden = load_file(fixtures_dir / "mdlm_subs" / "golden.safetensors")
    experiment = Experiment(compose_config([*TEXT, *toy]), "a test")
    for disable_ema, name in ((True, "raw"), (False, "ema")):
        path = str(fixtures_dir / "mdlm_subs" / "mdlm.ckpt")
        net = experiment.weights.trained(experiment.build.data(), path, disable_ema).backbone
        with torch.no_grad():
            logits = net(golden["xt"], golden[f"{name}.sigma"])
        wanted = golden[f"{name}.logits"]
        assert ((logits - wanted).abs() <= 1e-4 * (1 + wanted.abs())).all()


def test_published_class_models_classify(tmp_path, vocab_size):
    for label in (0, 1):
        hub_directory(tmp_path / f"class={label}", random_net(vocab_size, label))
    assert run(*CHAR, "mode=classify", "backbone=hf_dit", "eval.checkpoint_path=class={label}")["accuracy"]


@pytest.mark.parametrize("raw", ["true", "false"])
def test_reference_checkpoints_classify_one_per_class(tmp_path, toy, fixtures_dir, raw):
    (tmp_path / "class=0").mkdir()
    (tmp_path / "class=1").mkdir()
    shutil.copy(fixtures_dir / "mdlm_subs" / "mdlm.ckpt", tmp_path / "class=0" / "x.ckpt")
    shutil.copy(fixtures_dir / "bd3lms_mdlm" / "bd3lm.ckpt", tmp_path / "class=1" / "x.ckpt")
    ask = ["mode=classify", *LABELLED, *toy, f"eval.disable_ema={raw}", "loader.eval_batch_size=16"]
    results = run(*ask, "eval.checkpoint_path=class={label}/x.ckpt")
    assert 0 <= results["accuracy"].value <= 1 and not list(tmp_path.rglob("last.ckpt")), "nothing was trained"
    own = [results["classes"][name]["validation_nll_nats_per_token"].value for name in results["classes"]]
    alone = [*LABELLED, *toy, "mode=ppl_eval", f"eval.disable_ema={raw}", "loader.eval_batch_size=16"]
    for label, value in enumerate(own):
        measured = run(*alone, f"data.label={label}", "eval.checkpoint_path=class={label}/x.ckpt")
        assert measured["nll_nats_per_token"].value == pytest.approx(value, rel=1e-5), "each class has its own model"
    message = r"eval.checkpoint_path=class=0/x.ckpt is one model.*2 classes.*\{label\}"
    refused(message, *ask, "eval.checkpoint_path=class=0/x.ckpt")


def test_a_reference_checkpoint_of_other_settings_is_refused(toy, fixtures_dir):
    ask = ["mode=ppl_eval", *TEXT, *toy, f"eval.checkpoint_path={fixtures_dir / 'mdlm_subs_tc' / 'mdlm.ckpt'}"]
    refused("add: time_conditioning=True", *ask)
    refused("add: model.n_heads=2 time_conditioning=True", *ask, "model.n_heads=4")


def test_paths_need_no_quotes_of_hydras_kind():
    keys = ["eval.checkpoint_path", "training.from_pretrained"]
    for key, path in itertools.product(keys, ["runs/label={label}/last.ckpt", "runs/label=0/last.ckpt", "org/name"]):
        section, name = key.split(".")
        assert compose_config([f"{key}={path}"])[section][name] == path
        assert compose_config([f"{key}='{path}'"])[section][name] == path
    assert translate(["eval.checkpoint_path=a\\=b", "model.n_blocks=2"]) == [
        "eval.checkpoint_path=a\\=b",
        "model.n_blocks=2",
    ]


# -------------------------------------------------------------------------------- starting from pretrained weights


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {k.removeprefix("backbone."): v for k, v in load_inert(path)["state_dict"].items()}


STILL = ["optim.lr=0", "checkpointing.save_dir=run"]
DIT = ["model.hidden_size=16", "model.cond_dim=8", "model.n_blocks=1", "model.n_heads=2", "model.dropout=0"]


@pytest.mark.parametrize(("key", "backbone"), [
    ("training.from_pretrained", DIT), ("training.from_pretrained", ["backbone=hf_dit"]),
    ("eval.checkpoint_path", ["backbone=hf_dit"]),  # as in the reference
], ids=["dit", "hf_dit", "reference"])  # fmt: skip
def test_a_training_starts_from_the_file(tmp_path, vocab_size, key, backbone, capsys):
    """Without a learning rate the weights stay what they were, and so does their average."""
    net = random_net(vocab_size)
    trained(*CHAR, *STILL, *backbone, f"{key}={hub_directory(tmp_path / 'pre', net)}")
    assert "starting from the weights of" in capsys.readouterr().out
    last = load_inert(tmp_path / "run/checkpoints/last.ckpt")
    for name, tensor in weights(tmp_path / "run/checkpoints/last.ckpt").items():
        assert torch.equal(tensor, net.state_dict()[name]), name
    assert last["ema"]["num_updates"] == 1
    for shadow, parameter in zip(last["ema"]["shadow_params"], net.parameters(), strict=True):
        torch.testing.assert_close(shadow, parameter.detach())


@pytest.mark.parametrize("disable_ema", [False, True])
def test_the_averaged_weights_start_it_where_there_are_any(tmp_path, vocab_size, disable_ema):
    fast = ["optim.lr=0.05", "trainer.max_steps=3", "lr_scheduler.num_warmup_steps=0"]
    first = trained(*CHAR, *DIT, *fast, "checkpointing.save_dir=first")
    net = DiT(vocab_size, 16, 8, 1, 2)
    read_checkpoint(first).load_into(net, use_ema=not disable_ema)
    trained(*CHAR, *DIT, *STILL, f"training.from_pretrained={first}", f"eval.disable_ema={str(disable_ema).lower()}")
    started = weights(tmp_path / "run/checkpoints/last.ckpt")
    assert all(torch.equal(started[name], tensor) for name, tensor in net.state_dict().items())
    raw = weights(first)
    assert disable_ema == all(torch.equal(started[name], raw[name]) for name in raw)


@pytest.mark.parametrize("backbone", [["backbone=hf_dit"], DIT], ids=["hf_dit", "dit"])
@pytest.mark.parametrize("mode", ["train", "classify"])
def test_the_file_is_not_needed_any_more_once_the_run_has_its_own(tmp_path, vocab_size, backbone, mode):
    folder = hub_directory(tmp_path / "pre", random_net(vocab_size))
    ask = [*CHAR, *backbone, f"mode={mode}", f"training.from_pretrained={folder}"]
    train = trained if mode == "train" else run
    train(*ask)
    shutil.rmtree(folder)
    train(*ask, "trainer.max_steps=2")
    lasts = list(tmp_path.rglob("last.ckpt"))
    assert len(lasts) == (2 if mode == "classify" else 1)
    assert all(load_inert(last)["global_step"] == 2 for last in lasts)
    if mode == "train":
        for evaluate in (["mode=ppl_eval"], ["mode=ppl_eval", f"eval.checkpoint_path={lasts[0]}"]):
            assert run(*[word for word in ask if not word.startswith("mode=")], *evaluate)["texts"] == 4
        assert run(*CHAR, *DIT, "mode=ppl_eval", f"eval.checkpoint_path={lasts[0]}")["texts"] == 4
        message = read_checkpoint(lasts[0]).identity["configuration"]
        assert message["model.hidden_size"] == 16, "the sizes that were found are saved"
    refused("training.from_pretrained=.*no such", *ask, "checkpointing.resume_from_ckpt=false")


def test_weights_of_something_else_start_nothing(tmp_path, vocab_size):
    folder = hub_directory(tmp_path / "pre", random_net(vocab_size))
    refused("add: model.n_blocks=1", *CHAR, *DIT, "model.n_blocks=2", f"training.from_pretrained={folder}")
    run(*CHAR, *DIT, "data.tokenizer_name_or_path=byte", "model.length=512", "checkpointing.save_dir=bytes")
    refused("another tokenizer", *CHAR, *DIT, f"training.from_pretrained={tmp_path / 'bytes/checkpoints/last.ckpt'}")
    conditioned = hub_directory(tmp_path / "tc", random_net(vocab_size), time_conditioning=True)
    refused("add: time_conditioning=True", *CHAR, *DIT, f"training.from_pretrained={conditioned}")


def test_runs_of_before_keep_their_folders():
    """A key that is new and null is no part of a run's fingerprint."""
    assert "training.from_pretrained" not in identity(compose_config([]))
    assert identity(compose_config(["training.from_pretrained=x"]))["training.from_pretrained"] == "x"
