"""What receptive fields cost: the fields of all blocks against the backward passes that they need.

    python analyses/benchmark_receptive_field.py
    python analyses/benchmark_receptive_field.py --device cuda --batch-size 8

``needed s`` is a batch's bare work: one forward pass, and from the centre of every block one
backward pass to the input for each channel, written without hooks of vitprobe and with nothing done
to the gradients.
"""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from benchmarking import Cost, compare, instead_of_the_loop, machine, publish, table
from torch import Tensor, nn

from vitprobe import receptive_field

MODELS = ("vit_tiny_patch16_224", "resnet18")
HEADER = ("model", "layers", "needed s", "batch s", "x needed")


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


def row(name: str, args: argparse.Namespace) -> tuple[str, ...]:
    torch.manual_seed(0)
    options = {"zero_init_last": False} if name.startswith("resnet") else {}
    model = timm.create_model(name, **options).eval().requires_grad_(False).to(args.device)
    images = torch.randn(args.batch_size, 3, args.size, args.size)
    costs: list[Cost] = []
    with instead_of_the_loop(
        lambda batch, step, facts: costs.append(
            compare(
                lambda: needed(model, facts["layers"], batch.inputs[0], args.channels),
                lambda: step(batch), args.repeats, args.device,
            )
        )
    ):  # fmt: skip
        result = receptive_field.measure(
            model, images, channels=args.channels, batch_size=args.batch_size, device=args.device
        )
    cost = costs[0]
    numbers = (f"{cost.bare_s:.2f}", f"{cost.work_s:.2f}", f"{cost.ratio:.2f}")
    return (name, str(len(result.layers)), *numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--readme", action="store_true", help="also write the table there")
    args = parser.parse_args()
    rows = [row(name, args) for name in args.models]
    text = f"{machine(args.device)}; {args.size} px, batches of {args.batch_size}, "
    text += f"{args.channels} channels a layer, medians of {args.repeats}.\n\n"
    publish("benchmark_receptive_field", text + table(HEADER, rows), args.readme)


if __name__ == "__main__":
    main()
