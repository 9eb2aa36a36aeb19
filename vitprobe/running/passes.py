"""One pass over the images for any number of measurements.

Here is done, once, what every measurement needs: batches that are too small, groups for the
jackknife, provenance, models that cannot have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.images.sources import Images, open_images
from vitprobe.models.loading import Model
from vitprobe.results.result import Result
from vitprobe.running.checkpoint import UntilWritten
from vitprobe.running.loop import run
from vitprobe.running.measurement import Measurement, Watch, WeightsMeasurement, check_batch_size
from vitprobe.running.options import Options
from vitprobe.running.session import Batch, Session, Sums, ready_models, session, told


@dataclass
class _Part:
    """A measurement under way, on some of the session's models."""

    name: str
    measurement: Measurement
    watch: Watch
    chosen: list[int]
    without: dict[str, str]
    counts: Sums  # images in its totals, and in batches too small for it

    def state(self) -> Sums:
        sums = {**self.watch.sums, **self.counts, "used": self.watch.used}
        return {f"{self.name}.{name}": total for name, total in sums.items()}

    def wants(self, batch: Batch) -> bool:
        """Whether a batch goes into its totals."""
        first = self.measurement.first
        if first is not None and batch.positions.min() >= first:
            return False
        if len(batch) >= self.measurement.at_least:
            return True
        self.counts["left_out"] += len(batch)
        return False


class Results(dict[str, Result]):
    """Results by name, and why some are not there.

    Attributes:
        missing: name of a measurement -> why none of the models can have it.
        failed: name of a measurement -> what went wrong, where the others were to go on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.missing: dict[str, str] = {}
        self.failed: dict[str, str] = {}


def measure_one(
    measurement: Measurement, models: Any, images: Any = None, options: Options | None = None
) -> Any:
    """The result of one measurement, which all of the models must be able to have.

    Raises:
        VitprobeError: see the measurement; unknown models or images; activations not finite.
    """
    options = options or Options()
    loaded = ready_models(models, options)
    measurement, images, options = measurement.on(loaded, images, options, False)
    with _opened([measurement], loaded, images, options) as ready:
        return measure_prepared(measurement, ready)


def measure_prepared(measurement: Measurement, ready: Session) -> Any:
    """The result of one measurement on all models of a session."""
    watch, chosen = measurement.prepare(ready), list(range(len(ready.models)))
    part = _part(measurement.analysis, measurement, watch, chosen, {}, ready)
    _run(ready, [part])
    return _result(part)


def measure_each(
    measurements: dict[str, Measurement],
    models: Any,
    images: Any = None,
    options: Options | None = None,
    go_on: bool = False,
) -> Results:
    """Results by name, from one pass over the images for all that look at the same.

    A model that cannot have a measurement is left out of that one, and its result says so
    (``meta["without"]``); where none can have it, ``missing`` says why.

    Args:
        measurements: by the names that their results are to have.
        models: see ``load_models``.
        images: see ``open_images``.
        options: of all.
        go_on: where one fails, make the others; ``failed`` then says why.
    """
    options = options or Options()
    loaded = ready_models(models, options)
    found = Results()
    for shared in _shared(measurements, loaded, images, options, found):
        try:
            found.update(_together(shared, loaded, found, go_on))
        except VitprobeError as error:
            if not go_on:
                raise
            if len(shared) == 1:
                found.failed[shared[0].name] = str(error)
                continue
            kept = options.checkpoint
            failed = list(kept.failed) if isinstance(kept, UntilWritten) else []
            # Whose fault it is shows when each is measured by itself.
            for alone in shared:
                try:
                    found.update(_together([alone], loaded, found, go_on))
                except VitprobeError as own:
                    found.failed[alone.name] = str(own)
            if isinstance(kept, UntilWritten):
                kept.instead(failed)
    for name, one in measurements.items():
        if isinstance(one, WeightsMeasurement):
            try:
                found[name] = _of_weights(one, loaded, options)
            except NotApplicable as error:
                found.missing[name] = str(error)
            except VitprobeError as error:
                if not go_on:
                    raise
                found.failed[name] = str(error)
    order = list(measurements)
    in_order = sorted(found.items(), key=lambda one: order.index(one[0].partition(": ")[0]))
    found.clear()
    found.update(in_order)
    return found


@dataclass(frozen=True)
class _Asked:
    """A measurement that is asked for, and the images that it looks at."""

    name: str
    measurement: Measurement
    images: Images
    options: Options


def _shared(
    measurements: dict[str, Measurement],
    loaded: list[Model],
    images: Any,
    options: Options,
    found: Results,
) -> list[list[_Asked]]:
    """Measurements that share their passes: on the same images, with or without gradients."""
    shared: dict[Any, list[_Asked]] = {}
    opened: dict[Any, Images] = {}
    for name, measurement in measurements.items():
        if isinstance(measurement, WeightsMeasurement):
            continue
        try:
            one, images_of, options_of = measurement.on(loaded, images, options, True)
        except NotApplicable as error:
            found.missing[name] = str(error)
            continue
        at = id(images_of), options_of.num_images
        if at not in opened:
            opened[at] = open_images(images_of, options_of.num_images, options_of.seed)
        chosen = opened[at]
        key = chosen.digest, len(chosen), options_of.batch_size, one.gradients
        options_of = replace(options_of, num_images=None)
        shared.setdefault(key, []).append(_Asked(name, one, chosen, options_of))
    return list(shared.values())


def _together(
    shared: list[_Asked], loaded: list[Model], found: Results, go_on: bool
) -> dict[str, Result]:
    """The results of measurements on the same images, from one pass."""
    measurements = [asked.measurement for asked in shared]
    parts: list[_Part] = []
    with _opened(measurements, loaded, shared[0].images, shared[0].options) as ready:
        ready.goes_on = go_on
        for asked in shared:
            try:
                parts += _prepared(asked.name, asked.measurement, ready)
            except NotApplicable as error:
                found.missing[asked.name] = str(error)
        if parts:
            _run(ready, parts)
        return {part.name: _result(part) for part in parts}


def _of_weights(measurement: WeightsMeasurement, loaded: list[Model], options: Options) -> Result:
    chosen, without = loaded, dict[str, str]()
    while True:
        try:
            with told(chosen, options):
                result = measurement.of(chosen, options.seed)
            break
        except NotApplicable as error:
            left = [model for model in chosen if model.name != error.model]
            if not left or len(left) == len(chosen):
                raise
            chosen, without[error.model] = left, str(error)
    if without:
        result.meta["without"] = without
    return result


@contextmanager
def _opened(
    measurements: Sequence[Measurement], models: list[Model], images: Any, options: Options
) -> Iterator[Session]:
    at_least = max(one.at_least for one in measurements)
    with session(models, images, options, at_least=at_least) as ready:
        check_batch_size(ready.options, at_least)
        yield ready


def _prepared(name: str, measurement: Measurement, ready: Session) -> list[_Part]:
    """A measurement on all models that can have it; more than one where it is made on sets.

    Raises:
        NotApplicable: none can.
    """
    everything = list(range(len(ready.models)))
    parts = []
    for chosen in measurement.over(ready):
        of = "" if chosen == everything else ", ".join(ready.models[m].name for m in chosen)
        label = f"{name}: {of}" if of else name
        without: dict[str, str] = {}
        while True:
            session_of = ready if chosen == everything else ready.subset(chosen)
            try:
                watch = measurement.prepare(session_of)
                break
            except NotApplicable as error:
                left = [m for m in chosen if ready.models[m].name != error.model]
                if not left or len(left) == len(chosen):
                    raise
                chosen, without[error.model] = left, str(error)
        parts.append(_part(label, measurement, watch, chosen, without, ready))
    return parts


def _part(
    name: str,
    measurement: Measurement,
    watch: Watch,
    chosen: list[int],
    without: dict[str, str],
    ready: Session,
) -> _Part:
    return _Part(name, measurement, watch, chosen, without, ready.sums(n=(), left_out=()))


def _run(ready: Session, parts: list[_Part]) -> None:
    """One pass over the images for all parts."""
    sums = {name: total for part in parts for name, total in part.state().items()}

    def step(batch: Batch) -> None:
        active = [(part, batch.of(part.chosen)) for part in parts if part.wants(batch)]
        for m in range(len(ready.models)):
            mine = [(part, of) for part, of in active if m in part.chosen]
            if not mine or any(part.measurement.gradients for part, _ in mine):
                continue
            with ExitStack() as stack:
                for part, of in mine:
                    stack.enter_context(part.watch.watching(part.chosen.index(m), of))
                ready.forward(m, batch)
        for part, of in active:
            part.watch.end(of)
            part.watch.used[part.watch.group(batch)] += 1
            part.counts["n"] += len(batch)

    run(
        ready,
        step,
        sums,
        decides={part.name: part.watch.decides for part in parts},
        gradients=any(part.measurement.gradients for part in parts),
        scratch=max(part.watch.scratch for part in parts),
    )


def _result(part: _Part) -> Result:
    watch, at_least = part.watch, part.measurement.at_least
    if len(watch.ready.batches) and not watch.used.sum():
        raise VitprobeError(f"No batch of at least {at_least} readable images was left.")
    meta = watch.ready.meta(part.measurement.analysis)
    meta["replicates"] = int((watch.used > 0).sum())
    meta["left_out"] = int(part.counts["left_out"])
    meta["n"] = int(part.counts["n"])
    if part.without:
        meta["without"] = part.without
    return watch.result(meta)
