"""Write the activations of chosen layers to disk, one array per layer, to be compared later.

Each layer becomes DIR/MODEL/LAYER.npy, images along the first axis, which anything that reads numpy
opens as a memory map; meta.json beside it says which model, weights, transform and images it is of.

A run that was stopped resumes with the same command, several processes write their own rows, and a
finished folder is recognised and not made again.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.errors import VitprobeError
from vitprobe.results.provenance import models_meta
from vitprobe.results.writing import write_atomically
from vitprobe.running import processes
from vitprobe.running.features import META, as_plain
from vitprobe.running.loop import run
from vitprobe.running.options import Options
from vitprobe.running.session import Batch, Session, session
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Choice, Layer
from vitprobe.tracing.places import Places

READOUTS = ("all", "mean", "class", "tokens")
DTYPES = ("float16", "float32", "float64")


@dataclass(frozen=True)
class _Column:
    """One layer to be written."""

    layer: Layer
    places: Places | None
    path: Path
    shape: tuple[int, ...]  # of one image


def extract(
    models: Any,
    images: Any = None,
    *,
    layers: Choice = "blocks",
    readout: str = "all",
    dtype: str = "float16",
    out: str | Path = "activations",
    **options: Any,
) -> dict[str, Path]:
    """Write the activations of chosen layers to disk.

    Args:
        models: specs, modules or ``Model``; one or a list.
        images: see ``open_images``; the bundled digit scenes by default.
        layers: ``blocks``, ``paper``, ``all``, or names with wildcards.
        readout: ``all`` of an image (n, ...); ``mean`` of its tokens or locations (n, features);
            the ``class`` token (n, features); ``tokens`` on their grid (n, rows, columns,
            features).
        dtype: of the files: ``float16``, ``float32`` or ``float64``.
        out: folder; each model has one of its own in it.
        options: fields of ``running.Options``.

    Returns:
        the folder of each model, by its name.

    Raises:
        VitprobeError: unknown models, images or layers; a layer that has no such readout; less
            room on the disk than the arrays take; images that cannot be read.
    """
    for name, value, known in (("readout", readout, READOUTS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise VitprobeError(f"--{name}: expected {', '.join(known)}, not {value!r}.")
    home = Path(out)
    asked = Options(**{"checkpoint": home / ".extract", **options})
    with session(models, images, asked) as ready:
        folders = _folders(home, ready)
        plans = [_plan(ready, m, folders[m], layers, readout) for m in range(len(ready.models))]
        about = [_about(ready, m, plans[m], readout, dtype) for m in range(len(plans))]
        todo = [m for m, facts in enumerate(about) if asked.fresh or not _done(folders[m], facts)]
        todo = processes.of_main_process(todo, ready.device)
        if todo:
            _check_room(ready, [plans[m] for m in todo], dtype, home)
            _check_folder(home, ready)
            _fill(ready, plans, todo, about, readout, dtype)
            if processes.is_main_process():
                for m in todo:
                    facts = json.dumps(about[m], indent=1, ensure_ascii=False)
                    write_atomically({folders[m] / META: facts.encode("utf-8", "replace")})
    return {model.name: folder for model, folder in zip(ready.models, folders)}


def _check_folder(home: Path, ready: Session) -> None:
    """Refuse a folder that cannot be written, or that is not the same for all processes."""
    if processes.is_main_process():
        cli.check_writable(home, ".extract")
    if not processes.see_one_folder(home, ready.device):
        raise VitprobeError(
            f"--out: {home} is not one folder for all processes. The rows of all images go into "
            f"the same files: give a folder on a disk that all machines share."
        )


def _folders(home: Path, ready: Session) -> list[Path]:
    names = [cli.as_word(model.name) for model in ready.models]
    # Many file systems take names that differ in case alone for one.
    if len({name.lower() for name in names}) < len(names):
        raise VitprobeError("--names: two models would be written to one folder; name them apart.")
    return [home / name for name in names]


def _plan(ready: Session, m: int, folder: Path, layers: Any, readout: str) -> list[_Column]:
    """The layers of a model, where each goes, and the shape of an image's part."""
    model, example = ready.models[m], ready.example()[m]
    chosen = ready.layers(m).choose(layers)
    places = ready.places(m, chosen)
    shapes: list[tuple[int, ...]] = [()] * len(chosen)
    for layer, place in zip(chosen, places):
        if readout != "all" and isinstance(place, str) and len(layer.shape) != 1:
            raise VitprobeError(
                f"--readout: the layer {layer.label} of {model.name} has no {readout}: {place}."
            )
        if readout == "class" and not (isinstance(place, Places) and place.has_class):
            raise VitprobeError(
                f"--readout: the layer {layer.label} of {model.name} has no class token."
            )
    kept = [one if isinstance(one, Places) else None for one in places]

    def take(i: int, tensor: Tensor) -> None:
        shapes[i] = tuple(read(tensor, kept[i], readout).shape[1:])

    with torch.no_grad(), capture(model.module, chosen, take), ready.autocast():
        model.module(example)
    files = _file_names([layer.label for layer in chosen])
    return [
        _Column(layer, place, folder / f"{file}.npy", shape)
        for layer, place, file, shape in zip(chosen, kept, files, shapes)
    ]


def _file_names(labels: Sequence[str]) -> list[str]:
    names: list[str] = []
    for label in labels:
        name = cli.as_word(label)
        while name.lower() in (other.lower() for other in names):
            name += "_"
        names.append(name)
    return names


def read(tensor: Tensor, places: Places | None, readout: str) -> Tensor:
    """What a readout takes of a layer's tensor, its images first; vectors are all they are."""
    if readout == "all" or places is None:
        return tensor
    if readout == "class":
        return places.rest(tensor)[:, 0]
    spatial = places.spatial(tensor)
    if readout == "mean":
        return spatial.mean(1)
    return spatial.unflatten(1, (places.rows, places.columns))


def _about(
    ready: Session, m: int, columns: list[_Column], readout: str, dtype: str
) -> dict[str, Any]:
    """What a folder says of itself; equal for two that hold the same."""
    images, labels = ready.images, ready.images.chosen_labels()
    facts = models_meta("extract", [ready.models[m]], ready.options.seed)
    facts.pop("command", None)
    return {
        **facts,
        "images": {"source": images.source, "sha256": images.digest},
        "image_names": [images.name(i) for i in range(len(images))],
        "labels": None if labels is None else labels.tolist(),
        "classes": list(images.classes),
        "precision": ready.options.precision,
        "readout": readout,
        "dtype": dtype,
        "attends": ready.layers(m).has_attention,
        "layers": {
            column.layer.label: {
                "file": column.path.name,
                "shape": [len(images), *column.shape],
                "of_image": list(column.layer.shape),
                "places": as_plain(column.places),
            }
            for column in columns
        },
    }


def _done(folder: Path, facts: dict[str, Any]) -> bool:
    """Whether a finished folder holds just this."""
    try:
        found = json.loads((folder / META).read_text(encoding="utf-8"))
        same = found == json.loads(json.dumps(facts))
        return same and all(
            list(np.load(folder / layer["file"], mmap_mode="r").shape) == layer["shape"]
            for layer in facts["layers"].values()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_room(ready: Session, plans: list[list[_Column]], dtype: str, home: Path) -> None:
    """Say how much will be written, and refuse what does not fit."""
    item, n = np.dtype(dtype).itemsize, len(ready.images)
    size = sum(n * int(np.prod(column.shape)) * item for plan in plans for column in plan)
    there = home
    while not there.exists():
        there = there.parent
    held = sum(column.path.stat().st_size for plan in plans for column in plan
               if column.path.is_file())  # fmt: skip
    free = shutil.disk_usage(there).free + held
    text = f"{sum(map(len, plans))} layers of {n} images take {size / 1e9:.2f} GB"
    if size > free:
        raise VitprobeError(
            f"--out: {text}, and {free / 1e9:.2f} GB are free in {there}. Try --readout mean or "
            f"fewer layers."
        )
    if processes.is_main_process() and not ready.options.quiet:
        print(f"vitprobe: {text}.", file=sys.stderr)


def _fill(
    ready: Session,
    plans: list[list[_Column]],
    todo: list[int],
    about: list[dict[str, Any]],
    readout: str,
    dtype: str,
) -> None:
    there = all(column.path.is_file() for m in todo for column in plans[m])
    if not there:
        # A state without its rows is none.
        ready.options = replace(ready.options, fresh=True)
    arrays = {m: [_array(column, len(ready.images), dtype) for column in plans[m]] for m in todo}
    sums = ready.sums(written=(len(ready.images),))
    limit = torch.finfo(getattr(torch, dtype)).max

    def step(batch: Batch) -> None:
        for m in todo:

            def take(i: int, tensor: Tensor, m: int = m) -> None:
                column = plans[m][i]
                values = read(tensor, column.places, readout)
                if not float(values.abs().max()) <= limit:
                    raise VitprobeError(
                        f"The layer {column.layer.label} of {ready.models[m].name} has values that "
                        f"{dtype} cannot hold. Try --dtype float32."
                    )
                kept = values.to(getattr(torch, dtype)).cpu().numpy()
                arrays[m][i][batch.positions] = kept

            with ExitStack() as stack:
                chosen = [column.layer for column in plans[m]]
                stack.enter_context(capture(ready.models[m].module, chosen, take))
                ready.forward(m, batch)
        sums["written"][torch.from_numpy(batch.positions)] += 1

    run(ready, step, sums, decides={"extract": [about[m] for m in todo]})
    if ready.broken:
        raise VitprobeError(
            f"--images: {ready.broken[0]} cannot be read, and rows of activations must be those of "
            f"the images in order: leave it out."
        )
    for filled in arrays.values():
        for array in filled:
            array.flush()


def _array(column: _Column, n: int, dtype: str) -> Any:
    """The file of a layer, made anew unless one of its very size is there (a run that resumes)."""
    shape = (n, *column.shape)
    try:
        found = np.lib.format.open_memmap(column.path, mode="r+")
        if found.shape == shape and found.dtype == np.dtype(dtype):
            return found
    except (OSError, ValueError):
        pass
    if not processes.is_main_process():
        return _when_there(column.path, shape, dtype)
    column.path.parent.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(column.path, mode="w+", dtype=dtype, shape=shape)


def _when_there(path: Path, shape: tuple[int, ...], dtype: str) -> Any:
    """The file that the main process is making."""
    import time

    for _ in range(600):
        try:
            found = np.lib.format.open_memmap(path, mode="r+")
            if found.shape == shape and found.dtype == np.dtype(dtype):
                return found
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    raise VitprobeError(f"--out: {path} was not made by the first process.")


def main(argv: Sequence[str] | None = None) -> int:
    """``vitprobe extract``."""
    parser = cli.parser("extract", __doc__)
    add = parser.add_argument_group("extract").add_argument
    add("--readout", choices=READOUTS, default="all",
        help="all of an image, mean of its tokens, class token, or tokens on their grid "
        "(default: %(default)s)")  # fmt: skip
    add("--dtype", choices=DTYPES, default="float16", help="of the files (default: %(default)s)")
    args = parser.parse_args(argv)

    def body() -> None:
        args.models = args.models or list(cli.DEFAULT_MODELS)
        options = cli.options(args, "extract")
        del options["checkpoint"]
        folders = extract(
            args.models, args.images, layers=args.layers, readout=args.readout, dtype=args.dtype,
            out=args.out, **options,
        )  # fmt: skip
        processes.leave()
        if processes.is_main_process():
            for folder in folders.values():
                print(folder)

    return cli.guarded(body, args.debug)


class _Function(ModuleType):
    """``vitprobe.extract`` is the function; once imported, it is this module, which acts as it."""

    __call__ = staticmethod(extract)


sys.modules[__name__].__class__ = _Function


if __name__ == "__main__":
    sys.exit(main())
