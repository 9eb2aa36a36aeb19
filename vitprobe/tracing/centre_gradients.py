"""Gradients of what stands at the centre of layers, with respect to the model's input.

One forward pass gives the centres of all layers on one graph; each cotangent of each layer is then
one vector-Jacobian product through the part of the graph below it. A cotangent may name another
channel for every image of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Layer
from vitprobe.tracing.places import Places
from vitprobe.tracing.trace import AdditionHooks

NO_GRAD = "it runs under torch.no_grad()"
INFERENCE = "it runs under torch.inference_mode()"
DETACHED = "something before it is detached from the image (detach(), no_grad(), numpy, integers)"


@dataclass(frozen=True)
class Site:
    """A layer with its grid; or, for a residual addition, what its branch adds."""

    label: str
    layer: Layer
    places: Places
    branch: bool = False

    @property
    def centre(self) -> tuple[int, int]:
        """Row and column of the place in the middle: index size // 2."""
        return self.places.rows // 2, self.places.columns // 2

    @property
    def channels(self) -> int:
        return self.places.features

    def at_centre(self, tensor: Tensor) -> Tensor:
        """(n, channels) of the layer's tensor with its images first."""
        return self.places.at(tensor, *self.centre)


def sites_of(layers: Sequence[Layer], grids: Sequence[Places | str], branches: bool) -> list[Site]:
    """The layers that have a centre; with ``branches``, what goes into each sum before it."""
    sites = []
    for layer, places in zip(layers, grids):
        if isinstance(places, Places):
            if branches:
                label = layer.label.replace(" sum", " branch")
                sites.append(Site(label, layer, places, branch=True))
            sites.append(Site(layer.label, layer, places))
    return sites


@contextmanager
def frozen(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it no parameter asks for a gradient: only the input's is computed."""
    asking = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


class _NotRecomputed:
    """In place of ``CheckpointFunction``: runs what it is given, once and with its graph."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def _kept_graphs() -> Iterator[None]:
    """Within it, blocks that are computed again for their gradients keep their graph instead.

    In its older form (``use_reentrant``) activation checkpointing runs blocks without a graph, so
    that nothing within them has a gradient.
    """
    module: Any = torch.utils.checkpoint
    before = module.CheckpointFunction
    module.CheckpointFunction = _NotRecomputed
    try:
        yield
    finally:
        module.CheckpointFunction = before


class _FixedStatistics(torch.autograd.Function):
    """``batch_norm`` with running statistics; its gradient is a product with a constant.

    The backward pass of the operation itself is made for statistics of the batch and several times
    slower.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        return functional.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, var, weight, _, eps = inputs
        scale = (var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        ctx.save_for_backward(scale.to(x.dtype).view(-1, *[1] * (x.ndim - 2)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (scale,) = ctx.saved_tensors
        return gradients[0] * scale, None, None, None, None, None


class FastNorms(TorchFunctionMode):
    """Within it, norms with running statistics that ask for no gradient have a fast backward."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.batch_norm:
            asked = _BATCH_NORM.bind(*args, **kwargs)
            asked.apply_defaults()
            given = asked.arguments
            x, *rest = (given[name] for name in _OPERANDS)
            fixed = not given["training"] and all(one is None or _constant(one) for one in rest)
            if fixed and rest[0] is not None and rest[1] is not None and x.ndim > 1:
                return _FixedStatistics.apply(x, *rest, given["eps"])
        return function(*args, **kwargs)


_BATCH_NORM = signature(functional.batch_norm)
_OPERANDS = ("input", "running_mean", "running_var", "weight", "bias")


def _constant(tensor: Tensor) -> bool:
    return not tensor.requires_grad


@dataclass(frozen=True)
class Centre:
    """What stands at the centre of a site in a pass.

    Attributes:
        value: (n, channels), attached to the graph of the pass if it has one.
        cut: why it is not attached, in words that follow the layer's name; None where it is.
    """

    value: Tensor
    cut: str | None


def centres(
    module: nn.Module, sites: Sequence[Site], inputs: Tensor, context: Callable[[], Any]
) -> list[Centre]:
    """The centre of every site in a pass of ``inputs``, which requires a gradient.

    Args:
        module: the model.
        sites: where to look.
        inputs: (n, C, H, W), a leaf.
        context: makes a context around the pass.
    """
    found: list[Centre] = [Centre(torch.empty(0), None)] * len(sites)

    def take(i: int, tensor: Tensor) -> None:
        # A copy of the little that is needed: later in-place operations rewrite the tensor.
        value = sites[i].at_centre(tensor).clone()
        cut = None
        if not value.requires_grad:
            if torch.is_inference_mode_enabled():
                cut = INFERENCE
            else:
                cut = DETACHED if torch.is_grad_enabled() else NO_GRAD
        found[i] = Centre(value, cut)

    def take_branch(i: int, skip: Tensor, branch: Tensor) -> None:
        take(i, sites[i].layer.by_image(branch))

    whole = [i for i, site in enumerate(sites) if not site.branch]
    before: Any = {
        site.layer.addition: partial(take_branch, i) for i, site in enumerate(sites) if site.branch
    }
    with ExitStack() as stack:
        if before:
            stack.enter_context(AdditionHooks(module, before=before))
        layers = [sites[i].layer for i in whole]
        stack.enter_context(capture(module, layers, lambda j, tensor: take(whole[j], tensor)))
        stack.enter_context(_kept_graphs())
        stack.enter_context(FastNorms())
        stack.enter_context(context())
        # A copy, since a leaf must not be changed in place, as some models change their input.
        module(inputs.clone())
    return [centre if centre.cut else _reaching(centre, inputs) for centre in found]


def _reaching(centre: Centre, inputs: Tensor) -> Centre:
    """The centre, cut where its graph does not lead back to the inputs."""
    todo, seen = [centre.value.grad_fn], set()
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", None) is inputs:
            return centre
        todo += [following for following, _ in node.next_functions]
    return Centre(centre.value, DETACHED)


def rows_of_jacobian(
    centre: Tensor, inputs: Tensor, cotangents: Tensor, together: int = 1
) -> Iterator[Tensor]:
    """∂(cotangent · centre) / ∂input for each cotangent, (n, C, H, W); keeps the graph.

    Args:
        centre: (n, channels).
        inputs: (n, C, H, W) that the centre depends on, image by image.
        cotangents: (k, channels), the same for every image, or (k, n, channels).
        together: how many to send through the graph side by side.
    """
    if not centre.requires_grad:
        yield from (torch.zeros_like(inputs) for _ in cotangents)
        return
    for chunk in cotangents.to(centre).split(together):
        seeds = chunk if chunk.ndim == 3 else chunk[:, None].expand(-1, *centre.shape)
        batched = len(chunk) > 1
        (rows,) = torch.autograd.grad(
            centre, inputs, seeds if batched else seeds[0],
            retain_graph=True, is_grads_batched=batched, materialize_grads=True,
        )  # fmt: skip
        yield from rows if batched else (rows,)
