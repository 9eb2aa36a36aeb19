"""CKA between two networks at the same depth: the diagonal of their comparison.

Raghu et al. 2021 (arXiv 2108.08810), Figure 12: a network trained on a fraction of the data against
the one trained on all of it, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import VitprobeError
from vitprobe.results import drawing
from vitprobe.results.result import Finding, decide, plain, plus_minus
from vitprobe.statistics.hsic import jackknife, normalise

# How much "less alike" and "more alike" are, in CKA: ours. Networks that learnt nothing differ as
# surely, by less.
CHANGE = 0.05


def in_pairs(models: Any) -> tuple[list[Any], list[list[int]]]:
    """A B A2 B2 ... -> each model once, and the pairs as indices into that list.

    Raises:
        VitprobeError: an odd number of models, or none.
    """
    given = (
        list(models) if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    )
    if len(given) < 2 or len(given) % 2:
        raise VitprobeError(
            f"--pairwise takes models in pairs, A B A2 B2 ..., not {len(given)} of them."
        )
    # By identity where it is no name: modules need not be hashable, nor equal when alike.
    keys = [model if isinstance(model, str) else id(model) for model in given]
    order = list(dict.fromkeys(keys))
    pairs = [[order.index(a), order.index(b)] for a, b in zip(keys[::2], keys[1::2])]
    return [given[keys.index(key)] for key in order], pairs


def check_lengths(pairs: list[list[int]], names: list[str], owner: np.ndarray) -> None:
    """Raise VitprobeError where a pair has no common depth."""
    counts = np.bincount(owner)
    for a, b in pairs:
        if counts[a] != counts[b]:
            raise VitprobeError(
                f"{names[a]} has {counts[a]} layers and {names[b]} has {counts[b]}: --pairwise "
                f"compares networks of one depth."
            )


def summaries(
    pairs: list[list[int]], owner: np.ndarray, hsic: Tensor, used: Tensor
) -> list[dict[str, Any]]:
    """What the findings rest on, (value, standard error) each, for every pair.

    ``fall``: mean CKA of the lowest third of layers minus that of the highest. ``rise``: mean CKA
    minus that of the pair before, where both have the same second model.
    """
    rows = [torch.from_numpy(np.flatnonzero(owner == m)) for m in range(int(owner.max()) + 1)]

    def statistic(total: Tensor) -> Tensor:
        values = normalise(total).cpu()
        lines = [values[rows[a], rows[b]] for a, b in pairs]
        falls = [_third(line, slice(None)) - _third(line, slice(None, None, -1)) for line in lines]
        means = [line.nanmean() for line in lines]
        rises = [mean - before for mean, before in zip(means, [means[0], *means])]
        return torch.stack([torch.stack(part) for part in (falls, means, rises)])

    value, error = jackknife(statistic, hsic, used)
    found: list[dict[str, Any]] = []
    for i, pair in enumerate(pairs):
        numbers = [[plain(v), plain(e)] for v, e in zip(value[:, i], error[:, i])]
        found.append({"pair": pair, "fall": numbers[0], "mean": numbers[1]})
        if i and pairs[i - 1][1] == pair[1]:
            found[i]["rise"] = numbers[2]
    return found


def _third(line: Tensor, direction: slice) -> Tensor:
    order = list(range(len(line)))[direction]
    return line[order[: max(1, len(line) // 3)]].nanmean()


def draw(ax: Any, result: Any) -> Any:
    """A line per pair, CKA against depth, with standard errors; ``result`` is a ``CKAResult``."""
    pairs = [one["pair"] for one in result.meta["same_depth"]]
    named = [result.layers[result.model_of_layer == a] for a, _ in pairs]
    # Pairs of several depths have no layers in common, only shares of their depth.
    alike = len({len(names) for names in named}) == 1
    for (a, b), names in zip(pairs, named):
        value, error = result.diagonal(a, b)
        x = np.arange(len(names)) / (1 if alike else max(1, len(names) - 1))
        ax.errorbar(
            x, value, error, marker="o", markersize=3, capsize=2,
            label=f"{result.models[a]} × {result.models[b]}",
        )  # fmt: skip
    if alike:
        label = f"layer (names of {result.models[pairs[0][0]]})"
        drawing.layer_axis(ax.xaxis, [str(name) for name in named[0]], label)
    else:
        ax.set_xlabel("depth (share of layers)")
    ax.set_ylabel("CKA at the same depth")
    ax.set_ylim(min(0.0, ax.get_ylim()[0]), 1.02)
    ax.legend()
    return ax


def findings(result: Any) -> list[Finding]:
    """Raghu et al.'s claim of Figure 12, for pairs in the order of growing training data."""
    found: list[Finding] = []
    names = result.models
    decided = partial(decide, replicates=result.meta.get("replicates"))
    for before, one in zip([None, *result.meta["same_depth"]], result.meta["same_depth"]):
        a, b = one["pair"]
        over = f"{len(result.rows_of(a))} layers"
        found.append(
            Finding(
                f"{names[a]} and {names[b]} are less alike at the same depth, the deeper it is",
                "Raghu et al. 2021, Fig. 12",
                decided(one["fall"][0], one["fall"][1], CHANGE),
                f"mean CKA of the lowest third minus that of the highest: "
                f"{plus_minus(*one['fall'])} (threshold > {CHANGE}); of all layers "
                f"{plus_minus(*one['mean'])}",
                "less alike the deeper",
                over,
                [names[a], names[b]],
            )
        )
        if before is not None and "rise" in one:
            found.append(
                Finding(
                    f"{names[a]} is more like {names[b]} than {names[before['pair'][0]]} is "
                    f"(pairs given from little to much training data)",
                    "Raghu et al. 2021, Fig. 12",
                    decided(one["rise"][0], one["rise"][1], CHANGE),
                    f"mean CKA at the same depth {plus_minus(*one['mean'])}, "
                    f"{plus_minus(*one['rise'])} above the pair before (threshold > "
                    f"{CHANGE})",
                    "more alike with more data",
                    over,
                    [names[a], names[b], names[before["pair"][0]]],
                )
            )
    return found
