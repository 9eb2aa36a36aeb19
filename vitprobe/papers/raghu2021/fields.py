"""Claims on receptive fields: Figures 6 and C.1 to C.4.

A field that reaches the border of the image is wider than the image shows. Its area is then a
share of the image, not a width: where two widths are compared it counts as "at least so wide", and
a comparison that this leaves open is inconclusive.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np

from vitprobe.results.result import FAILS, OPEN, Finding, combine, decide, plus_minus

# Where the paper says "gradually", "farther" and "global", a number has to be chosen: these are
# ours, of shares of the image. One patch is wider than a small convolution, by less.
GROWTH, FARTHER, GLOBAL_AREA = 0.1, 0.1, 0.5
SOURCE = "Raghu et al. 2021, Fig. 6"
AREA = "area with 90 % of the gradient"


def fields(result: Any) -> list[Finding]:
    """The claims about every ViT, every CNN, and every pair of them.

    Args:
        result: a ``ReceptiveFieldResult``.
    """
    decided = partial(decide, replicates=result.meta.get("replicates"))
    trend = np.stack([result.trends, result.trends_se], axis=2).tolist()
    rows = [result.rows_of(model) for model in range(len(result.models))]
    thirds = [max(1, len(mine) // 3) for mine in rows]
    reaching, attends = result.reaching(), result.meta["attends"]
    found = []
    for model, name in enumerate(result.models):
        low, middle, high, peak, less = trend[model]
        count, third = len(rows[model]), thirds[model]
        if not attends[model]:
            growth = high[0] - low[0], float(np.hypot(high[1], low[1]))
            cut = reaching[rows[model][-third:]].any(), reaching[rows[model][:third]].any()
            verdict, remark = _wider(decided(*growth, GROWTH), *cut)
            claim, brief = f"the field of {name} grows gradually", "the CNN's field grows"
            over = f"the lowest and highest {third} of {count} layers"
            numbers = (
                f"{AREA}: lowest third {plus_minus(*low)}, half depth {plus_minus(*middle)}, "
                f"highest third {plus_minus(*high)} (threshold of growth > {GROWTH}){remark}"
            )
        else:
            claim = f"{name} is global by half depth, and its centre patch dominates"
            brief, over = "the ViT is global", f"the layer at half depth of {count}"
            verdict = combine([decided(middle[0], middle[1], GLOBAL_AREA), decided(*peak)])
            numbers = (
                f"{AREA} at half depth {plus_minus(*middle)} (threshold > {GLOBAL_AREA}); share of "
                f"the centre patch minus the largest other's {plus_minus(*peak)} (threshold > 0)"
            )
        found.append(Finding(claim, SOURCE, verdict, numbers, brief, over, [name]))
        if np.isfinite(less[0]):
            claim = f"attention alone is less centred on its own place than the sum in {name}"
            numbers = f"share of the centre cell, sum minus attention {plus_minus(*less)}"
            found.append(
                Finding(claim, f"{SOURCE}, C.4", decided(*less), f"{numbers} (threshold > 0)",
                        "skips keep tokens in place", "all attention branches", [name])
            )  # fmt: skip
    vits = [model for model, attending in enumerate(attends) if attending]
    cnns = [model for model, attending in enumerate(attends) if not attending]
    for a, b in product(vits, cnns):
        (vit, vit_se), (cnn, cnn_se) = trend[a][0], trend[b][0]
        cut = reaching[rows[a][: thirds[a]]].any(), reaching[rows[b][: thirds[b]]].any()
        layers = [f"{thirds[m]} of {len(rows[m])}" for m in (a, b)]
        farther = decided(vit - cnn, float(np.hypot(vit_se, cnn_se)), FARTHER)
        verdict, remark = _wider(farther, *cut)
        found.append(
            Finding(
                f"low layers of {result.models[a]} look farther than those of {result.models[b]}",
                SOURCE,
                verdict,
                f"{AREA}, lowest third: {plus_minus(vit, vit_se)} and "
                f"{plus_minus(cnn, cnn_se)} (threshold of the difference > {FARTHER}){remark}",
                "low ViT layers look farther",
                f"the lowest {layers[0]} and {layers[1]} layers",
                [result.models[a], result.models[b]],
            )
        )
    return found


def _wider(verdict: str, first_cut: bool, second_cut: bool) -> tuple[str, str]:
    """The verdict on "the first is wider than the second", where the border may cut either."""
    if second_cut:
        what = "both fields reach" if first_cut else "the narrower field reaches"
        return OPEN, f"; {what} the border of the image, so their widths are not compared"
    if first_cut:
        remark = "; the wider field reaches the border of the image and is at least so wide"
        return (OPEN if verdict == FAILS else verdict), remark
    return verdict, ""
