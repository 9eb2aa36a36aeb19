"""A timm network without numbers: what it needs from a file, and how timm converts files for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# A number of classes that no layer has as its width by chance.
CLASSES = 11
# Tensors at the top of a network that are part of what it computes: one that a file has and the
# network lacks makes it another network.
INPUTS = ("class_embedding", "pos_embed", "positional_embedding")
# In names of what joins the tokens of a network, but for those in place of masked ones; and of what
# is added to its weights.
JOINS, MASKS, ADDS = ("token", "register", "prompt"), ("mask",), r"lora|(^|[._])(rope|rotary)"
# The last norm of a network, which timm's own files of some networks lack.
LAST_NORM = r"head\.norm\.(weight|bias)"
# Numbers as a network computes with them: others (int8, float8) need scales that it has no place
# for.
NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What a profiler (thop) leaves in every module.
RECORDS = ("total_ops", "total_params")


@dataclass(frozen=True)
class Reference:
    """What a network needs.

    Attributes:
        module: on torch's meta device, with ``CLASSES`` classes.
        trunk: names and shapes of what must come from a file: all but the classifier, and but for
            counters and indices, which are no weights.
        head: names of the classifier's tensors.
        convert: timm's conversion of other layouts into its own, if it has one.
        strict: whether timm asks its own files for everything.
    """

    module: nn.Module
    trunk: dict[str, tuple[int, ...]]
    head: dict[str, tuple[int, ...]]
    convert: Callable[..., Any] | None = None
    strict: bool = True
    names: frozenset[str] = field(default_factory=frozenset)

    def converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict as timm reads it.

        Raises:
            Exception: of any kind, where timm's conversion meets a layout it does not know.
        """
        found: Any = dict(state)
        if self.convert is not None:
            try:
                found = self.convert(found, self.module)
            except TypeError:
                found = self.convert(dict(state))
        # What a conversion takes from the network itself is not from the file.
        return {k: v for k, v in found.items() if isinstance(v, Tensor) and not v.is_meta}

    def classes(self, state: Mapping[str, Tensor]) -> int:
        """Of the classifier in a state dict; 0 where it has none."""
        for name, shape in self.head.items():
            if name not in state or state[name].ndim != len(shape) or not is_plain(state[name]):
                return 0
        counts = {
            state[name].shape[i]
            for name, shape in self.head.items()
            for i, size in enumerate(shape)
            if size == CLASSES
        }
        fits = all(
            CLASSES in (size, state[name].shape[i]) or state[name].shape[i] == size
            for name, shape in self.head.items()
            for i, size in enumerate(shape)
        )
        return counts.pop() if len(counts) == 1 and fits else 0

    def changes(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor of a file that the network lacks makes it another network.

        So do a deeper block, the scale of a branch or a further token; a decoder, a projector, a
        queue beside the network do not.
        """
        first, _, rest = name.partition(".")
        if not tensor.is_floating_point() or name.rpartition(".")[2] in RECORDS:
            return False
        if re.search(ADDS, name.lower()):
            return True
        if not rest:
            joins = any(word in first for word in JOINS)
            return first in INPUTS or (joins and not any(word in first for word in MASKS))
        if first in {head.partition(".")[0] for head in self.head} | {"head", "fc", "classifier"}:
            return False
        return hasattr(self.module, first)


def norm_alone(missing: list[str]) -> bool:
    """Whether nothing but the last norm of a network is missing."""
    return all(re.fullmatch(LAST_NORM, name) for name in missing)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds weights in numbers that can be taken as they are."""
    return tensor.dtype in NUMBERS and tensor.layout == torch.strided


def reference(make: Callable[..., nn.Module]) -> Reference:
    """The reference of a network.

    Args:
        make: makes the network from ``num_classes`` and ``pretrained``.
    """
    with torch.device("meta"), _nothing_loaded() as asked:
        module = make(num_classes=CLASSES, pretrained=True)
        headless = _shapes(make(num_classes=0, pretrained=False))
    every = _shapes(module)
    head = {name: shape for name, shape in every.items() if headless.get(name) != shape}
    state = module.state_dict()
    trunk = {n: s for n, s in every.items() if n not in head and state[n].is_floating_point()}
    return Reference(
        module, trunk, head, asked.get("filter_fn"), asked.get("strict", True), frozenset(every)
    )


def plain_reference(module: nn.Module) -> Reference:
    """The reference of a network that needs all of its tensors from a file as they are."""
    state = module.state_dict()
    trunk = {n: tuple(t.shape) for n, t in state.items() if t.is_floating_point()}
    return Reference(module, trunk, {}, names=frozenset(state))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@contextmanager
def _nothing_loaded() -> Iterator[dict[str, Any]]:
    """Within it timm's networks come without weights; what it would load them with is kept.

    timm hands its conversion of a family's files to its loader alone.
    """
    from timm.models import _builder

    loader = _builder.load_pretrained
    asked: dict[str, Any] = {}

    def note(model: nn.Module, **options: Any) -> None:
        asked.update(options)

    _builder.load_pretrained = note  # type: ignore[assignment]
    try:
        yield asked
    finally:
        _builder.load_pretrained = loader
