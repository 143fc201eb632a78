"""Files of strangers: nothing in a checkpoint, a Hub folder or a tokenizer runs, and none of them grows or hangs."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from app import runs
from command_line import compose_config
from engine.recovery import newest_good
from engine.storage import AtomicCheckpointIO
from identity import identity, overrides
from instantiation import OF_LIBRARIES, check_target, instantiate
from models.checkpoints import load_inert, read_checkpoint, read_progress, read_settings
from scripts import generate
from tests.test_configs import TINY

ROOT = Path(__file__).parents[1]
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
    return {"as it is": program, "with our records": both(program, shell), "behind a checkpoint": plain.getvalue() + program,
            "behind other bytes": b"x" * 100 + program, "before a checkpoint": program + plain.getvalue()}  # fmt: skip


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
            main.run(compose_config([*TINY, "data.cache_dir=cache", *typed]), "a test")
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
    net_free = {"state_dict": {"backbone.x": torch.zeros(1)}, "global_step": 1, "callbacks": {}}
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
    nested = [{"_target_": "samplers.base.TokenChoice", "temperature": sympify}, {"a": [{"b": sympify}]}, sympify]
    targets = ("os.system", "builtins.eval", "builtins.exec", "subprocess.run", "torch.load", "files.os.system",
               "models.checkpoints.pickle.loads", "hydra.utils.instantiate", "__main__.x", "main.importlib.import_module",
               "..x", "instantiation.hydra.utils.get_object", "pickle.loads", "runpy.run_path", "venv.main", 3, None)  # fmt: skip
    for node in (*nested, *({"_target_": target} for target in targets)):
        with pytest.raises(ValueError, match="_target_=.* is refused|cannot be imported"):
            instantiate(node)
    cfg = compose_config([*TINY, "data.cache_dir=cache"])
    for place, build in PLACES.items():
        changed = cfg.copy()
        main.OmegaConf.update(changed, place, sympify, merge=False, force_add=True)
        with pytest.raises(ValueError, match=r"sympy\.sympify is refused"):
            build(changed)


PLACES = {
    "lr_scheduler": lambda cfg: main.run(cfg, "a test"),
    "latents": lambda cfg: main.Experiment(cfg, "a test"),
    "sampler": lambda cfg: main.Experiment(cfg, "a test").drawing,
    "sampler.choice": lambda cfg: main.Experiment(cfg, "a test").drawing,
    "estimator": lambda cfg: main.Experiment(cfg, "a test").estimator,
    "data.truth": lambda cfg: main.Experiment(cfg, "a test").truth,
    "data.judge": lambda cfg: main.Experiment(cfg, "a test").judge,
    "data.source": lambda cfg: main.Experiment(cfg, "a test").data(),
    "streaming": lambda cfg: main.Experiment(cfg, "a test").data(),
    "callbacks.x": lambda cfg: main.Experiment(cfg, "a test").trainer("train"),
    "logger.csv": lambda cfg: main.Experiment(cfg, "a test").trainer("train"),
    "strategy": lambda cfg: main.Experiment(cfg, "a test").trainer("train"),
}


def test_every_target_in_configs_may_be_built_and_nobody_goes_another_way():
    found = set()
    for path in (ROOT / "configs").rglob("*.yaml"):
        content = main.OmegaConf.to_container(main.OmegaConf.load(path))
        waiting = [content]
        while waiting:
            node = waiting.pop()
            found |= {node["_target_"]} if isinstance(node, dict) and "_target_" in node else set()
            waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for target in found:
        check_target(target)
    assert found >= OF_LIBRARIES
    sources = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", ".venv")]
    for path in sources:
        text = path.read_text()
        assert path.name == "instantiation.py" or "hydra.utils" not in text, path
        for word in ("torch.load(", "jit.load", "pickle.load", "allow_pickle=True", "joblib", "weights_only=False",
                     "trust_remote_code=True)  #", "use_safetensors=False", "yaml.load(", "yaml.unsafe"):  # fmt: skip
            assert word not in text.replace("torch.save(torch.load(path, weights_only=True), path)", ""), (path, word)
