"""Write a checkpoint as a directory in the Hub's layout, with code that makes it a transformers model.

    python scripts/export_hf.py --checkpoint outputs/.../last.ckpt --output my-model

    AutoModelForMaskedLM.from_pretrained("my-model", trust_remote_code=True)      # there
    python main.py mode=ppl_eval backbone=hf_dit eval.checkpoint_path=my-model    # here, without running its code

The exported code is ours: models/modeling_mdlm.py and what it imports, with relative imports.
"""

import argparse
import json
import logging
import re
import shutil
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from palimpsest.data.tokenizers import load_tokenizer, tokenizer_from_record, vocabulary
from palimpsest.models.checkpoints import Checkpoint, read_checkpoint
from palimpsest.models.class_conditioning import num_classes_of
from palimpsest.models.dit import DiT
from palimpsest.models.hf_dit import build
from palimpsest.models.hub import CONFIG_FILE, CONFIG_KEYS, MODEL_TYPE, WEIGHT_FILES, settings_of_tensors
from palimpsest.settings.command_line import clear_errors

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]

CODE = ("modeling_mdlm.py", "dit.py", "class_conditioning.py", "transformer.py", "layers.py", "attention.py",
        "backbone.py", "recompute.py", "blocks.py", "block_attention.py", "segment_attention.py",
        "kv_cache.py", "positions.py", "values.py")  # fmt: skip
# Defaults of the reference for settings that checkpoints of other programs may lack.
ASSUMED = {"model.length": 1024, "model.dropout": 0.1, "time_conditioning": False}


def export(checkpoint_path: str, output: Path, tokenizer_name: str | None = None, raw: bool = False) -> list[str]:
    """Write the model of `checkpoint_path` (any layout) into the new directory `output`; return assumed settings.

    The weights are the averaged ones if there are any, unless `raw`. Assumed settings are returned as `key=value`.

    Raises:
        FileNotFoundError: the checkpoint or tokenizer does not exist.
        ValueError: `output` is not empty, the model is not a DiT, or the tokenizer is not the model's.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output={output} exists and is not an empty directory; choose a new one")
    checkpoint = read_checkpoint(checkpoint_path, "--checkpoint")
    settings = {**ASSUMED, **checkpoint.settings}
    objective = settings.get("parameterization", "subs")
    if objective != "subs":
        raise ValueError(
            f"--checkpoint={checkpoint_path} was trained with parameterization={objective}; the layout is that of MDLM "
            "(subs), whose users would misread its logits"
        )
    net = _network(checkpoint, settings, raw)
    tokenizer = _tokenizer(tokenizer_name, checkpoint, settings)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if tokenizer is None:
        log.warning("no tokenizer was written, because the checkpoint holds none; --tokenizer names one")
    else:
        tokenizer.save_pretrained(partial)
    state = {f"backbone.{name}": tensor.contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, partial / WEIGHT_FILES[0], metadata={"format": "pt"})
    for name in CODE:
        room = "models" if (ROOT / "models" / name).exists() else "common"
        source = (ROOT / room / name).read_text(encoding="utf-8")
        (partial / name).write_text(
            re.sub(r"^from palimpsest\.(models|common)\.", "from .", source, flags=re.M), encoding="utf-8"
        )
    fingerprint = vocabulary(tokenizer).fingerprint if tokenizer else checkpoint.identity.get("tokenizer")
    config = _config({**settings, **net.settings}, fingerprint)
    (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(output)
    return [f"{key}={value}" for key, value in ASSUMED.items() if key not in checkpoint.settings]


def _network(checkpoint: Checkpoint, settings: dict[str, object], raw: bool) -> DiT:
    sizes = ("vocab_size", "model.hidden_size", "model.cond_dim", "model.n_blocks", "model.n_heads")
    missing = [key for key in sizes if key not in settings_of_tensors(checkpoint.state)]
    if missing:
        raise ValueError(
            f"--checkpoint={checkpoint.path} is not a DiT: its tensors do not determine {', '.join(missing)}"
        )
    if num_classes_of(checkpoint.state):
        raise ValueError(
            f"--checkpoint={checkpoint.path} is conditioned on classes, which the layout of MDLM does not support"
        )
    net = build(settings)
    checkpoint.load_into(net, use_ema=not raw)
    return net


def _tokenizer(name: str | None, checkpoint: Checkpoint, settings: dict[str, object]) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer `name`; without a name that of the checkpoint, None if it holds none."""
    if name is None:
        tokenizer = tokenizer_from_record(checkpoint.tokenizer, checkpoint.identity.get("tokenizer"))
    else:
        tokenizer = load_tokenizer(name, mask_token=settings.get("data.mask_token"))
    if tokenizer is None:
        return None
    known = vocabulary(tokenizer)
    if known.size != settings["vocab_size"]:
        raise ValueError(
            f"--tokenizer={name} has {known.size} ids (with the mask), but the model has {settings['vocab_size']}; "
            "give the tokenizer of its training"
        )
    if checkpoint.identity.get("tokenizer") not in (None, known.fingerprint):
        raise ValueError(
            f"--tokenizer={name} is not the one of the training; its ids would mean other words; give that one"
        )
    tokenizer.model_max_length = settings["model.length"]
    for key in ("is_local", "local_files_only"):  # how it was loaded, which transformers would save
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def _config(settings: dict[str, object], fingerprint: str | None) -> dict[str, object]:
    module, classes = Path(CODE[0]).stem, {"AutoConfig": "MDLMConfig", "AutoModelForMaskedLM": "MDLM"}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MDLM"],
        "auto_map": {auto: f"{module}.{name}" for auto, name in classes.items()},
        "torch_dtype": "float32",
        **{theirs: settings[ours] for theirs, ours in CONFIG_KEYS.items()},
        **({"tokenizer_fingerprint": fingerprint} if fingerprint else {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help=".ckpt file, Hub-layout directory or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="the directory to write; it must be new or empty")
    parser.add_argument("--tokenizer", help="a folder or a Hub name, if the checkpoint holds no tokenizer (ours do)")
    parser.add_argument("--raw", action="store_true", help="the raw weights instead of their average")
    typed = parser.parse_args()
    with clear_errors():
        assumed = export(typed.checkpoint, typed.output, typed.tokenizer, typed.raw)
    print(f"{typed.output}: load it with AutoModelForMaskedLM.from_pretrained({str(typed.output)!r}, ", end="")
    print("trust_remote_code=True), or here with backbone=hf_dit")
    if assumed:
        print(f"assumed, because the checkpoint does not say: {', '.join(assumed)}; correct config.json if wrong")


if __name__ == "__main__":
    main()
