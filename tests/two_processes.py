"""What two processes under torchrun give, for tests that compare it with one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vitprobe.results.result import load_result

SCRIPT = """
import os, sys
sys.path.insert(0, {tests!r})
import {module}
for name, result in {module}.{expression}.items():
    if os.environ["RANK"] == "0":
        result.save(os.path.join({folder!r}, name), ())
"""


def results_of(module: str, expression: str, folder: Path) -> dict[str, Any]:
    """The results, by name, of an expression in a module of tests, made in two processes."""
    script = folder / "run.py"
    tests = str(Path(__file__).parent)
    script.write_text(
        SCRIPT.format(tests=tests, module=module, expression=expression, folder=str(folder))
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {path.stem: load_result(path) for path in folder.glob("*.npz")}
