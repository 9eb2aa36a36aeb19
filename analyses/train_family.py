"""Train, ship and evaluate the small networks that vitprobe brings along.

    python analyses/train_family.py vit_small_box --out runs           # train, or go on training
    python analyses/train_family.py vit_small_box --out runs --export  # and write the shipped files
    python analyses/train_family.py --evaluate vit_small_box resnet_box
    python analyses/train_family.py my_vit --data cifar10-train.tar.gz --out runs

The ViT that averages its tokens starts from one with a class token, part of its way:

    python analyses/train_family.py vit_small_box --out begun --stop-after 1500
    python analyses/train_family.py vit_gap_box --start-from begun/vit_small_box/checkpoint.pt

and one without the skips of a block from the shipped one with all skips.

Every picture of the stream of digit scenes is seen once; ``--train-size N`` keeps to its first N.
A name of the family sets the options' defaults (MEMBERS).  The last weights are taken, whatever the
curve says: nothing is selected on the test scenes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm.layers
import torch
from safetensors.torch import save
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from training_pictures import (
    MEAN,
    SIDE_PX,
    STD,
    ClassFolders,
    Pictures,
    SceneStream,
    augment,
    normalised,
)

from vitprobe import data
from vitprobe.data.scenes import scenes

VIT_PICTURES, RESNET_PICTURES = 320_000, 80_000
# The scenes vary by themselves. Varied further, the ViT had 32 % right after 80,000 pictures;
# without, 62 %.
_VIT: dict[str, Any] = {"model": "vit", "pictures_seen": VIT_PICTURES, "augment": False}
# From random weights it was still at chance after 96,000 pictures: a block without skips begins by
# giving all tokens their mean.
_SKIPLESS = _VIT | {"start_from": "vit_small_box", "pictures_seen": 160_000}
_RESNET: dict[str, Any] = {"model": "resnet", "pictures_seen": RESNET_PICTURES}
MEMBERS: dict[str, dict[str, Any]] = {
    "vit_small_box": _VIT,
    # From random weights it was still at chance after 64,000 pictures: see --start-from.
    "vit_gap_box": _VIT | {"pool": "gap", "pictures_seen": 160_000},
    "resnet_box": _RESNET,
    "vit_small_box_10pct": _VIT | {"train_size": VIT_PICTURES // 10},
    "vit_small_box_1pct": _VIT | {"train_size": VIT_PICTURES // 100},
    "resnet_box_10pct": _RESNET | {"train_size": RESNET_PICTURES // 10},
    "resnet_box_1pct": _RESNET | {"train_size": RESNET_PICTURES // 100},
    **{f"vit_small_box_noskip{block}": _SKIPLESS | {"no_skip": block} for block in range(6)},
    "vit_large_box": _VIT | {"size": "large"},
    "vit_large_box_10pct": _VIT | {"size": "large", "train_size": VIT_PICTURES // 10},
}
SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("vit", "tiny"): {"embed_dim": 16, "depth": 2, "num_heads": 4},
    ("vit", "small"): {"embed_dim": 128, "depth": 6, "num_heads": 4},
    ("vit", "large"): {"embed_dim": 160, "depth": 9, "num_heads": 5},
    ("resnet", "tiny"): {"channels": [4, 8, 8, 8], "stem_width": 2},
    ("resnet", "small"): {"channels": [32, 64, 128, 256], "stem_width": 16},
}
TEST_PICTURES = 10_000


def describe(name: str, options: argparse.Namespace, pictures: SceneStream | ClassFolders) -> dict:
    """The model card as far as it is known before training."""
    kwargs: dict[str, Any] = SIZES[options.model, options.size] | {
        "num_classes": len(pictures.classes)
    }
    card: dict[str, Any] = {"name": name}
    if options.model == "vit":
        card["timm_model"] = "vit_base_patch16_224"
        kwargs |= {"img_size": SIDE_PX, "patch_size": 4}
        # Beside timm's 0.02 a patch's embedding drowns its place: 17 % right after 33,000 pictures,
        # with 0.2 28 %.  Random all the same: what structure the table has, it has learned.
        card["position_init_std"] = 0.2
        if options.pool == "gap":
            kwargs |= {"class_token": False, "global_pool": "avg"}
    else:
        card |= {"timm_model": "resnet18", "small_stem": True}
        kwargs |= {"stem_type": "deep"}
    card["timm_kwargs"] = kwargs
    if options.no_skip is not None:
        card["no_skip_block"] = options.no_skip
    augmentation = augment.__doc__.split(", for")[0]
    augmentation += ", left-right flip" if pictures.flip else ""
    return card | {
        "mean": MEAN,
        "std": STD,
        "input_size": [3, SIDE_PX, SIDE_PX],
        "classes": list(pictures.classes),
        "recipe": {
            "pictures": pictures.description,
            "distinct_pictures": options.train_size or "as many as seen",
            "start": started(options),
            "optimizer": "AdamW, betas 0.9 and 0.98, gradient norm clipped to 1",
            "schedule": "linear warm-up over a twentieth of the steps, then a cosine to 0",
            "learning_rate": options.learning_rate,
            "weight_decay": options.weight_decay,
            "batch_size": options.batch_size,
            "precision": options.precision,
            "augmentation": augmentation if options.augment else "none",
        },
        "pictures_seen": options.pictures_seen // options.batch_size * options.batch_size,
        "seed": options.seed,
    }


def beginning(source: str) -> tuple[dict[str, torch.Tensor], str]:
    """Weights to start from, a shipped network's or a checkpoint's, and what they are."""
    if source in data.names():
        card = data.load_card(source)
        return data.build(card).state_dict(), f"{source} after {card['pictures_seen']:,} images"
    state = torch.load(source, map_location="cpu", weights_only=True)
    seen = state["log"][-1]["pictures_seen"]
    return state["module"], f"{state['card']['name']} after {seen:,} images"


def started(options: argparse.Namespace) -> str:
    """Where the weights began, for the card."""
    if not options.start_from:
        return "random weights"
    text = beginning(options.start_from)[1]
    return f"{text}, without its class token" if options.pool == "gap" else text


def accuracy(module: nn.Module, pictures: Pictures, device: torch.device) -> float:
    """Share of images whose label gets the highest output, in float32."""
    was_training = module.training
    module.eval()
    right = 0
    with torch.inference_mode():
        for first in range(0, len(pictures[1]), 250):
            images, labels = (array[first : first + 250] for array in pictures)
            right += int(
                (module(normalised(images, device)).argmax(1).cpu().numpy() == labels).sum()
            )
    module.train(was_training)
    return right / len(pictures[1])


def train(
    card: dict, options: argparse.Namespace, pictures: SceneStream | ClassFolders
) -> nn.Module:
    """The trained network; goes on from OUT/NAME/checkpoint.pt where there is one."""
    folder = options.out / card["name"]
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    module = data.build(card, trained=False).to(device).train()
    if options.start_from:
        start_from(module, options.start_from)
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    n = options.batch_size
    steps, first_step, log, loss_sum = options.pictures_seen // n, 0, [], 0.0
    checkpoint_path = folder / "checkpoint.pt"
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path, map_location=device, weights_only=True)
        if state["card"] != card:
            raise SystemExit(f"{checkpoint_path} was trained by another recipe: move it away first")
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        first_step, log = state["step"], state["log"]
    stop = min(steps, options.stop_after or steps)
    started = time.monotonic()
    bar = tqdm(range(first_step, stop), initial=first_step, total=steps, disable=None, unit_scale=n)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * schedule(step, steps)
        images, labels = pictures.batch(step * n, n)
        if options.augment:
            # A generator per step: an interrupted run goes on with what it would have seen.
            images = augment(images, np.random.default_rng([options.seed, step]), pictures.flip)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            outputs = module(normalised(images, device))
        loss = cross_entropy(outputs.float(), torch.from_numpy(labels).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        loss_sum += loss.item()
        if (step + 1) % options.log_every == 0 or step + 1 == stop:
            since = step + 1 - (log[-1]["step"] if log else 0)
            log.append(
                {
                    "step": step + 1,
                    "pictures_seen": (step + 1) * n,
                    "loss": loss_sum / since,
                    "test_accuracy": accuracy(module, pictures.test, device),
                    "pictures_per_s": (step + 1 - first_step) * n / (time.monotonic() - started),
                }
            )
            loss_sum = 0.0
            bar.set_postfix(log[-1])
            state = {"card": card, "module": module.state_dict(), "step": step + 1, "log": log}
            write_whole(checkpoint_path, state | {"optimizer": optimizer.state_dict()})
            lines = "".join(json.dumps(entry) + "\n" for entry in log)
            (folder / "log.jsonl").write_text(lines, encoding="utf-8")
    return module.eval()


def start_from(module: nn.Module, source: str) -> None:
    """Begin with the weights of another ViT; a class token that there is none of stays behind."""
    weights = beginning(source)[0]
    own = module.state_dict()
    rows = own["pos_embed"].shape[1]
    weights["pos_embed"] = weights["pos_embed"][:, -rows:]
    # timm names the last normalisation after what it normalises: the tokens or their mean.
    for name in ("norm.weight", "norm.bias"):
        if f"fc_{name}" in own:
            weights[f"fc_{name}"] = weights.pop(name)
    if "cls_token" not in own:
        weights.pop("cls_token", None)
    module.load_state_dict(weights)


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: linear warm-up over a twentieth, then a cosine to 0."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def ship(card: dict, module: nn.Module) -> dict:
    """Write the float16 weights and the finished card where ``vitprobe.data`` finds them."""
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in module.cpu().state_dict().items()
    }
    content = save({key: value.contiguous() for key, value in half.items()})
    card = card | {
        "weights": data.weights_path(card["name"]).name,
        "dtype": "float16",
        "sha256": hashlib.sha256(content).hexdigest(),
        "licence": "Apache-2.0",
    }
    write_whole(data.weights_path(card["name"]), content)
    card_path = data.weights_path(card["name"]).with_suffix(".json")
    write_whole(card_path, json.dumps(card, indent=1).encode())
    if card["recipe"]["pictures"] == SceneStream.description:
        card |= {"test_accuracy": evaluate(card["name"], TEST_PICTURES), "test_n": TEST_PICTURES}
        write_whole(card_path, (json.dumps(card, indent=1) + "\n").encode())
    return card


def evaluate(name: str, n: int) -> float:
    """Accuracy of the shipped file on the first n test scenes."""
    test = scenes(n, split="test", size=SIDE_PX)
    module = data.build(data.load_card(name))
    share = accuracy(module, (test.images, test.labels), torch.device("cpu"))
    error = math.sqrt(share * (1 - share) / n)
    print(f"{name}: {share:.4f} ± {error:.4f} on {n} test scenes", flush=True)
    return share


def write_whole(path: Path, content: dict | bytes) -> None:
    """Write beside and rename, so that a kill leaves the old file or the new one."""
    beside = path.with_name(path.name + ".part")
    if isinstance(content, bytes):
        beside.write_bytes(content)
    else:
        torch.save(content, beside)
    os.replace(beside, path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with a family member's own defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(MEMBERS)}, or a new name")
    parser.add_argument("--evaluate", nargs="+", metavar="NAME", help="test shipped networks")
    parser.add_argument("--test-pictures", type=int, default=TEST_PICTURES, help="for --evaluate")
    parser.add_argument("--model", choices=("vit", "resnet"), default="vit")
    parser.add_argument("--size", choices=("tiny", "small", "large"), default="small")
    parser.add_argument("--pool", choices=("cls", "gap"), default="cls", help="of a ViT")
    parser.add_argument("--no-skip", type=int, metavar="BLOCK", help="a ViT block without skips")
    parser.add_argument("--pictures-seen", type=int, default=VIT_PICTURES)
    parser.add_argument("--train-size", type=int, metavar="N", help="distinct training pictures")
    parser.add_argument("--data", type=Path, metavar="PATH", help="folder or tar of class folders")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument(
        "--start-from",
        metavar="FILE",
        help="checkpoint of another ViT, or the name of a shipped one",
    )
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="bf16 on a card, fp32 on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--log-every", type=int, default=250, metavar="STEPS", help="and checkpoint"
    )
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="stop there, go on later")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--export", action="store_true", help="write the shipped files at the end")
    name = parser.parse_known_args(arguments)[0].name
    parser.set_defaults(**MEMBERS.get(name, {}))
    options = parser.parse_args(arguments)
    # A CPU without instructions for bf16 takes twenty times as long with it.
    options.precision = options.precision or ("fp32" if options.device == "cpu" else "bf16")
    if not options.name and not options.evaluate:
        parser.error("expected the name of a network to train, or --evaluate NAME")
    if (options.model, options.size) not in SIZES:
        parser.error(f"there is no {options.size} {options.model}")
    if options.model == "resnet" and (options.no_skip is not None or options.pool == "gap"):
        parser.error("--no-skip and --pool are for a ViT")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.evaluate or []:
        evaluate(name, options.test_pictures)
    if not options.name:
        return
    if options.device == "cpu":
        # The fused attention's backward pass is the slowest operation of all on a CPU.
        timm.layers.set_fused_attn(False)
    source: SceneStream | ClassFolders
    if options.data:
        source = ClassFolders(options.data, options.train_size, options.seed)
    else:
        source = SceneStream(options.train_size, options.seed)
    card = describe(options.name, options, source)
    module = train(card, options, source)
    if options.export and not options.stop_after:
        ship(card, module)


if __name__ == "__main__":
    main()
