"""The options that every command shares, and how commands start, fail and end."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vitprobe.core.errors import VitprobeError
from vitprobe.core.models import bundled_models
from vitprobe.core.processes import is_main_process
from vitprobe.core.results import FORMATS, Result

INTERRUPTED, FAILED = 130, 2
LONGEST_STEM = 120
DEFAULT_OUT = "vitprobe-out"
# What every command runs on when nothing is said; they come with vitprobe.
DEFAULT_MODELS = ("vit_small_box", "resnet_box")


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument gets one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: {message} (--help lists the options)\n")


def parser(name: str, doc: str | None, *, images: bool = True, layers: bool = True) -> Parser:
    """A parser with the shared options; a measurement adds its own.

    Args:
        name: of the command.
        doc: the module's docstring; its first line is the description.
        images: whether the measurement looks at images.
        layers: whether it measures a choice of layers.
    """
    result = Parser(
        prog=f"python -m vitprobe.{name}",
        description=(doc or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = result.add_argument
    add("--models", nargs="+", metavar="M",
        help="NAME, NAME@random or NAME@FILE; NAME is an alias (vit_b16), a bundled model or a "
        "timm name")  # fmt: skip
    if images:
        add("--images", metavar="PATH",
            help="folder, .tar, .npz, .npy or timm dataset name; the bundled digit scenes if left "
            "out")  # fmt: skip
        add("--num-images", type=int, metavar="N", help="how many, drawn by --seed")
        add("--batch-size", type=int, default=32, metavar="B", help="images a batch (%(default)s)")
        add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the forward passes")
        add("--workers", type=int, metavar="W", help="processes that decode images")
        add("--save-every", type=float, default=30.0, metavar="S",
            help="seconds between two saves of an unfinished run (%(default)s)")  # fmt: skip
        add("--fresh", action="store_true", help="start over instead of resuming")
    if layers:
        add("--layers", nargs="+", default=["blocks"], metavar="L",
            help="blocks (default), paper, all, or names with wildcards")  # fmt: skip
    add("--image-size", type=int, metavar="PX", help="for models that allow another than their own")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--seed", type=int, default=0, help="of choices and untrained weights (%(default)s)")
    add_output(result)
    return result


def add_output(result: argparse.ArgumentParser) -> None:
    """Where to, in which formats, how loud."""
    add = result.add_argument
    add("--out", type=Path, default=Path(DEFAULT_OUT), metavar="DIR", help="folder (%(default)s)")
    add("--stem", metavar="NAME", help="file name without suffix")
    add("--format", nargs="+", choices=FORMATS, default=["png"], help="of the figure")
    add("--quiet", action="store_true", help="no progress bar")
    add("--debug", action="store_true", help="show the traceback of an error")


def options(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The shared options as keyword arguments of ``measure``."""
    shared = ("num_images", "batch_size", "image_size", "device", "precision", "seed", "workers",
              "quiet", "save_every", "fresh")  # fmt: skip
    chosen = {key: getattr(args, key) for key in shared if hasattr(args, key)}
    return {**chosen, "checkpoint": args.out / f".{stem(args, name)}"}


def stem(args: argparse.Namespace, name: str) -> str:
    """``--stem``, or ``NAME-MODEL-MODEL``."""
    if args.stem:
        return args.stem
    whole = "-".join([name, *(slug(model) for model in args.models or [])])
    # File systems take 255 bytes, and suffixes follow.
    if len(whole) > LONGEST_STEM:
        whole = f"{whole[:LONGEST_STEM]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
    return whole


def slug(spec: str) -> str:
    """A model's name as part of a file name."""
    name, _, weights = spec.partition("@")
    if weights == "random":
        name += "-random"
    return re.sub(r"[^\w.+-]+", "_", name)[:60]


def run(
    result_parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    name: str,
    measure: Callable[[argparse.Namespace], Result],
    default_models: Sequence[str] = DEFAULT_MODELS,
) -> int:
    """Parse, measure, save, print the paths and findings; the exit status."""
    args = result_parser.parse_args(argv)

    def body() -> None:
        args.models = args.models or [m for m in default_models if m in bundled_models()]
        if not args.models:
            raise VitprobeError("--models is needed: NAME, NAME@random or NAME@FILE.")
        check_writable(args.out, args.stem)
        result = measure(args)
        if not is_main_process():
            return
        for path in result.save(args.out / stem(args, name), args.format):
            print(path)
        for finding in result.findings():
            print(finding)

    return guarded(body, args.debug)


def guarded(body: Callable[[], None], debug: bool = False) -> int:
    """Call ``body``; what a user can put right becomes one line on stderr."""
    from vitprobe.core.running import Interrupted

    try:
        body()
    except VitprobeError as error:
        if debug:
            traceback.print_exc()
        print(f"vitprobe: {error}", file=sys.stderr)
        return FAILED
    except (KeyboardInterrupt, Interrupted) as stop:
        print(f"vitprobe: {stop or 'stopped'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has left (head, less): nothing to tell it, and nothing went wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def check_writable(out: Path, given_stem: str | None) -> None:
    """Fail before the work, not after it."""
    if given_stem and Path(given_stem).name != given_stem:
        raise VitprobeError(f"--stem is a file name without folders, not {given_stem!r}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".vitprobe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise VitprobeError(f"--out {out} cannot be written: {error.strerror}.") from error
