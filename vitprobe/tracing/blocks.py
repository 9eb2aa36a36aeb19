"""What the blocks of a network are: the repeated unit whose output is the residual stream.

Who makes a residual addition within itself is a unit: a transformer block, a bottleneck. Told from
the pass, not from names:

- A module that adds in a loop (or a network that has been flattened) has a unit for each
  iteration: its additions repeat themselves, or each belongs to another of a row of modules.
- Of units within one another, the outer one is the block if the inner ones are parts of it (a
  position encoding, a sublayer that adds for itself), and none if they are a row of their own (a
  skip over a whole stage).
- What has no skip is a block as well if weights follow weights in it and it is of the same class
  as blocks that come after it, or stands in a row with blocks: a strided block, but not a stem, a
  norm, a single convolution or a head.

A network without any residual addition has the repeated units of ``tracing.series``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .additions import Addition
from .residuals import Node, path
from .series import GENERIC, Place, any_output, contains, depth, follow, node_of, pattern, series
from .trace import Call, Trace


@dataclass
class _Unit:
    """A call that makes residual additions, those at one place of the stream taken together."""

    call: Call
    steps: list[list[Addition]] = field(default_factory=list)

    @property
    def last(self) -> Addition:
        return self.steps[-1][-1]

    def contains(self, other: _Unit) -> bool:
        return contains(self.call, other.call)


def find_blocks(trace: Trace, modules: dict[str, nn.Module]) -> list[Place | Addition]:
    """Where the residual stream is after each block.

    Args:
        trace: of a pass.
        modules: all of the model's, by qualified name.

    Returns:
        outputs of modules, or additions where a block is no module, not in order.
    """
    units = _units(trace)
    found: list[Place | Addition] = []
    alone: list[_Unit] = []
    for unit in _outer(units, trace.nodes):
        ends = _iterations(unit, units, modules)
        if ends is None:
            alone.append(unit)
        else:
            found += ends
            found += _without_a_skip(unit, trace)
    whole = _made_of_unlike(alone, trace, modules)
    alone = [one for one in alone if not any(unit.contains(one) for unit in whole)] + whole
    for unit in alone:
        found += _outputs(unit, trace.nodes) or [unit.last]
    calls = [unit.call for unit in alone]
    found += [place for call in _same_row(calls, units, trace) if (place := any_output(call))]
    if not found:
        found += series(trace, modules)
    return found


def _units(trace: Trace) -> list[_Unit]:
    """In order of completion: inner calls before those that contain them."""
    calls = {(call.name, call.index): call for call in trace.calls}
    units: dict[tuple[str, int], _Unit] = {}
    for addition in trace.additions:
        key = addition.module, addition.index
        steps = units.setdefault(key, _Unit(calls[key])).steps
        before = steps[-1][-1] if steps else None
        # Branches of one fork, added one after the other, are one step of the stream.
        if before is not None and (addition.onto, addition.fork) == (before.node, before.fork):
            steps[-1].append(addition)
        else:
            steps.append([addition])
    return sorted(units.values(), key=lambda unit: unit.call.finished)


def _outer(units: list[_Unit], nodes: Sequence[Node]) -> list[_Unit]:
    """Of units within one another those that are blocks."""
    kept: list[_Unit] = []
    for unit in units:
        inner = [other for other in kept if unit.contains(other)]
        if _is_row(unit, inner, nodes):
            continue
        kept = [other for other in kept if other not in inner] + [unit]
    # What stands alone beside a row of others is no block: a head that adds.
    kinds = Counter(unit.call.type_name for unit in kept)
    places = Counter(pattern(unit.call.name) for unit in kept)
    if max(kinds.values(), default=0) == 1:
        return kept
    return [
        unit
        for unit in kept
        if kinds[unit.call.type_name] > 1
        or places[pattern(unit.call.name)] > 1
        or len(unit.steps) > 2
    ]


def _made_of_unlike(units: list[_Unit], trace: Trace, modules: dict[str, nn.Module]) -> list[_Unit]:
    """Repeated calls that are each made of the same few unlike units (MaxViT's blocks).

    Or of one unit and other weights, in a network where every unit stands so (ConvMixer's).
    """
    known = {(unit.call.name, unit.call.index) for unit in units}
    rows: defaultdict[tuple[type, str], list[tuple[_Unit, tuple]]] = defaultdict(list)
    for call in trace.calls:
        inner = [unit for unit in units if contains(call, unit.call)]
        apart = isinstance(modules[call.name], GENERIC) and any(
            unit.call.name.rpartition(".")[0] != call.name for unit in inner
        )
        if call.name and inner and not apart and (call.name, call.index) not in known:
            kinds = tuple(_wrapped(unit.call, modules) for unit in inner)
            whole = _Unit(call, [step for unit in inner for step in unit.steps])
            rows[type(modules[call.name]), pattern(call.name)].append((whole, kinds))
    found: list[_Unit] = []
    for (kind, _), row in rows.items():
        wholes, (kinds, *others) = [whole for whole, _ in row], {kinds for _, kinds in row}
        if len(row) < 2 or others:
            continue
        if issubclass(kind, GENERIC):
            calls = [whole.call for whole in wholes]
            ends = {node_of(unit.call.outputs) for unit in units}
            other_end = not any(node_of(whole.call.outputs) in ends for whole in wholes)
            fits = len(kinds) == 1 and len(row) == len(units) and follow(calls, trace.nodes)
            fits = fits and other_end
        else:
            fits = len(set(kinds)) > 1 and max(Counter(kinds).values()) <= 2
        if fits:
            found += wholes
    return [one for one in found if not any(other.contains(one) for other in found)]


def _wrapped(call: Call, modules: dict[str, nn.Module]) -> tuple[type, ...]:
    """The class of a unit, and of what it wraps where that is one module."""
    module = modules[call.name]
    inner = [child for child in module.children() if next(child.parameters(), None) is not None]
    wraps = len(inner) == 1 and not isinstance(inner[0], GENERIC)
    return (type(module), type(inner[0])) if wraps else (type(module),)


def _is_row(unit: _Unit, inner: list[_Unit], nodes: Sequence[Node]) -> bool:
    """Whether what stands within a unit are blocks themselves."""
    for step in unit.steps:
        on_branch = [one for one in inner if _on_branch(step[-1], one.last.node, nodes)]
        if max(Counter(one.call.type_name for one in on_branch).values(), default=0) > 1:
            return True
    number = Counter(one.call.type_name for one in inner)
    return max(number.values(), default=0) > len(unit.steps)


def _on_branch(addition: Addition, position: int, nodes: Sequence[Node]) -> bool:
    total, skip = nodes[addition.node], nodes[addition.onto]
    within = total.ancestors >> position & 1 and nodes[position].ancestors >> addition.fork & 1
    return bool(within and not skip.lineage >> position & 1)


def _iterations(
    unit: _Unit, units: list[_Unit], modules: dict[str, nn.Module]
) -> list[Addition] | None:
    """The last addition of each iteration of a unit that is a loop; None: it is one block."""
    steps = unit.steps
    if len(steps) < 2:
        return None
    parts = [step[-1].part for step in steps]
    patterns = {pattern(part) for part in parts}
    ends = [i for i, part in enumerate(parts) if i + 1 == len(parts) or parts[i + 1] != part]
    in_a_row = "" not in parts and len(patterns) == 1 and len(set(parts)) == len(ends) > 1
    if in_a_row and parts[0].rpartition(".")[0] != unit.call.name:
        return [steps[i][-1] for i in ends]
    classes, shapes = zip(*(_signature(step, unit.call.name, modules) for step in steps))
    same = [one for one in units if one.call.type_name == unit.call.type_name]
    repeated = len({one.call.name for one in same}) > 1
    for period in range(1, len(steps) // 2 + 1):
        if len(steps) % period or not _repeats(classes, period):
            continue
        # Blocks of two MLPs repeat their classes; loops repeat their shapes, but for the first.
        if (
            not repeated
            or _repeats(shapes, period)
            or (len(steps) > 2 * period and _repeats(shapes[period:], period))
        ):
            return [step[-1] for step in steps[period - 1 :: period]]
    if not repeated and (not unit.call.name or len(steps) > 2):
        return [step[-1] for step in steps]
    return None


def _without_a_skip(unit: _Unit, trace: Trace) -> list[Place]:
    """What stands in a row with the branches of a loop and is a block without an addition.

    A strided module that the loop takes as it is, or, of a flattened network, the part that such a
    module was.
    """
    inner = [call for call in trace.calls if contains(unit.call, call)]
    called = {call.name for call in inner}
    work = {name for step in unit.steps for addition in step for name in addition.branch_modules}
    known = {part for name in work for part in _parts_of(name)}
    rows = {pattern(step[-1].part) for step in unit.steps if step[-1].part}
    rows |= {
        pattern(top) for step in unit.steps if (top := _top(step[-1], unit, called)) is not None
    }
    parts: dict[str, list[Call]] = {}
    for call in inner:
        for name in _parts_of(call.name):
            if pattern(name) in rows and name not in known:
                parts.setdefault(name, []).append(call)
    found = []
    for calls in parts.values():
        first, last = calls[0], calls[-1]
        adds = any(first.started < one.started < last.finished for one in trace.additions)
        if adds or sum(call.name == last.name for call in calls) > 1:
            continue
        place, into = any_output(last), node_of(first.inputs)
        if place is None or into is None or _takes_the_image(first, trace.nodes):
            continue
        out = node_of(last.outputs)
        if out is not None and trace.nodes[out].weights - trace.nodes[into].weights > 1:
            found.append(place)
    return found


def _top(addition: Addition, unit: _Unit, called: set[str]) -> str | None:
    """The one module, called by a loop itself, that does all the work of a branch."""
    start = unit.call.name.count(".") + 1 if unit.call.name else 0
    tops = set()
    for name in addition.branch_modules:
        if name == unit.call.name:
            continue
        outer = [part for part in _parts_of(name) if part in called and part.count(".") >= start]
        tops |= set(outer[:1])
    return tops.pop() if len(tops) == 1 else None


def _parts_of(name: str) -> list[str]:
    """A qualified name and those of the modules that it is in, the outermost first."""
    pieces = name.split(".")
    return [".".join(pieces[: i + 1]) for i in range(len(pieces))]


def _repeats(values: Sequence, period: int) -> bool:
    return all(value == values[i % period] for i, value in enumerate(values))


def _signature(
    step: list[Addition], owner: str, modules: dict[str, nn.Module]
) -> tuple[tuple, tuple]:
    """The classes of what is at work on a step's branches, and with the shapes of its weights."""
    attends = any(addition.attends for addition in step)
    names = [name for addition in step for name in addition.branch_modules if name != owner]
    parts = [modules[name] for name in names]
    classes = tuple(type(part).__name__ for part in parts)
    shapes = tuple(tuple(p.shape) for part in parts for p in part.parameters(recurse=False))
    return (attends, classes), (attends, classes, shapes)


def _outputs(unit: _Unit, nodes: Sequence[Node]) -> list[Place]:
    """Of the tensors that a unit puts out those that are its streams.

    They are its sums with at most an activation after them; else the first that is made of the
    last sum.
    """
    sums = [nodes[step[-1].node] for step in unit.steps]
    streams: dict[int, Place] = {}
    last = None
    for suffix, info in unit.call.outputs:
        if info.node is None:
            continue
        node, place = nodes[info.node], (unit.call.name, unit.call.index, suffix)
        newest = next((one for one in reversed(sums) if node.lineage >> one.position & 1), None)
        if newest is not None and (newest is node or not path(node, newest, nodes).work):
            streams.setdefault(newest.position, place)
        if last is None and newest is sums[-1]:
            last = place
    return list(streams.values()) or ([last] if last else [])


def _same_row(blocks: list[Call], units: list[_Unit], trace: Trace) -> list[Call]:
    """Calls without an addition that stand in a row with blocks and are blocks as well."""
    classes: defaultdict[str, set[str]] = defaultdict(set)
    ranks: defaultdict[str, set[int]] = defaultdict(set)
    for block in blocks:
        classes[pattern(block.name)].add(block.type_name)
        ranks[pattern(block.name)] |= {len(info.shape) for _, info in block.outputs}
    known = {(unit.call.name, unit.call.index) for unit in units}
    known |= {(call.name, call.index) for call in blocks}
    kinds = {block.type_name for block in blocks} - {kind.__name__ for kind in GENERIC}
    row = []
    for call in trace.calls:
        place = pattern(call.name)
        alike = (
            call.type_name in kinds
            and depth(call, trace.nodes) > 1
            and any(follow([call, block], trace.nodes) for block in blocks)
        )
        if not call.name or not (alike or place in classes) or (call.name, call.index) in known:
            continue
        if any(contains(unit.call, call) for unit in units):
            continue
        if (
            alike
            or call.type_name in classes[place]
            or (
                not call.is_leaf
                and depth(call, trace.nodes) > 1
                and not _takes_the_image(call, trace.nodes)
                and any(len(info.shape) in ranks[place] for _, info in call.outputs)
            )
        ):
            row.append(call)
    return row


def _takes_the_image(call: Call, nodes: Sequence[Node]) -> bool:
    into = node_of(call.inputs)
    return into is None or nodes[into].weights == 0
