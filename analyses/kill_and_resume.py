"""Kill every measurement over images at random moments, resume it, and compare the numbers.

    python analyses/kill_and_resume.py --times 20

Each run is a process of its own that gets SIGKILL after a drawn number of batches, none included,
and a drawn time after that; the same command then goes on. When a run comes to its end its arrays
are compared with those of the undisturbed run, and the next one starts over, until there have been
as many kills as asked for. Prints a table:

    kills      in how many the state of the run was on disk already
    finished   runs that were killed and came to their end
    difference the largest of any array's, between those and the undisturbed run
    left over  files other than the figure and the numbers
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import random
import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

VIT, CNN = "test_vit@random", "test_resnet@random"
SMALL = ["--image-size", "32", "--num-images", "80", "--batch-size", "4", "--workers", "0"]
SMALL += ["--save-every", "0"]
# Models and options that make a run of seconds with twenty batches.
MEASUREMENTS: dict[str, list[str]] = {
    "cka": [VIT, CNN],
    "attention_distance": [VIT, "vit_small_box"],
    "head_subsets": [VIT, CNN],
    "attention_rollout": [VIT],
    "attention_statistics": [VIT],
    "receptive_field": [VIT, CNN, "--channels", "4"],
    "skip_ratio": [VIT, CNN],
    "skip_ablation": [VIT],
    "linear_probe": [VIT, CNN, "--shots", "3"],
    "localization": [VIT, CNN],
    "frequency": [VIT, CNN],
    "token_norms": [VIT, CNN],
    "patch_pca": [VIT],
    "neighbours": [VIT, CNN],
    "occlusion": [VIT, CNN],
}


def command(name: str, out: Path) -> list[str]:
    """The arguments of a measurement's small run."""
    models = [word for word in MEASUREMENTS[name] if "@" in word or word.endswith("_box")]
    rest = MEASUREMENTS[name][len(models) :]
    return ["--models", *models, *rest, *SMALL, "--out", str(out), "--stem", name]


def arrays(out: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of the result file."""
    with np.load(out / f"{name}.npz") as file:
        return {key: file[key] for key in file.files if key != "meta"}


def difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest absolute difference; infinite where names, words, shapes or NaNs differ."""
    if found.keys() != expected.keys():
        return np.inf
    largest = 0.0
    for key, array in found.items():
        other = expected[key]
        if array.shape != other.shape:
            return np.inf
        if array.dtype.kind not in "fiu":
            largest = max(largest, 0.0 if np.array_equal(array, other) else np.inf)
            continue
        a, b = array.astype(float), other.astype(float)
        if not np.array_equal(np.isnan(a), np.isnan(b)):
            return np.inf
        largest = max(largest, float(np.nanmax(np.abs(a - b), initial=0.0)))
    return largest


def measure(name: str, arguments: list[str]) -> None:
    """Run a command as its own process does, quietly."""
    import torch

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = import_module(f"vitprobe.{name}").main(arguments)
    if status:
        sys.exit(status)


def start(processes: Any, name: str, out: Path) -> Any:
    process = processes.Process(target=measure, args=(name, command(name, out)))
    process.start()
    return process


def wait(process: Any, out: Path, batches: int, seconds: float) -> None:
    """Until about so many more batches are in the state on disk, and so many seconds longer."""
    seen: set[int] = set()
    while process.exitcode is None and len(seen) < batches:
        process.join(0.002)
        for file in out.glob(".*.partial"):
            with contextlib.suppress(FileNotFoundError):
                seen.add(file.stat().st_mtime_ns)
    process.join(seconds)


def row(processes: Any, name: str, times: int, chance: random.Random) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        whole, out = Path(folder) / "whole", Path(folder) / "killed"
        undisturbed = start(processes, name, whole)
        undisturbed.join()
        if undisturbed.exitcode:
            return f"{name:20} the undisturbed run failed with status {undisturbed.exitcode}"
        expected = arrays(whole, name)
        kills = kept = finished = resumed = left = 0
        largest = 0.0
        # The last run is let go to its end.
        while kills < times or resumed:
            process = start(processes, name, out)
            if kills < times:
                wait(process, out, chance.randint(0, 8), chance.uniform(0, 0.1))
            else:
                process.join()
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
                resumed += 1
                kept += bool(list(out.glob(".*.partial")))
                continue
            if process.exitcode:
                return f"{name:20} a resumed run failed with status {process.exitcode}"
            if resumed:
                finished += 1
                largest = max(largest, difference(arrays(out, name), expected))
                left += len([p for p in out.iterdir() if p.suffix not in (".png", ".npz")])
            resumed = 0
            shutil.rmtree(out)
        return f"{name:20} {kills:3} ({kept:2}) {finished:9} {largest:12.1e} {left:10}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=20, help="kills a measurement (%(default)s)")
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    args = parser.parse_args()
    # Processes that begin with the libraries loaded spend their time on what is to be killed.
    processes = multiprocessing.get_context("fork")
    for name in args.measurements:
        import_module(f"vitprobe.{name}")
    chance = random.Random(args.seed)
    print(f"{'measurement':20} kills    finished   difference  left over", flush=True)
    for name in args.measurements:
        print(row(processes, name, args.times, chance), flush=True)


if __name__ == "__main__":
    main()
