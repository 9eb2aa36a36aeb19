"""What the configuration beside a weights file says of the network, and that it is this one."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from vitprobe.errors import VitprobeError
from vitprobe.models.contents import Contents, class_names
from vitprobe.models.unpickling import StandIn

# transformers' activations -> the class names of the same functions in torch and timm.
ACTIVATIONS = {
    "gelu": ("GELU",),
    "quick_gelu": ("QuickGELU", "QuickGELUActivation"),
    "gelu_new": ("GELUTanh",),
    "gelu_pytorch_tanh": ("GELUTanh",),
    "relu": ("ReLU",),
    "silu": ("SiLU",),
    "swish": ("SiLU",),
}

# OpenAI's approximation of GELU, with the same weights another network.
QUICK = "QuickGELU"
# Options of a network that do not come from a file: its weights, which are in it, and its classes,
# which are counted there.
NOT_OF_FILES = ("num_classes", "pretrained", "pretrained_cfg", "checkpoint_path", "cache_dir")


def check_architecture(spec: str, timm_name: str, contents: Contents) -> dict[str, Any]:
    """Options of the network that timm's configuration beside a file gives.

    Raises:
        VitprobeError: the file says that it is of an architecture that computes something else.
    """
    import timm

    asked = timm_name.partition(".")[0]
    told, arguments = _architecture(contents)
    if not told or told == asked or not timm.is_model(told):
        return arguments if told == asked else {}
    if _drawn(asked) != _drawn(told):
        raise VitprobeError(
            f"{spec}: the file says that it is of the architecture {told}, which is another "
            f"network than {asked}. Try {told}@{spec.partition('@')[2]}."
        )
    return {}


def settle(spec: str, module: nn.Module, contents: Contents) -> dict[str, Any]:
    """Give a network what transformers' configuration says and no tensor shows.

    Raises:
        VitprobeError: the file's network has another activation, or an impossible epsilon.
    """
    _same_kind(spec, module, contents)
    config = contents.config
    if "model_type" not in config:
        return {}
    vision = config.get("vision_config")
    config = {**config, **(vision if isinstance(vision, dict) else {})}
    told = str(config.get("hidden_act") or "")
    wanted = ACTIVATIONS.get(told, (told,)) if told else None
    activations = {type(part).__name__ for name, part in module.named_modules()
                   if re.search(r"mlp\.act$", name)}  # fmt: skip
    if wanted == ("GELUTanh",) and activations == {"GELU"}:
        # The same function but for the approximation, which torch's own module can be told.
        for name, part in module.named_modules():
            if re.search(r"mlp\.act$", name) and isinstance(part, nn.GELU):
                part.approximate = "tanh"
        activations = {part for part in wanted}
    if wanted and activations and not activations & set(wanted):
        raise VitprobeError(
            f"{spec}: the file's network computes {config['hidden_act']}, this architecture "
            f"{', '.join(sorted(activations))}: it is another network. timm's names of networks "
            f"with QuickGELU contain 'quickgelu'."
        )
    epsilon = config.get("layer_norm_eps")
    if epsilon is not None and not (isinstance(epsilon, float) and 0 < epsilon < 1):
        raise VitprobeError(f"{spec}: config.json gives layer_norm_eps as {epsilon!r}.")
    changed = False
    for part in module.modules():
        if isinstance(part, nn.LayerNorm) and epsilon is not None and part.eps != epsilon:
            part.eps, changed = epsilon, True
    return {"layer_norm_eps": epsilon} if changed else {}


def _same_kind(spec: str, module: nn.Module, contents: Contents) -> None:
    """Modules that were saved whole name their classes, the activation's among them."""
    classes = class_names(contents.tree)
    theirs = any(QUICK in name for name in classes)
    if classes and theirs != any(QUICK in type(part).__name__ for part in module.modules()):
        raise VitprobeError(
            f"{spec}: the file's network computes with {QUICK if theirs else 'another function'}, "
            f"this architecture {'does not' if theirs else f'with {QUICK}'}: it is another "
            f"network. timm's names of networks with {QUICK} contain 'quickgelu'."
        )


def _architecture(contents: Contents) -> tuple[str, dict[str, Any]]:
    """timm's name of an architecture in a file or beside it, and how the network was made."""
    if "architecture" in contents.config:
        arguments = contents.config.get("model_args") or {}
        if not isinstance(arguments, dict):
            raise VitprobeError(f"{contents.file}: model_args of its config.json are no object.")
        arguments = {key: value for key, value in arguments.items() if key not in NOT_OF_FILES}
        return str(contents.config["architecture"]), arguments
    tree = contents.tree if isinstance(contents.tree, dict) else {}
    said = tree.get("args")
    given = vars(said) if isinstance(said, StandIn) else said
    for told in (tree.get("arch"), given.get("model") if isinstance(given, dict) else None):
        if isinstance(told, str):
            return told.partition(".")[0], {}
    return "", {}


def _drawn(architecture: str) -> str:
    """What a network computes, as far as its layers say so; its image size is none of it."""
    import timm

    with torch.device("meta"):
        return repr(timm.create_model(architecture, num_classes=0))
