"""What CKA says of a ViT beside a CNN: the claims of Raghu et al. 2021, Figures 1 and 2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprobe.results.result import Finding, combine, decide, plain, plus_minus
from vitprobe.statistics.hsic import bootstrap_error, jackknife, normalise
from vitprobe.tracing.layers import Layer

# Where the papers say "clearly larger" and "about", a number has to be chosen: these are ours.
CLEARLY = 0.1
EARLY_DEPTH = 0.35
# Below that a difference of CKA is none, as in ``same_depth``. Layers of random weights differ as
# surely, by a hundredth.
CHANGE = 0.05


def stage(layer: Layer) -> tuple[int, ...]:
    """What stays the same within a stage of a CNN: the size of its maps."""
    return layer.shape[-2:] if len(layer.shape) >= 3 else ()


def statistics(
    names: Sequence[str],
    owner: np.ndarray,
    has_attention: Sequence[bool],
    stages: Sequence[list[tuple[int, ...]]],
    sums: dict[str, Tensor],
) -> list[dict[str, Any]]:
    """What the findings rest on, (value, standard error) each, for every ViT and CNN.

    Args:
        names: of the models.
        owner: (L,) index of the model that a layer is of.
        has_attention: of each model.
        stages: of each model's layers.
        sums: ``hsic`` (groups, L, L) and ``used`` (groups,).
    """
    rows = [torch.from_numpy(np.flatnonzero(owner == m)) for m in range(len(names))]
    pairs = []
    for a in np.flatnonzero(has_attention).tolist():
        for b in np.flatnonzero(~np.array(has_attention)).tolist():
            count = len(rows[a])
            if min(count, len(rows[b])) < 3:
                continue
            both = torch.cat([rows[a], rows[b]]).to(sums["hsic"].device)
            hsic = sums["hsic"][:, both[:, None], both]

            def shares(total: Tensor, count: int = count, b: int = b) -> Tensor:
                values = normalise(total).cpu()
                vit, cnn = values[:count, :count], values[count:, count:]
                first, second = _low_and_high(vit), _low_and_high(cnn)
                split, late = _stage_split(cnn, stages[b]), _late_gap(values[:count, count:])
                return torch.stack([first, second, first - second, split, late])

            def depth(total: Tensor, count: int = count) -> Tensor:
                return _best_match_depth(normalise(total).cpu()[:count, count:])

            value, error = jackknife(shares, hsic, sums["used"])
            keys = ("vit", "cnn", "spread", "stages", "late")
            found = {k: [plain(v), plain(e)] for k, v, e in zip(keys, value, error)}
            # The place of a maximum jumps.
            place, spread = depth(hsic.sum(0)), bootstrap_error(depth, hsic, sums["used"])
            found["match_depth"] = [plain(float(place)), plain(float(spread))]
            counts = [count, len(rows[b])]
            pairs.append(
                {"attention": names[a], "convolution": names[b], "layers": counts, **found}
            )
    return pairs


def _low_and_high(values: Tensor) -> Tensor:
    """Mean CKA between the lowest and the highest third of a model's layers."""
    third = max(1, len(values) // 3)
    return values[:third, -third:].nanmean()


def _stage_split(values: Tensor, stages: list[tuple[int, ...]]) -> Tensor:
    """Mean CKA of layers of one stage minus that of layers of two, equally far apart in depth.

    Compared at equal distances, a map that only fades with depth has no stages. NaN where no
    distance has pairs of both kinds.
    """
    same = torch.tensor([[s == t for t in stages] for s in stages])
    gaps = []
    for distance in range(1, len(stages)):
        line, alike = values.diagonal(distance), same.diagonal(distance)
        if alike.any() and not alike.all():
            gaps.append(line[alike].nanmean() - line[~alike].nanmean())
    return torch.stack(gaps).nanmean() if gaps else values.new_tensor(torch.nan)


def _best_match_depth(cross: Tensor) -> Tensor:
    """Mean normalised depth of the ViT layer most like each CNN layer of the lower half."""
    half = (cross.shape[1] + 1) // 2
    best = cross[:, :half].nan_to_num(-1).argmax(0)
    return best.double().mean() / (cross.shape[0] - 1)


def _late_gap(cross: Tensor) -> Tensor:
    """CKA with the ViT's first two thirds minus with its last, least over the CNN's layers."""
    third = max(1, cross.shape[0] // 3)
    gaps = cross[:-third].nanmean(0) - cross[-third:].nanmean(0)
    return gaps[~gaps.isnan()].min() if (~gaps.isnan()).any() else gaps.new_tensor(torch.nan)


def findings(pairs: list[dict[str, Any]], replicates: int | None = None) -> list[Finding]:
    """The claims for every pair of ``statistics``, whose errors come of so many replicates."""
    decided = partial(decide, replicates=replicates)
    found = []
    for pair in pairs:
        vit, cnn = pair["attention"], pair["convolution"]
        # Files of earlier versions do not say how many layers there were.
        over = f"{pair['layers'][0]} and {pair['layers'][1]} layers" if "layers" in pair else ""
        spread, stages, depth, late = (
            pair[key] for key in ("spread", "stages", "match_depth", "late")
        )
        found.append(
            Finding(
                f"low and high layers are more alike in {vit} than in {cnn}, which splits by stage",
                "Raghu et al. 2021, Fig. 1",
                combine(
                    [decided(spread[0], spread[1], CLEARLY), decided(stages[0], stages[1], CHANGE)]
                ),
                f"mean CKA of lowest and highest third: {vit} {plus_minus(*pair['vit'])}, "
                f"{cnn} {plus_minus(*pair['cnn'])}, difference {plus_minus(*spread)} (threshold "
                f"> {CLEARLY}); {cnn} within minus between stages, equally far "
                f"apart, {plus_minus(*stages)} (threshold > {CHANGE})",
                "ViT uniform, CNN in stages",
                over,
                [vit, cnn],
            )
        )
        depth_left = (None if depth[0] is None else EARLY_DEPTH - depth[0], depth[1])
        found.append(
            Finding(
                f"the lower half of {cnn} is most like the lowest layers of {vit}, whose last "
                f"third is less like any of {cnn}",
                "Raghu et al. 2021, Fig. 2",
                combine([decided(*depth_left), decided(late[0], late[1], CHANGE)]),
                f"best-matching depth in {vit} {plus_minus(*depth)} "
                f"(threshold < {EARLY_DEPTH}); CKA with its first two thirds minus its last, "
                f"least over the layers of {cnn}: {plus_minus(*late)} (threshold > {CHANGE})",
                "CNN like the ViT's lowest layers",
                over,
                [vit, cnn],
            )
        )
    return found
