"""What a model knows of positions: tables added to its tokens, and biases in its attention.

One watched pass of one image tells, by what is added to what. A tensor that does not depend on the
image and is added to the image's tokens, a vector each, is a table of positions, whatever it is
called and whichever module holds it; one that is added to the scores of attention, and depends on
the offset from query to key alone, is a relative-position bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitprobe.tracing.additions import ADDS, operands
from vitprobe.tracing.masks import FAR
from vitprobe.tracing.observing import observing, parts
from vitprobe.tracing.places import Places, grid_of, order_of
from vitprobe.tracing.scores import Scores, columns_of, is_map, product_of
from vitprobe.tracing.tokens import middle, place_of, put_pixels
from vitprobe.tracing.trace import tensors

_SUBTRACTS = {
    torch.sub, torch.subtract, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__,
}  # fmt: skip
# How far a bias may be from one that depends on the offset alone, relative to its range.
_TOLERANCE = 1e-4


def resample(table: Tensor, rows: int, columns: int) -> Tensor:
    """A table (rows, columns, features) at another resolution, as fine-tuning does it."""
    from timm.layers import resample_abs_pos_embed

    height, width, features = table.shape
    flat = table.detach().float().reshape(1, height * width, features)
    new = resample_abs_pos_embed(
        flat, new_size=[rows, columns], old_size=[height, width], num_prefix_tokens=0
    )
    return new.reshape(rows, columns, features)


def by_offset(bias: Tensor, rows: int, columns: int) -> np.ndarray:
    """A bias (heads, tokens, tokens) of a window against the offset from query to key.

    Returns:
        (heads, 2 rows - 1, 2 columns - 1); the middle is a token's bias to itself.
    """
    heads = len(bias)
    pairs = bias.detach().double().reshape(heads, rows, columns, rows, columns).cpu().numpy()
    found = np.full((heads, 2 * rows - 1, 2 * columns - 1), np.nan)
    for y in range(rows):
        for x in range(columns):
            # This query's keys, moved so that it stands in the middle.
            top, left = rows - 1 - y, columns - 1 - x
            found[:, top : top + rows, left : left + columns] = pairs[:, y, x]
    return found


@dataclass(frozen=True)
class Positions:
    """What a pass adds that tells positions.

    Attributes:
        tables: name of the parameter, or of the module that adds, and (rows, columns, features),
            tokens without a place left out.
        biases: module that attends and (heads, offsets, offsets), the middle being offset 0.
    """

    tables: list[tuple[str, Tensor]]
    biases: list[tuple[str, np.ndarray]]


def find_positions(module: nn.Module, example: Tensor) -> Positions:
    """Watch one pass for what it adds to tokens and to scores.

    Args:
        module: in evaluation mode.
        example: (1, C, H, W) as the model takes it.
    """
    watch = _Added(module, example)
    with torch.inference_mode(False), torch.no_grad():
        inputs = example[:1].clone()
        put_pixels(inputs)
        with watch.modules(), observing(module, watch):
            module(inputs)
    biases = [
        replace(one, values=one.values[:, ::-1, ::-1]) if one.product in watch.turned else one
        for one in watch.biases
    ]
    return Positions(watch.tables, _by_module(biases))


@dataclass(frozen=True)
class _Bias:
    module: str
    call: int
    product: int  # whose scores it is added to
    values: np.ndarray


def _by_module(found: list[_Bias]) -> list[tuple[str, np.ndarray]]:
    """One bias a call of a module: what goes to the same scores summed, heads side by side."""
    sums: dict[tuple[str, int, int], np.ndarray] = {}
    for one in found:
        key = one.module, one.call, one.product
        sums[key] = sums.get(key, 0) + one.values
    calls: dict[tuple[str, int], list[np.ndarray]] = {}
    for (module, call, _), values in sums.items():
        calls.setdefault((module, call), []).append(values)
    labelled = []
    for (module, call), pieces in calls.items():
        times = sum(other == module for other, _ in calls)
        label = f"{module or 'output'}:{call + 1}" if times > 1 else module or "output"
        if len({part.shape[1:] for part in pieces}) == 1:
            pieces = [np.concatenate(pieces)]
        labelled += [(label, part) for part in pieces]
    return labelled


class _Added(Scores):
    """Notes what is added to tokens and to scores that does not depend on the image."""

    def __init__(self, module: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.module, self.pixels = module, example.shape[-2] * example.shape[-1]
        self.names = {
            tensor.untyped_storage().data_ptr(): name
            for name, tensor in [*module.named_buffers(), *module.named_parameters()]
        }
        self.stack: list[tuple[str, int]] = []
        self.tables: list[tuple[str, Tensor]] = []
        self.halves: dict[tuple[tuple[int, ...], frozenset[int]], tuple[str, Tensor]] = {}
        self.biases: list[_Bias] = []

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Within it, ``stack`` holds the names of the modules under way and their calls."""
        calls: dict[str, int] = {}

        def entering(name: str) -> Callable[..., None]:
            def enter(*_: Any) -> None:
                calls[name] = calls.get(name, -1) + 1
                self.stack.append((name, calls[name]))

            return enter

        def leave(*_: Any) -> None:
            self.stack.pop()

        with ExitStack() as hooks:
            for name, part in parts(self.module):
                before = part.register_forward_pre_hook(entering(name))
                hooks.callback(before.remove)
                hooks.callback(part.register_forward_hook(leave, always_call=True).remove)
            yield

    def after(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        if function is F.scaled_dot_product_attention:
            self._fused(*args, **kwargs)
        elif function is F.multi_head_attention_forward:
            self._pytorchs(args, kwargs)
        elif function in ADDS | _SUBTRACTS and (pair := operands(args, kwargs)):
            factor = kwargs.get("alpha", 1) * (-1 if function in _SUBTRACTS else 1)
            for (one, other), times in ((pair, factor), (pair[::-1], 1)):
                if isinstance(place_of(one), Tensor) and _constant(other):
                    if times != 1:
                        scaled: Tensor = times * other
                        scaled._vitprobe_name = self._name(other)  # type: ignore[attr-defined]
                        other = scaled
                    self._plus(one, other)
        super().after(function, args, kwargs, result)
        self._follow_names(args, kwargs, result)
        if getattr(function, "__name__", "") == "baddbmm" and args and _constant(args[0]):
            columns = columns_of(result)
            if columns is not None:
                beta = kwargs.get("beta", 1)
                added, product = beta * args[0], product_of(result)
                self._bias(middle(_placed(result), -1), middle(columns, -2), added, product)

    def _plus(self, tokens: Tensor, other: Tensor) -> None:
        columns = columns_of(tokens)
        if columns is not None:
            rows, columns = middle(_placed(tokens), -1), middle(columns, -2)
            self._bias(rows, columns, other, product_of(tokens))
        elif not is_map(tokens):
            self._table(tokens, other)

    def _fused(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
        *_: Any, **__: Any,
    ) -> None:  # fmt: skip
        if attn_mask is None or not _constant(attn_mask):
            return
        if isinstance(place_of(query), Tensor) and isinstance(place_of(key), Tensor):
            rows, columns = (middle(_placed(t), -1) for t in (query, key))
            if rows.shape[:-1] == columns.shape[:-1]:
                self.products += 1
                self._bias(rows, columns, attn_mask, self.products)

    def _pytorchs(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Of ``multi_head_attention_forward``, whose tokens come first."""
        mask = kwargs.get("attn_mask")
        if mask is None or not _constant(mask) or len(args) < 5:
            return
        heads = args[4]
        if all(isinstance(place_of(one), Tensor) for one in args[:2]):
            rows, columns = (middle(_placed(one), -1).T for one in args[:2])
            lead = len(rows), heads
            rows, columns = (one[:, None].expand(*lead, -1) for one in (rows, columns))
            self.products += 1
            mask = mask.unflatten(0, lead) if mask.ndim == 3 else mask
            self._bias(rows, columns, mask, self.products)

    def _table(self, tokens: Tensor, other: Tensor) -> None:
        if other.ndim > tokens.ndim or not other.isfinite().all():
            return
        places = grid_of(_placed(tokens))
        if not isinstance(places, Places) or not 1 < len(places) < self.pixels:
            return
        own = _without_repetition(other)
        own = own[(None,) * (tokens.ndim - own.ndim)]
        long = {axis for axis in places.axes if tokens.shape[axis - 1] > 1}
        along = {axis for axis in long if own.shape[axis - 1] == tokens.shape[axis - 1]}
        if not along and long:
            return
        flat = places.spatial(other.expand(tokens.shape)[None])[0]
        table = flat.unflatten(0, (places.rows, places.columns)).detach().clone()
        name = self._name(other) or self.stack[-1][0] or "output"
        if along < long:
            # One for rows and another for columns: the table is their sum.
            other_half = self.halves.pop((tuple(table.shape), frozenset(long - along)), None)
            if other_half is None:
                self.halves[tuple(table.shape), frozenset(along)] = name, table
                return
            name, table = f"{other_half[0]} + {name}", other_half[1] + table
        if not any(table.shape == old.shape and table.equal(old) for _, old in self.tables):
            self.tables.append((name, table))

    def _follow_names(self, args: tuple, kwargs: dict, result: Any) -> None:
        """What is made of a parameter or buffer alone keeps its name."""
        given = [tensor for _, tensor in tensors((args, kwargs)) if tensor.is_floating_point()]
        if any(place_of(tensor) is not None for tensor in given):
            return
        name = next((found for tensor in given if (found := self._name(tensor))), "")
        for _, tensor in tensors(result):
            if name and self._name(tensor) != name:
                tensor._vitprobe_name = name  # type: ignore[attr-defined]

    def _name(self, tensor: Tensor) -> str:
        held = self.names.get(tensor.untyped_storage().data_ptr(), "")
        return held or getattr(tensor, "_vitprobe_name", "")

    def _bias(self, rows: Tensor, columns: Tensor, bias: Tensor, product: int) -> None:
        """Places of queries (..., queries) and of keys (..., keys), and what their scores get."""
        shape = (*rows.shape, columns.shape[-1])
        own = _without_repetition(bias)
        if own.ndim < 2 or own.shape[-2:] != shape[-2:]:
            return
        window = _window(rows.flatten(0, -2), columns.flatten(0, -2))
        if window is None:
            return
        leading, order = window
        tokens = torch.from_numpy(order.ravel())
        every = bias.expand(shape).flatten(0, -3)
        inner = every[leading][:, tokens][:, :, tokens]
        if (inner == inner.flatten()[0]).all() and (every != inner.flatten()[0]).any():
            return  # a mask, which hides nothing here
        if inner.amin() <= FAR and ((inner == 0) | (inner == inner.amin())).all():
            return  # a mask, of whom a token sees by its offset
        found = by_offset(inner, *order.shape)
        if _by_pairs(found, order.shape[1], inner):
            self.biases.append(_Bias(*self.stack[-1], product, found))


def _constant(value: Any) -> bool:
    """Whether a tensor holds numbers that do not depend on the image."""
    return isinstance(value, Tensor) and place_of(value) is None and value.is_floating_point()


def _placed(tensor: Tensor) -> Tensor:
    return place_of(tensor)  # type: ignore[return-value]


def _without_repetition(tensor: Tensor) -> Tensor:
    """The tensor with axes of length 1 where it is expanded."""
    for axis in range(tensor.ndim):
        if tensor.stride(axis) == 0 and tensor.shape[axis]:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _window(rows: Tensor, columns: Tensor) -> tuple[Tensor, np.ndarray] | None:
    """A set of tokens that attend to one another, or queries to as many keys, on one grid.

    Args:
        rows: (windows and heads, queries) places.
        columns: (windows and heads, keys).

    Returns:
        Which of the first axis are its heads, and (rows, columns) of its tokens.
    """
    if rows.shape != columns.shape:
        return None
    best: tuple[int, np.ndarray] | None = None
    seen: dict[bytes, list[int]] = {}
    for i, (query, key) in enumerate(zip(rows.numpy().round(2) + 0.0, columns.numpy().round(2))):
        seen.setdefault(query.tobytes() + (key + 0.0).tobytes(), []).append(i)
    for leading in seen.values():
        query, key = rows[leading[0]].numpy(), columns[leading[0]].numpy()
        order, others = order_of(query), order_of(key)
        # Queries that stand for the whole image (GCViT's) have the same grid as a window's keys.
        if order is None or others is None or not np.array_equal(order, others):
            continue
        # A shift puts windows together from opposite borders: those of one side count.
        order = order[_even(query[order[:, 0]].imag)][:, _even(query[order[0]].real)]
        forwards = (np.diff(order.ravel()) > 0).all()
        if forwards and (best is None or order.size > best[1].size):
            best = leading[0], order
    if best is None:
        return None
    leading = next(group for group in seen.values() if group[0] == best[0])
    return torch.tensor(leading), best[1]


def _even(line: np.ndarray) -> slice:
    """The longest stretch of a rising line that rises by its smallest step."""
    steps = np.diff(line)
    breaks = np.flatnonzero(steps > steps.min(initial=np.inf) * 1.01) + 1
    edges = [0, *breaks.tolist(), len(line)]
    start, stop = max(pairwise(edges), key=lambda stretch: stretch[1] - stretch[0])
    return slice(start, stop)


def _by_pairs(found: np.ndarray, columns: int, bias: Tensor) -> bool:
    """Whether a bias is what its values by offset say, for every pair."""
    index = np.arange(bias.shape[-1])
    rows = len(index) // columns
    y, x = index // columns, index % columns
    again = found[:, y[None] - y[:, None] + rows - 1, x[None] - x[:, None] + columns - 1]
    given = bias.detach().double().cpu().numpy()
    return float(abs(again - given).max()) <= _TOLERANCE * max(float(np.ptp(given)), 1e-12)
