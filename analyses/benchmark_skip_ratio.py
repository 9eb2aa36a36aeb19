"""What skip ratios cost: the time of a batch against that of the bare forward pass.

    python analyses/benchmark_skip_ratio.py
    python analyses/benchmark_skip_ratio.py --device cuda

Prints a Markdown table. Untrained timm models see the same random batch again and again. ``x
forward`` is the median, over repeats, of a batch's time divided by that of the bare forward passes
just before and just after it, in evaluation and inference mode.
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

from vitprobe import skip_ratio
from vitprobe.core.running import Batch, Session

MODELS = (
    "vit_small_patch16_224",
    "resnet50",
    "swin_tiny_patch4_window7_224",
    "tf_efficientnet_lite0",
)


def seconds(work: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def row(name: str, args: argparse.Namespace) -> str:
    torch.manual_seed(0)
    # Branches that start at 0 are the cheap case: nothing of theirs is measured.
    options = {"zero_init_last": False} if name.startswith("resnet") else {}
    model = timm.create_model(name, **options).eval().to(args.device)
    images = torch.randn(args.batch_size, 3, 224, 224)
    found: dict[str, list[float]] = {"bare": [], "ratio": [], "batch": []}

    def instead(session: Session, step: Callable[[Batch], None], sums: Any, **_: Any) -> None:
        # In place of the batch loop: the very step that it would call, timed.
        batch = next(session._load([0]))[0]
        with torch.inference_mode():
            model(batch.inputs[0]), step(batch)
            before = seconds(lambda: model(batch.inputs[0]), args.device)
            for _ in range(args.repeats):
                taken = seconds(lambda: step(batch), args.device)
                after = seconds(lambda: model(batch.inputs[0]), args.device)
                found["batch"].append(taken)
                found["bare"].append(after)
                found["ratio"].append(taken / ((before + after) / 2))
                before = after

    with patch.object(Session, "run", instead):
        result = skip_ratio.measure(model, images, batch_size=args.batch_size, device=args.device)
    bare, batch, ratio = (statistics.median(found[key]) for key in ("bare", "batch", "ratio"))
    return f"| {name} | {len(result.layers)} | {bare:.3f} | {batch:.3f} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print("| model, 224 px | additions | forward s | batch s | x forward |\n|---|---|---|---|---|")
    for name in args.models:
        print(row(name, args), flush=True)


if __name__ == "__main__":
    main()
