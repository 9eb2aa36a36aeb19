"""Linear probes for all layers and readouts of several models, in passes over the images.

A layer gives each image a row of vectors: its places, its tokens without a place (the class token
first), and the mean of its places. Each vector gets a probe, and so do all places and tokens side
by side: the Gram of their standardised features is the sum of the Grams of the vectors, so it costs
no product of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vitprobe.running.grids import Placed
from vitprobe.running.loop import run
from vitprobe.running.measurement import check_finite
from vitprobe.running.session import Batch, Session
from vitprobe.statistics.ridge import PENALTIES, dual, ridge, signed_targets, standardise
from vitprobe.tracing.places import Places

READOUTS = ("tokens", "CLS", "first patch", "mean", "all")
# Features of one draw, and the matrices of all solutions at a time, stay below these.
HELD_BYTES, SOLVED_BYTES = 2**31, 2**28
# Those of one solution on one of several threads: about what caches hold.
PIECE_BYTES = 2**24


@dataclass(frozen=True)
class Probe:
    """The probes of one layer, of one draw or of several side by side.

    Attributes:
        centre: (vectors, features) what is subtracted first, so that no digits are lost.
        weights: (vectors, features, 2, draws, classes): the vector's own probe, and its part of
            the probe on all of them (0 for the mean of places, which is no part).
        bias: (vectors, draws, classes).
        joint_bias: (draws, classes).
        penalty: (draws, vectors + 1) chosen; that of the probe on all of them at the end.
    """

    centre: Tensor
    weights: Tensor
    bias: Tensor
    joint_bias: Tensor
    penalty: Tensor

    def correct(self, features: Tensor, labels: Tensor) -> Tensor:
        """(n, vectors, features) -> (draws, vectors + 1): how many images are told rightly."""
        centred = (features.to(self.centre) - self.centre).transpose(0, 1)
        scores = torch.bmm(centred, self.weights.flatten(2))
        scores = scores.unflatten(2, self.weights.shape[2:])  # (vectors, n, 2, draws, classes)
        own = scores[:, :, 0] + self.bias[:, None]
        joint = scores[:, :, 1].sum(0) + self.joint_bias
        found = torch.cat([own, joint[None]]).argmax(-1)
        return (found == labels.to(found.device)[:, None]).sum(1).T.double()


def side_by_side(probes: list[Probe]) -> Probe:
    """The same layer's probes of several draws as one, which reads the features once."""
    centre = probes[0].centre
    bias, joint_bias = [], []
    for one in probes:
        # Each draw has a mean of its own; the shift to the first one's goes into the biases.
        shift = (centre.double() - one.centre.double())[:, None]
        moved = (shift @ one.weights.double().flatten(2)).unflatten(2, one.weights.shape[2:])[:, 0]
        bias.append(one.bias + moved[:, 0].to(centre))
        joint_bias.append(one.joint_bias + moved[:, 1].sum(0).to(centre))
    return Probe(
        centre,
        torch.cat([one.weights for one in probes], 3),
        torch.cat(bias, 1),
        torch.cat(joint_bias),
        torch.cat([one.penalty for one in probes]),
    )


@dataclass(frozen=True)
class TestCounts:
    """Accuracies: (draws, L, readouts); (L, rows, columns); and penalties (L, readouts)."""

    accuracy: np.ndarray
    places: np.ndarray
    penalty: np.ndarray


def vectors(tensor: Tensor, places: Places, grid: tuple[int, int]) -> Tensor:
    """(n, vectors, features): places on the grid, tokens without a place, mean of places."""
    spatial = places.spatial(tensor)
    mean = spatial.mean(1, keepdim=True)
    if (places.rows, places.columns) != grid:
        maps = spatial.mT.unflatten(2, (places.rows, places.columns))
        spatial = adaptive_avg_pool2d(maps, grid).flatten(2).mT
    return torch.cat([spatial, places.rest(tensor), mean], 1)


def fit_probe(features: Tensor, labels: Tensor, classes: int) -> Probe:
    """Probes of one layer from (n, vectors, features), in float64; kept in the features' type."""
    n, count, width = features.shape
    targets = signed_targets(labels, classes)
    weights = features.new_zeros(count, width, 2, 1, classes)
    bias = features.new_zeros(count, 1, classes)
    mean, scale = targets.new_zeros(2, count, width)
    penalty = targets.new_zeros(1, count + 1)

    def own(piece: slice) -> Tensor:
        """The probe of each vector; returns their part of the joint Gram."""
        rows = _rows(features[:, piece])
        mean[piece], scale[piece] = standardise(rows)
        grams = rows @ rows.mT
        if n <= width + 1:
            # The Gram of the constant feature is 1 everywhere.
            coefficients, penalty[0, piece] = dual(grams + 1, targets)
            found, constant = coefficients.mT @ rows, coefficients.sum(1)
        else:
            together = torch.cat([rows, rows.new_ones(len(rows), n, 1)], 2)
            solved, penalty[0, piece] = ridge(together, targets)
            found, constant = solved[:, :-1].mT, solved[:, -1]
        weights[piece, :, 0, 0] = (found / scale[piece, None]).mT.to(weights)
        bias[piece, 0] = constant.to(bias)
        return grams[: count - 1 - piece.start].sum(0)

    def joint(piece: slice) -> None:
        centred = _rows(features[:, piece]).sub_(mean[piece, None])
        found = coefficients.mT @ centred / scale[piece, None].square()
        weights[piece, :, 1, 0] = found.mT.to(weights)

    each = 8 * (3 * n * width + 5 * min(n, width + 1) ** 2 + 2 * n * len(PENALTIES) * classes)
    with _shared_out(count, each, features.device) as (over, pieces):
        joint_gram = torch.stack(list(over(own, pieces))).sum(0) + 1
        coefficients, penalty[0, -1] = dual(joint_gram, targets)
        list(over(joint, pieces))
    weights[-1, :, 1] = 0
    return Probe(mean.to(bias), weights, bias, coefficients.sum(0)[None].to(bias), penalty)


def _rows(features: Tensor) -> Tensor:
    """(n, vectors, features) -> (vectors, n, features), a copy in float64."""
    n, count, width = features.shape
    rows = features.new_empty(count, n, width, dtype=torch.float64)
    return rows.copy_(features.transpose(0, 1))


@contextmanager
def _shared_out(
    count: int, each: int, device: torch.device
) -> Iterator[tuple[Callable[..., Iterator[Any]], list[slice]]]:
    """A ``map`` for work on ``count`` vectors, each of so many bytes, and pieces to map over.

    LAPACK takes one thread for a small eigenproblem, and torch one problem after the other: on a
    CPU every thread is given pieces of its own, small enough for its cache.
    """
    threads = torch.get_num_threads()
    alone = device.type != "cpu" or threads == 1 or threads * each > SOLVED_BYTES
    size = max(1, (SOLVED_BYTES if alone else PIECE_BYTES) // each)
    pieces = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    if alone:
        yield map, pieces
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map, pieces
    finally:
        torch.set_num_threads(threads)  # what threads of later on start with


def fit_draw(ready: Session, placed: list[Placed], classes: int) -> list[Probe]:
    """The probes of every layer, fitted on the session's images."""
    labels = torch.from_numpy(ready.images.chosen_labels())
    probes: list[Probe] = []
    while len(probes) < len(placed):
        now: list[int] = []
        held = 0
        for i in range(len(probes), len(placed)):
            held += 4 * len(labels) * int(np.prod(_shape(placed, i)))
            if held > HELD_BYTES and now:
                break
            now.append(i)
        features, seen = _features(ready, placed, now)
        for i in now:
            # A draw without a broken image is not copied.
            layer = features.pop(i) if seen.all() else features.pop(i)[seen]
            probes.append(fit_probe(layer, labels.to(seen.device)[seen], classes))
    return probes


def count_right(
    placed: list[Placed], grids: list[tuple[int, int]], probes: list[Probe], sums: Any
) -> TestCounts:
    """Accuracies from how many images each probe told right."""
    draws = len(probes[0].penalty)
    accuracy = np.full((draws, len(placed), len(READOUTS)), np.nan)
    logs = np.full(accuracy.shape, np.nan)
    places = np.full((len(placed), *np.max(grids, axis=0)), np.nan)
    for i, (one, (rows, columns)) in enumerate(zip(placed, grids)):
        area = rows * columns
        share = (sums[f"right{i}"] / sums["tested"]).cpu().numpy()
        for values, into in ((share, accuracy), (probes[i].penalty.log().cpu().numpy(), logs)):
            into[:, i, 0] = values[:, :area].mean(1)
            if one.places.has_class:
                into[:, i, 1] = values[:, area]
            into[:, i, 2] = values[:, 0]
            into[:, i, 3] = values[:, -2]
            into[:, i, 4] = values[:, -1]
        places[i, :rows, :columns] = share[:, :area].mean(0).reshape(rows, columns)
    return TestCounts(accuracy, places, np.exp(logs.mean(0)))


def grids_of(placed: list[Placed]) -> list[tuple[int, int]]:
    """That of each model's last layer, for all its layers."""
    last = {one.model: (one.places.rows, one.places.columns) for one in placed}
    return [last[one.model] for one in placed]


def _shape(placed: list[Placed], i: int) -> tuple[int, int]:
    """How many vectors a layer gives, and their features."""
    places, (rows, columns) = placed[i].places, grids_of(placed)[i]
    return rows * columns + len(places.without_place) + 1, places.features


def _features(
    ready: Session, placed: list[Placed], now: list[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """Vectors of the layers (n, vectors, features), and which of the n images could be read."""
    grids, total = grids_of(placed), len(ready.images)
    held = ready.sums(seen=(total,))
    home = held["seen"].device
    for i in now:
        parameters = ready.models[placed[i].model].module.parameters()
        wide = any(parameter.dtype == torch.float64 for parameter in parameters)
        kind = torch.float64 if wide else torch.float32
        held[f"layer{i}"] = torch.zeros(total, *_shape(placed, i), dtype=kind, device=home)

    def step(batch: Batch) -> None:
        rows = torch.from_numpy(batch.positions).to(home)

        def take(i: int, tensor: Tensor) -> None:
            found = vectors(tensor, placed[i].places, grids[i])
            # One pass over them, and no tensor of truth values.
            one = placed[i]
            finite = torch.isfinite(torch.stack(torch.aminmax(found))).all()
            check_finite(finite, one.layer.label, ready.models[one.model])
            held[f"layer{i}"][rows] = found.to(held[f"layer{i}"])

        for m in sorted({placed[i].model for i in now}):
            with captured(ready, m, placed, now, take):
                ready.forward(m, batch)
        held["seen"][rows] = 1

    run(ready, step, held, decides={"analysis": "linear_probe, fitting"})
    return {i: held[f"layer{i}"] for i in now}, held["seen"] > 0


def captured(
    ready: Session, m: int, placed: list[Placed], now: Iterable[int], take: Callable[..., None]
) -> AbstractContextManager[None]:
    """Within it, a pass of model ``m`` hands its layers among ``now`` to ``take``."""
    mine = [i for i in now if placed[i].model == m]

    def reduce(k: int, tensor: Tensor) -> None:
        with torch.autocast(tensor.device.type, enabled=False):
            take(mine[k], tensor)

    return ready.capture(m, [placed[i].layer for i in mine], reduce)
