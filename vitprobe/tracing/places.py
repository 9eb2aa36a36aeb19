"""Where on the image the vectors of a layer stand: tokens or map locations on a grid.

One watched pass tells (``tracing.tokens``): every vector of a layer has a place, or stands nowhere,
as class tokens, registers and prompts do, before, behind or amid the patches. The vectors that have
a place form the grid, whatever their order. A second pass tells which of those without a place is
the class token: the one that the model's own output reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from vitprobe.tracing.capture import capture
from vitprobe.tracing.class_token import as_they_are, class_tokens
from vitprobe.tracing.layers import OPERANDS, Layer
from vitprobe.tracing.observing import observing
from vitprobe.tracing.tokens import (
    IMAGE_STEP,
    TOLERANCE_PX,
    Following,
    Place,
    compact,
    middle,
    place_of,
    put_pixels,
    spread,
)

# What a trained model's own output reads; the papers' claims are about models of one kind.
CLASS_TOKEN, MEAN_OF_TOKENS, ON_MAPS = "class token", "mean of tokens", "attention on maps"
CONVOLUTION, UNTRAINED = "convolution", "untrained"


@dataclass(frozen=True, eq=False)
class Places:
    """The grid of a layer.

    Attributes:
        order: (rows, columns) which of the layer's vectors stands where.
        axes: those that count the vectors, in a tensor of the layer with its images first.
        lengths: of these axes.
        features: of a vector.
        without_place: the vectors that stand nowhere, the class token first.
        has_class: whether the first of these is a class token.
        step: 1, or k where only every k-th row and column of a map is looked at.
    """

    order: np.ndarray
    axes: tuple[int, ...]
    lengths: tuple[int, ...]
    features: int
    without_place: tuple[int, ...] = ()
    has_class: bool = False
    step: int = 1

    def __len__(self) -> int:
        return self.order.size

    @property
    def rows(self) -> int:
        return self.order.shape[0]

    @property
    def columns(self) -> int:
        return self.order.shape[1]

    @property
    def is_map(self) -> bool:
        """Whether several axes count the vectors: rows and columns, or windows and tokens."""
        return len(self.axes) > 1

    @property
    def class_token(self) -> int | None:
        """Which vector it is."""
        return self.without_place[0] if self.has_class else None

    def vectors(self, tensor: Tensor) -> Tensor:
        """(n, vectors, features) of a layer's tensor with its images first, in its own order."""
        features = [axis for axis in range(1, tensor.ndim) if axis not in self.axes]
        tensor = tensor.permute(0, *self.axes, *features).flatten(1, len(self.axes))
        return tensor.flatten(2) if features else tensor.unsqueeze(2)

    def spatial(self, tensor: Tensor) -> Tensor:
        """(n, places, features), row by row."""
        vectors, order = self.vectors(tensor), self.order.ravel()
        if np.array_equal(order, np.arange(order[0], order[0] + order.size)):
            return vectors[:, order[0] : order[0] + order.size]
        return vectors.index_select(1, torch.from_numpy(order).to(tensor.device))

    def rest(self, tensor: Tensor) -> Tensor:
        """(n, vectors without a place, features), the class token first."""
        index = torch.tensor(self.without_place, dtype=torch.long, device=tensor.device)
        return self.vectors(tensor).index_select(1, index)

    def at(self, tensor: Tensor, row: int, column: int) -> Tensor:
        """(n, features) of one place."""
        index = np.unravel_index(int(self.order[row, column]), self.lengths)
        for axis, i in sorted(zip(self.axes, index), reverse=True):
            tensor = tensor.select(axis, int(i))
        return tensor.reshape(len(tensor), -1)

    def thinned(self, most: int) -> Places:
        """The same grid if it is of tokens or has at most so many a side, else a regular subset."""
        step = -(-max(self.rows, self.columns) // most)
        if not self.is_map or step == 1:
            return self
        # The middles of stretches of this length; of a short side, at least one.
        rows, columns = (
            np.arange(step // 2, side, step) if side > step // 2 else np.array([side // 2])
            for side in (self.rows, self.columns)
        )
        return replace(self, order=self.order[np.ix_(rows, columns)], step=step)


class Lost(str):
    """Why nobody can tell where the vectors of a layer stand, though they may form a grid."""


def find_places(module: nn.Module, layers: Sequence[Layer], example: Tensor) -> list[Places | str]:
    """The grid of each layer, or why it has none.

    Args:
        module: the model, in evaluation mode.
        layers: of ``map_layers``.
        example: (2, C, H, W) as the model takes it.
    """
    found: list[Places | str] = [""] * len(layers)
    # What is added stands where the sum does, also where the branch alone has lost its places.
    layers = [
        replace(layer, point="addition") if layer.point in OPERANDS else layer for layer in layers
    ]

    def take(i: int, tensor: Tensor) -> None:
        found[i] = _grid(place_of(tensor), layers[i])

    # A copy: the caller's tensor stays without a mark.
    with torch.inference_mode(False), torch.no_grad():
        inputs = example[:2].clone()
        put_pixels(inputs)
        with observing(module, Following()), capture(module, as_they_are(layers), take):
            module(inputs)
    extra = {
        i: (places.axes, places.without_place)
        for i, places in enumerate(found)
        if isinstance(places, Places) and places.without_place
    }
    for i, chosen in class_tokens(module, layers, extra, example).items():
        places = found[i]
        assert isinstance(places, Places)
        others = tuple(one for one in places.without_place if one != chosen)
        found[i] = replace(places, without_place=(chosen, *others), has_class=True)
    return found


def _grid(place: Place, layer: Layer) -> Places | str:
    """The grid of a layer from where its tensor stands."""
    if not isinstance(place, Tensor):
        operation = place or "an operation that torch does not show"
        return Lost(f"{operation} in or before it loses where its parts stand")
    both = layer.by_image(place)
    size = " × ".join(map(str, both.shape[1:])) or "1"
    bare = f"an image's part of it is {size}"
    if len(both) != 2:
        return bare
    one, other = both
    gap = compact(one - other + IMAGE_STEP)
    if not torch.equal(compact(one).isnan(), compact(other).isnan()):
        return Lost("where its parts stand differs from image to image")
    if float(gap.abs().nan_to_num(0).amax()) >= TOLERANCE_PX:
        return Lost("where its parts stand differs from image to image")
    found = grid_of(one)
    return found or bare


def grid_of(place: Tensor) -> Places | str:
    """The grid of one image's tensor from where its elements stand; why not, or nothing."""
    if place.isnan().all():
        return ""
    axes = _axes_of_vectors(place)
    found = _on_axes(place, axes)
    if found is None and all(axis in axes for axis in range(place.ndim)):
        # No axis of features: pixels side by side in a vector, which are nearest to one another.
        axes.remove(min(axes, key=lambda axis: spread(place, axis)))
        found = _on_axes(place, axes)
    size = " × ".join(map(str, place.shape))
    return found or f"its parts, {size}, stand on no grid of rows and columns"


def _on_axes(place: Tensor, axes: Sequence[int]) -> Places | None:
    """The grid of one image's vectors, if these axes count them; None where it is none."""
    if not axes:
        return None
    features = [axis for axis in range(place.ndim) if axis not in axes]
    lengths = tuple(place.shape[axis] for axis in axes)
    count = int(np.prod([place.shape[axis] for axis in features], dtype=int))
    for axis in reversed(features):
        place = middle(place, axis)
    order = order_of(place.flatten().numpy())
    if order is None and len(axes) == 2:
        order = _map_order(place)
    if order is None:
        return None
    # What stands nowhere on a map is its border beyond the image, and no token.
    tokens = place.flatten() if len(axes) == 1 else place.new_zeros(0)
    bare = tuple(tokens.isnan().nonzero().flatten().tolist())
    return Places(order, tuple(axis + 1 for axis in axes), lengths, count, bare)


def _axes_of_vectors(place: Tensor) -> list[int]:
    """The axes along which places differ: all others are of features.

    An axis of length 1 counts vectors too: the rows of a map that is one row high.
    """
    small = compact(place)
    differ = [axis for axis in range(small.ndim) if spread(small, axis) >= TOLERANCE_PX]
    if not differ:
        # One patch, and tokens that stand nowhere beside it.
        nowhere = small.isnan()
        differ = [
            axis
            for axis in range(small.ndim)
            if not torch.equal(nowhere.any(axis), nowhere.all(axis))
        ]
    return [axis for axis in range(place.ndim) if axis in differ or place.shape[axis] == 1]


def _map_order(place: Tensor) -> np.ndarray | None:
    """(rows, columns) of a map whose first axis goes down and whose second goes to the right.

    Rows and columns need not be straight: channels that a padding has shifted against others leave
    the border half a step off. Nor need they be apart: enlarged maps have neighbours at one place.
    """
    if place.isnan().any():
        return None
    for part in (place.imag, place.real.T):
        lines = part.median(1).values
        steps = lines.diff()
        far = steps[steps > TOLERANCE_PX]
        allowed = 0.5 * float(far.median()) if len(far) else TOLERANCE_PX
        away = float((part - lines[:, None]).abs().amax())
        if away >= max(allowed, TOLERANCE_PX) or (steps < -TOLERANCE_PX).any():
            return None
    return np.arange(place.numel()).reshape(place.shape)


def order_of(place: np.ndarray) -> np.ndarray | None:
    """(rows, columns) which of (vectors,) places is where; None where they form no grid."""
    there = np.flatnonzero(~np.isnan(place))
    (x, columns), (y, rows) = (_ranks(part[there]) for part in (place.real, place.imag))
    if rows * columns != len(there) or len(np.unique(y * columns + x)) != len(there):
        return None
    order = np.empty((rows, columns), dtype=int)
    order[y, x] = there
    return order


def _ranks(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Which of the different values each is, from the smallest on, and how many there are."""
    by_size = np.argsort(values)
    steps = np.diff(values[by_size], prepend=values[by_size[:1]]) > TOLERANCE_PX
    ranks = np.empty(len(values), dtype=int)
    ranks[by_size] = np.cumsum(steps)
    return ranks, int(steps.sum()) + 1
