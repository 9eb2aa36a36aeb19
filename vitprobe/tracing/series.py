"""The repeated unit of a network without any residual addition, and what calls are to each other.

It is the modules of one class that follow each other and in which weights follow weights
(DenseNet's layers, Inception's modules); else those that have weights once; else convolutions,
each to the end of its unit (VGG's, with the activation after them).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import nn

from .residuals import Node
from .trace import Call, Trace

GENERIC = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
Place = tuple[str, int, str]
"""A module's qualified name, which of its calls, and which of the tensors that it put out."""


def series(trace: Trace, modules: dict[str, nn.Module]) -> list[Place]:
    """The repeated unit of a network without residual additions."""
    nodes = trace.nodes
    calls = [call for call in trace.calls if call.name and any_output(call)]
    depths = [(call, depth(call, nodes)) for call in calls if not _is_trivial(modules[call.name])]
    for deep in (True, False):
        candidates = [call for call, many in depths if (many > 1 if deep else many == 1)]
        kinds: defaultdict[tuple, list[Call]] = defaultdict(list)
        for call in candidates:
            kinds[_kind(call, modules)].append(call)
        rows = [row for row in kinds.values() if len(row) > 1 and follow(row, nodes)]
        rows = [row for row in rows if not _made_of(row, rows, nodes)]
        # No row of parts of units, all of them or some.
        units = [call for row in rows if not _parts(row, rows) for call in row]
        if units:
            beside = _beside(units, candidates) if deep else []
            return [place for call in units + beside if (place := any_output(call))]
    return _ends(calls, trace)


def _made_of(row: list[Call], rows: list[list[Call]], nodes: Sequence[Node]) -> bool:
    """Whether rows within a row, of more calls, do most of its work."""
    whole = sum(depth(call, nodes) for call in row)
    inner = [
        call
        for other in rows
        if len(other) > len(row) and all(any(contains(one, call) for one in row) for call in other)
        for call in other
    ]
    inner = [call for call in inner if not any(contains(one, call) for one in inner)]
    return 2 * sum(depth(call, nodes) for call in inner) > whole


def _parts(row: list[Call], rows: list[list[Call]]) -> bool:
    others = [one for other in rows if other is not row for one in other]
    return any(contains(one, call) for one in others for call in row)


def _beside(units: list[Call], others: list[Call]) -> list[Call]:
    """Single ones of other classes among the units: the reductions of an Inception."""
    parents = {pattern(_parent(unit)) for unit in units}
    start, rank = min(unit.started for unit in units), len(units[0].outputs[0][1].shape)
    return [
        call
        for call in others
        if pattern(_parent(call)) in parents
        and call.started > start
        and len(call.outputs[0][1].shape) == rank
        and not any(call is unit or contains(call, unit) or contains(unit, call) for unit in units)
    ]


def _ends(calls: list[Call], trace: Trace) -> list[Place]:
    """Each weighted leaf of the most numerous kind, to the end of its unit."""
    leaves = [call for call in calls if call.is_leaf]
    weighted = [call for call in leaves if depth(call, trace.nodes) == 1]
    called = {call.name for call in trace.calls}
    key = {call.name: (call.type_name, pattern(_parent(call))) for call in weighted}
    numbers = Counter(key[call.name] for call in weighted).most_common(1)
    if not numbers or numbers[0][1] < 2:
        outer = [call for call in calls if "." not in call.name]
        heavy = [call for call in outer if depth(call, trace.nodes) > 0]
        return [place for call in heavy or outer if (place := any_output(call))]
    row = [call for call in weighted if key[call.name] == numbers[0][0]]
    parents = dict.fromkeys(map(_parent, row))
    if len(parents) > 1 and not parents.keys() & called:
        # A flattened network: the last in each of a row of modules that are not called.
        last = {_parent(call): call for call in leaves}
        return [place for parent in parents if (place := any_output(last[parent]))]
    found: list[Place] = []
    for call in row:
        following = min((one.started for one in weighted if one.started > call.finished), default=0)
        shape = call.outputs[0][1].shape
        unit = [
            one
            for one in leaves
            if call.started <= one.started < (following or one.started + 1)
            and one.outputs[0][1].shape == shape
        ]
        place = any_output(max(unit, key=lambda one: one.finished))
        assert place is not None
        found.append(place)
    return found


def _parent(call: Call) -> str:
    return call.name.rpartition(".")[0]


def follow(row: list[Call], nodes: Sequence[Node]) -> bool:
    """Whether calls stand in series: each takes what comes from the one before."""
    for one, other in pairwise(row):
        out, into = node_of(one.outputs), [i.node for _, i in other.inputs if i.node is not None]
        if out is None or not any(nodes[node].lineage >> out & 1 for node in into):
            return False
    return True


def _is_trivial(module: nn.Module) -> bool:
    """Without parts, or a container of one."""
    parts = len(list(module.children()))
    return parts == 0 or (parts == 1 and isinstance(module, GENERIC))


def _kind(call: Call, modules: dict[str, nn.Module]) -> tuple:
    """Its class, and for containers that say nothing the classes in it."""
    module = modules[call.name]
    if not isinstance(module, GENERIC):
        return (type(module),)
    return type(module), frozenset(type(child) for child in module.children())


def depth(call: Call, nodes: Sequence[Node]) -> int:
    """How many weighted operations follow each other in a call."""
    out = node_of(call.outputs)
    into = [nodes[info.node].weights for _, info in call.inputs if info.node is not None]
    return nodes[out].weights - max(into) if out is not None and into else 0


def node_of(tensors: Iterable) -> int | None:
    """The node of the first tensor that depends on the input."""
    return next((info.node for _, info in tensors if info.node is not None), None)


def contains(call: Call, other: Call) -> bool:
    return call.started < other.started and other.finished < call.finished


def pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def any_output(call: Call) -> Place | None:
    """The first tensor of a call's output that depends on the input."""
    place = next((suffix for suffix, info in call.outputs if info.node is not None), None)
    return None if place is None else (call.name, call.index, place)
