"""Locations of named data sets: `$DATA_DIR/<folder>`, or the Hugging Face Hub."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit


def local_folder(folder: str | None) -> Path | None:
    """Return `$DATA_DIR/<folder>` if DATA_DIR is set and contains it, else None. Raises FileNotFoundError if DATA_DIR
    is not a directory."""
    root = os.environ.get("DATA_DIR")
    if not root or not folder:
        return None
    if not Path(root).is_dir():
        raise FileNotFoundError(f"DATA_DIR={root} is not a directory; correct it, or unset it to use the Hub")
    path = Path(root) / folder
    return path if path.is_dir() else None


def not_found_message(key: str, hub_name: str, folder: str | None) -> str:
    """Return a sentence that tells how to get `hub_name` with and without a network."""
    root = os.environ.get("DATA_DIR")
    state = f"DATA_DIR={root} has no {folder!r}" if root else "DATA_DIR is not set"
    local = f"put it into $DATA_DIR/{folder} ({state}), or " if folder else ""
    return f"{key}={hub_name} was not found: {local}make {hub_name!r} reachable on the Hugging Face Hub"


@contextlib.contextmanager
def quick_when_offline() -> Iterator[None]:
    """Make the Hub libraries use their caches at once if the Hub's address cannot be resolved.

    Otherwise they retry for most of a minute before they report that there is no network.
    """
    with contextlib.ExitStack() as patches:
        if not _hub_has_address():
            for library in ("huggingface_hub.constants", "datasets.config"):
                patches.enter_context(mock.patch(f"{library}.HF_HUB_OFFLINE", True))
        yield


def _hub_has_address() -> bool:
    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
