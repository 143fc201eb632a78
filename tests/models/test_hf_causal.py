"""backbone=hf_causal: the library's numbers, weights that a training starts from, checkpoints that need no folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from palimpsest.common.randomness import KeyedNoise
from palimpsest.experiment import running
from palimpsest.experiment.experiment import Experiment
from palimpsest.models.checkpoints import read_checkpoint
from palimpsest.models.ema import EMA
from palimpsest.models.hf_causal import HFCausal, hf_causal
from palimpsest.objectives import ar
from palimpsest.process import Absorbing
from palimpsest.samplers.autoregressive import sample
from palimpsest.settings.command_line import compose_config, translate
from palimpsest.training import optimizers
from tests.helpers import commands
from tests.helpers.published import SPECIALS, made_up_words, save_tokenizer, write_labelled

LENGTH = 32
FEW = ["parameterization=ar", "backbone=hf_causal", "trainer.accelerator=cpu", "loader.global_batch_size=4",
       "trainer.max_steps=3", "lr_scheduler.num_warmup_steps=1", "sampling.num_sample_log=1",
       "sampling.num_sample_batches=1", "loader.eval_batch_size=4", "model.length=24", "optim.lr=1e-3",
       "data=labelled", "data.path=toy.csv"]  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": LENGTH}


def config_of(family: str, rows: int) -> PretrainedConfig:
    """GPT-2: tied. Llama: neither tied nor biased. Phi: a head with a bias."""
    ends = {"vocab_size": rows, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.3}
    if family == "gpt2":
        return GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=LENGTH, **ends)
    if family == "llama":
        return LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=1, pad_token_id=3, **ends)
    return PhiConfig(**SMALL, intermediate_size=48, **ends)


def save_model(folder: Path, config: PretrainedConfig, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # biases too: they begin at zero
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def published(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def started(folder: Path, vocab_size: int, **typed: object) -> HFCausal:
    """The backbone with the weights that a new training begins with, without dropout."""
    net = hf_causal(vocab_size, LENGTH, str(folder), **typed)
    assert net.training
    net.pretrained().load_into(net)
    return net.eval()


@pytest.fixture(params=["gpt2", "llama", "phi"])
def folder(request, tmp_path) -> Path:
    """A model of 40 rows."""
    return save_model(tmp_path / request.param, config_of(request.param, 40))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(0))


# -------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("vocab_size", [38, 40, 41, 45])
@torch.no_grad()
def test_logits_are_the_librarys_whatever_the_rows(folder, vocab_size):
    x = tokens(2, 9) % 38
    net, wanted = started(folder, vocab_size), published(folder)(x).logits
    shared = min(vocab_size, 40)
    assert net(x).shape == (2, 9, vocab_size) and net.vocab_size == vocab_size
    torch.testing.assert_close(net(x)[..., :shared], wanted[..., :shared])
    if vocab_size > 40:
        torch.testing.assert_close(net(x)[..., 40], wanted.mean(-1), rtol=1e-4, atol=1e-4)


def test_the_head_is_the_models_and_what_was_tied_stays_tied(folder):
    net = started(folder, 41)
    tied = folder.name == "gpt2"
    embedding = net.model.get_input_embeddings().weight
    assert (net.head.weight is embedding) == tied and (net.head.bias is None) == (folder.name != "phi")
    assert len(embedding) == len(net.head.weight) == 41
    ema = EMA(net.parameters(), 0.5)
    with torch.no_grad():
        net.head.weight.add_(1.0)
    before = net.head.weight.clone()
    with ema.swapped(net.parameters()):
        assert (net.head.weight is embedding) == tied and torch.allclose(net.head.weight, before - 1, atol=1e-6)
    assert torch.equal(net.head.weight, before)
    net.load_state_dict(net.state_dict())
    assert (net.head.weight is net.model.get_input_embeddings().weight) == tied


def test_the_loss_is_minus_log_p_without_the_mask(folder):
    net, x = started(folder, 41), tokens(3, 8)
    mask = torch.arange(8) < torch.tensor([8, 5, 3])[:, None]
    with torch.no_grad():
        loss = ar.AR(Absorbing(40)).loss(net, {"input_ids": x, "attention_mask": mask})
        for row, length in enumerate([8, 5, 3]):
            logits = published(folder)(x[row : row + 1, :length]).logits[0, :, :40]  # alone, without padding
            log_p = logits.double().log_softmax(-1)
            wanted = [-log_p[i - 1, x[row, i]] for i in range(1, length)]
            torch.testing.assert_close(loss.nll_BL[row, 1:length].double(), torch.stack(wanted), rtol=1e-4, atol=1e-4)
    assert loss.mask_BL.sum() == 7 + 4 + 2 and loss.nll_BL[~loss.mask_BL].abs().sum() == 0


@torch.no_grad()
def test_padding_changes_nothing(folder):
    net, x = started(folder, 41), tokens(2, 6)
    for pad in (0, 3, 39):
        padded = torch.cat([x, torch.full((2, 3), pad)], dim=1)
        hidden = net.encode(padded, torch.ones(2), torch.arange(9).expand(2, 9) < 6)[:, :6]
        torch.testing.assert_close(hidden, net.encode(x), rtol=1e-5, atol=1e-5)


def test_a_token_that_pads_is_learned_all_the_same(folder):
    net = started(folder, 41)
    x = torch.tensor([[2, 3, 5, 7]])  # 3 ends a text and pads rows
    ar.AR(Absorbing(40)).loss(net, {"input_ids": x}).mean().backward()
    grad = net.model.get_input_embeddings().weight.grad
    assert grad[3].abs().sum() > 0


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 4, 2], [12]], ids=str)
@torch.no_grad()
def test_cached_in_any_chunks_equals_one_full_pass(folder, chunks):
    net, x = started(folder, 41).double(), tokens(3, 12)
    cache, parts, start = net.new_cache(3, 12), [], 0
    for size in chunks:
        assert cache.length == start
        parts.append(net.encode(x[:, start : start + size], cache=cache))
        start += size
    # the library works out norms and rotations in float32, whatever the network's precision
    torch.testing.assert_close(torch.cat(parts, dim=1), net.encode(x), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="room for 12 positions, 12 are filled, 1 more came"):
        net.encode(x[:, :1], cache=cache)
    with pytest.raises(ValueError, match="batches of 2 rows, this one has 3"):
        net.encode(x, cache=net.new_cache(2, 12))


def test_the_sampler_writes_the_same_text_with_and_without_the_cache(folder):
    model = ar.AR(Absorbing(40)).model(started(folder, 41))
    x = torch.full((5, 20), 40)
    x[:, :2] = torch.tensor([2, 7])
    texts = [sample(model, x, KeyedNoise(0, torch.arange(5)), kv_cache=cached).ids_BL for cached in (True, False)]
    assert torch.equal(*texts) and (texts[0] < 40).all() and torch.equal(texts[0][:, :2], x[:, :2])
    assert len(texts[0][:, 2:].unique()) > 5


def test_random_weights_and_dropout(folder):
    net, trained = hf_causal(41, LENGTH, str(folder), from_scratch=True, dropout=0.0), published(folder)
    assert net.pretrained() is None
    assert not torch.allclose(net.head.weight[:40], trained.get_output_embeddings().weight)
    x = tokens(2, 6)
    assert torch.equal(net(x), net(x)), "training mode, but no dropout"
    half = hf_causal(41, LENGTH, str(folder), dropout=0.5)
    assert not torch.equal(half(x), half(x))
    own = hf_causal(41, LENGTH, str(folder))
    assert torch.equal(own(x), own(x)) == (folder.name != "gpt2"), "gpt2's config.json says 0.1, the others' 0"
    with torch.device("meta"):
        assert hf_causal(41, LENGTH, str(folder)).head.weight.is_meta


def test_muon_works_or_says_why(folder):
    ask = {"lr": 1e-3, "matrix_lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    net = started(folder, 41)
    if folder.name == "gpt2":
        with pytest.raises(ValueError, match="optim=muon found no weight matrix.*use optim=adamw"):
            optimizers.muon(net, **ask)
        return
    before = net.model.model.layers[0].mlp.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    ar.AR(Absorbing(40)).loss(net, {"input_ids": tokens(2, 8)}).mean().backward()
    optimizers.muon(net, **ask).step()
    after = net.model.model.layers[0].mlp.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in before)


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("typed", "message"), [
    ({"length": 33}, "model.length=33 is longer than the 32 positions of backbone.name_or_path=.*model.length=32 or"),
    ({"vocab_size": 3000}, "3000 token ids.* has 40.*data.tokenizer_name_or_path"),
    ({"hidden_size": 16}, "model.hidden_size=16 contradicts backbone.name_or_path=.*model.n_heads=2; leave it out"),
    ({"name_or_path": None}, "name it with backbone.name_or_path="),
    ({"name_or_path": "./nowhere"}, "backbone.name_or_path=./nowhere: there is no such folder"),
    ({"name_or_path": "no-such-model-anywhere"}, r"put config.json and model.safetensors into \$DATA_DIR/no-such"),
    ({"checkpoint_path": "nowhere.ckpt"}, "eval.checkpoint_path=nowhere.ckpt"),
])  # fmt: skip
def test_contradictory_settings_are_refused(tmp_path, typed, message):
    folder = save_model(tmp_path / "m", config_of("gpt2", 40))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        hf_causal(**{"vocab_size": 41, "length": LENGTH, "name_or_path": str(folder), **typed})


def test_a_foreign_small_vocabulary_is_refused(tmp_path):
    folder = save_model(tmp_path / "m", config_of("gpt2", 2000))
    hf_causal(1500, LENGTH, str(folder))
    with pytest.raises(ValueError, match="the data have 300 token ids .*has 2000"):
        hf_causal(300, LENGTH, str(folder))


@pytest.mark.parametrize(("config", "message"), [
    (BertConfig(**SMALL, intermediate_size=48, vocab_size=40), "bert model is no causal language model"),
    (BertConfig(**SMALL, intermediate_size=48, vocab_size=40, is_decoder=True), "bert model are not its linear head"),
    (Gemma2Config(**SMALL, intermediate_size=48, vocab_size=40, num_key_value_heads=1, head_dim=16),
     "gemma2 model are not its linear head's"),
], ids=["encoder", "transformed", "capped"])  # fmt: skip
def test_networks_that_do_not_fit_are_refused(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        hf_causal(41, 16, str(tmp_path))


def test_a_network_without_keys_and_values_names_the_way(tmp_path):
    MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=40, state_size=4).save_pretrained(tmp_path)
    net = hf_causal(41, 100, str(tmp_path), from_scratch=True)
    assert net(tokens(2, 5)).shape == (2, 5, 41)
    with pytest.raises(ValueError, match="sampling.kv_cache=false"):
        net.new_cache(2, 5)
    with pytest.raises(ValueError, match="model.dropout=0.1: a mamba model has no dropout"):
        hf_causal(41, 100, str(tmp_path), dropout=0.1)


def test_only_whole_safe_files_are_read(tmp_path):
    folder = save_model(tmp_path / "m", config_of("gpt2", 40))
    net = hf_causal(41, LENGTH, str(folder))
    torch.save(published(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no causal language model that can be read.*model.safetensors"):
        net.pretrained()
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="holds no causal language model that can be read"):
        hf_causal(41, LENGTH, str(folder))


def test_weights_that_lack_something_are_refused(tmp_path):
    folder = save_model(tmp_path / "m", config_of("llama", 40))
    deeper = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(ValueError, match="lacks model.layers.2.*backbone.from_scratch=true"):
        hf_causal(41, LENGTH, str(folder)).pretrained()


# -------------------------------------------------------------------------------- from the command line


def run(*arguments: str) -> dict[str, object]:
    return commands.run(*FEW, *arguments)


def refused(message: str, *arguments: str) -> None:
    commands.refused(message, *FEW, *arguments)


@pytest.fixture
def toy(tmp_path, monkeypatch) -> list[str]:
    """Two classes of made-up words in a csv; a GPT-2 with its tokenizer in $DATA_DIR/tiny-gpt2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "models"))
    write_labelled(tmp_path / "toy.csv", made_up_words(rows_per_class=40, words_per_text=4))
    folder = tmp_path / "models" / "tiny-gpt2"
    folder.mkdir(parents=True)
    save_model(folder, config_of("gpt2", save_tokenizer(folder, **SPECIALS)))
    return ["backbone.name_or_path=tiny-gpt2", f"data.tokenizer_name_or_path={folder}"]


def test_every_mode_and_then_the_folder_is_gone(tmp_path, toy, capsys):
    run(*toy)
    assert "starting from the weights of tiny-gpt2" in capsys.readouterr().out
    measured = run(*toy, "mode=ppl_eval")["nll_nats_per_token"]
    drawn = [run(*toy, "mode=sample_eval", f"sampling.kv_cache={cached}") for cached in ("true", "false")]
    assert drawn[0]["unigram_entropy_nats"] == drawn[1]["unigram_entropy_nats"]
    last = next(tmp_path.rglob("last.ckpt"))
    assert last.parents[1].name.startswith("hf_causal-")
    folder = tmp_path / "models" / "tiny-gpt2"
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / file).unlink(missing_ok=True)
    assert run(*toy, "mode=ppl_eval")["nll_nats_per_token"] == measured
    named = ["mode=ppl_eval", f"eval.checkpoint_path={last}", toy[1]]
    assert run(*named)["nll_nats_per_token"] == measured, "the checkpoint says what it is, without a name"
    assert run(*toy, "trainer.max_steps=5"), "a resume needs no weights of the folder"
    refused(
        "backbone.name_or_path=other contradicts eval.checkpoint_path=.*tiny-gpt2",
        *named,
        "backbone.name_or_path=other",
    )
    refused("holds no causal language model that can be read", *toy, "seed=2")


def test_classify_fine_tunes_one_model_per_class(tmp_path, toy, capsys):
    results = run(*toy, "mode=classify", "trainer.max_steps=12", "training.ema=0.5", "optim.lr=1e-2")
    assert capsys.readouterr().out.count("starting from the weights of tiny-gpt2") == 2
    assert results["accuracy"].value > 0.8, "the classes share no word"
    assert len(list(tmp_path.rglob("last.ckpt"))) == 2
    again = run(*toy, "mode=classify", "trainer.max_steps=12", "training.ema=0.5", "optim.lr=1e-2")
    assert again["accuracy"] == results["accuracy"] and "starting" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "outputs")


def test_a_training_starts_from_the_pretrained_weights_and_so_does_its_average(tmp_path, toy):
    experiment = Experiment(compose_config([*FEW, *toy]), "a test")
    data = experiment.build.data()
    diffusion = experiment.build.diffusion(data)
    theirs = published(tmp_path / "models" / "tiny-gpt2").state_dict()
    rows = len(theirs["lm_head.weight"])
    assert data.vocabulary.size == rows + 1, "the mask is new"
    assert not torch.equal(diffusion.backbone.head.weight[:rows], theirs["lm_head.weight"])
    assert experiment.weights.load_initial(diffusion, data, None) == Path("tiny-gpt2")
    ours = diffusion.backbone.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name][: len(tensor)], tensor), name
    for shadow, parameter in zip(diffusion.ema.shadow_params, diffusion.backbone.parameters(), strict=True):
        assert torch.equal(shadow, parameter)


def test_a_learning_rate_of_zero_measures_the_model_as_it_was_published(tmp_path, toy):
    measured = run(*toy, "trainer.max_steps=1", "optim.lr=0")["nll_nats_per_token"].value
    scratch = run(*toy, "trainer.max_steps=1", "optim.lr=0", "backbone.from_scratch=true")["nll_nats_per_token"].value
    assert measured != scratch
    experiment = Experiment(compose_config([*FEW, *toy]), "a test")
    data, net, nats, count = experiment.build.data(), published(tmp_path / "models" / "tiny-gpt2"), 0.0, 0
    for ids in data.split("validation")["input_ids"]:
        ids = torch.as_tensor(ids).long()
        with torch.no_grad():
            log_p = net(ids[None]).logits[0, :-1].log_softmax(-1)
        nats, count = nats - float(log_p.gather(1, ids[1:, None]).sum()), count + len(ids) - 1
    assert measured == pytest.approx(nats / count, rel=1e-5)


def test_the_fingerprint_contains_everything_that_determines_the_weights(toy):
    folders = {
        str(Experiment(compose_config([*FEW, *toy, *more]), "a test").runs.folder())
        for more in ([], ["backbone.name_or_path=other"], ["backbone.from_scratch=true"], ["model.dropout=0.3"])
    }
    assert len(folders) == 4
    assert translate(["backbone.name_or_path=runs/a=1/x"]) == ['backbone.name_or_path="runs/a=1/x"']


def test_a_trained_model_is_a_start_too(tmp_path, toy):
    run(*toy)
    last = next(tmp_path.rglob("last.ckpt"))
    before = set(tmp_path.rglob("last.ckpt"))
    start = f"training.from_pretrained={last}"
    assert run(toy[1], start) and set(tmp_path.rglob("last.ckpt")) > before


def test_incompatible_settings_from_the_command_line(toy):
    refused("model.length=40 is longer than the 32 positions", *toy, "model.length=40")
    refused("parameterization=ar backbone=ar", *toy, "parameterization=subs", "sampling.predictor=ddpm")
    refused("belong together: set data.tokenizer_name_or_path", toy[0], "data.tokenizer_name_or_path=byte")


def test_the_baseline_of_the_readme_on_real_reviews(tmp_path, monkeypatch, data_dir):
    """The command as it is typed, with a small network under the name: gpt2's own ids and the mask."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "gpt2", GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=512))
    ask = ["mode=classify", "data=imdb", "parameterization=ar", "backbone=hf_causal", "backbone.name_or_path=gpt2",
           "model.length=512", "optim.lr=5e-5", "trainer.max_steps=1", "loader.global_batch_size=2",
           "trainer.accelerator=cpu", "data.max_train_texts=8", "data.max_valid_texts=4", "data.max_test_texts=4",
           "sampling.num_sample_log=0"]  # fmt: skip
    results = running.run(compose_config(ask), "a test")
    assert 0 <= results["accuracy"].value <= 1
    weights = [read_checkpoint(path).state["model.lm_head.weight"] for path in tmp_path.rglob("last.ckpt")]
    assert [tuple(weight.shape) for weight in weights] == [(50258, 8)] * 2
