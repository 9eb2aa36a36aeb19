"""What each measurement finds in the smallest model of every timm module.

    python analyses/coverage.py
    python analyses/coverage.py --modules swin_transformer resnet --out some
    python analyses/coverage.py --counts      # layers, blocks, additions, features anew; minutes
    python analyses/coverage.py --beyond      # networks of other libraries (extra interop)

Each module's smallest model by parameters, with random weights and at the smallest side that it
runs at, sees a few random images. Writes ``coverage.csv`` (a row a model) and ``coverage.md``. One
process a model, with limits of time and memory; what is done stays in ``coverage.partial.csv``
until all is, so that a run can be interrupted and goes on where it was. Takes about 40 minutes on
two cores. ``--beyond`` does the same for the networks of ``coverage_beyond.py`` and writes
``coverage_beyond.csv``.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from benchmarking import table
from coverage_beyond import networks

from vitprobe import (
    attention_distance,
    attention_rollout,
    attention_statistics,
    cka,
    frequency,
    head_subsets,
    linear_probe,
    localization,
    neighbours,
    occlusion,
    patch_embedding,
    patch_pca,
    position_embedding,
    receptive_field,
    skip_ablation,
    skip_ratio,
    token_norms,
)
from vitprobe.errors import VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.models.loading import Model, load_model, wrap
from vitprobe.models.precision import input_type
from vitprobe.tracing.attention import map_attention
from vitprobe.tracing.layers import LayerMap, map_layers
from vitprobe.tracing.residuals import path

SIDES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)
IMAGES, BATCH = 8, 4
LIMIT_CPU_SECONDS, LIMIT_GIB = 1200, 12
YES, ABSENT, NO = "yes", "not in this architecture", "no"
# How a measurement says that an architecture has nothing for it.
SAYS_ABSENT = re.compile(
    "has no attention|attends, if at all, in a way|has no residual additions|"
    "has no position embedding|has no layer of filters|predicts no classes"
)


Measurements = Mapping[str, Callable[[Model, torch.Tensor], Any]]
Row = dict[str, Any]


class Unhashed(Model):
    """A model whose weights nobody will ask for again."""

    def weights_sha256(self) -> str:
        return ""


def options() -> dict[str, Any]:
    return {"batch_size": BATCH, "device": "cpu"}


def beside(model: Model, images: torch.Tensor) -> Any:
    """Head subsets, of the model or, where it has no attention, of a ViT beside it."""
    kind = input_type(model.module, images[:1])
    if map_attention(model.name, model.module, images[:2].to(kind)).layers:
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
# Those of the later papers, which look at what the others look at.
LATER: dict[str, Callable[[Model, torch.Tensor], Any]] = {
    "token_norms": lambda m, x: token_norms.measure(m, x, **options()),
    "frequency": lambda m, x: frequency.measure(m, x, **options()),
    "neighbours": lambda m, x: neighbours.measure(m, x, k=3, **options()),
    "patch_pca": lambda m, x: patch_pca.measure(m, x, **options()),
    "attention_statistics": lambda m, x: attention_statistics.measure(m, x, **options()),
    "occlusion": lambda m, x: occlusion.measure(m, x, levels=[0.5], shuffle=[2], **options()),
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
    "heads", "left_out", "features", "features_elsewhere",
)  # fmt: skip
FEATURES = """timm's models say which tensors `features_only` gives. Most of them are blocks; of the
others it is said what the pass does between the newest block that they are made of and them."""
COLUMNS = ("module", "model", "parameters", "side", *COUNTS, *MEASUREMENTS, "seconds")
COLUMNS_BEYOND = (*COLUMNS[:-1], *LATER, "seconds")
BEYOND = f"""Networks of other libraries, most of them small ones of their classes, and timm's
smallest ViT in the ways that people have it; random weights, {IMAGES} random images. Made by
`python analyses/coverage.py --beyond` with the extra `interop`. The networks stand in
`analyses/coverage_beyond.py`, all counts and lines in
[coverage_beyond.csv](coverage_beyond.csv)."""


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


def counts(model: Model, images: torch.Tensor) -> Row:
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
    number, elsewhere = features(layers)
    found["features"] = f"{number - len(elsewhere)} of {number}"
    found["features_elsewhere"] = "; ".join(f"{name} ({what})" for name, what in elsewhere)
    return found


def features(layers: LayerMap) -> tuple[int, list[tuple[str, str]]]:
    """How many tensors ``feature_info`` lists, and those that are no blocks, with what they are."""
    trace, blocks = layers.trace, layers.choose("blocks")
    info = getattr(layers.modules[""], "feature_info", None) or []
    names = [one["module"] for one in (info.get_dicts() if hasattr(info, "get_dicts") else info)]
    calls = {call.name: call for call in trace.calls}
    nodes = {(call.name, suffix): one.node for call in trace.calls for suffix, one in call.outputs}
    ends = [
        block.addition.node if block.addition else nodes[block.module, block.suffix]
        for block in blocks
    ]
    elsewhere = []
    for name in names:
        outputs = [one for _, one in calls[name].outputs] if name in calls else []
        mine = next((one.node for one in outputs if one.node is not None), None)
        if {one.identity for one in outputs} & {block.identity for block in blocks}:
            continue
        if mine is None:
            elsewhere.append((name, "a list of modules, not called itself"))
            continue
        end = max((n for n in ends if n is not None and trace.nodes[mine].ancestors >> n & 1),
                  default=None)  # fmt: skip
        way = None if end is None else path(trace.nodes[mine], trace.nodes[end], trace.nodes)
        if way is None:
            what = "the stem, before the first block"
        elif any(name.startswith(f"{block.module}.") for block in blocks if block.module):
            what = "within a block"
        elif way.depth:
            what = "weights behind a block: a transition, a fusion, a final convolution"
        elif way.work:
            what = "a normalisation or pooling behind a block"
        else:
            what = "a block rearranged, concatenated, or behind an activation"
        elsewhere.append((name, what))
    return len(names), elsewhere


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


def row(module: str, name: str = "") -> Row:
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
    found |= entries(model, images, MEASUREMENTS)
    found["seconds"] = round(time.perf_counter() - began)
    return found


def entries(model: Model, images: torch.Tensor, measurements: Measurements) -> Row:
    """What of each kind a model has, and what each measurement says of it."""
    found: dict[str, Any] = {}
    try:
        found |= counts(model, images.to(input_type(model.module, images[:1])))
    except VitprobeError as error:
        found["left_out"] = str(error)
    for measurement, measure in measurements.items():
        found[measurement] = outcome(lambda measure=measure: measure(model, images))
    return found


def row_beyond(key: str) -> Row:
    """Every column of a network of another library; the key is ``library: name``."""
    began = time.perf_counter()
    library, _, name = key.partition(": ")
    theirs = networks()[library, name]
    torch.manual_seed(0)
    found: dict[str, Any] = {"module": key, "model": name, "side": theirs.side}
    images = torch.randn(
        IMAGES, 3, theirs.side, theirs.side, generator=torch.Generator().manual_seed(0)
    )
    try:
        built = theirs.build()
        model = built if isinstance(built, Model) else wrap(built, name)
    except VitprobeError as error:
        found |= {
            "left_out": str(error),
            **dict.fromkeys((*MEASUREMENTS, *LATER), f"{NO}: {error}"),
        }
    else:
        model.module.eval()
        size = 3, theirs.side, theirs.side
        shown = Unhashed(**{**vars(model), "name": name, "transform": None, "input_size": size})
        found["parameters"] = sum(p.numel() for p in model.module.parameters())
        found |= entries(shown, images, MEASUREMENTS | LATER)
    found["seconds"] = round(time.perf_counter() - began)
    return found


def _child(work: Callable[[str], Row], module: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_GIB << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_CPU_SECONDS,) * 2)
    # Settings of the whole process, so here and not where the measurements are made.
    torch.set_num_threads(1)
    # Gradients of an untrained DenseNet are denormal numbers, a hundred times as slow on a CPU.
    torch.set_flush_denormal(True)
    try:
        sender.send(work(module))
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        sender.send({"module": module, "left_out": f"{type(error).__name__}: {line}"})


def in_a_process(context: Any, work: Callable[[str], Row], module: str) -> Row:
    """A row in a process of its own, which ends when its time is over."""
    receiver, sender = context.Pipe(False)
    process = context.Process(target=_child, args=(work, module, sender))
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


def reasons(
    rows: list[Row], wanted: str, measurements: Iterable[str] = tuple(MEASUREMENTS)
) -> list[str]:
    """A line for each reason of a status, with the models that have it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for measurement in measurements:
            if status(row, measurement) == wanted:
                text = (row.get(measurement) or row["left_out"]).partition(": ")[2]
                text = text.replace(f"{row.get('model')} (random)", "MODEL")
                line = f"{measurement}: {LABEL.sub('', text)}"
                found.setdefault(line, []).append(row["module"])
    return [f"- {line} ({len(who)}: {', '.join(who)})" for line, who in sorted(found.items())]


def feature_reasons(rows: list[Row]) -> list[str]:
    """How many tensors of ``feature_info`` are blocks, and a line for each other kind."""
    counted = [row["features"].split(" of ") for row in rows if row.get("features")]
    listed = [(int(among), int(number)) for among, number in counted if number != "0"]
    found: dict[str, list[str]] = {}
    for row in rows:
        for one in (row.get("features_elsewhere") or "").split("; "):
            name, _, what = one.rstrip(")").partition(" (")
            if what:
                found.setdefault(what, []).append(f"{row['module']}: {name}")
    if not listed:
        return []
    among, number = (sum(one) for one in zip(*listed))
    whole = sum(a == n for a, n in listed)
    first = f"- the output of a block: {among} of {number} tensors; all of those of {whole} of "
    lines = [f"- {what} ({len(who)}: {', '.join(who)})" for what, who in sorted(found.items())]
    return [f"{first}{len(listed)} models", *lines]


def count_again(out: Path) -> None:
    """The columns of counts anew, in this process; the others stay as they are."""
    table_of_timm = out / "coverage.csv"
    rows = read(table_of_timm)
    for row in rows:
        if not row["side"]:
            continue
        side = int(row["side"])
        model = load_model(f"{row['model']}@random", side)
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        try:
            row.update(counts(model, images))
        except VitprobeError as error:
            row.update(dict.fromkeys(COUNTS, ""), left_out=str(error))
        print(row["module"], *(row[name] for name in COUNTS[:3]), row["features"], flush=True)
        write(table_of_timm, COLUMNS, rows)


def totals(rows: list[Row], measurements: Iterable[str]) -> str:
    """How many of the rows have each status."""
    head = ["", *(name.replace("_", " ") for name in measurements)]
    body = [
        [of, *(str(sum(status(row, m) == of for row in rows)) for m in measurements)]
        for of in (YES, ABSENT, NO)
    ]
    return table(head, body)


def body(rows: list[Row], measurements: Iterable[str], first: Iterable[str]) -> str:
    """A line a model: its counts and, for each measurement, the sign of its status."""
    sign = {YES: "+", ABSENT: "", NO: "**no**"}
    lines = [
        [
            *(str(row.get(column, "")) for column in first), str(row.get("side", "")),
            row.get("heads", "").replace("x", "×"), str(row.get("additions", "")),
            str(row.get("blocks", "")), str(row.get("layers", "")),
            *(sign[status(row, m)] for m in measurements),
        ]
        for row in rows
    ]  # fmt: skip
    columns = [*first, "px", "heads × layers", "sums", "blocks", "layers"]
    return table([*columns, *(name.replace("_", " ") for name in measurements)], lines)


def markdown(rows: list[Row], theirs: list[Row]) -> str:
    """The totals, the table, and the reasons below it; then the same for other libraries."""
    everything = set(timm.list_modules())
    parts = [
        f"# The smallest model of {len(rows)} of timm {timm.__version__}'s {len(everything)} "
        "modules",
        f"Not run: {', '.join(everything - {row['module'] for row in rows}) or 'none'}.",
        "Random weights, the smallest side at which the model runs and keeps a grid, "
        f"{IMAGES} random images. Made by `python analyses/coverage.py`; all counts and lines "
        "are in [coverage.csv](coverage.csv).",
        totals(rows, MEASUREMENTS),
        NOTES,
        body(rows, MEASUREMENTS, ("module", "model")),
        f"## {NO.capitalize()}",
        "\n".join(reasons(rows, NO)) or "None.",
        f"## {ABSENT.capitalize()}",
        "The line that the user sees, and for how many of the models.",
        "\n".join(reasons(rows, ABSENT)),
    ]
    lines = feature_reasons(rows)
    if lines:
        parts += ["## Tensors of feature_info", FEATURES, "\n".join(lines)]
    if theirs:
        both = [*MEASUREMENTS, *LATER]
        parts += [
            "## Beyond timm",
            BEYOND,
            totals(theirs, both),
            body(theirs, both, ("module",)),
            f"### {NO.capitalize()}, beyond timm",
            "\n".join(reasons(theirs, NO, both)) or "None.",
            f"### {ABSENT.capitalize()}, beyond timm",
            "\n".join(reasons(theirs, ABSENT, both)),
        ]
    return "\n\n".join(parts) + "\n"


def read(path: Path) -> list[Row]:
    """The rows of a table; none where there is no such file."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write(path: Path, columns: Sequence[str], rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="of timm; all by default")
    parser.add_argument("--beyond", action="store_true", help="networks of other libraries")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "figures")
    parser.add_argument("--counts", action="store_true", help="only the counts of coverage.csv")
    args = parser.parse_args()
    if args.counts:
        count_again(args.out)
        finish(args.out)
        return
    if args.beyond:
        stem, work, columns = "coverage_beyond", row_beyond, COLUMNS_BEYOND
        wanted = [": ".join(key) for key, one in networks().items() if one.is_there]
    else:
        stem, work, columns = "coverage", row, COLUMNS
        wanted = args.modules or timm.list_modules()
    partial = args.out / f"{stem}.partial.csv"
    rows = read(partial)
    done = {one["module"] for one in rows}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"vitprobe.{name}" for name in (*MEASUREMENTS, *LATER)])
    for module in wanted:
        if module in done:
            continue
        found = in_a_process(context, work, module)
        with partial.open("a", newline="") as file:
            writer = csv.DictWriter(file, columns)
            if not rows:
                writer.writeheader()
            writer.writerow(found)
        rows.append(found)
        tally = Counter(status(found, m) for m in (*MEASUREMENTS, *LATER) if m in columns)
        print(module, found.get("model"), dict(tally), f"{found.get('seconds')} s", flush=True)
    if not args.beyond:
        rows.sort(key=lambda row: row["module"])
    write(args.out / f"{stem}.csv", columns, rows)
    finish(args.out)
    partial.unlink(missing_ok=True)


def finish(out: Path) -> None:
    """The page of both tables."""
    timms, theirs = (read(out / f"{one}.csv") for one in ("coverage", "coverage_beyond"))
    (out / "coverage.md").write_text(markdown(timms, theirs))


if __name__ == "__main__":
    main()
