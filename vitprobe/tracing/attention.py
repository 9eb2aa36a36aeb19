"""The attention probabilities of any architecture, reduced on the spot.

``map_attention`` finds a model's attention layers and the places of their tokens; within
``observe`` every forward pass hands their probabilities to a function, block by block. No
probability outlives its layer, and few exist at a time: 1,369 tokens cost no more than 197.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vitprobe.errors import BatchFailure, NotApplicable, VitprobeError
from vitprobe.statistics.attention_information import faint
from vitprobe.tracing.attention_map import AttentionLayer, AttentionMap, map_attention
from vitprobe.tracing.attention_operations import AttentionObserver, Operation, joined
from vitprobe.tracing.observing import observers_of, observing
from vitprobe.tracing.rounding import (
    among_few,
    decide,
    row_tolerance,
    same_twice,
    suspects,
)

__all__ = ["AttentionLayer", "AttentionMap", "map_attention", "observe"]

# Elements of a block of probabilities: near the caches of a CPU, few large launches elsewhere.
_CPU_BLOCK, _DEVICE_BLOCK = 2**21, 2**25

_Again = Callable[[Tensor, Tensor], Tensor] | None
Reduce = Callable[[int, Tensor, slice, slice], None]
"""``reduce(i, probabilities, images, queries)`` for layer i: float32 or float64 (images, groups,
heads, queries, keys), and which images of the batch and which queries these are. The block must
not be kept or changed."""


@contextmanager
def observe(
    module: nn.Module,
    attention: AttentionMap,
    reduce: Reduce | None = None,
    outputs: Callable[[int, Tensor], None] | None = None,
    only: Collection[int] | None = None,
    among: Sequence[Tensor] | None = None,
) -> Iterator[None]:
    """Within it, every forward pass hands its attention to ``reduce``.

    Who is entered inside another with the same map shares the probabilities with it, which are
    then recomputed once.

    Args:
        module: the model that ``attention`` is of, in evaluation mode.
        attention: of ``map_attention`` on images of the same size.
        reduce: gets every layer's probabilities, in order; a layer's blocks follow each other.
        outputs: ``outputs(i, tensor)`` gets what layer i's heads put out, before heads are joined:
            (images, groups, heads, queries, features).
        only: numbers of the layers wanted; all by default.
        among: (groups, keys) for each layer, which keys count for ``reduce``, which brings rows to
            sum 1 among them. A row that gives these so little that its digits are lost is handed
            over as it is among them alone, computed in float64 from queries and keys; where a
            pass gives no more than the map, it stays as it is.

    Raises:
        VitprobeError: the probabilities are not those that made the layer's output, or the pass
            attends otherwise than the mapped one did. The hooks are gone afterwards.
    """
    chosen = range(len(attention.layers)) if only is None else only
    reader = _Reader(reduce, outputs, chosen, among)
    for other in observers_of(module):
        if isinstance(other, _Observer) and other.attention is attention:
            other.readers.append(reader)
            try:
                yield
            finally:
                other.readers.remove(reader)
            return
    with observing(module, _Observer(attention, reader)):
        yield


@dataclass(frozen=True, eq=False)
class _Reader:
    """Whom the attention of a pass goes to; see ``observe``."""

    reduce: Reduce | None
    outputs: Callable[[int, Tensor], None] | None
    only: Collection[int]
    among: Sequence[Tensor] | None

    def take(self, i: int, block: Tensor, images: slice, queries: slice, again: _Again) -> None:
        assert self.reduce is not None
        if self.among is not None and again is not None:
            counted = self.among[i]
            given = (block @ counted[:, None, :, None].to(block.dtype))[..., 0]
            few = given < faint(block.dtype)
            if bool(few.any()):
                block = block.clone()
                block[few] = again(few, counted).to(block)
        self.reduce(i, block, images, queries)


class _Observer(AttentionObserver):
    def __init__(self, attention: AttentionMap, reader: _Reader) -> None:
        super().__init__()
        self.attention, self.readers = attention, [reader]
        self.index = {layer.ordinal: i for i, layer in enumerate(attention.layers)}

    def end(self) -> None:
        if self.count != self.attention.operations:
            raise VitprobeError(
                f"{self.attention.model} attended {self.count} times in this pass, but "
                f"{self.attention.operations} times in the first."
            )

    def attend(self, ordinal: int, operation: Operation) -> None:
        i = self.index.get(ordinal)
        if i is None:
            return
        layer = self.attention.layers[i]
        device = operation.query.device.type
        wanted = [reader for reader in self.readers if i in reader.only]
        outputs = [reader.outputs for reader in wanted if reader.outputs is not None]
        reducing = [reader for reader in wanted if reader.reduce is not None]
        with torch.no_grad(), torch.autocast(device, enabled=False):
            if outputs:
                if operation.out is None:
                    raise NotApplicable(
                        f"{layer.label} of {self.attention.model} does not show the output of each "
                        f"of its heads.",
                        self.attention.model,
                    )
                out = layer.arrange(operation.out)
                for take in outputs:
                    take(i, out)
            if reducing:
                for block, images, queries, again in self._blocks(layer, operation):
                    for reader in reducing:
                        reader.take(i, block, images, queries, again)

    def _blocks(
        self, layer: AttentionLayer, operation: Operation
    ) -> Iterator[tuple[Tensor, slice, slice, _Again]]:
        shape = layer.queries.shape[1], layer.keys.shape[1]
        probabilities = None
        if operation.twice is not None:
            self._check_twice(layer, *operation.twice)
        if operation.map is not None:
            probabilities = layer.arrange(operation.map)
            n, found = len(probabilities), tuple(probabilities.shape[-2:])
        else:
            assert operation.value is not None and operation.out is not None
            out = layer.arrange(operation.out)
            # Autocast rounds what it is given only within the operation.
            query, key, value = (
                layer.arrange(operation.full(one)).to(out.dtype)
                for one in (operation.query, operation.key, operation.value)
            )
            mask = _mask(layer, operation, query.shape[-2], key.shape[-2])
            n, found = len(query), (query.shape[-2], key.shape[-2])
        if found != shape:
            raise VitprobeError(
                f"{layer.label} of {self.attention.model} has {found[0]} queries and {found[1]} "
                f"keys in this pass, but {shape[0]} and {shape[1]} in the first."
            )
        again: _Again = None
        for images, queries in _slices(layer, n, operation.query.device.type):
            if probabilities is not None:
                block = _wide(probabilities[images, :, :, queries])
                if operation.altered:
                    self._check_rows(layer, block, probabilities.dtype)
            else:
                rows = None if mask is None else mask[images, :, :, queries]
                wide = None if rows is None or rows.dtype == torch.bool else _wide(rows)
                block = joined(
                    _wide(query[images, :, :, queries]), _wide(key[images]),
                    rows if wide is None else wide, operation.scale,
                )  # fmt: skip
                wide_value = _wide(value[images])
                self._check_output(
                    layer, block @ wide_value, out[images, :, :, queries],
                    query[images, :, :, queries], key[images], wide_value, rows, operation.scale,
                )  # fmt: skip
                again = partial(
                    among_few, query[images, :, :, queries], key[images], rows, operation.scale
                )
            yield block, images, queries, again

    def _check_output(
        self, layer: AttentionLayer, own: Tensor, out: Tensor, query: Tensor, key: Tensor,
        value: Tensor, mask: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        """softmax(qk)v must be what the layer put out, as far as rounding goes."""
        rows = suspects(own, out, query, key, value, scale)
        if rows is not None:
            self._refuse(layer, decide(rows, own, out, query, key, value, mask, scale))

    def _check_twice(
        self, layer: AttentionLayer, out: Tensor, again: Tensor, exactly: Callable[[], Tensor]
    ) -> None:
        """A module must put out the same with its weights and without."""
        self._refuse(layer, same_twice(out, again, exactly))

    def _refuse(self, layer: AttentionLayer, found: tuple[float, float] | None) -> None:
        if found is None:
            return
        off, allowed = found
        if off != off:
            raise BatchFailure(
                f"The attention of {layer.label} of {self.attention.model} is not finite; it is "
                f"the first such layer."
            )
        raise BatchFailure(
            f"The attention recomputed for {layer.label} of {self.attention.model} does not "
            f"give what the layer put out: off by {off:.1e}, where rounding explains {allowed:.1e}."
        )

    def _check_rows(self, layer: AttentionLayer, block: Tensor, dtype: torch.dtype) -> None:
        """A map that was changed after its softmax must still be one of probabilities."""
        off = max(float((block.sum(-1) - 1).abs().max()), -float(block.min()))
        if not off <= row_tolerance(dtype, block.shape[-1]):
            raise NotApplicable(
                f"{layer.label} of {self.attention.model} changes its attention after the softmax: "
                f"the rows are not probabilities (off by {off:.1e}).",
                self.attention.model,
            )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _mask(layer: AttentionLayer, operation: Operation, queries: int, keys: int) -> Tensor | None:
    mask = operation.mask
    if operation.causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=operation.query.device).tril()
    if mask is None:
        return None
    return layer.arrange(mask.expand(*operation.leading(), queries, keys))


def _slices(layer: AttentionLayer, n: int, device: str) -> Iterator[tuple[slice, slice]]:
    """Blocks of images and queries whose probabilities have few enough elements."""
    budget = _CPU_BLOCK if device == "cpu" else _DEVICE_BLOCK
    queries, keys = layer.queries.shape[1], layer.keys.shape[1]
    per_query = layer.rows.size * keys
    images = max(1, min(n, budget // (per_query * queries)))
    rows = max(1, min(queries, budget // (per_query * images)))
    for i in range(0, n, images):
        for q in range(0, queries, rows):
            yield slice(i, min(i + images, n)), slice(q, min(q + rows, queries))
