"""Captured activations against timm's own: ``forward_intermediates`` of a model of every module.

    python analyses/against_timm.py
    python analyses/against_timm.py --modules resnet swin_transformer

Each module's smallest model with random weights, at the smallest side that it runs at. Every map
that timm gives must be one of the tensors that ``vitprobe.capture`` takes in the same pass, value
for value: as it is, or on its grid of places. Prints a line a model, and which maps are none of
them.
"""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

import timm
import torch
from coverage import smallest, smallest_side
from torch import Tensor, nn

import vitprobe
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import load_model


def intermediates(net: nn.Module, images: Tensor) -> list[Tensor]:
    """The maps that timm gives, (n, C, H, W) where they are maps."""
    found: Any = net.forward_intermediates(images, intermediates_only=True)
    return [one for one in found if isinstance(one, Tensor)]


def unlike(model: Any, images: Tensor) -> tuple[list[Tensor], dict[int, str], list[int]]:
    """timm's maps; which layer each of them is, and which are none."""
    net = model.module
    with torch.no_grad():
        theirs = intermediates(net, images)
        sizes = {one[0].numel() for one in theirs}

        def keep(_: str, tensor: Tensor) -> Tensor | None:
            # Class tokens and registers, which timm leaves out, may stand beside the places.
            near = min(sizes) <= tensor[0].numel() <= 3 * max(sizes)
            return tensor.clone() if near else None

        with vitprobe.capture(
            model, ["all", "paper", "blocks"], example=images, reduce=keep
        ) as seen:
            net(images)
        found = {}
        for name, tensor in seen.items():
            if tensor is None:
                continue
            for i, one in enumerate(theirs):
                if i not in found and any(
                    torch.equal(form, one) for form in forms(seen, name, tensor, one)
                ):
                    found[i] = name
    return theirs, found, [i for i in range(len(theirs)) if i not in found]


def forms(seen: Any, name: str, tensor: Tensor, like: Tensor) -> list[Tensor]:
    """A layer as it is, with its channels first, and on its grid, where that is of a shape."""
    found = [tensor]
    if tensor.ndim == 4:
        found.append(tensor.permute(0, 3, 1, 2))
    if tensor.shape != like.shape:
        with suppress(VitprobeError):  # no grid
            found.append(seen.grid(name).permute(0, 3, 1, 2))
    return [form for form in found if form.shape == like.shape]


def line(module: str) -> str:
    """What to say of a module's model."""
    name, _ = smallest(module)
    if not hasattr(timm.create_model(name), "forward_intermediates"):
        return f"{module} {name}: timm gives no intermediates"
    side = smallest_side(name)
    model = load_model(f"{name}@random", side)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    theirs, found, none = unlike(model, images)
    told = f"{module} {name} {side} px: {len(found)} of {len(theirs)} maps"
    shapes = "; ".join(f"{i}: {tuple(theirs[i].shape[1:])}" for i in none)
    return f"{told}, none of {shapes}" if none else told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", default=timm.list_modules())
    args = parser.parse_args()
    torch.set_num_threads(1)
    for module in args.modules:
        try:
            print(line(module), flush=True)
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            print(f"{module}: {type(error).__name__}: {first}", flush=True)


if __name__ == "__main__":
    main()
