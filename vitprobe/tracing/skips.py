"""The residual additions of a model: what each branch does, and which axis holds what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitprobe.errors import NotApplicable
from vitprobe.tracing.branches import branch_kind
from vitprobe.tracing.layers import Layer, LayerMap
from vitprobe.tracing.places import Places, find_places


@dataclass(frozen=True)
class Skips:
    """The residual additions of a model, and how the tensors of each are read.

    Attributes:
        layers: the sums.
        axes: of the channels of each, images first.
        kinds: ``attention``, ``MLP`` or ``convolution``: what each branch does.
        tokens: as many as all have, where all have the same; else 1.
        without_place: of each, the numbers of its tokens that have no place in the image.
        layout: what figures need of that, as JSON.
    """

    layers: list[Layer]
    axes: list[int]
    kinds: list[str]
    tokens: int
    without_place: list[tuple[int, ...]]
    layout: dict[str, Any]


def find_skips(found: LayerMap, module: nn.Module, example: Tensor) -> Skips:
    """The residual additions among a model's layers.

    Args:
        found: the layers.
        module: the model, to be watched in the precision of the caller's context.
        example: two images as it takes them.

    Raises:
        NotApplicable: there are none.
    """
    layers = [layer for layer in found.layers if layer.addition is not None]
    if not layers:
        raise NotApplicable(
            f"{found.model} has no residual additions: no skips to measure.", found.model
        )
    places = [
        one if isinstance(one, Places) else None for one in find_places(module, layers, example)
    ]
    counts = {_tokens(layer, place) for layer, place in zip(layers, places)}
    apart = len(counts) == 1 and 0 not in counts
    axes = [
        _feature_axis(layer, place) if place else _axis(layer, found)
        for layer, place in zip(layers, places)
    ]
    bare = [place.without_place if place else () for place in places]
    # Tokens have columns of their own where they stay the same ones.
    known = places[0] if apart and len(set(bare)) == 1 else None
    return Skips(
        layers,
        axes,
        [branch_kind(layer.addition, found.modules) for layer in layers if layer.addition],
        counts.pop() if apart else 1,
        bare,
        {
            "tokens": _tokens(layers[0], places[0]) if apart else 1,
            "without_place": sorted(known.without_place) if known else [],
            "class_token": known.class_token if known else None,
            "has_class": bool(known and known.has_class),
            "attends": found.has_attention,
        },
    )


def _tokens(layer: Layer, places: Places | None) -> int:
    """How many tokens a layer has; 0 where it is a map."""
    if places is None:
        return layer.shape[0] if len(layer.shape) == 2 else 0
    return 0 if places.is_map else places.lengths[0]


def _feature_axis(layer: Layer, places: Places) -> int:
    features = [axis for axis in range(1, len(layer.shape) + 1) if axis not in places.axes]
    return features[0] if len(features) == 1 else -1


def _axis(layer: Layer, found: LayerMap) -> int:
    """The channel axis where the shape does not tell: as many as the branch's last layer has."""
    if layer.fold > 1 or layer.addition is None:
        return -1
    for name in reversed(layer.addition.branch_modules):
        module = found.modules[name]
        features = getattr(module, "out_channels", getattr(module, "out_features", None))
        if features is not None:
            fitting = [axis for axis, size in enumerate(layer.shape, 1) if size == features]
            return fitting[0] if len(fitting) == 1 else -1
    return -1
