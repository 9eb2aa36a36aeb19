"""Park & Kim 2022, How Do Vision Transformers Work? (arXiv 2202.06709): low-pass and high-pass.

Attention smooths maps: it lowers the share of high frequencies and the variance over locations.
MLPs and convolutions raise both.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from vitprobe.results.result import Finding, combine, decide, plus_minus

# The paper shows it without a number: by how much is ours, 5 % of an amplitude and of a variance.
# Sublayers of random weights change both as surely, by less.
CHANGE = 0.05
SOURCE = "Park & Kim 2022, Fig. 2, 8 and 9"


def findings(result: Any) -> list[Finding]:
    """The claims for every trained model's kinds of sublayers; of a ``FrequencyResult``."""
    found = []
    for model, facts in enumerate(result.meta["models"]):
        if facts["weights"].startswith("random"):
            continue
        for k, kind in enumerate(result.names["step"]):
            rows = result.rows_of(model)
            count = int((result.kind[rows] == kind).sum())
            if count:
                found.append(_claim(result, model, k, kind, count))
    return found


def _claim(result: Any, model: int, k: int, kind: str, count: int) -> Finding:
    high = float(result.step_delta[model, k]), float(result.step_delta_se[model, k])
    variance = float(result.step_variance[model, k]), float(result.step_variance_se[model, k])
    sign = -1 if kind == "attention" else 1
    than = f"< -{CHANGE}" if kind == "attention" else f"> {CHANGE}"
    decided = partial(decide, replicates=result.meta["n"])
    plural = {"attention": "attention", "MLP": "MLPs", "convolution": "convolutional blocks"}[kind]
    does = "lowers" if kind == "attention" else "raise"
    smooth = "smooth" if kind == "attention" else "sharpen"
    return Finding(
        f"{plural} of {result.models[model]} {does} both the high frequencies and the variance of "
        f"maps",
        SOURCE,
        combine(
            [
                decided(sign * high[0], high[1], CHANGE),
                decided(sign * variance[0], variance[1], CHANGE),
            ]
        ),
        f"mean change per sublayer: Δ at the highest frequency below Nyquist {plus_minus(*high)}; "
        f"ln V {plus_minus(*variance)} (thresholds {than})",
        f"{plural} {smooth}{'s' if kind == 'attention' else ''} maps",
        f"{count} sublayer{'s' * (count > 1)} that keep{'s' * (count == 1)} the size of the map",
        [result.models[model]],
    )
