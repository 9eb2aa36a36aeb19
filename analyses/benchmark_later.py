"""What the measurements of later papers add to a pass that others make anyway.

    python analyses/benchmark_later.py                # CPU
    python analyses/benchmark_later.py --quick        # fewer repeats
    python analyses/benchmark_later.py --each         # each alone, too

Untrained timm models see the same random batch again and again, as in ``benchmark_cka``. A cost is
the time of a batch over that of the bare forward passes of both models; what all of them add is the
cost of CKA and attention distance with them minus that without.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

import timm
import torch
from benchmarking import compare, instead_of_the_loop, machine, publish, table

from vitprobe.models.loading import wrap
from vitprobe.running.measurement import Measurement
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_each

MODELS, SIZE = ("vit_small_patch16_224", "resnet50"), 224
OTHERS = ("cka", "attention_distance")
LATER = ("token_norms", "attention_statistics", "frequency", "neighbours", "patch_pca")


def cost(names: tuple[str, ...], batch: int, device: str, repeats: int) -> float:
    """Seconds of a batch with these measurements over those of the bare forward passes."""
    torch.manual_seed(0)
    # Branches that start at 0 do not vary.
    bare = [timm.create_model(MODELS[0]), timm.create_model(MODELS[1], zero_init_last=False)]
    bare = [module.eval().to(device) for module in bare]
    models = [wrap(module, name) for module, name in zip(bare, MODELS)]
    images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    found: list[float] = []

    def forward(inputs: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for module, given in zip(bare, inputs):
                module(given)

    def against_bare(first: Any, step: Any, _: Any) -> None:
        found.append(
            compare(lambda: forward(first.inputs), lambda: step(first), repeats, device).ratio
        )

    asked: dict[str, Measurement] = {
        name: import_module(f"vitprobe.{name}").MEASUREMENT() for name in names
    }
    with instead_of_the_loop(against_bare):
        measure_each(asked, models, images, Options(batch_size=batch, device=device))
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9, help="timed batches")
    parser.add_argument("--quick", action="store_true", help="3 timed batches")
    parser.add_argument("--each", action="store_true", help="each added alone, too")
    parser.add_argument("--readme", action="store_true", help="also write the table there")
    args = parser.parse_args()
    how = args.batch_size, args.device, 3 if args.quick else args.repeats
    without = cost(OTHERS, *how)
    chosen = {"all of them": LATER}
    if args.each:
        chosen |= {name: (name,) for name in LATER}
    rows = [(" and ".join(OTHERS), f"{without:.2f}", "")]
    for label, names in chosen.items():
        together = cost((*OTHERS, *names), *how)
        rows.append((f"with {label}", f"{together:.2f}", f"{together - without:+.2f}"))
        print(" | ".join(rows[-1]), flush=True)
    text = f"{' x '.join(MODELS)}, {SIZE} px; {machine(args.device)}; batches of {how[0]}, medians "
    text += f"of {how[2]}.\n\n{table(('measured', 'x forward', 'added'), rows)}"
    publish("benchmark_later", text, args.readme)


if __name__ == "__main__":
    main()
