"""Naseer et al. 2021, Intriguing Properties of Vision Transformers (arXiv 2105.10497).

ViTs keep more of their predictions than CNNs when half of the image is dropped, and when its cells
are shuffled.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from vitprobe.results.result import OPEN, Finding, decide, plus_minus

HALF = 0.5
# The paper's networks are tens of points apart; how many are "more" is ours.
MORE = 0.05
# A network that predicts one class for more than this share of the images keeps its predictions
# whatever is missing: nothing follows.
ONE_CLASS = 0.8


def findings(result: Any) -> list[Finding]:
    """The claims for every trained ViT beside every trained CNN; of an ``OcclusionResult``."""
    facts = result.meta["models"]
    trained = [m for m, one in enumerate(facts) if not one["weights"].startswith("random")]
    attends = result.meta["attends"]
    found = []
    for a, b in product(trained, trained):
        if not attends[a] or attends[b]:
            continue
        half = np.isclose(result.dropped, HALF)
        if half.any():
            found.append(_keeps_more(result, a, b, half, "half of the image is dropped", "Fig. 2"))
        grids = result.shuffle > 1
        if grids.any():
            cells = ", ".join(f"{g}×{g}" for g in result.shuffle[grids])
            found.append(
                _keeps_more(result, a, b, grids, f"{cells} cells of it are shuffled", "Fig. 8")
            )
    return found


def _keeps_more(result: Any, a: int, b: int, levels: np.ndarray, when: str, figure: str) -> Finding:
    (one, one_se), (other, other_se) = (
        (float(result.agreement[m, levels].mean()), float(result.agreement_se[m, levels].mean()))
        for m in (a, b)
    )
    # Levels see the same images: their errors go together; those of two networks hardly.
    gap = one - other, float(np.hypot(one_se, other_se))
    verdict, remark = decide(*gap, MORE, result.meta["n"]), ""
    # Files of earlier versions do not say it.
    for m, share in enumerate(result.meta.get("commonest", ())):
        if m in (a, b) and share > ONE_CLASS:
            verdict = OPEN
            remark += f"; {result.models[m]} predicts one class for {share:.0%} of the images"
    return Finding(
        f"{result.models[a]} keeps more of its predictions than {result.models[b]} when {when}",
        f"Naseer et al. 2021, {figure}",
        verdict,
        f"agreement with the clean image {plus_minus(one, one_se)} and "
        f"{plus_minus(other, other_se)}, difference {plus_minus(*gap)} (threshold > {MORE})"
        f"{remark}",
        "ViT keeps more than CNN",
        models=[result.models[a], result.models[b]],
    )
