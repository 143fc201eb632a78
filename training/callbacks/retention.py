"""The checkpoints of a run in their folder: what they are called, and which are kept.

last.ckpt is the latest; the latest few are step-00000500.ckpt and so on, of which last.ckpt is another name;
milestone-00010000.ckpt and best.ckpt are names of their own, which nothing here takes away.
"""

from __future__ import annotations

import logging

from palimpsest.common.files import PARTIAL, PathOrUrl, basename, join_path, link_or_copy, newest_first, remove

log = logging.getLogger(__name__)

LAST = "last.ckpt"
BEST = "best.ckpt"
_STEP = "step-"


def step_file(folder: PathOrUrl, step: int) -> PathOrUrl:
    """Where the checkpoint of optimizer step `step` lies while it is among the last ones."""
    return join_path(folder, f"{_STEP}{step:08d}.ckpt")


def milestone_file(folder: PathOrUrl, step: int) -> PathOrUrl:
    """Where the checkpoint of a step that is kept for ever lies."""
    return join_path(folder, f"milestone-{step:08d}.ckpt")


def _steps(folder: PathOrUrl) -> dict[int, PathOrUrl]:
    """The last checkpoints by their steps, ascending."""
    numbers = {path: basename(path).removeprefix(_STEP).removesuffix(".ckpt") for path in newest_first(folder, ".ckpt")}
    found = {int(n): path for path, n in numbers.items() if basename(path).startswith(_STEP) and n.isdecimal()}
    return dict(sorted(found.items()))


def keep(folder: PathOrUrl, step: int, keep_last: int, milestone: bool) -> None:
    """Make the checkpoint of `step` a milestone, if it is one, and the last one, then let go of the oldest beyond
    `keep_last`. Those of later steps stay: a training that was taken back to `step` has not written them."""
    if milestone:  # first, because a training that is killed here goes on from the last one
        link_or_copy(step_file(folder, step), milestone_file(folder, step))
    link_or_copy(step_file(folder, step), join_path(folder, LAST))
    _let_go(folder, step, keep_last)


def _let_go(folder: PathOrUrl, step: int, keep_last: int) -> None:
    earlier = [path for number, path in _steps(folder).items() if number <= step]
    for path in earlier[:-keep_last]:
        remove(path)


def make_room(folder: PathOrUrl) -> bool:
    """Let go of the oldest of the last checkpoints, if there is another; whether it did."""
    oldest, *others = [*_steps(folder).values()] or [None]
    if not others:
        return False
    remove(oldest)
    log.warning("the disk is full: %s was removed to make room for a new checkpoint", oldest)
    return True


def clear(folder: PathOrUrl, step: int, keep_last: int) -> None:
    """Remove what a kill in the save of `step` or before it has left: a file half-written, an old one not removed."""
    for path in newest_first(folder, f".ckpt{PARTIAL}"):
        remove(path)
    _let_go(folder, step, keep_last)
