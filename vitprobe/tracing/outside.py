"""Tensors that come from outside of what can be watched: NumPy, scripted functions, compiled ones.

No operation that was seen has made such a tensor. It may be a constant that a module keeps, or be
made of the images. In a pass of two images the second kind has a row for each, and they differ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitprobe.tracing.observing import unobserved


class Origins:
    """Which tensors of a pass were made before one's eyes."""

    def __init__(self, module: nn.Module) -> None:
        self.images = 0
        # Kept alive, so that no id is used twice.
        self.known: dict[int, Tensor] = {id(one): one for one in module.parameters()}
        self.known |= {id(one): one for one in module.buffers()}

    def begin(self, images: Tensor) -> None:
        """The pass is of these."""
        self.images = len(images) if images.ndim else 0
        self.know(images)

    def know(self, tensor: Tensor) -> None:
        self.known[id(tensor)] = tensor

    def is_outside(self, tensor: Tensor) -> bool:
        """Whether a tensor has come from outside and is made of the images; asked once of each."""
        if id(tensor) in self.known:
            return False
        self.know(tensor)
        if self.images < 2 or not tensor.ndim or len(tensor) != self.images:
            return False
        with unobserved(), torch.no_grad():
            return tensor.is_floating_point() and not torch.equal(tensor[0], tensor[1])
