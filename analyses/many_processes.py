"""Run every measurement over images with 1, 2, 3 and 4 processes and compare the numbers.

    python analyses/many_processes.py --processes 1 2 3 4

``torchrun`` starts the processes, on this machine, over gloo. Prints for each measurement and each
number the largest difference of any array from those of one process without ``torchrun``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kill_and_resume import MEASUREMENTS, arrays, command, difference


def run(name: str, out: Path, count: int) -> str:
    """Run with ``count`` processes, without ``torchrun`` for 0; what it printed if it failed."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
    program = [*(torchrun if count else ()), f"vitprobe.{name}"]
    done = subprocess.run(
        [sys.executable, "-m", *program, *command(name, out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if not done.returncode and names != [f"{name}.npz", f"{name}.png"]:
        return f"it wrote {names}"
    # One process prints: the two paths, once.
    if not done.returncode and done.stdout.count(f"{name}.npz") != 1:
        return done.stdout
    return done.stderr if done.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    args = parser.parse_args()
    print(f"{'measurement':20}" + "".join(f"{count:>10}" for count in args.processes), flush=True)
    for name in args.measurements:
        with tempfile.TemporaryDirectory() as folder:
            alone = Path(folder) / "alone"
            failed = run(name, alone, 0)
            if failed:
                sys.exit(failed)
            print(f"{name:20}", end="", flush=True)
            for count in args.processes:
                out = Path(folder) / str(count)
                failed = run(name, out, count)
                if failed:
                    sys.exit(f"\n{failed}")
                apart = difference(arrays(out, name), arrays(alone, name))
                print(f"{apart:10.1e}", end="", flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
