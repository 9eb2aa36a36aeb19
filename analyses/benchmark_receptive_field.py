"""What receptive fields cost and how exact they are, beside the design with 1,024 passes a layer.

    python analyses/benchmark_receptive_field.py
    python analyses/benchmark_receptive_field.py --models vit_b16 resnet50 --images IMAGENET

Cost: the fields of all blocks, preparation and standard errors included, against bare forward
passes of 128 images. ``--cpu-time`` counts the process's own seconds, for a machine with others on
it (one thread). Errors: of some blocks the influence of every image and channel of a crossed sample
on the areas is split into what images, channels, and both together vary; from these three follow
the standard errors of any design, here of 32 images × the same 32 channels, as once, and of 64
images with a channel of its own each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from benchmarking import machine, publish, table
from torch import Tensor

from vitprobe.receptive_field import BATCH_SIZE, NUM_IMAGES, ReceptiveField
from vitprobe.running.measurement import Watch
from vitprobe.running.options import Options
from vitprobe.running.session import Session, session
from vitprobe.statistics.fields import SHARES, area
from vitprobe.tracing.centre_gradients import centres, frozen, rows_of_jacobian

BARE_IMAGES = 128
CROSSED = 32  # images, and channels, of the design that it is compared with
COSTS = ("model", "blocks", "bare s", "fields s", "x bare")
ERRORS = ("model", "block", "area50", "as once", "now", "area90", "as once", "now")


class Clock:
    """Seconds of wall time, or of this process."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._now = time.process_time if args.cpu_time else time.perf_counter
        self._device = args.device

    def __call__(self, work: Callable[[], Any]) -> tuple[float, Any]:
        began = self._now()
        result = work()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return self._now() - began, result


def cost(ready: Session, clock: Clock, repeats: int) -> tuple[list[float], Watch]:
    """Seconds of bare passes of 128 images and of the fields, and the watch."""
    prepared, watch = clock(lambda: ReceptiveField().prepare(ready))
    batches = [batch for batch, _ in ready.load(list(range(min(3, len(ready.batches)))))]
    batch = batches[0]

    def bare() -> None:
        with torch.inference_mode():
            ready.forward(0, batch)

    bare()
    alone, steps = [], []
    for i in range(repeats):
        alone.append(clock(bare)[0])
        steps.append(clock(lambda i=i: watch.end(batches[i % len(batches)]))[0])
    alone.append(clock(bare)[0])
    finished, _ = clock(lambda: watch.result(ready.meta("receptive_field")))
    each = median(steps) * NUM_IMAGES / len(batch)
    return [BARE_IMAGES / len(batch) * median(alone), prepared + each + finished], watch


def crossed(ready: Session, watch: Any, args: argparse.Namespace) -> list[tuple[str, int, Tensor]]:
    """Label, channels, and (images, channels, pixels) |gradients| of some blocks."""
    plan, module = watch.plans[0], ready.models[0].module
    at = np.linspace(0, len(plan.sites) - 1, args.error_blocks + 1).round().astype(int)[1:]
    sites = [plan.sites[i] for i in at]
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randperm(s.channels, generator=generator)[: args.error_channels] for s in sites]
    parts: list[list[Tensor]] = [[] for _ in sites]
    with frozen([module]):
        for batch, _ in ready.load(list(range(-(-args.error_images // BATCH_SIZE)))):
            inputs = batch.inputs[0].detach().requires_grad_()
            found = centres(module, sites, inputs, ready.autocast)
            for part, site, channels, centre in zip(parts, sites, drawn, found):
                rows = rows_of_jacobian(centre.value, inputs, torch.eye(site.channels)[channels])
                part.append(torch.stack([row.abs().mean(1).flatten(1).cpu() for row in rows], 1))
    return [(site.label, site.channels, torch.cat(part)) for site, part in zip(sites, parts)]


def errors(maps: Tensor, channels: int, share: float) -> tuple[float, float, float]:
    """An area, and its standard errors in the crossed design and with a channel for each image."""
    images, drawn, pixels = maps.shape
    field = maps.double().mean((0, 1))
    values, order = field.sort(descending=True)
    count = int((values.cumsum(0) < share * values.sum()).sum()) + 1
    top = torch.zeros(pixels)
    top[order[:count]] = 1
    # What a map adds to the field changes the area by what it lacks within it, in pixels there.
    lacks = share * maps.sum(2).double() - (maps @ top).double()
    influence = lacks / (pixels * values[count - 1])
    influence -= influence.mean()
    of_image, of_channel = influence.mean(1), influence.mean(0)
    rest = influence - of_image[:, None] - of_channel
    both = rest.square().sum() / ((images - 1) * (drawn - 1))
    image = (of_image.var() - both / drawn).clamp(min=0)
    channel = (of_channel.var() - both / images).clamp(min=0)
    same = min(CROSSED, channels)
    once = image / CROSSED + channel * (1 / same - 1 / channels) + both / (CROSSED * same)
    now = (image + both) / NUM_IMAGES + channel * max(0.0, 1 / NUM_IMAGES - 1 / channels)
    return float(area(field[None], share)), float(once.sqrt()), float(now.sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["vit_small_patch16_224@random", "resnet50@random"]
    )
    parser.add_argument("--images", help="a folder; digit scenes by default")
    parser.add_argument("--image-size", type=int, help="side of the images in pixels")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--error-blocks", type=int, default=4, help="blocks a model; 0 for none")
    parser.add_argument("--error-images", type=int, default=24)
    parser.add_argument("--error-channels", type=int, default=12)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--readme", action="store_true", help="also write the tables there")
    args = parser.parse_args()
    costs, rows, total = [], [], np.zeros(2)
    for name in args.models:
        options = Options(num_images=NUM_IMAGES, batch_size=BATCH_SIZE, device=args.device,
                          image_size=args.image_size)  # fmt: skip
        with session(name, args.images, options) as ready:
            seconds, watch = cost(ready, Clock(args), args.repeats)
            total += seconds
            label, count = ready.models[0].name, len(watch.plans[0].sites)  # type: ignore[attr-defined]
            bare, fields = seconds
            costs.append(
                (label, str(count), f"{bare:.1f}", f"{fields:.1f}", f"{fields / bare:.2f}")
            )
            for block, channels, maps in crossed(ready, watch, args) if args.error_blocks else []:
                found = [errors(maps, channels, share) for share in SHARES]
                rows.append((label, block, *(f"{x:.4f}" for part in found for x in part)))
    if len(costs) > 1:
        ratio = total[1] / total[0]
        costs.append(("together", "", f"{total[0]:.1f}", f"{total[1]:.1f}", f"{ratio:.2f}"))
    text = f"{machine(args.device)}; {NUM_IMAGES} images, a channel of its own each, batches of "
    text += f"{BATCH_SIZE}; bare passes of {BARE_IMAGES} images.\n\n{table(COSTS, costs)}"
    if rows:
        text += (
            f"\n\nStandard errors, with {CROSSED} images × the same {CROSSED} channels as once, "
        )
        text += f"and with {NUM_IMAGES} images and a channel of its own each now:\n\n"
        text += table(ERRORS, rows)
    publish("benchmark_receptive_field", text, args.readme)


if __name__ == "__main__":
    main()
