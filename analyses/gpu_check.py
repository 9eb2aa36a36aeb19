"""Whether a card gives the numbers of a processor, and what it does when its memory is full.

    python analyses/gpu_check.py                    # on the first CUDA device
    python analyses/gpu_check.py --device cpu       # the script itself, without a card

Each measurement runs on the device and on the CPU, in fp32 (with TF32 off, as vitprobe sets it) and
in bf16 on the device; the table gives the largest difference of every array from the CPU's, as a
share of the array's largest value. After that, a batch that cannot fit must end in one line and
leave the card usable, and the memory that was forecast is set beside the peak. Exits with 1 where
fp32 is off by more than 1e-5 or a line is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
from benchmarking import machine, publish, table

from vitprobe import VitprobeError, cka, load_model, measure_all
from vitprobe.catalogue import measurements
from vitprobe.results.result import Result
from vitprobe.running import memory
from vitprobe.running.options import Options
from vitprobe.running.session import session

PAIRS = (
    ("vit_small_box", "resnet_box"),
    ("vit_base_patch16_224@random", "resnet50@random"),
)
HEADER = ("models", "measurement", "fp32 off by", "bf16 off by", "CPU s", "device s")
ALLOWED = 1e-5


def off(one: Result, other: Result) -> float:
    """The largest difference of any array, as a share of that array's largest value."""
    most = 0.0
    for name, array in one.arrays().items():
        theirs = other.arrays()[name]
        if array.dtype.kind != "f" or name.endswith("_se") or not array.size:
            continue
        scale = float(np.nanmax(np.abs(array), initial=0.0))
        if scale and array.shape == theirs.shape:
            most = max(most, float(np.nanmax(np.abs(array - theirs), initial=0.0)) / scale)
    return most


def compare(models: tuple[str, ...], args: argparse.Namespace) -> list[tuple[str, ...]]:
    """A row for each measurement of a pair of models."""
    rows = []
    for name in args.only or measurements():
        found: list[Any] = []
        for device, precision in (("cpu", "fp32"), (args.device, "fp32"), (args.device, "bf16")):
            began = time.perf_counter()
            try:
                results = measure_all(
                    [name], list(models), num_images=args.num_images, device=device,
                    precision=precision, batch_size=args.batch_size,
                )  # fmt: skip
            except VitprobeError as error:
                found.append((str(error), 0.0))
                continue
            result = next(iter(results.values()), results.missing.get(name, "nothing"))
            found.append((result, time.perf_counter() - began))
        (cpu, cpu_s), (fp32, device_s), (bf16, _) = found
        told = [
            f"{off(cpu, one):.1e}" if isinstance(one, Result) and isinstance(cpu, Result) else
            ("the same line" if one == cpu else str(one)[:60])
            for one in (fp32, bf16)
        ]  # fmt: skip
        rows.append((" x ".join(models), name, *told, f"{cpu_s:.1f}", f"{device_s:.1f}"))
        print(*rows[-1], flush=True)
    return rows


def out_of_memory(device: str) -> str:
    """What a batch too large for the card is told, and whether the card works afterwards."""
    if device == "cpu":
        return "not tried on a CPU"
    size = torch.cuda.get_device_properties(0).total_memory // (3 * 224 * 224 * 4) // 4
    images = torch.zeros(1, 3, 224, 224).expand(size, 3, 224, 224)
    model = load_model("vit_base_patch16_224@random")
    try:
        cka.measure(model, images, batch_size=size, device=device)
    except VitprobeError as error:
        again = cka.measure(model, torch.randn(8, 3, 224, 224), device=device)
        return f"{error} Afterwards: {'works' if np.isfinite(again.cka).all() else 'is broken'}."
    return "it fitted: no line"


def forecast(device: str, batch_size: int) -> str:
    """GiB forecast for a batch, and the peak that it took."""
    model = load_model("vit_base_patch16_224@random")
    images = torch.randn(batch_size, 3, 224, 224)
    with session(model, images, Options(batch_size=batch_size, device=device)) as ready:
        told = memory.forecast([model.module], ready.example(), batch_size, 0, 0)
        if device == "cpu" or told is None:
            return f"{told.activations / memory.GIB:.2f} GiB forecast" if told else "no forecast"
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            model.module(images.to(device))
        peak = torch.cuda.max_memory_allocated() - before
    return (
        f"{told.activations / memory.GIB:.2f} GiB forecast, {peak / memory.GIB:.2f} GiB at its peak"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these measurements")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many pairs of models")
    parser.add_argument("--readme", action="store_true", help="also write the table there")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no CUDA device here; --device cpu tries the script itself.")
        return 2
    rows = [row for pair in PAIRS[: args.pairs] for row in compare(pair, args)]
    lines = [
        f"{machine(args.device.partition(':')[0])}; {args.num_images} images.",
        "",
        table(HEADER, rows),
        "",
        f"Out of memory: {out_of_memory(args.device)}",
        f"Memory of a batch: {forecast(args.device, args.batch_size)}.",
    ]
    publish("gpu_check", "\n".join(lines), args.readme)
    numbers = [row[2] for row in rows]
    wrong = [text for text in numbers if "e" in text[:8] and text[0].isdigit()
             and float(text) > ALLOWED]  # fmt: skip
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
