"""The options that every command shares, and how commands start and end."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from vitprobe.errors import VitprobeError, nearest, shown
from vitprobe.models.loading import bundled_models
from vitprobe.models.names import ALIASES, label
from vitprobe.results.printing import print_files, print_json
from vitprobe.results.result import FORMATS, Finding, Result
from vitprobe.results.writing import check_folder
from vitprobe.running import processes
from vitprobe.running.checkpoint import UntilWritten
from vitprobe.running.ending import FAILED, RESUME, guarded
from vitprobe.running.interrupts import Interrupted
from vitprobe.running.measurement import Measurement, WeightsMeasurement

MAX_STEM = 120
DEFAULT_OUT = "vitprobe-out"
# Windows opens devices under these names, whatever follows a dot, and keeps these characters.
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_KEPT_BY_WINDOWS = '<>:"|?*\\/'
# Set by the shell while it asks: argcomplete's, its value the place of the command in the line.
COMPLETION = "_ARGCOMPLETE"
# What every command runs on when nothing is said; they come with vitprobe.
DEFAULT_MODELS = ("vit_small_box", "resnet_box")
# Models in the examples of commands that a CNN cannot have.
_EXAMPLES = {
    "attention_distance": "vit_b16 dino_b16",
    "attention_rollout": "vit_b16 dino_b16",
    "localization": "vit_b16 dino_b16",
    "position_embedding": "vit_b16 vit_l16",
}


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong argument gets one line that names the option and the nearest one."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        if COMPLETION in os.environ:
            complete(self)
        found, left = self.parse_known_args(args, namespace)
        if left:
            self.error(self._unknown(left))
        return found

    def _unknown(self, left: list[str]) -> str:
        wrong = next((one for one in left if one.startswith("-")), None)
        if wrong is not None:
            name = wrong.partition("=")[0]
            return f"unknown option {name}.{nearest(name, self._option_string_actions, 1)}"
        way = f" Did you mean --models {' '.join(left)}?"
        if "--models" not in self._option_string_actions:
            way = ""
        return f"unexpected argument {left[0]!r}.{way}"

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        for pattern, way in _PLAINLY:
            message = re.sub(pattern, way, message)
        self.exit(FAILED, f"{self.prog}: {shown(message)} (--help lists the options)\n")


def complete(result: argparse.ArgumentParser) -> None:
    """Tell the shell what may follow, where argcomplete asks for it, and exit."""
    with suppress(ImportError):
        import argcomplete

        argcomplete.autocomplete(result)


def _choices(match: re.Match[str]) -> str:
    *most, last = (name.strip("' ") for name in match[2].split(","))
    listed = " or ".join(filter(None, [", ".join(most), last]))
    return f"expected {listed}, not {match[1]}.{nearest(match[1].strip(chr(39)), [*most, last], 1)}"


# argparse's words -> what they mean to somebody who writes no Python.
_PLAINLY: tuple[tuple[str, Any], ...] = (
    (r"invalid int value: (.*)", r"expected a whole number, not \1."),
    (r"invalid float value: (.*)", r"expected a number, not \1."),
    (r"invalid choice: (.*?) \(choose from (.*)\)", _choices),
    (r"(expected .* arguments?)$", r"\1."),
)


def parser(name: str, doc: str | None, *, images: bool = True, layers: bool = True) -> Parser:
    """A parser with the shared options in groups; a measurement adds its own.

    Args:
        name: of the command.
        doc: the module's docstring; its first two paragraphs are the description.
        images: whether the measurement looks at images.
        layers: whether it measures a choice of layers.
    """
    models = _EXAMPLES.get(name, "vit_b16 resnet50")
    folder = " --images FOLDER --num-images 512" if images else ""
    result = plain_parser(
        name,
        "\n\n".join((doc or "").split("\n\n")[:2]),
        f"--models {models}{folder}",
        f"--models {models.split()[0]} {models.split()[0]}@random --format pdf",
        usage="[options]",
    )
    add = result.add_argument_group("models").add_argument
    models_option: Any = add("--models", nargs="+", metavar="M",
        help="NAME, NAME@random (untrained) or NAME@FILE; `vitprobe models` lists the names "
        "(default: bundled models)")  # fmt: skip
    models_option.completer = lambda **asked: [*bundled_models(), *ALIASES]
    add("--names", nargs="+", metavar="A", help="what figures call the models, one for each")
    if layers:
        add("--layers", nargs="+", default=["blocks"], metavar="L",
            help="blocks, paper, all, or names with wildcards; `vitprobe layers MODEL` lists them "
            "(default: blocks)")  # fmt: skip
    add("--image-size", type=int, metavar="PX",
        help="for models that accept sizes other than their own")  # fmt: skip
    if images:
        add = result.add_argument_group("images").add_argument
        add("--images", metavar="PATH",
            help="folder, .tar, .npz, .npy or timm dataset (default: bundled digit "
            "scenes)")  # fmt: skip
        add("--num-images", type=int, metavar="N",
            help="how many, drawn by --seed (default: all of a folder)")  # fmt: skip
        add("--batch-size", type=int, default=32, metavar="B",
            help="images per batch (default: %(default)s)")  # fmt: skip
        add("--workers", type=int, metavar="W",
            help="processes that decode images (default: by the number of cores)")  # fmt: skip
    add = result.add_argument_group("run").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")
    if images:
        add("--precision", choices=("fp32", "bf16"), default="fp32",
            help="of the forward passes (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="S",
        help="of every random choice and of untrained weights (default: %(default)s)")  # fmt: skip
    if images:
        add("--save-every", type=float, default=30.0, metavar="S",
            help="seconds between saves of an unfinished run (default: %(default)s)")  # fmt: skip
        add("--fresh", action="store_true", help="start over instead of resuming")
        add("--on-error", choices=("stop", "skip"), default="stop",
            help="skip: leave out batches with values that are not finite")  # fmt: skip
    add_output(result)
    return result


def plain_parser(name: str, description: str, *examples: str, usage: str | None = None) -> Parser:
    """A parser without options: what the command does in two sentences, and examples of it."""
    width = min(shutil.get_terminal_size().columns, 100) - 2
    lines = "".join(f"\n  vitprobe {name} {example}" for example in examples)
    return Parser(
        prog=f"vitprobe {name}",
        usage=usage and f"%(prog)s {usage}",
        description=textwrap.fill(" ".join(description.split()), width),
        epilog=f"examples:{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_output(result: argparse.ArgumentParser, out: str | None = DEFAULT_OUT) -> None:
    """Where to, in which formats, how loud; without ``out`` a file goes beside its numbers."""
    add = result.add_argument_group("output").add_argument
    add("--out", type=Path, default=Path(out) if out else None, metavar="DIR",
        help=f"folder (default: {out or 'that of FILE'})")  # fmt: skip
    add("--stem", metavar="NAME", help="file name without suffix (default: COMMAND-MODEL-MODEL)")
    add("--format", nargs="+", choices=FORMATS, default=["png"], metavar="F",
        help=f"of the figure: {', '.join(FORMATS)} (default: png)")  # fmt: skip
    add("--title", metavar="TEXT", help="above the figure, kept in the file")
    add("--json", action="store_true", help="print the paths and findings as JSON")
    add("--quiet", action="store_true", help="no progress bar")
    add("--debug", action="store_true", help="show the traceback of an error")


class Instead(argparse.Action):
    """Models are models, however they were given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.models = [Path(one).name for one in values] if self.dest == "features" else values


def add_features(result: argparse.ArgumentParser) -> None:
    """``--features``, of measurements that need features alone."""
    result.add_argument(
        "--features", nargs="+", metavar="PATH", action=Instead,
        help="in place of --models and --images: folders of `vitprobe extract`, .npz or .npy",
    )  # fmt: skip


def features_options(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The shared options as keyword arguments of ``from_features``."""
    for other in ("images", "pairwise", "test_images"):
        if getattr(args, other, None) is not None:
            option = f"--{other.replace('_', '-')}"
            raise VitprobeError(f"--features stands in place of {option}: leave one of them out.")
    args.models = [as_word(Path(one).stem or one) for one in args.features]
    kept = ("names", "num_images", "batch_size", "device", "seed", "quiet", "on_error")
    chosen = options(args, name)
    return {key: chosen[key] for key in kept}


def options(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The shared options as keyword arguments of ``measure``."""
    shared = ("names", "num_images", "batch_size", "image_size", "device", "precision", "seed",
              "workers", "quiet", "save_every", "fresh", "on_error")  # fmt: skip
    chosen = {key: getattr(args, key) for key in shared if hasattr(args, key)}
    args.kept = UntilWritten(args.out / f".{stem(args, name)}")
    return {**chosen, "checkpoint": args.kept}


def stem(args: argparse.Namespace, name: str) -> str:
    """``--stem``, or ``NAME-MODEL-MODEL``."""
    if args.stem:
        return args.stem
    # A name is no spec, though it may hold an "@".
    models = list(map(as_word, args.names)) if args.names else list(map(slug, args.models or []))
    full = "-".join([name, *models])
    if len(full.encode()) <= MAX_STEM:
        return full
    # Many models: file systems end names at 255 bytes.
    cut = full.encode()[:100].decode(errors="ignore")
    return f"{cut}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def slug(spec: str) -> str:
    """A model's name as part of a file name."""
    name, _, weights = spec.partition("@")
    return as_word(f"{name}-random" if weights == "random" else label(spec))


def as_word(text: str) -> str:
    """A text as part of a file name, or as a whole one, on any system."""
    word = re.sub(r"[^\w.+-]+", "_", text)[:60].strip("_").rstrip("._") or "_"
    return f"_{word}" if _DEVICES.fullmatch(word) else word


def run(
    result_parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    name: str,
    measure: Callable[[argparse.Namespace], Result],
    default_models: Sequence[str] = DEFAULT_MODELS,
) -> int:
    """Parse, measure, save, print the paths and findings; the exit status."""
    args = result_parser.parse_args(argv)
    args.began = time.monotonic()

    def body() -> None:
        args.models = args.models or [
            m for m in default_models if m.partition("@")[0] in bundled_models()
        ]
        if not args.models:
            raise VitprobeError("--models: expected at least one NAME, NAME@random or NAME@FILE.")
        check_writable(args.out, stem(args, name), (*args.format, "npz"))
        result = measure(args)
        processes.leave()
        if args.title:
            result.meta["title"] = shown(args.title)
        if processes.is_main_process():
            _write(result, args, stem(args, name))

    return guarded(body, args.debug, lambda: saved(args))


def saved(args: argparse.Namespace) -> bool:
    """Whether the same command would go on from a state on disk."""
    kept: UntilWritten | None = getattr(args, "kept", None)
    return getattr(args, "measured", False) or (kept is not None and kept.saved())


def _write(result: Result, args: argparse.Namespace, name: str) -> None:
    """Save, and only then give up the state that the result came from; print."""
    kept: UntilWritten | None = getattr(args, "kept", None)
    try:
        paths = result.save(args.out / name, args.format)
    except VitprobeError as error:
        raise VitprobeError(f"{error}{RESUME if saved(args) else ''}") from error
    except KeyboardInterrupt:
        raise Interrupted(
            f"Stopped before the result was written.{RESUME if saved(args) else ''}"
        ) from None
    if kept is not None:
        kept.written()
    conclude(args, paths, result.findings())


def conclude(args: argparse.Namespace, paths: Sequence[Path], findings: Sequence[Finding]) -> None:
    """Print what was written and found; ``args.began`` is when the command did."""
    told = print_json if args.json else print_files
    told(paths, findings, time.monotonic() - args.began)


def check_writable(out: Path, stem: str, suffixes: Sequence[str] = ()) -> None:
    """Fail before the work, not after it: no folder, no right to write, no such name."""
    if Path(stem).name != stem:
        raise VitprobeError(f"--stem: expected a file name without folders, not {stem!r}.")
    if os.name == "nt" and not _is_windows_name(stem):
        raise VitprobeError(f"--stem: Windows has no files of the name {stem!r}.")
    check_folder(out)
    for file in (out / f"{stem}.{suffix}" for suffix in suffixes):
        if file.is_dir():
            raise VitprobeError(f"--out: {file} cannot be written: a folder has its name.")
    try:
        # As long as the longest name that is to come, that of a state being written.
        probe = out / f".{stem}.{'-' * 50}{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise VitprobeError(f"--out: {out / stem} cannot be written: {reason}.") from error


def _is_windows_name(stem: str) -> bool:
    """Whether Windows writes a file of this name, rather than a device or a stream of another."""
    return not _DEVICES.fullmatch(stem) and not any(one in stem for one in _KEPT_BY_WINDOWS)


def command(
    measurement: type[Measurement],
    measure: Callable[..., Result],
    doc: str | None,
    argv: Sequence[str] | None,
    default_models: Sequence[str] = DEFAULT_MODELS,
    from_features: Callable[..., Result] | None = None,
) -> int:
    """The whole command of a measurement, its options read off the fields of its class."""
    name = measurement.analysis
    of_weights = issubclass(measurement, WeightsMeasurement)
    own = [one for one in fields(measurement) if "argument" in one.metadata]
    result_parser = parser(name, doc, images=not of_weights, layers=False)
    for one in own:
        flag = f"--{one.name.replace('_', '-')}"
        default = [one.default] if one.metadata["argument"].get("nargs") == "+" else one.default
        default = None if default == [None] else default
        result_parser.add_argument(flag, default=default, **one.metadata["argument"])

    if from_features is not None:
        add_features(result_parser)

    def from_arguments(args: argparse.Namespace) -> Result:
        chosen = {one.name: getattr(args, one.name) for one in own}
        if of_weights:
            shared = {key: getattr(args, key) for key in ("names", "image_size", "seed")}
            return measure(args.models, **chosen, **shared)
        if from_features is not None and args.features:
            shared = features_options(args, name)
            # Other images than those of the features there are none.
            chosen.pop("test_images", None)
            return from_features(args.features, **chosen, **shared)
        return measure(args.models, args.images, **chosen, **options(args, name))

    return run(result_parser, argv, name, from_arguments, default_models)
