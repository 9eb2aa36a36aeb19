"""Which layers of a model attend, and where in the image their queries and keys stand.

One watched pass tells: places travel with the vectors (``tracing.tokens``), and each attention
operation (``attention_operations``) finds them on its operands. The pass runs on two images,
whose places differ, so that it also tells which rows of a tensor belong to which image. Nothing
per-family is needed for that; what is stands in ``tracing.special_cases``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprobe.errors import NotApplicable
from vitprobe.tracing.attention_operations import PRODUCTS, AttentionObserver, Operation
from vitprobe.tracing.masks import follow_masks
from vitprobe.tracing.observing import observing, parts
from vitprobe.tracing.outside import Origins
from vitprobe.tracing.rows import examine
from vitprobe.tracing.special_cases import NO_PROBABILITIES
from vitprobe.tracing.tokens import (
    IMAGE_STEP,
    TOLERANCE_PX,
    follow,
    middle,
    place_of,
    put_pixels,
    spread,
)
from vitprobe.tracing.trace import tensors

_QUERIES_LOST = "where its queries stand cannot be told"
_KEYS_LOST = "where its keys stand cannot be told"
_ROWS_LOST = "its rows do not belong to one image each"
_PRODUCT = "it multiplies what it has made of the image with itself, without a softmax"


@dataclass(frozen=True)
class AttentionLayer:
    """One attention operation over places of the image.

    Attributes:
        label: the module that attends; numbered where it does so more than once.
        ordinal: among all attention operations of a pass.
        axis: which leading axis of its tensors counts the images.
        fold: how many rows along that axis belong to an image (windows folded into the batch).
        images_first: whether the rows of an image lie together there.
        rows: (groups, heads) index of an image's rows; a group is a set of tokens that attend to
            one another (all of them, or those of one window).
        queries: (groups, queries, 2) x and y in input pixels; NaN for class tokens and the like.
        keys: (groups, keys, 2).
        masked: (groups, queries, keys) pairs that no head may attend to, as the operation's own
            mask says; None: there are none.
        behind: the ordinals of the operations whose outputs its operands are made of.
    """

    label: str
    ordinal: int
    axis: int
    fold: int
    images_first: bool
    rows: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    masked: np.ndarray | None = None
    behind: frozenset[int] = frozenset()

    @property
    def heads(self) -> int:
        return self.rows.shape[1]

    def distances(self) -> np.ndarray:
        """(groups, queries, keys) between queries and keys in input pixels; NaN: nowhere."""
        return np.linalg.norm(self.queries[:, :, None] - self.keys[:, None], axis=-1)

    def arrange(self, tensor: Tensor) -> Tensor:
        """(..., tokens, features) of the layer as (images, groups, heads, tokens, features)."""
        whose = (-1, self.fold) if self.images_first else (self.fold, -1)
        tensor = tensor.unflatten(self.axis, whose)
        tensor = tensor.movedim(self.axis + (not self.images_first), 0)
        ordered = np.array_equal(self.rows.ravel(), np.arange(self.rows.size))
        if ordered and tensor.ndim == 5 and tensor.shape[1:3] == self.rows.shape:
            return tensor
        tensor = tensor.flatten(1, -3)
        if not ordered:
            rows = torch.from_numpy(self.rows.ravel()).to(tensor.device)
            tensor = tensor.index_select(1, rows)
        return tensor.unflatten(1, self.rows.shape)


@dataclass(frozen=True)
class AttentionMap:
    """The attention layers of a model.

    Attributes:
        model: its name.
        layers: in order of occurrence.
        left_out: label -> why an attention operation is none between places of the image.
        operations: how many attention operations a pass makes.
        unread: label -> what happens there that may be attention and cannot be read as such.
    """

    model: str
    layers: list[AttentionLayer]
    left_out: dict[str, str]
    operations: int
    unread: dict[str, str] = field(default_factory=dict)

    def require(self, what: str) -> None:
        """``VitprobeError`` if there is no layer that could have ``what``."""
        if self.layers:
            return
        why = "".join(f" ({at}: {reason})" for at, reason in list(self.left_out.items())[:1])
        if set(self.left_out.values()) & set(NO_PROBABILITIES.values()):
            raise NotApplicable(
                f"{self.model} attends with weights that are not probabilities, which have no "
                f"{what}{why}.",
                self.model,
            )
        if self.unread:
            label, happens = next(iter(self.unread.items()))
            raise NotApplicable(
                f"{self.model} attends, if at all, in a way that cannot be read, and so there is "
                f"no {what} ({label}: {happens}).",
                self.model,
            )
        raise NotApplicable(
            f"{self.model} has no attention between places of the image, and so no {what}{why}.",
            self.model,
        )


def map_attention(name: str, module: nn.Module, example: Tensor) -> AttentionMap:
    """Watch one pass and find the attention layers and the places of their tokens.

    Args:
        name: of the model, for messages.
        module: in evaluation mode.
        example: (2, C, H, W) on the module's device.

    Raises:
        VitprobeError: an attention layer's tokens cannot be placed in the image.
    """
    mapper = _Mapper(name, module)
    # A copy: the caller's tensor stays without a mark.
    with torch.inference_mode(False), torch.no_grad(), mapper.watching(module):
        inputs = example[:2].clone()
        put_pixels(inputs)
        mapper.origins.begin(inputs)
        module(inputs)
    times = Counter(label for label, *_ in mapper.found)
    nth: Counter[str] = Counter()
    layers = []
    left_out = {
        label: reason or "what its softmax gives is not what multiplies the values"
        for label, reason in mapper.unused.values()
        if not times[label]
    }
    for ordinal, (label, layout, hidden) in enumerate(mapper.found):
        nth[label] += 1
        numbered = f"{label}:{nth[label]}" if times[label] > 1 else label
        if isinstance(layout, str):
            left_out[numbered] = layout
        else:
            layer = replace(
                AttentionLayer(numbered, ordinal, *layout), behind=mapper.behind[ordinal]
            )
            layers.append(
                layer if hidden is None else replace(layer, masked=_masked(layer, hidden))
            )
    unread = {
        label: why
        for label, why in left_out.items()
        if why in (_QUERIES_LOST, _KEYS_LOST, _ROWS_LOST)
    }
    if not mapper.found:
        unread |= {label: left_out.get(label, why) for label, why in mapper.products.items()}
    unread |= mapper.outside
    if layers or _ROWS_LOST in left_out.values():
        examine(name, module, example)
    return AttentionMap(name, layers, left_out, len(mapper.found), unread)


def _masked(layer: AttentionLayer, hidden: Tensor) -> np.ndarray:
    """What is hidden from every head, in both images."""
    return layer.arrange(hidden).all(2).all(0).cpu().numpy()


class _Mapper(AttentionObserver):
    """Follows places through a pass, and notes the layout of each attention operation."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.names = {child: child_name for child_name, child in parts(module)}
        self.stack: list[nn.Module] = []
        self.found: list[tuple[str, tuple | str, Tensor | None]] = []
        self.unused: dict[int, tuple[str, str | None]] = {}  # softmax -> label, special case
        self.products: dict[str, str] = {}  # label -> what may be attention without a softmax
        self.outside: dict[str, str] = {}
        self.behind: list[frozenset[int]] = []  # of each operation
        self.origins = Origins(module)

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        def left(*_: Any) -> None:
            self.stack.pop()  # not returned: what a hook returns takes the output's place

        with ExitStack() as stack:
            for child in self.names:
                enter = child.register_forward_pre_hook(lambda m, _: self.stack.append(m))
                leave = child.register_forward_hook(left)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            stack.enter_context(observing(module, self))
            yield

    def after(self, function: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        given = [tensor for _, tensor in tensors((args, kwargs))]
        if any(place_of(one) is None and self.origins.is_outside(one) for one in given):
            self.outside.setdefault(self._label(), "a step that cannot be watched comes before it")
        multiplies = function in PRODUCTS or function is torch.einsum
        if multiplies and sum(place_of(one) is not None and one.ndim > 2 for one in given) > 1:
            self.products.setdefault(self._label(), _PRODUCT)
        if getattr(function, "__name__", "") == "flex_attention":
            self.products.setdefault(self._label(), "its scores are changed one by one")
        follow(function, args, kwargs, result)
        follow_masks(function, args, kwargs, result)
        super().after(function, args, kwargs, result)
        before: frozenset[int] = frozenset().union(*map(_made_of, given))
        new = range(len(self.behind), len(self.found))
        self.behind += [before] * len(new)
        for _, tensor in tensors((args[0],) if function is Tensor.__setitem__ else result):
            self.origins.know(tensor)
            if before or new:
                tensor._vitprobe_made_of = before.union(new)  # type: ignore[attr-defined]

    def note_softmax(self) -> None:
        self.unused[self.softmaxes - 1] = self._label(), self._special_case()

    def _special_case(self) -> str | None:
        return NO_PROBABILITIES.get(type(self.stack[-1]).__name__)

    def _label(self) -> str:
        return self.names[self.stack[-1]] or "output"

    def attend(self, ordinal: int, operation: Operation) -> None:
        if operation.softmax is not None:
            self.unused.pop(operation.softmax, None)
        label = self._label()
        # Where a family is known to have another kind of attention, its places do not matter.
        layout = self._special_case() or self._layout(label, operation)
        hidden = None if isinstance(layout, str) else operation.hidden()
        self.found.append((label, layout, hidden))

    def _layout(self, label: str, operation: Operation) -> tuple | str:
        leading = operation.leading()
        if isinstance(place_of(operation.query), Tensor | None) and isinstance(
            place_of(operation.key), str
        ):
            return _KEYS_LOST
        # The keys first: channels that attend to channels have no rows that could be placed.
        keys = self._tokens(label, operation, operation.key, leading)
        queries = keys if keys is None else self._tokens(label, operation, operation.query, leading)
        if keys is None:
            return "it attends over channels, not over places"
        if queries is None:
            return _QUERIES_LOST
        if keys.isnan().all():
            return "its keys stand nowhere in the image"
        if queries.isnan().all():
            return "its queries are class tokens only"
        return _layout(queries, keys, leading) or _ROWS_LOST

    def _tokens(
        self, label: str, operation: Operation, tensor: Tensor, leading: tuple[int, ...]
    ) -> Tensor | None:
        """(leading, tokens); None where the features of a token stand apart."""
        place = place_of(tensor)
        if isinstance(place, str):
            raise NotApplicable(
                f"Where the tokens of {self.name} stand in the image cannot be told: "
                f"{place} in or before {label} loses their places.",
                self.name,
            )
        length_axis = 0 if operation.length_first else -2
        nowhere = complex(float("nan"), float("nan"))
        if place is None:
            return torch.full((*leading, tensor.shape[length_axis]), nowhere)
        if spread(place, -1) > TOLERANCE_PX:
            return None
        place = middle(place, -1)
        if operation.length_first:
            place = place.T[:, None]
        elif tensor is operation.key:
            place = operation.grown(place[..., None])[..., 0]
        return place.expand(*leading, place.shape[-1])


def _made_of(tensor: Tensor) -> frozenset[int]:
    """The attention operations of the pass whose outputs went into a tensor."""
    return getattr(tensor, "_vitprobe_made_of", frozenset())


def _layout(queries: Tensor, keys: Tensor, leading: tuple[int, ...]) -> tuple | None:
    """(axis, fold, images_first, rows, queries, keys) from places of two images."""
    owner = torch.cat([queries, keys], -1).real
    # Even kernels with padding on one side move places beyond the border: round, not floor.
    owner = (owner / IMAGE_STEP).round().nanmedian(-1).values
    count = 2
    for axis, size in enumerate(leading):
        if size % count:
            continue
        fold = size // count
        index = torch.arange(size).reshape([-1 if a == axis else 1 for a in range(len(leading))])
        for images_first in (True, False):
            image = index // fold if images_first else index % count
            if (owner.isnan() | (owner == image)).all() and owner.isfinite().any():
                break
        else:
            continue
        break
    else:
        return None
    whose = (count, fold) if images_first else (fold, count)
    sides = []
    for place in (queries, keys):
        place = place.unflatten(axis, whose).movedim(axis + (not images_first), 0)
        one, other = place.flatten(1, -2)
        if not torch.allclose(one, other - IMAGE_STEP, atol=TOLERANCE_PX, equal_nan=True):
            return None
        sides.append(torch.stack([one.real, one.imag], -1).numpy().round(6))
    groups: dict[bytes, list[int]] = {}
    for row in range(len(sides[0])):
        key = np.concatenate([side[row] for side in sides]).round(2)
        groups.setdefault((key + 0.0).tobytes(), []).append(row)
    if len({len(rows) for rows in groups.values()}) > 1:
        return None
    rows = np.array(list(groups.values()))
    first = rows[:, 0]
    return axis, fold, images_first, rows, sides[0][first], sides[1][first]
