"""Claims on attention: Figures 3 and 5."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from scipy.stats import rankdata

from vitprobe.results.result import HOLDS, OPEN, Finding, combine, decide, plus_minus

# The papers say "local", "global" and "mostly global"; fractions of uniform attention are ours.
LOCAL, GLOBAL = 0.5, 0.75
# "Close to -1" is what the paper's figure shows; how close is ours.
STRONG = 0.7
# How often heads whose distances mean nothing may give as much, of so many draws.
BY_CHANCE, DRAWS = 0.05, 10_000


def distance(result: Any) -> list[Finding]:
    """The claims of Raghu et al.'s Figure 3 for every model with global attention."""
    found = []
    decided = partial(decide, replicates=result.meta["n"])
    for model, name in enumerate(result.models):
        rows = result.of(model)
        if not result.meta["global"][model] or len(rows) < 4:
            continue
        share = result.distance_px[rows] / result.uniform_px[rows][:, None]
        error = result.distance_se[rows] / result.uniform_px[rows][:, None]
        nearest, widest = _pick(share[:2], error[:2], 0), _pick(share[:2], error[:2], -1)
        middle = _pick(share[-2:], error[-2:], None)
        found.append(
            Finding(
                f"the lowest blocks of {name} hold both local and global heads",
                "Raghu et al. 2021, Fig. 3",
                combine(
                    [decided(-nearest[0], nearest[1], -LOCAL), decided(*widest, GLOBAL)]
                ),
                f"distance over that of uniform attention: most local head "
                f"{plus_minus(*nearest)} (threshold < {LOCAL}), most global head "
                f"{plus_minus(*widest)} (threshold > {GLOBAL})",
                "local and global heads below",
                f"the lowest 2 of {len(rows)} attention layers",
                [name],
            )
        )  # fmt: skip
        found.append(
            Finding(
                f"the highest blocks of {name} attend mostly globally",
                "Raghu et al. 2021, Fig. 3",
                decided(*middle, GLOBAL),
                f"distance over that of uniform attention, median head "
                f"{plus_minus(*middle)} (threshold > {GLOBAL})",
                "mostly global heads above",
                f"the highest 2 of {len(rows)} attention layers",
                [name],
            )
        )
    return found


def head_subsets(result: Any) -> list[Finding]:
    """Raghu et al.'s claim of Figure 5 for each layer."""
    if len(result.distance_px) < 3:
        return []
    vit, cnn = (model["name"] for model in result.meta["models"])
    chance, found = _rho_by_chance(result.heads, result.distance_px), []
    for layer, rho, error in zip(result.layers, result.rho, result.rho_se):
        verdict = decide(-float(rho), float(error), STRONG, result.meta.get("replicates"))
        # Rounding parts no ranks.
        as_low = float((chance <= rho + 1e-6).mean()) if np.isfinite(rho) else np.nan
        if verdict == HOLDS and as_low > BY_CHANCE:
            verdict = OPEN
        found.append(
            Finding(
                f"the more local the heads of {vit}, the more alike {layer} of {cnn}",
                "Raghu et al. 2021, Fig. 5",
                verdict,
                f"Spearman's ρ over {len(result.distance_px)} subsets {plus_minus(rho, error)} "
                f"(threshold < -{STRONG}); as low in {100 * as_low:.1f} % of random orders of the "
                f"heads (threshold < {100 * BY_CHANCE:g} %)",
                "local heads like convolutions",
                models=[vit, cnn],
            )
        )
    return found


def _rho_by_chance(subsets: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """(draws,) Spearman's ρ where distances mean nothing: each head has a number of its own.

    Errors over images say nothing of that: few heads are in an order by chance however many images
    have shown it, and subsets that share heads are alike.

    Args:
        subsets: (subsets, width) indices of heads.
        distance: (subsets,) of each subset.
    """
    heads = np.random.default_rng(0).normal(size=(DRAWS, int(subsets.max()) + 1))
    ranks = rankdata(heads[:, subsets].mean(2), axis=1), rankdata(distance)
    one, other = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return one @ other / (np.linalg.norm(one, axis=1) * np.linalg.norm(other))


def _pick(share: np.ndarray, error: np.ndarray, rank: int | None) -> tuple[float, float]:
    """The head of a rank among several layers' heads, the median one for None."""
    order = np.argsort(share.ravel())[: np.isfinite(share).sum()]
    # Of an even number of heads the two in the middle; their errors may well go together.
    middle = slice((len(order) - 1) // 2, len(order) // 2 + 1)
    at = order[middle] if rank is None else order[[rank]]
    return float(share.ravel()[at].mean()), float(error.ravel()[at].mean())
