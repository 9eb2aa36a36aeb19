"""What a conversion has resampled: tables of places may be, weights may not."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

from torch import Tensor

from vitprobe.models.reference import Reference

# In names of tables with a vector or a bias for each place or offset.
OF_PLACES = ("pos", "relative")


def resampled(
    given: Mapping[str, Tensor], state: Mapping[str, Tensor], network: Reference
) -> dict[str, str]:
    """Tables that have come out with another number of places: ``37 × 37 to 16 × 16``."""
    prefix = getattr(network.module, "num_prefix_tokens", 0)
    numbers = {tensor.numel() for tensor in given.values()}
    found = {}
    for name, tensor in state.items():
        if not _of_places(name) or name not in network.trunk:
            continue
        before = given.get(name)
        if tensor.numel() == before.numel() if before is not None else tensor.numel() in numbers:
            continue
        if before is None:
            before = next((t for n, t in given.items() if _like(n, t, tensor)), None)
        old = _grid(tuple(before.shape), prefix) if before is not None else "another size"
        found[name] = f"from {old} to {_grid(tuple(tensor.shape), prefix)}"
    return found


def resized_weight(
    given: Mapping[str, Tensor], state: Mapping[str, Tensor], network: Reference
) -> str:
    """Which filters a conversion has made for patches of another size, in a sentence."""
    numbers = {tensor.numel() for tensor in given.values()}
    for name, shape in network.trunk.items():
        if len(shape) != 4 or _of_places(name) or name not in state:
            continue
        before = given.get(name)
        # A conversion that has renamed them has left them as many numbers as they were.
        had = numbers if before is None else {before.numel()}
        if state[name].numel() not in had:
            if before is None:
                of_same = [t for t in given.values() if t.ndim == 4 and t.shape[0] == shape[0]]
                before = of_same[0] if of_same else None
            was = f"{before.shape[-2]}×{before.shape[-1]}" if before is not None else "others"
            return (
                f"the file's patches ({name}) are {was} pixels, the network's "
                f"{shape[-2]}×{shape[-1]}: it is another network, and resampled filters would be "
                f"no weights of either."
            )
    return ""


def _of_places(name: str) -> bool:
    return any(part in name for part in OF_PLACES)


def _like(name: str, tensor: Tensor, table: Tensor) -> bool:
    """Whether a tensor of a file may be what a table has been made from."""
    same_width = tensor.shape[-1:] == table.shape[-1:] or tensor.shape[:1] == table.shape[:1]
    return _of_places(name) and tensor.ndim >= 2 and same_width


def _grid(shape: tuple[int, ...], prefix: int) -> str:
    """Rows and columns of a table of this shape, where it is square; else its sizes."""
    places = shape[-2]
    for before in (0, prefix):
        side = isqrt(max(places - before, 0))
        if len(shape) < 4 and side and side * side == places - before:
            return f"{side}×{side}"
    return "×".join(map(str, shape))
