"""Oquab et al. 2023, DINOv2 (arXiv 2304.07193): the first component of patches finds the object."""

from __future__ import annotations

from typing import Any

import numpy as np

from vitprobe.results.result import Finding, decide, plus_minus

# The paper shows it and gives no number: this one is ours. The filters of random CNNs see edges,
# and reach 0.9 where an object has more of them than its background.
SEPARATES = 0.9


def findings(result: Any) -> list[Finding]:
    """For trained models, where the object's place is known; of a ``PatchPCAResult``."""
    found = []
    for model, facts in enumerate(result.meta["models"]):
        auc, error = float(result.auc[model]), float(result.auc_se[model])
        if facts["weights"].startswith("random") or not np.isfinite(auc):
            continue
        found.append(
            Finding(
                f"the first component of the patches of {result.models[model]} tells the object "
                f"from the background",
                "Oquab et al. 2023, Fig. 1",
                decide(max(auc, 1 - auc), error, SEPARATES, result.meta["n"]),
                f"area under the curve against the object's mask {plus_minus(auc, error)} "
                f"(threshold > {SEPARATES}, or < {1 - SEPARATES:g})",
                "first component finds the object",
                str(result.layers[model]),
                [result.models[model]],
            )
        )
    return found
