"""Result files as others may leave them: damaged, forged, or of another version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitprobe.errors import VitprobeError, ran_out
from vitprobe.results.archives import declared, read_all

# Results are small, and measured numbers hardly get smaller when packed. What unfolds to much more
# than the file is none: it is not unfolded to find that out.
MUCH, MAX_RATIO = 2**28, 50


def read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and ``meta`` of a result file.

    Raises:
        VitprobeError: no such file, or not one of a result.
    """
    if not path.is_file():
        raise VitprobeError(f"No such result file: {str(path)!r}.")
    try:
        size = sum(one.size for one in declared(path).values())
        if size > max(MUCH, MAX_RATIO * path.stat().st_size):
            raise ValueError(f"{size} bytes in so small a file")
        arrays = read_all(path)
        meta = json.loads(str(arrays.pop("meta")))
        if not isinstance(meta["analysis"], str):
            raise TypeError("the name of a measurement is text")
    except VitprobeError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        # Readers of damaged files raise anything; whatever it is, the file is the reason.
        raise VitprobeError(f"{path} is not a result file of vitprobe, or damaged.") from error
    return arrays, meta


def check(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    axes: Mapping[str, tuple[str, ...]],
) -> None:
    """See that arrays are what a measurement's class says, and ``meta`` says which models.

    Args:
        path: of the file, for messages.
        arrays: that the class has.
        meta: read from the file.
        axes: of the class.

    Raises:
        VitprobeError: anything else.
    """
    models = meta.get("models")
    good = isinstance(models, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and "weights" in one
        for one in models
    )
    if not good or not models:
        raise VitprobeError(f"{path} does not say which models it is of.")
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiubU":
            raise VitprobeError(f"{name} in {path} is of type {array.dtype}, not numbers or names.")
        if name not in axes:
            continue
        if array.ndim != len(axes[name]):
            raise VitprobeError(
                f"{name} in {path} is {array.shape}, not an array over {', '.join(axes[name])}."
            )
        for axis, size in zip(axes[name], array.shape):
            if sizes.setdefault(axis, size) != size:
                raise VitprobeError(
                    f"{name} in {path} has {size} places along {axis}, other arrays have "
                    f"{sizes[axis]}."
                )
    if "layers" in arrays and arrays["layers"].dtype.kind != "U":
        raise VitprobeError(f"layers in {path} are numbers, not names.")
    owner = arrays.get("model_of_layer", np.zeros(0, int))
    if owner.dtype.kind not in "iu" or not np.isin(owner, range(len(models))).all():
        raise VitprobeError(f"model_of_layer in {path} names models that it does not have.")
