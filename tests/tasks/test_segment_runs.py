"""Texts in segments from files to answers: batches, completions per part, the whole program."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from palimpsest.corpora.gsm8k import check_planned_answer
from palimpsest.data.collate import Collate, segment_ends
from palimpsest.data.packing import Packing, pack
from palimpsest.data.rows import from_table, in_parts, text_table
from palimpsest.data.tokenizers import encode, encode_after, load_tokenizer, vocabulary
from palimpsest.data.unigram import token_counts
from palimpsest.evaluation.completions import CompletionRequest, complete
from palimpsest.evaluation.drawing import Drawing, SamplingContext, _unpadded_places, draw
from palimpsest.experiment import running
from palimpsest.experiment.experiment import Experiment
from palimpsest.models.checkpoints import Checkpoint, read_checkpoint
from palimpsest.models.compatibility import check_compatible
from palimpsest.objectives.base import counted_mask, scored_mask
from palimpsest.settings.command_line import compose_config, explain
from palimpsest.settings.identity import identity
from tests.helpers import commands
from tests.helpers.commands import FEW_PROBLEMS
from tests.helpers.exact import written

PARTS = [["Q: a b\n", "P: c\n", "E: d e"], ["Q: b\n", "P: c d e a\n", "E: d"]]
SEGMENTS = [*FEW_PROBLEMS, "data=gsm8k_plan", "algo=bd3lm", "data.segments=true", "data.segment_room=16",
            "model.length=80"]  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    texts = ["".join(parts) for parts in PARTS]
    return load_tokenizer("word", texts=lambda: texts, cache_dir=tmp_path_factory.mktemp("tokenizer"))


def rows_of(words, tmp_path, **settings):
    texts, ends = in_parts(PARTS)
    rows = from_table(text_table(texts, ends=ends)).add_column("text_id", np.arange(2))
    packing = Packing(**{"length": 24, "wrap": False, "bos": True, "long_texts": "drop", "room": 8, **settings})
    return pack(rows, words, vocabulary(words), packing, tmp_path)


# -------------------------------------------------------------------------------- segments


def test_parts_between_end_with_eos_and_stand_in_rooms(words, tmp_path):
    rows, _ = rows_of(words, tmp_path)
    vocab, columns = vocabulary(words), rows[:]
    batch = Collate(24, vocab.eos_id, {vocab.bos_id}, fill=True, segments=True, room=8)(columns)
    for row, parts in enumerate(PARTS):
        question, *behind = (f(words, [part])[0] for f, part in zip((encode, encode_after, encode_after), parts))  # noqa: B905
        (plan, execution), eos = behind, [vocab.eos_id]
        own = [vocab.bos_id, *question, *plan, vocab.eos_id, *execution, vocab.eos_id]
        assert rows[row]["input_ids"].tolist() == own and int(rows[row]["length"]) == len(own)
        first = 1 + len(question)
        assert batch["segment_ends"][row].tolist() == [first, first + 8]
        ids, fill = batch["input_ids"][row], batch["eos_padding"][row]
        assert ids[~fill].tolist() == own and (ids[fill] == vocab.eos_id).all()
        assert ids[first : first + 8].tolist() == plan + eos * (8 - len(plan))
        assert fill[first : first + 8].tolist() == [False] * (len(plan) + 1) + [True] * (7 - len(plan))
        assert batch["observed"][row].tolist() == [place < first for place in range(24)]
        assert int(counted_mask(batch)[row].sum()) == len(plan) + len(execution) + 2
        assert int(scored_mask(batch)[row].sum()) == 24 - first


def test_rooms_that_do_not_hold_their_part_or_all_parts(words, tmp_path):
    longest = len(encode(words, [PARTS[1][1]])[0]) + 1
    assert len(rows_of(words, tmp_path, room=longest)[0]) == 2
    rows, figures = rows_of(words, tmp_path, room=longest - 1)
    assert rows["text_id"][:].tolist() == [0] and figures["long"] == 1
    with pytest.raises(
        ValueError,
        match=rf"part of text 1 has {longest} tokens with its EOS, more than "
        rf"data.segment_room={longest - 1}; raise it, or set data.long_texts=drop",
    ):
        rows_of(words, tmp_path, room=longest - 1, long_texts="error")
    needed = 1 + max(len(encode(words, [q])[0]) + len(encode(words, [e])[0]) for q, _, e in PARTS) + 8 + 1
    assert len(rows_of(words, tmp_path, length=needed)[0]) == 2
    with pytest.raises(
        ValueError, match=f"1 of 2 texts are longer than model.length={needed - 1} .*longest has {needed}"
    ):
        rows_of(words, tmp_path, length=needed - 1, long_texts="error")
    with pytest.raises(ValueError, match="or have parts longer than data.segment_room=2; raise either"):
        rows_of(words, tmp_path, room=2)
    with pytest.raises(ValueError, match="have 3 parts, and where one ends .*data.segment_room"):
        segment_ends(np.array([4]), 2, None)
    assert segment_ends(np.array([4, 7]), 1, None).tolist() == [[4], [7]]


def test_a_text_is_read_part_by_part():
    eos, ids = 9, [9, 1, 2, 3, 9, 9, 4, 5, 9, 9]
    assert _unpadded_places(ids, eos, [3, 6]) == [0, 1, 2, 3, 4, 6, 7, 8]
    assert _unpadded_places(ids, eos, [3, 4]) == [0, 1, 2, 3, 4] and _unpadded_places(ids, 7, [3, 6]) == list(range(10))
    assert (
        _unpadded_places(ids, eos, [1]) == [0, 1, 2, 3, 4]
        and _unpadded_places(ids, None, [1]) == list(range(10))
        and _unpadded_places([9], 9, [1]) == [0]
    )


# -------------------------------------------------------------------------------- the whole program


def run(*arguments):
    return commands.run(*SEGMENTS, *arguments)


def refused(said, *arguments):
    commands.refused(said, *SEGMENTS, *arguments)


def test_training_likelihood_and_answers(gsm8k):  # noqa: F811
    trained = run("eval.generate_samples=true", "training.gradient_checkpointing=true")
    assert run("mode=ppl_eval")["unigram_nats_per_token"].value > 0
    known = read_checkpoint(trained["checkpoint"]).settings
    assert known["data.segments"] is True and known["data.segment_room"] == 16 and known["block_size"] == 80
    results = run("mode=sample_eval", "sampling.samples_per_prompt=2")
    assert set(results["findings"]) == {"plan as the reference's", "plan carried out", "plan's calculations right"}
    folder = next(gsm8k.rglob("samples.jsonl")).parent
    assert "plan carried out" in (folder / "report.html").read_text()
    for row in map(json.loads, (folder / "samples.jsonl").read_text().splitlines()):
        assert row["steps"][: row["prompt_tokens"]] == [0] * row["prompt_tokens"] and len(row["findings"]) == 3
    at = f"eval.checkpoint_path={trained['checkpoint']}"
    refused("add: data.segments=True", "data.segments=false", "mode=ppl_eval", at)
    refused("data.segment_room=16", "data.segment_room=18", "mode=ppl_eval", at)
    refused("nor can segments", "model.length=96", "mode=sample_eval", at)


def test_a_question_and_its_answer_are_segments_too(gsm8k):  # noqa: F811
    settings = [argument for argument in SEGMENTS if not argument.startswith(("data=gsm8k_plan", "data.segment_room"))]
    data = Experiment(compose_config(settings), "a test").build.data()
    batch = data.collate(data.split("train")[:4])
    assert torch.equal(torch.arange(80) < batch["segment_ends"], batch["observed"])
    assert data.segment_ends(np.array([5, 6])).tolist() == [[5], [6]]


def test_answers_are_checked_part_by_part(gsm8k):  # noqa: F811
    """A sampler that knows the answers: its text comes back without the padding of either part."""
    experiment = Experiment(compose_config([*SEGMENTS, "data.max_test_texts=null"]), "a test")
    data = experiment.build.data()
    diffusion = experiment.build.diffusion(data).eval()
    torch.nn.init.normal_(diffusion.backbone.head.weight, generator=torch.Generator().manual_seed(0))
    rows = data.split("test")
    mask_id = diffusion.objective.process.mask_id
    eos_id = data.vocabulary.eos_id
    batch = data.collate(rows[:])

    def oracle(model, x_BL, noise, segment_ends, **cond):
        out = x_BL.clone()
        for row, ends in zip(out, segment_ends, strict=True):
            (same,) = [n for n in range(len(rows)) if torch.equal(batch["input_ids"][n][: ends[0]], row[: ends[0]])
                       and batch["segment_ends"][n][0] == ends[0]]  # fmt: skip
            assert torch.equal(batch["segment_ends"][same], ends) and (row[ends[0] :] == mask_id).all()
            row[:] = batch["input_ids"][same]
            if same == 0:  # ends neither its plan nor its execution
                row[ends[0] :] = torch.where(row[ends[0] :] == eos_id, row[ends[0] + 1], row[ends[0] :])
        return written(x_BL, out, mask_id)

    trainer, request = experiment.trainer("sample_eval"), CompletionRequest("test", None, 1, experiment.build.judge)
    completed = complete(SamplingContext(trainer, diffusion, data, Drawing(oracle), 1), request)
    assert len(completed) == 12 and [c.ended[0] for c in completed] == [False] + [True] * 11
    for c, row in zip(completed[1:], rows.select(range(1, 12)), strict=True):
        assert c.answers[0].right and set(c.answers[0].findings.values()) == {True}
        assert c.completions[0].split() == c.reference.split() and c.sampled[0].ids == row["input_ids"].tolist()
        assert c.answers[0] == check_planned_answer(c.reference, c.reference)
        assert len(c.sampled[0].steps) == len(c.sampled[0].ids)
    longest = max(c.prompt_tokens for c in completed)
    short = Experiment(compose_config([*SEGMENTS, f"model.length={longest + 16}"]), "a test")
    none = complete(SamplingContext(trainer, diffusion, short.build.data(), experiment.build.drawing(), 1), request)
    assert {c.prompt_tokens == longest for c in none if not c.sampled} == {True} and any(c.sampled for c in none)
    shown = draw(diffusion, data, experiment.build.drawing(), 3, 3, seed=1)
    assert all(text.ids[: text.steps.count(0)][0] == data.vocabulary.bos_id for text in shown)


def test_baselines_count_what_a_text_has(gsm8k):  # noqa: F811
    """The EOS of the plan counts, padding does not."""
    plain, segments = (
        Experiment(compose_config([*SEGMENTS, *more]), "a test").build.data() for more in (["data.segments=false"], [])
    )
    difference = token_counts(segments)[0] - token_counts(plain)[0]
    assert difference[segments.vocabulary.eos_id] == len(segments.split("train")) == difference.sum()


def test_rooms_belong_to_the_identity_of_segments_only():
    plain, segments = [FEW_PROBLEMS[0], "data=gsm8k_plan"], ["data=gsm8k_plan", "algo=bd3lm", "data.segments=true"]
    for arguments, differ in ((plain[1:], False), (segments, True)):
        known = [identity(compose_config([*arguments, *room])) for room in ([], ["data.segment_room=40"])]
        assert (known[0] != known[1]) == differ and ("data.segment_room" in known[0]) == differ
        assert not any(key.startswith("data.build.judge") for key in known[0])


@pytest.mark.parametrize(("arguments", "said"), [
    (["block_size=4"], "block_size=4 contradicts data.segments=true: blocks are the parts of a text"),
    (["sampling.predictor=ddpm_cache"], "sampling.predictor=palimpsest.samplers.* contradicts data.segments=true"),
    (["sampling.var_length=true"], "sampling.var_length=true contradicts|sampling.var_length=True contradicts"),
    (["sampling.context=8"], "sampling.context=8 contradicts data.segments=true"),
    (["data.fill=null"], "data.segments=true with data.fill=null would show how long each part is"),
    (["data.long_texts=truncate"], "data.long_texts=truncate might cut a part that others rest on"),
    (["data.segments=maybe"], "data.segments=maybe must be true or false"),
    (["data.segment_room=wide"], "data.segment_room=wide must be a whole number"),
    (["data.segment_room=0"], "data.segment_room=0 must be a whole number from 2"),
    (["data.segment_room=null"], "have 3 parts, and where one ends"),
    (["data.segment_room=3"], "data.long_texts=drop leaves no text"),
    (["parameterization=ar"], "(Ar|AR) does not use; set it to false"),
])  # fmt: skip
def test_mistakes_are_explained(gsm8k, arguments, said):  # noqa: F811
    law = [a for a in SEGMENTS if a != "algo=bd3lm"] if "parameterization=ar" in arguments else SEGMENTS
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - explain() is what is tested
        running.run(compose_config([*law, *arguments]), "a test")
    assert re.search(said, explain(caught.value)), explain(caught.value)


def test_a_model_of_plain_blocks_is_no_model_of_segments():
    sizes = {"block_size": 80}
    plain = Checkpoint("x.ckpt", {}, identity={"configuration": sizes}, settings=sizes)
    data = SimpleNamespace(vocabulary=SimpleNamespace(fingerprint=None, size=9, own_size=9), latents=None)
    shape = ("block_size", "data.segments")
    check_compatible(plain, {"block_size": 80}, shape, data)
    with pytest.raises(ValueError, match="add: data.segments=False"):
        check_compatible(plain, {"block_size": 80, "data.segments": True}, shape, data)
    foreign = Checkpoint("x.ckpt", {})
    check_compatible(foreign, {"data.segments": True}, shape, data)  # a file that says nothing contradicts nothing
