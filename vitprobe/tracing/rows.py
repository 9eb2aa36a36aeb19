"""Do the rows of a pass's tensors keep to their images, and does a pass give the same twice?

Values tell, not norms: image A has the same values in a batch (A, B) as in a batch (B, A, C), and
so has B, unless images see each other or the pass is random. A norm behind a normalisation would
see neither. A pass that draws random numbers is made several times more: what is drawn may well be
the same twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from vitprobe.errors import VitprobeError, ran_out
from vitprobe.tracing.observing import parts
from vitprobe.tracing.trace import Addition, AdditionHooks, tensors, unobserved

# An image in one batch and in another differs by rounding only: measured up to 1e-5 in float32 and
# 2e-2 in bfloat16. Rows of mixed images differ by far more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
# C is brighter than A and B, so that a largest value of the batch is another one.
_BRIGHTER = 2.0
# How often a pass that draws random numbers is made again: one of ten images dropped is found.
_REPEATS = 16
# So few values of a row tell; an odd step reaches every channel and place.
_VALUES = 4096

Key = tuple[str, int, str] | Addition
"""A module, which of its calls, and which of its tensors; or an addition."""


@dataclass(frozen=True)
class Rows:
    """How a tensor holds its images.

    Attributes:
        axis: that counts them.
        fold: how many rows along it belong to an image (windows folded into the batch).
        images_first: whether the rows of an image lie together.
    """

    axis: int
    fold: int = 1
    images_first: bool = True

    def by_image(self, tensor: Tensor) -> Tensor:
        """The tensor with its images along the first axis, and only they."""
        if self.axis:
            tensor = tensor.movedim(self.axis, 0)
        if self.fold > 1 and self.images_first:
            return tensor.unflatten(0, (-1, self.fold))
        if self.fold > 1:
            return tensor.unflatten(0, (self.fold, -1)).movedim(1, 0)
        return tensor


def rows_of(two: tuple[int, ...], three: tuple[int, ...]) -> Rows | None:
    """How a tensor holds its images, by its shapes for two and for three of them."""
    if len(two) != len(three):
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(two, three)) if a != b]
    if len(differing) != 1 or 3 * two[differing[0]] != 2 * three[differing[0]]:
        return None
    return Rows(differing[0], two[differing[0]] // 2)


@dataclass(frozen=True)
class Examined:
    """What became of the tensors of a pass.

    Attributes:
        rows: of those whose rows keep to their images.
        mixed: those that have an axis of images, but whose values depend on the others in the
            batch, in the order in which they exist.
    """

    rows: dict[Key, Rows]
    mixed: list[Key]


def examine(
    name: str,
    module: nn.Module,
    example: Tensor,
    shapes: dict[Key, tuple[int, ...]] | None = None,
) -> Examined:
    """Compare a pass of two images with one of the same among three.

    Args:
        name: of the model, for messages.
        module: in evaluation mode.
        example: (2, C, H, W).
        shapes: for two images, of the outputs of modules and the additions to examine; None: of
            all outputs.

    Raises:
        VitprobeError: the pass is random, or images see each other in it.
    """
    first, second = example[:1], example[1:2]
    if torch.equal(first, second):
        second = first.flip(-2)
    pair = torch.cat([first, second])
    bright, plain = (
        torch.cat([second, first, factor * first.flip(-1)]) for factor in (_BRIGHTER, 1)
    )
    if shapes is None:
        known: dict[Key, tuple[int, ...]] = {}
        _watch(module, pair, [], lambda key, tensor: known.setdefault(key, tuple(tensor.shape)))
        shapes = known
    additions = [key for key in shapes if isinstance(key, Addition)]
    layouts: dict[Key, Rows] = {}

    def into(kept: dict[Key, list[Tensor]]) -> Callable[[Key, Tensor], None]:
        def take(key: Key, tensor: Tensor) -> None:
            if key not in layouts and key in shapes:
                rows = rows_of(shapes[key], tuple(tensor.shape))
                if rows is not None:
                    layouts[key] = rows
            if key in layouts:
                kept[key] = [_sample(one.by_image(tensor)[:2]) for one in _orders(layouts[key])]

        return take

    three: dict[Key, list[Tensor]] = {}
    two: dict[Key, list[Tensor]] = {}
    before = _generators(example)
    try:
        _watch(module, bright, additions, into(three))
    except VitprobeError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        # It checks the range of its images.
        _watch(module, plain, additions, into(three))
    _watch(module, pair, additions, into(two))
    draws = before != _generators(example)
    rows: dict[Key, Rows] = {}
    mixed: list[Key] = []
    for key, layout in layouts.items():
        if key not in two:
            continue
        for i, order in enumerate(_orders(layout)):
            if _same(two[key][i], three[key][i].flip(0)):
                rows[key] = order
                break
        else:
            mixed.append(key)
    for _ in range(_REPEATS if draws else bool(mixed)):
        again: dict[Key, list[Tensor]] = {}
        _watch(module, pair, additions, into(again))
        for key in two if draws else mixed:
            if key in again and not _same(again[key][0], two[key][0]):
                raise VitprobeError(
                    f"{name} gives other values for the same images each time, from {told(key)} "
                    f"on: the pass is random (dropout, noise, masking), and what is measured of it "
                    f"would be, too."
                )
    if mixed:
        outputs = [key for key in layouts if isinstance(key, tuple) and not key[0]]
        inner = [key for key in mixed if key not in outputs]
        if inner and outputs and all(key in mixed for key in outputs):
            raise VitprobeError(
                f"The images of a batch see each other in {name}, from {told(inner[0])} on: its "
                f"layers have no rows that belong to one image each."
            )
    return Examined(rows, mixed)


def _generators(tensor: Tensor) -> list[bytes]:
    """Where the generators of random numbers stand: torch's, of the device too, and Python's."""
    modules = [torch] + [torch.get_device_module(tensor.device)] * (tensor.device.type != "cpu")
    states = [module.get_rng_state().numpy().tobytes() for module in modules]
    others = random.getstate(), np.random.get_state(legacy=False)
    return [*states, *(repr(state).encode() for state in others)]


def told(key: Key) -> str:
    """A tensor in words."""
    if isinstance(key, Addition):
        return f"the sum of {key.module or 'the model itself'}"
    return f"{key[0] or 'output'}{key[2]}"


def _orders(rows: Rows) -> list[Rows]:
    return [rows] if rows.fold == 1 else [rows, Rows(rows.axis, rows.fold, False)]


def _sample(by_image: Tensor) -> Tensor:
    """(images, few) of the values."""
    flat = by_image.flatten(1) if by_image.ndim > 1 else by_image[:, None]
    step = max(1, flat.shape[1] // _VALUES) | 1
    return flat[:, ::step].detach().to("cpu", copy=True)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = TOLERANCE.get(one.dtype, 5e-2)
    one, other = one.double(), other.double()
    # Values that are not finite tell nothing of rows; the measurement names their layer.
    finite = one.isfinite() & other.isfinite()
    off = torch.where(finite, one - other, 0).norm(dim=1)
    size = torch.where(finite, one, 0).norm(dim=1)
    return bool((off <= tolerance * size.clamp(min=1e-5)).all())


def _watch(
    module: nn.Module,
    images: Tensor,
    additions: list[Addition],
    take: Callable[[Key, Tensor], object],
) -> None:
    """A pass that hands over what modules put out, and sums, at the moment they exist."""
    calls: dict[str, int] = {}

    def left(name: str, _: nn.Module, args: object, output: object) -> None:
        index = calls[name] = calls.get(name, -1) + 1
        with unobserved():
            for suffix, tensor in tensors(output):
                if tensor.is_floating_point():
                    take((name, index, suffix), tensor)

    with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        for name, child in parts(module):
            stack.callback(child.register_forward_hook(partial(left, name)).remove)
        if additions:
            hooks = {addition: partial(take, addition) for addition in additions}
            stack.enter_context(AdditionHooks(module, after=hooks))
        module(images.clone())
