"""timm's networks: made, given their weights, with the transform that goes with them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprobe.errors import VitprobeError
from vitprobe.models.model import Model
from vitprobe.models.names import REMOTE_PREFIXES, bundled_models
from vitprobe.models.weights import file_sha256, first_line, hub, read_state_dict

HALF = (torch.float16, torch.bfloat16)
# Of a digest that a caption shows.
DIGITS = 8


def create(
    spec: str,
    name: str,
    timm_name: str,
    image_size: int | None,
    origin: str,
    overlay: dict[str, Any] | None = None,
) -> Model:
    """A timm network with its transform.

    Args:
        spec: as the user wrote it.
        name: what figures call it.
        timm_name: timm's name for it.
        image_size: side in pixels, or None for its own.
        origin: of the weights, in words; ``hub`` for timm's trained ones.
        overlay: timm's options for weights at hand.

    Raises:
        VitprobeError: it cannot be made, the weights do not fit, the hub is out of reach.
    """
    import timm

    from_hub = origin == "hub"
    options: dict[str, Any] = {"pretrained": from_hub or overlay is not None}
    if overlay is not None:
        options["pretrained_cfg_overlay"] = overlay
        options["num_classes"] = overlay["num_classes"]
    try:
        with hub() if from_hub else nullcontext():
            try:
                module = timm.create_model(timm_name, img_size=image_size, **options)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
                # A plain CNN has no image size to set: it takes any as it comes.
                module = timm.create_model(timm_name, **options)
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError, TypeError) as error:
        raise _explained(spec, name, image_size, overlay, error) from error
    config = config_of(module)
    config.pop("state_dict", None)
    architecture, details = str(config.get("architecture") or timm_name), {}
    if timm_name.startswith(REMOTE_PREFIXES):
        # A configuration may name the public checkpoint that someone's own weights began from.
        file = _file_of(timm_name, config)
        origin = f"{architecture}, weights of {_shown(timm_name)}"
        if file is not None:
            details = {"file": file.name, "file_sha256": file_sha256(file)}
            origin += f" (sha256 {details['file_sha256'][:DIGITS]}…)"
        timm_name = architecture
    elif from_hub:
        tag = config.get("tag", "")
        origin = f"{architecture}.{tag}" if tag else timm_name
    transform, size, key = timm_transform(module, image_size)
    return Model(name, module.eval(), transform, size, origin, timm_name, key, details)


def _shown(spec: str) -> str:
    """The spec of a repository; of a folder its name, as places on a machine are private."""
    source, _, place = spec.partition(":")
    if source != "local-dir":
        return spec
    return f"local-dir:{Path(place).expanduser().resolve().name}"


def _file_of(spec: str, config: dict[str, Any]) -> Path | None:
    """The weights file that timm has read for ``hf-hub:`` or ``local-dir:``, where it is found."""
    from huggingface_hub import try_to_load_from_cache

    source, _, place = spec.partition(":")
    names = [config.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin"]
    for name in filter(None, names):
        if source == "local-dir":
            found: Any = str(Path(place) / name)
        else:
            repository, _, revision = place.partition("@")
            found = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str) and Path(found).is_file():
            return Path(found)
    return None


def config_of(module: nn.Module) -> dict[str, Any]:
    """timm's record of where a model's weights come from."""
    config: Any = module.pretrained_cfg
    return config if isinstance(config, dict) else config.to_dict()


def _explained(
    spec: str, name: str, image_size: int | None, overlay: Any, error: Exception
) -> VitprobeError:
    reason = first_line(error)
    known = "ARCHITECTURE" if name.startswith(REMOTE_PREFIXES) else name
    bundled = ", ".join(list(bundled_models())[:3])
    ways = (
        f"Try {known}@random (untrained), {known}@FILE (weights on disk) or a bundled model "
        f"({bundled})."
    )
    if overlay is not None and "img_size" not in reason:
        return VitprobeError(f"{spec}: the weights do not fit the architecture: {reason}")
    if "No pretrained weights" in reason:
        return VitprobeError(f"timm has no trained weights for {name}. {ways}")
    if isinstance(error, OSError):
        return VitprobeError(
            f"The weights of {name} are not in the local cache, and the model hub cannot be "
            f"reached. {ways}"
        )
    if image_size is not None:
        return VitprobeError(f"{name} cannot be made for --image-size {image_size}: {reason}")
    return VitprobeError(f"{name} cannot be made: {reason}")


def timm_transform(module: nn.Module, image_size: int | None) -> tuple[Any, Any, str]:
    from timm.data import create_transform, resolve_model_data_config
    from timm.models import get_model_input_config

    # The data configuration alone ignores an img_size given at creation.
    size = tuple(get_model_input_config(module)["input_size"])
    if image_size is not None:
        size = (size[0], image_size, image_size)
    config = resolve_model_data_config(module, args={"input_size": size})
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


def file_overlay(timm_name: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's loading options for a local file, so that its head and position table fit."""
    from timm.models import get_pretrained_cfg

    state = read_state_dict(path)
    config = get_pretrained_cfg(timm_name, allow_unregistered=True)
    heads = getattr(config, "classifier", None) or ()
    heads = (heads,) if isinstance(heads, str) else heads
    found = [state[f"{head}.weight"].shape[0] for head in heads if f"{head}.weight" in state]
    # timm resamples a position table in float32 but keeps its type: half precision rounds it again.
    state = {k: v.float() if v.dtype in HALF else v for k, v in state.items()}
    overlay = {"state_dict": state, "num_classes": found[0] if found else 0, "custom_load": False}
    return overlay, file_details(path)


def file_details(path: Path) -> dict[str, Any]:
    """What provenance holds of a weights file."""
    return {"file": path.name, "file_sha256": file_sha256(path)}


def file_origin(architecture: str, details: dict[str, Any]) -> str:
    """Architecture, file and digest, as captions have them."""
    digest = details["file_sha256"][:DIGITS]
    return f"{architecture}, weights {details['file']} (sha256 {digest}…)"
