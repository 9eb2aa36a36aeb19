"""Image -> tensor as a network wants it: by its own recipe where that is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import isclose, isfinite
from typing import Any

from torch import nn

from vitprobe.errors import VitprobeError, describe
from vitprobe.models.contents import Contents
from vitprobe.models.unpickling import StandIn

PREPROCESSOR = "preprocessor_config.json"
KEYS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
# PIL's numbers of its filters, as transformers writes them.
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

CROPS = ("center", "squash", "border")


def timm_transform(
    module: nn.Module, image_size: int | None, recipe: Mapping[str, Any] | None = None
) -> tuple[Any, Any, str]:
    """The transform of a timm network, its input size, and a text equal for equal transforms.

    Args:
        module: with timm's configuration.
        image_size: side in pixels, or None for its own.
        recipe: what takes the place of that configuration's entries.
    """
    from timm.data import create_transform, resolve_model_data_config
    from timm.models import get_model_input_config

    # The data configuration alone ignores an img_size given at creation.
    size = tuple(get_model_input_config(module)["input_size"])
    if image_size is not None:
        size = (size[0], image_size, image_size)
    config = resolve_model_data_config(module, args={**(recipe or {}), "input_size": size})
    if size[0] not in (1, 3):
        # Which channels those are, no transform can know.
        return None, size, ""
    if size[0] == 1:
        config |= {key: (sum(config[key]) / len(config[key]),) for key in ("mean", "std")}
    transform: Any = create_transform(**config, is_training=False)
    if size[0] == 1:
        transform = Grey(transform)
    return transform, size, json.dumps(config, sort_keys=True, default=str)


class Grey:
    """A transform for a network of one channel, which sees images as their luminance.

    Args:
        transform: of a PIL image of one channel.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Any:
        return self.transform(image.convert("L"))


def recipe_of(contents: Contents) -> tuple[dict[str, Any], str]:
    """What a file or the configuration beside it says of the transform, and which of them.

    Both are empty where neither says anything.

    Raises:
        VitprobeError: it says something that is no transform.
    """
    recipe, source = _recipe_of(contents)
    for key, value in recipe.items():
        if value and not _usable(key, value):
            raise VitprobeError(
                f"{contents.file}: {source} says that {key} is {value!r}, which is no {key} of a "
                f"transform."
            )
    return recipe, source


def _recipe_of(contents: Contents) -> tuple[dict[str, Any], str]:
    if contents.preprocessor:
        try:
            return _of_transformers(contents.preprocessor), PREPROCESSOR
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise VitprobeError(
                f"{contents.file}: {PREPROCESSOR} gives no transform: {describe(error)}"
            ) from error
    timm_config = contents.config.get("pretrained_cfg")
    if isinstance(timm_config, dict):
        return _chosen(timm_config), "config.json"
    arguments = contents.tree.get("args") if isinstance(contents.tree, dict) else None
    given = vars(arguments) if isinstance(arguments, StandIn) else arguments
    # timm's training script keeps its arguments; what was not given there is the architecture's.
    if isinstance(given, dict) and {"mean", "std", "interpolation", "crop_pct"} <= given.keys():
        return _chosen(given), "its training arguments"
    return {}, ""


def _chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: config[key] for key in KEYS if config.get(key) is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def _usable(key: str, value: Any) -> bool:
    """Whether a transform can be made with it."""
    if key in ("mean", "std"):
        channels = isinstance(value, tuple) and len(value) in (1, 3)
        numbers = channels and all(isinstance(v, int | float) and isfinite(v) for v in value)
        return numbers and (key == "mean" or min(value) > 0)
    if key == "crop_pct":
        return isinstance(value, int | float) and isfinite(value) and value > 0
    known = (*FILTERS.values(), "random") if key == "interpolation" else CROPS
    return value in known


def _of_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    recipe: dict[str, Any] = {}
    # Pixels times 255 times this are what the mean and deviation are of.
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255
    scale = 1.0 if isclose(scale, 1, rel_tol=1e-6) else scale
    if config.get("do_normalize", True) and config.get("image_mean") and config.get("image_std"):
        for key in ("mean", "std"):
            recipe[key] = tuple(value / scale for value in config[f"image_{key}"])
    elif config.get("do_normalize") is False:
        recipe = {"mean": (0.0, 0.0, 0.0), "std": (1.0 / scale,) * 3}
    if isinstance(config.get("resample"), int) and config["resample"] in FILTERS:
        recipe["interpolation"] = FILTERS[config["resample"]]
    size, crop = config.get("size"), config.get("crop_size")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else None
    side = crop.get("height") if isinstance(crop, dict) else crop
    if shortest and config.get("do_center_crop") and side:
        recipe |= {"crop_pct": side / shortest, "crop_mode": "center"}
    elif isinstance(size, dict) and "height" in size and not config.get("do_center_crop"):
        # Both sides to this size, whatever the image's shape.
        recipe |= {"crop_pct": 1.0, "crop_mode": "squash"}
    return recipe
