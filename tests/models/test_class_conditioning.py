"""Class-conditional networks: the class changes the output, and no class leaves it unchanged."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from palimpsest.common.positions import Positions
from palimpsest.common.randomness import KeyedNoise, evaluation_noise
from palimpsest.models.ar import AR
from palimpsest.models.checkpoints import Checkpoint
from palimpsest.models.class_conditioning import UNCONDITIONAL, num_classes_of, start_from_counts, with_class
from palimpsest.models.dit import DiT
from palimpsest.models.hf_mlm import HFMaskedLM
from palimpsest.noise_schedule import LogLinear
from palimpsest.objectives.ar import AR as ARLaw  # noqa: N811
from palimpsest.objectives.subs import Subs
from palimpsest.process import Absorbing
from palimpsest.samplers.autoregressive import sample

VOCAB, MASK, CLASSES = 7, 6, 3


def dit(num_classes: int = CLASSES) -> DiT:
    torch.manual_seed(0)
    net = DiT(VOCAB, 16, 8, 2, 2, dropout=0.0, num_classes=num_classes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


def ar() -> AR:
    torch.manual_seed(0)
    net = AR(VOCAB, 16, 2, 2, dropout=0.0, num_classes=CLASSES)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


TOKENS = torch.tensor([[0, 6, 2, 6, 1], [3, 6, 6, 4, 5]])
ZERO = torch.zeros(2)


@pytest.mark.parametrize("net", [dit(), ar()], ids=["dit", "ar"])
def test_each_class_gives_another_law_and_silence_is_no_class(net):
    logits = [net.head(net.encode(TOKENS, ZERO, class_id=torch.full((2,), k))) for k in (UNCONDITIONAL, 0, 1, 2)]
    assert torch.equal(logits[0], net(TOKENS, ZERO)), "no class_id is the class that label dropout assigns"
    for a in range(4):
        for b in range(a):
            assert not torch.allclose(logits[a], logits[b], atol=1e-3)
    mixed = net.head(net.encode(TOKENS, ZERO, class_id=torch.tensor([2, UNCONDITIONAL])))
    torch.testing.assert_close(mixed, torch.stack([logits[3][0], logits[0][1]]))


@torch.no_grad()
def silence(net: torch.nn.Module) -> None:
    for parameter, columns in net.class_parameters:
        parameter[:, columns] = 0


def test_where_the_trunk_is_told_nothing_only_the_bias_of_the_class_is_left():
    net = dit()
    silence(net)
    conditional, unconditional = (
        net.head(net.encode(TOKENS, ZERO, class_id=torch.full((2,), k))) for k in (1, UNCONDITIONAL)
    )
    torch.testing.assert_close(conditional - unconditional, net.head.weight[:, 16 + 1].expand_as(conditional))


def test_the_class_gets_through_whatever_the_network_has_made_of_the_time_that_it_is_not_shown():
    net = dit()
    torch.nn.init.constant_(net.sigma_map.mlp[2].bias, -40.0)  # silu is 0 there
    torch.nn.init.zeros_(net.head.weight[:, 16:])
    logits = [net.head(net.encode(TOKENS, ZERO, class_id=torch.full((2,), k))) for k in (0, 1)]
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["class_embed.embedding", "class_shift.embedding"])
def test_weights_of_a_dit_that_read_the_class_as_an_embedding_are_refused(name):
    net = dit()
    state = dit(0).state_dict() | {name: torch.zeros(CLASSES, 8)}
    with pytest.raises(ValueError, match="does not fit the model"):
        Checkpoint("x.ckpt", ar().state_dict()).load_into(net)
    with pytest.raises(ValueError, match="x.ckpt was trained when a DiT read the class as an embedding"):
        Checkpoint("x.ckpt", state).load_into(net)


def test_the_number_of_classes_is_told_by_the_weights():
    assert [num_classes_of(net.state_dict()) for net in (dit(), ar(), hf_mlm())] == [CLASSES] * 3
    assert not num_classes_of(hf_mlm(0).state_dict())
    for name in ("sigma_map.mlp.2.bias", "output_layer.adaLN_modulation.weight"):
        assert not num_classes_of(dit().state_dict() | {name: torch.tensor(1.0)}), "a malformed file"
    with pytest.raises(ValueError, match="Set classify.sharing= and classify.bigrams= .*as they were in training"):
        Checkpoint("x.ckpt", dit().state_dict()).load_into(dit(0))


def test_chosen_positions_are_those_of_the_whole_row():
    net, at = dit(), TOKENS == MASK
    class_id = torch.tensor([2, 0])
    torch.testing.assert_close(
        net.encode(TOKENS, ZERO, at=Positions(at), class_id=class_id), net.encode(TOKENS, ZERO, class_id=class_id)[at]
    )


def test_a_network_that_knows_no_classes_has_the_shapes_of_one_that_never_will():
    assert not num_classes_of(dit(0).state_dict()) and dit(0).head.in_features == 16
    assert with_class(torch.zeros(2, 5, 4), torch.tensor([1, UNCONDITIONAL]), 3)[..., 4:].sum((1, 2)).tolist() == [5, 0]


def test_the_loss_and_the_sampler_hand_the_class_on():
    objective, net = Subs(LogLinear(), Absorbing(MASK)), dit()
    clean = TOKENS.clamp(max=5)
    noise = lambda: evaluation_noise(0, torch.arange(2))  # noqa: E731
    nll = [objective.loss(net, {"input_ids": clean, "class_id": torch.full((2,), k)}, noise()).nll_BL for k in (0, 1)]
    assert not torch.allclose(*nll)
    model, start = ARLaw(Absorbing(MASK)).model(ar()), torch.tensor([[0, MASK, MASK, MASK, MASK, MASK]]).expand(8, -1)
    draws = {
        (k, cache): sample(
            model, start, KeyedNoise(1, torch.arange(8)), kv_cache=cache, class_id=torch.full((8,), k)
        ).ids_BL
        for k in (0, 1) for cache in (True, False)
    }  # fmt: skip
    assert torch.equal(draws[0, True], draws[0, False]) and torch.equal(draws[1, True], draws[1, False])
    assert not torch.equal(draws[0, True], draws[1, True])


def test_training_begins_at_the_counts_of_each_class():
    counts_CV = torch.tensor([[5.0, 0, 3, 1, 0, 2, 0], [0, 4, 1, 1, 9, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    torch.manual_seed(0)
    net = DiT(VOCAB, 16, 8, 1, 2, num_classes=CLASSES)
    start_from_counts(net.head, counts_CV)
    law_CV = ((counts_CV + 1) / (counts_CV + 1).sum(-1, keepdim=True)).log()
    for k in range(CLASSES):
        logits = net.head(net.encode(TOKENS, ZERO, class_id=torch.full((2,), k)))
        torch.testing.assert_close(logits.log_softmax(-1), law_CV[k].expand_as(logits), atol=1e-5, rtol=0)
    before, after = counts_CV.sum(0), counts_CV[1:2]
    start_from_counts(net.head, after, before)
    torch.testing.assert_close(net(TOKENS, ZERO).log_softmax(-1), law_CV[1].expand(2, 5, -1), atol=1e-5, rtol=0)


def hf_mlm(num_classes: int = CLASSES) -> HFMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = AutoConfig.for_model("bert", **sizes, tie_word_embeddings=True, max_position_embeddings=8)
    return HFMaskedLM(config, VOCAB, dropout=0.0, num_classes=num_classes).eval()


def test_a_network_of_the_library_is_told_classes_beside_its_tied_head():
    net, plain = hf_mlm(), hf_mlm(0)
    assert net.head.linear.weight is net.model.get_input_embeddings().weight, "the head is still tied"
    own = {name for name, _ in net.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert {"class_embed.embedding", "head.class_bias"} <= own
    unconditional = net(TOKENS)
    plain.load_state_dict({name.replace("head.linear", "head"): value for name, value in net.state_dict().items()
                           if "class_" not in name})  # fmt: skip
    torch.testing.assert_close(unconditional, plain(TOKENS))
    torch.nn.init.normal_(net.head.class_bias)
    logits = [net.head(net.encode(TOKENS, class_id=torch.full((2,), k))) for k in range(CLASSES)]
    for a in range(CLASSES):
        for b in range(a):
            assert not torch.allclose(logits[a], logits[b], atol=1e-3)
    silence(net)
    conditional = net.head(net.encode(TOKENS, class_id=torch.full((2,), 1)))
    torch.testing.assert_close(conditional - unconditional, net.head.class_bias[:, 1].expand_as(conditional))


def test_the_classes_of_a_tied_head_start_at_counts_too():
    net, counts_CV = hf_mlm(), torch.randint(1, 9, (CLASSES, VOCAB))
    start_from_counts(net.head, counts_CV)
    frequencies_CV = (counts_CV + 1.0).log().log_softmax(1)
    all_V = (counts_CV.sum(0) + 1.0).log().log_softmax(0)
    torch.testing.assert_close(net.head.class_bias.T, frequencies_CV - all_V)
    torch.testing.assert_close(net.head.bias, all_V)
