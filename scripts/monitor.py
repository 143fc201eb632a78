"""Monitor trainings from another terminal: step, time left, loss, speed, memory, checkpoint, alive or dead.

    python scripts/monitor.py outputs                     # every training below a folder, live
    python scripts/monitor.py outputs/reviews/micro-0123abcd --once

It reads the run.json of each training (described in training/callbacks/run_state.py) and the times of its checkpoint
files, and writes nothing. Piped, it prints plain lines, once, or every `--interval` seconds if that is given.

A training is dead if its run.json says that it runs but its process does not exist. On another machine, or in another
container, it is dead if run.json is older than both `--silent` seconds and 20 steps.
"""

import argparse
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from palimpsest.common.process_identity import process_status, process_table

FILE, CHECKPOINTS = "run.json", "checkpoints"
RUNNING = ("starting", "training", "validating")
COLOURS = {"dead": "bold red", "failed": "bold red", "silent": "yellow", "stopped": "yellow", "finished": "green"}
_BARS = "▁▂▃▄▅▆▇█"
_NOT_RUNS = {"csv", "tensorboard", "wandb", CHECKPOINTS, "nonfinite"}
_STEP_IN_NAME = re.compile(r"step[=_-]?(\d+)")
_INCOMPLETE = re.compile(r"^\.|\.partial|\.corrupt")  # names of checkpoints that are partial or damaged


@dataclass(frozen=True)
class Row:
    """One training as it is displayed; unknown values are empty."""

    name: str
    state: str
    step: str
    left: str
    loss: str
    curve: str
    validation: str
    speed: str
    memory: str
    checkpoint: str
    note: str

    def line(self) -> str:
        """Return one plain line without the curve."""
        known = {"step": self.step, "left": self.left, "loss": self.loss, "val": self.validation, "speed": self.speed,
                "memory": self.memory, "checkpoint": self.checkpoint}  # fmt: skip
        facts = "  ".join(f"{name} {value}" for name, value in known.items() if value)
        return f"{self.name}  {self.state}  {facts}{'  ' if self.note else ''}{self.note}"


HEADER = ("name", "state", "step", "left", "loss", "curve", "validation", "speed", "memory", "checkpoint", "note")
LEAST_FIRST = ("memory", "validation", "curve", "checkpoint", "speed")


def runs_below(folder: Path) -> Iterator[Path]:
    """Yield the folders with a run.json, including `folder`; those of logs and checkpoints are skipped."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _NOT_RUNS and not name.startswith("."))
        if FILE in files:
            yield Path(path)


def row(folder: Path, name: str, now: float, silent: float) -> Row:
    """Return the training in `folder` at the time `now`."""
    try:
        known = json.loads((folder / FILE).read_text())
        if known["state"] in RUNNING and _is_local(known) and not _is_alive(known):
            known = json.loads((folder / FILE).read_text())  # it may have ended normally since
        return _shown(known, folder, name, now, silent)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # a partial copy, or deleted
        return Row(name, "unreadable", *[""] * 8, note=f"{FILE}: {type(error).__name__}: {error}")


def _shown(known: dict, folder: Path, name: str, now: float, silent: float) -> Row:
    metrics, step, last = known["metrics"], known["step"], known["max_steps"]
    state, note = _state(known, now, silent)
    loss, validation = metrics.get("loss"), known["validation"] or {}
    speed = metrics.get("train/tokens_per_s")
    mfu, skipped = metrics.get("train/mfu"), metrics.get("train/skipped_steps")
    gib = [value for key, value in metrics.items() if key == "memory/peak_gib" and value is not None]
    return Row(
        name,
        state,
        f"{step:,}/{last:,}",
        _left(known, now) if state in RUNNING else "",
        _number(loss),
        sparkline([value for _, value in known["curve"]]),
        _number(validation.get("val/nll")),
        "" if speed is None else f"{speed:,.0f} tok/s" + ("" if mfu is None else f", MFU {mfu:.0%}"),
        "".join(f"{value:.1f} GiB" for value in gib),
        _checkpoint(folder, known, now),
        "; ".join(filter(None, [note, f"{skipped:,.0f} updates left out" if skipped else ""])),
    )


def _state(known: dict, now: float, silent: float) -> tuple[str, str]:
    """Return the state, which may be dead or silent, and the reason."""
    if known["state"] not in RUNNING:
        return known["state"], known["error"] or ""
    age = now - known["updated"]
    patience = max(silent, 20 * (known["metrics"].get("seconds_per_step") or 0.0))
    local = _is_local(known)
    if local and not _is_alive(known):
        return "dead", f"process {known['pid']} is gone, last seen {duration(age)} ago while {known['state']}"
    if age <= patience:
        return known["state"], ""
    if local:
        return "silent", f"process {known['pid']} is alive and has not reported for {duration(age)}"
    return "dead", f"no report from {known['host']} for {duration(age)}"


def _is_local(known: dict) -> bool:
    """Return True if the process belongs to this machine and container; without its table, the host name decides."""
    ours = process_table()
    return known["host"] == socket.gethostname() and known.get("process_table", ours) == ours


def _is_alive(known: dict) -> bool:
    """Return True if the process exists, is no zombie, and is the one that wrote and not a later one of its number."""
    try:
        os.kill(known["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it exists and belongs to another user
        pass
    status = process_status(known["pid"])
    if status is None:
        return not Path("/proc/self/stat").exists()
    return status[0] not in "ZX" and known.get("process_began") in (None, status[1])


def _left(known: dict, now: float) -> str:
    """Return the time left at the pace of this start, validations and pauses included."""
    done = known["step"] - known["first_step"]
    if done <= 0:
        return ""
    pace = (known["updated"] - known["began"]) / done
    return duration(max(0.0, pace * (known["max_steps"] - known["step"]) - (now - known["updated"])))


def _checkpoint(folder: Path, known: dict, now: float) -> str:
    """Return the step and age of the newest file (or folder) in checkpoints/."""
    newest, when = None, 0.0
    with suppress(OSError):  # no folder yet, or a file that has just been replaced
        for entry in os.scandir(folder / CHECKPOINTS):
            changed = entry.stat().st_mtime
            if changed > when and not _INCOMPLETE.search(entry.name):
                newest, when = entry.name, changed
    if newest is None:  # none, or at a URL (checkpointing.save_dir=s3://...)
        saved = known["checkpoint"]
        return f"{duration(now - saved['time'])} ago, step {saved['step']:,}" if saved else ""
    found = _STEP_IN_NAME.search(newest)
    step = int(found[1]) if found else known["checkpoint"] and known["checkpoint"]["step"]
    return f"{duration(now - when)} ago" + ("" if step is None else f", step {step:,}")


def sparkline(values: Sequence[float | None], width: int = 24) -> str:
    """Return `values` as a row of at most `width` bars, with a blank for each missing number.

    The scale ignores the highest tenth, so that the first steps do not flatten the rest.
    """
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    cells = [[v for v in values[a:b] if v is not None] for a, b in zip(edges, edges[1:], strict=False)]
    means = [sum(cell) / len(cell) if cell else math.nan for cell in cells]
    seen = sorted(value for value in means if not math.isnan(value))
    if not seen:
        return " " * count
    low, high = seen[0], seen[max(0, math.ceil(0.9 * len(seen)) - 1)]
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if math.isnan(v) else _BARS[min(len(_BARS) - 1, round((v - low) * scale))] for v in means)


def duration(seconds: float) -> str:
    """Format a duration as 12s, 5m, 3h07 or 2d04h."""
    seconds = max(0, int(seconds))
    days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}"
    return f"{minutes}m" if minutes else f"{seconds}s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def rows(folder: Path, silent: float) -> list[Row]:
    """Return all trainings below `folder`, running ones first."""
    now, found = time.time(), []
    for path in runs_below(folder):
        name = str(path.relative_to(folder)) if path != folder else path.name
        found.append(row(path, name, now, silent))
    return sorted(found, key=lambda shown: shown.state not in (*RUNNING, "silent"))


def table(shown: Sequence[Row], title: str, width: int) -> object:
    """Return a rich table of at most `width` characters, without the least important columns if necessary."""
    from rich.table import Table
    from rich.text import Text

    wide = {name: max((len(getattr(one, name)) for one in shown), default=0) for name in HEADER}
    kept = {name: max(size, len(name)) + 2 for name, size in wide.items() if size}
    kept |= {name: min(kept[name], 32) for name in ("name", "note") if name in kept}  # these wrap
    for name in LEAST_FIRST:
        if sum(kept.values()) > width:
            kept.pop(name, None)
    out = Table(title=title, title_justify="left", title_style="dim", box=None, pad_edge=False, header_style="dim")
    for name in kept:
        justify = "right" if name in ("step", "left", "loss", "speed", "memory") else "left"
        out.add_column(name, justify=justify, no_wrap=name not in ("name", "note"), overflow="fold")
    for one in shown:
        style = COLOURS.get(one.state, "")
        out.add_row(*(Text(getattr(one, name), style if name in ("state", "note") else "") for name in kept))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"))
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument("--interval", type=float, help="seconds between updates (default: 2; once if piped)")
    parser.add_argument("--silent", type=float, default=300.0, help="seconds without a report that are too many (300)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        sys.exit(f"error: there is no folder {args.folder}")
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack the characters of a name or a curve
    piped = not sys.stdout.isatty()
    interval = args.interval if args.interval is not None or piped else 2.0
    interval = None if args.once else interval
    if interval is not None and not interval > 0:
        sys.exit(f"error: --interval {args.interval} must be more than 0 seconds")
    try:
        watch(args.folder, args.silent, interval, piped)
    except (KeyboardInterrupt, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discard what is still buffered


def watch(folder: Path, silent: float, interval: float | None, plain: bool) -> None:
    """Show the trainings once, or every `interval` seconds."""
    if plain or interval is None:
        while True:
            _print(rows(folder, silent), folder, plain)
            if interval is None:
                return
            time.sleep(interval)
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            title = f"{folder}   {time.strftime('%H:%M:%S')}"
            live.update(table(rows(folder, silent), title, console.width), refresh=True)
            time.sleep(interval)


def _print(shown: Sequence[Row], folder: Path, plain: bool) -> None:
    if not shown:
        print(f"no training below {folder} has left a {FILE}")
    elif plain:
        print("\n".join(one.line() for one in shown), flush=True)
    else:
        from rich.console import Console

        console = Console()
        console.print(table(shown, str(folder), console.width))


if __name__ == "__main__":
    main()
