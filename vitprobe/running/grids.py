"""The chosen layers of a session's models, with the grids that their vectors stand on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitprobe.errors import NotApplicable
from vitprobe.running.session import Session
from vitprobe.statistics.norms import norms
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import CHOICES, Layer
from vitprobe.tracing.places import Places, find_places

OnGrid = tuple[Layer, Places]


def on_grids(ready: Session, choice: str | Sequence[str]) -> list[list[OnGrid]]:
    """For each model, the chosen layers that have a grid of places, in forward order.

    Args:
        ready: the session.
        choice: ``blocks``, ``paper``, ``all`` or names with wildcards.

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
    ready: Session, m: int, layers: Sequence[Layer], choice: str | Sequence[str] = "blocks"
) -> list[OnGrid]:
    """Those of a model's layers that have a grid, with it.

    Raises:
        NotApplicable: none has one, or one that ``choice`` names has none.
    """
    model = ready.models[m]
    with ready.autocast():
        places = find_places(model.module, layers, ready.example()[m])
    kept = [(la, one) for la, one in zip(layers, places) if isinstance(one, Places)]
    sets = set(CHOICES) & ({choice} if isinstance(choice, str) else set(choice))
    if not kept or (len(kept) < len(layers) and not sets):
        bare, why = next((la, one) for la, one in zip(layers, places) if isinstance(one, str))
        raise NotApplicable(
            f"The layer {bare.label} of {model.name} has no grid of places: {why}.", model.name
        )
    return kept


def typical_norms(ready: Session, m: int, chosen: Sequence[OnGrid]) -> list[float]:
    """The median norm of the vectors that a model has at each of these layers, at the example."""
    model, found = ready.models[m], [0.0] * len(chosen)

    def keep(i: int, tensor: Tensor) -> None:
        found[i] = float(norms(chosen[i][1].spatial(tensor)).median())

    layers = [layer for layer, _ in chosen]
    with torch.no_grad(), ready.autocast(), capture(model.module, layers, keep):
        model.module(ready.example()[m])
    return found
