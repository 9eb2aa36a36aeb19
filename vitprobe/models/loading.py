"""A name -> a ready model: module, its own transform, its input size, its weights' origin.

A model is written ``NAME``, ``NAME@random`` or ``NAME@FILE``. NAME is an alias of the papers, a
bundled model, or any timm name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import VitprobeError, nearest
from vitprobe.models.weights import file_sha256, first_line, hub, read_state_dict

HALF = (torch.float16, torch.bfloat16)
REMOTE_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")

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
    "clip_b16": "vit_base_patch16_clip_224.openai",
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


@dataclass(frozen=True)
class Model:
    """A network with what a measurement must know about it.

    Attributes:
        name: what figures call it.
        module: the network.
        transform: PIL image -> tensor (C, H, W) as the network wants it; None where only tensors
            can be given.
        input_size: (C, H, W) of that tensor; None where unknown.
        origin: where the weights come from, in words.
        timm_name: timm's name, empty for other modules.
        transform_key: equal for two models whose transforms do the same; empty where nothing is
            known of what it does.
        details: what else provenance should hold (file, its sha256, the model card).
    """

    name: str
    module: nn.Module
    transform: Callable[[Any], Tensor] | None = None
    input_size: tuple[int, int, int] | None = None
    origin: str = "given module"
    timm_name: str = ""
    transform_key: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def untrained(self) -> bool:
        return self.origin.startswith("random")

    def weights_sha256(self) -> str:
        """sha256 over the names, types, shapes and bytes of the state dict."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            tensor = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What a result file says about this model; plain JSON values."""
        return {
            "name": self.name,
            "timm_name": self.timm_name,
            "weights": self.origin,
            "weights_sha256": self.weights_sha256(),
            "input_size": list(self.input_size) if self.input_size else None,
            "transform": self.transform_key or ("given" if self.transform else ""),
            **self.details,
        }


def load_model(spec: str, image_size: int | None = None, seed: int = 0) -> Model:
    """Load ``NAME``, ``NAME@random`` or ``NAME@FILE``.

    Args:
        spec: as above. NAME is a paper alias (``vit_b16``), a bundled model, or a timm name
            (``vit_base_patch16_224.augreg_in21k``, ``hf-hub:owner/name@revision``). FILE is a
            safetensors file or a state dict, read without executing anything in it.
        image_size: side in pixels for a model that allows another one than its own; its position
            table is resampled by timm.
        seed: of the untrained weights; the caller's random state is left as it was.

    Raises:
        VitprobeError: no such model or file, weights that do not fit, the hub out of reach.
    """
    if spec.startswith(REMOTE_PREFIXES):
        # A hub name keeps its own ``@revision``.
        return _create(spec, spec, spec, image_size, "hub")
    name, _, weights = spec.partition("@")
    if not name:
        raise VitprobeError(f"The model {spec!r} has no name before its '@'.")
    if name in bundled_models():
        return _bundled(spec, name, weights, image_size, seed)
    timm_name = ALIASES.get(name, name)
    _check_known(name, timm_name)
    if not weights:
        return _create(spec, name, timm_name, image_size, "hub")
    if weights == "random":
        label = f"{name} (random)"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _create(spec, label, timm_name, image_size, f"random (seed {seed})")
        return model
    path = Path(weights).expanduser()
    overlay, details = _file_overlay(timm_name, path)
    model = _create(spec, name, timm_name, image_size, f"file {path.name}", overlay)
    return replace(model, details=details)


def wrap(
    module: nn.Module,
    name: str | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Model:
    """Any ``nn.Module`` as a model.

    Args:
        module: takes a float tensor (n, C, H, W); its outputs may be tensors, tuples or dicts.
        name: what figures call it; its class name by default.
        transform: PIL image -> tensor (C, H, W). Without one, timm's models get their own and
            other modules can be given tensors only.
        input_size: (C, H, W), where known.
    """
    if not isinstance(module, nn.Module):
        raise VitprobeError(f"A model must be a name or an nn.Module, not {type(module).__name__}.")
    name = name or type(module).__name__
    timm_name = key = ""
    if transform is None and getattr(module, "pretrained_cfg", None):
        transform, size, key = _timm_transform(module, input_size[1] if input_size else None)
        input_size = input_size or size
        timm_name = str(_config(module).get("architecture", ""))
    return Model(name, module, transform, input_size, timm_name=timm_name, transform_key=key)


def load_models(models: Any, image_size: int | None = None, seed: int = 0) -> list[Model]:
    """One model or several, each a spec, a module or a ``Model``; equal names get a number."""
    if isinstance(models, str | nn.Module | Model):
        models = [models]
    loaded: list[Model] = []
    for model in models:
        if isinstance(model, str):
            model = load_model(model, image_size, seed)
        elif not isinstance(model, Model):
            model = wrap(model)
        names = [other.name for other in loaded]
        if model.name in names:
            number = 2 + sum(n.startswith(f"{model.name} #") for n in names)
            model = replace(model, name=f"{model.name} #{number}")
        loaded.append(model)
    if not loaded:
        raise VitprobeError("At least one model is needed.")
    return loaded


@cache
def bundled_models() -> dict[str, dict[str, Any]]:
    """The cards of the models that come with vitprobe, by name."""
    from vitprobe import data

    return {name: data.load_card(name) for name in data.names()}


def _bundled(spec: str, name: str, weights: str, image_size: int | None, seed: int) -> Model:
    from vitprobe.data import build

    card = bundled_models()[name]
    size = tuple(card["input_size"])
    if image_size not in (None, size[1]):
        raise VitprobeError(f"{name} takes {size[1]} px only, not {image_size}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(card, trained=not weights)
    transform = _eval_transform(size, card["mean"], card["std"])
    key = f"digit scenes {size} mean {card['mean']} std {card['std']}"
    base = Model(name, module, transform, size, timm_name=card["timm_model"], transform_key=key)
    if weights == "random":
        return replace(base, name=f"{name} (random)", origin=f"random (seed {seed})")
    if not weights:
        return replace(base, origin=_trained(card), details={"card": card})
    path = Path(weights).expanduser()
    try:
        module.load_state_dict(read_state_dict(path))
    except RuntimeError as error:
        raise VitprobeError(
            f"{spec}: the weights do not fit {name}: {first_line(error)}"
        ) from error
    details: dict[str, Any] = {"file": path.name, "file_sha256": file_sha256(path)}
    return replace(base, origin=f"file {path.name}", details=details)


def _trained(card: dict[str, Any]) -> str:
    """What a bundled network has been trained on."""
    recipe = card["recipe"]
    count, distinct = card["pictures_seen"], recipe["distinct_pictures"]
    times = ""
    if isinstance(distinct, int):
        count, times = distinct, f", {round(count / distinct)} times each"
    start = recipe.get("start", "random weights")
    begun = "" if start == "random weights" else f"from {start}, then "
    return f"bundled, {begun}trained on {count:,} pictures{times}"


def _eval_transform(size: tuple[int, int, int], mean: list[float], std: list[float]) -> Any:
    from timm.data import create_transform

    return create_transform(
        size, is_training=False, mean=tuple(mean), std=tuple(std), crop_pct=1.0,
        interpolation="bicubic",
    )  # fmt: skip


def _check_known(name: str, timm_name: str) -> None:
    import timm

    architecture, _, tag = timm_name.partition(".")
    if not timm.is_model(architecture):
        known = [*ALIASES, *bundled_models(), *timm.list_models()]
        raise VitprobeError(
            f"There is no model {name!r} among the aliases, the bundled models or timm's."
            f"{nearest(name, known)}"
        )
    tags = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and timm_name not in tags:
        raise VitprobeError(
            f"timm's {architecture} has no weights {tag!r}; it has "
            f"{', '.join(t.partition('.')[2] for t in tags) or 'none'}."
        )


def _create(
    spec: str,
    name: str,
    timm_name: str,
    image_size: int | None,
    origin: str,
    overlay: dict[str, Any] | None = None,
) -> Model:
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
    config = _config(module)
    config.pop("state_dict", None)
    if from_hub:
        tag, architecture = config.get("tag", ""), config.get("architecture", timm_name)
        origin = f"{architecture}.{tag}" if tag else timm_name
    transform, size, key = _timm_transform(module, image_size)
    return Model(name, module.eval(), transform, size, origin, timm_name, key)


def _config(module: nn.Module) -> dict[str, Any]:
    """timm's record of where a model's weights come from."""
    return vars(module)["pretrained_cfg"]


def _explained(
    spec: str, name: str, image_size: int | None, overlay: Any, error: Exception
) -> VitprobeError:
    reason = first_line(error)
    ways = f"Ways on: {name}@random (untrained), {name}@FILE (weights at hand)"
    if name.startswith(REMOTE_PREFIXES):
        ways = "Ways on: ARCHITECTURE@random (untrained), ARCHITECTURE@FILE (weights at hand)"
    bundled = ", ".join(list(bundled_models())[:3])
    ways += f", or a bundled model ({bundled})." if bundled else "."
    if overlay is not None and "img_size" not in reason:
        return VitprobeError(f"{spec}: the weights do not fit the architecture: {reason}")
    if "No pretrained weights" in reason:
        return VitprobeError(f"timm has no trained weights for {name}. {ways}")
    if isinstance(error, OSError):
        return VitprobeError(
            f"The weights of {name} are not in the local cache and the model hub cannot be "
            f"reached. {ways}"
        )
    if image_size is not None:
        return VitprobeError(f"{name} cannot be made for --image-size {image_size}: {reason}")
    return VitprobeError(f"{name} cannot be made: {reason}")


def _timm_transform(module: nn.Module, image_size: int | None) -> tuple[Any, Any, str]:
    from timm.data import create_transform, resolve_model_data_config
    from timm.models import get_model_input_config

    # The data configuration alone ignores an img_size given at creation.
    size = tuple(get_model_input_config(module)["input_size"])
    if image_size is not None:
        size = (size[0], image_size, image_size)
    config = resolve_model_data_config(module, args={"input_size": size})
    transform = create_transform(**config, is_training=False)
    return transform, size, json.dumps(config, sort_keys=True, default=str)


def _file_overlay(timm_name: str, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
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
    return overlay, {"file": path.name, "file_sha256": file_sha256(path)}
