"""What linear probes cost: against the bare forward passes, and against scikit-learn in a loop.

    python analyses/benchmark_linear_probe.py                        # 1,000 test images
    python analyses/benchmark_linear_probe.py --blocks 2 --tests 50  # sooner

All tokens and blocks of an untrained ViT-S/16 at 224 px: 12 blocks with
196 patch tokens, the class token, the mean, and all side by side; 10 classes, 10 images a class to
fit on. Every batch runs through the bare model just before it runs through the probes, so that both
see the same load on the machine; ``x forward`` is the whole measurement, start-up and solving
included, over the sum of the bare passes. Scikit-learn standardises, fits and scores stored
features of the same run, three tokens of every block in a loop; the mean of these is multiplied by
the number of tokens and blocks. It runs after the passes, where nothing else does, and on one
thread, with which it is faster at this size. Against it stands what vitprobe does with features
that are there: fitting and testing, all readouts.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import timm
import torch
from benchmarking import machine, publish, seconds, table
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from vitprobe import linear_probe
from vitprobe.images.sources import Images, open_images
from vitprobe.running import probes as core_probes
from vitprobe.running.probes import Probe
from vitprobe.running.session import Session
from vitprobe.statistics.ridge import PENALTIES

CLASSES, SHOTS, TOKENS, SIDE_PX = 10, 10, 196, 224
# Tokens whose features are kept for scikit-learn: corner, about the centre, corner.
KEPT = [0, 105, 195]
PEERS = {
    "RidgeClassifierCV": lambda: RidgeClassifierCV(alphas=PENALTIES.numpy()),
    "LogisticRegression": lambda: LogisticRegression(max_iter=1000),
}


@dataclass
class Clock:
    """Seconds of the bare passes, and of vitprobe's probes on features that are there."""

    bare: float = 0.0
    fitting: float = 0.0
    testing: float = 0.0
    aside: float = 0.0


def labelled(count: int, seed: int) -> Images:
    """Random images with labels in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = open_images(torch.randn(count, 3, SIDE_PX, SIDE_PX, generator=generator))
    return replace(images, labels=np.arange(count) % CLASSES, classes=tuple("0123456789"))


class Stored:
    """Features of some tokens of every layer, for fitting and for testing, with their labels."""

    def __init__(self) -> None:
        self.fit: list[tuple[np.ndarray, np.ndarray]] = []
        self.test: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def __iter__(self):
        for (rows, labels), batches in zip(self.fit, self.test.values()):
            others, truth = (np.concatenate(parts) for parts in zip(*batches))
            for v in range(len(KEPT)):
                yield rows[:, v].copy(), labels, others[:, v].copy(), truth


def some(features: torch.Tensor, labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return features[:, KEPT].cpu().numpy(), labels.cpu().numpy()


def peer_seconds(make: Callable[[], object], stored: Stored) -> float:
    """One probe's, in a loop over those of which features are stored."""
    ready = list(stored)

    def loop() -> None:
        for rows, labels, others, truth in ready:
            make_pipeline(StandardScaler(), make()).fit(rows, labels).score(others, truth)

    with threadpool_limits(1):
        loop()
        return seconds(loop) / len(ready)


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
    clock, stored = Clock(), Stored()
    run, fit, correct = Session.run, core_probes.fit_probe, Probe.correct

    def timed_run(self: Session, step: Callable, sums: dict, **options: object) -> None:
        def both(batch: object) -> None:
            def forward() -> None:
                bare(batch.inputs[0])

            if not clock.bare:
                clock.aside += seconds(forward, args.device)  # warms up, counts for nobody
            took = seconds(forward, args.device)
            clock.bare += took
            clock.aside += took
            step(batch)

        run(self, both, sums, **options)

    def timed_fit(features: torch.Tensor, labels: torch.Tensor, classes: int) -> Probe:
        stored.fit.append(some(features, labels))
        found = []
        clock.fitting += seconds(lambda: found.append(fit(features, labels, classes)), args.device)
        return found[0]

    def timed_correct(self: Probe, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        stored.test.setdefault(id(self), []).append(some(features, labels))
        found = []
        clock.testing += seconds(lambda: found.append(correct(self, features, labels)), args.device)
        return found[0]

    images, test_images = labelled(CLASSES * SHOTS, 0), labelled(args.tests, 1)
    with (
        patch.object(Session, "run", timed_run),
        patch.object(core_probes, "fit_probe", timed_fit),
        patch.object(Probe, "correct", timed_correct),
    ):
        began = time.perf_counter()
        linear_probe.measure(
            model, images, test_images=test_images, shots=SHOTS, draws=1, device=args.device,
            batch_size=args.batch_size,
        )  # fmt: skip
    total = time.perf_counter() - began - clock.aside
    probing = clock.fitting + clock.testing
    rows = [
        ("bare forward passes", f"{clock.bare:.1f}", "1"),
        ("vitprobe, all in all", f"{total:.1f}", f"{total / clock.bare:.2f} x forward"),
        ("of it beside the passes", f"{total - clock.bare:.1f}", ""),
        ("of that fitting", f"{clock.fitting:.2f}", ""),
        ("of that testing", f"{clock.testing:.2f}", ""),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in PEERS.items():
            loop = probes * peer_seconds(make, stored)
            ratio = f"{loop / probing:.1f} x fitting and testing"
            rows.append((f"scikit-learn's {name} in a loop", f"{loop:.1f}", ratio))
    text = f"{machine(args.device)}; ViT-S/16, {SIDE_PX} px, {probes} token probes, "
    text += f"{CLASSES * SHOTS} fitting and {args.tests} test images.\n\n"
    publish("benchmark_linear_probe", text + table(("what", "s", "ratio"), rows), args.readme)


if __name__ == "__main__":
    main()
