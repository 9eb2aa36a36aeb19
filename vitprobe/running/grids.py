"""The chosen layers of a session's models, with the grids that their vectors stand on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import NotApplicable
from vitprobe.models.loading import Model
from vitprobe.running import processes
from vitprobe.running.session import Session
from vitprobe.statistics.norms import norms
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import CHOICES, Choice, Layer, words
from vitprobe.tracing.places import (
    CLASS_TOKEN,
    CONVOLUTION,
    MEAN_OF_TOKENS,
    ON_MAPS,
    UNTRAINED,
    Lost,
    Places,
)

OnGrid = tuple[Layer, Places]


def on_grids(ready: Session, choice: Choice) -> list[list[OnGrid]]:
    """For each model, the chosen layers that have a grid of places, in forward order.

    Args:
        ready: the session.
        choice: see ``LayerMap.choose``.

    Raises:
        NotApplicable: a model without such a layer, or a layer named that has no grid; sets pass
            over those.
        VitprobeError: unknown layers.
    """
    return [
        with_grids(ready, m, ready.layers(m).choose(choice), choice)
        for m in range(len(ready.models))
    ]


def with_grids(
    ready: Session, m: int, layers: Sequence[Layer], choice: Choice = "blocks"
) -> list[OnGrid]:
    """Those of a model's layers that have a grid, with it.

    Raises:
        NotApplicable: none has one, or one that ``choice`` names has none.
    """
    model, chosen = ready.models[m], list(zip(layers, ready.places(m, layers)))
    kept = [(layer, one) for layer, one in chosen if isinstance(one, Places)]
    sets = set(CHOICES) & set(words(choice))
    if not kept or (len(kept) < len(chosen) and not sets):
        bare, why = next(one for one in chosen if isinstance(one[1], str))
        raise NotApplicable(
            f"The layer {bare.label} of {model.name} has no grid of places: {why}.", model.name
        )
    tell_lost(model.name, lost_of(chosen))
    return kept


def lost_of(chosen: Sequence[tuple[Layer, Places | str]]) -> list[tuple[Layer, str]]:
    """Layers of which nobody can tell where their vectors stand, and why."""
    return [(layer, why) for layer, why in chosen if isinstance(why, Lost)]


def tell_lost(name: str, lost: Sequence[tuple[Layer, str]]) -> None:
    """A line on stderr for layers that are left out, as nobody can tell where they stand."""
    if lost and processes.is_main_process():
        first, why = lost[0]
        others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        print(
            f"vitprobe: {name}: the layer {first.label}{others} left out: {why}.", file=sys.stderr
        )


@dataclass(frozen=True)
class Placed:
    """A layer with its grid.

    Attributes:
        layer: of ``map_layers``.
        places: its grid.
        model: index of its model.
        depth: how many of the model's blocks but the first are done by then, from 0 to 1.
    """

    layer: Layer
    places: Places
    model: int
    depth: float


def placed_layers(ready: Session, choice: Choice) -> tuple[list[Placed], list[str]]:
    """The chosen layers of all models with their grids, and each model's kind.

    Args:
        ready: the session.
        choice: ``last`` (the last block that has a grid), ``blocks``, or names with wildcards.

    Raises:
        NotApplicable: a model without such a layer, or a layer named that has no grid; sets pass
            over those, and a line on stderr names such as may have one. The last block must not be
            one of these.
        VitprobeError: unknown layers.
    """
    wanted = words(choice)
    last = wanted == ["last"]
    names = ["blocks" if name == "last" else name for name in wanted]
    found, kinds = [], []
    for m, model in enumerate(ready.models):
        layer_map = ready.layers(m)
        layers = layer_map.choose(names)
        if last:
            chosen = list(zip(layers, ready.places(m, layers)))
            kept = [(layer, one) for layer, one in chosen if isinstance(one, Places)]
            lost = lost_of(chosen)
            if lost and (not kept or lost[-1][0].time > kept[-1][0].time):
                raise NotApplicable(
                    f"The layer {lost[-1][0].label} of {model.name}, its last block, has no grid "
                    f"of places: {lost[-1][1]}. Name another layer.",
                    model.name,
                )
            layers = [kept[-1][0]] if kept else layers
        kept = with_grids(ready, m, layers, names)
        later = [block.time for block in layer_map.choose("blocks")][1:]
        for layer, places in kept:
            depth = float(np.mean([layer.time >= time for time in later])) if later else 1.0
            found.append(Placed(layer, places, m, depth))
        kinds.append(_kind(model, layer_map.has_attention, kept[-1][1]))
    return found, kinds


def typical_norms(ready: Session, m: int, chosen: Sequence[OnGrid]) -> list[float]:
    """The median norm of the vectors that a model has at each of these layers, at the example."""
    model, found = ready.models[m], [0.0] * len(chosen)

    def keep(i: int, tensor: Tensor) -> None:
        found[i] = float(norms(chosen[i][1].spatial(tensor)).median())

    layers = [layer for layer, _ in chosen]
    with torch.no_grad(), ready.autocast(), capture(model.module, layers, keep):
        model.module(ready.example()[m])
    return found


def _kind(model: Model, has_attention: bool, places: Places) -> str:
    if model.untrained:
        return UNTRAINED
    if not has_attention:
        return CONVOLUTION
    if places.has_class:
        return CLASS_TOKEN
    return ON_MAPS if places.is_map else MEAN_OF_TOKENS
