"""Draw every figure of the papers into figures/ and write its index page.

    python -m analyses                      # all of them, about ten minutes on two cores
    python -m analyses 'raghu_fig0*'        # some
    python -m analyses --device cuda --fresh

Goes on where it was stopped: figures that the same command, version and weights have drawn are
left as they are, unless ``--fresh``. A figure that fails is named, and the others are drawn; the
exit status is 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import sys
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import gallery_index  # noqa: E402  (its folder is on the path only now)
from gallery import FIGURES, Figure, keep_small, scripts  # noqa: E402

# What a command that a signal has stopped exits with is above this by the signal's number.
SIGNALLED = 128


def arguments_for(figure: Figure, args: argparse.Namespace) -> list[str]:
    """What the figure's command is told beside its own arguments."""
    given = ["--out", os.path.relpath(args.out)]
    if "images" in inspect.signature(figure.command.measure).parameters:
        given += ["--num-images", str(args.num_images)] if args.num_images else []
        given += ["--device", args.device] if args.device else []
        given += ["--fresh"] if args.fresh else []
    return given


def draw(name: str, args: argparse.Namespace) -> int:
    """Draw one figure and print a line about it; 0, or what went wrong."""
    began, printed = time.monotonic(), io.StringIO()
    try:
        figure: Figure = import_module(name).FIGURE
        given = arguments_for(figure, args)
        path = os.path.relpath(args.out / f"{name}.png")
        if not args.fresh and figure.is_there(args.out, given):
            print(f"{name}: {path} is there", flush=True)
            return 0
        with contextlib.redirect_stdout(printed):
            status = figure.main(given)
        if not status:
            keep_small(args.out / f"{name}.png")
    except Exception as error:
        # A fault of one figure is no reason to lose the others.
        traceback.print_exc()
        print(f"{name}: failed, {type(error).__name__}: {error}", flush=True)
        return 1
    seconds = time.monotonic() - began
    print(f"{name}: {path}, {seconds:.0f} s" if not status else f"{name}: failed", flush=True)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m analyses``."""
    parser = argparse.ArgumentParser(
        prog="python -m analyses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("patterns", nargs="*", metavar="NAME", help="scripts, with wildcards")
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="DIR", help="folder")
    parser.add_argument("--num-images", type=int, metavar="N", help="in place of each figure's own")
    parser.add_argument("--device", help="auto, cpu, cuda, mps")
    parser.add_argument("--fresh", action="store_true", help="draw what is there already too")
    args = parser.parse_args(argv)
    names = scripts(args.patterns)
    if not names:
        parser.error(f"no script matches {' or '.join(args.patterns)}: {', '.join(scripts())}")
    failed = []
    for name in names:
        status = draw(name, args)
        if status > SIGNALLED:
            return status
        failed += [name] if status else []
    print(os.path.relpath(gallery_index.write(args.out, scripts())))
    if failed:
        print(f"{len(failed)} of {len(names)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
