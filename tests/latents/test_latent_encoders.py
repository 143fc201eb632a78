"""The encoders behind latents=hf, self and synthetic: their vectors and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from palimpsest.corpora.review_attributes import ATTRIBUTES, UNREAD, read_attributes
from palimpsest.corpora.reviews import GeneratedReviews, ReviewGrammar, generate_split
from palimpsest.latents.attributes import Attributes
from palimpsest.latents.hf import Pretrained, pool
from palimpsest.latents.hidden_states import HiddenStates
from tests.helpers.commands import TINY, run
from tests.helpers.latent_data import WORDS, data_with


class Spelt:
    """Passages that are given as texts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A tiny network of transformers with a tokenizer, as its own library writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("bert")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(names),
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def sentence_folder(folder: Path, bert: Path, pooling: dict[str, object], normalize: bool, **message: object) -> Path:
    """The same network in the layout of sentence-transformers."""
    folder.mkdir()
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    kinds = {"": "Transformer", "1_Pooling": "Pooling", **({"2_Normalize": "Normalize"} if normalize else {})}
    modules = [{"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (path, kind) in enumerate(kinds.items())]  # fmt: skip
    (folder / "1_Pooling").mkdir()
    for name, content in {"modules.json": modules, "1_Pooling/config.json": pooling, **message}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


# -------------------------------------------------------------------------------- hf


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_vector_is_of_its_text_and_not_of_the_padding_behind_it(bert, pooling):
    encoder, texts = Pretrained(str(bert), pooling=pooling), ["the film was dull", "salt", "a " * 15 + "sea"]
    together = encoder.encode(Spelt(texts))
    alone = np.concatenate([encoder.encode(Spelt([text])) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    ids = encoder.tokenizer(texts[0], return_tensors="pt")
    with torch.no_grad():
        hidden_LW = encoder.network(**ids).last_hidden_state[0].numpy()
    expected = {"mean": hidden_LW.mean(0), "cls": hidden_LW[0], "last": hidden_LW[-1]}[pooling]
    np.testing.assert_allclose(together[0], expected, atol=1e-5)
    hidden_BLW = torch.randn(1, 4, 3)
    trap = hidden_BLW.mean(1) if pooling == "mean" else hidden_BLW[:, -1]  # over all there is
    assert pooling == "cls" or not torch.allclose(pool(hidden_BLW, torch.tensor([[1, 1, 1, 0]]), pooling), trap)


def test_a_folder_of_sentence_transformers_says_how_it_is_used(bert, tmp_path):
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    prompts = {"prompts": {"doc": "sea "}, "default_prompt_name": "doc"}
    files = {"sentence_bert_config.json": {"max_seq_length": 9, "do_lower_case": True},
             "config_sentence_transformers.json": prompts}  # fmt: skip
    folder = sentence_folder(tmp_path / "a", bert, flags, True, **files)
    encoder = Pretrained(str(folder))
    message = {"pooling": "cls", "normalize": True, "window": 9, "prompt": "sea ", "long_texts": "error"}
    assert encoder.settings == message and encoder.metadata["pooling"] == "cls"
    vector = encoder.encode(Spelt(["The FILM"]))
    plain = Pretrained(str(bert), pooling="cls").encode(Spelt(["sea the film"]))
    np.testing.assert_allclose(vector, plain / np.linalg.norm(plain), atol=1e-6)
    typed = Pretrained(str(folder), pooling="last", normalize=False, window=12, prompt="", long_texts="cut")
    assert typed.settings == {"pooling": "last", "normalize": False, "window": 12, "prompt": "", "long_texts": "cut"}
    assert Pretrained(str(folder), dim=3).identity == encoder.identity != typed.identity
    last = sentence_folder(tmp_path / "b", bert, {"pooling_mode": "lasttoken"}, False)
    assert (Pretrained(str(last)).settings["pooling"], Pretrained(str(last)).settings["window"]) == ("last", 20)


def test_texts_beyond_the_window_are_refused_or_cut(bert):
    long, short = " ".join(WORDS[:19]), "the film"
    with pytest.raises(
        ValueError, match=r"1 of 2 texts are longer than the latents.window=20 .*has 21.*long_texts=cut"
    ):
        Pretrained(str(bert), pooling="mean").encode(Spelt([long, short]))
    cutting = Pretrained(str(bert), pooling="mean", long_texts="cut")
    cut = cutting.encode(Spelt([long, short]))[0]
    np.testing.assert_allclose(cut, cutting.encode(Spelt([" ".join(WORDS[:18])]))[0], atol=1e-6)
    assert cutting.cut == 1
    with pytest.raises(ValueError, match="latents.window=21: .* reads at most 20"):
        assert Pretrained(str(bert), pooling="mean", window=21).settings
    with pytest.raises(ValueError, match="without words"):
        cutting.encode(Spelt(["the", " "]))


def test_folders_with_missing_or_unsupported_settings_are_refused(bert, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"does not say how it pools.*latents.pooling=mean\|cls\|last"):
        Pretrained(str(bert)).check(None, 9)
    for name, flags in (("max", {"pooling_mode_max_tokens": True}), ("two", {"pooling_mode": ["mean", "cls"]})):
        with pytest.raises(ValueError, match="pools by"):
            assert Pretrained(str(sentence_folder(tmp_path / name, bert, flags, False))).settings
    dense = sentence_folder(tmp_path / "dense", bert, {"pooling_mode": "mean"}, True)
    modules = (dense / "modules.json").read_text().replace("Normalize", "Dense")
    (dense / "modules.json").write_text(modules)
    with pytest.raises(ValueError, match="consists of Transformer, Pooling, Dense"):
        assert Pretrained(str(dense)).settings
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no readable encoder"):
        assert Pretrained(str(tmp_path / "empty"), pooling="mean").settings
    with pytest.raises(FileNotFoundError, match=r"no-such-encoder was not found: .*or install a package"):
        assert Pretrained("no-such-encoder").folder
    package = tmp_path / "packages" / "tiny_encoder" / "model"
    sentence_folder_of = sentence_folder(tmp_path / "whole", bert, {"pooling_mode": "mean"}, False)
    package.parent.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise RuntimeError('no code of a package is run')")
    sentence_folder_of.rename(package)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages"), *sys.path])
    assert Pretrained("tiny-encoder").folder == package
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert Pretrained("dense").folder == dense


def test_latents_of_a_pretrained_encoder(bert, tmp_path):
    data = data_with(Pretrained(str(bert), pooling="mean", dim=4, tokens=2), tmp_path)
    latent = np.concatenate([batch["latent"] for batch in data.eval_dataloader("train")])
    assert np.abs(latent.mean(0)).max() < 0.02 and np.abs(latent.std(0) - 1).max() < 0.02
    assert data.latents.shape == (2, 2) and latent.shape == (120, 2, 2)
    assert data.latents.packed("validation")[[0]].texts == data.texts("validation")["text"][:1]


# -------------------------------------------------------------------------------- self


def test_latents_of_a_model_of_our_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = [f"data.source.num_{split}_per_class=40" for split in ("train", "validation", "test")]
    run(*TINY, *few, "data.cache_dir=cache", "eval.generate_samples=false")
    path = str(next(tmp_path.rglob("last.ckpt")))
    source = GeneratedReviews(40, 40, 40)
    data = data_with(HiddenStates(path, dim=6, batch_size=7), "cache", source, length=72, insert_train_special=True)
    rows, encoder = data.latents.packed("train")[np.arange(30)], data.latents.encoder
    together = encoder.encode(rows)
    alone = np.concatenate([encoder.encode(rows.only(number)) for number in range(30)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    ids = torch.from_numpy(rows.ids[0].astype(np.int64))[None]
    with torch.no_grad():
        hidden_LW = encoder.network.encode(ids, torch.zeros(1))[0]
    np.testing.assert_allclose(together[0], hidden_LW.mean(0), atol=1e-5)
    latent = data.latents.of("train")[np.arange(80)]
    row, pad, eos = rows.ids[0].tolist(), data.vocabulary.pad_id, data.vocabulary.eos_id
    behind = data.latents.encode([row, [*row, pad, pad], [*row, eos, eos, eos]])
    np.testing.assert_allclose(behind, np.repeat(latent[:1], 3, axis=0), atol=1e-4)  # padding has no effect
    assert latent.shape == (80, 1, 6) and np.abs(latent.mean(0)).max() < 0.02 and np.abs(latent.std(0) - 1).max() < 0.02
    with pytest.raises(ValueError, match="another tokenizer"):
        assert data_with(HiddenStates(path), tmp_path).latents.shape
    with pytest.raises(ValueError, match="trained on 72 tokens"):
        assert data_with(HiddenStates(path), "cache", source, length=80).latents.shape
    raw = HiddenStates(path, disable_ema=True)
    raw.check(data.vocabulary, 72)
    assert raw.identity != encoder.identity, "other weights, other vectors"
    for named in ("palimpsest.models.checkpoints.read_checkpoint", "os.system", "palimpsest.models.hub._snapshot"):
        foreign = HiddenStates(path)
        foreign.check(data.vocabulary, 72)
        foreign._checkpoint.settings["backbone._target_"] = named
        with pytest.raises(ValueError, match="of another project|is no network"):
            assert foreign.network


# -------------------------------------------------------------------------------- synthetic


def test_attributes_are_read_off_texts_as_the_grammar_drew_them():
    grammar, split = ReviewGrammar(), generate_split("test", 150, 0)
    found = read_attributes(split["text"])
    assert (found != UNREAD).all()
    np.testing.assert_array_equal(found[:, 0], grammar.posterior(split["text"]).argmax(1))
    np.testing.assert_array_equal(read_attributes(split["text"], split["label"])[:, 0], split["label"])
    text = (
        "Here is a bold movie about nurses. The plot in parts is truly dull, but the actors never feel boring "
        "overall. I rarely loved its tunes or images. So certainly avoid this movie next week."
    )
    one = dict(zip(ATTRIBUTES, read_attributes([text])[0], strict=True))
    assert {name: ATTRIBUTES[name][value] for name, value in one.items()} == {
        "class": "negative",
        "opening": "shown",
        "topic": "bold",
        "story_sentiment": "positive",
        "story_form": "contrast",
        "story_subject": "plot",
        "music_sentiment": "negative",
        "music_form": "feeling",
        "music_subject": "tunes",
        "verdict_sentiment": "negative",
        "verdict_form": "advice",
    }
    assert grammar.log_prob([text], 0)[0] > -np.inf
    broken = text.replace("avoid this movie", "avoid movie this")
    of_it = dict(zip(ATTRIBUTES, read_attributes([broken, "no review at all"])[0], strict=True))
    assert of_it["verdict_form"] == of_it["verdict_sentiment"] == UNREAD and of_it["topic"] == one["topic"]
    assert (read_attributes(["no review at all"]) == UNREAD).all()


def test_synthetic_latents_say_the_attributes(tmp_path):
    source = GeneratedReviews(300, 60, 1)
    data = data_with(Attributes(), tmp_path, source, length=72, vocab_size=200)  # some words are unknown to the model
    encoder, latent = data.latents.encoder, data.latents.of("validation")[np.arange(120)]
    assert encoder.width == sum(map(len, ATTRIBUTES.values())) == data.latents.shape[1]
    true = encoder.attributes(data.texts("validation")["text"][:], data.texts("validation")["label"][:])
    np.testing.assert_array_equal(encoder.read(data.latents.restore(latent)), true)
    composed = encoder.compose(true)
    np.testing.assert_array_equal(encoder.read(composed), true)
    noise = data.latents.restore(latent)[:, 0] - composed
    assert noise.std() == pytest.approx(0.05, rel=0.03) and abs(noise.mean()) < 0.002
    np.testing.assert_allclose(composed @ composed.T, (true[:, None] == true[None]).sum(-1), atol=1e-9)  # a rotation
    rows = data.latents.packed("validation")
    assert any("[UNK]" in text for text in rows[np.arange(9)].texts)
    again = Attributes().encode(rows[np.arange(9)])
    np.testing.assert_allclose(again, data.latents.restore(latent[:9])[:, 0], atol=1e-6)
    some = Attributes(["verdict_form", "class"], noise=0.0)
    assert some.names == ("verdict_form", "class") and some.width == 5
    with pytest.raises(ValueError, match="data=reviews only.* shows no opening"):
        data_with(Attributes(), tmp_path, length=24).latents.of("train")
