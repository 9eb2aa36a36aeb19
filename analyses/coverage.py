"""What each measurement finds in the smallest model of every timm module.

    python analyses/coverage.py
    python analyses/coverage.py --modules swin_transformer resnet --out some

Each module's smallest model by parameters, with random weights and at the smallest side that it
runs at, sees a few random images. Writes ``coverage.csv`` (a row a model) and ``coverage.md``. One
process a model, with limits of time and memory; what is done stays in ``coverage.partial.csv``
until all is, so that a run can be interrupted and goes on where it was. Takes about 20 minutes on
two cores.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from benchmarking import table

from vitprobe import (
    attention_distance,
    attention_rollout,
    cka,
    head_subsets,
    linear_probe,
    localization,
    patch_embedding,
    position_embedding,
    receptive_field,
    skip_ablation,
    skip_ratio,
)
from vitprobe.errors import VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.models.loading import Model, load_model
from vitprobe.tracing.attention import map_attention
from vitprobe.tracing.layers import map_layers

SIDES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
IMAGES, BATCH = 8, 4
LIMIT_CPU_SECONDS, LIMIT_GIB = 1200, 12
YES, ABSENT, NO = "yes", "not in this architecture", "no"
# How a measurement says that an architecture has nothing for it.
SAYS_ABSENT = re.compile(
    "has no attention|attends, if at all, in a way|has no residual additions|"
    "has no position embedding|has no layer of filters"
)


class Unhashed(Model):
    """A model whose weights nobody will ask for again."""

    def weights_sha256(self) -> str:
        return ""


def options() -> dict[str, Any]:
    return {"batch_size": BATCH, "device": "cpu"}


def beside(model: Model, images: torch.Tensor) -> Any:
    """Head subsets, of the model or, where it has no attention, of a ViT beside it."""
    if map_attention(model.name, model.module, images[:2]).layers:
        pair = [model, "test_resnet@random"]
    else:
        side = images.shape[-1]
        pair = [load_model("test_vit@random", -(-side // 16) * 16), model]
        pair[0].module.patch_embed.strict_img_size = False
    return head_subsets.measure(pair, images, **options())


def labelled(images: torch.Tensor) -> Any:
    opened = open_images(images)
    classes = (torch.arange(len(images)) % 2).numpy()
    return replace(opened, labels=classes, classes=("even", "odd"))


MEASUREMENTS: dict[str, Callable[[Model, torch.Tensor], Any]] = {
    "cka": lambda m, x: cka.measure(m, x, **options()),
    "attention_distance": lambda m, x: attention_distance.measure(m, x, **options()),
    "head_subsets": beside,
    "attention_rollout": lambda m, x: attention_rollout.measure(m, x, **options()),
    "receptive_field": lambda m, x: receptive_field.measure(
        m, x, channels=2, num_images=2, batch_size=2, device="cpu"
    ),
    "skip_ratio": lambda m, x: skip_ratio.measure(m, x, **options()),
    "skip_ablation": lambda m, x: skip_ablation.measure(m, x, layers="blocks", **options()),
    "linear_probe": lambda m, x: linear_probe.measure(
        m, labelled(x), shots=1, draws=2, **options()
    ),
    "localization": lambda m, x: localization.measure(m, x, **options()),
    "position_embedding": lambda m, x: position_embedding.measure(m),
    "patch_embedding": lambda m, x: patch_embedding.measure(m),
}
NOTES = """`+` is yes, an empty cell *not in this architecture*. *Heads × layers* counts the layers
that attend between places of the image. *Sums* are residual additions: one operand goes into the
other as it is, or both come from one tensor and one has met no weights, or fewer in a projection of
the block's input. So conditional position encodings (x + dwconv(x)), MViTv2's pooled queries and
SwiftFormer's queries count; parallel convolutions that are joined by a sum (RepVGG), fusion of
resolutions (HRNet), and sums of a tensor's parts (Res2Net) do not. Head subsets put the model first
and test_resnet beside it, or a model without attention beside test_vit."""
# Where in a model, in a line of several models.
LABEL = re.compile(r"(?<=\()[\w.:]+: ")
COUNTS = (
    "layers", "blocks", "additions", "identity", "view", "projection", "attention_layers",
    "heads", "left_out",
)  # fmt: skip
COLUMNS = ("module", "model", "parameters", "side", *COUNTS, *MEASUREMENTS, "seconds")


def smallest(module: str) -> tuple[str, int]:
    """The model of a timm module with the fewest parameters, and their number."""
    sizes = {}
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(sizes.items(), key=lambda item: item[1])


def smallest_side(name: str) -> int:
    """The first of ``SIDES`` at which a model runs and has several places left at its end."""
    own = timm.get_pretrained_cfg(name).input_size[-1]
    with torch.device("meta"):
        stages = getattr(timm.create_model(name), "feature_info", None) or [{"reduction": 32}]
    least = 2 * max(stage["reduction"] for stage in stages)
    reason: Exception | None = None
    for side in dict.fromkeys((*(s for s in SIDES if least <= s <= own), own)):
        try:
            model = load_model(f"{name}@random", side)
            with torch.inference_mode():
                model.module(torch.zeros(2, 3, side, side))
            return side
        except (VitprobeError, RuntimeError, AssertionError, ValueError, IndexError) as error:
            reason = error
    raise VitprobeError(f"{name} runs at no side up to {own}: {reason}")


def counts(model: Model, images: torch.Tensor) -> dict[str, Any]:
    """What of each kind a model has."""
    layers = map_layers(model.name, model.module, images[:2])
    kinds = Counter(addition.kind for addition in layers.trace.additions)
    found: dict[str, Any] = {
        "layers": len(layers.choose("all")),
        "blocks": len(layers.choose("blocks")),
        "additions": sum(kinds.values()),
        **{kind: kinds[kind] for kind in ("identity", "view", "projection")},
    }
    attention = map_attention(model.name, model.module, images[:2])
    heads = Counter(layer.heads for layer in attention.layers)
    reasons = Counter(attention.left_out.values())
    found["attention_layers"] = len(attention.layers)
    found["heads"] = " ".join(f"{number}x{count}" for count, number in heads.items())
    found["left_out"] = "; ".join(f"{number} {reason}" for reason, number in reasons.items())
    return found


def outcome(work: Callable[[], Any]) -> str:
    """yes, not in this architecture, or no, the latter two with the line that says why."""
    try:
        work()
    except VitprobeError as error:
        status = ABSENT if SAYS_ABSENT.search(str(error)) else NO
        return f"{status}: {error}"
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        return f"{NO}: {type(error).__name__}: {line}"
    return YES


def row(module: str, name: str = "") -> dict[str, Any]:
    """Every column of a module's model."""
    began = time.perf_counter()
    name, parameters = (name, 0) if name else smallest(module)
    side = smallest_side(name)
    model = Unhashed(**vars(load_model(f"{name}@random", side)))
    images = torch.randn(IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {
        "module": module,
        "model": name,
        "parameters": parameters or sum(p.numel() for p in model.module.parameters()),
        "side": side,
    }
    try:
        found |= counts(model, images)
    except VitprobeError as error:
        found["left_out"] = str(error)
    for measurement, measure in MEASUREMENTS.items():
        found[measurement] = outcome(lambda measure=measure: measure(model, images))
    found["seconds"] = round(time.perf_counter() - began)
    return found


def _child(module: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_GIB << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_SECONDS,) * 2)
    # Settings of the whole process, so here and not where the measurements are made.
    torch.set_num_threads(1)
    # Gradients of an untrained DenseNet are denormal numbers, a hundred times as slow on a CPU.
    torch.set_flush_denormal(True)
    try:
        sender.send(row(module))
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        sender.send({"module": module, "left_out": f"{type(error).__name__}: {line}"})


def in_a_process(context: Any, module: str) -> dict[str, Any]:
    """``row`` in a process of its own, which ends when its time is over."""
    receiver, sender = context.Pipe(False)
    process = context.Process(target=_child, args=(module, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        limits = f"{LIMIT_CPU_SECONDS} s or {LIMIT_GIB} GiB"
        return {"module": module, "left_out": f"its process ended: more than {limits}"}
    finally:
        process.kill()
        process.join()


def status(row: dict[str, Any], measurement: str) -> str:
    """yes, not in this architecture, or no."""
    return (row.get(measurement) or NO).split(":")[0]


def reasons(rows: list[dict[str, Any]], wanted: str) -> list[str]:
    """A line for each reason of a status, with the models that have it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for measurement in MEASUREMENTS:
            if status(row, measurement) == wanted:
                text = (row.get(measurement) or row["left_out"]).partition(": ")[2]
                text = text.replace(f"{row.get('model')} (random)", "MODEL")
                line = f"{measurement}: {LABEL.sub('', text)}"
                found.setdefault(line, []).append(row["module"])
    return [f"- {line} ({len(who)}: {', '.join(who)})" for line, who in sorted(found.items())]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The totals, the table, and the reasons below it."""
    statuses = (YES, ABSENT, NO)
    head = ["", *(name.replace("_", " ") for name in MEASUREMENTS)]
    totals = [
        [of, *(str(sum(status(row, m) == of for row in rows)) for m in MEASUREMENTS)]
        for of in statuses
    ]
    sign = dict(zip(statuses, ("+", "", "**no**")))
    body = [
        [
            row["module"], row.get("model", ""), str(row.get("side", "")),
            row.get("heads", "").replace("x", "×"), str(row.get("additions", "")),
            str(row.get("blocks", "")), str(row.get("layers", "")),
            *(sign[status(row, m)] for m in MEASUREMENTS),
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["module", "model", "px", "heads × layers", "sums", "blocks", "layers", *head[1:]]
    everything = set(timm.list_modules())
    parts = [
        f"# The smallest model of {len(rows)} of timm {timm.__version__}'s {len(everything)} "
        "modules",
        f"Not run: {', '.join(everything - {row['module'] for row in rows}) or 'none'}.",
        "Random weights, the smallest side at which the model runs and keeps a grid, "
        f"{IMAGES} random images. Made by `python analyses/coverage.py`; all counts and lines "
        "are in [coverage.csv](coverage.csv).",
        table(head, totals),
        NOTES,
        table(columns, body),
        f"## {NO.capitalize()}",
        "\n".join(reasons(rows, NO)) or "None.",
        f"## {ABSENT.capitalize()}",
        "The line that the user sees, and for how many of the models.",
        "\n".join(reasons(rows, ABSENT)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", default=timm.list_modules())
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "figures")
    args = parser.parse_args()
    partial = args.out / "coverage.partial.csv"
    rows = list(csv.DictReader(partial.open())) if partial.exists() else []
    done = {one["module"] for one in rows}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"vitprobe.{name}" for name in MEASUREMENTS])
    for module in args.modules:
        if module in done:
            continue
        found = in_a_process(context, module)
        with partial.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not rows:
                writer.writeheader()
            writer.writerow(found)
        rows.append(found)
        tally = Counter(status(found, measurement) for measurement in MEASUREMENTS)
        print(module, found.get("model"), dict(tally), f"{found.get('seconds')} s", flush=True)
    rows.sort(key=lambda row: row["module"])
    with (args.out / "coverage.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    (args.out / "coverage.md").write_text(markdown(rows))
    partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
