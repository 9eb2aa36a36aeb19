"""Run a model and reduce its tensors on the spot.

Nothing is kept: each layer's tensor goes to a function at the moment it exists, before an in-place
operation can rewrite it, and only what that function stores remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from vitprobe.errors import VitprobeError
from vitprobe.tracing.layers import OPERANDS, Layer
from vitprobe.tracing.observing import in_own_precision
from vitprobe.tracing.trace import Addition, AdditionHooks, tensors, unobserved

Reduce = Callable[[int, Tensor], None]


@contextmanager
def capture(module: nn.Module, layers: Sequence[Layer], reduce: Reduce) -> Iterator[None]:
    """Within it, every forward pass hands its layers to ``reduce``.

    Args:
        module: the model.
        layers: of ``tracing.layers``; every one is there once in each pass.
        reduce: ``reduce(i, tensor)`` for layer i, the images along the tensor's first axis. It
            must not keep the tensor.

    Raises:
        VitprobeError: a layer that did not run in a pass. The hooks are gone afterwards, also
            after an exception.
    """
    outputs: dict[str, list[tuple[int, Layer]]] = {}
    inputs: dict[str, list[tuple[int, Layer]]] = {}
    sums: dict[Addition, list[tuple[int, Layer]]] = {}
    operands: dict[Addition, list[tuple[int, Layer]]] = {}
    seen: set[int] = set()
    calls: dict[str, int] = {}

    def take(i: int, layer: Layer, tensor: Tensor) -> None:
        seen.add(i)
        with unobserved(), in_own_precision(tensor):
            reduce(i, layer.by_image(tensor))

    for i, layer in enumerate(layers):
        if layer.addition is not None:
            of_additions = operands if layer.point in OPERANDS else sums
            of_additions.setdefault(layer.addition, []).append((i, layer))
        else:
            place = outputs if layer.point == "output" else inputs
            place.setdefault(layer.module, []).append((i, layer))

    def hook_output(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            index = calls[name] = calls.get(name, -1) + 1
            for i, layer in outputs[name]:
                if layer.index == index:
                    found = output if isinstance(output, Tensor) else dict(tensors(output)).get(
                        layer.suffix
                    )  # fmt: skip
                    if found is not None:
                        take(i, layer, found)

        return hook

    def hook_input(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            index = calls[f"{name} in"] = calls.get(f"{name} in", -1) + 1
            for i, layer in inputs[name]:
                if layer.index == index:
                    take(i, layer, args[0])

        return hook

    def take_sum(addition: Addition, total: Tensor) -> None:
        for i, layer in sums[addition]:
            take(i, layer, total)

    def take_operands(addition: Addition, skip: Tensor, branch: Tensor) -> None:
        for i, layer in operands[addition]:
            take(i, layer, skip if layer.point == "skip" else branch)

    def begin(*_: Any) -> None:
        seen.clear()
        calls.clear()

    def end(*_: Any) -> None:
        missing = [layer.label for i, layer in enumerate(layers) if i not in seen]
        if missing:
            raise VitprobeError(f"The layer {missing[0]} did not run in this forward pass.")

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
        for name in inputs:
            hook = module.get_submodule(name).register_forward_pre_hook(hook_input(name))
            stack.callback(hook.remove)
        for name in outputs:
            handle = module.get_submodule(name).register_forward_hook(hook_output(name))
            stack.callback(handle.remove)
        if sums or operands:
            before = {addition: partial(take_operands, addition) for addition in operands}
            after = {addition: partial(take_sum, addition) for addition in sums}
            stack.enter_context(AdditionHooks(module, before, after))
        stack.callback(module.register_forward_hook(end).remove)
        yield
