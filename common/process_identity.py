"""Identification of a running process beyond its number, which other containers and later processes may share."""

import os
from pathlib import Path


def process_table() -> str | None:
    """Return an identifier of this boot and container, within which process numbers are unique; None without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def process_status(pid: int) -> tuple[str, int] | None:
    """Return the state letter and the start time [kernel clock ticks] of a process; None if it or /proc is missing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])  # fields 3 and 22 of proc(5), of which the first two are cut off
