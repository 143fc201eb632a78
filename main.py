"""python main.py [mode=train|ppl_eval|sample_eval|classify] [data=...] [key=value ...]

The Hydra entry. Modules are imported when they are needed, so that `--help` answers at once.
"""

import importlib.util
import os
import sys
import time
from importlib import import_module as late
from pathlib import Path

FOLDER = os.fspath(Path(__file__).resolve().parent)


def _be_the_package(folder: str = FOLDER) -> None:
    """Make the folder of this file the package, installed or not, unless it is imported already."""
    if "palimpsest" not in sys.modules:
        spec = importlib.util.spec_from_file_location("palimpsest", f"{folder}/__init__.py")
        sys.modules["palimpsest"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["palimpsest"])


_be_the_package()

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from palimpsest.common.output import guard_output  # noqa: E402
from palimpsest.settings import command_line  # noqa: E402


@hydra.main(version_base="1.3", config_path=f"{FOLDER}/configs", config_name="config")
def _hydra_main(cfg: DictConfig) -> float | None:
    _be_the_package()  # a launcher (submitit) sends this function to a process that knows nothing else
    return late("palimpsest.experiment.running").job(cfg)


def main() -> None:
    guard_output()
    if sys.argv[1:2] == ["compare"]:
        late("palimpsest.scripts.compare").main(sys.argv[2:])
        return
    begun = time.time()
    with command_line.clear_errors():
        words = command_line.translate(sys.argv[1:])
        if any(word.lstrip("+").startswith("eval.checkpoint_path=") for word in words):
            words = late("palimpsest.experiment.from_checkpoint").complete(words)
        sys.argv[1:] = words
        _hydra_main()
    if {"-m", "--multirun"} & set(sys.argv):
        late("palimpsest.scripts.compare").say_how(begun, words)
    if signals := sys.modules.get("palimpsest.training.signals"):
        signals.SIGNALS.finished()


if __name__ == "__main__":
    main()
