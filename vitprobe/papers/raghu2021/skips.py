"""Claims on skip connections: Figures 7 (their norms) and 8 (networks without them)."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import numpy as np

from vitprobe.results.result import Finding, combine, decide, plus_minus

# How much CKA across the block has to lose, and what may be left of it: ours. Layers of random
# weights lose as much and stay alike, mostly at 0.7 and more.
COLLAPSE, ALIKE = 0.1, 0.5
# "Above" and "below", of logarithms of ratios: ours, a quarter of the ratio. Tokens of random
# weights differ as surely, mostly by less.
ABOVE = 0.25


def ratio(result: Any) -> list[Finding]:
    """Raghu et al.'s claims of Figure 7 for every model with a class token, and every pair."""
    source, layouts = "Raghu et al. 2021, Fig. 7", result.meta["layouts"]
    logs = np.stack([result.log_ratio, result.log_ratio_se], axis=2).tolist()
    found = []
    decided = partial(decide, replicates=result.meta["n"])
    for model, name in enumerate(result.models):
        first, second, _ = logs[model]
        if result.class_token(model) is None:
            continue
        found.append(
            Finding(
                f"in {name} the class token's ratio is above the spatial tokens' in the first "
                f"half, below in the second",
                source,
                combine(
                    [decided(first[0], first[1], ABOVE), decided(-second[0], second[1], ABOVE)]
                ),
                f"mean log ratio of class token minus spatial: first half "
                f"{plus_minus(*first)}, second half {plus_minus(*second)} "
                f"(thresholds > {ABOVE} and < -{ABOVE})",
                "class token above, then below",
                f"{len(result.of(model))} additions",
                [name],
            )
        )
    for a, b in product(range(len(layouts)), repeat=2):
        if not layouts[a]["attends"] or layouts[b]["attends"]:
            continue
        vit, cnn = logs[a][2], logs[b][2]
        difference = vit[0] - cnn[0], float(np.hypot(vit[1], cnn[1]))
        found.append(
            Finding(
                f"the ratios of {result.models[a]} are above those of {result.models[b]}",
                source,
                decided(*difference, ABOVE),
                f"mean log ratio over locations and additions {plus_minus(*vit)} and "
                f"{plus_minus(*cnn)}, difference {plus_minus(*difference)} "
                f"(threshold > {ABOVE})",
                "ViT ratios above the CNN's",
                f"{len(result.of(a))} and {len(result.of(b))} additions",
                [result.models[a], result.models[b]],
            )
        )
    return found


def ablation(result: Any) -> list[Finding]:
    """Raghu et al.'s claim of Figure 8 for every block without skips."""
    trained = result.meta["trained_without"]
    source = "Raghu et al. 2021, Fig. 8"
    if not trained:
        source += ", there for networks trained without, here removed at test time"
    found = []
    decided = partial(decide, replicates=result.meta.get("replicates"))
    for panel in np.flatnonzero(result.block != ""):
        name, block = result.models[result.model_of_panel[panel]], result.block[panel]
        value, error = result.means[panel], result.means_se[panel]
        loss, loss_se = result.loss[panel].tolist()
        found.append(
            Finding(
                f"without the skips of {block}, {result.meta['experiment']}, layers of {name} "
                f"before and after it are no longer alike",
                source,
                combine(
                    [
                        decided(loss, loss_se, COLLAPSE),
                        decided(-float(value[0]), float(error[0]), -ALIKE),
                    ]
                ),
                f"mean CKA across the block {plus_minus(value[0], error[0])} (threshold "
                f"< {ALIKE}), with skips {plus_minus(value[2], error[2])}, loss "
                f"{plus_minus(loss, loss_se)} (threshold > {COLLAPSE}); within the sides "
                f"{plus_minus(value[1], error[1])}, with skips {plus_minus(value[3], error[3])}",
                "alike no longer across the block",
                f"{(result.layers[panel] != '').sum()} layers",
                [name],
            )
        )
    return found
