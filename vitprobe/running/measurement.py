"""What a measurement is to the loop.

A ``Measurement`` holds its options. ``prepare`` looks at an example and gives a ``Watch``, which
says what it watches in a pass and what it adds up. The passes are made in ``passes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from vitprobe.errors import BatchFailure, VitprobeError
from vitprobe.models.loading import Model
from vitprobe.results.result import Result
from vitprobe.running.options import Options
from vitprobe.running.session import Batch, Session, Sums
from vitprobe.statistics.hsic import MAX_GROUPS


class Watch:
    """One measurement in one session; subclasses fill in what it watches.

    Attributes:
        ready: the session of its models; numbers of models below are numbers in it.
        sums: float64 totals over images, made by ``ready.sums``; everything else is derived.
        decides: what decides the result beside the session's own facts.
        scratch: bytes needed for a batch beside the forward passes.
        groups: into how many groups the batches are dealt out, for standard errors.
        used: (groups,) how many batches are in each.
    """

    def __init__(
        self,
        ready: Session,
        sums: Sums,
        decides: dict[str, Any],
        *,
        scratch: int = 0,
        groups: int | None = None,
    ) -> None:
        self.ready, self.sums, self.decides, self.scratch = ready, sums, decides, scratch
        self.groups = groups or min(MAX_GROUPS, len(ready.batches))
        self.used = ready.sums(used=(self.groups,))["used"]

    def group(self, batch: Batch) -> int:
        """The group that a batch is in."""
        return batch.index % self.groups

    def watching(self, m: int, batch: Batch) -> AbstractContextManager[Any]:
        """Around the forward pass of model ``m``: hooks, observers."""
        return nullcontext()

    def end(self, batch: Batch) -> None:
        """After the passes of all models: passes of its own, and the batch into ``sums``."""

    def result(self, meta: dict[str, Any]) -> Result:
        """The result from the totals."""
        raise NotImplementedError


@dataclass(frozen=True)
class Measurement:
    """The options of a measurement; subclasses are frozen dataclasses of them.

    Attributes:
        analysis: its name, that of its module.
        at_least: images that it needs in a batch.
        gradients: it makes passes of its own, with autograd, in place of the shared ones.
        first: how many images it looks at of those that others look at too; all by default.
    """

    analysis: ClassVar[str] = ""
    at_least: ClassVar[int] = 1
    gradients: ClassVar[bool] = False

    first: int | None = field(default=None, kw_only=True)

    def on(
        self, models: list[Model], images: Any, options: Options, shared: bool
    ) -> tuple[Measurement, Any, Options]:
        """The measurement as it is made on these images, and which of them it looks at.

        Args:
            models: loaded.
            images: as they were given.
            options: as they were given.
            shared: whether others are measured too; those on the same images share their passes.
        """
        return self, images, options

    def over(self, ready: Session) -> list[list[int]]:
        """The sets of models that it is made on in a run of several measurements, by number."""
        return [list(range(len(ready.models)))]

    def prepare(self, ready: Session) -> Watch:
        """Choose what to watch.

        Raises:
            NotApplicable: a model that cannot have it; ``model`` names it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class WeightsMeasurement(Measurement):
    """A measurement that looks at the models alone, and at no images."""

    def of(self, models: Sequence[Model], seed: int) -> Result:
        """The result; ``seed`` is what untrained weights were drawn by.

        Raises:
            NotApplicable: a model that cannot have it; ``model`` names it.
        """
        raise NotImplementedError


def check_batch_size(options: Options, at_least: int) -> None:
    """Raise VitprobeError where batches are too small for an estimator."""
    if options.batch_size < at_least:
        raise VitprobeError(
            f"CKA needs batches of at least {at_least} images, not --batch-size "
            f"{options.batch_size}."
        )


def check_finite(finite: bool | Tensor, label: str, model: Model, of: str = "layer") -> None:
    """Raise BatchFailure, which names the layer, where a value (``of`` it) is not finite."""
    if not finite:
        raise BatchFailure(
            f"The {of} {label} of {model.name} is not finite; it is the first such layer."
        )
