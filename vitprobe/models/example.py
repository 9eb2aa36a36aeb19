"""An image of a size that a model takes, where only the model is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import NotApplicable
from vitprobe.models.model import Model
from vitprobe.models.precision import input_type

# How modules and their configurations call the side of their images.
_SAID = ("img_size", "image_size", "input_size", "input_resolution")
_SIDES = (
    224, 256, 384, 32, 64, 96, 128, 160, 192, 240, 288, 320, 336, 448, 512, 28, 48, 56, 16, 8,
)  # fmt: skip


@contextmanager
def at_an_example(model: Model) -> Iterator[Tensor]:
    """Within it, the model is in evaluation mode; gives (1, C, H, W) of noise that it runs on.

    Its input size where that is known; otherwise the first size that it runs at, of those that its
    modules name and the usual ones.

    Raises:
        NotApplicable: it runs at none of them.
    """
    modes = [(part, part.training) for part in model.module.modules()]
    try:
        model.module.eval()
        yield _image(model)
    finally:
        for part, training in modes:
            part.training = training


def _image(model: Model) -> Tensor:
    reason = ""
    known = [tuple(model.input_size)] if model.input_size else _sizes(model.module)
    for size in known:
        image = _noise(model.module, size)
        try:
            with torch.no_grad():
                model.module(image)
        except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
            reason = reason or next(iter(str(error).strip().splitlines()), type(error).__name__)
        else:
            return image
    if model.input_size:
        asked = " × ".join(map(str, model.input_size))
        raise NotApplicable(f"{model.name} cannot run on images of {asked}: {reason}", model.name)
    raise NotApplicable(
        f"{model.name} does not say what images it takes, and runs at none of the usual sizes "
        f"({reason}). Give it: vitprobe.wrap(module, input_size=(channels, height, width)).",
        model.name,
    )


def _noise(module: nn.Module, size: tuple[int, ...]) -> Tensor:
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *size, generator=generator).to(like.device)
    return image.to(input_type(module, image))


def _sizes(module: nn.Module) -> Iterator[tuple[int, int, int]]:
    channels = dict.fromkeys(
        part.in_channels for part in module.modules() if isinstance(part, nn.Conv2d)
    )
    first = [*list(channels)[:1], 3]
    sides = dict.fromkeys([*_said(module), *((side, side) for side in _SIDES)])
    for side in sides:
        for count in dict.fromkeys(first):
            yield (count, *side)


def _said(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Heights and widths that the modules and their configurations name, from the root on."""
    for part in module.modules():
        config = getattr(part, "config", None)
        for holder in (part, config, getattr(config, "vision_config", None)):
            for name in _SAID:
                side: Any = getattr(holder, name, None)
                sides = [side, side] if isinstance(side, int) else side
                if isinstance(sides, (tuple, list)) and len(sides) >= 2:
                    height, width = sides[-2:]
                    if all(isinstance(one, int) and one > 0 for one in (height, width)):
                        yield height, width
