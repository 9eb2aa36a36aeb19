"""What receptive fields cost: the fields of all blocks against the backward passes that they need.

    python analyses/benchmark_receptive_field.py
    python analyses/benchmark_receptive_field.py --device cuda --batch-size 8

Prints a Markdown table. ``needed s`` is a batch's bare work: one forward pass, and from the centre
of every block one backward pass to the input for each channel, written without hooks of vitprobe
and with nothing done to the gradients. ``x needed`` is the median, over repeats, of the
measurement's batch divided by that of the bare work just before and just after it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

from vitprobe import receptive_field
from vitprobe.core.running import Batch, Session

MODELS = ("vit_tiny_patch16_224", "resnet18")


def seconds(work: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def needed(model: nn.Module, blocks: list[str], images: Tensor, channels: int) -> None:
    """The forward pass and the backward passes of every block."""
    images = images.detach().requires_grad_()
    centres: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        middle = [size // 2 for size in output.shape]
        centres.append(
            output[:, :, middle[2], middle[3]] if output.ndim == 4 else output[:, middle[1]]
        )

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in blocks]
    model(images)
    for handle in handles:
        handle.remove()
    for centre in centres:
        for channel in range(channels):
            torch.autograd.grad(centre[:, channel].sum(), images, retain_graph=True)


def row(name: str, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    options = {"zero_init_last": False} if name.startswith("resnet") else {}
    model = timm.create_model(name, **options).eval().requires_grad_(False).to(args.device)
    images = torch.randn(args.batch_size, 3, args.size, args.size)
    found: dict[str, list[float]] = {"needed": [], "ratio": [], "batch": []}

    def instead(session: Session, step: Callable[[Batch], None], sums: Any, **facts: Any) -> None:
        # In place of the batch loop: the very step that it would call, timed.
        batch = next(session._load([0]))[0]
        blocks = facts["decides"]["layers"]

        def bare() -> None:
            needed(model, blocks, batch.inputs[0], args.channels)

        step(batch)
        before = seconds(bare, args.device)
        for _ in range(args.repeats):
            taken = seconds(lambda: step(batch), args.device)
            after = seconds(bare, args.device)
            found["batch"].append(taken)
            found["needed"].append(after)
            found["ratio"].append(taken / ((before + after) / 2))
            before = after

    with patch.object(Session, "run", instead):
        result = receptive_field.measure(
            model, images, channels=args.channels, batch_size=args.batch_size, device=args.device
        )
    bare, batch, ratio = (statistics.median(found[key]) for key in ("needed", "batch", "ratio"))
    return f"| {name} | {len(result.layers)} | {bare:.2f} | {batch:.2f} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print("| model | layers | needed s | batch s | x needed |\n|---|---|---|---|---|")
    for name in args.models:
        print(row(name, args), flush=True)


if __name__ == "__main__":
    main()
