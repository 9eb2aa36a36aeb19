"""Park et al. 2023, What Do Self-Supervised Vision Transformers Learn? (arXiv 2305.00729).

In contrastively trained ViTs the heads of late layers come to attend alike whatever the query: the
normalised mutual information of query and key falls, below that of ViTs trained to fill in masked
images.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from vitprobe.results.result import Finding, decide, plus_minus

# The paper shows curves that part by tenths; how far they must is ours. Heads of random weights
# differ as surely, by far less.
CLEARLY = 0.05
# How timm tags weights of either kind, as pre-trained; others have both objectives, or labels.
CONTRASTIVE = ("dino", "mocov3", "moco")
MASKED = ("mae", "simmim", "in22k_mim", "mim")


def findings(result: Any) -> list[Finding]:
    """The claims where pre-training is known; ``result`` is an ``AttentionStatisticsResult``."""
    tags = [str(model.get("timm_name", "")).partition(".")[2] for model in result.meta["models"]]
    trained = [not model["weights"].startswith("random") for model in result.meta["models"]]
    contrastive = [m for m, tag in enumerate(tags) if trained[m] and tag in CONTRASTIVE]
    masked = [m for m, tag in enumerate(tags) if trained[m] and tag in MASKED]
    found = [_falls(result, model) for model in contrastive]
    return found + [_below(result, a, b) for a, b in product(contrastive, masked)]


def _falls(result: Any, model: int) -> Finding:
    early, late = _thirds(result, model)
    gap = early[0] - late[0], early[1] + late[1]
    return Finding(
        f"late heads of {result.models[model]} attend more alike, whatever the query, than early "
        f"ones",
        "Park et al. 2023, Fig. 3",
        decide(*gap, CLEARLY, result.meta["n"]),
        f"mean NMI of query and key: first third of layers {plus_minus(*early)}, last third "
        f"{plus_minus(*late)}, difference {plus_minus(*gap)} (threshold > {CLEARLY})",
        "NMI falls with depth",
        models=[result.models[model]],
    )


def _below(result: Any, contrastive: int, masked: int) -> Finding:
    one, other = _thirds(result, contrastive)[1], _thirds(result, masked)[1]
    gap = other[0] - one[0], other[1] + one[1]
    return Finding(
        f"late heads of {result.models[contrastive]} attend more alike, whatever the query, than "
        f"those of {result.models[masked]}",
        "Park et al. 2023, Fig. 3",
        decide(*gap, CLEARLY, result.meta["n"]),
        f"mean NMI of query and key in the last third of layers: {plus_minus(*one)} and "
        f"{plus_minus(*other)}, difference {plus_minus(*gap)} (threshold > {CLEARLY})",
        "contrastive NMI below masked",
        models=[result.models[contrastive], result.models[masked]],
    )


def _thirds(result: Any, model: int) -> list[tuple[float, float]]:
    """Mean NMI over the heads of the first and last third of layers, and standard errors.

    Heads see the same images: their errors are added as if they went together.
    """
    rows = result.rows_of(model)
    third = max(1, len(rows) // 3)
    return [
        (float(np.nanmean(result.nmi[part])), float(np.nanmean(result.nmi_se[part])))
        for part in (rows[:third], rows[-third:])
    ]
