"""A result as one long table: one number per row, and in names where it stands.

Results declare the axes of their arrays (``Result.axes``). The arrays sort themselves by type:

- text (``layers``), and indices called ``A_of_B`` (``model_of_layer``), say where along their axes
  a number stands: they become columns named in the singular (``layer``, ``model``);
- all others hold quantities, one number per row; ``X_se`` is the standard error of ``X`` (or
  ``X_px``) and stands beside it.

An axis without a text array is counted from 0, or named by ``Result.names``. An axis met a second
time (CKA has layers on both) is called ``layer_2``, and so are its columns.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vitprobe.errors import VitprobeError, nearest, shown

SECOND = "_2"
ERROR = "_se"
MEASURED = ("value", "standard_error")


@dataclass(frozen=True)
class Label:
    """A column that says where along some axes a number stands.

    Attributes:
        column: its name.
        values: text or indices, an array over ``axes``.
        axes: names of axes, in the order of the arrays that have them.
    """

    column: str
    values: np.ndarray
    axes: tuple[str, ...]


class Tabular(Protocol):
    """What a table is made of; every ``Result`` has it."""

    @property
    def analysis(self) -> str: ...
    @property
    def axes(self) -> dict[str, tuple[str, ...]]: ...
    @property
    def names(self) -> dict[str, tuple[str, ...]]: ...
    @property
    def models(self) -> list[str]: ...
    def arrays(self) -> dict[str, np.ndarray]: ...
    def labels(self) -> list[Label]: ...


def long_table(result: Tabular, quantities: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Columns of one length: ``quantity``, where, ``value``, ``standard_error``.

    Args:
        result: any.
        quantities: names of arrays; all that hold quantities by default.

    Returns:
        text in ``quantity`` and wherever a column is made of names, numbers elsewhere; where a
        quantity has no such axis, the text is empty and the index NaN. Values that are NaN
        (padding, and what is undefined) have no row.

    Raises:
        VitprobeError: no such quantity.
    """
    arrays = result.arrays()
    known = [name for name in result.axes if _is_quantity(name, arrays)]
    for name in quantities:
        if name not in known:
            raise VitprobeError(
                f"{result.analysis} has no quantity {name!r}.{nearest(name, known)} It has "
                f"{', '.join(known)}."
            )
    parts = [_rows(result, arrays, name) for name in quantities or known]
    columns = list(dict.fromkeys(column for part in parts for column in part))
    columns = [column for column in columns if column not in MEASURED] + list(MEASURED)
    lengths = [len(part["value"]) for part in parts]
    return {name: _stacked([part.get(name) for part in parts], lengths) for name in columns}


def as_csv(table: dict[str, np.ndarray]) -> str:
    """The table as text; numbers with every digit that their type has, missing ones empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*(_as_text(*item) for item in table.items())))
    return buffer.getvalue()


def as_dataframe(table: dict[str, np.ndarray]) -> Any:
    """The table as ``pandas.DataFrame``; missing indices are ``<NA>``.

    Raises:
        VitprobeError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise VitprobeError(
            "A data frame needs pandas: pip install pandas, or use to_csv()."
        ) from error
    frame = pandas.DataFrame(table)
    # Indices that some rows lack stay whole numbers.
    indices = [name for name in table if name not in MEASURED and table[name].dtype.kind == "f"]
    return frame.astype(dict.fromkeys(indices, "Int64"))


def _is_quantity(name: str, arrays: dict[str, np.ndarray]) -> bool:
    errors = {_error_of(other) for other in arrays}
    return name not in errors and not _is_label(name, arrays[name])


def _is_label(name: str, array: np.ndarray) -> bool:
    return array.dtype.kind == "U" or (array.dtype.kind == "i" and "_of_" in name)


def _error_of(name: str) -> str:
    """What the standard error of a quantity is called, its unit left out."""
    return name.removesuffix("_px") + ERROR


def _rows(result: Tabular, arrays: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The columns of one quantity."""
    values, axes = arrays[name].astype(np.float64), result.axes[name]
    there = ~np.isnan(values)
    columns = {"quantity": np.full(int(there.sum()), name)}
    labels = _labels(result, arrays)
    for axis in axes:
        base = axis.removesuffix(SECOND)
        end = axis[len(base) :]
        for label in labels:
            over = [one + end if one + end in axes else one for one in label.axes]
            # What is said of several axes at once is said with the last of them.
            if over[-1] == axis and set(over) <= set(axes):
                columns[label.column + end] = _along(label.values, over, axes, values.shape)[there]
        if axis not in columns:
            size = values.shape[axes.index(axis)]
            count = np.array(result.names.get(base, range(size)))
            columns[axis] = _along(count, [axis], axes, values.shape)[there]
    columns["value"] = values[there]
    error = arrays.get(_error_of(name), np.full(values.shape, np.nan))
    columns["standard_error"] = error[there].astype(np.float64)
    return columns


def _labels(result: Tabular, arrays: dict[str, np.ndarray]) -> list[Label]:
    """Everything that says where a number stands."""
    labels = [Label("model", np.array(result.models), ("model",)), *result.labels()]
    texts = [name for name in result.axes if arrays[name].dtype.kind == "U"]
    labels += [Label(name.removesuffix("s"), arrays[name], result.axes[name]) for name in texts]
    indices = [name for name in result.axes if _is_label(name, arrays[name]) and name not in texts]
    # Models first: what is said of layers through them is then said of the layers' tokens too.
    for name in sorted(indices, key=lambda name: not name.startswith("model_of_")):
        of = (name.partition("_of_")[0],)
        labels += [
            Label(label.column, label.values[arrays[name]], result.axes[name])
            for label in labels
            if label.axes == of
        ]
    return labels


def _along(
    values: np.ndarray, over: Sequence[str], axes: tuple[str, ...], shape: tuple[int, ...]
) -> np.ndarray:
    """``values`` over some of the axes, in their order, as an array over all of them."""
    sizes = [size if axis in over else 1 for axis, size in zip(axes, shape)]
    return np.broadcast_to(values.reshape(sizes), shape)


def _stacked(parts: Sequence[np.ndarray | None], lengths: Sequence[int]) -> np.ndarray:
    """One column from those of all quantities, some of which lack it."""
    named = any(part is not None and part.dtype.kind == "U" for part in parts)
    missing: Any = "" if named else np.nan
    return np.concatenate(
        [np.full(n, missing) if part is None else part for part, n in zip(parts, lengths)]
    )


def _as_text(name: str, column: np.ndarray) -> list[Any]:
    if column.dtype.kind == "U":
        return [_no_formula(text) for text in column.tolist()]
    if column.dtype.kind != "f":
        return column.tolist()
    written = float if name in MEASURED else int
    return ["" if np.isnan(value) else written(value) for value in column.tolist()]


def _no_formula(text: str) -> str:
    """A name as a spreadsheet shows it: one that begins like a formula would be run as one."""
    text = shown(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
