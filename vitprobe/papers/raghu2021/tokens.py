"""Claims on what tokens hold: Figures 9 and 10 (localisation), 11 and 13 (linear probes)."""

from __future__ import annotations

from typing import Any

import numpy as np

from vitprobe.results.result import Finding, combine, decide, plus_minus
from vitprobe.statistics.moments import variance_of_mean
from vitprobe.tracing.places import CLASS_TOKEN, CONVOLUTION, MEAN_OF_TOKENS

# Where the paper says "much less localised" and "tokens peak", a number has to be chosen: ours are
# less than half the contrast, and more than half of the interior tokens.
MUCH_LESS, MOST = 0.5, 0.5
# "Far better", in numbers.
FAR = 0.1
OWN_READOUT = {CLASS_TOKEN: "CLS", MEAN_OF_TOKENS: "mean", CONVOLUTION: "mean"}


def localization(result: Any) -> list[Finding]:
    """Raghu et al.'s claims of Figures 9 and 10 on the trained models at hand."""
    last, kinds = result._last_layers(), result.meta["kinds"]
    by_class = [m for m, kind in enumerate(kinds) if kind == CLASS_TOKEN]
    found = [_peaks(result, m, last[m]) for m in by_class]
    for m, kind in enumerate(kinds):
        if kind in (MEAN_OF_TOKENS, CONVOLUTION):
            source = "Fig. 10" if kind == MEAN_OF_TOKENS else "Fig. 9"
            found += [_less_localised(result, last[m], last[a], source) for a in by_class]
        if kind == CONVOLUTION and (result.model_of_layer == m).sum() > 2:
            found.append(_earlier_unit(result, m, last[m]))
    return found


def _peaks(result: Any, model: int, layer: int) -> Finding:
    share = result.peak_share[layer], result.peak_share_se[layer]
    return Finding(
        f"interior tokens of {result.models[model]} peak at their own patch",
        "Raghu et al. 2021, Fig. 9",
        decide(*share, MOST, result.meta.get("replicates")),
        f"share {plus_minus(*share)} (threshold > {MOST})",
        "interior tokens keep their place",
        str(result.layers[layer]),
        [result.models[model]],
    )


def _less_localised(result: Any, less: int, more: int, source: str) -> Finding:
    # Both saw the same batches; taking the two as independent errs on the wide side.
    gap = MUCH_LESS * result.contrast[more] - result.contrast[less]
    error = np.hypot(MUCH_LESS * result.contrast_se[more], result.contrast_se[less])
    names = [result.models[result.model_of_layer[i]] for i in (less, more)]
    numbers = [plus_minus(result.contrast[i], result.contrast_se[i]) for i in (less, more)]
    return Finding(
        f"the last block of {names[0]} is much less localised than that of {names[1]}",
        f"Raghu et al. 2021, {source}",
        decide(float(gap), float(error), 0.0, result.meta.get("replicates")),
        f"contrast {numbers[0]} against {numbers[1]} (threshold < {MUCH_LESS} times the latter)",
        "last block much less localised",
        f"{result.layers[less]} and {result.layers[more]}",
        names,
    )


def _earlier_unit(result: Any, model: int, last: int) -> Finding:
    rows = result.rows_of(model)
    middle = rows[len(rows) // 2]
    gap = float(result.contrast[middle] - result.contrast[last])
    error = float(np.hypot(result.contrast_se[middle], result.contrast_se[last]))
    return Finding(
        f"an earlier unit of {result.models[model]} is more localised than its last",
        "Raghu et al. 2021, Appendix D",
        decide(gap, error, 0.0, result.meta.get("replicates")),
        f"contrast of {result.layers[middle]} minus that of {result.layers[last]}: "
        f"{plus_minus(gap, error)} (threshold > 0)",
        "earlier units more localised",
        f"{len(rows)} blocks",
        [result.models[model]],
    )


def linear_probe(result: Any) -> list[Finding]:
    """Raghu et al.'s claims of Figures 11 and 13 on the trained models at hand."""
    kinds = result.meta["kinds"]
    found = []
    for a, kind in enumerate(kinds):
        if kind == CLASS_TOKEN:
            found += [_tokens_apart(result, a, b)
                      for b, other in enumerate(kinds) if other == MEAN_OF_TOKENS]  # fmt: skip
            if (result.model_of_layer == a).sum() > 2:
                found.append(_late(result, a))
        if kind in OWN_READOUT:
            found.append(_own_is_best(result, a, OWN_READOUT[kind]))
    return found


def _difference(result: Any, *terms: tuple[int, str, float]) -> tuple[float, float]:
    """A weighted sum of accuracies (layer, readout, weight) and its standard error.

    The draws are paired. That the test images are, too, is left out of account: wider errors.
    """
    places = [(layer, result.readouts.tolist().index(name)) for layer, name, _ in terms]
    weights = [weight for *_, weight in terms]
    draws = np.sum([w * result.accuracy_of_draw[:, i, r]
                    for w, (i, r) in zip(weights, places)], axis=0)  # fmt: skip
    p = [result.accuracy[place] for place in places]
    tests = sum(w * w * v * (1 - v) for w, v in zip(weights, p)) / result.meta["n"]
    return float(draws.mean()), float(np.sqrt(variance_of_mean(draws) + tests))


def _last(result: Any, model: int) -> int:
    return int(result.rows_of(model)[-1])


def _at(result: Any, layer: int, readout: str) -> str:
    r = result.readouts.tolist().index(readout)
    return f"{readout} {plus_minus(result.accuracy[layer, r], result.accuracy_se[layer, r])}"


def _tokens_apart(result: Any, by_class: int, by_mean: int) -> Finding:
    i, j = _last(result, by_class), _last(result, by_mean)
    gap = _difference(result, (j, "tokens", 1), (i, "tokens", -1))
    return Finding(
        f"spatial tokens of the last block probe far better in {result.models[by_mean]} than in "
        f"{result.models[by_class]}",
        "Raghu et al. 2021, Fig. 11",
        decide(*gap, FAR),
        f"{result.models[by_mean]} {_at(result, j, 'tokens')}, {result.models[by_class]} "
        f"{_at(result, i, 'tokens')}, difference {plus_minus(*gap)} (threshold > {FAR})",
        "spatial tokens probe far better",
        f"{result.layers[i]} and {result.layers[j]}",
        [result.models[by_class], result.models[by_mean]],
    )


def _own_is_best(result: Any, model: int, own: str) -> Finding:
    last = _last(result, model)
    others = [name for name in ("tokens", "CLS", "first patch", "mean") if name != own]
    # ``all`` is no aggregation: it holds every other readout.
    others = [n for n in others
              if np.isfinite(result.accuracy[last, result.readouts.tolist().index(n)])]  # fmt: skip
    gaps = [_difference(result, (last, own, 1), (last, name, -1)) for name in others]
    return Finding(
        f"the readout that {result.models[model]} was trained with ({own}) is its best at the "
        f"last block",
        "Raghu et al. 2021, Fig. 11",
        combine([decide(*gap) for gap in gaps]),
        ", ".join(_at(result, last, name) for name in (own, *others)),
        "its own readout is best",
        str(result.layers[last]),
        [result.models[model]],
    )


def _late(result: Any, model: int) -> Finding:
    rows = result.rows_of(model)
    first, middle, last = int(rows[0]), int(rows[(len(rows) - 1) // 2]), int(rows[-1])
    gap = _difference(result, (last, "CLS", 1), (middle, "CLS", -2), (first, "CLS", 1))
    return Finding(
        f"the class token of {result.models[model]} becomes useful late: it gains more accuracy "
        f"in the second half of depth than in the first",
        "Raghu et al. 2021, Fig. 11",
        decide(*gap),
        ", ".join(f"{result.layers[i]} {_at(result, i, 'CLS')}" for i in (first, middle, last))
        + f"; late gain minus early {plus_minus(*gap)} (threshold > 0)",
        "class token becomes useful late",
        f"{len(rows)} blocks",
        [result.models[model]],
    )
