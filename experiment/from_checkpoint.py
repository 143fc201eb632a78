"""Settings that checkpoints carry besides their weights: those of our trainings, and of published models.

The settings of a published model in eval.checkpoint_path need not be typed. They are read from `.ckpt` files of the
reference projects and from the Hub's layout. Only numbers, switches and the choices listed here are accepted, because a
file may come from anyone.
"""

import sys
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from palimpsest.common.files import PathOrUrl, is_remote, path_or_url
from palimpsest.common.values import FLAG, Setting, one_of, real, whole
from palimpsest.models.checkpoints import Checkpoint, read_settings
from palimpsest.models.compatibility import refuse_unsupported
from palimpsest.models.reference_settings import NETWORKS, NOISES, OBJECTIVES
from palimpsest.settings.command_line import compose_config, flags_last
from palimpsest.settings.identity import word
from palimpsest.settings.instantiation import class_built_by, resolve_target

_CHOICES = {"parameterization": OBJECTIVES, "backbone": NETWORKS, "noise": NOISES}
_COUNTS = ("model.hidden_size", "model.cond_dim", "model.n_blocks", "model.n_heads", "model.length", "block_size")
_NUMBERS = ("noise.eps", "noise.sigma_min", "noise.sigma_max")
_SWITCHES = ("model.mask_padding", "time_conditioning", "subs_masking", "training.ignore_bos",
             "training.change_of_variables")  # fmt: skip
_MAX_COUNT = 2**24  # no network is larger
_ACCEPTED: dict[str, Setting] = {
    **{key: one_of(*names.values()) for key, names in _CHOICES.items()},
    **dict.fromkeys(_COUNTS, whole(1, _MAX_COUNT)),
    "T": whole(0, _MAX_COUNT),
    **dict.fromkeys(_NUMBERS, real("(-inf, inf)")),
    **dict.fromkeys(_SWITCHES, FLAG),
}
# A model may be measured with other values of these; reports show the values.
_FREE = ("model.length", "model.mask_padding", "T")


def complete(arguments: list[str]) -> list[str]:
    """Return `arguments` completed by the settings of the model in eval.checkpoint_path.

    A typed group (`model=tiny`) counts for all its members. Arguments of trainings, of checkpoints of this project
    (which are compared with the whole configuration) and of sweeps over several files are unchanged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is unreadable, its model does not exist here, or typed settings differ from its own.
    """
    overrides = [arg for arg in arguments if not arg.startswith("-") and ("=" in arg or arg.startswith("~"))]
    typed = dict(arg.lstrip("+").split("=", 1) for arg in overrides if not arg.startswith("~"))
    if "eval.checkpoint_path" not in typed:
        return arguments
    parsed = OverridesParser.create().parse_overrides(overrides)
    cfg = compose_config([override.input_line for override in parsed if not override.is_sweep_override()])
    path = (cfg.eval.checkpoint_path or "").replace("{label}", "0")
    if not path or not resolve_target(cfg.mode._target_).mode.measures:
        return arguments
    checkpoint = read_settings(path)
    if "configuration" in checkpoint.identity:
        return arguments
    refuse_unsupported(checkpoint)
    known = _checked(checkpoint)
    _refuse_differences(checkpoint, known, typed, cfg)
    new = [f"{key}={word(value)}" for key, value in known.items() if not _is_typed(key, typed)]
    print(f"from {checkpoint.path}: {' '.join(new)}", file=sys.stderr)
    return flags_last([*arguments, *new])


def _checked(checkpoint: Checkpoint) -> dict[str, object]:
    """Return the accepted settings of the file; raise ValueError for an invalid value."""
    known = {key: checkpoint.settings[key] for key in _ACCEPTED if checkpoint.settings.get(key) is not None}
    for key, value in known.items():
        if not _ACCEPTED[key].accepts(value):
            raise ValueError(
                f"{checkpoint.path} says {key}={str(value)[:50]}, which is not a valid value; use another checkpoint"
            )
    return known


def _is_typed(key: str, typed: dict[str, str]) -> bool:
    group = key.partition(".")[0]
    return key in typed or (group in ("model", "noise") and group in typed)


def _refuse_differences(
    checkpoint: Checkpoint, known: dict[str, object], typed: dict[str, str], cfg: DictConfig
) -> None:
    """Raise ValueError if typed settings differ from the file's, naming all of them."""
    here = {key: OmegaConf.select(cfg, key) for key in known}
    here["parameterization"] = class_built_by(cfg.parameterization).name
    if {here["parameterization"], known.get("parameterization")} == {"duo", "udlm"}:  # duo is a training of udlm
        here["parameterization"] = known["parameterization"]
    here |= {key: _CHOICES[key].get(typed[key], typed[key]) for key in ("backbone", "noise") if key in typed}
    # Without time conditioning the noise schedule is irrelevant to the network.
    free = _FREE if known.get("time_conditioning") else (*_FREE, "noise", *_NUMBERS)
    compared = [key for key in known if key not in free and _is_typed(key, typed)]
    differing = [key for key in compared if here[key] not in (None, known[key])]
    if not differing:
        return
    settings = checkpoint.settings
    there, size = settings.get("data.tokenizer_name_or_path"), settings.get("vocab_size")
    tokenizer = f"{'' if there is None else f'{there}, '}{size} ids with the mask"
    words = dict.fromkeys(key if key in typed else f"{key.partition('.')[0]}=" for key in differing)
    raise ValueError(
        f"{checkpoint.path} was trained with other settings; leave {', '.join(words)} out, "
        f"or type: {' '.join(f'{key}={word(known[key])}' for key in differing)}\n"
        f"It was trained with: {' '.join(f'{key}={word(value)}' for key, value in known.items())}; its tokenizer: "
        f"{tokenizer} (here data.tokenizer_name_or_path={cfg.data.tokenizer_name_or_path})"
    )


def checkpoint_path(typed: str | Path, key: str = "path") -> PathOrUrl:
    """Return the path of a checkpoint; for the folder of a run, that of its last checkpoint."""
    path = path_or_url(str(typed), key)
    if is_remote(path):
        return path
    last = path / "checkpoints" / "last.ckpt"
    if (path / "label=0").exists() and not last.exists():
        raise ValueError(
            f"{key} {path} holds one model per class; name one of them, such as {path / 'label=0'}, or use "
            "palimpsest.load_classifier"
        )
    return last if last.exists() else path


def training_identity(path: PathOrUrl, key: str = "path") -> dict[str, object]:
    """Return `configuration`, `label` and `tokenizer` of the training that wrote a checkpoint.

    Raises:
        ValueError: the checkpoint does not contain them.
    """
    known = read_settings(path, key).identity
    if "configuration" not in known:
        raise ValueError(
            f"{key} {path} does not carry the configuration of its training, as ours do; give it: python main.py "
            f"mode=sample_eval eval.checkpoint_path={path} data=... model=... parameterization=... backbone=..."
        )
    return known
