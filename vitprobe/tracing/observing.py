"""One mode for all that watch a module's passes.

A ``TorchFunctionMode`` around a pass costs about a tenth of it, so those that watch the same
module share one: whoever is entered inside another joins the mode that is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

StandIn = Callable[[], Any]

unobserved = torch._C.DisableTorchFunction
"""``with unobserved():`` keeps the operations of other hooks out of a watched pass."""


def in_own_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """``with in_own_precision(tensor):`` what is computed from a pass under autocast is not.

    Products and norms of activations would else be rounded like the model's own.
    """
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


class Observer:
    """Sees the operations of a module's passes.

    Attributes:
        functions: which it wants to see; None: every one.
    """

    functions: Collection[Callable] | None = None

    def begin(self) -> None:
        """A pass begins."""

    def end(self) -> None:
        """A pass is complete."""

    def before(self, function: Callable, args: tuple, kwargs: dict) -> StandIn | None:
        """An operation is about to run; what to call in its stead, or None."""
        return None

    def after(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        """An operation has run."""


def parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a module, by qualified name, that can be hooked: not the scripted ones."""
    for name, part in module.named_modules():
        if not isinstance(part, torch.jit.ScriptModule):
            yield name, part


def eagerly() -> AbstractContextManager[Any]:
    """Within it, what has been compiled runs operation by operation, so that it can be seen.

    A compiler would otherwise trace the observers, too (``flex_attention`` compiles itself).
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if set_stance is None else set_stance("force_eager")


@contextmanager
def observing(module: nn.Module, observer: Observer) -> Iterator[None]:
    """Within it, ``observer`` sees what the forward passes of ``module`` do.

    Observers see an operation in the order in which they were entered, each with the operands
    that the model gives; of several stand-ins the last one's counts. What observers compute is
    seen by none.
    """
    mode = _get_current_function_mode()
    with ExitStack() as stack:
        if not (isinstance(mode, _Shared) and mode.module is module):
            mode = _Shared(module)
            stack.callback(module.register_forward_pre_hook(mode.begin).remove)
            stack.callback(module.register_forward_hook(mode.end).remove)
            stack.enter_context(eagerly())
            stack.enter_context(mode)
        mode.join(observer)
        stack.callback(mode.leave, observer)
        yield


def observers_of(module: nn.Module) -> list[Observer]:
    """Who watches the passes of a module at this moment."""
    mode = _get_current_function_mode()
    return mode.observers if isinstance(mode, _Shared) and mode.module is module else []


class _Shared(TorchFunctionMode):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.observers: list[Observer] = []
        self.concerned: dict[Callable, list[Observer]] = {}
        self.running = False

    def join(self, observer: Observer) -> None:
        self.observers.append(observer)
        self.concerned.clear()

    def leave(self, observer: Observer) -> None:
        self.observers.remove(observer)
        self.concerned.clear()

    def begin(self, *_: Any) -> None:
        self.running = True
        for observer in self.observers:
            observer.begin()

    def end(self, *_: Any) -> None:
        self.running = False
        for observer in self.observers:
            observer.end()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.running:
            return function(*args, **kwargs)
        concerned = self.concerned.get(function)
        if concerned is None:
            concerned = self.concerned[function] = [
                one for one in self.observers if one.functions is None or function in one.functions
            ]
        if not concerned:
            return function(*args, **kwargs)
        stand_in = None
        with unobserved():
            for observer in concerned:
                stand_in = observer.before(function, args, kwargs) or stand_in
        result = function(*args, **kwargs) if stand_in is None else stand_in()
        with unobserved():
            for observer in concerned:
                observer.after(function, args, kwargs, result)
        return result
