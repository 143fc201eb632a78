"""A page in the browser that samples texts from a beginning or a template, and classifies texts.

python -m palimpsest.app                                              the runs of ./outputs, the newest chosen
python -m palimpsest.app --checkpoint outputs/reviews/micro-0123abcd  a run, or all runs of a folder; may be repeated
python -m palimpsest.app --checkpoint last.ckpt --port 7861 data.cache_dir=/scratch

It prints its address, which ends with ?token=...; it serves this machine only, and only with that token. Other settings
are typed as for main.py: key=value.
"""

import argparse
import importlib.util
import os
import sys

from palimpsest.common.output import guard_output
from palimpsest.settings import command_line

_NEEDED = "gradio==6.31.0"  # the extra `app` of pyproject.toml, which an installed package does not have
PORT = 7860


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = argparse.ArgumentParser(
        prog="python -m palimpsest.app", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "a .ckpt file of a training here, or a folder with runs; may be repeated"
    out.add_argument("--checkpoint", action="append", default=[], metavar="PATH", help=about)
    out.add_argument("--port", type=int, default=PORT, help=f"on 127.0.0.1 ({PORT}); 0: any free port")
    out.add_argument("overrides", nargs="*", metavar="key=value", help="anything else that main.py takes")
    return out


def main() -> None:
    guard_output()
    args = parser().parse_intermixed_args()
    if importlib.util.find_spec("gradio") is None:
        sys.exit(f"error: python -m palimpsest.app needs gradio, which is not installed here: pip install {_NEEDED}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from palimpsest.app.guard import new_token
    from palimpsest.app.page import page  # late, because gradio may be missing and reads the environment
    from palimpsest.app.runs import find
    from palimpsest.app.server import HOST, listen, serve
    from palimpsest.training.processes import quiet_lightning

    quiet_lightning()
    with command_line.clear_errors():
        listening = listen(args.port)
        blocks = page(find(args.checkpoint), args.overrides)
    token = new_token()
    print(f"http://{HOST}:{listening.getsockname()[1]}/?token={token}   (Ctrl-C ends it)", flush=True)
    serve(blocks, listening, token)


if __name__ == "__main__":
    main()
