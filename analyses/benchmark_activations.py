"""What it costs to keep activations: ``capture`` and ``extract`` against bare forward passes.

    python analyses/benchmark_activations.py
    python analyses/benchmark_activations.py --device cuda

Untrained timm models see the same random batch again and again. ``capture`` of all blocks keeps a
copy of each, so it is compared with the same pass under hooks written by hand that do no more than
copy; ``extract`` of means is compared with the bare pass in the same layout. Memory is that of one
process in which all blocks are captured in batch after batch, and another that writes their means.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from benchmarking import Cost, compare, in_child, machine, publish, table
from torch import Tensor, nn

import vitprobe
from vitprobe.models.loading import wrap

MODELS = ("vit_small_patch16_224", "resnet50", "swin_tiny_patch4_window7_224")
HEADER = ("model, 224 px", "blocks", "bare s", "copies by hand s", "capture s", "x by hand",
          "extract s", "x bare")  # fmt: skip
# Batches over which memory is followed, and those after which it has settled.
BATCHES, SETTLED = 100, 20
SMALL = "test_vit"


@contextmanager
def by_hand(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within it, passes leave copies of what these modules put out, and nothing else is done."""
    kept: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:

            def copy(_: Any, __: Any, output: Tensor, name: str = name) -> None:
                kept[name] = output.detach().clone()

            stack.callback(model.get_submodule(name).register_forward_hook(copy).remove)
        yield kept


def captured(model: nn.Module, images: Tensor, repeats: int) -> tuple[int, Cost, Cost]:
    """How many blocks there are; copies by hand against bare passes, and ``capture`` against both.

    Each way has a network of its own, so that no hook is put on or off while the clock runs.
    """
    device = images.device.type
    with ExitStack() as stack:
        seen = stack.enter_context(vitprobe.capture(model, "blocks", example=images))
        model(images)
        names = list(seen)
        twin, bare = (once_more(model, images) for _ in range(2))
        stack.enter_context(by_hand(twin, names))
        hooked = compare(lambda: bare(images), lambda: twin(images), repeats, device)
        both = compare(lambda: twin(images), lambda: model(images), repeats, device)
    return len(names), hooked, both


def once_more(model: nn.Module, images: Tensor) -> nn.Module:
    """The same architecture once more, in the same mode and place."""
    name = model.pretrained_cfg["architecture"]
    return timm.create_model(name).eval().to(images.device)


def extracted(model: nn.Module, images: Tensor, repeats: int) -> Cost:
    """A batch of ``extract`` of means against its bare pass."""
    costs: list[Cost] = []

    def run(ready: Any, step: Any, sums: Any, **_: Any) -> None:
        batch = next(ready.load([0]))[0]
        kind = ready.device.type
        costs.append(compare(lambda: ready.forward(0, batch), lambda: step(batch), repeats, kind))

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(importlib.import_module("vitprobe.extract"), "run", run),
    ):
        vitprobe.extract(
            wrap(model, "model"), images.cpu(), readout="mean", out=folder,
            batch_size=len(images), device=images.device.type, quiet=True,
        )  # fmt: skip
    return costs[0]


def row(name: str, args: argparse.Namespace) -> tuple[str, ...]:
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(args.device)
    images = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    with torch.no_grad():
        count, hooked, both = captured(model, images, args.repeats)
        means = extracted(model, images, args.repeats)
    numbers = (hooked.bare_s, hooked.work_s, both.work_s)
    return (
        name, str(count), *(f"{one:.3f}" for one in numbers), f"{both.ratio:.3f}",
        f"{means.work_s:.3f}", f"{means.ratio:.3f}",
    )  # fmt: skip


def resident_mib() -> float:
    """Memory that this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 2**10


def growth(what: str) -> float:
    """MiB that this process holds more after a hundred batches than after twenty."""
    model, seen = timm.create_model(SMALL, img_size=96).eval(), []
    batches = [torch.randn(16, 3, 96, 96) for _ in range(4)]
    if what == "capture":
        with vitprobe.capture(model, "blocks", example=batches[0]) as kept, torch.no_grad():
            for number in range(BATCHES):
                model(batches[number % 4])
                assert len(kept)
                seen.append(resident_mib())
    else:
        extract = importlib.import_module("vitprobe.extract")
        read = extract.read

        def watched(*given: Any) -> Tensor:
            seen.append(resident_mib())
            return read(*given)

        images = torch.cat(batches).repeat(BATCHES // 4, 1, 1, 1)
        with tempfile.TemporaryDirectory() as folder, patch.object(extract, "read", watched):
            extract.extract(
                wrap(model, "model"), images, readout="mean", out=folder, batch_size=16,
                device="cpu", quiet=True,
            )  # fmt: skip
    return max(seen[-len(seen) // 10 :]) - max(seen[: len(seen) * SETTLED // BATCHES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm's names")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--readme", action="store_true", help="also write the table there")
    parser.add_argument("--child", choices=["capture", "extract"])
    args = parser.parse_args()
    if args.child:
        print(json.dumps(growth(args.child)))
        return
    rows = [row(name, args) for name in args.models]
    more = {what: in_child(__file__, "--child", what) for what in ("capture", "extract")}
    text = (
        f"{machine(args.device)}; batches of {args.batch_size}, medians of {args.repeats}. From "
        f"batch {SETTLED} to batch {BATCHES} of 16 images a process holds {more['capture']:+.1f} "
        f"MiB (capture of {SMALL}'s blocks) and {more['extract']:+.1f} MiB (extract of means, "
        f"images in memory).\n\n{table(HEADER, rows)}"
    )
    publish("benchmark_activations", text, args.readme)


if __name__ == "__main__":
    main()
