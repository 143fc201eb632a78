"""The configuration that our checkpoints carry beside their weights."""

from __future__ import annotations

from pathlib import Path

from palimpsest.common.files import PathOrUrl, is_remote, path_or_url
from palimpsest.models.checkpoints import read_settings


def checkpoint_path(typed: str | Path, key: str = "path") -> PathOrUrl:
    """Return the checkpoint that is meant, where the folder of a run is named."""
    path = path_or_url(str(typed), key)
    last = None if is_remote(path) else path / "checkpoints" / "last.ckpt"
    return last if last is not None and last.exists() else path


def carried(path: PathOrUrl, key: str = "path") -> dict[str, object]:
    """Return what a checkpoint says of its training: `configuration`, `label` and `tokenizer`.

    Raises:
        ValueError: it says nothing.
    """
    known = read_settings(path, key).identity
    if "configuration" not in known:
        raise ValueError(
            f"{key} {path} does not carry the configuration of its training, as ours do; say it: python main.py "
            f"mode=sample_eval eval.checkpoint_path={path} data=... model=... parameterization=... backbone=..."
        )
    return known
