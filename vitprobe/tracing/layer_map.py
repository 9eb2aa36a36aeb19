"""A layer, and all layers of a model with what chooses among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import Tensor, nn

from vitprobe.errors import VitprobeError, nearest
from vitprobe.tracing.blocks import find_blocks
from vitprobe.tracing.labels import (
    CHOICES,
    OPERANDS,
    Choice,
    as_number,
    mentions_operands,
    words,
)
from vitprobe.tracing.rows import Rows
from vitprobe.tracing.trace import Addition, Trace


@dataclass(frozen=True)
class Layer:
    """One tensor of the forward pass.

    Attributes:
        label: what figures and files call it.
        time: when in the forward pass it exists; orders the layers.
        module: qualified name of the module that puts it out, takes it in, or adds it.
        index: which call of that module, from 0.
        suffix: which tensor of an output of several.
        point: ``output``, ``input``, ``addition``, or of an addition ``skip`` or ``branch``.
        addition: the residual addition, where it is one or goes into one.
        axis: the axis that counts the images.
        fold: how many rows along it belong to an image (windows folded into the batch).
        images_first: whether the rows of an image lie together there.
        shape: of one image's part, the image axis left out.
        identity: equal for tensors that hold the very same values.
    """

    label: str
    time: int
    module: str
    index: int = 0
    suffix: str = ""
    point: str = "output"
    addition: Addition | None = None
    axis: int = 0
    fold: int = 1
    images_first: bool = True
    shape: tuple[int, ...] = ()
    identity: tuple[int, ...] = ()

    def by_image(self, tensor: Tensor) -> Tensor:
        """The tensor with its images along the first axis, and only they."""
        rank = len(self.shape) + (self.fold == 1)
        if tensor.ndim != rank and tensor.numel() == prod(self.shape):
            return tensor.reshape(1, *self.shape)  # a batch of one whose axis was squeezed away
        return Rows(self.axis, self.fold, self.images_first).by_image(tensor)


@dataclass(frozen=True)
class LayerMap:
    """Every tensor of a model's forward pass that can be a layer, and what chooses among them.

    Attributes:
        model: its name.
        layers: in forward order.
        operands: skip and branch of every addition among them.
        trace: of the pass.
        never_ran: names of modules.
        left_out: tensors that are of the image and no layers, and why.
        modules: by qualified name.
        names: further names of modules that stand in several places: the layers that they mean.
    """

    model: str
    layers: list[Layer]
    operands: list[Layer]
    trace: Trace
    never_ran: list[str]
    left_out: dict[str, str]
    modules: dict[str, nn.Module]
    names: dict[str, list[Layer]]

    @property
    def has_attention(self) -> bool:
        return bool(self.trace.attention_modules)

    def choose(self, choice: Choice) -> list[Layer]:
        """Layers in forward order.

        Args:
            choice: ``blocks``, ``paper``, ``all``, names, names with wildcards, or numbers, one or
                several. Numbers count the layers of the sets and wildcards beside them, those of
                ``blocks`` where there are none; negative ones count from the end.

        Raises:
            VitprobeError: nothing by that name or number, or a module that never ran.
        """
        wanted = words(choice)
        sets = {"blocks": self._blocks, "paper": self._paper, "all": self._all}
        named: list[Layer] = []
        among: list[Layer] = []
        numbers: list[int] = []
        counted = [str(one) for one in wanted]
        for one in wanted:
            exact = self._exact(one) if isinstance(one, str) and one not in sets else []
            number = None if exact else as_number(one)
            if exact or number is not None:
                counted.remove(str(one))
            if number is not None:
                numbers.append(number)
            elif exact:
                named += exact
            else:
                among += sets[str(one)]() if one in sets else self._matching(str(one))
        if numbers:
            among = self._numbered(numbers, among if counted else self._blocks(), counted)
        chosen = {layer.label: layer for layer in (*named, *among)}
        if not chosen:
            asked = " ".join(map(str, wanted))
            raise VitprobeError(f"--layers: {self.model} has no layers for {asked}.")
        return sorted(chosen.values(), key=lambda layer: layer.time)

    def _numbered(
        self, numbers: Sequence[int], among: Sequence[Layer], counted: Sequence[str]
    ) -> list[Layer]:
        """Those of some layers, by their numbers in forward order."""
        layers = sorted({la.label: la for la in among}.values(), key=lambda layer: layer.time)
        for number in numbers:
            if not -len(layers) <= number < len(layers):
                last = f": 0 to {len(layers) - 1}, or -1 to {-len(layers)} from the end"
                raise VitprobeError(
                    f"--layers: {self.model} has {len(layers)} layers for "
                    f"{' '.join(counted) or 'blocks'}, and none numbered {number}"
                    f"{last if layers else ''}."
                )
        return [layers[number] for number in numbers]

    def _blocks(self) -> list[Layer]:
        """The residual stream after each block, by ``tracing.blocks``."""
        found = set(find_blocks(self.trace, self.modules))
        chosen = [
            layer
            for layer in self.layers
            if layer.addition in found
            or (layer.point == "output" and (layer.module, layer.index, layer.suffix) in found)
        ]
        # Of a module and the last of its children, which put out the same, the module stays.
        return list({layer.identity: layer for layer in chosen}.values())

    def _paper(self) -> list[Layer]:
        """The representations that give the axis lengths of Raghu et al. 2021.

        Six a transformer block (LN1, MSA, sum, LN2, MLP hidden, sum), seven a bottleneck
        (convolution and normalisation three times, sum), two a projection.
        """
        attention = [name for name in self.trace.attention_modules if name]
        kept = []
        for layer in self.layers:
            if any(layer.module.startswith(f"{name}.") for name in attention):
                continue
            sum_or_hidden = layer.point in ("addition", "input")
            # Of what an attention module puts out the first is the output, not a map beside it.
            first = not layer.suffix or layer.suffix == min(
                other.suffix for other in self.layers if other.module == layer.module
            )
            if (
                sum_or_hidden
                or (layer.module in attention and first)
                or _is_norm(self.modules[layer.module])
                or _is_conv(self.modules[layer.module])
            ):
                kept.append(layer)
        return _distinct(kept)

    def _all(self) -> list[Layer]:
        """Every distinct tensor that a module puts out; what passes through is not repeated."""
        return _distinct([layer for layer in self.layers if layer.point == "output"])

    @property
    def remark(self) -> str:
        """A line on what is left out, or nothing."""
        if not self.left_out:
            return ""
        (label, why), *others = self.left_out.items()
        more = f", and so are {len(others)} more" if others else ""
        return f"{self.model}: {label} {why} and is left out{more}."

    def _exact(self, name: str) -> list[Layer]:
        """The layers that bear a name: as it was printed, of a module, or of a further place."""
        # A name as it was printed means that very layer, whatever brackets are in it.
        return (
            [layer for layer in (*self.layers, *self.operands) if layer.label == name]
            or self.names.get(name, [])
            or [la for la in self.layers if la.point == "output" and la.module == name]
        )

    def _matching(self, pattern: str) -> list[Layer]:
        outputs = [layer for layer in self.layers if layer.point == "output"]
        labelled = [*self.layers, *(self.operands if mentions_operands(pattern) else [])]
        # Brackets are first taken as part of a name, then as a choice of letters.
        for wild in (pattern.replace("[", "[[]"), pattern):
            found = [layer for layer in labelled if fnmatchcase(layer.label, wild)]
            found += [layer for layer in outputs if fnmatchcase(layer.module, wild)]
            for name, layers in self.names.items():
                found += layers if fnmatchcase(name, wild) else []
            if found:
                return found
        idle = [name for name in self.never_ran if fnmatchcase(name, wild)]
        if idle:
            raise VitprobeError(f"The layer {idle[0]} of {self.model} never ran.")
        for label, why in self.left_out.items():
            if fnmatchcase(label, wild):
                raise VitprobeError(f"The layer {label} of {self.model} {why}.")
        labels = [layer.label for layer in labelled]
        raise VitprobeError(
            f"--layers: {self.model} has no layer {pattern!r}.{nearest(pattern, labels)} "
            f"Use {', '.join(CHOICES)} or names with wildcards; `vitprobe layers` lists them."
        )

    def kind(self, layer: Layer) -> str:
        """What a layer is, in a word or two; the class of the module where none fits.

        ``block``, ``addition``, ``skip``, ``branch``, ``attention``, ``MLP hidden``, ``norm``,
        ``convolution``.
        """
        module = self.modules[layer.module]
        if layer.point in OPERANDS:
            return layer.point
        if any(layer.label == block.label for block in self._blocks()):
            return "block"
        if layer.point == "addition":
            return "addition"
        if layer.point == "input":
            return "MLP hidden"
        if layer.module in self.trace.attention_modules:
            return "attention"
        if _is_norm(module):
            return "norm"
        return "convolution" if _is_conv(module) else type(module).__name__


def _distinct(layers: list[Layer]) -> list[Layer]:
    kept: dict[tuple[int, ...], Layer] = {}
    for layer in layers:
        kept.setdefault(layer.identity, layer)
    return list(kept.values())


def _is_norm(module: nn.Module) -> bool:
    # Normalisations are known by name: timm and others have dozens of classes without a base.
    return "Norm" in type(module).__name__


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
