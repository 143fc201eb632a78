"""Texts with prompts: observed tokens, EOS padding, likelihoods per answer token, completed prompts."""

from __future__ import annotations

import json
import math
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from palimpsest.common.metrics import share, wilson_interval
from palimpsest.corpora.answer_checking import CheckedAnswer, check_same_text
from palimpsest.corpora.gsm8k import check_answer
from palimpsest.data.collate import Collate
from palimpsest.data.packing import Packing, pack
from palimpsest.data.rows import from_table, in_parts, parts_of, text_table
from palimpsest.data.tokenizers import encode, encode_after, load_tokenizer, vocabulary
from palimpsest.data.unigram import token_counts, unigram_nll
from palimpsest.dataloader import TextData
from palimpsest.diffusion import Diffusion, Provenance
from palimpsest.estimators.any_order import AnyOrder
from palimpsest.estimators.nelbo import Nelbo
from palimpsest.estimators.ordered import Ordered
from palimpsest.evaluation.answers import check_shares, majority_is_right, measure
from palimpsest.evaluation.completions import CompletionRequest, complete
from palimpsest.evaluation.drawing import Drawing, SamplingContext, draw
from palimpsest.experiment.experiment import Experiment
from palimpsest.experiment.weights import Weights
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.ar import AR
from palimpsest.objectives.base import Model, counted_mask, scored_mask
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.settings.command_line import SPELLINGS, compose_config, explain
from palimpsest.tasks.train import train
from tests.helpers import commands
from tests.helpers.commands import FEW_PROBLEMS, ROOT, TINY
from tests.helpers.exact import written

PROBLEMS = [["Q: a b\nA:", " c d e"], ["Q: b\nA:", " d"], ["Q: a b c\nA:", " e"]]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    texts = ["".join(parts) for parts in PROBLEMS]
    return load_tokenizer("word", texts=lambda: texts, cache_dir=tmp_path_factory.mktemp("tokenizer"))


def problems():
    texts, ends = in_parts(PROBLEMS)
    rows = from_table(text_table(texts, ends=ends))
    return rows.add_column("text_id", np.arange(len(rows)))


# -------------------------------------------------------------------------------- rows


def test_parts_have_the_tokens_of_the_whole(words, tmp_path):
    """No stray space in front of a part, and none lost."""
    byte = load_tokenizer("byte", cache_dir=tmp_path)
    bpe = load_tokenizer("bpe", texts=lambda: ["Q: a b\nA: c d e"] * 9, vocab_size=280, cache_dir=tmp_path)
    for tokenizer in (words, byte, bpe):
        for first, second in [*PROBLEMS, ["Q: a\n", "b c"], ["Q:\n", "\nb"]]:
            assert (
                encode(tokenizer, [first])[0] + encode_after(tokenizer, [second])[0]
                == encode(tokenizer, [first + second])[0]
            )


def test_prompts_are_counted_in_tokens(words, tmp_path):
    vocab = vocabulary(words)
    rows, _ = pack(problems(), words, vocab, Packing(16, False, bos=True), tmp_path)
    for row, (prompt, answer) in zip(rows, PROBLEMS, strict=True):
        given = row["part_ends"][0]
        assert row["input_ids"][:given].tolist() == [vocab.bos_id, *encode(words, [prompt])[0]]
        assert row["input_ids"][given:].tolist() == [*encode_after(words, [answer])[0], vocab.eos_id]


@pytest.mark.parametrize(("settings", "said"), [
    ({"wrap": True}, "data.wrap=true joins texts .*data.wrap=false"),
    ({"long_texts": "windows"}, "data.long_texts=windows would part texts from their prompts"),
    ({"length": 7, "long_texts": "truncate"}, "the prompt of text 0 has 7 tokens and leaves no room in model.length=7"),
    ({"length": 4, "long_texts": "drop"}, "data.long_texts=drop leaves no text"),
    ({"length": 8}, r"longer than model.length=8 .*data.long_texts=truncate, windows or drop"),
])  # fmt: skip
def test_prompts_that_cannot_be_kept_are_refused(words, tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        pack(problems(), words, vocabulary(words), Packing(**{"length": 16, "wrap": False, **settings}), tmp_path)


def test_long_and_empty_texts_with_prompts(words, tmp_path):
    vocab = vocabulary(words)
    rows, figures = pack(problems(), words, vocab, Packing(8, False, long_texts="drop"), tmp_path)
    assert rows["text_id"][:].tolist() == [1] and figures["long"] == 2 and figures["rows"] == 1
    texts, ends = in_parts([["Q: a\nA:", ""], ["Q: a\nA:", " b"]])
    rows = from_table(text_table(texts, ends=ends)).add_column("text_id", np.arange(2))
    with pytest.raises(ValueError, match="text 0 .* has no tokens behind its prompt; .*data.drop_empty=true"):
        pack(rows, words, vocab, Packing(16, False), tmp_path)
    assert len(pack(rows, words, vocab, Packing(16, False, drop_empty=True), tmp_path)[0]) == 1


BOS, EOS, PAD, MASK = 0, 1, 2, 3
COLUMNS = {"input_ids": [np.array([BOS, 5, 6, 7, EOS]), np.array([BOS, 5, 6, 4, 7, 5, EOS])], "length": [5, 7],
           "sample_id": [0, 1], "part_ends": [np.array([3, 4]), np.array([2, 5])]}  # fmt: skip


def test_batches_mark_observed_tokens_and_padding():
    padded = Collate(12, PAD, (BOS, EOS))(COLUMNS)
    assert padded["observed"].int().tolist() == [[1, 1, 1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1, 0]]
    assert padded["attention_mask"].sum(-1).tolist() == [5, 7] and "eos_padding" not in padded
    assert "segment_ends" not in padded
    filled = Collate(12, EOS, (BOS,), fill=True)(COLUMNS)
    assert filled["input_ids"].shape == (2, 12) and "attention_mask" not in filled
    assert (filled["input_ids"][0, 4:] == EOS).all() and filled["eos_padding"].sum(-1).tolist() == [7, 5]
    assert filled["observed"].sum(-1).tolist() == [3, 2] and counted_mask(filled).sum(-1).tolist() == [2, 5]
    assert scored_mask(filled).sum(-1).tolist() == [9, 10]
    same_id = Collate(12, BOS, (BOS,), fill=True)({**COLUMNS, "input_ids": [np.where(r == EOS, BOS, r) for r in COLUMNS["input_ids"]]})  # fmt: skip # noqa: E501
    assert (same_id["observed"] == filled["observed"]).all(), "gpt2: BOS and EOS have one id"


# -------------------------------------------------------------------------------- likelihood


def uniform_network(vocab_size, causal=False):
    """Every token but the mask is equally likely everywhere."""
    head = torch.nn.Linear(2, vocab_size)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    return SimpleNamespace(
        head=head,
        causal=causal,
        encodes_positions=False,
        num_classes=0,
        encode=lambda tokens_BL, sigma_B, **cond: torch.zeros(*tokens_BL.shape, 2),
    )


def test_eos_padding_costs_nats_but_counts_no_tokens():
    """Under a uniform network every scored token costs log(V - 1): the denominators and nothing else differ."""
    batch, nats = Collate(12, EOS, (BOS,), fill=True)(COLUMNS), math.log(8 - 1)
    model = Model(Subs(LogLinear(), Absorbing(MASK)), uniform_network(8))
    for estimator in (Nelbo(), AnyOrder(), Ordered("left_to_right")):
        found = estimator(model, batch, 1, 4)
        torch.testing.assert_close(
            found.nll_BK.mean(1), torch.tensor([9 * nats, 10 * nats]).double(), rtol=1e-5, atol=0
        )
        assert found.tokens_B.tolist() == [2, 5]
    shown = []
    model.backbone.encode = lambda x_BL, sigma_B, **cond: shown.append(x_BL) or torch.zeros(*x_BL.shape, 2)
    Nelbo()(model, batch, 1, 8)
    masked = torch.stack(shown) == MASK
    assert not masked[:, batch["observed"]].any() and masked[:, scored_mask(batch)].any(0).all(), "fill is masked too"


def test_a_causal_model_scores_answer_and_eos_filled_or_padded():
    padded, filled = Collate(12, PAD, (BOS, EOS))(COLUMNS), Collate(12, EOS, (BOS,), fill=True)(COLUMNS)
    torch.manual_seed(0)
    network = uniform_network(8, causal=True)
    table = torch.randn(8, 2)
    network.encode = lambda tokens_BL, sigma_B, **cond: table[tokens_BL]
    torch.nn.init.normal_(network.head.weight)
    losses = [AR(Absorbing(MASK)).loss(network, batch) for batch in (padded, filled)]
    assert [loss.mask_BL.sum(-1).tolist() for loss in losses] == [[2, 5], [2, 5]]
    torch.testing.assert_close(losses[0].nll_BL.sum(-1), losses[1].nll_BL.sum(-1))
    log_p = network.head(table[torch.tensor([6, 7])]).index_fill(1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
    torch.testing.assert_close(losses[0].nll_BL[0].sum(), -log_p[0, 7] - log_p[1, EOS])


def test_the_unigram_baseline_leaves_prompts_and_padding_out():
    import datasets

    columns = {"input_ids": [ids.tolist() for ids in COLUMNS["input_ids"]],
               "part_ends": [ends.tolist() for ends in COLUMNS["part_ends"]]}  # fmt: skip
    rows = datasets.Dataset.from_dict(columns).with_format("numpy")
    data = SimpleNamespace(
        collate=Collate(8, PAD, (BOS,)), vocabulary=SimpleNamespace(size=8), split=lambda name: rows, fill="eos"
    )
    counts_V = np.array([0, 2, 0, 0, 1, 1, 1, 2])  # answers 7 EOS | 6 4 7 5 EOS
    for causal in (False, True):
        np.testing.assert_array_equal(token_counts(data, causal)[0], counts_V)
        nats_V = -np.log((counts_V + 1) / (counts_V + 1).sum())
        expected = [nats_V[[7, 1]].sum(), nats_V[[6, 4, 7, 5, 1]].sum()]
        np.testing.assert_allclose(unigram_nll(data, "train", causal), expected)
    shown = SimpleNamespace(**{**vars(data), "fill": None, "collate": Collate(8, PAD, (BOS, EOS))})
    assert token_counts(shown)[0, EOS] == 0


def test_a_filled_bound_stays_above_the_entropy_with_the_length(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(compose_config([*TINY, "data.fill=eos", "data.cache_dir=cache"]), "a test")
    results = train(experiment, num_samples=1, generate_samples=False, disable_ema=False)
    gap = results["gap_nats_per_token"]
    assert gap.value > -4 * gap.se
    texts, truth = experiment.build.data().texts("validation")["text"][:], experiment.build.truth
    nats = math.log(2) - np.logaddexp(truth.log_prob(texts, 0), truth.log_prob(texts, 1))
    tokens = [len(ids) + 1 for ids in encode(experiment.build.data().tokenizer, texts)]
    assert results["true_nats_per_token"].value == pytest.approx(nats.sum() / sum(tokens)), "p(text), its length too"


# -------------------------------------------------------------------------------- answers


def test_shares_votes_and_groups():
    one = share(np.array([True, False, False, True])[:, None])
    assert (
        one.value == 0.5 and one.low == pytest.approx(0.1500, abs=1e-3) and one.high == pytest.approx(0.8500, abs=1e-3)
    )
    several = share(np.array([[True, True], [True, False], [False, False]]))
    assert several.value == 0.5 and several.se == pytest.approx(0.5 / math.sqrt(3))
    never = share(np.zeros((2, 2), dtype=bool))
    assert never.se == 0 and never.low == 0 and never.high == pytest.approx(0.6576, abs=1e-3), "none of two prompts"
    assert several.low == pytest.approx(wilson_interval(1.5, 3).low), "two completions are not two prompts"
    alike = np.repeat(np.arange(100) < 30, 4).reshape(100, 4)
    assert share(alike).low == pytest.approx(wilson_interval(30, 100).low, abs=2e-3)
    answers = [CheckedAnswer(answer, "5") for answer in (None, None, None, "5", "4", "5")]
    assert majority_is_right(answers) and not majority_is_right(answers[:3])
    assert not majority_is_right([CheckedAnswer("4", "5"), CheckedAnswer("5", "5")]), "the first of equals"
    table = [[CheckedAnswer("1" if m % 2 else None, "1", steps=m % 8)] for m in range(40)]
    found = measure(table, np.ones((40, 1), dtype=bool), np.arange(40))
    for groups in (found.by_steps, found.by_length):
        assert sum(right.texts for right in groups.values()) == 40
        assert sum(right.texts * right.value for right in groups.values()) == pytest.approx(20)
    assert list(found.by_steps) == ["0 to 2", "3", "4 to 5", "6 or more"]
    assert len(found.by_length) == 4 and found.majority is None and found.unfinished.value == 0
    assert len(measure(table, np.ones((40, 1), dtype=bool), np.full(40, 7)).by_length) == 1, (
        "equal lengths stay together"
    )
    total, shares = check_shares([{"right": 3, "wrong": 0}, {"right": 0, "wrong": 1}, {}])
    assert total == 4 and shares["right"].value == 0.75 and shares["wrong"].value == 0.25
    assert check_same_text(" a b\n", "a b").right and check_same_text("", "a").answer is None


# -------------------------------------------------------------------------------- the whole program


def run(*arguments):
    return commands.run(*FEW_PROBLEMS, *arguments)


@pytest.mark.parametrize("law", [[], ["parameterization=ar"], ["data=gsm8k_plan"]], ids=["mdlm", "ar", "plan"])
def test_training_likelihood_and_answers(gsm8k, law):
    trained = run(*law)
    measured = run(*law, "mode=ppl_eval")
    assert 0 < measured["unigram_nats_per_token"].value < 6 and trained["checkpoint"].exists()
    results = run(*law, "mode=sample_eval", "sampling.samples_per_prompt=2")
    assert results["prompts"] == 8 and results["exact_match"]["prompts"] == 8 and results["pass_at_2"] is not None
    assert 0 < results["references_after_tokenizer"]["value"] <= 1
    folder = next(gsm8k.rglob("samples.jsonl")).parent
    assert folder.name == "test" and "Completed prompts" in (folder / "report.html").read_text()
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and {row["text_id"] for row in rows} <= set(range(8))
    for row in rows:
        assert row["steps"][: row["prompt_tokens"]] == [0] * row["prompt_tokens"]
        reference = f"{row['prompt']}{row['reference']}"
        assert reference.startswith("Question: Ann has ") and reference.endswith(row["wanted"])
        assert row["right"] == (row["answer"] == row["wanted"]) and row["steps_of_reference"] == 1
    protocol = json.loads((folder / "results.json").read_text())["protocol"]
    assert protocol["split"] == "test" and protocol["fill"] == "eos" and protocol["samples_per_prompt"] == 2


def test_a_sampler_that_knows_the_answers_is_right_and_one_does_not_depend_on_the_others(gsm8k):
    experiment = Experiment(compose_config([*FEW_PROBLEMS, "data.max_test_texts=null"]), "a test")
    data = experiment.build.data()
    diffusion = experiment.build.diffusion(data).eval()
    torch.nn.init.normal_(diffusion.backbone.head.weight, generator=torch.Generator().manual_seed(0))
    test = data.texts("test")
    known = {tuple(encode(data.tokenizer, [text])[0]) for text in test["text"]}

    noises = []

    def oracle(model, x_BL, noise, **cond):
        out = x_BL.clone()
        noises.extend(noise.uniform().tolist())
        for row in out:
            given = row[1 : int((row == MASK_ID).nonzero()[0])].tolist()
            (ids,) = [ids for ids in known if list(ids[: len(given)]) == given]
            row[1 : 1 + len(ids)], row[1 + len(ids) :] = torch.tensor(ids), data.vocabulary.eos_id
        return written(x_BL, out, MASK_ID)

    MASK_ID = diffusion.objective.process.mask_id  # noqa: N806
    trainer = experiment.trainer("sample_eval")
    completed = complete(
        SamplingContext(trainer, diffusion, data, Drawing(oracle), 1), CompletionRequest("test", None, 1, check_answer)
    )
    assert len(completed) == 12 and all(c.answers[0].right and c.ended[0] for c in completed)
    assert [c.completions[0].strip() for c in completed] == [c.reference.strip() for c in completed]
    assert len(set(noises)) == 12
    drawing = experiment.build.drawing()
    every = complete(
        SamplingContext(trainer, diffusion, data, drawing, 1), CompletionRequest("test", None, 2, check_answer)
    )
    some = complete(
        SamplingContext(trainer, diffusion, data, drawing, 1), CompletionRequest("test", 3, 1, check_answer)
    )
    texts = {c.text_id: c.completions for c in every}
    assert len(some) == 3 and all(texts[c.text_id][0] == c.completions[0] for c in some)
    assert any(first != second for first, second in texts.values())
    short = Experiment(compose_config([*FEW_PROBLEMS, "model.length=22", "data.long_texts=drop"]), "a test")
    none = complete(
        SamplingContext(trainer, diffusion, short.build.data(), drawing, 1),
        CompletionRequest("test", None, 1, check_answer),
    )
    unfit = [c for c in none if not c.sampled]
    assert 0 < len(unfit) < len(none) and not any(c.answers[0].right or c.ended[0] for c in unfit)


@pytest.mark.parametrize(("arguments", "said"), [
    (["data.fill=null", "mode=sample_eval"], "data.fill=null: this model of data=gsm8k"),
    (["mode=sample_eval", "sampling.prefix=a"], "leave sampling.prefix"),
    (["mode=sample_eval", "eval.compute_generative_perplexity=true"], "eval.compute_generative_perplexity=true"),
    (["mode=sample_eval", "eval.split=null"], "eval.split=null"),
    (["mode=sample_eval", "sampling.samples_per_prompt=0"], "sampling.samples_per_prompt=0"),
    (["mode=sample_eval", "sampling.samples_per_prompt=x"], "sampling.samples_per_prompt=x"),
    (["data=reviews", "mode=sample_eval", "sampling.samples_per_prompt=2"], "data=reviews have none"),
    (["data=reviews", "mode=sample_eval", "sampling.num_sample_batches=null"], "data=reviews have none"),
    (["data=reviews", "mode=classify", "data.fill=eos"], "data.fill=eos: mode=classify"),
    (["data=reviews", "mode=classify", "data.long_texts=drop"], "data.long_texts=drop: mode=classify"),
    (["data.segments=true"], "data.segments=true gives .* Subs does not use"),
    (["data.streaming=true", "data.long_texts=truncate"], "a prompt that fills its row"),
    (["data.fill=pad"], "data.fill=pad must be one of: eos"),
    (["data.insert_train_eos=false"], "data.fill=eos pads each text"),
    (["data.wrap=true", "data.fill=null"], "data.wrap=true joins texts"),
    (["data.source.parts=['{question} {reply}']"], "asks for reply"),
    (["data.source.parts=[]"], "data.source.parts=\\[\\]"),
    (["data.source.parts=null"], "say in data.source.parts"),
])  # fmt: skip
def test_mistakes_are_explained(gsm8k, monkeypatch, arguments, said):
    def untrained(self: Weights, data: TextData, *_: object) -> Diffusion:
        diffusion = self.build.diffusion(data)
        diffusion.provenance = Provenance("nowhere", None, averaged=False)
        return diffusion

    monkeypatch.setattr(Weights, "trained", untrained)
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - explain() is what is tested
        run(*arguments)
    assert caught.match(said) or said in explain(caught.value)


def test_own_files_may_have_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"say {n}", "text": f"it is {n}"} for n in range(40)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ask = ["data=text", "data.path=own.jsonl", "data.prompt_column=question", "data.wrap=false", "data.fill=eos",
           "data.tokenizer_name_or_path=word", "model.length=16", "trainer.max_steps=2"]  # fmt: skip
    data = Experiment(compose_config([*FEW_PROBLEMS, *ask]), "a test").build.data()
    text, ends = data.texts("train")[0]["text"], data.texts("train")[0]["ends"]
    assert parts_of(text, ends)[0].startswith("say ") and parts_of(text, ends)[0].endswith("\n")
    run(*ask)
    results = run(*ask, "mode=sample_eval", "sampling.num_sample_batches=null", "eval.split=validation")
    assert results["prompts"] == 2 and results["by_steps_of_reference"] == {} and results["checks"] == {}
    with pytest.raises(ValueError, match=r"no column 'query' \(data\.prompt_column=query\)"):
        run(*ask, "data.prompt_column=query")


def test_what_a_training_shows_are_completed_prompts(gsm8k):

    for law in ([], ["parameterization=ar"]):
        experiment = Experiment(compose_config([*FEW_PROBLEMS, *law]), "a test")
        data = experiment.build.data()
        sampled = draw(
            experiment.build.diffusion(data).eval(), data, Drawing(experiment.build.drawing().sampler), 3, 3, seed=1
        )
        prompts = [encode(data.tokenizer, [parts_of(text, ends)[0]])[0]
                   for text, ends in zip(*(data.texts("validation")[name] for name in ("text", "ends")), strict=True)]  # fmt: skip # noqa: E501
        for text in sampled:
            given = text.steps.count(0)
            assert text.ids[1:given] in prompts and text.ids[0] == data.vocabulary.bos_id


def test_the_baseline_is_the_same_text_wrapped(gsm8k):
    data = Experiment(compose_config([*TINY, "data=gsm8k_baseline", "model.length=32"]), "a test").build.data()
    first = data.texts("train")["text"][0]
    assert first.startswith("Question: Ann has ") and "\nAnswer: There are <<" in first
    assert not data.prompted and data.packing("train").wrap


@pytest.mark.parametrize("name", ["train_gsm8k_bd3lm.sh", "test_gsm8k_bd3lm.sh"])
def test_scripts_are_sound(name):
    path = ROOT / "scripts" / "train" / name
    text = path.read_text()
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    settings = text.split("settings=(")[1].split(")")[0].replace('"$BLOCK_SIZE"', "4").split()
    assert {"algo=bd3lm", "block_size=4", "data=gsm8k_baseline"} <= set(settings)
    assert 'BLOCK_SIZE="${BLOCK_SIZE:-4}"' in text and 'training.from_pretrained="$PRETRAIN_CKPT"' in text
    if "bd3lm" not in SPELLINGS["algo"][1]:  # the objective comes from elsewhere
        settings = [s for s in settings if not s.startswith(("algo=", "block_size="))]
    assert compose_config(settings).data.name == "gsm8k_baseline"
