"""Draw the rooms of the code and their imports: docs/rooms.svg.

    python scripts/draw_rooms.py docs/rooms.svg

Each room is above the rooms that it imports from. A line that follows from others is left out.
"""

import argparse
import ast
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
_EXCLUDED = {"tests", "benchmarks", "outputs", "build", "__init__.py"}


def imports() -> dict[str, set[str]]:
    """Return the rooms that each room (a folder, or a top-level module) imports from."""
    found: dict[str, set[str]] = {}
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py")]):
        top = path.relative_to(ROOT).parts[0]
        if top in _EXCLUDED:
            continue
        room = top.removesuffix(".py")
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        below = {module.split(".")[1] for module in modules if module.startswith("palimpsest.")}
        found[room] = found.get(room, set()) | below - {room}
    return found


def floors(rooms: Mapping[str, set[str]]) -> dict[str, int]:
    """Return the level of each room, which is above those that it imports from.

    Raises:
        CycleError: imports are circular.
    """
    height: dict[str, int] = {}
    for room in TopologicalSorter(rooms).static_order():
        height[room] = 1 + max((height[other] for other in rooms[room]), default=-1)
    return height


def needed(rooms: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the imports that do not follow from others."""
    below: dict[str, set[str]] = {}
    for room in TopologicalSorter(rooms).static_order():
        below[room] = rooms[room].union(*(below[other] for other in rooms[room]))
    return {room: {a for a in others if not any(a in below[b] for b in others - {a})} for room, others in rooms.items()}


def draw(path: Path) -> None:
    """Write the picture."""
    rooms = imports()
    height = floors(rooms)
    rows = [[room for room in sorted(rooms) if height[room] == level] for level in range(max(height.values()) + 1)]
    place = {}
    for level, row in enumerate(rows):
        for number, room in enumerate(row):
            place[room] = ((number + 0.5) / len(row) * 10, level)
    rcParams["svg.hashsalt"] = "rooms"
    figure = Figure(figsize=(9, 0.75 * len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10), ylim=(-0.5, len(rows) - 0.5))
    axes.axis("off")
    for room, others in needed(rooms).items():
        for other in sorted(others):
            axes.plot(*zip(place[room], place[other], strict=True), color="#8a8f98", linewidth=0.8, zorder=0)
    box = {"boxstyle": "round,pad=0.35", "facecolor": "#eef2f7", "edgecolor": "#5b6b80"}
    for room, (x, y) in place.items():
        axes.text(x, y, room, ha="center", va="center", fontsize=9.5, family="monospace", bbox=box)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the .svg file to write")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
