"""Which measurements a model can have, and why not: each is prepared on an example, and says so."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.images.sources import Images
from vitprobe.models.example import at_an_example
from vitprobe.models.loading import Model, wrap
from vitprobe.running.measurement import Measurement, WeightsMeasurement
from vitprobe.running.options import Options
from vitprobe.running.session import Session, session

# As many stand-ins as any measurement wants; only the two that differ are ever computed with.
STAND_INS = 64
# Options that say how much a preparation computes, and nothing of whether it can be made.
LITTLE = {"shots": 1, "draws": 1}
BESIDE = "beside another model"


@dataclass(frozen=True)
class _StandIns:
    """The two images of an example, again and again."""

    example: Tensor
    tensors: bool = True

    def __getitem__(self, index: int) -> Tensor:
        return self.example[index % 2]


def stand_ins(example: Tensor) -> Images:
    """Images in two classes for preparations, which look at no more than an example of them.

    Args:
        example: (2, C, H, W).
    """
    return Images(
        "stand-ins",
        _StandIns(example.detach().cpu()),
        np.arange(STAND_INS),
        digest="",
        labels=np.arange(STAND_INS) % 2,
        classes=("0", "1"),
    )


def example_of(model: Model, options: Options) -> Tensor:
    """(2, C, H, W) noise of the size that a model takes, or bundled images as it sees them."""
    if model.transform is not None and model.input_size is None:
        with session([model], None, replace(options, num_images=2)) as ready:
            return ready.example()[0].cpu()
    with at_an_example(model) as image:
        return torch.cat([image, image.flip(-1)]).cpu()


@contextmanager
def at_stand_ins(model: Model, example: Tensor, options: Options) -> Iterator[Session]:
    """A session of a model on stand-ins for images of the size of an example."""
    with session([model], stand_ins(example), replace(options, num_images=None)) as ready:
        yield ready


def applicable(
    measurements: Mapping[str, type[Measurement]], ready: Session, example: Tensor
) -> dict[str, str]:
    """For each measurement nothing, or what keeps the model from having it.

    ``BESIDE`` says that it can have it together with a model of another kind.

    Args:
        measurements: the classes of their options, by name.
        ready: of ``at_stand_ins``.
        example: the same.
    """
    found = {name: _why_not(kind, ready) for name, kind in measurements.items()}
    lonely = {name: kind for name, kind in measurements.items() if found[name] is None}
    if lonely:
        options = replace(ready.options, names=None)
        company = [*ready.models, *_company(example)]
        with session(company, stand_ins(example), options) as together:
            for name, kind in lonely.items():
                found[name] = _why_not(kind, together)
    return {name: why or "" for name, why in found.items()}


def _why_not(kind: type[Measurement], ready: Session) -> str | None:
    """What keeps the first model from a measurement; None: that it is alone."""
    known = {one.name for one in fields(kind)}
    one = kind(**{name: value for name, value in LITTLE.items() if name in known})
    alone = len(ready.models) == 1
    try:
        # What is said beside results need not be said here.
        with redirect_stderr(io.StringIO()):
            if isinstance(one, WeightsMeasurement):
                one.of(ready.models, ready.options.seed)
                return ""
            one, images, _ = one.on(ready.models, ready.images, ready.options, True)
            at = ready if images is ready.images else ready.on(images)
            try:
                sets = one.over(at)
            except NotApplicable as error:
                if error.model or not alone:
                    raise
                return None
            for chosen in (some for some in sets if 0 in some):
                one.prepare(at if len(chosen) == len(at.models) else at.subset(chosen))
                return "" if alone else BESIDE
    except VitprobeError as error:
        return str(error)
    return f"{ready.models[0].name} has no such model beside it."


def _company(example: Tensor) -> list[Any]:
    """A model with attention and one without, which take images of this size."""
    channels, *size = example.shape[1:]
    with torch.random.fork_rng(devices=[]):
        vit = timm.create_model(
            "test_vit", img_size=tuple(size), in_chans=channels, dynamic_img_pad=True
        )
        cnn = timm.create_model("test_resnet", in_chans=channels)
    return [wrap(vit.eval(), "a ViT"), wrap(cnn.eval(), "a CNN")]
