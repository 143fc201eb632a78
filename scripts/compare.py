"""Compare runs: a table in the terminal, comparison.html and comparison.csv.

python main.py compare outputs/reviews/*            # or: palimpsest compare ...
python main.py compare --out comparison run-a run-b # differences are to the first
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from palimpsest.evaluation.comparison import compare, read_runs
from palimpsest.report.comparison import comparison_lines, write_comparison


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the runs that are named."""
    parser = argparse.ArgumentParser(prog="palimpsest compare", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", help="folders of runs, or above them; the first run is the reference")
    parser.add_argument("--out", default="comparison", help="folder for comparison.html and comparison.csv")
    typed = parser.parse_args(arguments)
    try:
        found = compare(read_runs(typed.folders))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(comparison_lines(found))
    command = f"python main.py compare {shlex.join(typed.folders)}"
    print(*write_comparison(found, Path(typed.out), command), sep="\n")


def say_how(begun: float, words: Sequence[str]) -> None:
    """Print the command that compares the results written since `begun`, if there are several.

    words: the command, which may say where they are (output_dir, checkpointing.save_dir).
    """
    typed = [word.partition("=")[2] for word in words if word.startswith(("output_dir=", "checkpointing.save_dir="))]
    places = {_fixed(place) for value in typed for place in value.split(",")} or {Path("outputs")}
    written = {path for place in places for path in place.rglob("results.json")}
    files = [path for path in written if path.stat().st_mtime >= begun]
    folders = [str(path.parent) for path in sorted(files, key=lambda path: path.stat().st_mtime)]
    if len(folders) > 1:
        print(f"\ncompare them: python main.py compare {shlex.join(folders)}")


def _fixed(place: str) -> Path:
    """Return the folder in `place` that does not depend on other settings."""
    start, found, _ = place.partition("${")
    return Path(start) if not found or start.endswith("/") else Path(start).parent


if __name__ == "__main__":
    main()
