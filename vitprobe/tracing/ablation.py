"""Blocks that can lose their skips, passes without them, and what stands before and after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from vitprobe.errors import NotApplicable, VitprobeError, nearest
from vitprobe.tracing.additions import Addition, AdditionHooks
from vitprobe.tracing.beginning import Kept, beginning_there, find_beginning, keeping
from vitprobe.tracing.capture import Reduce, capture
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


class WithoutSkips:
    """Passes in which every residual addition of a block gives its branch alone.

    What stands before the block does not know of it: only layers from the block on are looked at,
    and where the model allows it the pass begins there, with what an intact pass has left.

    Attributes:
        start: how many of the layers stand before the block.
    """

    def __init__(
        self,
        module: nn.Module,
        found: LayerMap,
        block: str,
        layers: list[Layer],
        example: Tensor,
        context: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._module = module
        self._additions = [a for a in found.trace.additions if a.module == block]
        self.start = sides(found, layers, block).count(0)
        self._layers = layers[self.start :]
        self._beginning = find_beginning(
            module, found, block, self._layers, self._hooks, example, context
        )
        self._kept = Kept()

    def _hooks(self, counted: Callable[[Addition], Addition]) -> AdditionHooks:
        before = {counted(one): lambda skip, branch: branch for one in self._additions}
        return AdditionHooks(self._module, before=before)

    def keeping(self) -> AbstractContextManager[None]:
        """Around an intact pass of the same images, which comes first."""
        self._kept = Kept()
        if self._beginning is None:
            return nullcontext()
        return keeping(self._module, self._beginning, self._kept)

    @contextmanager
    def capture(self, reduce: Reduce) -> Iterator[None]:
        """Within it, a pass hands its layers from the block on to ``reduce``, from 0."""
        with ExitStack() as stack:
            layers, beginning = self._layers, self._beginning
            if beginning is None:
                hooks = self._hooks(lambda addition: addition)
            else:
                layers, hooks = beginning.layers(layers), self._hooks(beginning.counted)
                stack.enter_context(beginning_there(self._module, beginning, self._kept))
            # Outside the capture, which then sees what stands in for the sums.
            stack.enter_context(hooks)
            stack.enter_context(capture(self._module, layers, reduce))
            yield
        self._kept = Kept()
