"""Naseer et al. 2021, Intriguing Properties of Vision Transformers (arXiv 2105.10497).

ViTs keep more of their predictions than CNNs when half of the image is dropped, and when its cells
are shuffled.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from vitprobe.results.result import Finding, decide, plus_minus

HALF = 0.5


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
    return Finding(
        f"{result.models[a]} keeps more of its predictions than {result.models[b]} when {when}",
        f"Naseer et al. 2021, {figure}",
        decide(*gap, replicates=result.meta["n"]),
        f"agreement with the clean image {plus_minus(one, one_se)} and "
        f"{plus_minus(other, other_se)}, difference {plus_minus(*gap)}",
        "ViT keeps more than CNN",
        models=[result.models[a], result.models[b]],
    )
