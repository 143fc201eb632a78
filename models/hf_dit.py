"""backbone=hf_dit: a DiT whose sizes come from a file of a published model."""

from collections.abc import Mapping
from typing import Annotated

from palimpsest.common.values import FREE, AttentionBackend, BelowOne, FilePath, Length, Size
from palimpsest.models.checkpoints import Checkpoint, read_settings
from palimpsest.models.dit import DiT
from palimpsest.models.hub import BLOCK_MODEL_TYPE

_SIZES = ("model.hidden_size", "model.cond_dim", "model.n_blocks", "model.n_heads", "time_conditioning")


def hf_dit(
    vocab_size: int,
    length: Length,
    checkpoint_path: FilePath | None = None,
    resumed: Annotated[FilePath, FREE] | None = None,
    from_pretrained: FilePath | None = None,
    hidden_size: Size | None = None,
    cond_dim: Size | None = None,
    n_blocks: Size | None = None,
    n_heads: Size | None = None,
    time_conditioning: bool | None = None,
    dropout: BelowOne | None = None,
    mask_padding: bool | None = None,
    attn_backend: Annotated[AttentionBackend, FREE] = "auto",
    num_classes: int = 0,
) -> DiT:
    """Build a DiT with random weights and the sizes of a Hub-layout directory, a model on the Hub or a `.ckpt` of our
    own.

    The file is the first that is set of `checkpoint_path`, `resumed` (the run's own checkpoint, which outlives the file
    that it started from) and `from_pretrained`. Sizes are None unless typed; typed ones must be those of the file.
    `dropout` and `mask_padding` may differ from it. `vocab_size` and `length` are those of the data.

    Raises:
        FileNotFoundError: the file is not found.
        ValueError: no file is named, it lacks sizes, or they contradict the data or typed settings.
    """
    files = {"eval.checkpoint_path": checkpoint_path, "checkpointing.resume_ckpt_path": resumed,
             "training.from_pretrained": from_pretrained}  # fmt: skip
    key = next((key for key, path in files.items() if path), None)
    if key is None:
        raise ValueError(
            "backbone=hf_dit takes its sizes from a file: name a Hub-layout directory, a Hub id or a .ckpt of your own "
            "with eval.checkpoint_path= or training.from_pretrained=, or use backbone=dit with model.* sizes"
        )
    known = _described(read_settings(files[key], key), key)
    typed = {"model.hidden_size": hidden_size, "model.cond_dim": cond_dim, "model.n_blocks": n_blocks,
             "model.n_heads": n_heads, "time_conditioning": time_conditioning, "model.dropout": dropout,
             "model.mask_padding": mask_padding}  # fmt: skip
    _refuse_contradictions(known, typed, vocab_size, length, f"{key}={files[key]}")
    return build(
        {**known, **{name: value for name, value in typed.items() if value is not None}}, attn_backend, num_classes
    )


def build(settings: Mapping[str, object], attn_backend: str = "auto", num_classes: int = 0) -> DiT:
    """Build the network that `Checkpoint.settings` describes, with random weights."""
    known = {name.removeprefix("model."): settings[name] for name in ("vocab_size", *_SIZES, "model.dropout")}
    mask_padding = settings.get("model.mask_padding", True)
    return DiT(**known, mask_padding=mask_padding, attn_backend=attn_backend, num_classes=num_classes)


def _described(checkpoint: Checkpoint, key: str) -> dict[str, object]:
    """Return the settings of a file, and check that all sizes are there."""
    path, known = checkpoint.path, checkpoint.settings
    if checkpoint.unsupported:
        raise ValueError(f"{key}={path}: {checkpoint.unsupported}; choose another model")
    sizes = ("vocab_size", *_SIZES, "model.dropout")
    if missing := [name for name in sizes if not isinstance(known.get(name), int | float)]:
        raise ValueError(f"{key}={path} gives no number for {', '.join(missing)}; use backbone=dit and type it")
    return known


def _refuse_contradictions(
    known: dict[str, object], typed: dict[str, object], vocab_size: int, length: int, name: str
) -> None:
    differing = [f"{key}={typed[key]}" for key in _SIZES if typed[key] is not None and typed[key] != known[key]]
    if differing:
        says = " ".join(f"{key}={known[key]}" for key in _SIZES)
        raise ValueError(f"{' '.join(differing)} contradicts {name}, which has {says}; leave it out")
    if known["vocab_size"] != vocab_size:
        raise ValueError(
            f"the data have vocab_size={vocab_size}, but {name} has vocab_size={known['vocab_size']}: set "
            "data.tokenizer_name_or_path to the tokenizer that it was trained with"
        )
    longest = known.get("model.length")  # block models continue with a window, which main.py checks
    if longest and length > longest and known.get("parameterization") != BLOCK_MODEL_TYPE:
        raise ValueError(
            f"model.length={length} is longer than the {longest} tokens that {name} was trained on; set "
            f"model.length={longest} or less"
        )
