"""Claims of Dosovitskiy et al. 2021 (arXiv 2010.11929), Figure 7, on the weights that embed."""

from __future__ import annotations

from typing import Any

import numpy as np

from vitprobe.results.result import Finding, decide, plus_minus
from vitprobe.statistics.grids import axis_gain, decay, smoothness

# White noise has a smoothness of 0 and an image nearly 1; "smooth" is ours.
SMOOTH = 0.5
LEADING = 4
# What the paper shows without a number: ours. Differences are of cosines.
NEARER, AXIAL, STRUCTURE = 0.5, 0.02, 0.25
# Of twenty tables of noise one is two errors off: three are asked for, one and a half times two.
MORE = 1.5


def patch_embedding(result: Any) -> list[Finding]:
    """Dosovitskiy et al.'s claim on the leading components; an untrained stem has noise."""
    found = []
    for model, about in enumerate(result.meta["models"]):
        tiles = result.of(model)[:LEADING]
        if not len(tiles) or min(tiles.shape[1:3]) < 2:
            continue
        value = float(np.mean([smoothness(tile) for tile in tiles]))
        numbers = (
            f"correlation of neighbouring weights, mean of the first {len(tiles)} components: "
            f"{value:.3f} (0 for white noise, threshold > {SMOOTH})"
        )
        name, source = about["name"], "Dosovitskiy et al. 2021, Fig. 7 left"
        if about["weights"].startswith("random"):
            claim = f"leading components of the stem of {name} are not smooth"
            found.append(
                Finding(
                    claim,
                    source,
                    decide(-value, 0.0, -SMOOTH),
                    numbers,
                    "untrained stem is noise",
                    models=[name],
                )
            )
        else:
            claim = f"leading components of the stem of {name} are smooth"
            found.append(
                Finding(
                    claim,
                    source,
                    decide(value, 0.0, SMOOTH),
                    numbers,
                    "smooth leading filters",
                    models=[name],
                )
            )
    return found


def position_embedding(result: Any) -> list[Finding]:
    """Dosovitskiy et al.'s claims on similarity against distance, rows and columns.

    A table is not sampled: errors are what numbers vary by in tables whose places mean nothing.
    """
    found = []
    names = result.models
    structure = {}
    for table, about in enumerate(result.meta["tables"]):
        if min(about["grid"]) < 3 or not np.isfinite(result.of(table)).all():
            continue
        rho, axial = decay(result.of(table)), axis_gain(result.of(table))
        structure[table] = rho
        found.append(
            Finding(
                f"embeddings of {about['label']} are the more alike the nearer the patches",
                "Dosovitskiy et al. 2021, Fig. 7 centre",
                decide(-rho[0], MORE * rho[1], NEARER),
                f"Spearman correlation of similarity with distance {plus_minus(*rho)} (threshold "
                f"< -{NEARER}, error: without structure)",
                "nearer patches more alike",
                models=[names[about["model"]]],
            )
        )
        found.append(
            Finding(
                f"patches in one row or column are more alike in {about['label']} than others "
                f"as far apart",
                "Dosovitskiy et al. 2021, Fig. 7 centre",
                decide(axial[0], MORE * axial[1], AXIAL),
                f"mean difference of similarity at equal distance {plus_minus(*axial)} (threshold "
                f"> {AXIAL}, error: without structure)",
                "rows and columns more alike",
                models=[names[about["model"]]],
            )
        )
    untrained = {t: _untrained(result, about) for t, about in enumerate(result.meta["tables"])}
    for table, rho in structure.items():
        for other, blank in structure.items():
            same_grid = np.array_equal(*(result.meta["tables"][t]["grid"] for t in (table, other)))
            if same_grid and not untrained[table] and untrained[other]:
                labels = [result.meta["tables"][t]["label"] for t in (table, other)]
                found.append(
                    Finding(
                        f"{labels[0]} has a structure that {labels[1]} lacks",
                        "Dosovitskiy et al. 2021, Fig. 7 centre",
                        decide(
                            abs(rho[0]) - abs(blank[0]),
                            float(np.hypot(rho[1], blank[1])),
                            STRUCTURE,
                        ),
                        f"Spearman correlation of similarity with distance {plus_minus(*rho)} "
                        f"against {plus_minus(*blank)} (threshold > {STRUCTURE})",
                        "structure that untrained tables lack",
                        models=[names[result.meta["tables"][t]["model"]] for t in (table, other)],
                    )
                )
    return found


def _untrained(result: Any, about: dict[str, Any]) -> bool:
    return result.meta["models"][about["model"]]["weights"].startswith("random")
