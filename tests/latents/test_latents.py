"""Latents of texts: each row has its own, standardised by train and nothing else, never a vector of zeros."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch

from palimpsest.data.tokenizers import encode
from palimpsest.latents.attributes import Attributes
from palimpsest.latents.hf import Pretrained
from palimpsest.latents.hidden_states import HiddenStates
from palimpsest.latents.lsa import LSA
from palimpsest.latents.quality import drop_words, probe, retrieval
from palimpsest.latents.shards import Shards
from palimpsest.latents.space import Mapped, Sharded, fit_space
from palimpsest.models.checkpoints import Checkpoint
from palimpsest.models.compatibility import check_compatible
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity
from tests.helpers.commands import refused
from tests.helpers.latent_data import Given, Unit, data_with, some_texts


class Listed:
    """Vectors in memory."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors, self.width = vectors, vectors.shape[1]

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.vectors[rows]


def all_latents(data, split: str) -> torch.Tensor:
    """By text_id, out of batches."""
    batches = list(data.eval_dataloader(split))
    order = torch.cat([batch["text_id"] for batch in batches]).argsort()
    return torch.cat([batch["latent"] for batch in batches])[order]


# -------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("encoder", [lambda: LSA(dim=8), lambda: Unit(32)], ids=["lsa", "unit vectors"])
def test_latents_of_train_have_mean_0_and_scale_1(tmp_path, encoder):
    """Unit vectors have 1 / sqrt(32) = 0.18 a number, which would be 15 dB below what the noise schedule assumes."""
    data = data_with(encoder(), tmp_path)
    latent = all_latents(data, "train")
    assert latent.dtype == torch.float32 and latent.shape == (120, 1, data.latents.shape[1])
    assert latent.mean(0).abs().max() < 0.02 and (latent.std(0, correction=0) - 1).abs().max() < 0.02
    raw = data.latents.encoder.encode(data.latents.packed("train")[np.arange(120)])
    np.testing.assert_allclose(data.latents.restore(latent.numpy())[:, 0], raw, atol=1e-6)
    torch.testing.assert_close(data.latents.restore(latent)[:, 0], torch.from_numpy(raw), atol=1e-6, rtol=0)
    np.testing.assert_allclose(data.latents.vectors(latent.numpy()), raw, atol=1e-6)


def test_everything_is_fitted_on_train_alone(tmp_path):
    def fitted(**settings):
        latents = data_with(LSA(dim=8), tmp_path, **settings).latents
        return latents.fingerprint, latents.mean, latents.encoder.arrays()["components"]

    first = fitted()
    other_validation = fitted(source=Given(validation=["bread " * 9, "salt sea river"] * 20))
    other_train = fitted(source=Given(train=some_texts(120, 5)))
    one_class = fitted(label=1)
    for same in (other_validation, one_class):
        assert same[0] == first[0] and all(np.array_equal(a, b) for a, b in zip(same[1:], first[1:], strict=True))
    assert other_train[0] != first[0] and not np.allclose(other_train[1], first[1])
    assert fitted(max_train_texts=60)[0] != first[0]


def test_principal_components_dead_numbers_and_parts():
    rng = np.random.default_rng(0)
    spread = np.array([3.0, 0.1, 1.0, 0, 2.0, 0.5])
    vectors = (5 + rng.normal(size=(5000, 6)) * spread).astype(np.float32)
    whole = fit_space(Listed(vectors), None, 1, "x")
    assert whole.shape == (1, 5), "a number that never varies has no scale, and some encoders have such"
    np.testing.assert_allclose(whole.vectors(whole.standardise(vectors)), vectors, atol=1e-4)
    two = fit_space(Listed(vectors), 2, 2, "x")
    latent = two.standardise(vectors)
    assert two.shape == (2, 1) and np.abs(latent.mean(0)).max() < 1e-5 and np.abs(latent.std(0) - 1).max() < 1e-5
    np.testing.assert_allclose(np.abs(two.std_KD[:, 0]), [3, 2], rtol=0.05)
    assert abs(np.corrcoef(latent[:, 0, 0], vectors[:, 0])[0, 1]) > 0.999
    residual = np.square(two.vectors(latent) - vectors).sum(1).mean()
    assert residual == pytest.approx(0.01 + 1 + 0.25, rel=0.1), "what two components leave out"
    mistakes = {(7, 1): "latents.dim=7 is more", (6, 1): "5 directions", (5, 2): "latents.tokens=2",
                (None, 2): "latents.tokens=2"}  # fmt: skip
    for (dim, tokens), message in mistakes.items():
        with pytest.raises(ValueError, match=message):
            fit_space(Listed(vectors), dim, tokens, "x")


# -------------------------------------------------------------------------------- rows


def test_every_batch_carries_the_latents_of_its_rows(tmp_path):
    data = data_with(LSA(dim=8), tmp_path, seed=3)
    rows = data.split("train")
    place = {int(i): n for n, i in enumerate(rows["sample_id"][:])}
    for batch in data.train_dataloader():
        ids = [rows[place[int(i)]]["input_ids"] for i in batch["sample_id"]]
        np.testing.assert_allclose(batch["latent"].numpy(), data.latents.encode(ids), atol=1e-6)
    of = data.latents.of("validation")
    np.testing.assert_array_equal(all_latents(data, "validation").numpy(), of[np.arange(30)])


def test_vectors_are_made_once_and_never_sent_to_workers(tmp_path):
    data_with(first := Unit(), tmp_path).latents.of("validation")
    again = data_with(second := Unit(), tmp_path)
    assert first.calls == 2 and again.latents.of("validation") and second.calls == 0
    data_with(third := Unit(), tmp_path, source=Given(validation=some_texts(30, 8))).latents.of("validation")
    assert third.calls == 1, "other texts, other vectors; those of train are kept"
    store = again.latents.of("train").store
    assert isinstance(store[np.arange(3)], np.ndarray) and len(pickle.dumps(store)) < 1000
    shards = Sharded([store.path], store.width, np.zeros(120, int), np.arange(120))
    shards[np.arange(3)]
    assert len(pickle.dumps(shards)) < 5000 and isinstance(store, Mapped)


def test_a_text_without_a_vector_ends_the_run_and_is_named(tmp_path):
    texts = some_texts(30, 1)
    with pytest.raises(ValueError, match=f"validation split, row 4 .*{texts[4][:20]}.* all zeros"):
        data_with(Unit(broken=(texts[4],)), tmp_path, source=Given(validation=texts)).latents.of("validation")
    unknown = [*some_texts(30, 1), "zzz qqq"]  # no token that train has: nothing is known of it
    with pytest.raises(ValueError, match="all zeros"):
        data_with(LSA(dim=8), tmp_path, source=Given(validation=unknown)).latents.of("validation")
    with pytest.raises(ValueError, match="latents.dim=500: the 120 texts"):
        data_with(LSA(dim=500), tmp_path).latents.of("train")
    for settings in ({"streaming": True, "long_texts": "drop"}, {"wrap": True, "random_crop": True}):
        with pytest.raises(ValueError, match="latents=none"):
            data_with(Unit(), tmp_path, insert_train_special=False, **settings)


# -------------------------------------------------------------------------------- the gate


def test_the_gate_tells_latents_of_the_text_from_others(tmp_path):
    data = data_with(LSA(dim=16), tmp_path, source=Given(validation=some_texts(200, 3, 20, 22)), length=64)

    def latents(texts):
        return data.latents.encode(encode(data.tokenizer, texts))

    found = retrieval(latents, data.source.of["validation"])
    assert found.share > 0.8 and found.texts == 200 and found.chance == 1 / 200
    calls = itertools.count()
    strangers = retrieval(lambda texts: np.roll(latents(texts), next(calls), axis=0), data.source.of["validation"])
    assert strangers.share < 0.05
    assert drop_words("a b c", 1.0, np.random.default_rng(0)) in ("a", "b", "c")
    rng = np.random.default_rng(0)
    known, noise = rng.integers(0, 3, (400, 1)), rng.normal(size=(400, 1, 5))
    informative = noise + 9 * (known[..., None] == np.arange(5))
    assert probe(informative[:300], known[:300], informative[300:], known[300:])[0] > 0.99
    assert probe(noise[:300], known[:300], noise[300:], known[300:])[0] < 0.6


# -------------------------------------------------------------------------------- checkpoints and commands


def test_a_checkpoint_knows_its_latents(tmp_path):
    data, other = data_with(Unit(), tmp_path), data_with(Unit(16), tmp_path)
    checkpoint = Checkpoint(tmp_path / "x.ckpt", {}, identity={"latents": data.latents.facts})
    assert data.latents.facts["shape"] == [1, 32] and data.latents.facts["encoder"] == "unit"
    check_compatible(checkpoint, {}, (), data)
    check_compatible(Checkpoint(tmp_path / "texts_alone.ckpt", {}), {}, (), data)
    for wrong in (other, data_with(None, tmp_path)):
        with pytest.raises(ValueError, match="other latents"):
            check_compatible(checkpoint, {}, (), wrong)
    moved = {**data.latents.facts, "mean": (data.latents.mean + data.latents.std).tolist()}
    with pytest.raises(ValueError, match="have other values here"):
        check_compatible(Checkpoint(tmp_path / "x.ckpt", {}, identity={"latents": moved}), {}, (), data)


def test_identity_and_commands():
    plain = identity(compose_config([]))
    assert not any(key.startswith("latents") for key in plain), "runs without latents keep their folders"
    lsa = identity(compose_config(["latents=lsa", "latents.dim=32"]))
    assert {key: lsa[key] for key in lsa if key not in plain} == {
        "latents._target_": "text.latent_lsa.LSA",
        "latents.dim": 32,
        "latents.tokens": 1,
        "latents.fit_rows": 100000,
    }
    assert "latents.batch_size" not in identity(compose_config(["latents=hf"]))
    refused(
        "latents=palimpsest.latents.lsa.LSA: parameterization=subs makes nothing of latents; add algo=mmldlm",
        "latents=lsa",
    )


@pytest.mark.parametrize(("encoder", "settings", "message"), [
    (HiddenStates, {"checkpoint_path": None}, "latents.checkpoint_path="),
    (Pretrained, {"name_or_path": None}, "latents.name_or_path="),
    (Attributes, {"attributes": ["mood"]}, r"latents.attributes=\[mood\] must be some of class"),
    (Shards, {"path": None}, "latents.path="), (Shards, {"path": "nowhere"}, "no metadata.json"),
], ids=str)  # fmt: skip
def test_mistakes_name_the_key_and_the_value(encoder, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        encoder(**settings)
