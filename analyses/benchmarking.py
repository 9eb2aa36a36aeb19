"""What the benchmarks share: ratios within one run, memory of a process of its own, tables.

Machines are noisy, so a cost is a ratio: each timed piece of work stands between two runs of the
bare work that it is compared with, and the median over repeats counts.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import timm
import torch

from vitprobe.running import passes, probes
from vitprobe.running.session import Batch, Session

README = Path(__file__).parent / "README.md"


@dataclass(frozen=True)
class Cost:
    """Median seconds of the bare work and of the work, and the median of their ratios."""

    bare_s: float
    work_s: float
    ratio: float


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """How long a call takes, its kernels included."""
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(
    bare: Callable[[], Any],
    work: Callable[[], Any],
    repeats: int,
    device: str = "cpu",
    warm_up: int = 1,
) -> Cost:
    """The two in turn; each ratio is to the mean of the bare runs just before and just after."""
    for _ in range(warm_up):
        bare(), work()
    alone, both = [seconds(bare, device)], []
    for _ in range(repeats):
        both.append(seconds(work, device))
        alone.append(seconds(bare, device))
    ratios = [2 * t / (a + b) for t, a, b in zip(both, alone, alone[1:])]
    return Cost(median(alone), median(both), median(ratios))


@contextmanager
def instead_of_the_loop(
    act: Callable[[Batch, Callable[[Batch], None], dict[str, Any]], None],
) -> Iterator[None]:
    """Within it a measurement calls ``act(first batch, step, facts)`` in place of its batch loop.

    ``step`` is the very function that the loop would call on every batch.
    """

    def run(session: Session, step: Any, sums: Any, *, decides: Any, **options: Any) -> None:
        batch = next(session.load([0]))[0]
        with torch.inference_mode(not options.get("gradients", False)):
            act(batch, step, decides)

    with patch.object(passes, "run", run), patch.object(probes, "run", run):
        yield


def in_child(file: str, *arguments: str) -> Any:
    """What the last line says, as JSON, that a benchmark prints in a process of its own."""
    done = subprocess.run([sys.executable, file, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_gib(device: str = "cpu") -> float:
    """Peak memory of this process, or of its tensors on a CUDA device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # The accounting of resource would count what the parent held when it started this process.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 2**20
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**30 if sys.platform == "darwin" else 2**20)


def machine(device: str = "cpu") -> str:
    """The processor or card, threads, and versions."""
    versions = f"torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or ['CPU'])[0]}, {torch.get_num_threads()} threads, {versions}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(name: str, text: str, readme: bool) -> None:
    """Print; with ``readme`` also put the text between its marks in ``README.md`` here."""
    print(text, flush=True)
    if not readme:
        return
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = README.read_text(encoding="utf-8")
    if begin not in page or end not in page:
        raise SystemExit(f"{README} has no {begin} ... {end}.")
    before, rest = page.split(begin)
    README.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")
