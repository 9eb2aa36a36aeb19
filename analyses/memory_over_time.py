"""How the resident memory of every measurement over images develops over a hundred batches.

    python analyses/memory_over_time.py

Each runs in a process of its own. Prints its resident memory after some batches, and how much more
that is after the last of them than after the first, beside what the images of the batches in
between take: a measurement that kept its batches would grow by at least that. Needs Linux's /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarking import in_child, table
from kill_and_resume import MEASUREMENTS, command

from vitprobe.running import passes
from vitprobe.running.session import Batch, Session

AFTER = (10, 25, 50, 75, 100)
BATCH = 4
MIB = 2**20


def resident_mib() -> float:
    """Memory that this process has now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def watched(name: str) -> dict[str, Any]:
    """Run a measurement: MiB after so many batches, and MiB of one batch's images."""
    loop, seen, inputs = passes.run, [], []

    def run(session: Session, step: Any, sums: Any, **options: Any) -> None:
        def observed(batch: Batch) -> None:
            step(batch)
            if len(session.batches) == AFTER[-1] and batch.index + 1 in AFTER:
                seen.append(resident_mib())
                # Models that have a transform in common have the same images.
                sizes = {t.data_ptr(): t.numel() * t.element_size() for t in batch.inputs}
                inputs.append(sum(sizes.values()) / MIB)

        loop(session, observed, sums, **options)

    torch.set_num_threads(1)
    module = import_module(f"vitprobe.{name}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = command(name, Path(folder))
        arguments += ["--num-images", str(BATCH * AFTER[-1]), "--batch-size", str(BATCH)]
        # What drawing takes is nothing that grows with a run.
        unsaved = patch.object(module.RESULT, "save", lambda *_, **__: [])
        with patch.object(passes, "run", run), unsaved, contextlib.redirect_stdout(io.StringIO()):
            status = module.main(arguments)
    if status:
        sys.exit(status)
    return {"resident": seen, "inputs": inputs[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--child", choices=MEASUREMENTS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(watched(args.child)))
        return
    rows = []
    for name in args.measurements:
        found = in_child(__file__, "--child", name)
        resident = found["resident"]
        images = found["inputs"] * (AFTER[-1] - AFTER[0])
        rows.append([name, *(f"{one:.1f}" for one in resident),
                     f"{resident[-1] - resident[0]:+.1f}", f"{images:.1f}"])  # fmt: skip
        print(f"{len(rows)} of {len(args.measurements)}: {name}", file=sys.stderr)
    header = ["MiB after batch", *map(str, AFTER), "growth", "images in between"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
