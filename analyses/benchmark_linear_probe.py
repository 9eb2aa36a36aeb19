"""What linear probes cost: against the bare forward passes, and against scikit-learn in a loop.

    python analyses/benchmark_linear_probe.py                        # 1,000 test images
    python analyses/benchmark_linear_probe.py --blocks 2 --tests 50  # sooner

All tokens and blocks of an untrained ViT-S/16 at 224 px: 12 blocks with
196 patch tokens, the class token, the mean, and all side by side; 10 classes, 10 images a class to
fit on. Every batch runs through the bare model just before it runs through the probes, so that both
see the same load on the machine; ``x forward`` is the whole measurement, start-up and solving
included, over the sum of the bare passes. Scikit-learn fits and predicts on features that are there
already: single probes are timed between the batches, and their median multiplied by the number of
tokens and blocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import numpy as np
import timm
import torch
from benchmarking import machine, publish, table
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vitprobe import linear_probe
from vitprobe.core.images import Images, open_images
from vitprobe.core.ridge import PENALTIES
from vitprobe.core.running import Session

CLASSES, SHOTS, TOKENS, WIDTH, SIDE_PX = 10, 10, 196, 384, 224
PEERS = {
    "RidgeClassifierCV": lambda: RidgeClassifierCV(alphas=PENALTIES.numpy()),
    "LogisticRegression": lambda: LogisticRegression(max_iter=1000),
}


@dataclass
class Clock:
    """Seconds of the bare passes, of everything between them, and of scikit-learn's probes."""

    bare: float = 0.0
    batches: int = 0
    peers: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PEERS})
    aside: float = 0.0

    def timed(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        self.aside += seconds
        return seconds


def labelled(count: int, seed: int) -> Images:
    """Random images with labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = open_images(torch.randn(count, 3, SIDE_PX, SIDE_PX, generator=generator))
    return replace(images, labels=np.arange(count) % CLASSES, classes=tuple("0123456789"))


def time_peers(clock: Clock, tests: int) -> None:
    """One probe of each peer on stored features of the same sizes."""
    generator = np.random.default_rng(clock.batches)
    centres = generator.normal(size=(CLASSES, WIDTH))
    labels, truth = np.arange(CLASSES * SHOTS) % CLASSES, np.arange(tests) % CLASSES
    rows = (centres[labels] + 3 * generator.normal(size=(len(labels), WIDTH))).astype(np.float32)
    others = (centres[truth] + 3 * generator.normal(size=(tests, WIDTH))).astype(np.float32)
    for name, make in PEERS.items():
        model = make_pipeline(StandardScaler(), make())
        seconds = clock.timed(lambda model=model: model.fit(rows, labels).score(others, truth))
        clock.peers[name].append(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=int, default=1000, help="test images (%(default)s)")
    parser.add_argument("--blocks", type=int, default=12, help="of the ViT (%(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--readme", action="store_true", help="also write the table there")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, bare = (
        timm.create_model("vit_small_patch16_224", num_classes=0, depth=args.blocks).eval()
        for _ in range(2)
    )
    bare.to(args.device)
    probes = args.blocks * TOKENS
    clock = Clock()
    original = Session.run

    def forward(inputs: torch.Tensor) -> None:
        bare(inputs)
        if args.device == "cuda":
            torch.cuda.synchronize()

    def run(self: Session, step: Callable, sums: dict, **options: object) -> None:
        def both(batch: object) -> None:
            if not clock.batches:
                clock.timed(lambda: forward(batch.inputs[0]))  # warms up, counts for nobody
            clock.bare += clock.timed(lambda: forward(batch.inputs[0]))
            clock.batches += 1
            time_peers(clock, args.tests)
            step(batch)

        original(self, both, sums, **options)

    with patch.object(Session, "run", run), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images, test_images = labelled(CLASSES * SHOTS, 0), labelled(args.tests, 1)
        began = time.perf_counter()
        linear_probe.measure(
            model, images, test_images=test_images, shots=SHOTS, draws=1, device=args.device,
            batch_size=args.batch_size,
        )  # fmt: skip
    total = time.perf_counter() - began - clock.aside
    probing = total - clock.bare
    rows = [
        ("bare forward passes", f"{clock.bare:.1f}", "1"),
        ("vitprobe, all in all", f"{total:.1f}", f"{total / clock.bare:.2f} x forward"),
        ("vitprobe without the passes", f"{probing:.1f}", ""),
    ]
    for name, seconds in clock.peers.items():
        loop = probes * statistics.median(seconds)
        ratio = f"{loop / probing:.1f} x vitprobe without the passes"
        rows.append((f"scikit-learn's {name} in a loop", f"{loop:.1f}", ratio))
    text = f"{machine(args.device)}; ViT-S/16, {SIDE_PX} px, {probes} token probes, "
    text += f"{CLASSES * SHOTS} fitting and {args.tests} test images.\n\n"
    publish("benchmark_linear_probe", text + table(("what", "s", "ratio"), rows), args.readme)


if __name__ == "__main__":
    main()
