"""Checkpoints: nothing executes, nothing half-loads, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from palimpsest.models.checkpoints import load_inert, read_checkpoint
from palimpsest.models.dit import DiT
from palimpsest.training.storage import AtomicCheckpointIO


def small(vocab_size: int = 5, hidden_size: int = 8) -> DiT:
    torch.manual_seed(0)
    return DiT(vocab_size, hidden_size, cond_dim=4, n_blocks=1, n_heads=2)


def saved(path, net: DiT, **more):
    state = {f"backbone.{name}": tensor for name, tensor in net.state_dict().items()}
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, **more}, path)
    return path


def test_a_network_that_was_told_classes_names_their_settings(tmp_path):
    told = DiT(5, 8, cond_dim=4, n_blocks=1, n_heads=2, num_classes=2)
    with pytest.raises(ValueError, match="Set classify.sharing= and classify.bigrams= .*as they were in training"):
        read_checkpoint(saved(tmp_path / "told.ckpt", told)).load_into(small())
    known = {"configuration": {"classify.sharing": "conditional", "classify.bigrams": 100}}
    with pytest.raises(ValueError, match="Set classify.sharing=conditional and classify.bigrams=100 "):
        read_checkpoint(saved(tmp_path / "ours.ckpt", told, identity=known)).load_into(small())
    with pytest.raises(ValueError, match="Set model=, model.* and backbone= as they were in training"):
        read_checkpoint(saved(tmp_path / "wide.ckpt", small(hidden_size=16))).load_into(small())


class Malicious:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_execute_code_is_refused(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "callbacks": Malicious()}, tmp_path / "evil.ckpt", pickle_protocol=protocol)
    with pytest.raises(ValueError, match=r"asks to run (posix|nt|os)\.system.*refused"):
        read_checkpoint(tmp_path / "evil.ckpt")
    torch.save({"weight": Malicious()}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="refused"):
        load_inert(tmp_path / "old.bin")
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__", "open", "compile", "setattr"])
def test_dangerous_builtins_are_refused(tmp_path, name):
    class Call:
        def __reduce__(self):
            import builtins

            return getattr(builtins, name), ("1",)

    torch.save({"state_dict": {}, "x": Call()}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="refused"):
        read_checkpoint(tmp_path / "evil.ckpt")


@pytest.mark.parametrize("thing", ["ccollections\nCounter\n", "ctorch._utils\n_rebuild_tensor_v2\n"])
def test_a_pickle_can_not_change_what_it_names(tmp_path, thing):
    """BUILD sets attributes on whatever stands before it, also on a class."""
    module, name = thing[1:].split()[:2]
    real = getattr(__import__(module, fromlist=["x"]), name)
    patch = f"{thing}(N(Vchanged\nI01\ndtb.".encode()
    content = b"\x80\x02" + patch
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3")
        file.writestr("archive/byteorder", "little")
    with contextlib.suppress(ValueError):
        load_inert(tmp_path / "x.ckpt")
    assert not hasattr(real, "changed")


@pytest.mark.parametrize(("content", "message"), [
    ({"state_dict": [1]}, "state_dict"), ({"state_dict": {"backbone.x": "text"}}, "state_dict"),
    ({"state_dict": {"backbone.x": torch.zeros(1)}, "identity": 3}, "identity"),
])  # fmt: skip
def test_files_of_other_kinds_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "x.ckpt")


def test_a_raw_pickle_is_refused(tmp_path):
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path / "raw.ckpt")


def test_foreign_objects_become_shells(fixtures_dir):
    content = load_inert(fixtures_dir / "mdlm_subs" / "mdlm.ckpt")
    config = content["hyper_parameters"]["config"]
    assert type(config).__name__ == "DictConfig" and type(config).__module__ == "omegaconf.dictconfig"
    import omegaconf

    assert not isinstance(config, omegaconf.DictConfig), "the real class was never built"


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_truncated_files_give_one_clear_error(tmp_path, keep):
    path = saved(tmp_path / "last.ckpt", small())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated, corrupt"):
        read_checkpoint(path)


def test_corrupted_safetensors_and_missing_files(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage that is no header")
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="eval.checkpoint_path"):
        read_checkpoint(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize(("other", "message"), [
    (small(vocab_size=6), r"vocab_embed.embedding: checkpoint \(6, 8\), model \(5, 8\)"),
    (small(hidden_size=12), r"checkpoint \(12, 8\), model|differences"),
    (DiT(5, 8, cond_dim=4, n_blocks=2, n_heads=2), "blocks.1.*not in the model"),
])  # fmt: skip
def test_weights_of_another_model_are_refused_before_anything_changes(tmp_path, other, message):
    net = small()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        read_checkpoint(saved(tmp_path / "x.ckpt", other)).load_into(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_an_average_of_another_model_is_refused_before_anything_changes(tmp_path):
    net = small()
    ema = {"decay": 0.9, "num_updates": 1, "shadow_params": [torch.ones(3)]}
    path = saved(tmp_path / "x.ckpt", net, ema=ema)
    torch.nn.init.constant_(net.head.weight, 7.0)
    with pytest.raises(ValueError, match="EMA holds 1 tensors that do not fit"):
        read_checkpoint(path).load_into(net)
    assert (net.head.weight == 7.0).all()
    read_checkpoint(path).load_into(net, use_ema=False)
    assert (net.head.weight == 0.0).all()


def test_round_trip_of_every_layout(tmp_path):
    net, restored = small(), small()
    torch.nn.init.normal_(net.head.weight)
    state = {f"backbone.{name}": tensor.clone() for name, tensor in net.state_dict().items()}
    saved(tmp_path / "ours.ckpt", net)
    compiled = {name.replace("backbone.", "backbone._orig_mod."): tensor for name, tensor in state.items()}
    torch.save({"state_dict": compiled}, tmp_path / "compiled.ckpt")
    for name in ("safe", "bin"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    save_file(state, tmp_path / "safe" / "model.safetensors")
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    for name in ("ours.ckpt", "compiled.ckpt", "safe", "bin"):
        torch.nn.init.zeros_(restored.head.weight)
        read_checkpoint(tmp_path / name).load_into(restored)
        assert torch.equal(restored.head.weight, net.head.weight), name
