"""Several measurements by name, from one pass over the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

from vitprobe.catalogue import measurements
from vitprobe.errors import VitprobeError, nearest
from vitprobe.running.measurement import Measurement
from vitprobe.running.options import Options
from vitprobe.running.passes import Results, measure_each


def measure_all(
    which: Sequence[str | Measurement], models: Any, images: Any = None, **options: Any
) -> Results:
    """Results by name, from one pass over the images for all measurements that look at the same.

    Args:
        which: names of measurements (``"cka"``), or ``Measurement`` objects with their options.
        models: specs, modules or ``Model``; one or a list.
        images: see ``open_images``; the bundled digit scenes by default.
        options: fields of ``running.Options``, and options of the measurements named, each for
            all that have it (``layers="paper"``).

    Returns:
        the results by name. A model that cannot have a measurement is left out of it, and
        ``meta["without"]`` says why; ``missing`` says it of measurements that none can have.
        ``head_subsets`` of several pairs of models are ``"head_subsets: A, B"``.

    Raises:
        VitprobeError: unknown measurements, options, models or images; activations not finite.
    """
    shared = {one.name for one in fields(Options)}
    own = {name: value for name, value in options.items() if name not in shared}
    asked = {one if isinstance(one, str) else one.analysis: one for one in which}
    if len(asked) < len(which):
        raise VitprobeError("A measurement is named twice.")
    made: dict[str, Measurement] = {}
    taken: set[str] = set()
    for name, one in asked.items():
        if isinstance(one, str):
            kind = measurement_class(name)
            mine = {field.name for field in fields(kind)} & own.keys()
            taken |= mine
            one = kind(**{key: own[key] for key in mine})
        made[name] = one
    for name in own.keys() - taken:
        known = shared | {field.name for one in made.values() for field in fields(one)}
        raise VitprobeError(f"measure_all has no option {name!r}.{nearest(name, sorted(known))}")
    shared_options = Options(**{name: options[name] for name in options if name in shared})
    return measure_each(made, models, images, shared_options)


def measurement_class(name: str) -> type[Measurement]:
    """The class of a measurement's options.

    Raises:
        VitprobeError: no such measurement.
    """
    known = measurements()
    if name not in known:
        raise VitprobeError(f"No such measurement: {name!r}.{nearest(name, list(known))}")
    return import_module(f"vitprobe.{name}").MEASUREMENT
