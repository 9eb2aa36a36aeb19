"""How far half precision moves the numbers on trained weights: the table of tests/README.md.

    python analyses/precision.py DIR [--images 60] [--kinds bf16 fp16] [--only WORD ...]

DIR holds weights and images as for real_weights.py. ``bf16`` is --precision bf16; ``fp16`` and
``bfloat16`` are networks whose weights are of that type. For each number it prints the median and
the largest difference to float32, and the median standard error at that many images.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarking import table
from real_weights import CIFAR, CNN, SPECS, VIT, workplace

from vitprobe import linear_probe, measure_all, receptive_field
from vitprobe.models.loading import load_models
from vitprobe.models.model import Model

SIDE = 224
# Number, measurement, array, its error, whether differences are relative.
ROWS = (
    ("CKA", "cka", "cka", "cka_se", False),
    ("attention distance, px", "attention_distance", "distance_px", "distance_se", False),
    ("skip ratio", "skip_ratio", "ratio", "ratio_se", True),
    ("cosine of skip and branch", "skip_ratio", "cosine", "cosine_se", False),
    ("median norm of patches", "token_norms", "norm_median", "", True),
    ("largest norm of patches", "token_norms", "norm_max", "", True),
    ("CKA of a token with a patch", "localization", "cka", "", False),
    ("entropy of attention", "attention_statistics", "entropy", "entropy_se", False),
    ("Δ at the frequencies", "frequency", "delta", "delta_se", False),
    ("share of common neighbours", "neighbours", "alignment", "alignment_se", False),
    ("area with 90 % of the gradient", "receptive_field", "area90", "area90_se", False),
    ("accuracy of a probe", "linear_probe", "accuracy", "accuracy_se", False),
)
TYPES = {"fp16": torch.float16, "bfloat16": torch.bfloat16}


def networks(kind: str) -> list[Model]:
    """Both networks, in a type of their own where that is the kind."""
    found = load_models([SPECS[name] for name in (VIT, CNN)], SIDE, 0, [VIT, CNN])
    if kind not in TYPES:
        return found
    return [replace(one, module=copy.deepcopy(one.module).to(TYPES[kind])) for one in found]


def results(kind: str, count: int, wanted: set[str]) -> Iterator[tuple[str, Any]]:
    """The results of the measurements that are wanted, by name."""
    models = networks(kind)
    options = {"batch_size": 20, "precision": "bf16" if kind == "bf16" else "fp32",
               "device": "cpu"}  # fmt: skip
    few = {**options, "num_images": count}
    joint = [name for name in wanted if name not in ("receptive_field", "linear_probe")]
    if joint:
        asked = {"k": 5, "null": 0} if "neighbours" in joint else {}
        yield from measure_all(joint, models, "imagenet-sample", **asked, **few).items()
    if "receptive_field" in wanted:
        small = {**options, "num_images": 4, "batch_size": 4}
        yield "receptive_field", receptive_field.measure(models[0], "imagenet-sample", **small)
    if "linear_probe" in wanted:
        # Test images are told by --num-images; ten a class to fit on, drawn once.
        probed = {**options, "num_images": 5 * count, "draws": 1, "layers": "last"}
        yield "linear_probe", linear_probe.measure(models, CIFAR[1], test_images=CIFAR[3], **probed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="DIR", help="with the weights and images")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--kinds", nargs="+", default=["bf16", "fp16"])
    parser.add_argument("--only", nargs="+", default=[""], help="words in names of measurements")
    args = parser.parse_args()
    rows = [row for row in ROWS if any(word in row[1] for word in args.only)]
    wanted = {row[1] for row in rows}
    with workplace(args.source):
        _unpack()
        made: dict[str, dict[str, Any]] = {}
        for kind in ("fp32", *args.kinds):
            began = time.monotonic()
            made[kind] = dict(results(kind, args.images, wanted))
            print(f"{kind}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    shown = []
    for name, measurement, key, error, relative in rows:
        plain = made["fp32"][measurement]
        expected = plain.arrays()[key].astype(np.float64)
        told = [name]
        for kind in args.kinds:
            off = np.abs(made[kind][measurement].arrays()[key] - expected)
            off = off / np.abs(expected) if relative else off
            told += [_written(np.nanmedian(off), relative), _written(np.nanmax(off), relative)]
        spread = plain.arrays()[error] / (np.abs(expected) if relative else 1) if error else np.nan
        known = np.isfinite(spread).any()
        shown.append((*told, _written(np.nanmedian(spread), relative) if known else ""))
    heads = [f"{kind}, {what}" for kind in args.kinds for what in ("median", "largest")]
    print(table(("number", *heads, "standard error"), shown))
    return 0


def _written(value: float, relative: bool) -> str:
    return f"{100 * value:.2g} %" if relative else f"{value:.2g}"


def _unpack() -> None:
    """Archives of images that are not unpacked yet."""
    import tarfile

    for name in (CIFAR[1], CIFAR[3]):
        if not Path(name).exists() and Path(f"{name}.tar.gz").is_file():
            with tarfile.open(f"{name}.tar.gz") as tar:
                tar.extractall(name, filter="data")


if __name__ == "__main__":
    sys.exit(main())
