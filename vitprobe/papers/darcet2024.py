"""Darcet et al. 2024, Vision Transformers Need Registers (arXiv 2309.16588): token norms.

In large or long-trained ViTs a few per cent of the patches get norms far above the others' in late
blocks (2.4 % above 150 in DINOv2-g; none in S and B). With registers none do, and the registers
have the large norms.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from vitprobe.results.result import Finding, combine, decide, plus_minus

# The paper counts 2.4 % in one network and none in others; where "a few" begins is ours.
A_FEW = 0.005
# How far above all patches a register is that has the large norms: ours.
ABOVE = 1.5


def findings(result: Any) -> list[Finding]:
    """The claims for every trained network of tokens; ``result`` is a ``TokenNormsResult``."""
    found = []
    for model, facts in enumerate(result.meta["models"]):
        untrained = facts["weights"].startswith("random")
        rows = result.rows_of(model)
        if untrained or len(rows) < 3:
            continue
        if result.meta["attends"][model] and result.meta["tokens"][model]:
            registers = result.prefix_kind[rows[-1]] == "register"
            claim = _with_registers if registers.any() else _without_registers
            found.append(claim(result, model, rows))
    return found


def _without_registers(result: Any, model: int, rows: np.ndarray) -> Finding:
    early, late = _thirds(result, rows)
    decided = partial(decide, replicates=result.meta.get("replicates"))
    return Finding(
        f"a few per cent of the patches of {result.models[model]} stand out in late blocks, and "
        f"hardly any in early ones",
        "Darcet et al. 2024, Fig. 3 and 4",
        combine([decided(*late, A_FEW), decided(-early[0], early[1], -A_FEW)]),
        f"share of patches above {result.meta['times']:g} times the layer's median, last third of "
        f"blocks {_per_cent(*late)} (threshold > {A_FEW:.1%}), first third "
        f"{_per_cent(*early)} (threshold < {A_FEW:.1%})",
        "outliers in late blocks",
        models=[result.models[model]],
    )


def _with_registers(result: Any, model: int, rows: np.ndarray) -> Finding:
    _, late = _thirds(result, rows)
    decided = partial(decide, replicates=result.meta.get("replicates"))
    last = rows[-1]
    mine = result.prefix_kind[last] == "register"
    at = np.flatnonzero(mine)[result.prefix_norm[last][mine].argmax()]
    p99 = result.norm_p99[last]
    ratio = result.prefix_norm[last, at] / p99, result.prefix_norm_se[last, at] / p99
    return Finding(
        f"with its registers no patches of {result.models[model]} stand out in late blocks, and "
        f"registers have the large norms",
        "Darcet et al. 2024, Fig. 7",
        combine(
            [
                decided(-late[0], late[1], -A_FEW),
                decide(ratio[0], ratio[1], ABOVE, result.meta["n"]),
            ]
        ),
        f"share of patches above {result.meta['times']:g} times the layer's median, last third of "
        f"blocks {_per_cent(*late)} (threshold < {A_FEW:.1%}); largest register of the last "
        f"layer over the patches' 99th percentile {plus_minus(*ratio)} (threshold > {ABOVE})",
        "registers in the outliers' stead",
        models=[result.models[model]],
    )


def _thirds(result: Any, rows: np.ndarray) -> list[tuple[float, float]]:
    """Mean share of outliers in the first and the last third of blocks, and standard errors.

    Blocks see the same images: their errors are added as if they went together.
    """
    third = max(1, len(rows) // 3)
    return [
        (float(result.outlier_share[part].mean()), float(result.outlier_share_se[part].mean()))
        for part in (rows[:third], rows[-third:])
    ]


def _per_cent(value: float, error: float) -> str:
    return f"{100 * value:.2f} ± {100 * error:.2f} %" if np.isfinite(error) else f"{value:.2%}"
