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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ADDS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
_IN_PLACE = {Tensor.add_, Tensor.__iadd__}

unobserved = torch._C.DisableTorchFunction
"""``with unobserved():`` keeps the operations of other hooks out of a watched pass."""


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


class AdditionHooks(TorchFunctionMode):
    """Call back at chosen additions of ``module``'s forward passes, while in the ``with`` block.

    ``before[addition](skip, branch)`` runs just before the addition and may return a tensor
    to stand in for the sum: the branch for an ablated skip. ``after[addition](sum)`` gets
    the result. Tensors may be overwritten later in the pass: reduce or clone them at once.

    Additions are found again by counting, so hooks of others that add tensors during the
    pass must do so ``with unobserved():``. Each complete pass is checked; ``RuntimeError``
    if it does not add as the recorded one did, or if no pass was complete.
    """

    def __init__(
        self,
        module: nn.Module,
        before: Mapping[Addition, Before] | None = None,
        after: Mapping[Addition, After] | None = None,
    ):
        super().__init__()
        before, after = before or {}, after or {}
        self._module = module
        self._asked = {
            addition.ordinal: (addition, before.get(addition), after.get(addition))
            for addition in (*before, *after)
        }
        self._handles: list = []
        self._count = 0
        self._running = self._complete = False

    def __enter__(self) -> "AdditionHooks":
        self._complete = False
        self._handles = [
            self._module.register_forward_pre_hook(self._begin),
            self._module.register_forward_hook(self._end),
        ]
        return super().__enter__()

    def __exit__(self, exc_type, exc, traceback) -> None:
        super().__exit__(exc_type, exc, traceback)
        self._running = False
        for handle in self._handles:
            handle.remove()
        if exc_type is None and self._asked and not self._complete:
            names = ", ".join(sorted({_name(a) for a, *_ in self._asked.values()}))
            raise RuntimeError(f"no complete forward pass reached the additions of {names}")

    def _begin(self, module: nn.Module, args: tuple) -> None:
        self._count, self._running = 0, True

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._running = False
        for addition, *_ in self._asked.values():
            if self._count != addition.total:
                raise RuntimeError(
                    f"cannot tell the residual addition of {_name(addition)}: the pass made "
                    f"{self._count} additions, the recorded one {addition.total}"
                )
        self._complete = True

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in ADDS and self._running and (pair := operands(args, kwargs or {})):
            asked = self._asked.get(self._count)
            self._count += 1
            if asked is not None:
                return _add(function, args, kwargs or {}, pair, *asked)
        return function(*args, **kwargs) if kwargs else function(*args)


def _add(
    function: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    pair: tuple[Tensor, Tensor],
    addition: Addition,
    before: Before | None,
    after: After | None,
) -> Tensor:
    shape = pair[addition.skip].shape
    # The batch may differ; it need not be the first dimension.
    differing = sum(a != b for a, b in zip(shape, addition.shape, strict=False))
    if pair[0].shape != pair[1].shape or len(shape) != len(addition.shape) or differing > 1:
        raise RuntimeError(
            f"the residual addition of {_name(addition)} was recorded with shape "
            f"{addition.shape}, now it adds {tuple(pair[0].shape)} and {tuple(pair[1].shape)}"
        )
    # Operands as they were: what comes out instead must not depend on hooks' own tensors.
    with unobserved():
        instead = None
        if before is not None:
            scaled = pair[0], pair[1] * kwargs["alpha"] if "alpha" in kwargs else pair[1]
            instead = before(scaled[addition.skip], scaled[1 - addition.skip])
    if instead is None:
        total = function(*args, **kwargs)
    elif instead.shape != shape:
        raise ValueError(
            f"the stand-in for the sum of {_name(addition)} has shape {tuple(instead.shape)}, "
            f"not {tuple(shape)}"
        )
    elif function in _IN_PLACE:
        total = pair[0].copy_(instead)
    else:
        total = instead.to(torch.result_type(*pair))
    if after is not None:
        with unobserved():
            after(total)
    return total


def _name(addition: Addition) -> str:
    call = f" (call {addition.index})" if addition.index else ""
    return repr(addition.module or "the model itself") + call
