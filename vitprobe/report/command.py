"""Every figure that applies to some models, with the papers' claims, on one page.

Makes all measurements that the models can have, those on the same images from one pass; writes the
numbers of each as ``.npz``, and one self-contained HTML page: the claims with their verdicts, the
figures with how to read them, and where everything came from. A measurement that a model cannot
have (attention in a ResNet) is said on the page and made without that model.

The same command resumes a run that was stopped: what is measured is not measured again, as long as
models, images and settings are the same (``--fresh`` measures everything anew).
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from vitprobe import cli
from vitprobe._version import __version__
from vitprobe.catalogue import measurements
from vitprobe.errors import VitprobeError, shown
from vitprobe.images.sources import open_images
from vitprobe.models.loading import Model, bundled_models, load_models
from vitprobe.report.grid import tally
from vitprobe.report.page import Section, page
from vitprobe.results.drawing import render
from vitprobe.results.printing import as_printed, duration
from vitprobe.results.provenance import command_line
from vitprobe.results.result import Result, load_result
from vitprobe.results.writing import write_atomically
from vitprobe.running import processes
from vitprobe.running.checkpoint import UntilWritten
from vitprobe.running.devices import resolve_device
from vitprobe.running.measurement import Measurement
from vitprobe.running.options import Options
from vitprobe.running.passes import Results, measure_each
from vitprobe.together import measurement_class

DEFAULT_MODELS = ("vit_small_box", "vit_gap_box", "resnet_box")


class Report:
    """Measures what is not measured yet, and keeps the page's sections.

    Args:
        args: of the command.
        models: loaded.
        stem: of the page and of all files beside it, in ``args.out``.
    """

    def __init__(self, args: argparse.Namespace, models: list[Model], stem: str) -> None:
        self.args, self.models, self.stem = args, models, stem
        self.sections: list[Section] = []
        self.provenance = [model.provenance() for model in models]
        self._images = open_images(args.images, args.num_images, args.seed).digest
        self.planned = self._plan()
        self.found = Results()

    def _plan(self) -> dict[str, Measurement]:
        """The measurements in the order of the page."""
        own = {"cka": {"layers": self.args.layers}}
        names = self.args.only or measurements()
        return {name: measurement_class(name)(**own.get(name, {})) for name in names}

    def make(self) -> None:
        """Measure what no file holds yet, and draw everything."""
        asked = {name: self._fingerprint(one) for name, one in self.planned.items()}
        kept = {} if self.args.fresh else {name: self._kept(name, asked[name]) for name in asked}
        options = cli.options(self.args, "report") | {"names": None}
        until_written: UntilWritten = options["checkpoint"]
        # Files of an earlier run may lie on the main process's disk alone.
        absent = processes.of_main_process(
            [name for name in self.planned if not kept.get(name)], resolve_device(self.args.device)
        )
        todo = {name: self.planned[name] for name in absent}
        if todo:
            made = measure_each(todo, self.models, self.args.images, Options(**options), True)
            self.found.missing, self.found.failed = made.missing, made.failed
            for name in todo:
                results = [made[key] for key in made if key.partition(": ")[0] == name]
                for result in results:
                    result.meta["report"] = {"asked": asked[name], "of": len(results)}
                kept[name] = results
        if processes.is_main_process():
            results = [result for name in self.planned for result in kept[name] or []]
            for result in results:
                if self.args.title:
                    result.meta["title"] = shown(self.args.title)
            # All numbers before the first figure: those that were lost would be measured again.
            write_atomically({self._file(result): result.npz() for result in results})
            until_written.written()
            self.args.measured = True
            for result in results:
                self._draw(result)

    def _draw(self, result: Result) -> None:
        file = self._file(result)
        figure = result.plot()
        png = render(figure, "png")
        formats = self.args.format
        drawn = {name: png if name == "png" else render(figure, name) for name in formats}
        write_atomically({file.with_suffix(f".{name}"): one for name, one in drawn.items()})
        reasons = tuple(result.meta.get("without", {}).values())
        self.sections.append(Section(result, figure, png, file.name, reasons))

    def _file(self, result: Result) -> Path:
        """Where a result goes; a pair of models is part of its name."""
        of = result.models if result.analysis == "head_subsets" else []
        name = "-".join([self.stem, result.analysis, *map(cli.as_word, of)])
        return self.args.out / f"{name}.npz"

    def _kept(self, name: str, asked: str) -> list[Result]:
        """The results of the same run in files, if they are all there."""
        found = []
        for file in sorted(self.args.out.glob(f"{glob.escape(self.stem)}-{name}*.npz")):
            try:
                result = load_result(file)
            except VitprobeError:
                continue
            told = result.meta.get("report")
            if not isinstance(told, dict):
                continue
            if result.analysis == name and told.get("asked") == asked:
                found.append(result)
        complete = found and len(found) == found[0].meta["report"].get("of", 1)
        return found if complete else []

    def write(self) -> Path:
        """The page."""
        path = self.args.out / f"{self.stem}.html"
        missing = [(_title(name), why) for name, why in self.found.missing.items()]
        missing += [(_title(name), f"failed: {why}") for name, why in self.found.failed.items()]
        text = page(
            self.sections, missing, self.provenance, command_line(), shown(self.args.title or "")
        )
        write_atomically({path: text.encode(errors="replace")})
        return path

    def _fingerprint(self, measurement: Measurement) -> str:
        """sha256 of all that decides a result: another one is another run."""
        args = self.args
        facts = {
            "measurement": repr(measurement),
            "models": self.provenance,
            "images": self._images,
            "num_images": args.num_images,
            "image_size": args.image_size,
            "batch_size": args.batch_size,
            "precision": args.precision,
            "seed": args.seed,
            "vitprobe": __version__,
        }
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _title(name: str) -> str:
    return import_module(f"vitprobe.{name}").RESULT.text.title


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.report``."""
    known = list(measurements())
    parser = cli.parser("report", __doc__)
    parser.add_argument(
        "--only", nargs="+", choices=known, metavar="NAME",
        help=f"measure these alone: {', '.join(known)}",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.began = time.monotonic()

    def body() -> None:
        args.models = args.models or [m for m in DEFAULT_MODELS if m in bundled_models()]
        cli.check_writable(args.out, cli.stem(args, "report"), ("html",))
        models = load_models(args.models, args.image_size, args.seed, args.names)
        report = Report(args, models, cli.stem(args, "report"))
        report.make()
        processes.leave()
        if processes.is_main_process():
            path = report.write()
            findings = [one for section in report.sections for one in section.result.findings()]
            if args.json:
                files = [path, *(args.out / section.file for section in report.sections)]
                cli.conclude(args, files, findings)
            else:
                print(as_printed(path))
                print(tally(findings))
                print(f"Took {duration(time.monotonic() - args.began)}.")
        if report.found.failed:
            name, why = next(iter(report.found.failed.items()))
            raise VitprobeError(
                f"{len(report.found.failed)} of {len(report.planned)} measurements failed: "
                f"{name}: {why}"
            )

    return cli.guarded(body, args.debug, lambda: cli.saved(args))
