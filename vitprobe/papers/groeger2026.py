"""Gröger et al. 2026 (arXiv 2602.14486): similarities against what chance would give.

The most alike of many pairs of layers must beat what the same search finds among unrelated
networks: those of one network with its images permuted.
"""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from vitprobe.results.result import Finding, decide, plus_minus


def findings(result: Any) -> list[Finding]:
    """For every pair of trained models of a ``CKAResult`` that was measured with permutations."""
    facts = result.meta["models"]
    # Nobody knows whether features of others are of a trained model.
    unknown = ("random", "given features")
    trained = [m for m, one in enumerate(facts) if not one["weights"].startswith(unknown)]
    decided = partial(decide, replicates=result.meta.get("replicates"))
    found = []
    for a, b in combinations(trained, 2):
        chance = float(result.null_max_q95[a, b])
        block = np.ix_(result.rows_of(a), result.rows_of(b))
        values, errors = result.cka[block], result.cka_se[block]
        if not np.isfinite(chance) or np.isnan(values).all():
            continue
        at = np.unravel_index(np.nanargmax(values), values.shape)
        best = float(values[at]), float(errors[at])
        above = np.isfinite(values) & (values > result.null_q95[block])
        found.append(
            Finding(
                f"the most alike layers of {result.models[a]} and {result.models[b]} are more "
                f"alike than those of unrelated networks would be",
                "Gröger et al. 2026",
                decided(*best, chance),
                f"largest CKA {plus_minus(*best)}, 95 % of {result.meta['null']} permutations "
                f"below {chance:.3f}; {above.sum()} of {values.size} pairs above their own 95 %",
                "more alike than by chance",
                f"{values.shape[0]} × {values.shape[1]} pairs of layers",
                [result.models[a], result.models[b]],
            )
        )
    return found
