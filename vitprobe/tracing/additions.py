"""Hooks on the operands of the residual additions that a recorded pass made."""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import VitprobeError

from .observing import Observer, StandIn, in_own_precision, observing

ADDS: set[Callable] = {
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__iadd__,
    Tensor.__radd__,
}
_IN_PLACE = {Tensor.add_, Tensor.__iadd__}


@dataclass(frozen=True)
class Addition:
    """One residual addition: what the skip carries plus what the branch adds."""

    ordinal: int  # among all additions of two tensors in the pass, from 0
    total: int  # how many of those the pass has
    module: str  # qualified name of the innermost module within which the whole branch runs
    index: int  # in the how-manieth call of that module, from 0
    kind: str  # 'identity', 'view' or 'projection'
    skip: int  # the operand, 0 or 1, that carries the skip
    shape: tuple[int, ...]
    started: int  # on the clock of the trace's calls
    branch_modules: tuple[str, ...]  # innermost modules at work on the branch since the fork
    attends: bool  # attention ran on the branch
    part: str  # the module, never called itself, that all of the branch's modules stand in, or ''
    node: int  # of the sum, in the trace
    onto: int  # of the skip operand
    fork: int  # of what skip and branch both come from


def operands(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The two tensors that an addition adds, or None where one is a number."""
    first = args[0] if args else kwargs.get("input")
    second = args[1] if len(args) > 1 else kwargs.get("other")
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first, second
    return None


Before = Callable[[Tensor, Tensor], Tensor | None]
After = Callable[[Tensor], Any]


class OtherPass(VitprobeError, RuntimeError):
    """A pass does other things than the recorded one did: its steps depend on its images."""


class AdditionHooks(Observer):
    """Call back at chosen additions of ``module``'s forward passes, while in the ``with`` block.

    ``before[addition](skip, branch)`` runs just before the addition and may return a tensor
    to stand in for the sum: the branch for an ablated skip. ``after[addition](sum)`` gets
    the result. Tensors may be overwritten later in the pass: reduce or clone them at once.
    Of several hooks around one pass all see the operands as the model gives them; the stand-in
    of the last entered counts.

    Additions are found again by counting, so hooks of others that add tensors during the
    pass must do so ``with unobserved():``. Each complete pass is checked; ``OtherPass``
    if it does not add as the recorded one did, ``RuntimeError`` if no pass was complete.
    """

    functions: Collection[Callable] | None = ADDS

    def __init__(
        self,
        module: nn.Module,
        before: Mapping[Addition, Before] | None = None,
        after: Mapping[Addition, After] | None = None,
    ):
        before, after = before or {}, after or {}
        self._module = module
        self._asked = {
            addition.ordinal: (addition, before.get(addition), after.get(addition))
            for addition in (*before, *after)
        }
        self._stack = ExitStack()
        self._count = 0
        self._complete = False
        self._after: After | None = None

    def __enter__(self) -> "AdditionHooks":
        self._complete = False
        self._stack.enter_context(observing(self._module, self))
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        self._stack.close()
        if exc_type is None and self._asked and not self._complete:
            names = ", ".join(sorted({_name(a) for a, *_ in self._asked.values()}))
            raise RuntimeError(f"no complete forward pass reached the additions of {names}")

    def begin(self) -> None:
        self._count, self._after = 0, None

    def end(self) -> None:
        for addition, *_ in self._asked.values():
            if self._count != addition.total:
                raise OtherPass(
                    f"No addition can be told for the residual one of {_name(addition)}: the pass "
                    f"made {self._count} additions, the recorded one {addition.total}. A pass "
                    f"whose steps depend on its images, or on their number, cannot be watched."
                )
        self._complete = True

    def before(self, function: Callable, args: tuple, kwargs: dict) -> StandIn | None:
        pair = operands(args, kwargs)
        if pair is None:
            return None
        asked = self._asked.get(self._count)
        self._count += 1
        if asked is None:
            return None
        addition, before, self._after = asked
        shape = pair[addition.skip].shape
        # The batch may differ; it need not be the first dimension.
        differing = sum(a != b for a, b in zip(shape, addition.shape, strict=False))
        if pair[0].shape != pair[1].shape or len(shape) != len(addition.shape) or differing > 1:
            raise OtherPass(
                f"The residual addition of {_name(addition)} was recorded with shape "
                f"{addition.shape}, now it adds {tuple(pair[0].shape)} and {tuple(pair[1].shape)}."
            )
        if before is None:
            return None
        scaled = pair[0], pair[1] * kwargs["alpha"] if "alpha" in kwargs else pair[1]
        with in_own_precision(scaled[0]):
            instead = before(scaled[addition.skip], scaled[1 - addition.skip])
        if instead is None:
            return None
        if instead.shape != shape:
            raise ValueError(
                f"the stand-in for the sum of {_name(addition)} has shape {tuple(instead.shape)}, "
                f"not {tuple(shape)}"
            )
        if function in _IN_PLACE:
            return partial(pair[0].copy_, instead)
        return partial(instead.to, torch.result_type(*pair))

    def after(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        if self._after is not None:
            after, self._after = self._after, None
            after(result)


def _name(addition: Addition) -> str:
    call = f" (call {addition.index})" if addition.index else ""
    return repr(addition.module or "the model itself") + call
