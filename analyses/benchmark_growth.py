"""How what CKA takes an image grows with the number of images, of layers and of processes.

    python analyses/benchmark_growth.py

One thread a process, an untrained ResNet-18 on random 64-pixel images in batches of 32. Times are
those of the batch loop, from its first batch to the sums over all processes, divided by the number
of images; medians of a few runs in turn, each as a ratio to the first row of its table. Processes
are those of ``torchrun`` on this machine: with as many as it has cores, half of the time at twice
as many is the best that there can be.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from benchmarking import machine, table
from many_processes import launched

from vitprobe import cka, load_model
from vitprobe.running.session import Session

IMAGES, LAYERS, PROCESSES = (64, 256, 1024), (1, 15, 30, 60), (1, 2, 4)
BATCH, PIXELS = 32, 64
# Where the number of images, or of layers, is not what is looked at.
SOME_IMAGES, SOME_LAYERS = 256, 15


def layer_names(count: int) -> list[str]:
    """So many of the network's layers, from its first to its last."""
    few = torch.zeros(4, 3, PIXELS, PIXELS)
    names = cka.measure(load_model("resnet18@random"), few, layers="all", device="cpu").layers
    return [str(names[i]) for i in np.linspace(0, len(names) - 1, count).round().astype(int)]


def loop_seconds(images: int, layers: Sequence[str]) -> float:
    """How long the batch loop takes in this process."""
    loop, seen = Session.run, []

    def run(*args: Any, **options: Any) -> None:
        began = time.perf_counter()
        loop(*args, **options)
        seen.append(time.perf_counter() - began)

    torch.set_num_threads(1)
    pictures = torch.randn(images, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    with patch.object(Session, "run", run):
        cka.measure(
            load_model("resnet18@random"), pictures, layers=layers, batch_size=BATCH, device="cpu"
        )
    return seen[0]


def in_processes(count: int, layers: Sequence[str]) -> float:
    """The slowest process's loop of so many that share the images out."""
    return max(launched(count, loop_seconds, "growth")(SOME_IMAGES, layers).values())


def growth(
    what: str, numbers: Sequence[int], work: Callable[[int], float], images: Any, repeats: int
) -> str:
    """A table: for each number, the time an image takes and its ratio to the first one's."""
    times: list[list[float]] = [[] for _ in numbers]
    for _ in range(repeats):
        for number, found in zip(numbers, times):
            found.append(work(number) / images(number))
    rows = [
        [str(number), f"{1000 * median(found):.2f}",
         f"{median(t / first for t, first in zip(found, times[0])):.2f}"]
        for number, found in zip(numbers, times)
    ]  # fmt: skip
    return table([what, "ms an image", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    some = layer_names(SOME_LAYERS)
    chosen = {count: layer_names(count) for count in LAYERS}
    loop_seconds(BATCH, some)
    print(f"{machine()}, {os.cpu_count()} cores; medians of {repeats}.\n")
    print(f"{SOME_LAYERS} layers:\n")
    print(growth("images", IMAGES, lambda n: loop_seconds(n, some), lambda n: n, repeats))
    print(f"\n{SOME_IMAGES} images:\n")
    always = lambda n: SOME_IMAGES  # noqa: E731
    print(growth("layers", LAYERS, lambda k: loop_seconds(SOME_IMAGES, chosen[k]), always, repeats))
    print(f"\n{SOME_IMAGES} images, {SOME_LAYERS} layers:\n")
    print(growth("processes", PROCESSES, lambda p: in_processes(p, some), always, repeats))


if __name__ == "__main__":
    main()
