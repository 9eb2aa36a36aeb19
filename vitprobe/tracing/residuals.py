"""The rules that recognise a residual addition.

An addition of two tensors of one shape that both depend on the model's input is residual,
and one operand is its skip, if

1. ``identity``: the skip is an ancestor of the branch, and something works on the way between;
   or the skip is a residual sum already, and the branch comes from that sum's own skip
   (parallel branches, added one after the other);
2. ``view``: since their newest common ancestor (the fork) the skip met no weighted
   operation and the branch at least two (pooled or sliced skips), or the skip nothing that
   works on it at all and the branch at least two things that do (scaled skips);
3. ``projection``: the skip met one weighted operation and the branch at least two, none lies
   between the input of the module that adds and the fork, and neither is made of another input
   of that module that comes after the fork (a fusion).

A weighted operation takes a tensor that does not depend on the input and has at least two
dimensions above 1. Those, normalisations, pooling and products of two tensors are work.
Weighted operations count as one while all between them is linear: a low-rank adapter beside
the weights that it adapts, or convolutions in a row that could be one, are no second branch.
The module that adds is the innermost whose forward does more than add: an addition that
stands in a module of its own belongs to the caller. Where a network has been flattened
(``torch.fx``), it is the module that all of both branches' modules stand in by name.

Position tables, biases, gates and rotary sums fit none of the rules, nor does what joins
two parts of one split tensor (Res2Net's scales), as neither is a function of the other.
What fits them and is no skip stands in ``special_cases``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Linear in what is given of the input: always, or where only one, or the first, operand is of it.
_LINEAR = (
    "add iadd radd sub isub rsub neg mean sum pad cat concat concatenate stack reshape view "
    "permute transpose swapaxes swapdims movedim moveaxis flatten unflatten squeeze unsqueeze "
    "chunk split split_with_sizes tensor_split unsafe_chunk unbind expand expand_as repeat "
    "repeat_interleave tile roll flip getitem get setitem narrow select index_select contiguous "
    "clone detach to float half double bfloat16 type type_as view_as reshape_as fold unfold "
    "pixel_shuffle pixel_unshuffle channel_shuffle avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate upsample cumsum t "
    "rot90"
)
_LINEAR_IN_ONE = (
    "mul imul rmul matmul rmatmul bmm mm baddbmm addmm einsum tensordot linear conv1d conv2d "
    "conv3d conv_transpose1d conv_transpose2d conv_transpose3d bilinear lerp"
)
_ALWAYS = dict.fromkeys(_LINEAR.split())
_IN_ONE = dict.fromkeys(_LINEAR_IN_ONE.split())
_IN_FIRST = {"div", "idiv", "truediv", "itruediv", "true_divide"}
# Where the argument that says "training" stands.
_IN_EVALUATION = {"batch_norm": 5, "dropout": 2, "dropout1d": 2, "dropout2d": 2, "dropout3d": 2}


@dataclass(frozen=True, eq=False)
class Node:
    """Where a tensor came from, and what the operation that made it did."""

    position: int  # in the order of creation
    parents: tuple[int, ...]
    ancestors: int  # bit set of positions, without its own bit
    weights: int  # the most weighted operations on a path from the input
    weighted: bool
    works: bool
    linear: bool  # in what it takes of the input
    part: bool  # one of the pieces that an operation cut its operand into
    module: str  # innermost, at creation
    attends: bool

    @property
    def lineage(self) -> int:
        return self.ancestors | 1 << self.position

    def descends(self, other: Node) -> bool:
        return bool(self.ancestors >> other.position & 1)


def is_linear(
    name: str, args: tuple, kwargs: Mapping[str, Any], given: Sequence[Node | None]
) -> bool:
    """Whether an operation is linear in what it takes of the input.

    Args:
        name: of the function, without underscores around it.
        args, kwargs: its arguments.
        given: the nodes of the tensors among them; None for those that are not of the input.
    """
    if name in _ALWAYS:
        return True
    if name in _IN_ONE:
        return sum(node is not None for node in given) == 1
    if name in _IN_FIRST:
        return given[0] is not None and not any(given[1:])
    if name in _IN_EVALUATION:
        at = _IN_EVALUATION[name]
        return not (args[at] if len(args) > at else kwargs.get("training", name != "batch_norm"))
    return False


@dataclass(frozen=True)
class Kind:
    """What an addition is: its kind, the operand that is its skip, and the fork."""

    name: str
    skip: int
    fork: Node


@dataclass(frozen=True)
class Path:
    """The most of each kind on any path between two nodes."""

    work: int = 0
    depth: int = (
        0  # weighted operations, those in a row with nothing but linear ones between as one
    )
    bent: bool = False  # something is not linear


def classify(
    pair: tuple[Node, Node],
    inputs: Sequence[Node],
    nodes: Sequence[Node],
    sums: dict[int, Node],
) -> Kind | None:
    """What kind of residual addition this is by the rules at the top; None for any other.

    Args:
        pair: the operands.
        inputs: what the module that adds was given.
        nodes: all, by position.
        sums: the forks of the residual sums so far, by their positions.
    """
    for skip in (0, 1):
        if pair[1 - skip].descends(pair[skip]):
            way = path(pair[1 - skip], pair[skip], nodes)
            return Kind("identity", skip, pair[skip]) if way.work or way.bent else None
    for skip in (0, 1):
        fork, branch = sums.get(pair[skip].position), pair[1 - skip]
        if fork is not None and branch.descends(fork) and path(branch, fork, nodes).work:
            return Kind("identity", skip, fork)
    common = pair[0].lineage & pair[1].lineage
    if not common:
        return None
    fork = nodes[common.bit_length() - 1]
    if all(_in_parts(node, fork, nodes) for node in pair):
        return None
    ways = [path(node, fork, nodes) for node in pair]
    work, depth = [way.work for way in ways], [way.depth for way in ways]
    if min(work) == 0 and max(work) >= 2:
        return Kind("view", work.index(0), fork)
    if depth[0] == depth[1] or max(depth) < 2:
        return None
    skip = depth.index(min(depth))
    if depth[skip] == 0:
        return Kind("view", skip, fork)
    if depth[skip] > 1:
        return None  # networks side by side
    later = [given for given in inputs if given.descends(fork)]
    branch = pair[1 - skip]
    if any(branch is one or branch.descends(one) or pair[skip].descends(one) for one in later):
        return None
    for given in inputs:
        if (given is fork or fork.descends(given)) and given.weights == fork.weights:
            return Kind("projection", skip, fork)
    return None


def between(node: Node, fork: Node, nodes: Sequence[Node]) -> list[Node]:
    """What was made of the fork on the way to a node, the node included."""
    return [
        one
        for one in nodes[fork.position + 1 : node.position + 1]
        if node.lineage >> one.position & 1 and one.descends(fork)
    ]


def path(node: Node, fork: Node, nodes: Sequence[Node]) -> Path:
    """The most that a tensor met since the fork."""
    best = {fork.position: (0, 0, True, False)}
    for one in between(node, fork, nodes):
        before = [best[parent] for parent in one.parents if parent in best]
        work = max(found[0] for found in before) + one.works
        # Deepest first; of two as deep, the one that the next weights would deepen.
        depth, fresh = max(found[1:3] for found in before)
        bent = any(found[3] for found in before) or not one.linear
        if one.weighted:
            depth, fresh = depth + fresh, False
        best[one.position] = work, depth, fresh or not one.linear, bent
    work, depth, _, bent = best[node.position]
    return Path(work, depth, bent)


def _in_parts(node: Node, fork: Node, nodes: Sequence[Node]) -> bool:
    """Whether a node took in the fork as pieces of it only."""
    first = [one for one in between(node, fork, nodes) if fork.position in one.parents]
    return bool(first) and all(one.part for one in first)
