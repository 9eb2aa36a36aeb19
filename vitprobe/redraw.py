"""Draw a saved result again, without its models, in another format."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vitprobe import cli
from vitprobe.errors import VitprobeError, describe, ran_out, shown
from vitprobe.results.drawing import render
from vitprobe.results.result import Finding, load_result
from vitprobe.results.writing import write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.redraw FILE``."""
    parser = cli.plain_parser(
        "redraw",
        __doc__ or "",
        "vitprobe-out/cka-vit_b16-resnet50.npz --format pdf",
        "vitprobe-out/*.npz --format svg --out figures",
        usage="FILE [FILE ...] [options]",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".npz of a measurement")
    cli.add_output(parser, out=None)
    args = parser.parse_args(argv)
    args.began = time.monotonic()

    def body() -> None:
        paths: list[Path] = []
        findings: list[Finding] = []
        for file in args.files:
            result = load_result(file)
            out = args.out or file.parent
            stem = args.stem or file.stem
            cli.check_writable(out, stem, args.format)
            if args.title:
                result.meta["title"] = shown(args.title)
            try:
                figure = result.figure()
                drawn = {out / f"{stem}.{name}": render(figure, name) for name in args.format}
                found = result.findings()
            except VitprobeError:
                raise
            except Exception as error:
                if ran_out(error):
                    raise
                # The file says what is to be drawn: whatever is wrong, it is the reason.
                raise VitprobeError(
                    f"{file} cannot be drawn, it is damaged or of another version: "
                    f"{describe(error)}"
                ) from error
            write_atomically(drawn)
            paths += drawn
            findings += found
        cli.conclude(args, paths, findings)

    return cli.guarded(body, args.debug)


if __name__ == "__main__":
    sys.exit(main())
