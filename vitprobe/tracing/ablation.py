"""Blocks that can lose their skips, and which layers stand before and after them."""

from __future__ import annotations

from collections.abc import Sequence

from vitprobe.errors import NotApplicable, VitprobeError, nearest
from vitprobe.tracing.layers import Layer, LayerMap

# The paper's blocks 1, 7 and 10 of 12, as fractions of the depth.
DEPTHS = (1 / 12, 7 / 12, 10 / 12)


def block_names(found: LayerMap) -> list[str]:
    """The modules that make residual additions, in forward order."""
    return list(dict.fromkeys(a.module for a in found.trace.additions if a.module))


def choose_blocks(found: LayerMap, asked: Sequence[str | int] | None) -> list[str]:
    """Names of blocks, asked for by name or index."""
    known = block_names(found)
    if not known:
        raise NotApplicable(
            f"{found.model} has no residual additions: no skips to remove.", found.model
        )
    if asked is None:
        asked = [min(len(known) - 1, max(1, round(len(known) * depth))) for depth in DEPTHS]
    chosen = []
    for one in asked:
        if str(one).lstrip("-").isdigit():
            if not -len(known) <= int(one) < len(known):
                raise VitprobeError(
                    f"{found.model} has no block {one}: it has {len(known)}, from 0 "
                    f"({known[0]}) to {len(known) - 1} ({known[-1]})."
                )
            one = known[int(one)]
        if one not in known:
            raise VitprobeError(f"{found.model} has no block {one!r}.{nearest(str(one), known)}")
        chosen.append(str(one))
    return list(dict.fromkeys(chosen))


def sides(found: LayerMap, layers: list[Layer], block: str) -> list[int]:
    """0 for what stands before the block, 2 from its output on, 1 between."""
    call = next(call for call in found.trace.calls if call.name == block)
    sums = [a.started for a in found.trace.additions if a.module == block]
    output = max(sums, default=call.finished)
    return [0 if la.time <= call.started else 2 if la.time >= output else 1 for la in layers]
