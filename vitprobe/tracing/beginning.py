"""Passes that begin in the middle: what stands before is taken from an earlier pass.

Where a block is changed, everything before it is as it was. The output of the module that ran last
before the block then is given again, and the modules before that one need not run. Whether a model
allows it is tried on an example, with NaN in place of what is not computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.tracing.additions import ADDS, Addition, AdditionHooks, operands
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Layer, LayerMap
from vitprobe.tracing.observing import Observer, observing


@dataclass(frozen=True)
class Beginning:
    """Where a pass can begin.

    Attributes:
        last: the module whose output of an earlier pass is given again.
        idle: modules before it that do not run; what stands for their outputs is read by nothing
            that counts.
        additions: of two tensors, that a pass which begins here lacks.
    """

    last: str
    idle: tuple[str, ...]
    additions: int = 0

    def counted(self, addition: Addition) -> Addition:
        """A later addition as it is counted in a pass that begins here."""
        ordinal, total = addition.ordinal - self.additions, addition.total - self.additions
        return replace(addition, ordinal=ordinal, total=total)

    def layers(self, layers: Sequence[Layer]) -> list[Layer]:
        """Later layers as they are found in a pass that begins here."""
        return [
            layer if layer.addition is None
            else replace(layer, addition=self.counted(layer.addition))
            for layer in layers
        ]  # fmt: skip


@dataclass
class Kept:
    """What an earlier pass leaves: one output, and of others how they were."""

    output: Tensor | None = None
    blanks: dict[str, Tensor] = field(default_factory=dict)  # without values, on no device


@contextmanager
def keeping(module: nn.Module, beginning: Beginning, kept: Kept) -> Iterator[None]:
    """Within it, a pass leaves what one that begins there needs."""

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any, output: Any) -> None:
            if name == beginning.last:
                # A copy, since what comes after may overwrite it.
                kept.output = output.clone()
            else:
                kept.blanks[name] = torch.empty_like(output, device="meta")

        return keep

    handles = [
        module.get_submodule(name).register_forward_hook(hook(name))
        for name in (*beginning.idle, beginning.last)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def beginning_there(module: nn.Module, beginning: Beginning, kept: Kept) -> Iterator[None]:
    """Within it, passes of the same images begin there."""
    output = kept.output
    assert output is not None

    def stand_in(name: str) -> Callable[..., Tensor]:
        if name == beginning.last:
            return lambda *args, **kwargs: output.clone()
        blank = kept.blanks[name]
        return lambda *args, **kwargs: torch.full_like(blank, torch.nan, device=output.device)

    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for name in (*beginning.idle, beginning.last):
            one = module.get_submodule(name)
            replaced.append((one, vars(one).get("forward")))
            one.forward = stand_in(name)
        yield
    finally:
        for one, before in replaced:
            if before is None:
                del one.forward
            else:
                one.forward = before


class _Count(Observer):
    """Counts additions of two tensors."""

    functions = ADDS

    def __init__(self) -> None:
        self.count = 0

    def begin(self) -> None:
        self.count = 0

    def before(self, function: Callable, args: tuple, kwargs: dict) -> None:
        self.count += operands(args, kwargs) is not None


def find_beginning(
    module: nn.Module,
    found: LayerMap,
    block: str,
    layers: Sequence[Layer],
    change: Callable[[Callable[[Addition], Addition]], AdditionHooks],
    example: Tensor,
    context: Callable[[], AbstractContextManager[Any]],
) -> Beginning | None:
    """Where a pass with a changed block can begin; None where it must be a whole pass.

    Args:
        module: the model.
        found: its layers.
        block: the module that is changed.
        layers: what is looked at, from the block on.
        change: hooks that change the block, given how its additions are counted.
        example: a few images.
        context: makes a context around passes.
    """
    begins = next(call.started for call in found.trace.calls if call.name == block)
    times = Counter(call.name for call in found.trace.calls)
    before = [call for call in found.trace.calls if call.finished <= begins]
    outermost = [
        call
        for call in before
        if not any(c.started < call.started and call.finished < c.finished for c in before)
        and times[call.name] == 1
        and len(call.outputs) == 1
        and call.outputs[0][0] == ""
        and call.outputs[0][1].depends
        and call.outputs[0][1].dtype.is_floating_point
    ]
    if not outermost:
        return None
    names = [call.name for call in sorted(outermost, key=lambda call: call.finished)]
    beginning = Beginning(names[-1], tuple(names[:-1]))

    def seen(
        counted: Callable[[Addition], Addition], wanted: Sequence[Layer]
    ) -> tuple[list[Tensor], int]:
        tensors = [torch.empty(0)] * len(wanted)

        def take(i: int, tensor: Tensor) -> None:
            tensors[i] = tensor.clone()

        count = _Count()
        with context(), observing(module, count), change(counted), capture(module, wanted, take):
            module(example)
        return tensors, count.count

    kept = Kept()
    with torch.no_grad():
        with context(), keeping(module, beginning, kept):
            module(example)
        whole, total = seen(lambda addition: addition, layers)
        if kept.output is None or len(kept.blanks) < len(beginning.idle):
            return None
        try:
            with beginning_there(module, beginning, kept):
                with context(), observing(module, count := _Count()):
                    module(example)
                beginning = replace(beginning, additions=total - count.count)
                part, _ = seen(beginning.counted, beginning.layers(layers))
        except Exception:  # whatever a model raises that is given NaN
            return None
    same = all(torch.equal(a, b) for a, b in zip(whole, part, strict=True))
    return beginning if same else None
