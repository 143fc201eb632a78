"""Names of a run's checkpoints, and which of them are kept.

The latest few checkpoints are step-00000500.ckpt and so on; last.ckpt is another name of the latest.
milestone-00010000.ckpt and best.ckpt are names of their own, which nothing here removes.
"""

import logging

from palimpsest.common.files import PARTIAL, PathOrUrl, basename, join_path, link_or_copy, newest_first, remove

log = logging.getLogger(__name__)

LAST = "last.ckpt"
BEST = "best.ckpt"
_STEP = "step-"


def step_file(folder: PathOrUrl, step: int) -> PathOrUrl:
    """Return the path of the checkpoint of optimizer step `step` while it is among the latest."""
    return join_path(folder, f"{_STEP}{step:08d}.ckpt")


def _steps(folder: PathOrUrl) -> dict[int, PathOrUrl]:
    """Return the latest checkpoints by their steps, ascending."""
    numbers = {path: basename(path).removeprefix(_STEP).removesuffix(".ckpt") for path in newest_first(folder, ".ckpt")}
    found = {int(n): path for path, n in numbers.items() if basename(path).startswith(_STEP) and n.isdecimal()}
    return dict(sorted(found.items()))


def keep(folder: PathOrUrl, step: int, keep_last: int, milestone: bool) -> None:
    """Make the checkpoint of `step` the last one, and a milestone if it is one; remove the oldest beyond `keep_last`.

    Checkpoints of later steps stay, because they belong to a training that was rewound to `step`.
    """
    if milestone:  # first, because a training that is killed here resumes from last.ckpt
        link_or_copy(step_file(folder, step), join_path(folder, f"milestone-{step:08d}.ckpt"))
    link_or_copy(step_file(folder, step), join_path(folder, LAST))
    _remove_oldest(folder, step, keep_last)


def _remove_oldest(folder: PathOrUrl, step: int, keep_last: int) -> None:
    earlier = [path for number, path in _steps(folder).items() if number <= step]
    for path in earlier[:-keep_last]:
        remove(path)


def make_room(folder: PathOrUrl) -> bool:
    """Remove the oldest of the latest checkpoints if there is more than one; return True if it did."""
    steps = [*_steps(folder).values()]
    if len(steps) < 2:
        return False
    remove(steps[0])
    log.warning("the disk is full: %s was removed to make room for a new checkpoint", steps[0])
    return True


def clear(folder: PathOrUrl, step: int, keep_last: int) -> None:
    """Remove what a kill during a save left behind: partial files, and checkpoints beyond `keep_last`."""
    for path in newest_first(folder, f".ckpt{PARTIAL}"):
        remove(path)
    _remove_oldest(folder, step, keep_last)
