"""Generative perplexity against a loop over single tokens; diversity; both in mode=sample_eval."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

from palimpsest.common.metrics import Estimate
from palimpsest.data.tokenizers import encode, vocabulary
from palimpsest.dataloader import TextData
from palimpsest.evaluation.diversity import distinct, diversity, unigram_entropy
from palimpsest.evaluation.generative_perplexity import CausalScorer, TextScores, windows
from palimpsest.evaluation.sample_quality import RealTexts, compare, real_texts, text_of
from palimpsest.experiment import running
from palimpsest.experiment.building import Builder
from palimpsest.experiment.experiment import Experiment
from palimpsest.report.free_texts import comparison_lines
from palimpsest.settings.command_line import compose_config, explain
from tests.helpers.commands import TINY, run
from tests.helpers.published import CONTEXT, SPECIALS, save_scorer, save_tokenizer

TEXTS = ["a cat.", "the dog sat on the mat, and the cat sat on the dog.", "", "z", "a cat. " * 20]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DATA_DIR", raising=False)
    return save_scorer(tmp_path / "scorer")


def load(folder: Path, batch_size: int = 8) -> CausalScorer:
    return CausalScorer.load(str(folder), batch_size, dtype=torch.float64)


def token_by_token(scorer: CausalScorer, text: str) -> tuple[float, int]:
    """One pass of the network for every single token: with all that goes before it where that fits into the context,
    else from the latest multiple of half a context on that the windows allow."""
    bos = scorer.tokenizer.bos_token_id
    ids = ([] if bos is None else [bos]) + encode(scorer.tokenizer, [text])[0]
    nats, half = 0.0, CONTEXT // 2
    for i in range(1, len(ids)):
        start = 0 if i < CONTEXT else half * ((i - CONTEXT) // half + 1)
        with torch.no_grad():
            logits = scorer.model(torch.tensor([ids[start : i + 1]])).logits[0, -2]
        nats -= float(torch.log_softmax(logits, -1)[ids[i]])
    return nats, max(len(ids) - 1, 0)


# ------------------------------------------------------------------------------------------- the scorer
@pytest.mark.parametrize("specials", [SPECIALS, {"unk_token": "[UNK]"}], ids=["bos", "no bos"])
def test_every_text_against_a_loop_over_single_tokens(tmp_path, specials):
    scorer = load(save_scorer(tmp_path, **specials))
    scores = scorer.score(TEXTS)
    wanted = [token_by_token(scorer, text) for text in TEXTS]
    np.testing.assert_allclose(scores.nats_M, [nats for nats, _ in wanted], rtol=1e-12)
    assert scores.tokens_M.tolist() == [tokens for _, tokens in wanted]
    begins = "bos_token" in specials
    assert scores.tokens_M.tolist() == [len(text) - (not begins and len(text) > 0) for text in TEXTS]
    assert ("after the begin token" in scorer.protocol["first_token"]) == begins
    uniform = math.log(scorer.model.config.vocab_size)
    assert (np.abs(scores.nats_M / np.maximum(scores.tokens_M, 1) - uniform) > 0.05).sum() >= 3, "a scorer that says it"


def test_a_score_does_not_depend_on_the_batch(folder):
    alone = load(folder, batch_size=1).score(TEXTS)
    for batch_size in (2, 3, 64):
        together = load(folder, batch_size).score(TEXTS[::-1])
        np.testing.assert_allclose(together.nats_M[::-1], alone.nats_M, rtol=1e-12)
    single = [float(load(folder).score([text]).nats_M[0]) for text in TEXTS]
    np.testing.assert_allclose(single, alone.nats_M, rtol=1e-12)
    narrow = CausalScorer.load(str(folder), 64).score(TEXTS)
    np.testing.assert_allclose(narrow.nats_M, alone.nats_M, rtol=1e-5)


@pytest.mark.parametrize("context", [2, 3, 8, 9, 32])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 8, 9, 12, 13, 31, 32, 33, 100])
def test_windows_score_every_token_once_with_half_a_context_before_it(num_tokens, context):
    cut = windows(num_tokens, context)
    assert [i for window in cut for i in range(window.first, window.stop)] == list(range(1, num_tokens))
    assert all(window.stop - window.start <= context for window in cut)
    assert all(window.first - window.start >= context / 2 for window in cut[1:])
    assert windows(num_tokens, None) == windows(num_tokens, max(num_tokens, 2))


def test_the_estimate_is_that_of_all_tokens_with_an_error_over_texts():
    nats, tokens = np.array([3.0, 0.0, 8.0, 5.0]), np.array([2, 0, 4, 2])
    found = TextScores(nats, tokens).summary({})
    assert (found.texts, found.tokens, found.left_out) == (3, 8, 1)
    assert found.nats_per_token.value == pytest.approx(2.0)
    residual = np.array([3 - 2 * 2, 8 - 2 * 4, 5 - 2 * 2])
    assert found.nats_per_token.se == pytest.approx(math.sqrt((residual**2).sum() / 2 / 3) / (8 / 3))
    assert found.perplexity == Estimate(math.exp(2.0), math.exp(2.0) * found.nats_per_token.se)


def test_nothing_to_score_is_no_number():
    found = TextScores(np.zeros(2), np.zeros(2, dtype=int)).summary({})
    assert math.isnan(found.perplexity.value) and (found.texts, found.left_out) == (0, 2)


def test_special_tokens_spelled_out_are_characters(folder):
    scorer = load(folder)
    assert scorer.score(["a[EOS]"]).tokens_M.tolist() == [6]


def test_real_gpt2_tokenizer(data_dir, tmp_path):
    tokenizer = FastTokenizer.from_pretrained(data_dir / "gpt2_tokenizer")
    tokenizer.save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=CONTEXT)).save_pretrained(tmp_path)
    scorer = load(tmp_path)
    texts = ["The quick brown fox jumps over the lazy dog. " * 10, "naïve – 猫"]
    scores = scorer.score(texts)
    wanted = [token_by_token(scorer, text) for text in texts]
    np.testing.assert_allclose(scores.nats_M, [nats for nats, _ in wanted], rtol=1e-10)
    assert scores.tokens_M.tolist() == [tokens for _, tokens in wanted]


# ------------------------------------------------------------------------------------------- loading
def test_data_dir_comes_first(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(folder.parent))
    monkeypatch.chdir(tmp_path)
    save_scorer(folder.parent / "elsewhere" / "scorer", seed=1)
    monkeypatch.chdir(folder.parent / "elsewhere")
    here = load(Path("scorer")).score(["a cat."]).nats_M
    assert here == load(folder).score(["a cat."]).nats_M
    monkeypatch.delenv("DATA_DIR")
    assert here != load(Path("scorer")).score(["a cat."]).nats_M


@pytest.mark.parametrize("data_dir_set", [True, False])
def test_a_missing_scorer_says_both_ways(tmp_path, monkeypatch, data_dir_set):
    monkeypatch.setenv("DATA_DIR", str(tmp_path)) if data_dir_set else monkeypatch.delenv("DATA_DIR", raising=False)
    with pytest.raises(FileNotFoundError) as caught:
        CausalScorer.load("no-such-scorer-at-all")
    for said in ("eval.gen_ppl_eval_model_name_or_path=no-such-scorer-at-all", "$DATA_DIR/no-such-scorer-at-all",
                 "Hugging Face Hub", f"DATA_DIR={tmp_path}" if data_dir_set else "DATA_DIR is not set"):  # fmt: skip
        assert said in str(caught.value)


def test_what_can_not_be_used_says_why(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        CausalScorer.load(str(tmp_path / "typo"))
    with pytest.raises(ValueError, match="eval.gen_ppl_eval_model_name_or_path=''"):
        CausalScorer.load("")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no causal language model .* it needs config.json"):
        CausalScorer.load(str(empty))


def test_pickled_weights_are_refused(folder):
    torch.save(GPT2LMHeadModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        CausalScorer.load(str(folder))


def test_weights_that_would_be_random_are_refused(folder):
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.n_layer = 3
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"lacks transformer\.h\.2\..*random"):
        CausalScorer.load(str(folder))


def test_another_models_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="do not match"):
        load(save_scorer(tmp_path / "small", vocab_size=20))
    with pytest.raises(ValueError, match="do not match"):
        load(save_scorer(tmp_path / "large", vocab_size=3000))
    load(save_scorer(tmp_path / "rounded", vocab_size=64))


def test_ids_that_the_network_does_not_know_are_refused(folder):
    scorer = load(folder)
    scorer.tokenizer.add_tokens(["cat"])
    with pytest.raises(ValueError, match="the id 34 .'cat'.*its network has 34"):
        scorer.score(["a cat."])


def test_a_model_that_sees_its_answers_is_refused(tmp_path):
    size = save_tokenizer(tmp_path, **SPECIALS)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=size,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no causal language model: its prediction"):
        CausalScorer.load(str(tmp_path))


# ------------------------------------------------------------------------------------------- diversity
def test_unigram_entropy():
    assert unigram_entropy([[1, 1, 1, 1]]).value == 0
    found = unigram_entropy([[1, 2, 3, 4], [5, 5, 6, 6]])
    assert found.value == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert found.se == pytest.approx(math.log(2) / 2)


def test_distinct_counts_over_all_texts():
    rows = [[1, 2, 1, 2], [1, 2, 3]]
    assert [distinct(rows, n).value for n in (1, 2, 3, 4)] == pytest.approx([3 / 7, 3 / 5, 3 / 3, 1.0])
    assert math.isnan(distinct(rows, 5).value) and math.isnan(distinct(rows[:1], 1).se)
    assert distinct([[1, 2]] * 3, 1) == Estimate(2 / 6, 0.0)
    assert set(diversity(rows).distinct) == {1, 2, 3}


def test_the_error_of_distinct_n_is_the_spread_over_corpora():
    """Corpora drawn anew: their spread is known to 1 / sqrt(2 * 300) = 4 %, so 20 % is five of its errors."""
    rng = np.random.default_rng(0)
    words = 1 / np.arange(1, 201)

    def corpus() -> list[list[int]]:
        lengths = rng.integers(5, 40, 40)
        return [rng.choice(200, n, p=words / words.sum()).tolist() for n in lengths]

    found = [distinct(corpus(), 2) for _ in range(300)]
    spread = np.std([estimate.value for estimate in found], ddof=1)
    assert np.mean([estimate.se for estimate in found]) == pytest.approx(spread, rel=0.2)


# ------------------------------------------------------------------------------------------- samples and real text
@pytest.fixture
def letters(tmp_path) -> FastTokenizer:
    save_tokenizer(tmp_path / "letters", **SPECIALS, mask_token="[MASK]")
    return FastTokenizer.from_pretrained(tmp_path / "letters")


def test_a_text_ends_at_its_first_end_token(letters):
    v = vocabulary(letters)
    cat, dog = encode(letters, ["cat", "dog"])
    for ids, text in [
        ([v.bos_id, *cat, v.eos_id, *dog], "cat"), ([*cat, v.bos_id, *dog], "catdog"), (cat, "cat"), ([v.eos_id], ""),
        ([v.bos_id, v.eos_id, *dog], ""), ([], ""), ([v.pad_id, *cat], "cat"), ([*cat, v.mask_id], "cat▢"),
    ]:  # fmt: skip
        assert text_of(ids, letters, v) == text


def test_a_begin_token_that_is_also_the_end_token_does_not_end_the_text(tmp_path):
    save_tokenizer(tmp_path, bos_token="[EOS]", eos_token="[EOS]", pad_token="[PAD]", unk_token="[UNK]")
    tokenizer = FastTokenizer.from_pretrained(tmp_path)
    v = vocabulary(tokenizer)
    (cat,) = encode(tokenizer, ["cat"])
    assert text_of([v.eos_id, *cat, v.eos_id, *cat], tokenizer, v) == "cat"


def fake_data(letters, texts: list[str], error: Exception | None = None) -> SimpleNamespace:
    rows = datasets.Dataset.from_dict({"input_ids": encode(letters, texts), "sample_id": list(range(len(texts)))})

    def give(split):
        if error:
            raise error
        return rows

    return SimpleNamespace(tokenizer=letters, vocabulary=vocabulary(letters), texts=give, split=give)


def test_real_texts_are_a_random_choice_or_a_reason(letters, monkeypatch):
    data = fake_data(letters, [letter * 3 for letter in "abcdefgh"])
    chosen = real_texts(data, "validation", 5, seed=1)
    assert chosen == real_texts(data, "validation", 5, seed=1) != real_texts(data, "validation", 5, seed=2)
    assert len({tuple(ids) for ids in chosen.rows}) == 5
    assert len(real_texts(data, "validation", 100, seed=1).rows) == 8
    assert {len(row) for row in real_texts(data, "validation", 100, seed=1, max_length=2).rows} == {2}
    assert real_texts(data, None, 5, seed=1).missing == "eval.split=null"
    assert real_texts(fake_data(letters, [], OSError("gone")), "validation", 5, seed=1).missing == "gone"
    with pytest.raises(ValueError, match="there is no split 'vaild' .eval.split=vaild; null"):
        real_texts(fake_data(letters, [], ValueError("there is no split 'vaild'")), "vaild", 5, seed=1)
    monkeypatch.setattr("palimpsest.evaluation.sample_quality._MOST_TEXTS", 7)
    assert "data.max_valid_texts=" in real_texts(data, "validation", 5, seed=1).missing


def test_the_comparison_shows_everything_beside_the_perplexity(folder, letters):
    data = fake_data(letters, [])
    rows = encode(letters, TEXTS)[:2]
    with_real = compare(rows, RealTexts(rows[::-1], "validation"), data, load(folder))
    results = with_real.results()
    assert results["generative_perplexity"] == load(folder).perplexity(TEXTS[:2]).perplexity
    assert results["real"]["generative_perplexity"].value == pytest.approx(results["generative_perplexity"].value)
    assert results["real"]["distinct_n"] == results["distinct_n"]
    shown = comparison_lines(with_real)
    for word in (
        "generative perplexity",
        "unigram entropy",
        "distinct-1",
        "distinct-3",
        "real (validation)",
        "left out",
    ):
        assert word in shown
    alone = compare(rows, RealTexts([], None, "eval.split=null"), data, None)
    assert alone.results()["generative_perplexity"] is None and alone.results()["real"] is None
    lines = comparison_lines(alone)
    assert "no real texts to compare with: eval.split=null" in lines and "perplexity" not in lines


def test_sample_eval_scores_its_samples(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    running.run(compose_config(TINY), "training")
    loaded, load_model = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: (loaded.append(a), load_model(*a, **k))[1]
    )
    ask = [*TINY, "mode=sample_eval", "loader.eval_batch_size=4", "sampling.num_sample_batches=2",
           "eval.compute_generative_perplexity=true", f"eval.gen_ppl_eval_model_name_or_path='{folder}'"]  # fmt: skip
    capsys.readouterr()
    results = run(*ask)
    assert len(loaded) == 1
    found = json.loads(next(tmp_path.rglob("sample_eval/results.json")).read_text())
    texts = [json.loads(line) for line in next(tmp_path.rglob("samples.jsonl")).read_text().splitlines()]
    data = Experiment(compose_config(ask), "a test").build.data()
    scores = CausalScorer.load(str(folder)).perplexity(
        [text_of(row["ids"], data.tokenizer, data.vocabulary) for row in texts]
    )
    assert found["samples"] == len(texts) == 8 and found["real"]["texts"] == 8
    assert results["generative_perplexity"].value == pytest.approx(scores.perplexity.value, rel=1e-5)
    assert found["generative_counts"] == {"texts": scores.texts, "tokens": scores.tokens, "left_out": scores.left_out}
    assert found["generative_protocol"]["scorer"] == str(folder) and found["real"]["generative_perplexity"]["se"] > 0
    page = next(tmp_path.rglob("sample_eval/report.html")).read_text()
    printed = capsys.readouterr().out
    for word in ("generative perplexity", "unigram entropy", "distinct-2", "real (validation)"):
        assert word in printed and word in page


@pytest.mark.parametrize(("setting", "said"), [
    ("eval.gen_ppl_eval_model_name_or_path=nowhere-at-all", "nowhere-at-all was not found"),
    ("eval.perplexity_batch_size=0", "eval.perplexity_batch_size=0"),
])  # fmt: skip
def test_a_scorer_that_can_not_be_used_stops_the_run_before_anything_else(folder, tmp_path, monkeypatch, setting, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextData, "texts", lambda *a: pytest.fail("the data were read first"))
    monkeypatch.setattr(Builder, "diffusion", lambda *a: pytest.fail("the model was built first"))
    ask = ["mode=sample_eval", "eval.compute_generative_perplexity=true",
           f"eval.gen_ppl_eval_model_name_or_path='{folder}'", setting]  # fmt: skip
    with pytest.raises((ValueError, OSError)) as caught:
        run(*ask)
    assert said in explain(caught.value)
