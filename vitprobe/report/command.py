"""Every figure of the papers that applies to some models, and whether the claims hold, on one page.

Runs all measurements that the models can have, writes the numbers of each as ``.npz``, and one HTML
page that needs nothing beside itself: the claims with their verdicts, the figures with how to read
them, and where everything came from. A measurement that a model cannot have (attention in a
ResNet) is said on the page and made without that model.

A run that was stopped goes on with the same command: what is measured is not measured again, as
long as models, images and settings are the same (``--fresh`` measures everything anew).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vitprobe import cli
from vitprobe._version import __version__
from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.images.labelled import open_task
from vitprobe.images.sources import open_images
from vitprobe.models.loading import Model, bundled_models, load_models
from vitprobe.report.page import Section, page
from vitprobe.results.drawing import render
from vitprobe.results.provenance import command_line
from vitprobe.results.result import ANALYSES, Result, load_result
from vitprobe.results.writing import write_atomically
from vitprobe.running import processes
from vitprobe.running.checkpoint import UntilWritten
from vitprobe.running.options import Options
from vitprobe.running.session import session
from vitprobe.tracing.attention_map import map_attention

DEFAULT_MODELS = ("vit_small_box", "vit_gap_box", "resnet_box")
WEIGHTS_ALONE = ("position_embedding", "patch_embedding")


@dataclass(frozen=True)
class Measurement:
    """One measurement to make.

    Attributes:
        analysis: its name.
        models: that are to be in it.
        options: of its ``measure`` beside the shared ones.
    """

    analysis: str
    models: list[Model]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """What its file is called after the report; a pair of models is part of it."""
        if self.analysis != "head_subsets":
            return self.analysis
        return "-".join([self.analysis, *(cli.as_word(model.name) for model in self.models)])


def planned(args: argparse.Namespace, models: list[Model]) -> list[Measurement]:
    """The measurements in the order of the page, with what each is told."""
    given: dict[str, dict[str, Any]] = {
        "cka": {"layers": args.layers},
        # Rollouts are pictures of single images, and gradients take a pass a channel: both have
        # numbers of images of their own, as in the papers.
        "attention_rollout": {"num_images": None},
        "receptive_field": {"num_images": None},
    }
    if args.num_images is not None and args.images is not None:
        given["linear_probe"] = {"num_images": _test_images(args)}
    found: list[Measurement] = []
    for analysis in args.only or ANALYSES:
        options = given.get(analysis, {})
        if analysis == "head_subsets":
            found += [Measurement(analysis, pair, options) for pair in _pairs(args, models)]
        else:
            found.append(Measurement(analysis, models, options))
    return found


def _test_images(args: argparse.Namespace) -> int | None:
    """As many as asked for, or as the images leave when probes have been fitted."""
    try:
        task = open_task(args.images, None, shots=10, draws=3, num_test=None, seed=args.seed)
    except NotApplicable:
        return None  # as the measurement itself will say
    return min(args.num_images, len(task.test))


def _pairs(args: argparse.Namespace, models: list[Model]) -> list[list[Model]]:
    """Every model with attention beside the first without."""
    shared = cli.options(args, "report") | {"num_images": None, "checkpoint": None}
    attend: list[Model] = []
    do_not: list[Model] = []
    with session(models, args.images, Options(**shared)) as ready:
        for model, example in zip(models, ready.example()):
            with ready.autocast():
                try:
                    found = map_attention(model.name, model.module, example)
                except NotApplicable:
                    continue  # its tokens cannot be placed, nor can its distances be measured
            (attend if found.layers else do_not).append(model)
    return [[model, do_not[0]] for model in attend] if do_not else []


def make(
    measurement: Measurement, args: argparse.Namespace, kept: UntilWritten
) -> tuple[Result, dict[str, str]]:
    """Measure, leaving out the models that cannot have it.

    Returns:
        the result, and why models are not in it, by their names.

    Raises:
        NotApplicable: none of the models can have it, or these images cannot.
        VitprobeError: whatever else goes wrong.
    """
    module = import_module(f"vitprobe.{measurement.analysis}")
    models = list(measurement.models)
    without: dict[str, str] = {}
    while True:
        try:
            if measurement.analysis in WEIGHTS_ALONE:
                return module.measure(models, seed=args.seed), without
            # The models are loaded and have their names; a measurement may leave some out.
            options = cli.options(args, "report") | {"checkpoint": kept, "names": None}
            if measurement.analysis == "receptive_field":
                del options["batch_size"]  # a graph of gradients takes smaller batches
            options |= measurement.options
            return module.measure(models, args.images, **options), without
        except NotApplicable as error:
            left = [model for model in models if model.name != error.model]
            if not left or len(left) == len(models) or measurement.analysis == "head_subsets":
                raise
            models, without[error.model] = left, str(error)


class Report:
    """Measures what is not measured yet, and keeps the page's sections.

    Args:
        args: of the command.
        models: loaded.
        stem: of the page and of all files beside it, in ``args.out``.
    """

    def __init__(self, args: argparse.Namespace, models: list[Model], stem: str) -> None:
        self.args, self.stem = args, stem
        self.sections: list[Section] = []
        self.missing: list[tuple[str, str]] = []
        self.failed: list[str] = []
        self.provenance = [model.provenance() for model in models]
        self._images = open_images(args.images, args.num_images, args.seed).digest

    def add(self, measurement: Measurement) -> None:
        """Make a measurement, or take it from its file, and draw it."""
        file = self.args.out / f"{self.stem}-{measurement.name}.npz"
        asked = self._fingerprint(measurement)
        result = None if self.args.fresh else _kept(file, asked)
        kept = UntilWritten(file.with_name(f".{file.stem}"))
        if result is None:
            try:
                result, without = make(measurement, self.args, kept)
            except NotApplicable as error:
                self.missing.append((measurement.analysis, str(error)))
                return
            except VitprobeError as error:
                # One measurement that goes wrong takes none of the others with it.
                self.missing.append((measurement.analysis, f"failed: {error}"))
                self.failed.append(f"{measurement.analysis}: {error}")
                return
            result.meta["report"] = {"asked": asked, "without": without}
        if not processes.is_main_process():
            return
        figure = result.plot()
        png = render(figure, "png")
        drawn = {name: png if name == "png" else render(figure, name) for name in self.args.format}
        contents = {file.with_suffix(f".{name}"): content for name, content in drawn.items()}
        write_atomically({**contents, file: result.npz()})
        kept.written()
        reasons = tuple(result.meta["report"]["without"].values())
        self.sections.append(Section(result, figure, png, file.name, reasons))

    def write(self) -> Path:
        """The page."""
        path = self.args.out / f"{self.stem}.html"
        text = page(self.sections, self.missing, self.provenance, command_line())
        write_atomically({path: text.encode()})
        return path

    def _fingerprint(self, measurement: Measurement) -> str:
        """sha256 of all that decides a result: another one is another run."""
        names = [model.name for model in measurement.models]
        args = self.args
        facts = {
            "analysis": measurement.analysis,
            "models": [one for one in self.provenance if one["name"] in names],
            "images": self._images,
            "num_images": args.num_images,
            "options": measurement.options,
            "image_size": args.image_size,
            "batch_size": args.batch_size,
            "precision": args.precision,
            "seed": args.seed,
            "vitprobe": __version__,
        }
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def _kept(file: Path, asked: str) -> Result | None:
    """The result of the same run in a file, if there is one."""
    try:
        result = load_result(file)
    except VitprobeError:
        return None
    return result if result.meta.get("report", {}).get("asked") == asked else None


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.report``."""
    parser = cli.parser("report", __doc__)
    parser.add_argument(
        "--only", nargs="+", choices=ANALYSES, metavar="NAME",
        help=f"measure these alone: {', '.join(ANALYSES)}",
    )  # fmt: skip
    args = parser.parse_args(argv)
    failed: list[str] = []

    def body() -> None:
        args.models = args.models or [m for m in DEFAULT_MODELS if m in bundled_models()]
        cli.check_writable(args.out, cli.stem(args, "report"))
        models = load_models(args.models, args.image_size, args.seed, args.names)
        report = Report(args, models, cli.stem(args, "report"))
        plan = planned(args, models)
        for number, measurement in enumerate(plan, 1):
            _tell(args, f"{number} of {len(plan)}: {measurement.analysis}")
            report.add(measurement)
        if "head_subsets" in (args.only or ANALYSES) and not any(
            measurement.analysis == "head_subsets" for measurement in plan
        ):
            why = "needs a model with attention and one without."
            report.missing.append(("head_subsets", why))
        failed.extend(report.failed)
        processes.leave()
        if processes.is_main_process():
            path = report.write()
            for written in (path, *(args.out / section.file for section in report.sections)):
                print(written)
            for section in report.sections:
                for finding in section.result.findings():
                    print(finding)
        if failed:
            raise VitprobeError(f"{len(failed)} of {len(plan)} measurements failed: {failed[0]}")

    return cli.guarded(body, args.debug)


def _tell(args: argparse.Namespace, line: str) -> None:
    if sys.stderr.isatty() and not args.quiet and processes.is_main_process():
        print(line, file=sys.stderr)
