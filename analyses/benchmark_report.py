"""What measurements cost in one pass: each alone and all together, against bare forward passes.

    python analyses/benchmark_report.py                    # ViT-S/16 x ResNet-50, 224 px
    python analyses/benchmark_report.py --only cka skip_ratio

Untrained weights and random images. Each batch of measurements stands between two bare passes of
the same models in the same layout; what is done once for a run (looking at an example, fitting
probes) is left out and printed beside it. Memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import timm
import torch
from benchmarking import Cost, compare, in_child, machine, peak_gib, publish, seconds, table

from vitprobe.catalogue import measurements
from vitprobe.running import passes
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_each
from vitprobe.running.session import Session
from vitprobe.together import measurement_class

MODELS = ("vit_small_patch16_224", "resnet50")
FIVE = ("cka", "attention_distance", "head_subsets", "skip_ratio", "localization")
# They need labels, other passes, or no images at all; each has a benchmark of its own.
APART = ("linear_probe", "receptive_field", "position_embedding", "patch_embedding", "occlusion")
HEADER = ("measurements", "forward s", "batch s", "x forward", "start-up s")


def cost(names: Sequence[str], args: argparse.Namespace) -> tuple[Cost, float]:
    """A batch of measurements against its bare passes, and seconds before the first batch."""
    found: list[Cost] = []

    def run(ready: Session, step: Any, sums: Any, **rest: Any) -> None:
        batch = next(ready.load([0]))[0]

        def bare() -> None:
            for m in range(len(ready.models)):
                ready.forward(m, batch)

        def measured() -> None:
            batch._grams.clear()
            step(batch)

        with torch.inference_mode():
            found.append(compare(bare, measured, args.repeats))

    models = [timm.create_model(name).eval() for name in args.models]
    images = torch.randn(args.batch_size, 3, args.size, args.size)
    asked = {name: measurement_class(name)() for name in names}
    options = Options(batch_size=args.batch_size, device="cpu")
    with patch.object(passes, "run", run):
        whole = seconds(lambda: measure_each(asked, models, images, options))
    # The loop ran each twice in every repeat, and once to warm up.
    loop = (2 * args.repeats + 3) * found[0].bare_s + (args.repeats + 1) * (
        found[0].work_s - found[0].bare_s
    )
    return found[0], max(0.0, whole - loop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm's names")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these together, and no other")
    parser.add_argument("--readme", action="store_true", help="also write the table there")
    parser.add_argument("--child", nargs="*")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.child is not None:
        models = [timm.create_model(name).eval() for name in args.models]
        images = torch.randn(args.batch_size, 3, args.size, args.size)
        if args.child:
            asked = {name: measurement_class(name)() for name in args.child}
            measure_each(asked, models, images, Options(batch_size=args.batch_size, device="cpu"))
        else:
            with torch.inference_mode():
                for model in models:
                    model(images)
        print(json.dumps(peak_gib()))
        return
    everything = [name for name in measurements() if name not in APART]
    sets = {"together": args.only} if args.only else {name: [name] for name in everything}
    if not args.only:
        sets |= {"Raghu's five together": list(FIVE), "all of these together": everything}
    rows = []
    for label, names in sets.items():
        found, before = cost(names, args)
        numbers = (found.bare_s, found.work_s, found.ratio, before)
        rows.append((label, *(f"{number:.2f}" for number in numbers)))
        print(*rows[-1], flush=True)
    together = args.only or everything
    sizes = ["--models", *args.models, "--size", str(args.size), "--batch-size",
             str(args.batch_size), "--child"]  # fmt: skip
    bare, whole = (in_child(__file__, *sizes, *names) for names in ([], together))
    text = (
        f"{machine()}; batches of {args.batch_size}, {args.size} px, "
        f"{' x '.join(args.models)}, medians of {args.repeats}. Peak memory {bare:.2f} GiB for the "
        f"passes, {whole:.2f} GiB with all of these.\n\n{table(HEADER, rows)}"
    )
    publish("benchmark_report", text, args.readme)


if __name__ == "__main__":
    main()
