"""Residual additions: the rules that recognise one, and hooks on their operands.

An addition of two tensors of one shape that both depend on the model's input is residual,
and one operand is its skip, if

1. ``identity``: the skip is an ancestor of the branch;
2. ``view``: since their newest common ancestor (the fork) the skip met no weighted
   operation and the branch at least two (pooled or sliced skips), or the skip nothing that
   works on it at all and the branch at least two things that do (scaled skips);
3. ``projection``: the skip met fewer weighted operations than the branch, the branch at
   least two, none lies between the input of the module that adds and the fork, and neither
   is made of another input of that module that comes after the fork (a fusion).

A weighted operation takes a tensor that does not depend on the input and has at least two
dimensions above 1. Those, normalisations, pooling and products of two tensors are work.
Position tables, biases, gates and rotary sums fit none of the rules, nor does what joins
two parts of one split tensor (Res2Net's scales), as neither is a function of the other.
What fits them and is no skip stands in ``special_cases``.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .observing import Observer, StandIn, observing

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
    module: str  # qualified name of the innermost module whose forward adds
    index: int  # in the how-manieth call of that module, from 0
    kind: str  # 'identity', 'view' or 'projection'
    skip: int  # the operand, 0 or 1, that carries the skip
    shape: tuple[int, ...]
    started: int  # on the clock of the trace's calls
    branch_modules: tuple[str, ...]  # innermost modules at work on the branch since the fork
    attends: bool  # attention ran on the branch


@dataclass(frozen=True, eq=False)
class Node:
    """Where a tensor came from: bit sets of positions in the order of creation."""

    position: int
    ancestors: int  # without its own bit
    weights: int  # the most weighted operations on a path from the input
    work: int  # the same of all that is work
    part: bool  # one of the pieces that an operation cut its operand into
    module: str  # innermost, at creation
    attends: bool

    @property
    def lineage(self) -> int:
        return self.ancestors | 1 << self.position

    def descends(self, other: "Node") -> bool:
        return bool(self.ancestors >> other.position & 1)


def classify(
    pair: tuple[Node, Node], inputs: list[Node], nodes: list[Node]
) -> tuple[str, int, Node] | None:
    """(kind, skip operand, fork) by the rules at the top; None for any other addition.

    ``inputs`` are the nodes that the adding module was given, ``nodes`` all by position.
    """
    for skip in (0, 1):
        if pair[1 - skip].descends(pair[skip]):
            return "identity", skip, pair[skip]
    common = pair[0].lineage & pair[1].lineage
    if not common:
        return None
    fork = nodes[common.bit_length() - 1]
    if all(_in_parts(node, fork, nodes) for node in pair):
        return None
    work = [node.work - fork.work for node in pair]
    if min(work) == 0 and max(work) >= 2:
        return "view", work.index(0), fork
    met = [node.weights - fork.weights for node in pair]
    if met[0] == met[1] or max(met) < 2:
        return None
    skip = met.index(min(met))
    if met[skip] == 0:
        return "view", skip, fork
    later = [given for given in inputs if given.descends(fork)]
    branch = pair[1 - skip]
    if any(branch is one or branch.descends(one) or pair[skip].descends(one) for one in later):
        return None
    for given in inputs:
        if (given is fork or fork.descends(given)) and given.weights == fork.weights:
            return "projection", skip, fork
    return None


def _in_parts(node: Node, fork: Node, nodes: list[Node]) -> bool:
    """Whether a node took in the fork as pieces of it only."""
    since = node.lineage >> fork.position + 1 << fork.position + 1
    first: list[Node] = []
    for position in range(fork.position + 1, node.position + 1):
        one = nodes[position]
        from_fork = since >> position & 1 and one.descends(fork)
        if from_fork and not any(one.descends(other) for other in first):
            first.append(one)
    return bool(first) and all(one.part for one in first)


def operands(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The two tensors that an addition adds, or None where one is a number."""
    first = args[0] if args else kwargs.get("input")
    second = args[1] if len(args) > 1 else kwargs.get("other")
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first, second
    return None


Before = Callable[[Tensor, Tensor], Tensor | None]
After = Callable[[Tensor], Any]


class AdditionHooks(Observer):
    """Call back at chosen additions of ``module``'s forward passes, while in the ``with`` block.

    ``before[addition](skip, branch)`` runs just before the addition and may return a tensor
    to stand in for the sum: the branch for an ablated skip. ``after[addition](sum)`` gets
    the result. Tensors may be overwritten later in the pass: reduce or clone them at once.
    Of several hooks around one pass all see the operands as the model gives them; the stand-in
    of the last entered counts.

    Additions are found again by counting, so hooks of others that add tensors during the
    pass must do so ``with unobserved():``. Each complete pass is checked; ``RuntimeError``
    if it does not add as the recorded one did, or if no pass was complete.
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
                raise RuntimeError(
                    f"cannot tell the residual addition of {_name(addition)}: the pass made "
                    f"{self._count} additions, the recorded one {addition.total}"
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
            raise RuntimeError(
                f"the residual addition of {_name(addition)} was recorded with shape "
                f"{addition.shape}, now it adds {tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
            )
        if before is None:
            return None
        scaled = pair[0], pair[1] * kwargs["alpha"] if "alpha" in kwargs else pair[1]
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
