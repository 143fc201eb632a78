"""Files of strangers: nothing in a checkpoint, a Hub folder or a tokenizer runs, and none of them grows or hangs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from palimpsest.app import runs
from palimpsest.data.files import Columns, read_files
from palimpsest.data.tokenizers import encode, load_tokenizer, vocabulary
from palimpsest.experiment import running
from palimpsest.experiment.experiment import Experiment
from palimpsest.latents.shards import _arrays
from palimpsest.models import torch_archive
from palimpsest.models.checkpoints import READ_ERRORS, load_inert, read_checkpoint, read_progress, read_settings
from palimpsest.models.hub import read_config
from palimpsest.scripts import generate
from palimpsest.settings.command_line import compose_config
from palimpsest.settings.identity import identity, overrides
from palimpsest.settings.instantiation import OF_LIBRARIES, instantiate, resolve_target
from palimpsest.settings.reading import Readers
from palimpsest.training.recovery import newest_good
from palimpsest.training.storage import AtomicCheckpointIO
from tests.helpers.commands import ROOT, TINY, run

SETTINGS = identity(compose_config(["model=tiny"]))


# -------------------------------------------------------------------------------- programs in checkpoints


class Writes(torch.nn.Module):
    """Writes a file when TorchScript loads it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.weight = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), "PWNED")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> bytes:
    """A TorchScript archive that writes PWNED into the working directory when it is loaded."""
    written = io.BytesIO()
    torch.jit.save(torch.jit.script(Writes()), written)
    return written.getvalue()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "PWNED").exists(), "the file's program ran"


def both(program: bytes, shell: dict) -> bytes:
    """A zip of torch.save with the records of `program` beside its own."""
    out, saved = io.BytesIO(), io.BytesIO()
    torch.save(shell, saved)
    with zipfile.ZipFile(out, "w") as merged:
        for number, content in enumerate((saved.getvalue(), program)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for name in archive.namelist():
                    record = "archive/" + name.partition("/")[2]
                    if number == 0 or record not in merged.namelist():
                        merged.writestr(record, archive.read(name))
    return out.getvalue()


def disguises(program: bytes) -> dict[str, bytes]:
    shell = {"state_dict": {"backbone.x": torch.zeros(1)}, "callbacks": {}, "global_step": 0}
    plain = io.BytesIO()
    torch.save(shell, plain)
    ours = plain.getvalue()
    return {"as it is": program, "with our records": both(program, shell), "behind other bytes": b"x" * 100 + program,
            "behind a checkpoint": ours + program, "before a checkpoint": program + ours}  # fmt: skip


@pytest.mark.parametrize("kind", ["as it is", "with our records", "behind a checkpoint", "behind other bytes",
                                  "before a checkpoint"])  # fmt: skip
def test_torchscript_never_runs(here, program, kind):
    path = here / "last.ckpt"
    path.write_bytes(disguises(program)[kind])
    for read in (load_inert, read_checkpoint, read_settings, read_progress, AtomicCheckpointIO().load_checkpoint):
        try:
            read(path)
            assert kind == "before a checkpoint", "a zip archive is what its end says"
        except ValueError as error:
            assert str(path) in str(error)


def test_torchscript_never_runs_wherever_a_checkpoint_is_looked_at(here, program, capsys):
    (here / "x.ckpt").write_bytes(program)
    (here / "hub").mkdir()
    (here / "hub/config.json").write_text("{}")
    (here / "hub/pytorch_model.bin").write_bytes(program)
    with pytest.raises(ValueError, match="TorchScript program"):
        read_checkpoint(here / "hub")
    last = here / "outputs/reviews/a/checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    for typed in (["mode=ppl_eval", "eval.checkpoint_path=x.ckpt"], ["training.from_pretrained=x.ckpt"],
                  ["checkpointing.resume_ckpt_path=x.ckpt"],
                  ["parameterization=subs", "backbone=hf_dit", "eval.checkpoint_path=x.ckpt"]):  # fmt: skip
        with pytest.raises(Exception, match="TorchScript program"):
            run(*TINY, "data.cache_dir=cache", *typed)
    last.write_bytes(program)
    with pytest.raises(FileNotFoundError, match="no trained network"):
        runs.find([])
    with pytest.raises(ValueError, match="TorchScript program"):
        generate.arguments(generate.parser().parse_args(["--checkpoint", "x.ckpt"]))
    with pytest.raises(ValueError, match="all others are damaged"):
        newest_good(last.parent)


class Touch:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


def test_no_other_format_runs_a_program(here):
    pickled = pickle.dumps(Touch())
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            archive.addfile(info := tarfile.TarInfo(name), io.BytesIO(pickled[: info.size]))
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    old = io.BytesIO()
    torch.save({"a": torch.ones(3)}, old, _use_new_zipfile_serialization=False)
    places = [at for at in range(len(old.getvalue())) if old.getvalue().startswith(b"\x80\x02", at)]
    zipped = io.BytesIO()
    np.savez(zipped, a=np.array([Touch()], dtype=object))
    files = [pickled, tar.getvalue(), zipped.getvalue(), pickle.dumps(0) + pickled]
    files += [old.getvalue()[:at] + pickled + old.getvalue()[at:] for at in places]  # as each of the five pickles
    for number, content in enumerate(files):
        (here / f"{number}.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            load_inert(here / f"{number}.ckpt")


# -------------------------------------------------------------------------------- configurations in checkpoints

NOTES = "_target_: sympy.sympify\na: \"__import__('os').system('touch PWNED')\"\n"


def checkpoint_of(path: Path, **more: object) -> Path:
    state = {f"backbone.{i}": torch.zeros(1, 512) for i in range(16)}  # as large as SETTINGS say
    net_free = {"state_dict": state, "global_step": 1, "callbacks": {}}
    torch.save({**net_free, "identity": {"configuration": {**SETTINGS, **more}, "label": None}}, path)
    return path


GROUPS = sorted(path.name for path in (ROOT / "configs").iterdir() if path.is_dir())


@pytest.mark.parametrize("group", [*GROUPS, "hydra/launcher", "+hydra/callbacks", "optim@training.ema", "+x@y"])
def test_a_checkpoint_chooses_no_file_of_a_group(here, group):
    (here / "notes.yaml").write_text(NOTES)
    rise = os.path.relpath(here / "notes", ROOT / "configs" / group.lstrip("+").partition("@")[0])
    for value in (rise, str(here / "notes")):
        path = checkpoint_of(here / "x.ckpt", **{group: value})
        args = generate.parser().parse_args(["--checkpoint", str(path)])
        with pytest.raises(ValueError, match="no file in configs/ names"):
            generate.arguments(args)
        with pytest.raises(ValueError, match="no file in configs/ names"):
            _ = runs.find([str(path)])[0].words


@pytest.mark.parametrize("group", ["lr_scheduler", "optim", "latents"])
def test_a_file_beside_a_checkpoint_is_not_run(here, group):
    (here / "notes.yaml").write_text(NOTES)
    path = checkpoint_of(here / "x.ckpt", **{group: os.path.relpath(here / "notes", ROOT / "configs" / group)})
    with pytest.raises(ValueError, match=f"{group}=.*no file in configs/ names"):
        words = generate.arguments(generate.parser().parse_args(["--checkpoint", str(path), *TINY]))
        cfg = compose_config(words)
        instantiate(cfg[group])  # as main.run and Diffusion do


@pytest.mark.parametrize(("key", "value"), [
    ("hydra.run.dir", "/tmp/x"), ("checkpointing.save_dir", "/tmp/x"), ("output_dir", "/tmp/x"), ("mode", "train"),
    ("eval.checkpoint_path", "y.ckpt"), ("+trainer.callbacks", "x"), ("~data", ""), ("model.length=8 mode", "train"),
    ("data.source", "x"), ("data.source", {"_target_": "os.system"}), ("data.source._args_", ["x"]),
    ("training.joint_modes", {"_target_": "os.system"}), ("training.joint_modes.x", [{"_target_": "os.system"}]),
    ("training.joint_modes._target_.x", 1), ("data.judge._target_", "os.system"), ("latents.x.y", 1),
    ("model.hidden_size", "${oc.env:HOME}"), ("model.hidden_size", ["${oc.env:HOME}"]), ("noise.", 1), ("", 1),
    ("data.nothing", 1), ("data.nothing.at", 1), ("model[length]", 1), ("backbone.vocab_size", 7),
])  # fmt: skip
def test_a_checkpoint_sets_nothing_but_plain_values_of_known_keys(key, value):
    with pytest.raises(ValueError, match="no file in configs/ names"):
        overrides({**SETTINGS, key: value})


def test_what_is_built_is_the_projects(here):
    (here / "notes.yaml").write_text(NOTES)
    sympify = {"_target_": "sympy.sympify", "a": "__import__('os').system('touch PWNED')"}
    nested = [
        {"_target_": "palimpsest.samplers.base.TokenChoice", "temperature": sympify},
        {"a": [{"b": sympify}]},
        sympify,
    ]
    targets = ("os.system", "builtins.eval", "builtins.exec", "subprocess.run", "torch.load", "files.os.system",
               "palimpsest.common.files.os.system", "palimpsest.models.checkpoints.pickle.loads",
               "hydra.utils.instantiate", "__main__.x", "venv.main", 3, None, "..x",
               "palimpsest.main.importlib.import_module", "main.importlib.import_module",
               "palimpsest.settings.instantiation.hydra.utils.get_object", "pickle.loads")  # fmt: skip
    for node in (*nested, *({"_target_": target} for target in targets)):
        with pytest.raises(ValueError, match="_target_=.* is refused|cannot be imported"):
            instantiate(node)
    cfg = compose_config([*TINY, "data.cache_dir=cache"])
    for place, build in PLACES.items():
        changed = cfg.copy()
        OmegaConf.update(changed, place, sympify, merge=False, force_add=True)
        with pytest.raises(ValueError, match=r"sympy\.sympify is refused"):
            build(changed)


PLACES = {
    "lr_scheduler": lambda cfg: running.run(cfg, "a test"),
    "latents": lambda cfg: Experiment(cfg, "a test").build.data(),
    "sampler": lambda cfg: Experiment(cfg, "a test").build.drawing(),
    "sampler.choice": lambda cfg: Experiment(cfg, "a test").build.drawing(),
    "estimator": lambda cfg: Experiment(cfg, "a test").build.estimator,
    "data.truth": lambda cfg: Experiment(cfg, "a test").build.truth,
    "data.judge": lambda cfg: Experiment(cfg, "a test").build.judge,
    "data.source": lambda cfg: Experiment(cfg, "a test").build.data(),
    "streaming": lambda cfg: Experiment(cfg, "a test").build.data(),
    "callbacks.x": lambda cfg: Experiment(cfg, "a test").trainer("train"),
    "logger.csv": lambda cfg: Experiment(cfg, "a test").trainer("train"),
    "strategy": lambda cfg: Experiment(cfg, "a test").trainer("train"),
}


def test_every_target_in_configs_may_be_built_and_nobody_goes_another_way():
    found = set()
    for path in (ROOT / "configs").rglob("*.yaml"):
        content = OmegaConf.to_container(OmegaConf.load(path))
        waiting = [content]
        while waiting:
            node = waiting.pop()
            found |= {node["_target_"]} if isinstance(node, dict) and "_target_" in node else set()
            waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for target in found:
        resolve_target(target)
    assert found >= OF_LIBRARIES
    sources = [path for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(("tests", "."))]
    for path in sources:
        text = path.read_text()
        assert path == ROOT / "settings" / "instantiation.py" or "hydra.utils" not in text, path
        for word in ("torch.load(", "jit.load(", "pickle.loads(", "allow_pickle=True", "joblib.load",
                     "joblib import load", "use_safetensors=False", "yaml.load(", "yaml.unsafe"):  # fmt: skip
            assert word not in text.replace("torch.save(torch.load(path, weights_only=True), path)", ""), (path, word)


# -------------------------------------------------------------------------------- files that grow, or have no end


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in {"data.pkl": pickled, "version": b"3", "byteorder": b"little", **records}.items():
            out.writestr(f"archive/{name}", content)
    return path


def reduced(module: str, name: str, arguments: bytes) -> bytes:
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


def number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def of_values(*values: object) -> bytes:
    """What pushes them."""
    return b"".join(pickle.dumps(value, 2)[2:-1] for value in values)


def tensor(offset: int, size: tuple, stride: tuple, count: int = 1) -> bytes:
    """A tensor of the storage data/0, which has `count` numbers."""
    storage = b"(" + of_values("storage") + b"ctorch\nFloatStorage\n" + of_values("0", "cpu") + number(count) + b"tQ"
    view = of_values(offset, size, stride, False, None)
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tR."


TWICE = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(80))
LAUGHS = b"\x80\x02)q\x00" + TWICE  # a tuple of two tuples, each of two tuples, ...
COPIES = b"\x80\x02](" + b"N" * 3000 + b"eq\x00" + b"c__builtin__\nset\nh\x00\x85R" * 3000 + b"."


@pytest.mark.parametrize("pickled", [
    reduced("builtins", "bytearray", number(6 * 10**9) + b"\x85"),
    reduced("builtins", "bytes", number(6 * 10**9) + b"\x85"),
    reduced("builtins", "set", b"c__builtin__\nrange\n" + number(10**9) + b"\x85R\x85"),
    reduced("builtins", "list", b"c__builtin__\nrange\n" + number(10**9) + b"\x85R\x85"),
    reduced("builtins", "tuple", b"c__builtin__\nrange\n" + number(10**9) + b"\x85R\x85"),
    reduced("builtins", "str", number(3) + b"\x85"),
    reduced("_codecs", "encode", b"X\x01\x00\x00\x00aX\x06\x00\x00\x00utf-32\x86"),
    b"\x80\x04\x96" + (2**40).to_bytes(8, "little") + b"x.", b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    LAUGHS + b"}hPNs.", LAUGHS + b"hP)R.", LAUGHS + b"hPQ.",  # Q: BINPERSID
    LAUGHS + b"ccollections\nCounter\n]hPa\x85R.",
    b"\x80\x04\x8f(" + LAUGHS[2:] + b"\x90.", COPIES,
    b"\x80\x02" + number(1 << 2000) + b".", b"\x80\x02}" + number(1 << 70) + b"Ns.",
    tensor(0, (2,), (1,)), tensor(1, (1,), (1,)), tensor(0, (10**12,), (0,)), tensor(0, (1,), (2**70,)),
    tensor(0, (-1,), (1,)), tensor(0, (1,) * 65, (1,) * 65), tensor(0, (1,), (1,), 2**40), tensor(0, (1,), (1,), -1),
    reduced("torch._utils", "_rebuild_tensor_v2", b"(NK\x00))\x89Nt"),
    reduced("collections", "Counter", b"X\x01\x00\x00\x00a\x85"), b"\x80\x02(((", b"\x80\x02.", b"\x80\x02h\x07.",
    b"\x80\x02\x82\x01.", b"(itorch\nload\n.", b"\x80\x02ccollections\nOrderedDict\n}b.",
])  # fmt: skip
def test_pickles_grow_no_larger_than_their_file(tmp_path, pickled):
    path = archive(tmp_path / "x.ckpt", pickled, **{"data/0": b"\0" * 4})
    if pickled[-1:] == b"." and pickled[-7:-6] == b"N" or pickled.startswith(b"Np"):
        assert load_inert(path) is None
        return
    with pytest.raises(ValueError, match="cannot be read"):
        load_inert(path)


@pytest.mark.parametrize("pickled", [b"\x80\x02Nr\x00\x00\x00\x80.", b"Np2147483648\n."])
def test_a_large_number_of_a_memo_takes_no_room(tmp_path, pickled):
    assert load_inert(archive(tmp_path / "x.ckpt", pickled)) is None


def test_archives_grow_no_larger_than_their_file(tmp_path):
    good = tensor(0, (1,), (1,))
    assert load_inert(archive(tmp_path / "x.ckpt", good, **{"data/0": struct.pack("<f", 2.0)})).tolist() == [2.0]
    bombs = {"deflated": archive(tmp_path / "a.ckpt", good, zipfile.ZIP_DEFLATED, **{"data/0": b"\0" * 10**6})}
    bombs["big-endian"] = archive(tmp_path / "b.ckpt", good, **{"byteorder": b"big", "data/0": b"\0" * 4})
    bombs["another size"] = archive(tmp_path / "c.ckpt", good, **{"data/0": b"\0" * 8})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "d.ckpt", "w") as out:
        for _ in range(2):
            out.writestr("archive/data.pkl", b"N.")
    bombs["twice"] = tmp_path / "d.ckpt"
    content = bytearray((tmp_path / "x.ckpt").read_bytes())  # every record of 2**31 bytes
    at = content.find(b"PK\x01\x02")
    while at >= 0:
        content[at + 20 : at + 28] = struct.pack("<2L", 2**31, 2**31)
        at = content.find(b"PK\x01\x02", at + 1)
    (tmp_path / "e.ckpt").write_bytes(content)
    bombs["says so"] = tmp_path / "e.ckpt"
    old = io.BytesIO()
    torch.save({"a": torch.ones(3)}, old, _use_new_zipfile_serialization=False)
    huge = old.getvalue().replace(b"K\x03Nt", b"J\xff\xff\xff\x7fNt")
    assert huge != old.getvalue()
    (tmp_path / "f.ckpt").write_bytes(huge)
    bombs["old"] = tmp_path / "f.ckpt"
    for name, path in bombs.items():
        with pytest.raises(ValueError, match="cannot be read"):
            load_inert(path), name


@pytest.mark.parametrize(("content", "said"), [
    ({"state_dict": {1: torch.zeros(1)}}, "state_dict does not map"),
    ({"state_dict": {"backbone.x": torch.zeros(1)}, "ema": {"shadow_params": [1]}}, "ema"),
    ({"state_dict": {"backbone.x": torch.zeros(1)}, "global_step": "many"}, "global_step"),
    ({"state_dict": {"backbone.x": torch.zeros(1)}, "identity": {"configuration": {1: 2}}}, "identity"),
    ({"state_dict": {"backbone.x": torch.zeros(1)}, "identity": {"a": torch.ones(1)}}, "identity holds"),
])  # fmt: skip
def test_parts_of_other_kinds_are_named(tmp_path, content, said):
    torch.save(content, tmp_path / "x.ckpt")
    for read in (read_checkpoint, read_settings, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=said):
            read(tmp_path / "x.ckpt")
    (tmp_path / "config.json").write_text("{}")
    torch.save({1: torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not map names"):
        read_checkpoint(tmp_path)


def test_a_deep_configuration_is_refused(tmp_path):
    deep = b"]" * 5000 + b"a" * 4999
    wide = b"(" + b"N" * 99 + b"lq\x010" + (b"(" + b"h\x01" * 99 + b"lq\x010") * 8 + b"h\x01"
    for part in (deep, wide):
        path = tmp_path / "x.ckpt"
        inside = b"}" + of_values("configuration") + b"}" + of_values("a") + part + b"ss"
        archive(path, b"\x80\x02}" + of_values("identity") + inside + b"s" + of_values("state_dict", {}) + b"s.")
        with pytest.raises(ValueError, match="identity holds"):
            read_settings(path)
    for content in ("[" * 100_000, '{"a":' * 100_000, " " * 17_000_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="download or export the model again"):
            read_config(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir],
                         ids=["pipe", "device", "folder"])  # fmt: skip
def test_pipes_and_devices_are_refused_at_once(tmp_path, make):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    make(folder / "last.ckpt")
    for read in (load_inert, newest_good, read_progress):
        with pytest.raises(ValueError):
            read(folder if read is newest_good else folder / "last.ckpt")
        for aside in folder.glob("*.corrupt"):
            aside.rename(folder / "last.ckpt")
    for name, other in (("config.json", "model.safetensors"), ("model.safetensors", "config.json"),
                        ("pytorch_model.bin", "config.json"), ("tokenizer.json", "tokenizer_config.json")):  # fmt: skip
        hub = tmp_path / name.partition(".")[0] / other
        hub.parent.mkdir(exist_ok=True)
        hub.write_text("{}")
        make(hub.parent / name)
        with pytest.raises(ValueError, match="pipe or a device|cannot be read|not a file|no tokenizer"):
            read_checkpoint(hub.parent) if "tokenizer" not in name else load_tokenizer(str(hub.parent))


def test_arrays_grow_no_larger_than_their_file(tmp_path):
    np.savez(tmp_path / "good.npz", a=np.ones(3))
    assert _arrays(tmp_path / "good.npz")["a"].tolist() == [1, 1, 1]
    np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(10**6))
    np.savez(tmp_path / "object.npz", a=np.array([Touch()], dtype=object))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**45,)})
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as out:
        out.writestr("a.npy", header.getvalue())
    for name in ("zeros.npz", "object.npz", "huge.npz"):
        with pytest.raises(ValueError, match="make the folder again"):
            _arrays(tmp_path / name)


def tokenizer_with(folder: Path, pattern: str, vocabulary: dict[str, int]) -> object:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[UNK]").save_pretrained(folder)
    return load_tokenizer(str(folder))


def test_a_regular_expression_has_its_time(tmp_path, monkeypatch):
    tokenizer = tokenizer_with(tmp_path, "(a|aa)+$", {"[UNK]": 0, "a": 1, "c": 2, "d": 3})
    assert encode(tokenizer, ["a", "b"]) == [[1], [0]]
    with pytest.raises(ValueError, match="takes too long on these texts.*retry-limit"):
        encode(tokenizer, ["a" * 100 + "!"])
    monkeypatch.setattr("palimpsest.data.tokenizers._SECONDS", 0.05)
    monkeypatch.setattr("palimpsest.data.tokenizers._SECONDS_PER_CHARACTER", 0.0)
    with pytest.raises(ValueError, match="the time is up"):
        encode(tokenizer, [("a" * 29 + "! ") * 40])


def test_an_id_that_no_network_has_room_for_is_refused(tmp_path):
    tokenizer_with(tmp_path, "b", {"[UNK]": 0, "a": 1, "b": 2})
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"b": 2', '"b": 2147483648').replace('"b":2', '"b":2147483648'))
    with pytest.raises(ValueError, match="has 3 tokens, and one of them has the id 2,147,483,648"):
        vocabulary(load_tokenizer(str(tmp_path)))
    with pytest.raises(ValueError, match="has 3 tokens, and one of them has the id 2,147,483,648"):
        vocabulary(AutoTokenizer.from_pretrained(tmp_path))


@contextmanager
def bounded() -> Iterator[None]:
    """No more than 20 MB of Python's memory is taken within."""
    tracemalloc.start()
    yield
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


LAZY = b"cbuiltins\nrange\n(" + number(10**10) + b"tR"  # a few bytes that say they have ten thousand million numbers


@pytest.mark.parametrize("pickled", [
    b"\x80\x02" + LAZY + b"Q.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N" + number(0) + LAZY + LAZY + b"\x89NtR.",
    b"\x80\x02ctorch\nSize\n" + LAZY + b"\x85R.",
    b"\x80\x02ccollections\nOrderedDict\n" + LAZY + b"\x85R.",
], ids=["persistent id", "size", "torch.Size", "OrderedDict"])  # fmt: skip
def test_what_only_says_that_it_is_long_is_not_counted_out(tmp_path, pickled):
    with bounded(), pytest.raises(ValueError, match="cannot be read"):
        load_inert(archive(tmp_path / "x.ckpt", pickled))


@pytest.mark.parametrize("power", [36, 44])
def test_a_length_beyond_the_file_is_refused_before_room_is_made(tmp_path, power):
    path = tmp_path / "old.ckpt"
    path.write_bytes(b"\x80\x04\x8e" + (1 << power).to_bytes(8, "little") + b"abc.")
    with bounded(), pytest.raises(ValueError, match="announces .* bytes, and the file has 15"):
        load_inert(path)


@pytest.mark.parametrize("key", [
    b"cbuiltins\ncomplex\nG" + struct.pack(">d", 1000003.0) + b"G" + struct.pack(">d", 2.0) + b"\x86R",
    number(1) + number(2) + b"\x86", number(2**61), b"G" + struct.pack(">d", 0.5),
], ids=["complex", "tuple of numbers", "large", "fraction"])  # fmt: skip
def test_keys_whose_hashes_anybody_can_choose_are_refused(tmp_path, key):
    """60,000 keys of one hash would take a dictionary minutes."""
    with pytest.raises(ValueError, match="has a key of the type"):
        load_inert(archive(tmp_path / "x.ckpt", b"\x80\x02}" + key + b"Ns."))


def test_what_a_file_says_is_cut_and_steers_no_terminal(tmp_path):
    named = b"cos\n" + b"\x1b[2J" + b"B" * 10**6 + b"\n)R."
    storage = b"(" + of_values("storage") + b"ctorch\nFloatStorage\n"
    record = storage + of_values("A" * 10**6, "cpu") + number(4) + b"tQ."
    for pickled in (named, record):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            load_inert(archive(tmp_path / "x.ckpt", b"\x80\x02" + pickled))
        assert len(str(caught.value)) < 1500 and "\x1b" not in str(caught.value)


def test_a_checkpoint_chooses_no_folder(tmp_path):
    """Texts are kept in data.cache_dir; runs lie in folders that are called as data.name and model.name."""
    assert not any("cache_dir" in said for said in overrides({**SETTINGS, "data.cache_dir": str(tmp_path)}))
    for key in ("data.name", "model.name"):
        cfg = compose_config(TINY)
        for name in ("../../x", "/tmp/x", "..", "a\\b", "x" * 201, "\x1b[2J"):
            OmegaConf.update(cfg, key, name)
            with pytest.raises(ValueError, match=rf"{key}=.* must be a name of at most 200"):
                Readers(cfg).refuse_wrong()


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 65536), ("n_blocks", 65536), ("cond_dim", 9999)])
def test_a_configuration_larger_than_its_tensors_is_refused_before_it_is_built(tmp_path, key, value):
    path = tmp_path / "x.ckpt"
    known = {"configuration": {f"model.{key}": value}}
    torch.save({"state_dict": {"backbone.x": torch.zeros(7, 3)}, "identity": known, "global_step": 1}, path)
    for read in (read_checkpoint, read_settings):
        with pytest.raises(ValueError, match=f"model.{key}={value}, and its tensors allow"):
            read(path)


def test_replacements_that_multiply_a_text_are_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("a", "a" * 10) for _ in range(9)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="up to 1,000,000,000 times as long"):
        encode(load_tokenizer(str(tmp_path)), ["a"])


def test_a_line_that_no_memory_holds_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("palimpsest.data.files._LONGEST_LINE", 100)
    for name, content in (("x.txt", "a" * 200), ("x.jsonl", '{"text": "' + "a" * 200 + '"}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="line 1 has more than 100 characters"):
            list(read_files([tmp_path / name], "data.path", Columns()))


# -------------------------------------------------------------------------------- what is read is what was written

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.complex_numbers(allow_nan=False, max_magnitude=9)
    | st.sampled_from(
        [
            torch.float16,
            torch.Size([2, 3]),
            torch.device("cpu"),
            slice(1, 2),
            {1, "a"},
            bytearray(b"x\xff"),
            frozenset([("a", "b")]),
            OrderedDict(a=1),
            Counter("aab"),
            int,
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(VALUES, st.sampled_from([2, 3, 4, 5]), st.booleans())
def test_what_torch_writes_is_read_as_torch_reads_it(content, protocol, zipped):
    file = io.BytesIO()
    shared = torch.arange(12.0)
    tensors = {"view": shared[2:8].view(2, 3).t(), "shared": shared, "none": torch.empty(0, 3), "one": torch.tensor(3),
               "half": torch.ones(3, dtype=torch.bfloat16), "yes": torch.tensor([True, False]),
               "parameter": torch.nn.Parameter(torch.ones(2)), "complex": torch.ones(2, dtype=torch.complex64),
               "default": defaultdict(list, {"a": [1]})}  # fmt: skip
    torch.save([content, tensors], file, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    file.seek(0)
    ours, found = torch_archive.read(file)
    file.seek(0)
    theirs, _ = torch.load(file, weights_only=False)
    assert ours == theirs == content and repr(ours) == repr(theirs)
    for name, tensor in tensors.items():
        assert type(found[name]) is type(tensor)
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(found[name], tensor) and found[name].stride() == tensor.stride()
            assert found[name].dtype == tensor.dtype and found[name].requires_grad == tensor.requires_grad
    assert found["view"].untyped_storage().data_ptr() == found["shared"].untyped_storage().data_ptr()
    file.seek(0)
    shapes = torch_archive.read(file, weights=False)[1]
    assert shapes["view"].shape == (3, 2) and shapes["view"].is_meta


def test_random_damage_is_an_error_or_harmless():
    file = io.BytesIO()
    torch.save({"a": torch.ones(3), "b": OrderedDict(c=[1, "x", {2}])}, file)
    whole, draws = file.getvalue(), np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        for at in draws.integers(0, len(whole), draws.integers(1, 6)):
            damaged[at] = draws.integers(256)
        try:
            torch_archive.read(io.BytesIO(damaged))
        except READ_ERRORS:
            continue


def test_settings_of_a_large_file_are_read_at_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as out:
        out.writestr("archive/data.pkl", tensor(0, (10**7,), (1,), 10**7))
        with out.open(zipfile.ZipInfo("archive/data/0"), "w", force_zip64=True) as record:
            for _ in range(4):
                record.write(bytes(10**7))
    assert load_inert(tmp_path / "x.ckpt", weights=False).shape == (10**7,)
