"""A name -> a ready model: module, its own transform, its input size, its weights' origin.

A model is written ``NAME``, ``NAME@random`` or ``NAME@FILE``. NAME is an alias of the papers, a
bundled model, or any timm name. One's own code is ``package.module:factory`` or ``mine.py:build``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprobe.errors import VitprobeError
from vitprobe.models.contents import read, read_json
from vitprobe.models.creation import create, file_origin, from_file
from vitprobe.models.factories import from_factory
from vitprobe.models.fitting import fit, put
from vitprobe.models.model import Model
from vitprobe.models.names import (
    ALIASES,
    REMOTE_PREFIXES,
    bundled_models,
    check_known,
    factory_parts,
    label,
)
from vitprobe.models.reference import plain_reference
from vitprobe.models.wrapping import unwrapped, wrap

__all__ = ["ALIASES", "Model", "bundled_models", "load_model", "load_models", "wrap"]


def load_model(
    spec: str, image_size: int | None = None, seed: int = 0, name: str | None = None
) -> Model:
    """Load ``NAME``, ``NAME@random`` or ``NAME@FILE``.

    Args:
        spec: as above. NAME is a paper alias (``vit_b16``), a bundled model, or a timm name
            (``vit_base_patch16_224.augreg_in21k``, ``hf-hub:owner/name@revision``,
            ``local-dir:FOLDER``). FILE is a checkpoint of torch, safetensors, Google's ``.npz``, an
            index of shards, or a folder with one of these, read without executing anything in it.
            ``package.module:factory`` and ``mine.py:build`` run that code.
        image_size: side in pixels for a model that allows another one than its own; its position
            table is resampled by timm.
        seed: of the untrained weights; the caller's random state is left as it was.
        name: what figures call it. By default NAME, ``NAME (random)``, or FILE without its suffix:
            a file's weights are a model of their own, whatever architecture they share.

    Raises:
        VitprobeError: no such model or file, weights that do not fit, the hub out of reach.
    """
    model = _load(spec, image_size, seed)
    return replace(model, name=name) if name else model


def _load(spec: str, image_size: int | None, seed: int) -> Model:
    called = label(spec)
    if spec.startswith(REMOTE_PREFIXES):
        if spec.startswith("local-dir:"):
            return _of_folder(spec, called, image_size)
        # A hub name keeps its own ``@revision``.
        return create(spec, called, spec, image_size, "hub")
    if factory_parts(spec)[1]:
        return from_factory(spec, seed)
    name, _, weights = spec.partition("@")
    if not name:
        raise VitprobeError(f"--models: {spec!r} has no name before its '@'.")
    if name in bundled_models():
        return _bundled(spec, name, weights, image_size, seed)
    timm_name = ALIASES.get(name, name)
    check_known(name, timm_name)
    if not weights:
        return create(spec, called, timm_name, image_size, "hub")
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return create(spec, called, timm_name, image_size, f"random (seed {seed})")
    return from_file(spec, called, timm_name, image_size, Path(os.path.expanduser(weights)))


def _of_folder(spec: str, called: str, image_size: int | None) -> Model:
    """``local-dir:FOLDER``: the architecture, its options and transform are in its config.json."""
    folder = Path(os.path.expanduser(spec.partition(":")[2]))
    contents_config = folder / "config.json"
    if not contents_config.is_file():
        raise VitprobeError(
            f"{spec}: {folder} has no config.json as timm writes it. Try ARCHITECTURE@{folder}."
        )
    architecture = read_json(contents_config).get("architecture")
    if not isinstance(architecture, str):
        raise VitprobeError(
            f"{spec}: its config.json names no architecture of timm. Try ARCHITECTURE@{folder}."
        )
    check_known(architecture, architecture)
    shown = f"of local-dir:{folder.resolve().name}"
    return from_file(spec, called, architecture, image_size, folder, shown)


def load_models(
    models: Any,
    image_size: int | None = None,
    seed: int = 0,
    names: str | Sequence[str] | None = None,
) -> list[Model]:
    """One model or several, each a spec, a module or a ``Model``; equal names get a number.

    Args:
        models: one or a list.
        image_size: see ``load_model``.
        seed: see ``load_model``.
        names: what figures call them, one for each.

    Raises:
        VitprobeError: as ``load_model``; no model; not as many names, or one of them twice.
    """
    if isinstance(models, str | nn.Module | Model):
        models = [models]
    models = list(models) if isinstance(models, Iterable) else [models]
    if names is not None:
        names = _checked([names] if isinstance(names, str) else list(names), len(models))
    loaded: list[Model] = []
    for i, model in enumerate(models):
        if isinstance(model, str):
            model = load_model(model, image_size, seed)
        elif not isinstance(model, Model):
            model = wrap(model)
        elif unwrapped(model.module) is not model.module:
            model = replace(model, module=unwrapped(model.module))
        taken = [other.name for other in loaded]
        if names is not None:
            model = replace(model, name=names[i])
        elif model.name in taken:
            number = 2
            while f"{model.name} #{number}" in taken:
                number += 1
            model = replace(model, name=f"{model.name} #{number}")
        loaded.append(model)
    if not loaded:
        raise VitprobeError("At least one model is needed.")
    return loaded


def _checked(names: list[str], count: int) -> list[str]:
    if len(names) != count:
        raise VitprobeError(
            f"--names gives {len(names)} name{'s' * (len(names) != 1)} for {count} "
            f"model{'s' * (count != 1)}: {', '.join(names)}."
        )
    for name in names:
        if not name.strip():
            raise VitprobeError("--names gives an empty name.")
        if names.count(name) > 1:
            raise VitprobeError(f"--names gives the name {name!r} twice.")
    return names


def _bundled(spec: str, name: str, weights: str, image_size: int | None, seed: int) -> Model:
    from vitprobe.data import build

    card = bundled_models()[name]
    size = tuple(card["input_size"])
    if image_size not in (None, size[1]):
        raise VitprobeError(f"{name} accepts only {size[1]} px, not --image-size {image_size}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(card, trained=not weights)
    transform = _eval_transform(size, card["mean"], card["std"])
    key = f"digit scenes {size} mean {card['mean']} std {card['std']}"
    base = Model(name, module, transform, size, timm_name=card["timm_model"], transform_key=key)
    if weights == "random":
        return replace(base, name=label(spec), origin=f"random (seed {seed})")
    if not weights:
        return replace(base, origin=_trained(card), details={"card": card})
    contents = read(Path(os.path.expanduser(weights)))
    fitted = fit(spec, contents, plain_reference(module))
    put(spec, module, fitted)
    details = {**contents.details(), **fitted.details()}
    origin = "; ".join(filter(None, [file_origin(name, details), fitted.said()]))
    return replace(base, name=label(spec), origin=origin, details=details)


def _trained(card: dict[str, Any]) -> str:
    """What a bundled network has been trained on."""
    recipe = card["recipe"]
    count, distinct = card["pictures_seen"], recipe["distinct_pictures"]
    times = ""
    if isinstance(distinct, int):
        count, times = distinct, f", {round(count / distinct)} times each"
    start = recipe.get("start", "random weights")
    begun = "" if start == "random weights" else f"from {start}, then "
    return f"bundled, {begun}trained on {count:,} images{times}"


def _eval_transform(size: tuple[int, int, int], mean: list[float], std: list[float]) -> Any:
    from timm.data import create_transform

    return create_transform(
        size, is_training=False, mean=tuple(mean), std=tuple(std), crop_pct=1.0,
        interpolation="bicubic",
    )  # fmt: skip
