"""What trainings are doing, from another terminal: step, time left, loss, speed, memory, checkpoint, alive or dead.

    python scripts/monitor.py outputs                     # every training below a folder, live
    python scripts/monitor.py outputs/reviews/micro-0123abcd --once

Reads the run.json that every training keeps in its folder (training/callbacks/run_state.py says what is in it) and the
times of
its checkpoint files, and writes nothing. Piped, it prints plain lines, once, or every `--interval` seconds if that is
given.

A training is dead if its run.json says that it runs and its process does not: on this machine at once when there is no
such process (any more), on another, or in another container, when run.json is older than both `--silent` seconds and
20 steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FILE, CHECKPOINTS = "run.json", "checkpoints"
RUNNING = ("starting", "training", "validating")
COLOURS = {"dead": "bold red", "failed": "bold red", "silent": "yellow", "stopped": "yellow", "finished": "green"}
_BARS = "▁▂▃▄▅▆▇█"
_NOT_RUNS = {"csv", "tensorboard", "wandb", CHECKPOINTS, "nonfinite"}
_STEP_IN_NAME = re.compile(r"step[=_-]?(\d+)")


@dataclass(frozen=True)
class Row:
    """One training as it is shown; texts are empty where nothing is known."""

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
        """One plain line without a curve."""
        said = {"step": self.step, "left": self.left, "loss": self.loss, "val": self.validation, "speed": self.speed,
                "memory": self.memory, "checkpoint": self.checkpoint}  # fmt: skip
        facts = "  ".join(f"{name} {value}" for name, value in said.items() if value)
        return f"{self.name}  {self.state}  {facts}{'  ' if self.note else ''}{self.note}"


HEADER = ("name", "state", "step", "left", "loss", "curve", "validation", "speed", "memory", "checkpoint", "note")
LEAST_FIRST = ("memory", "validation", "curve", "checkpoint", "speed")


def runs_below(folder: Path) -> Iterator[Path]:
    """Folders with a run.json, `folder` itself included; those that hold logs and checkpoints are not looked into."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _NOT_RUNS and not name.startswith("."))
        if FILE in files:
            yield Path(path)


def row(folder: Path, name: str, now: float, silent: float) -> Row:
    """The training in `folder` at the time `now`."""
    try:
        known = json.loads((folder / FILE).read_text())
        if known["state"] in RUNNING and _here(known) and not _lives(known):
            known = json.loads((folder / FILE).read_text())  # it may have ended in order since, and said so
        return _shown(known, folder, name, now, silent)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # half a copy, or gone meanwhile
        return Row(name, "unreadable", *[""] * 8, note=f"{FILE}: {type(error).__name__}: {error}")


def _shown(known: dict, folder: Path, name: str, now: float, silent: float) -> Row:
    metrics, step, last = known["metrics"], known["step"], known["max_steps"]
    state, note = _state(known, now, silent)
    loss, validation = metrics.get("loss"), known["validation"] or {}
    speed = metrics.get("train/tokens_per_s")
    mfu, skipped = metrics.get("train/mfu"), metrics.get("train/skipped_steps")
    gib = [value for key, value in metrics.items() if key == "memory/peak_gib" and value is not None]
    return Row(
        name, state, f"{step:,}/{last:,}", _left(known, now) if state in RUNNING else "", _number(loss),
        sparkline([value for _, value in known["curve"]]), _number(validation.get("val/nll")),
        "" if speed is None else f"{speed:,.0f} tok/s" + ("" if mfu is None else f", MFU {mfu:.0%}"),
        "".join(f"{value:.1f} GiB" for value in gib), _checkpoint(folder, known, now),
        "; ".join(filter(None, [note, f"{skipped:,.0f} updates left out" if skipped else ""])),
    )  # fmt: skip


def _state(known: dict, now: float, silent: float) -> tuple[str, str]:
    """The state, which may be dead or silent, and why."""
    if known["state"] not in RUNNING:
        return known["state"], known["error"] or ""
    age = now - known["updated"]
    patience = max(silent, 20 * (known["metrics"].get("seconds_per_step") or 0.0))
    here = _here(known)
    if here and not _lives(known):
        return "dead", f"process {known['pid']} is gone, last seen {duration(age)} ago while {known['state']}"
    if age <= patience:
        return known["state"], ""
    if here:
        return "silent", f"process {known['pid']} lives and has said nothing for {duration(age)}"
    return "dead", f"no word from {known['host']} for {duration(age)}"


def _here(known: dict) -> bool:
    """Whether the process, if it is there, can be seen from here. Containers may have the name of their machine, and
    each counts its own processes (training/callbacks/run_state.py); where that was not noted the name decides."""
    ours = _process_table()
    return known["host"] == socket.gethostname() and known.get("process_table", ours) == ours


def _process_table() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _lives(known: dict) -> bool:
    """Whether the process is there, still runs (one that has ended stays as a zombie until its parent looks), and is
    the one that wrote: a later one may have been given its number."""
    try:
        os.kill(known["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, and there
        pass
    try:
        fields = Path(f"/proc/{known['pid']}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return not Path("/proc/self/stat").exists()
    return fields[0] not in "ZX" and known.get("process_began") in (None, int(fields[19]))


def _left(known: dict, now: float) -> str:
    """Time left at the pace of this start, validations and pauses included."""
    done = known["step"] - known["first_step"]
    if done <= 0:
        return ""
    pace = (known["updated"] - known["began"]) / done
    return duration(max(0.0, pace * (known["max_steps"] - known["step"]) - (now - known["updated"])))


def _whole(name: str) -> bool:
    """Neither half-written nor set aside as damaged."""
    return not name.startswith(".") and not any(part in name for part in (".partial", ".corrupt"))


def _checkpoint(folder: Path, known: dict, now: float) -> str:
    """Step and age of the newest file (or folder) of checkpoints/."""
    newest, when = None, 0.0
    try:
        for entry in os.scandir(folder / CHECKPOINTS):
            changed = entry.stat().st_mtime
            if changed > when and _whole(entry.name):
                newest, when = entry.name, changed
    except OSError:  # none yet, or one that has just been replaced
        pass
    if newest is None:  # there is none, or it is kept elsewhere (checkpointing.save_dir=s3://...)
        saved = known["checkpoint"]
        return f"{duration(now - saved['time'])} ago, step {saved['step']:,}" if saved else ""
    found = _STEP_IN_NAME.search(newest)
    noted = known["checkpoint"] and known["checkpoint"]["step"]
    step = int(found[1]) if found else noted
    return f"{duration(now - when)} ago" + ("" if step is None else f", step {step:,}")


def sparkline(values: Sequence[float | None], width: int = 24) -> str:
    """`values` as a row of at most `width` bars; a blank where there is no number. The scale leaves out the highest
    tenth, so that the first steps do not flatten all that follows."""
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
    """12s, 5m, 3h07, 2d04h."""
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
    """All trainings below `folder`, those that run first."""
    now, found = time.time(), []
    for path in runs_below(folder):
        name = str(path.relative_to(folder)) if path != folder else path.name
        found.append(row(path, name, now, silent))
    return sorted(found, key=lambda shown: shown.state not in (*RUNNING, "silent"))


def table(shown: Sequence[Row], title: str, width: int) -> object:
    """A rich table; where `width` characters are too few, the columns that matter least are left out."""
    from rich.table import Table
    from rich.text import Text

    wide = {name: max((len(getattr(one, name)) for one in shown), default=0) for name in HEADER}
    kept = {name: max(size, len(name)) + 2 for name, size in wide.items() if size}
    kept |= {name: min(kept[name], 32) for name in ("name", "note") if name in kept}  # these may be folded
    for name in LEAST_FIRST:
        if sum(kept.values()) > width:
            kept.pop(name, None)
    out = Table(title=title, title_justify="left", title_style="dim", box=None, pad_edge=False, header_style="dim")
    for name in kept:
        out.add_column(name, justify="right" if name in ("step", "left", "loss", "speed", "memory") else "left",
                       no_wrap=name not in ("name", "note"), overflow="fold")  # fmt: skip
    for one in shown:
        style = COLOURS.get(one.state, "")
        out.add_row(*(Text(getattr(one, name), style if name in ("state", "note") else "") for name in kept))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"))
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument("--interval", type=float, help="seconds between looks (2; where piped: one look)")
    parser.add_argument("--silent", type=float, default=300.0, help="seconds without a word that are too many (300)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        sys.exit(f"error: there is no folder {args.folder}")
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack the signs of a name or a curve
    piped = not sys.stdout.isatty()
    interval = (
        None if args.once or (piped and args.interval is None) else 2.0 if args.interval is None else args.interval
    )
    if interval is not None and not interval > 0:
        sys.exit(f"error: --interval {args.interval} must be more than 0 seconds")
    try:
        watch(args.folder, args.silent, interval, piped)
    except (KeyboardInterrupt, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads what is still buffered


def watch(folder: Path, silent: float, interval: float | None, plain: bool) -> None:
    """Show once, or again every `interval` seconds."""
    if plain or interval is None:
        while True:
            _print(rows(folder, silent), folder, plain)
            if interval is None:
                return
            time.sleep(interval)
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with Live(table(rows(folder, silent), str(folder), console.width), console=console, screen=True,
              auto_refresh=False) as live:  # fmt: skip
        while True:
            time.sleep(interval)
            title = f"{folder}   {time.strftime('%H:%M:%S')}"
            live.update(table(rows(folder, silent), title, console.width), refresh=True)


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
