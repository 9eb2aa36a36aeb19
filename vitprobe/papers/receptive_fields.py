"""What Raghu et al. 2021 (arXiv 2108.08810) claim of receptive fields: Figures 6 and C.1 to C.4.

A field that reaches the border of the image is wider than the image shows. Its area is then a
share of the image, not a width: where two widths are compared it counts as "at least so wide", and
a comparison that this leaves open is inconclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np

from vitprobe.results.result import FAILS, OPEN, Finding, combine, decide, plus_minus

# Where the paper says "gradually" and "global", a number has to be chosen: these are ours.
GROWTH, GLOBAL_AREA = 0.1, 0.5
SOURCE = "Raghu et al. 2021, Fig. 6"
AREA = "area with 90 % of the gradient"


def findings(
    names: Sequence[str],
    attends: Sequence[bool],
    trends: np.ndarray,
    trends_se: np.ndarray,
    cut: np.ndarray,
    replicates: int | None,
) -> list[Finding]:
    """The claims about every ViT, every CNN, and every pair of them.

    Args:
        names: of the models.
        attends: whether each has attention.
        trends: (models, 5) of ``ReceptiveFieldResult``.
        trends_se: (models, 5) standard errors.
        cut: (models, 2) whether fields of the lowest and of the highest third of the layers reach
            the border of the image.
        replicates: of which the standard errors were estimated.
    """
    decided = partial(decide, replicates=replicates)
    trend = np.stack([trends, trends_se], axis=2).tolist()
    found = []
    for model, name in enumerate(names):
        low, middle, high, peak, less = trend[model]
        if not attends[model]:
            growth = high[0] - low[0], float(np.hypot(high[1], low[1]))
            verdict, remark = _wider(decided(*growth, GROWTH), cut[model, 1], cut[model, 0])
            claim = f"the field of {name} grows gradually"
            numbers = (
                f"{AREA}: lowest third {plus_minus(*low)}, half depth {plus_minus(*middle)}, "
                f"highest third {plus_minus(*high)} (growth > {GROWTH}){remark}"
            )
        else:
            claim = f"{name} is global by half depth, and its centre patch dominates"
            verdict = combine([decided(middle[0], middle[1], GLOBAL_AREA), decided(*peak)])
            numbers = (
                f"{AREA} at half depth {plus_minus(*middle)} (threshold > {GLOBAL_AREA}); share of "
                f"the centre patch minus the largest other's {plus_minus(*peak)}"
            )
        found.append(Finding(claim, SOURCE, verdict, numbers))
        if np.isfinite(less[0]):
            claim = f"attention alone is less centred on its own place than the sum in {name}"
            numbers = f"share of the centre cell, sum minus attention: {plus_minus(*less)}"
            found.append(Finding(claim, f"{SOURCE}, C.4", decided(*less), numbers))
    vits = [model for model, attending in enumerate(attends) if attending]
    cnns = [model for model, attending in enumerate(attends) if not attending]
    for a, b in product(vits, cnns):
        (vit, vit_se), (cnn, cnn_se) = trend[a][0], trend[b][0]
        verdict, remark = _wider(
            decided(vit - cnn, float(np.hypot(vit_se, cnn_se))), cut[a, 0], cut[b, 0]
        )
        found.append(
            Finding(
                f"low layers of {names[a]} look farther than those of {names[b]}",
                SOURCE,
                verdict,
                f"{AREA}, lowest third: {plus_minus(vit, vit_se)} and "
                f"{plus_minus(cnn, cnn_se)}{remark}",
            )
        )
    return found


def _wider(verdict: str, first_cut: bool, second_cut: bool) -> tuple[str, str]:
    """The verdict on "the first is wider than the second", where the border may cut either."""
    if second_cut:
        what = "both fields reach" if first_cut else "the second field reaches"
        return OPEN, f"; {what} the border of the image, so that their widths are not compared"
    if first_cut:
        remark = "; the wider field reaches the border of the image, and is at least so wide"
        return (OPEN if verdict == FAILS else verdict), remark
    return verdict, ""
