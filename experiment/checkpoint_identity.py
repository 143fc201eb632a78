"""The configuration that checkpoints of this project carry besides their weights."""

from __future__ import annotations

from pathlib import Path

from palimpsest.common.files import PathOrUrl, is_remote, path_or_url
from palimpsest.models.checkpoints import read_settings


def checkpoint_path(typed: str | Path, key: str = "path") -> PathOrUrl:
    """Return the path of a checkpoint; for the folder of a run, that of its last checkpoint."""
    path = path_or_url(str(typed), key)
    last = None if is_remote(path) else path / "checkpoints" / "last.ckpt"
    return last if last is not None and last.exists() else path


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
