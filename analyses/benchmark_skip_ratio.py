"""What skip ratios cost: the time of a batch against that of the bare forward pass.

    python analyses/benchmark_skip_ratio.py
    python analyses/benchmark_skip_ratio.py --device cuda

Untrained timm models see the same random batch again and again, in evaluation and inference mode.
"""

from __future__ import annotations

import argparse

import timm
import torch
from benchmarking import Cost, compare, instead_of_the_loop, machine, publish, table

from vitprobe import skip_ratio

MODELS = (
    "vit_small_patch16_224",
    "resnet50",
    "swin_tiny_patch4_window7_224",
    "tf_efficientnet_lite0",
)
HEADER = ("model, 224 px", "additions", "forward s", "batch s", "x forward")


def row(name: str, args: argparse.Namespace) -> tuple[str, ...]:
    torch.manual_seed(0)
    # Branches that start at 0 are the cheap case: nothing of theirs is measured.
    options = {"zero_init_last": False} if name.startswith("resnet") else {}
    model = timm.create_model(name, **options).eval().to(args.device)
    images = torch.randn(args.batch_size, 3, 224, 224)
    costs: list[Cost] = []
    with instead_of_the_loop(
        lambda batch, step, _: costs.append(
            compare(lambda: model(batch.inputs[0]), lambda: step(batch), args.repeats, args.device)
        )
    ):
        result = skip_ratio.measure(model, images, batch_size=args.batch_size, device=args.device)
    cost = costs[0]
    numbers = (f"{cost.bare_s:.3f}", f"{cost.work_s:.3f}", f"{cost.ratio:.2f}")
    return (name, str(len(result.layers)), *numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--readme", action="store_true", help="also write the table there")
    args = parser.parse_args()
    rows = [row(name, args) for name in args.models]
    text = f"{machine(args.device)}; batches of {args.batch_size}, medians of {args.repeats}.\n\n"
    publish("benchmark_skip_ratio", text + table(HEADER, rows), args.readme)


if __name__ == "__main__":
    main()
