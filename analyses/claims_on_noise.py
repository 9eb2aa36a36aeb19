"""Every claim of the papers on twenty draws of networks that have learnt nothing.

    python analyses/claims_on_noise.py [--draws 20] [--only WORD ...]

Each draw makes a ViT, a ViT without a class token and a CNN from random weights, which nobody is
told are random, and digit scenes whose labels are shuffled; each claim is made of them as of
trained networks, and its verdicts are counted. Some claims are true of random networks as well:
attention without training is even, a residual stream keeps tokens in place, MLPs add detail. What
is said of no more than their chance must hold about once in forty times.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import timm
import torch
from benchmarking import table
from timm.models.vision_transformer import VisionTransformer

from vitprobe import (
    cka,
    linear_probe,
    localization,
    measure_all,
    neighbours,
    patch_pca,
    position_embedding,
    receptive_field,
    wrap,
)  # fmt: skip
from vitprobe.data.scenes import scenes
from vitprobe.errors import VitprobeError
from vitprobe.images.sources import Images, open_images
from vitprobe.models.model import Model
from vitprobe.results.result import FAILS, HOLDS, OPEN, Finding
from vitprobe.running.features import Source

SIDE, IMAGES = 32, 96
ONE_PASS = ["attention_distance", "head_subsets", "skip_ratio", "skip_ablation", "token_norms",
            "frequency", "occlusion"]  # fmt: skip


def prepared(image: Any) -> torch.Tensor:
    """Pixels from -1 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def networks(draw: int) -> list[Model]:
    """A ViT, one without a class token, and a CNN; every other draw has larger weights."""
    torch.manual_seed(draw)
    made: dict[str, torch.nn.Module] = {}
    for name, more in (("vit", {}), ("gap", {"class_token": False, "global_pool": "avg"})):
        more = {**more, "reg_tokens": 2 * (draw % 4 > 1)}
        made[name] = VisionTransformer(
            img_size=SIDE, patch_size=8, embed_dim=24, depth=6, num_heads=3, num_classes=10, **more
        )  # fmt: skip
    cnn = timm.create_model("resnet18", num_classes=10, zero_init_last=False)
    # As for small images: maps of 32, 16, 8 and 4.
    cnn.conv1.stride, cnn.maxpool = (1, 1), torch.nn.Identity()
    made["cnn"] = cnn
    with torch.no_grad():
        for name in ("vit", "gap"):
            torch.nn.init.normal_(made[name].pos_embed)
            for part, weight in made[name].named_parameters():
                if draw % 2 and part.endswith("weight") and weight.ndim == 2:
                    weight *= 5
    return [wrap(module.eval(), name, transform=prepared) for name, module in made.items()]


def images(draw: int) -> Images:
    """Scenes with the labels of others."""
    drawn = scenes(IMAGES, seed=draw)
    labels = np.random.default_rng(draw).permutation(np.asarray(drawn.labels))
    found = open_images(drawn.images, seed=draw)
    return replace(found, labels=labels, classes=tuple("0123456789"))


def claims(draw: int, wanted: Callable[[str], bool]) -> Iterator[Finding]:
    """Every finding of a draw."""
    models, shown = networks(draw), images(draw)
    options = {"batch_size": 12, "device": "cpu", "seed": draw, "workers": 0}
    chosen = [name for name in ONE_PASS if wanted(name)]
    own = {"levels": (0.5,), "shuffle": (4,)} if "occlusion" in chosen else {}
    if chosen:
        for result in measure_all(chosen, models, shown, **own, **options).values():
            yield from result.findings()
    if wanted("localization"):
        yield from localization.measure(models, shown, layers="blocks", **options).findings()
    if wanted("attention_statistics"):
        found = measure_all(["attention_statistics"], models[:2], shown, **options)
        result = found["attention_statistics"]
        for model, objective in zip(result.meta["models"], ("dino", "mae")):
            model["timm_name"] = f"vit.{objective}"
        yield from result.findings()
    if wanted("cka"):
        yield from cka.measure(models[::2], shown, null=200, **options).findings()
        yield from cka.measure(models[:2], shown, pairwise=True, **options).findings()
    if wanted("neighbours"):
        for readout in ("mean", "class"):
            result = neighbours.measure(models[::2], shown, readout=readout, **options)
            yield from result.findings()
    if wanted("patch_pca"):
        yield from patch_pca.measure(models, None, device="cpu", seed=draw).findings()
    if wanted("linear_probe"):
        probed = {**options, "shots": 2, "draws": 2}
        yield from linear_probe.measure(models, images_of_noise(draw), **probed).findings()
    if wanted("position_embedding"):
        yield from position_embedding.measure(models[:2]).findings()
    if wanted("receptive_field"):
        few = {**options, "num_images": 16}
        yield from receptive_field.measure(models[::2], shown, **few).findings()


def images_of_noise(draw: int) -> Images:
    """More scenes with the labels of others, for probes."""
    drawn = scenes(200, seed=draw)
    labels = np.random.default_rng(draw).permutation(np.asarray(drawn.labels))
    found = open_images(drawn.images, seed=draw)
    return replace(found, labels=labels, classes=tuple("0123456789"))


def unrelated(draw: int) -> Iterator[Finding]:
    """What is said of two networks that share nothing but their images: claims of a comparison."""
    generator = torch.Generator().manual_seed(draw)
    shapes = [(8, 8, 8)] * 3 + [(16, 4, 4)] * 3
    made = [
        Source(
            name,
            {f"layer {i}": torch.randn(IMAGES, 40, generator=generator).numpy() for i in range(6)},
            {
                "attends": attends,
                "layers": {f"layer {i}": {"of_image": shape} for i, shape in enumerate(shapes)},
                "models": [{"name": name, "weights": "nothing"}],
            },
        )
        for name, attends in (("one", True), ("other", False))
    ]
    yield from cka.from_features(made, batch_size=12, null=200).findings()
    yield from cka.from_features(made, batch_size=12, pairwise=True).findings()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[""], help="words in names of measurements")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    def wanted(name: str) -> bool:
        return any(word in name for word in args.only)

    counts: dict[tuple[str, str, str], Counter[str]] = {}
    numbers: dict[tuple[str, str, str], str] = {}
    for draw in range(args.draws):
        found = [("random weights", one) for one in claims(draw, wanted)]
        found += [("unrelated features", one) for one in unrelated(draw) if wanted("cka")]
        for what, one in found:
            key = one.source, one.brief, what
            counts.setdefault(key, Counter())[one.verdict] += 1
            if one.verdict == HOLDS:
                numbers[key] = one.numbers
        print(f"draw {draw + 1} of {args.draws}", file=sys.stderr, flush=True)
    rows = [
        (*key, str(count[HOLDS]), str(count[FAILS]), str(count[OPEN]))
        for key, count in sorted(counts.items())
    ]
    print(table(("source", "claim", "of", HOLDS, FAILS, OPEN), rows))
    for key, told in sorted(numbers.items()):
        print(f"{key[1]}: {re.sub(' +', ' ', told)}")


if __name__ == "__main__":
    try:
        main()
    except VitprobeError as error:
        sys.exit(str(error))
