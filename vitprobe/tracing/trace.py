"""What one forward pass does: the module calls, the residual additions, the attention.

``record`` watches a single pass closely and says where things are; ``AdditionHooks`` then hands
the operands of chosen additions to callbacks in later passes. Both see operations, not families.

While ``record`` runs, each tensor that depends on the input carries a node: its ancestors
and what the operation that made it did, from which ``residuals.classify`` tells residual
additions. Those of which all runs inside a module without children (activations) do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .additions import ADDS, Addition, AdditionHooks, operands
from .candidates import attends, is_fused
from .observing import eagerly, parts, unobserved
from .operations import BLANK, LIKE_ANOTHER
from .outside import Origins
from .residuals import Node, between, classify, is_linear
from .special_cases import SUMS_OF_OPERATIONS

__all__ = ["Addition", "AdditionHooks", "Call", "TensorInfo", "Trace", "record", "unobserved"]

# Besides weighted operations, these work on what they are given; all others pass it on.
_WORK = (
    "_norm",
    "_pool",
    "normalize",
    "matmul",
    "bmm",
    "scaled_dot_product_attention",
    "flex_attention",
)
_CUTS = {"split", "split_with_sizes", "chunk", "tensor_split", "unbind", "unsafe_chunk"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as it was when seen; equal ``identity`` means the very same values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    depends: bool  # on the input of the pass
    identity: tuple[int, int, int, int]  # storage, offset, elements, version
    node: int | None = None  # in the trace, where it depends on the input


@dataclass(frozen=True)
class Call:
    """One call of a module. A call contains another if its started-finished span does.

    ``outputs`` and ``inputs`` name each tensor by the path to it: '' for a plain output
    tensor, "[0]" or "['key']" within containers; inputs are "[0]" or "['keyword']".
    """

    name: str  # qualified; '' for the root
    index: int  # the how-manieth call of this module, from 0
    type_name: str
    is_leaf: bool
    started: int
    finished: int
    outputs: list[tuple[str, TensorInfo]]
    inputs: list[tuple[str, TensorInfo]]


@dataclass(frozen=True)
class Trace:
    """What one pass did; holds no activations."""

    calls: list[Call]  # in order of completion
    additions: list[Addition]  # in order
    attention_modules: list[str]  # innermost modules that ran an attention candidate
    nodes: list[Node]  # of every tensor that depends on the input


@dataclass(eq=False)
class _Frame:
    """A module call that is under way."""

    module: nn.Module
    name: str
    index: int
    started: int
    inputs: list[tuple[str, TensorInfo]]
    nodes: list[Node]
    first_node: int  # the first that this call could make


def tensors(value: Any, suffix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each tensor in nested tuples, lists, mappings and dataclasses, with the path to it."""
    if isinstance(value, Tensor):
        yield suffix, value
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for i, item in enumerate(value):
            yield from tensors(item, f"{suffix}[{i}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{suffix}[{key!r}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for key, item in vars(value).items():
            yield from tensors(item, f"{suffix}[{key!r}]")


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without storage
        return id(tensor)


class _Recorder(TorchFunctionMode):
    def __init__(self, root: nn.Module, names: dict[nn.Module, str], on_output: Callable | None):
        super().__init__()
        self.origins = Origins(root)
        self.names, self.on_output = names, on_output
        self.clock = self.adds = 0
        self.nodes: list[Node] = []
        # Kept alive until the end, so that no id or storage is used twice.
        self.seen: dict[int, tuple[Tensor, Node | None, int]] = {}
        self.writes: dict[int, tuple[int, Node]] = {}  # storage: its last in-place change
        self.stack: list[_Frame] = []
        self.times_called: Counter[str] = Counter()
        self.calls: list[Call] = []
        self.modules = {name: module for module, name in names.items()}
        self.additions: list[Addition] = []
        self.sums: dict[int, Node] = {}  # position of a residual sum: its fork
        self.attention_modules: dict[str, bool] = {}  # whether by one operation, values included

    def node_of(self, tensor: Tensor) -> Node | None:
        """The node of a tensor, in-place changes through other views of it included."""
        if id(tensor) not in self.seen and self.stack and self.origins.is_outside(tensor):
            # Of the images, by a way that was not seen: most likely of what was made last.
            made = self.new_node(self.nodes[-1:], works=True, linear=False)
            self.seen[id(tensor)] = (tensor, made, _version(tensor))
        _, node, version = self.seen.get(id(tensor), (tensor, None, -1))
        written = self.writes.get(_storage(tensor)) if self.writes else None
        if written is None or written[0] <= version:
            return node
        version, change = written
        if node is not None and not change.descends(node):
            change = self.new_node([node, change])
        self.seen[id(tensor)] = (tensor, change, version)
        return change

    def new_node(
        self,
        parents: list[Node],
        weighted: bool = False,
        works: bool = False,
        linear: bool = True,
        part: bool = False,
        attends: bool = False,
    ) -> Node:
        ancestors = 0
        for parent in parents:
            ancestors |= parent.lineage
        weights = max((parent.weights for parent in parents), default=0) + weighted
        name = self.stack[-1].name if self.stack else ""  # the input comes before any call
        positions = tuple(parent.position for parent in parents)
        node = Node(
            len(self.nodes), positions, ancestors, weights, weighted, weighted or works, linear,
            part, name, attends,
        )  # fmt: skip
        self.nodes.append(node)
        return node

    def info(self, tensor: Tensor) -> TensorInfo:
        node = self.node_of(tensor)
        self.seen.setdefault(id(tensor), (tensor, None, -1))
        offset = int(tensor.storage_offset()) if tensor.layout == torch.strided else 0
        identity = (_storage(tensor), offset, tensor.numel(), _version(tensor))
        position = None if node is None else node.position
        return TensorInfo(tuple(tensor.shape), tensor.dtype, node is not None, identity, position)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.stack:  # other hooks of the root, before or after its forward
            return function(*args, **kwargs)
        self.clock += 1
        given = [tensor for _, tensor in tensors((args, kwargs))]
        nodes = [self.node_of(tensor) for tensor in given]
        found = None
        if function in ADDS and (pair := operands(args, kwargs)):
            if "out" not in kwargs:
                found = self.consider(*pair)
            self.adds += 1
        parents = [node for node in nodes if node]
        attention = bool(parents) and attends(function, args, kwargs)
        if attention:
            self.attention_modules.setdefault(self.stack[-1].name, is_fused(function))
        target = kwargs.get("out", args[0] if args else None)
        version = _version(target) if isinstance(target, Tensor) else None
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name in LIKE_ANOTHER:
            parents = [node for node in nodes[:1] if node]
        if not parents or name in BLANK:
            for _, tensor in tensors(result):
                self.origins.know(tensor)
            return result
        weighted = any(
            node is None and sum(size > 1 for size in tensor.shape) >= 2
            for tensor, node in zip(given, nodes, strict=True)
        )
        works = any(word in name for word in _WORK)
        linear = is_linear(name.strip("_"), args, kwargs, nodes)
        what = weighted, works, linear, name in _CUTS, attention
        if version is not None and _version(target) != version:
            node = self.new_node(parents, *what)
            self.seen[id(target)] = (target, node, _version(target))
            self.writes[_storage(target)] = (_version(target), node)
        known = {id(tensor) for tensor in given}
        for _, tensor in tensors(result):
            if id(tensor) not in known:
                node = self.new_node(parents, *what)
                self.seen[id(tensor)] = (tensor, node, _version(tensor))
        if found is not None and (total := self.node_of(result)):
            addition, fork = found
            self.sums[total.position] = fork
            self.additions.append(replace(addition, node=total.position))
        return result

    def consider(self, first: Tensor, second: Tensor) -> tuple[Addition, Node] | None:
        """The residual addition that is about to happen, if it is one, and its fork."""
        one, other = self.node_of(first), self.node_of(second)
        if one is None or other is None or first.shape != second.shape:
            return None
        if not torch.result_type(first, second).is_floating_point:
            return None
        pair = one, other
        adder, inputs = self.adder(pair)
        found = classify(pair, inputs, self.nodes, self.sums)
        if found is None:
            return None
        if found.name != "identity" and type(adder.module).__module__ in SUMS_OF_OPERATIONS:
            return None
        since = between(pair[1 - found.skip], found.fork, self.nodes)
        both = [*since, *between(pair[found.skip], found.fork, self.nodes)]
        start = min(node.position for node in since)
        owner = next((one for one in reversed(self.stack) if one.first_node <= start), adder)
        if _is_leaf(owner.module):
            return None
        addition = Addition(
            self.adds, 0, owner.name, owner.index, found.name, found.skip, tuple(first.shape),
            self.clock, tuple(dict.fromkeys(node.module for node in since)),
            any(node.attends for node in since), self.part_of(owner, both), -1,
            pair[found.skip].position, found.fork.position,
        )  # fmt: skip
        return addition, found.fork

    def is_map(self, node: Node) -> bool:
        """Whether a tensor is the map of an attention operation."""
        while not node.attends and node.linear and not node.works and len(node.parents) == 1:
            node = self.nodes[node.parents[0]]
        return node.attends

    def adder(self, pair: tuple[Node, Node]) -> tuple[_Frame, list[Node]]:
        """The innermost module that does more than add, and what it was given.

        In a flattened network, what enters the part of it that the operands come from.
        """
        frame = self.stack[-1]
        for frame in reversed(self.stack):
            if any(self.did(frame, node) for node in pair):
                break
        common = pair[0].lineage & pair[1].lineage
        fork = self.nodes[common.bit_length() - 1] if common else None
        if fork is None or fork in pair:
            return frame, frame.nodes
        both = [node for end in pair for node in between(end, fork, self.nodes)]
        part = self.part_of(frame, both, flat=True)
        if not part:
            return frame, frame.nodes
        inside: dict[int, Node] = {}
        on_the_way = {node.position for node in both}
        for node in self.nodes[frame.first_node : max(end.position for end in pair) + 1]:
            # Functions between its modules (an activation) have no name of the part.
            between_them = node.position in on_the_way and inside.keys() >= set(node.parents)
            if node.module.startswith(f"{part}.") or (node.module == frame.name and between_them):
                inside[node.position] = node
        given = {position for node in inside.values() for position in node.parents}
        return frame, [self.nodes[p] for p in sorted(given - inside.keys())]

    def did(self, frame: _Frame, node: Node) -> bool:
        """Whether a module has worked on what it was given to make an operand."""
        made = self.nodes[frame.first_node : node.position + 1]
        return any(one.works or not one.linear for one in made if node.lineage >> one.position & 1)

    def part_of(self, frame: _Frame, nodes: list[Node], flat: bool = False) -> str:
        """The module within a frame that others stand in, and that is not called itself.

        ``flat``: one that could be called. Lists of modules cannot.
        """
        prefix = f"{frame.name}." if frame.name else ""
        names = {node.module for node in nodes if node.module.startswith(prefix) and node.module}
        names.discard(frame.name)
        if not names:
            return ""
        paths = [name.split(".") for name in names]
        common = [parts[0] for parts in zip(*paths) if len(set(parts)) == 1]
        for length in range(len(common), prefix.count("."), -1):
            name = ".".join(common[:length])
            if not self.times_called[name]:
                lists = isinstance(self.modules.get(name), nn.ModuleList | nn.ModuleDict)
                return "" if flat and lists else name
        return ""

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        with unobserved():
            self.clock += 1
            given = list(tensors(args)) + list(tensors(kwargs))
            if not self.stack:
                for _, tensor in given:
                    self.seen[id(tensor)] = (tensor, self.new_node([]), _version(tensor))
                    self.origins.begin(tensor)
            inputs = [(suffix, self.info(tensor)) for suffix, tensor in given]
            nodes = [node for _, tensor in given if (node := self.node_of(tensor))]
            name = self.names[module]
            index = self.times_called[name]
            first = len(self.nodes)
            self.stack.append(_Frame(module, name, index, self.clock, inputs, nodes, first))
            self.times_called[name] += 1

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        with unobserved():
            self.clock += 1
            frame = self.stack.pop()
            while frame.module is not module:  # calls that an exception ended
                frame = self.stack.pop()
            if isinstance(module, nn.MultiheadAttention):
                self.attention_modules[frame.name] = True
            given = list(tensors(output))
            if self.stack and self.attention_modules.get(frame.name) is False:
                made = [node for _, tensor in given if (node := self.node_of(tensor))]
                if made and all(self.is_map(node) for node in made):
                    # A module that gives the map only: who called it attends.
                    del self.attention_modules[frame.name]
                    self.attention_modules.setdefault(self.stack[-1].name, False)
            outputs = [(suffix, self.info(tensor)) for suffix, tensor in given]
            call = Call(
                frame.name, frame.index, type(module).__name__, _is_leaf(module),
                frame.started, self.clock, outputs, frame.inputs,
            )  # fmt: skip
            self.calls.append(call)
            if self.on_output is not None:
                for suffix, tensor in given:
                    self.on_output(call, suffix, tensor)


def record(
    module: nn.Module,
    *inputs: Any,
    on_output: Callable[[Call, str, Tensor], None] | None = None,
    **keyword_inputs: Any,
) -> Trace:
    """Watch one forward pass of ``module``, in the mode it is in, without gradients.

    ``on_output(call, suffix, tensor)`` gets every tensor that a module returns, at the
    moment it exists. All tensors of the pass stay in memory until it ends: give few images.
    """
    names = {child: name for name, child in parts(module)}
    recorder = _Recorder(module, names, on_output)
    handles = []
    try:
        for child in recorder.names:
            handles.append(child.register_forward_pre_hook(recorder.enter, with_kwargs=True))
            handles.append(child.register_forward_hook(recorder.leave))
        with torch.inference_mode(False), torch.no_grad():
            # Tensors made under inference mode have no version to tell changes by.
            args = [_ordinary(value) for value in inputs]
            kwargs = {key: _ordinary(value) for key, value in keyword_inputs.items()}
            with eagerly(), recorder:
                module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    additions = [replace(addition, total=recorder.adds) for addition in recorder.additions]
    return Trace(recorder.calls, additions, list(recorder.attention_modules), recorder.nodes)


def _ordinary(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
