"""``einsum`` as a product of two matrices: its subscripts, and which of them are which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Subscripts:
    """A letter for each axis of each operand and of the result; ellipses are written out."""

    inputs: tuple[str, ...]
    output: str
    operands: tuple[Tensor, ...]


def subscripts(args: tuple) -> Subscripts | None:
    """What an ``einsum`` is asked for; None where it is written in another way or repeats axes."""
    if not args or not isinstance(args[0], str):
        return None
    given = args[1] if len(args) > 1 and isinstance(args[1], (tuple, list)) else args[1:]
    left, arrow, output = args[0].replace(" ", "").partition("->")
    names = left.split(",")
    if len(names) != len(given) or not all(isinstance(one, Tensor) for one in given):
        return None
    free = [letter for letter in ascii_letters if letter not in args[0]]
    hidden = [one.ndim - len(name.replace("...", "")) for name, one in zip(names, given)]
    most = max((n for n, name in zip(hidden, names) if "..." in name), default=0)
    dots = "".join(free[:most])
    names = [
        name.replace("...", dots[most - n :]) if "..." in name else name
        for n, name in zip(hidden, names)
    ]
    if not arrow:
        joined = "".join(names)
        output = dots + "".join(sorted(x for x in set(joined) - set(dots) if joined.count(x) == 1))
    output = output.replace("...", dots)
    if any(len(set(name)) < len(name) for name in names):
        return None
    if any(len(name) != one.ndim for name, one in zip(names, given)):
        return None
    return Subscripts(tuple(names), output, tuple(given))


def of_tensordot(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """The arguments of the ``einsum`` that a ``tensordot`` is."""
    one, other = args[:2]
    axes = args[2] if len(args) > 2 else kwargs.get("dims", 2)
    if isinstance(axes, int):
        left, right = list(range(one.ndim - axes, one.ndim)), list(range(axes))
    else:
        left, right = ([axis % t.ndim for axis in some] for some, t in zip(axes, (one, other)))
    names = ascii_letters[: one.ndim]
    rest = iter(ascii_letters[one.ndim :])
    met = {axis: names[i] for i, axis in zip(left, right)}
    others = "".join(met.get(axis) or next(rest) for axis in range(other.ndim))
    output = [x for x in names + others if x not in met.values()]
    return f"{names},{others}->{''.join(output)}", one, other


@dataclass(frozen=True)
class Product:
    """A map (..., queries, keys) and values (..., keys, features) that an ``einsum`` multiplies.

    ``order`` brings the axes of the result to (..., queries, features).
    """

    map: Sequence[int]
    values: Sequence[int]
    order: Sequence[int]
    missing: Sequence[int]  # leading axes that the values are without

    def turn_map(self, tensor: Tensor) -> Tensor:
        return tensor.permute(tuple(self.map))

    def turn_values(self, tensor: Tensor) -> Tensor:
        tensor = tensor.permute(tuple(self.values))
        for axis in self.missing:
            tensor = tensor.unsqueeze(axis)
        return tensor

    def turn_result(self, tensor: Tensor) -> Tensor:
        return tensor.permute(tuple(self.order))

    def turn_back(self, tensor: Tensor) -> Tensor:
        """From (..., queries, features) to the axes of the result."""
        return tensor.permute([list(self.order).index(axis) for axis in range(tensor.ndim)])


def as_product(asked: Subscripts, of_map: int, key_axis: int) -> Product | None:
    """An ``einsum`` of a map over keys and values; None where it is no such product.

    Args:
        asked: of two operands.
        of_map: which of them is the map.
        key_axis: the axis of the map that its softmax was taken over.
    """
    if len(asked.inputs) != 2:
        return None
    name, other = asked.inputs[of_map], asked.inputs[1 - of_map]
    key = name[key_axis]
    if key not in other or key in asked.output:
        return None
    features = [x for x in asked.output if x not in name]
    leading = [x for x in asked.output if x in name]
    # The query is the last of the map's axes that the values lack; all others go beside.
    queries = [x for x in name if x in asked.output and x not in other]
    if not queries or len(features) != 1 or set(name) != {*leading, key}:
        return None
    query = next((x for x in reversed(name) if x in queries), "")
    leading.remove(query)
    if set(other) - {key, *features, *leading}:
        return None
    kept = [x for x in leading if x in other]
    return Product(
        [name.index(x) for x in (*leading, query, key)],
        [other.index(x) for x in (*kept, key, *features)],
        [asked.output.index(x) for x in (*leading, query, *features)],
        [i for i, x in enumerate(leading) if x not in other],
    )
