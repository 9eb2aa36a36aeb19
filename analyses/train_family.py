"""Train, ship and evaluate the small networks that vitprobe brings along.

    python analyses/train_family.py vit_small_box --out runs           # train, or resume training
    python analyses/train_family.py vit_small_box --out runs --export  # and write the shipped files
    python analyses/train_family.py --all --out runs --export          # every network, one by one
    python analyses/train_family.py --evaluate vit_small_box resnet_box
    python analyses/train_family.py my_vit --data cifar10-train.tar.gz --out runs

A ViT of the family is trained in two stages: on images of which three in four patches are left out
(``--pretrain masked``), without labels, then on labels. A ResNet is trained on labels alone.
``--start-from`` begins with the weights of another ViT instead.

Every image of the stream of digit scenes is seen once in a stage; ``--train-size N`` keeps both
stages to its first N. A name of the family sets the options' defaults (MEMBERS), with a seed of its
own. The last weights are taken, whatever the curve says: nothing is selected on the test scenes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import timm.layers
import torch
from masked_images import BETAS as MASKED_BETAS
from masked_images import (
    DEPTH,
    HEADS,
    MASKED,
    WIDTH,
    Decoder,
    masked_loss,
    masked_test_loss,
    masking,
)
from safetensors.torch import save
from torch import nn
from torch.nn.functional import cross_entropy
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
from training_stages import Stage, run, write_whole

from vitprobe import data
from vitprobe.data.scenes import scenes

# Images without labels, images with labels: a ViT's, and a ResNet's with labels.
MASKED_PICTURES, VIT_PICTURES, RESNET_PICTURES = 316_672, 100_000, 80_000
# The scenes vary by themselves. Varied further, a ViT trained on labels alone had 32 % right after
# 80,000 images; without, 62 %.
_VIT: dict[str, Any] = {
    "model": "vit",
    "pretrain": "masked",
    "pictures_seen": VIT_PICTURES,
    "learning_rate": 7e-4,
    "augment": False,
}
_RESNET: dict[str, Any] = {"model": "resnet", "pictures_seen": RESNET_PICTURES}
# In the order in which --all trains them. No two begin with the same weights.
MEMBERS: dict[str, dict[str, Any]] = {
    "vit_small_box": _VIT | {"seed": 1},
    "vit_gap_box": _VIT | {"seed": 2, "pool": "gap"},
    "vit_small_box_10pct": _VIT | {"seed": 3, "train_size": VIT_PICTURES // 10},
    "resnet_box": _RESNET | {"seed": 4},
    "resnet_box_10pct": _RESNET | {"seed": 5, "train_size": RESNET_PICTURES // 10},
    "vit_small_box_noskip3": _VIT | {"seed": 6, "no_skip": 3},
    "vit_small_box_noskip1": _VIT | {"seed": 7, "no_skip": 1},
    "vit_small_box_noskip5": _VIT | {"seed": 8, "no_skip": 5},
    "vit_small_box_1pct": _VIT | {"seed": 9, "train_size": VIT_PICTURES // 100},
    "resnet_box_1pct": _RESNET | {"seed": 10, "train_size": RESNET_PICTURES // 100},
}
SIZES: dict[tuple[str, str], dict[str, Any]] = {
    ("vit", "tiny"): {"embed_dim": 16, "depth": 2, "num_heads": 4},
    ("vit", "small"): {"embed_dim": 128, "depth": 6, "num_heads": 4},
    ("vit", "large"): {"embed_dim": 160, "depth": 9, "num_heads": 5},
    ("resnet", "tiny"): {"channels": [4, 8, 8, 8], "stem_width": 2},
    # As many weights as the small ViT, 1.1 and 1.2 million; ten such networks take 24 MB.
    ("resnet", "small"): {"channels": [20, 40, 80, 160], "stem_width": 10},
}
TEST_PICTURES = 10_000
BETAS = (0.9, 0.98)


def describe(name: str, options: argparse.Namespace, pictures: SceneStream | ClassFolders) -> dict:
    """The model card as far as it is known before training."""
    kwargs: dict[str, Any] = SIZES[options.model, options.size] | {
        "num_classes": len(pictures.classes)
    }
    card: dict[str, Any] = {"name": name}
    if options.model == "vit":
        card["timm_model"] = "vit_base_patch16_224"
        kwargs |= {"img_size": SIDE_PX, "patch_size": 4}
        # On labels alone a patch's embedding drowns its place beside timm's 0.02: 17 % right after
        # 33,000 images, with 0.2 28 %.  Masked images teach places by themselves.
        card["position_init_std"] = 0.02 if options.pretrain else 0.2
        if options.pool == "gap":
            kwargs |= {"class_token": False, "global_pool": "avg"}
    else:
        card |= {"timm_model": "resnet18", "small_stem": True}
        kwargs |= {"stem_type": "deep"}
    card["timm_kwargs"] = kwargs
    if options.no_skip is not None:
        card["no_skip_block"] = options.no_skip
    common = {
        "pictures": pictures.description,
        "distinct_pictures": options.train_size or "as many as seen",
        "schedule": "linear warm-up over a twentieth of the steps, then a cosine to 0",
        "weight_decay": options.weight_decay,
        "precision": options.precision,
        "augmentation": augmentation(pictures) if options.augment else "none",
    }
    card |= {
        "mean": MEAN,
        "std": STD,
        "input_size": [3, SIDE_PX, SIDE_PX],
        "classes": list(pictures.classes),
        "seed": options.seed,
    }
    if options.pretrain:
        card["pretraining"] = common | {
            "objective": f"masked images (arXiv 2111.06377): {MASKED:.0%} of the patches left out, "
            "their pixels, normalised in each patch, predicted",
            "decoder": f"{DEPTH} blocks, {WIDTH} wide, {HEADS} heads; not kept",
            "optimizer": optimizer(MASKED_BETAS),
            "learning_rate": options.pretrain_learning_rate,
            "batch_size": options.pretrain_batch_size,
            "pictures_seen": whole(options.pretrain_pictures_seen, options.pretrain_batch_size),
        }
    return card | {
        "recipe": common
        | {
            "start": started(options),
            "optimizer": optimizer(BETAS),
            "learning_rate": options.learning_rate,
            "batch_size": options.batch_size,
        },
        "pictures_seen": whole(options.pictures_seen, options.batch_size),
    }


def whole(pictures: int, batch_size: int) -> int:
    """Images of whole batches."""
    return pictures // batch_size * batch_size


def optimizer(betas: tuple[float, float]) -> str:
    return f"AdamW, betas {betas[0]} and {betas[1]}, gradient norm clipped to 1"


def augmentation(pictures: SceneStream | ClassFolders) -> str:
    text = augment.__doc__.split(", for")[0]
    return text + (", left-right flip" if pictures.flip else "")


def beginning(source: str) -> tuple[dict[str, torch.Tensor], str]:
    """Weights to start from, a shipped network's or a checkpoint's, and what they are."""
    if source in data.names():
        card = data.load_card(source)
        return data.build(card).state_dict(), f"{source} after {card['pictures_seen']:,} images"
    state = torch.load(source, map_location="cpu", weights_only=True)
    seen = state["log"][-1]["pictures_seen"]
    return state["module"], f"{state['card']['name']} after {seen:,} images"


def started(options: argparse.Namespace) -> str:
    """Where the stage of labels began, for the card."""
    if options.pretrain:
        seen = whole(options.pretrain_pictures_seen, options.pretrain_batch_size)
        distinct = options.train_size or seen
        times = f", {round(seen / distinct)} times each" if options.train_size else ""
        return f"masked pretraining on {distinct:,} images{times}"
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
) -> tuple[nn.Module, dict]:
    """The trained network and its card with what the stages took.

    Resumes from the checkpoints in OUT/NAME: ``masked.pt`` and, of the stage of labels,
    ``checkpoint.pt``.
    """
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    module = data.build(card, trained=False).to(device).train()
    stop, told = options.stop_after or sys.maxsize, {}
    if options.pretrain:
        stage = masked_stage(module, options, pictures)
        # What is only of the other stage may change before that one begins.
        own = {key: value for key, value in card.items() if key not in ("recipe", "pictures_seen")}
        with masking(module):
            log = run(stage, own, options, pictures, min(stop, stage.steps))
        told["masked"] = log[-1]
        if stop <= stage.steps:
            return module.eval(), card
        stop -= stage.steps
    elif options.start_from:
        start_from(module, options.start_from)
    stage = label_stage(module, options, pictures)
    told["labels"] = run(stage, card, options, pictures, min(stop, stage.steps))[-1]
    minutes = {name: round(last["minutes"], 1) for name, last in told.items()}
    card = card | {"minutes": minutes, "trained_on": torch.device(options.device).type}
    if options.pretrain:
        card["masked_test_loss"] = told["masked"]["test_loss"]
    return module.eval(), card


def masked_stage(
    module: nn.Module, options: argparse.Namespace, pictures: SceneStream | ClassFolders
) -> Stage:
    device = torch.device(options.device)
    decoder = Decoder(module).to(device)
    return Stage(
        parts={"module": module, "decoder": decoder},
        loss=lambda images, labels: masked_loss(module, decoder, images),
        test=lambda: {"test_loss": masked_test_loss(module, decoder, pictures.test, device)},
        stem="masked",
        log_stem="masked",
        images=options.pretrain_pictures_seen,
        batch_size=options.pretrain_batch_size,
        learning_rate=options.pretrain_learning_rate,
        betas=MASKED_BETAS,
    )


def label_stage(
    module: nn.Module, options: argparse.Namespace, pictures: SceneStream | ClassFolders
) -> Stage:
    device = torch.device(options.device)
    return Stage(
        parts={"module": module},
        loss=lambda images, labels: cross_entropy(module(images).float(), labels),
        test=lambda: {"test_accuracy": accuracy(module, pictures.test, device)},
        stem="checkpoint",
        log_stem="log",
        images=options.pictures_seen,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        betas=BETAS,
    )


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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with a family member's own defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(MEMBERS)}, or a new name")
    parser.add_argument("--all", action="store_true", help="every network of the family in turn")
    parser.add_argument("--evaluate", nargs="+", metavar="NAME", help="test shipped networks")
    parser.add_argument("--test-pictures", type=int, default=TEST_PICTURES, help="for --evaluate")
    parser.add_argument("--model", choices=("vit", "resnet"), default="vit")
    parser.add_argument("--size", choices=("tiny", "small", "large"), default="small")
    parser.add_argument("--pool", choices=("cls", "gap"), default="cls", help="of a ViT")
    parser.add_argument("--no-skip", type=int, metavar="BLOCK", help="a ViT block without skips")
    parser.add_argument("--pictures-seen", type=int, default=VIT_PICTURES, help="with labels")
    parser.add_argument("--pretrain", choices=("masked",), help="a stage without labels before")
    parser.add_argument("--pretrain-pictures-seen", type=int, default=MASKED_PICTURES)
    parser.add_argument("--pretrain-batch-size", type=int, default=128)
    parser.add_argument("--pretrain-learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--train-size", type=int, metavar="N", help="distinct training images")
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
    parser.add_argument(
        "--stop-after", type=int, metavar="STEPS", help="of all stages; resume later"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--export", action="store_true", help="write the shipped files at the end")
    name = parser.parse_known_args(arguments)[0].name
    parser.set_defaults(**MEMBERS.get(name, {}))
    options = parser.parse_args(arguments)
    # A CPU without instructions for bf16 takes twenty times as long with it.
    options.precision = options.precision or ("fp32" if options.device == "cpu" else "bf16")
    if not options.name and not options.evaluate and not options.all:
        parser.error("expected the name of a network to train, --all or --evaluate NAME")
    if (options.model, options.size) not in SIZES:
        parser.error(f"there is no {options.size} {options.model}")
    if options.model == "resnet" and (options.no_skip is not None or options.pool == "gap"):
        parser.error("--no-skip and --pool are for a ViT")
    if options.pretrain and (options.model == "resnet" or options.start_from):
        parser.error("--pretrain is for a ViT that begins with random weights")
    return options


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    for name in options.evaluate or []:
        evaluate(name, options.test_pictures)
    if options.all:
        others = [word for word in arguments if word != "--all"]
        for name in MEMBERS:
            train_member(parse([name, *others]))
    elif options.name:
        train_member(options)


def train_member(options: argparse.Namespace) -> None:
    """Train one network, and write the shipped files if asked to; not again by the same recipe."""
    if options.device == "cpu":
        # The fused attention's backward pass is the slowest operation of all on a CPU.
        timm.layers.set_fused_attn(False)
    source: SceneStream | ClassFolders
    if options.data:
        source = ClassFolders(options.data, options.train_size, options.seed)
    else:
        source = SceneStream(options.train_size, options.seed)
    card = describe(options.name, options, source)
    if options.export and is_shipped(card):
        print(f"{options.name}: trained by this recipe already", flush=True)
        return
    module, card = train(card, options, source)
    if options.export and not options.stop_after:
        ship(card, module)


def is_shipped(card: dict) -> bool:
    """Whether a network of this name and recipe is bundled."""
    return card["name"] in data.names() and card.items() <= data.load_card(card["name"]).items()


if __name__ == "__main__":
    main()
