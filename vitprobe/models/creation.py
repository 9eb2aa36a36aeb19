"""timm's networks: made, given their weights, with the transform that goes with them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprobe.errors import VitprobeError, ran_out
from vitprobe.models.complete import complete
from vitprobe.models.contents import file_sha256, read
from vitprobe.models.fitting import Fit, fit, put
from vitprobe.models.google import load_npz
from vitprobe.models.hub import hub, what_it_said
from vitprobe.models.model import Model
from vitprobe.models.names import REMOTE_PREFIXES, bundled_models
from vitprobe.models.reference import reference
from vitprobe.models.settings import check_architecture, settle
from vitprobe.models.transforms import recipe_of, timm_transform

# Of a digest that a caption shows.
DIGITS = 8
# What timm raises where a network cannot be made.
FAULTS = (OSError, RuntimeError, ValueError, AssertionError, KeyError, TypeError)


def create(spec: str, name: str, timm_name: str, image_size: int | None, origin: str) -> Model:
    """A timm network, untrained or with timm's trained weights.

    Args:
        spec: as the user wrote it.
        name: what figures call it.
        timm_name: timm's name for it.
        image_size: side in pixels, or None for its own.
        origin: of the weights, in words; ``hub`` for timm's trained ones.

    Raises:
        VitprobeError: it cannot be made, or the hub is out of reach.
    """
    from_hub = origin == "hub"
    try:
        with hub() if from_hub else nullcontext(), complete(spec) if from_hub else nullcontext():
            module = make(timm_name, image_size, pretrained=from_hub)
    except FAULTS as error:
        raise _explained(spec, name, image_size, error, from_hub) from error
    except Exception as error:
        # Clients of the hub raise errors of their own libraries.
        if not from_hub:
            raise
        raise _explained(spec, name, image_size, error, from_hub) from error
    config = config_of(module)
    architecture, details = str(config.get("architecture") or timm_name), {}
    if timm_name.startswith(REMOTE_PREFIXES):
        # A configuration may name the public checkpoint that someone's own weights began from.
        file = _cached(timm_name, config)
        origin = f"{architecture}, weights of {timm_name}"
        if file is not None:
            details = {"file": file.name, "file_sha256": file_sha256(file)}
            origin += f" (sha256 {details['file_sha256'][:DIGITS]}…)"
        timm_name = architecture
    elif from_hub:
        tag = config.get("tag", "")
        origin = f"{architecture}.{tag}" if tag else timm_name
    transform, size, key = timm_transform(module, image_size)
    return Model(name, module.eval(), transform, size, origin, timm_name, key, details)


def from_file(
    spec: str, name: str, timm_name: str, image_size: int | None, path: Path, shown: str = ""
) -> Model:
    """A timm network with the weights of a file.

    Args:
        spec: as the user wrote it.
        name: what figures call it.
        timm_name: timm's name for the architecture; with a tag, for its transform as well.
        image_size: side in pixels, or None for its own.
        path: of a weights file, an index of shards, or the folder that they are in.
        shown: what captions call the file; its name by default.

    Raises:
        VitprobeError: no such file, or weights that do not fit, in whole.
    """
    contents = read(path)
    arguments = check_architecture(spec, timm_name, contents)
    making = partial(make, timm_name, image_size, **arguments)
    details: dict[str, Any] = contents.details()
    with torch.random.fork_rng(devices=[]), _quiet():
        try:
            if contents.npz:
                module, said = load_npz(spec, contents, making)
                details |= said
                fitted = Fit({}, 0, **said)
            else:
                fitted = fit(spec, contents, reference(making))
                module = making(num_classes=fitted.num_classes, pretrained=False)
                put(spec, module, fitted)
        except FAULTS as error:
            raise _explained(spec, spec.partition("@")[0], image_size, error) from error
    details |= {**fitted.details(), **settle(spec, module, contents)}
    recipe, source = recipe_of(contents)
    transform, size, key = timm_transform(module, image_size, recipe)
    architecture = timm_name.partition(".")[0]
    tag = config_of(module).get("tag", "")
    details["transform_of"] = source or f"{architecture}.{tag}".rstrip(".")
    origin = file_origin(architecture, {**details, "file": shown or contents.file})
    about = [fitted.said(), "" if source else f"transform of {details['transform_of']}"]
    origin = "; ".join(filter(None, [origin, *about]))
    return Model(name, module.eval(), transform, size, origin, architecture, key, details)


def make(timm_name: str, image_size: int | None, *, pretrained: bool, **options: Any) -> nn.Module:
    """``timm.create_model``, also for networks that take images of any size as they come."""
    import timm

    if image_size is None:
        return timm.create_model(timm_name, pretrained=pretrained, **options)
    options["img_size"] = image_size
    try:
        return timm.create_model(timm_name, pretrained=pretrained, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    # A plain CNN has no image size to set.
    del options["img_size"]
    return timm.create_model(timm_name, pretrained=pretrained, **options)


def config_of(module: nn.Module) -> dict[str, Any]:
    """timm's record of where a model's weights come from."""
    config: Any = module.pretrained_cfg
    return config if isinstance(config, dict) else config.to_dict()


def file_origin(architecture: str, details: dict[str, Any]) -> str:
    """Architecture, file and digest, as captions have them."""
    digest = details["file_sha256"][:DIGITS]
    return f"{architecture}, weights {details['file']} (sha256 {digest}…)"


def _cached(spec: str, config: dict[str, Any]) -> Path | None:
    """The weights file of a repository of the hub in its cache."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = spec.partition(":")[2].partition("@")
    names = [config.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin"]
    for name in filter(None, names):
        found = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str) and Path(found).is_file():
            return Path(found)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """timm's own words on resampling are said in captions."""
    log = logging.getLogger("timm")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _explained(
    spec: str, name: str, image_size: int | None, error: Exception, from_hub: bool = False
) -> VitprobeError:
    if isinstance(error, VitprobeError):
        return error
    if ran_out(error):
        raise error
    reason = first_line(error)
    known = "ARCHITECTURE" if spec.startswith(REMOTE_PREFIXES) else name
    bundled = ", ".join(list(bundled_models())[:3])
    ways = (
        f"Try {known}@random (untrained), {known}@FILE (weights on disk) or a bundled model "
        f"({bundled})."
    )
    if "No pretrained weights" in reason:
        return VitprobeError(f"timm has no trained weights for {name}. {ways}")
    if from_hub and isinstance(error, KeyError) and "architecture" in reason:
        repository = name.partition("@")[0]
        return VitprobeError(
            f"{name} names no architecture of timm: it is of another library. Download it (`hf "
            f"download {repository} --local-dir FOLDER`) and try ARCHITECTURE@FOLDER."
        )
    ours = isinstance(error, (RuntimeError, AssertionError, KeyError, TypeError))
    if from_hub and not (ours and not isinstance(error, OSError)):
        return VitprobeError(f"{what_it_said(error, name)} {ways}")
    if image_size is not None:
        return VitprobeError(f"{name} cannot be made for --image-size {image_size}: {reason}")
    return VitprobeError(f"{name} cannot be made: {reason}")


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    # torch's report of a misfit begins with a heading and then names the keys.
    text = lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]
    return text if len(text) <= 200 else f"{text[:200]}..."
