"""Sampling through the whole program: prefixes, templates, seeds, strides, and observed tokens."""

from __future__ import annotations

import copy
import json

import pytest

from palimpsest.data.tokenizers import encode, load_tokenizer, vocabulary
from palimpsest.evaluation.drawing import Drawing, SampledTokens, decoded, draw
from palimpsest.evaluation.sampling_inputs import STRETCH, Template
from palimpsest.process import Uniform
from palimpsest.settings.command_line import explain
from tests.helpers.commands import TINY, run


def sampled(experiment, data, diffusion, number=5, size=5):
    return draw(diffusion, data, experiment.build.drawing(), number, size, seed=1)


WRAPPED = ["data.wrap=true", "model.length=32"]


@pytest.mark.parametrize("overrides", [[], WRAPPED, ["parameterization=ar"], [*WRAPPED, "parameterization=ar"],
                                       ["data.score_special=true"]], ids=" ".join)  # fmt: skip
def test_a_prefix_is_kept_verbatim(untrained, overrides):
    built = untrained("sampling.prefix=the plot is dull", *overrides)
    data = built[1]
    wanted = data.tokenizer("the plot is dull", add_special_tokens=False)["input_ids"]
    for text in sampled(*built):
        start = int(text.ids[0] == data.vocabulary.bos_id)
        assert text.ids[start : start + len(wanted)] == wanted
        assert text.steps[: start + len(wanted)] == [0] * (start + len(wanted))
        assert len(text.ids) > start + len(wanted) and data.vocabulary.mask_id not in text.ids


@pytest.mark.parametrize("overrides", [[], WRAPPED], ids=["padded", "wrapped"])
def test_a_template_is_filled_and_nothing_else_changes(untrained, overrides):
    built = untrained("sampling.template=the [MASK] is {{3}} and dull", *overrides)
    data = built[1]
    encode = lambda text: data.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for text in sampled(*built):
        start = int(text.ids[0] == data.vocabulary.bos_id)
        body = text.ids[start:]
        assert body[0] == encode("the")[0] and body[2] == encode("is")[0] and body[6:8] == encode("and dull")
        filled = [i for i, step in enumerate(text.steps[start:]) if step]
        assert filled[:4] == [1, 3, 4, 5]
        if overrides:
            assert len(text.ids) == data.length
        else:
            assert filled == [1, 3, 4, 5] and len(body) == 8 + (body[-1] == data.vocabulary.eos_id)


@pytest.mark.parametrize("overrides", [
    [], ["parameterization=ar"], ["sampling.predictor=analytic"], ["sampling.predictor=first_hitting"],
    [*WRAPPED, "sampling.semi_ar=true", "sampling.stride_length=8", "sampling.num_strides=2"],
], ids=["ddpm_cache", "ar", "analytic", "first_hitting", "semi_ar"])  # fmt: skip
def test_a_text_does_not_depend_on_its_batch(untrained, overrides):
    built = untrained(*overrides)
    together, alone = sampled(*built), sampled(*built, size=1)
    assert [text.ids for text in together] == [text.ids for text in alone]
    assert [text.evaluations for text in together] == [text.evaluations for text in alone] or "ar" in overrides[-1:]
    if "sampling.semi_ar=true" in overrides:
        assert all(len(text.ids) == 32 + 2 * 8 for text in together)


def test_causal_texts_end_where_the_model_ends_them(untrained):
    _, data, diffusion = built = untrained("parameterization=ar")
    for text in sampled(*built, number=20, size=20):
        assert text.ids[0] == data.vocabulary.bos_id and data.vocabulary.eos_id not in text.ids[1:-1]


@pytest.mark.parametrize(("overrides", "said"), [
    (["sampling.prefix='" + "the " * 79 + "the'"], "sampling.prefix has 80 tokens"),
    (["parameterization=ar", "sampling.template=the {{2}} is dull"], "sampling.prefix, not sampling.template"),
    (["sampling.semi_ar=true"], "data.wrap=true"),
    (["sampling.max_length=2"], "sampling.max_length=2 leaves no token to write"),
    (["sampling.max_length=4", "sampling.prefix=the plot is"], "too many for sampling.max_length=4"),
])  # fmt: skip
def test_what_cannot_be_sampled_is_refused(untrained, overrides, said):
    built = untrained(*overrides)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - explain() is what is tested
        sampled(*built, number=16, size=16)
    assert said in explain(caught.value)


def test_templates_are_read_as_they_are_written():
    class Words:
        unk_token_id = -1

        def get_vocab(self):
            return {"a": 1}

        def __call__(self, texts, **kwargs):
            return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    assert Template(template="a bb [MASK] ccc {{2}}").ids(Words(), 9, 12) == [1, 2, 9, 3, 9, 9]
    assert Template(template="[MASK]").ids(Words(), 9, 12) == [9]
    assert Template(prefix="a bb").ids(Words(), 9, 12) == [1, 2]
    assert Template().ids(Words(), 9, 12) == []
    for gaps in ("{{13}}", "{{6}} a {{...}} {{6}}", "{{999999999999}}", "{{" + "9" * 9999 + "}}", "[MASK]" * 13):
        with pytest.raises(ValueError, match=r"sampling.template asks for .* tokens .*too many for model.length=12"):
            Template(template=gaps).ids(Words(), 9, 12)
    assert Template(template="a {{...}} bb").ids(Words(), 9, 12) == Template(template="a {{…}} bb").ids(Words(), 9, 12)
    for blank_id in (9, Uniform.blank_id):
        assert Template(template="a [MASK] {{...}} bb").ids(Words(), blank_id, 12) == [1, blank_id, STRETCH, 2]
        assert blank_id != STRETCH


@pytest.mark.parametrize(("text", "said"), [
    ("no gap", "has no gap"), ("an empty {{0}} one", "of no tokens"), ("two {{...}} and {{…}}", "several gaps"),
])  # fmt: skip
def test_malformed_templates_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        Template(template=text)


UNMASK = ["sampling.predictor=unmask", "sampling.steps=3"]


@pytest.mark.parametrize("overrides", [[], WRAPPED], ids=["padded", "wrapped"])
def test_a_gap_of_free_length_takes_the_remaining_length(untrained, overrides):
    _, data, _ = built = untrained("sampling.template=the plot {{...}} and dull", *UNMASK, *overrides)
    before, after = (encode(data.tokenizer, [text])[0] for text in ("the plot", "and dull"))
    lengths = [len(text.ids) for text in sampled(*built)]
    plain = [len(text.ids) for text in sampled(*untrained(*UNMASK, *overrides))]
    assert lengths == plain, "as long as a text without a template"
    for text in sampled(*built):
        start = int(text.ids[0] == data.vocabulary.bos_id)
        end = len(text.ids) - int(text.ids[-1] == data.vocabulary.eos_id)
        assert text.ids[start : start + 2] == before and text.ids[end - len(after) : end] == after
        assert data.vocabulary.mask_id not in text.ids and text.steps[start + 2 : end - len(after)].count(0) == 0


@pytest.mark.parametrize("overrides", [
    [], WRAPPED, ["parameterization=ar", "sampling.predictor=ar"], ["data.fill=eos", "model.length=80"],
    ["sampling.template=the plot is {{…}} dull"],
    ["algo=bd3lm", "block_size=4", "model.length=80", "sampling.predictor=block_unmask"],
], ids=" ".join)  # fmt: skip
def test_max_length_limits_every_text(untrained, overrides):
    prefix = [] if "template" in " ".join(overrides) else ["sampling.prefix=the plot is"]
    _, data, _ = built = untrained(*UNMASK, *prefix, "sampling.max_length=9", *overrides)
    texts = sampled(*built)
    assert all(len(text.ids) <= 9 and data.vocabulary.mask_id not in text.ids for text in texts)
    assert any(len(text.ids) == 9 for text in texts)
    for text in texts:
        assert decoded(text, built[0].build.drawing().inputs, data.tokenizer).startswith("the plot is")
        assert len(text.ids) == len(text.steps) == len(text.confidence)
        assert all((step == 0) == (p == 1.0) for step, p in zip(text.steps, text.confidence, strict=True))


def test_the_first_batch_is_watched(untrained):
    settings, data, diffusion = untrained(*UNMASK)
    frames = []
    texts = draw(
        diffusion, data, settings.build.drawing(), 3, 2, seed=1, watch=lambda trace: frames.append(copy.copy(trace))
    )
    assert [frame.num_steps for frame in frames] == [0, 1, 2, 3] and len(frames[-1].ids_BL) == 2
    assert frames[-1].ids_BL[0, : len(texts[0].ids)].tolist() == texts[0].ids


TYPED = ["The film wasn't bad; it's naïve , and 'odd' \N{EM DASH} really?", " the plot  is\ndull .", "It was "]


@pytest.mark.parametrize("name", ["gpt2", "roberta-base", "bert-base-uncased", "word", "bpe"])
def test_a_prefix_stands_in_the_text_letter_by_letter(request, tmp_path, monkeypatch, name):
    """Also where the tokenizer lowers capitals, drops spaces or does not know a word."""
    if name in ("word", "bpe"):
        size = {"vocab_size": 300} if name == "bpe" else {}
        tokenizer = load_tokenizer(name, texts=lambda: ["the film was odd", *TYPED[:1]], cache_dir=tmp_path, **size)
    else:
        monkeypatch.setenv("DATA_DIR", str(request.getfixturevalue("data_dir")))
        tokenizer = load_tokenizer(name)
    known = vocabulary(tokenizer)
    for typed in TYPED:
        given = Template(prefix=typed)
        fixed = given.ids(tokenizer, known.mask_id, 128)
        for more in ("film", "'s", " , odd"):
            ids = [known.bos_id, *fixed, *encode(tokenizer, [more])[0]]
            text = decoded(
                SampledTokens(ids, [0] * len(ids), [1.0] * len(ids), list(range(len(ids))), 1, 1), given, tokenizer
            )
            assert text.startswith(typed) and (name == "word" or text.endswith(more.strip(" ,"))), text
            assert len(text) <= len(typed) + len(more) + 8, text


def test_the_requested_number_of_samples_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = [*TINY, *UNMASK, "sampling.prefix=The plot", "sampling.num_samples=3", "loader.eval_batch_size=2"]
    run(*ask, "mode=train")
    run(*ask, "mode=sample_eval")
    rows = [json.loads(line) for line in next(tmp_path.rglob("samples.jsonl")).read_text().splitlines()]
    assert len(rows) == 3 and all(row["text"].startswith("The plot") for row in rows)
    assert all(len(row["confidence"]) == len(row["ids"]) and min(row["confidence"]) > 0 for row in rows)


def test_semi_autoregressive_samples_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = [*TINY, *WRAPPED, "sampling.semi_ar=true", "sampling.stride_length=8", "sampling.num_strides=3",
           "loader.eval_batch_size=2"]  # fmt: skip
    run(*ask, "mode=train")
    run(*ask, "mode=sample_eval")
    rows = [json.loads(line) for line in next(tmp_path.rglob("samples.jsonl")).read_text().splitlines()]
    assert [len(row["ids"]) for row in rows] == [32 + 24] * 2 and all(len(row["steps"]) == 56 for row in rows)


def test_sampling_without_observed_tokens_is_the_default():
    assert Drawing(sampler=None).inputs == Template()
