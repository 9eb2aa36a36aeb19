"""Huh et al. 2024, The Platonic Representation Hypothesis (arXiv 2405.07987): shared neighbours.

Two networks that represent the same images alike find the same nearest neighbours. Beside them
stand what chance gives, k / (n − 1), and permuted images (Gröger et al. 2026, arXiv 2602.14486).
Class tokens become useful late (Caron et al. 2021, arXiv 2104.14294).
"""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from vitprobe.results.result import FAILS, HOLDS, Finding, combine, decide, plus_minus


def findings(result: Any) -> list[Finding]:
    """The claims for trained models; ``result`` is a ``NeighboursResult``."""
    facts = result.meta["models"]
    # Nobody knows whether features of others are of a trained model.
    unknown = ("random", "given features")
    trained = [m for m, one in enumerate(facts) if not one["weights"].startswith(unknown)]
    found = [_above_chance(result, a, b) for a, b in combinations(trained, 2)]
    for model in trained:
        rows = result.rows_of(model)
        of_class = (result.readout[rows] == "class token").all() and len(rows) > 2
        if of_class and np.isfinite(result.accuracy[rows]).all():
            found.append(_late(result, model, rows))
    return found


def _above_chance(result: Any, a: int, b: int) -> Finding:
    block = np.ix_(result.rows_of(a), result.rows_of(b))
    mean = float(np.nanmean(result.alignment[block]))
    # Pairs of layers share their images: their errors are added as if they went together.
    error = float(np.nanmean(result.alignment_se[block]))
    chance = float(result.chance)
    verdicts = [decide(mean, error, chance, result.meta["n"])]
    numbers = f"mean over pairs of layers {plus_minus(mean, error)}, chance {chance:.3f}"
    largest, null = float(np.nanmax(result.alignment[block])), float(result.null_max_q95[a, b])
    if np.isfinite(null):
        verdicts.append(HOLDS if largest > null else FAILS)
        numbers += f"; largest {largest:.3f}, 95 % of permuted images below {null:.3f}"
    return Finding(
        f"images have common neighbours in {result.models[a]} and {result.models[b]}, above chance",
        "Huh et al. 2024, Section 2",
        combine(verdicts),
        numbers,
        "common neighbours above chance",
        f"{len(block[0])} × {block[1].size} pairs of layers",
        [result.models[a], result.models[b]],
    )


def _late(result: Any, model: int, rows: np.ndarray) -> Finding:
    accuracy, error = result.accuracy[rows], result.accuracy_se[rows]
    middle = len(rows) // 2
    decided = partial(decide, replicates=result.meta["n"])
    late = accuracy[-1] - accuracy[middle], float(np.hypot(error[-1], error[middle]))
    early = accuracy[middle] - accuracy[0], float(np.hypot(error[middle], error[0]))
    # The middle is in both. That all are of the same images is left out of account: wider errors.
    gap_se = float(np.linalg.norm([error[-1], 2 * error[middle], error[0]]))
    gap = float(late[0] - early[0]), gap_se
    return Finding(
        f"neighbours of the class token of {result.models[model]} become of one class late",
        "Caron et al. 2021, Oquab et al. 2023",
        decided(*gap),
        f"k-NN accuracy gained in the second half of blocks {plus_minus(*late)}, in the first "
        f"{plus_minus(*early)}",
        "class tokens gain late",
        models=[result.models[model]],
    )
