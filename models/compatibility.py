"""Compatibility of a checkpoint with a run: same settings, same network, same tokenizer, same latents."""

from collections.abc import Mapping, Sequence

import numpy as np

from palimpsest.common.files import PathOrUrl
from palimpsest.models.backbone import Backbone
from palimpsest.models.checkpoints import Checkpoint, Progress

# Settings that change the function of a network. A file may lack some of them.
FUNCTION = ("model.hidden_size", "model.cond_dim", "model.n_blocks", "model.n_heads", "time_conditioning")
# Settings that a training keeps when it goes on with others of its settings changed.
RESUMED = (*FUNCTION, "tokenizer", "latents", "parameterization", "backbone._target_", "optim._target_",
           "training.freeze", "classify.sharing", "classify.bigrams")  # fmt: skip
# Modes that a joint network was trained for; others were never trained.
MODES = "training.joint_modes"
MASK = "data.mask_token"
# Defaults of our checkpoints from before these settings existed.
DEFAULTS = {"data.segments": False}
# Settings that a configuration may leave to the file of the network.
READ_FROM_FILES = ("model.", "time_conditioning", "backbone.config")


def check_same_settings(
    path: PathOrUrl, progress: Progress, ours: Mapping[str, object], only: Sequence[str] = ()
) -> None:
    """Check that the training at `path` has our settings (key as typed -> value), or those of them in `only`. Settings
    left open here are not compared. Raises ValueError if they differ; the message lists every difference."""
    known = {"data.label": progress.identity.get("label"), "tokenizer": progress.identity.get("tokenizer"),
             "latents": (progress.identity.get("latents") or {}).get("fingerprint")}  # fmt: skip
    theirs = {**progress.identity.get("configuration", {}), **known}
    keys = [key for key in differing(theirs, ours) if not only or key in only]
    if keys:
        listing = "".join(f"\n  {key}: there {theirs.get(key)}, here {ours.get(key)}" for key in keys)
        remedy = (
            "A training that goes on keeps these; training.from_pretrained takes weights into a new one"
            if only
            else "Use another checkpointing.save_dir for these settings, or the old settings to continue there"
        )
        raise ValueError(f"{path} was trained with other settings:{listing}\n{remedy}")


def differing(theirs: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    """Return the keys of settings that differ, without those that are left open here."""
    left_open = [key for key in {*theirs, *ours} if ours.get(key) is None and key.startswith(READ_FROM_FILES)]
    return [key for key in sorted({*theirs, *ours}) if key not in left_open and theirs.get(key) != ours.get(key)]


def check_compatible(checkpoint: Checkpoint, ours: Mapping[str, object], shape: Sequence[str], data: object) -> None:
    """Check that the network settings (the keys `shape`), tokenizer and latents of a file agree with ours. Raises
    ValueError if they differ; the message says which settings to type."""
    refuse_unsupported(checkpoint)
    theirs = {**(DEFAULTS if "configuration" in checkpoint.identity else {}), **checkpoint.settings}
    ours = {**DEFAULTS, **ours}
    compared = [key for key in shape if key in theirs and _uses(theirs, key) and not _one_model(key, theirs, ours)]
    differing = [f"{key}={theirs[key]}" for key in compared if ours.get(key) not in (None, theirs[key])]
    if theirs.get("data.segments") and not ours["data.segments"]:  # segments defined the blocks of its training
        differing = [setting for setting in differing if not setting.startswith("block_size=")]
    evaluated = "parameterization" in shape and "configuration" in checkpoint.identity
    if evaluated and _under(MODES, theirs) != _under(MODES, ours):
        named = ", ".join(f"{key.removeprefix(MODES)[1:]}: {value}" for key, value in _under(MODES, theirs).items())
        differing.append(f"'{MODES}={{{named}}}'" if named else f"{MODES}=null")
    problems = [f"was trained with other settings; add: {' '.join(differing)}"] if differing else []
    other_tokens = _other_tokens(checkpoint, data)
    if other_tokens and theirs.get(MASK) != ours.get(MASK):
        problems.append(f"was trained with another mask token; add: '{MASK}={theirs.get(MASK) or 'null'}'")
    elif other_tokens:
        problems.append(
            f"was trained with another tokenizer than "
            f"data.tokenizer_name_or_path={ours.get('data.tokenizer_name_or_path')} gives here: "
            f"{_tokenizer_name(theirs)}; its token ids would mean other words; set "
            "data.tokenizer_name_or_path to the tokenizer of its training"
        )
    if problems:
        raise ValueError(f"{checkpoint.path} " + "\nand ".join(problems))
    _check_latents(checkpoint, ours, data.latents)


def refuse_unsupported(checkpoint: Checkpoint) -> None:
    """Raise ValueError if the objective or the network of the file does not exist here."""
    if checkpoint.unsupported:
        raise ValueError(
            f"{checkpoint.path} cannot be used: {checkpoint.unsupported}; choose a checkpoint of mdlm, bd3lms or duo "
            "with the objective subs (mdlm), bd3lm, sedd, d3pm, udlm (duo) or ar"
        )


def _uses(theirs: Mapping[str, object], key: str) -> bool:
    """Return whether the network of one of our files uses a setting; AR has no cond_dim, for example."""
    of_network = key in (*FUNCTION, "model.mask_padding") and any(name.startswith("backbone.") for name in theirs)
    return not of_network or f"backbone.{key.removeprefix('model.')}" in theirs


def _one_model(key: str, theirs: Mapping[str, object], ours: Mapping[str, object]) -> bool:
    """Return whether the objectives are UDLM and DUO, which is a training of it."""
    return key == "parameterization" and {theirs[key], ours.get(key)} == {"udlm", "duo"}


def _other_tokens(checkpoint: Checkpoint, data: object) -> bool:
    """Return whether ids mean other tokens in the file than in the data. Files of other projects may have only a
    vocabulary, to which a project may have added padding."""
    known = checkpoint.identity.get("tokenizer")
    size = checkpoint.settings.get("vocab_size", data.vocabulary.size)
    if known not in (None, data.vocabulary.fingerprint) or size not in (data.vocabulary.size, data.vocabulary.own_size):
        return True
    if checkpoint.tokens is None:
        return False
    ours = {number: token for token, number in data.tokenizer.get_vocab().items()}
    return any(ours.get(number, token) != token for token, number in checkpoint.tokens.items())


def _tokenizer_name(theirs: Mapping[str, object]) -> str:
    name, size = theirs.get("data.tokenizer_name_or_path", "one"), theirs.get("vocab_size")
    ids = f" with vocab_size={size} (the network's ids)" if size else ""
    data = f" of data={theirs['data.name']}" if "data.name" in theirs else ""
    return f"{name}{data}{ids}"


def _under(group: str, settings: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key.startswith(group) and value is not None}


def _check_latents(checkpoint: Checkpoint, ours: Mapping[str, object], latents: object | None) -> None:
    """Check that the data have the latents of the training, on the same scale. A text-only model accepts any."""
    theirs, settings = checkpoint.identity.get("latents"), checkpoint.settings
    if theirs is None:
        return
    if latents is None or latents.fingerprint != theirs["fingerprint"]:
        keys = [key for key in sorted({*settings, *ours}) if key.startswith(("latents.", "data."))]
        differing = [f"{key}: there {settings.get(key)}, here {ours.get(key)}" for key in keys
                     if settings.get(key, DEFAULTS.get(key)) != ours.get(key)]  # fmt: skip
        listing = "\n  ".join(differing or ["the texts themselves, or what made their latents"])
        raise ValueError(
            f"{checkpoint.path} was trained with other latents, and would misread these; what differs:\n  {listing}"
        )
    mean, std = (np.asarray(theirs[key]) for key in ("mean", "std"))
    if np.abs(latents.mean - mean).max() > 0.05 * std.min() or not np.allclose(latents.std, std, rtol=0.05):
        raise ValueError(
            f"{checkpoint.path} was trained with the same settings of latents, but they have other values here "
            "(another machine, another version of a library): keep the folder data.cache_dir with the checkpoint, or "
            "make the latents once with scripts/prepare_latents.py and use latents=file"
        )


def check_data_compatible(data: object, objective: object, backbone: Backbone) -> None:
    """Check that an objective and a network can read these data (dataloader.TextData). Raises ValueError if the data
    have segments that the objective does not use, or a published masked language model would read a mask other than
    that of its own tokenizer."""
    if data.segments and not objective.reads_segments:
        raise ValueError(
            f"data.segments=true gives the ends of the parts of a text, which {type(objective).__name__} does not use; "
            "set it to false, or add algo=bd3lm"
        )
    if backbone.knows_its_mask and data.tokenizer.mask_token_id is None:
        raise ValueError(
            f"data.tokenizer_name_or_path={data.settings.tokenizer_name_or_path} has no mask token, and "
            f"{backbone.name} was trained with that of its own: name its tokenizer, say with data.mask_token= which "
            "token its mask is, or set backbone.from_scratch=true"
        )
