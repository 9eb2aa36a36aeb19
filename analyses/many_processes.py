"""Run every measurement over images with 1, 2, 3 and 4 processes and compare the numbers.

    python analyses/many_processes.py --processes 1 2 3 4

The processes are those that ``torchrun --nproc-per-node N -m vitprobe.NAME`` starts, on this
machine, over gloo. Prints for each measurement and each number the largest difference of any array
from those of one process without ``torchrun``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from kill_and_resume import MEASUREMENTS, arrays, command, difference, measure, start


def launched(count: int, work: Callable[..., Any], name: str) -> Callable[..., dict[int, Any]]:
    """What ``torchrun`` does, but its processes begin with the libraries loaded.

    Returns:
        a function that calls ``work`` in so many processes and gives what each returned, by rank.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=name,
        start_method="fork",
        max_restarts=0,
    )
    return elastic_launch(config, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    args = parser.parse_args()
    for name in args.measurements:
        import_module(f"vitprobe.{name}")
    print(f"{'measurement':20}" + "".join(f"{count:>10}" for count in args.processes), flush=True)
    for name in args.measurements:
        with tempfile.TemporaryDirectory() as folder:
            alone = Path(folder) / "alone"
            start(multiprocessing.get_context("fork"), name, alone).join()
            print(f"{name:20}", end="", flush=True)
            for count in args.processes:
                out = Path(folder) / str(count)
                launched(count, measure, name)(name, command(name, out))
                apart = difference(arrays(out, name), arrays(alone, name))
                print(f"{apart:10.1e}", end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
