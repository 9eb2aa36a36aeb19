"""What CKA costs: time and memory against the bare forward passes, and against two peers.

    python analyses/benchmark_cka.py                        # CPU
    python analyses/benchmark_cka.py --quick                # fewer repeats
    python analyses/benchmark_cka.py --device cuda --precision bf16

Untrained timm models see the same random batch again and again, so neither decoding nor downloading
counts. The forward passes are those of the models as timm makes them; on a CPU vitprobe lays CNNs
out channels last, so "x last" compares with passes of models and images laid out that way, too.
"Memory" is the peak of a process of its own above that of a process that only runs the forward
passes. Start-up (finding the layers) happens once and stands apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import timm
import torch
from benchmarking import compare, in_child, instead_of_the_loop, machine, peak_gib, publish, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from vitprobe import cka

PEERS = {"pytorch-cka": "cka", "torch-cka": "torch_cka"}
LARGE, SMALL = "ViT-S/16 x ResNet-50, 224 px", "ResNet-18 x ResNet-18, 64 px"
PAIRS = {
    LARGE: ("vit_small_patch16_224", "resnet50", 224),
    SMALL: ("resnet18", "resnet18", 64),
}
VARIANTS = {
    LARGE: ("blocks", "all", "pytorch-cka"),
    # torch-cka forms a Gram again for every pair: on the large pair that takes minutes a batch.
    SMALL: ("blocks", "all", "pytorch-cka", "torch-cka"),
}
WARM_UP = 2
HEADER = (
    "pair", "what", "layers", "forward s", "batch s", "x forward", "x last", "memory GiB",
    "start-up s",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What one process measures; handed to it as JSON."""

    pair: str
    variant: str
    batch: int
    device: str
    precision: str
    repeats: int

    def models(self) -> list[nn.Module]:
        torch.manual_seed(0)
        made = []
        for name in PAIRS[self.pair][:2]:
            # Branches that start at 0 do not vary, and torch-cka stops at such layers.
            options = {"zero_init_last": False} if name.startswith("resnet") else {}
            made.append(timm.create_model(name, **options).eval().to(self.device))
        return made

    def images(self, batches: int = 1) -> Tensor:
        size = PAIRS[self.pair][2]
        return torch.randn(
            self.batch * batches, 3, size, size, generator=torch.Generator().manual_seed(1)
        )

    def forward(self, models: list[nn.Module], images: Tensor) -> None:
        """The bare forward passes of one batch."""
        bf16 = torch.autocast(self.device, dtype=torch.bfloat16)
        with torch.inference_mode(), bf16 if self.precision == "bf16" else nullcontext():
            for model in models:
                model(images)

    def measure(self, models: list[nn.Module], images: Tensor) -> cka.CKAResult:
        return cka.measure(
            models,
            images,
            layers=self.variant,
            batch_size=self.batch,
            device=self.device,
            precision=self.precision,
        )

    def peer(self, models: list[nn.Module]) -> tuple[int, Callable[[Tensor], Any]]:
        """(layers, step) of another package, over every module that runs."""
        library = import_module(PEERS[self.variant])
        layers = [_running(model, self.images()[:2].to(self.device)) for model in models]
        if self.variant == "torch-cka":
            run = library.CKA(*models, None, None, *layers, device=self.device)
            return sum(map(len, layers)), lambda images: run.compare(_loader(images))
        run = library.CKA(*models, *layers, device=self.device).__enter__()
        return sum(map(len, layers)), lambda images: run._compare(_loader(images), progress=False)


def _running(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the modules that run; pytorch-cka stops at one that does not."""
    ran: dict[str, None] = {}
    with torch.inference_mode(), ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                note = module.register_forward_hook(lambda *_, name=name: ran.setdefault(name))
                stack.callback(note.remove)
        model(images)
    return list(ran)


def _loader(images: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(images), len(images))


def timed(setting: Setting) -> dict[str, float]:
    """Layers, seconds a batch without and with the measurement, their ratios, and start-up."""
    models, bare = setting.models(), setting.models()  # Peers leave hooks on theirs.
    images = setting.images()
    on_device = images.to(setting.device)
    found: dict[str, float] = {}

    def against_bare(work: Callable[[], Any]) -> None:
        found["start_s"] = time.perf_counter() - began
        cost = compare(
            lambda: setting.forward(bare, on_device), work, setting.repeats, setting.device, WARM_UP
        )
        found.update(asdict(cost))
        if setting.variant not in PEERS:
            last = torch.channels_last
            laid_out = [model.to(memory_format=last) for model in bare]
            batch = on_device.contiguous(memory_format=last)
            found["ratio_last"] = compare(
                lambda: setting.forward(laid_out, batch),
                work, setting.repeats, setting.device, WARM_UP,
            ).ratio  # fmt: skip

    began = time.perf_counter()
    if setting.variant in PEERS:
        found["layers"], step = setting.peer(models)
        against_bare(lambda: step(on_device))
    else:
        with instead_of_the_loop(lambda batch, step, _: against_bare(lambda: step(batch))):
            found["layers"] = len(setting.measure(models, images).layers)
    return found


def peak(setting: Setting) -> float:
    """Peak memory, in GiB, of a process that does nothing else; two batches."""
    models, images = setting.models(), setting.images(2)
    batches = [batch.to(setting.device) for batch in images.split(setting.batch)]
    if setting.variant in PEERS or setting.variant == "forward":
        step = setting.peer(models)[1] if setting.variant in PEERS else None
        for batch in batches:
            step(batch) if step else setting.forward(models, batch)
    else:
        setting.measure(models, images)
    return peak_gib(setting.device)


def asked(what: str, setting: Setting) -> Any:
    """A function of this file, by name, in a process of its own."""
    return in_child(__file__, "--child", what, json.dumps(asdict(setting)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15, help="timed batches")
    parser.add_argument("--quick", action="store_true", help="3 timed batches")
    parser.add_argument("--readme", action="store_true", help="also write the table there")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work = {"timed": timed, "peak": peak}[args.child[0]]
        print(json.dumps(work(Setting(**json.loads(args.child[1])))))
        return
    repeats = 3 if args.quick else args.repeats
    common = (args.batch_size, args.device, args.precision, repeats)
    missing = [name for name, package in PEERS.items() if not find_spec(package)]
    rows = []
    for pair, variants in VARIANTS.items():
        alone = asked("peak", Setting(pair, "forward", *common))
        for variant in variants:
            # Under autocast the peers' Grams would be bfloat16 too.
            if variant in missing or (variant in PEERS and args.precision == "bf16"):
                continue
            setting = Setting(pair, variant, *common)
            t, memory = asked("timed", setting), asked("peak", setting) - alone
            last = f"{t['ratio_last']:.2f}" if "ratio_last" in t else ""
            rows.append(
                (pair, variant, str(t["layers"]), f"{t['bare_s']:.3f}", f"{t['work_s']:.3f}",
                 f"{t['ratio']:.2f}", last, f"{memory:+.2f}", f"{t['start_s']:.1f}")
            )  # fmt: skip
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    text = f"{machine(args.device)}; {args.precision}, batches of {args.batch_size}, medians of "
    text += f"{repeats}.\n\n{table(HEADER, rows)}"
    publish("benchmark_cka", text, args.readme)
    if missing:
        names = " ".join(missing)
        print(f"\nNot installed: {names} (pip install --no-deps {names})")


if __name__ == "__main__":
    main()
