"""What a user writes for a model: aliases, bundled names, timm's names; and how figures call it."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from vitprobe.errors import VitprobeError, nearest

REMOTE_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
# Endings of weights files, which are no part of a label; longer ones first.
ENDINGS = (".safetensors.index.json", ".bin.index.json", ".pth.tar", ".pt.tar", ".ckpt.tar")

# The papers' models and their usual company -> timm's names of the nearest public weights.
# Raghu et al. use JFT-300M weights, which were never published; these are ImageNet's.
ALIASES = {
    "vit_ti16": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_s16": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_s32": "vit_small_patch32_224.augreg_in21k_ft_in1k",
    "vit_b16": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_b32": "vit_base_patch32_224.augreg_in21k_ft_in1k",
    "vit_l16": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "vit_l32": "vit_large_patch32_224.orig_in21k",
    "vit_h14": "vit_huge_patch14_224.orig_in21k",
    "hybrid_r50_b16": "vit_base_r50_s16_224.orig_in21k",
    "deit_ti16": "deit_tiny_patch16_224.fb_in1k",
    "deit_s16": "deit_small_patch16_224.fb_in1k",
    "deit_b16": "deit_base_patch16_224.fb_in1k",
    "dino_s16": "vit_small_patch16_224.dino",
    "dino_b16": "vit_base_patch16_224.dino",
    "dinov2_s14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_b14": "vit_base_patch14_dinov2.lvd142m",
    "beit_b16": "beit_base_patch16_224.in22k_ft_in22k_in1k",
    # OpenAI trained with QuickGELU; timm has the same weights under GELU, which is another network.
    "clip_b16": "vit_base_patch16_clip_quickgelu_224.openai",
    "mae_b16": "vit_base_patch16_224.mae",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "mobilevit_s": "mobilevit_s.cvnets_in1k",
    "coatnet_0": "coatnet_0_rw_224.sw_in1k",
    "mixer_b16": "mixer_b16_224.goog_in21k_ft_in1k",
    "convnext_t": "convnext_tiny.fb_in1k",
    # torchvision's plain recipe is the nearest to the papers' ResNets.
    "resnet18": "resnet18.tv_in1k",
    "resnet34": "resnet34.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "resnet152": "resnet152.tv_in1k",
    "bit_r50x1": "resnetv2_50x1_bit.goog_in21k",
    "bit_r50x3": "resnetv2_50x3_bit.goog_in21k",
    "bit_r101x1": "resnetv2_101x1_bit.goog_in21k",
    "bit_r152x2": "resnetv2_152x2_bit.goog_in21k",
    "seresnet50": "seresnet50.ra2_in1k",
    "halonet50": "halonet50ts.a1h_in1k",
}


@cache
def bundled_models() -> dict[str, dict[str, Any]]:
    """The cards of the models that come with vitprobe, by name."""
    from vitprobe import data

    return {name: data.load_card(name) for name in data.names()}


def label(spec: str) -> str:
    """What figures call the model of a spec.

    A file's weights are a model of their own: they are called by the file, never by the public
    network whose architecture they share. The same goes for folders and repositories of a hub.
    """
    if spec.startswith(REMOTE_PREFIXES):
        source, _, place = spec.partition(":")
        return (
            _own(Path(os.path.expanduser(place)).resolve().name) if source == "local-dir" else place
        )
    where, factory = factory_parts(spec)
    if factory:
        return f"{where.removesuffix('.py').replace('/', '.').rpartition('.')[2]}:{factory}"
    name, _, weights = spec.partition("@")
    if weights == "random":
        return f"{name} (random)"
    return _own(_stem(Path(weights))) if weights else name


def factory_parts(spec: str) -> tuple[str, str]:
    """Where one's own code is and the name in it, of ``WHERE:NAME``; empty for other specs."""
    where, _, name = spec.rpartition(":")
    if spec.startswith(REMOTE_PREFIXES) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name):
        return "", ""
    known = where.endswith(".py") or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", where)
    return (where, name) if known else ("", "")


def _stem(path: Path) -> str:
    """A file's name without the ending of its format."""
    for ending in ENDINGS:
        if path.name.endswith(ending) and path.name != ending:
            return path.name.removesuffix(ending)
    return path.stem


def _own(name: str) -> str:
    """A file's name, told apart from a public network of the same name."""
    import timm

    architecture = name.partition(".")[0]
    public = name in ALIASES or name in bundled_models() or timm.is_model(architecture)
    return f"{name} (file)" if public else name


def check_known(name: str, timm_name: str) -> None:
    import timm

    architecture, _, tag = timm_name.partition(".")
    if not timm.is_model(architecture):
        known = [*ALIASES, *bundled_models(), *timm.list_models()]
        raise VitprobeError(
            f"--models: no such model: {name!r}.{nearest(name, known)} `vitprobe models` lists "
            f"all of them."
        )
    tags = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and timm_name not in tags:
        raise VitprobeError(
            f"--models: timm has no weights {tag!r} for {architecture}; it has "
            f"{', '.join(t.partition('.')[2] for t in tags) or 'none'}."
        )
