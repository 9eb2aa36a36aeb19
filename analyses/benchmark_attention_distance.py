"""What attention distance costs: time and memory against the bare, fused forward pass.

    python analyses/benchmark_attention_distance.py             # ViT-S/16, 224 px, batches of 32
    python analyses/benchmark_attention_distance.py --model vit_small_patch14_dinov2 --size 518 \
        --batch-size 4

Untrained weights and random images: neither decoding nor downloading counts. ``x forward`` is the
median, over repeats, of one measured batch's time divided by the mean of the bare passes just
before and just after it. Memory is the peak of a process of its own, above that of one that only
imports, for the bare pass and for the measurement.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import timm
import torch

from vitprobe import attention_distance
from vitprobe.core.running import Batch, Session

MIB = 2**20


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(model: torch.nn.Module, images: torch.Tensor, repeats: int) -> tuple[float, float]:
    """(median seconds of a bare pass, median ratio of a measured batch to it)."""
    alone: list[float] = []
    ratios: list[float] = []

    def instead(ready: Session, step: Callable[[Batch], None], sums: Any, **_: Any) -> None:
        # In place of the batch loop: the very step that it would call, timed.
        batch = next(ready._load([0]))[0]
        with torch.inference_mode():
            step(batch)
            alone.append(seconds(lambda: model(images)))
            for _repeat in range(repeats):
                measured = seconds(lambda: step(batch))
                alone.append(seconds(lambda: model(images)))
                ratios.append(2 * measured / (alone[-1] + alone[-2]))

    with patch.object(Session, "run", instead):
        attention_distance.measure(model, images, batch_size=len(images), device="cpu")
    return statistics.median(alone), statistics.median(ratios)


def peak(args: argparse.Namespace, what: str) -> float:
    """Peak memory in MiB of a process that does one thing."""
    command = [sys.executable, __file__, "--model", args.model, "--size", str(args.size),
               "--batch-size", str(args.batch_size), "--child", what]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--child", choices=["nothing", "forward", "distance"])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, img_size=args.size).eval()
    images = torch.randn(args.batch_size, 3, args.size, args.size)
    if args.child:
        if args.child == "forward":
            with torch.inference_mode():
                model(images)
        elif args.child == "distance":
            attention_distance.measure(model, images, batch_size=len(images), device="cpu")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB)
        return
    bare, ratio = compare(model, images, args.repeats)
    nothing, forward, distance = (peak(args, what) for what in ("nothing", "forward", "distance"))
    print(
        f"{args.model}, {args.size} px, batch {args.batch_size}, {torch.get_num_threads()} threads"
    )
    print(f"forward {bare:.2f} s, with attention distance x {ratio:.2f}")
    print(
        f"memory above start: forward {forward - nothing:.0f} MiB, with attention distance "
        f"{distance - nothing:.0f} MiB (x {(distance - nothing) / (forward - nothing):.2f})"
    )


if __name__ == "__main__":
    main()
