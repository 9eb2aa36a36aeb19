"""What attention distance costs: time and memory against the bare, fused forward pass.

    python analyses/benchmark_attention_distance.py             # ViT-S/16, 224 px, batches of 32
    python analyses/benchmark_attention_distance.py --model vit_small_patch14_dinov2 --size 518 \
        --batch-size 4

Untrained weights and random images: neither decoding nor downloading counts. Memory is the peak of
a process of its own, the median of five such, above that of one that only makes the model.
"""

from __future__ import annotations

import argparse
import json
from statistics import median

import timm
import torch
from benchmarking import (
    Cost,
    compare,
    in_child,
    instead_of_the_loop,
    machine,
    peak_gib,
    publish,
    table,
)

from vitprobe import attention_distance

# Peaks of memory differ by a tenth from process to process.
CHILDREN = 5
HEADER = ("model", "forward s", "batch s", "x forward", "forward MiB", "batch MiB", "x memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--readme", action="store_true", help="also write the table there")
    parser.add_argument("--child", choices=["nothing", "forward", "distance"])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, img_size=args.size).eval()
    images = torch.randn(args.batch_size, 3, args.size, args.size)

    def measure() -> None:
        attention_distance.measure(model, images, batch_size=len(images), device="cpu")

    if args.child:
        if args.child == "forward":
            with torch.inference_mode():
                model(images)
        elif args.child == "distance":
            measure()
        print(json.dumps(peak_gib() * 1024))
        return
    costs: list[Cost] = []
    with instead_of_the_loop(
        lambda batch, step, _: costs.append(
            compare(lambda: model(images), lambda: step(batch), args.repeats)
        )
    ):
        measure()
    given = ("--model", args.model, "--size", str(args.size), "--batch-size", str(len(images)))
    start, forward, distance = (
        median(in_child(__file__, *given, "--child", what) for _ in range(CHILDREN))
        for what in ("nothing", "forward", "distance")
    )
    cost, more = costs[0], (distance - start) / (forward - start)
    row = (f"{args.model}, {args.size} px, batches of {len(images)}", f"{cost.bare_s:.2f}",
           f"{cost.work_s:.2f}", f"{cost.ratio:.2f}", f"{forward - start:.0f}",
           f"{distance - start:.0f}", f"{more:.2f}")  # fmt: skip
    text = f"{machine()}; medians of {args.repeats}.\n\n{table(HEADER, [row])}"
    publish("benchmark_attention_distance", text, args.readme)


if __name__ == "__main__":
    main()
