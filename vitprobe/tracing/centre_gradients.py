"""Gradients of what stands at the centre of layers, with respect to the model's input.

One forward pass gives the centres of all layers on one graph; each channel of each layer is then
one vector-Jacobian product through the part of the graph below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Layer
from vitprobe.tracing.places import Places
from vitprobe.tracing.trace import AdditionHooks


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


def centres(module: nn.Module, sites: Sequence[Site], forward: Callable[[], Any]) -> list[Tensor]:
    """(n, channels) of every site, attached to the graph that ``forward`` builds."""
    found: list[Tensor] = [torch.empty(0)] * len(sites)

    def take(i: int, tensor: Tensor) -> None:
        # A copy of the little that is needed: later in-place operations rewrite the tensor.
        found[i] = sites[i].at_centre(tensor).clone()

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
        forward()
    return found


def rows_of_jacobian(
    centre: Tensor, inputs: Tensor, cotangents: Tensor, together: int = 1
) -> Iterator[Tensor]:
    """∂(cotangent · centre) / ∂input for each cotangent, (n, C, H, W); keeps the graph.

    Args:
        centre: (n, channels).
        inputs: (n, C, H, W) that the centre depends on, image by image.
        cotangents: (k, channels), the same for every image.
        together: how many to send through the graph side by side.
    """
    if not centre.requires_grad:
        yield from (torch.zeros_like(inputs) for _ in cotangents)
        return
    for chunk in cotangents.to(centre).split(together):
        seeds = chunk[:, None].expand(-1, *centre.shape)
        batched = len(chunk) > 1
        (rows,) = torch.autograd.grad(
            centre, inputs, seeds if batched else seeds[0],
            retain_graph=True, is_grads_batched=batched, materialize_grads=True,
        )  # fmt: skip
        yield from rows if batched else (rows,)
