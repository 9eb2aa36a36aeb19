"""Attention traced through all layers, from the output back to the patches.

Dosovitskiy et al. 2021 (arXiv 2010.11929), Figures 6 and 14; Abnar and Zuidema 2020
(arXiv 2005.00928).

The quantity: Â_l = A_l averaged over heads, plus the identity, rows brought to sum 1;
R_l = Â_l R_{l−1}; the class token's row of the last R over the patches, a share of attention
without unit (what stays on class and register tokens is missing from its sum of 1).

Choices made: the class token is the one that the model's output reads, whatever stands beside it;
without one, the mean of the patches' rows. Four images at most unless ``--num-images`` says so; by
default the two photographs that scikit-learn installs, and digit scenes for models that take less
than 64 px. In the figure each map fills [0, 1] by itself; of an image of more than three channels
the first three are shown, of two their mean.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.errors import NotApplicable
from vitprobe.images.sources import Images, open_images
from vitprobe.models.loading import Model
from vitprobe.results import drawing
from vitprobe.results.result import Result, Text
from vitprobe.results.tables import Label
from vitprobe.running.measurement import Measurement, Watch
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.tracing.attention import AttentionMap, observe
from vitprobe.tracing.places import Places, order_of

PICTURES, PHOTOGRAPH_SIDE = 4, 64
# Maps in a figure.
MAX_SHOWN = 64


class Rollout:
    """Multiplies the layers of a pass together as they come.

    Args:
        n: images.
        tokens: of every layer.
        like: a tensor of the device to work on.
    """

    def __init__(self, n: int, tokens: int, like: Tensor) -> None:
        self.identity = torch.eye(tokens, device=like.device)
        self.rollout = self.identity.expand(n, tokens, tokens)
        self._mean = torch.empty(n, tokens, tokens, device=like.device)

    def update(self, i: int, block: Tensor, images: slice, queries: slice) -> None:
        """Take in a block of attention; see ``tracing.attention.Reduce``."""
        self._mean[images, queries] = block[:, 0].mean(1).float()
        n, tokens, _ = self._mean.shape
        if images.stop == n and queries.stop == tokens:
            joint = self._mean + self.identity
            self.rollout = (joint / joint.sum(-1, keepdim=True)) @ self.rollout


@dataclass(frozen=True)
class AttentionRolloutResult(Result):
    """Rollouts of some images through some models.

    Attributes:
        rollout: (maps, rows, columns) share of the attention; padded with NaN.
        pictures: (maps, height, width, 3) uint8, as the model saw them; padded with 0.
        model_of_map: (maps,) index into ``meta["models"]``.
    """

    rollout: np.ndarray
    pictures: np.ndarray
    model_of_map: np.ndarray

    analysis: ClassVar[str] = "attention_rollout"
    text: ClassVar[Text] = Text(
        "Attention rollout",
        "Attention multiplied through all layers, from the class token (or the mean of all tokens) "
        "back to the patches; Dosovitskiy et al., Figures 6 and 14.",
        "Light patches reach the output most. Each map is scaled to its own range, so maps can be "
        "compared in shape and not in strength.",
        "share of the attention",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "rollout": ("image", "row", "column"),
        "model_of_map": ("image",),
    }

    def labels(self) -> list[Label]:
        """Which image a map is of, counted from 0."""
        images = len(self.rollout) // len(self.meta["maps"])
        return [Label("image", np.arange(len(self.rollout)) % images, ("image",))]

    def of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(image, map) of one map, without padding."""
        about = self.meta["maps"][self.model_of_map[index]]
        (height, width), (rows, columns) = about["size"], about["grid"]
        return self.pictures[index, :height, :width], self.rollout[index, :rows, :columns]

    def plot(self, ax: Any = None) -> Any:
        """Image, map and overlay of each map; on ``ax``, the overlay of the first.

        Of many images the first: no figure holds hundreds of them.
        """
        with drawing.style():
            if ax is not None:
                self._overlay(ax, 0)
                return ax
            models, images = len(self.meta["maps"]), len(self.rollout) // len(self.meta["maps"])
            each = min(images, max(1, MAX_SHOWN // models))
            maps = [m * images + i for m in range(models) for i in range(each)]
            count = len(maps)
            across = 2 if count > 1 else 1
            figure = drawing.new_figure(5.4 * across, 1.95 * -(-count // across) + 0.5)
            # A gap between the trios, as wide as it takes to tell them apart.
            ratios = [1, 1, 1, 0.12, 1, 1, 1][: 4 * across - 1]
            axes = figure.subplots(
                -(-count // across), len(ratios), squeeze=False, width_ratios=ratios
            )
            for one in axes.ravel():
                one.set_axis_off()
            trios = [row[start : start + 3] for row in axes for start in (0, 4)[:across]]
            for index, trio in zip(maps, trios):
                image, shown = self.of(index)
                trio[0].imshow(image)
                trio[1].imshow(shown, cmap=drawing.SEQUENTIAL, interpolation="nearest")
                self._overlay(trio[2], index)
                trio[1].set_title(drawing.short(self.models[self.model_of_map[index]]), fontsize=7)
            text = drawing.provenance_line(self.meta)
            text += " Image, rollout to the class token (the mean of the patches' where there is"
            text += " none), and the image weighted by it; each map is scaled to [0, 1]."
            channels = {one.get("channels", 3) for one in self.meta["maps"]}
            if max(channels) > 3:
                text += " Of images of more than three channels the first three are shown."
            if 2 in channels:
                text += " Of images of two channels their mean is shown."
            if each < images:
                text += f" The first {each} of {images} images; all are in the file."
            drawing.caption(figure, text)
            return figure

    def _overlay(self, ax: Any, index: int) -> None:
        image, shown = self.of(index)
        grid = torch.from_numpy((shown - shown.min()) / (np.ptp(shown) or 1.0))
        light = torch.nn.functional.interpolate(
            grid[None, None], size=image.shape[:2], mode="bilinear"
        )[0, 0].numpy()
        ax.imshow((image * light[..., None]).round().astype(np.uint8))
        ax.set_axis_off()


GROUP = "attention"
RESULT = AttentionRolloutResult


@dataclass(frozen=True)
class AttentionRollout(Measurement):
    """It has no options of its own."""

    analysis: ClassVar[str] = "attention_rollout"

    def on(
        self, models: list[Model], images: Any, options: Options, shared: bool
    ) -> tuple[Measurement, Any, Options]:
        if shared and images is not None:
            return replace(self, first=PICTURES), images, options
        opened = _pictures(models, images, options.num_images, options.seed)
        return self, opened, replace(options, num_images=None)

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self.first)


MEASUREMENT = AttentionRollout


class _Watch(Watch):
    """Rollouts of single images, and the images as the models see them."""

    def __init__(self, ready: Session, first: int | None) -> None:
        self.n = min(len(ready.images), first or len(ready.images))
        self.maps = [_one_set_of_tokens(ready.attention(m)) for m in range(len(ready.models))]
        self.orders = [_order(found) for found in self.maps]
        self.class_tokens = [_class_token(ready, m, self.maps[m]) for m in range(len(ready.models))]
        self.about: list[dict[str, Any]] = [
            {
                "grid": list(order.shape),
                "size": list(example.shape[2:]),
                "channels": example.shape[1],
                "class_token": token,
            }
            for order, token, example in zip(self.orders, self.class_tokens, ready.example())
        ]
        count, n = len(self.maps), self.n
        high, wide = np.max([one["grid"] for one in self.about], axis=0).tolist()
        height, width = np.max([one["size"] for one in self.about], axis=0).tolist()
        sums = ready.sums(
            rollout=(count, n, high, wide), pictures=(count, n, 3, height, width), seen=(n,)
        )
        super().__init__(ready, sums, {"first": n})

    @contextmanager
    def watching(self, m: int, batch: Batch) -> Iterator[None]:
        model, found, inputs = self.ready.models[m], self.maps[m], batch.inputs[m]
        kept = batch.positions < self.n
        if not kept.any():
            yield
            return
        work = Rollout(len(batch), found.layers[0].queries.shape[1], inputs)
        with observe(model.module, found, work.update):
            yield
        positions = torch.from_numpy(batch.positions[kept]).to(self.sums["rollout"].device)
        mine = torch.from_numpy(kept).to(inputs.device)
        order = torch.from_numpy(self.orders[m]).to(inputs.device)
        rows, columns = order.shape
        shown = class_row(work.rollout[mine], order, self.class_tokens[m])
        self.sums["rollout"][m, positions, :rows, :columns] += shown.to(self.sums["rollout"])
        picture = _visible(model, inputs[mine])
        tall, broad = picture.shape[2:]
        self.sums["pictures"][m, positions, :, :tall, :broad] += picture.to(self.sums["pictures"])

    def end(self, batch: Batch) -> None:
        self.sums["seen"][torch.from_numpy(batch.positions[batch.positions < self.n])] += 1

    def result(self, meta: dict[str, Any]) -> AttentionRolloutResult:
        meta["maps"] = self.about
        kept = self.sums["seen"].cpu().numpy() > 0
        meta["n"] = int(kept.sum())
        rollout = self.sums["rollout"].cpu().numpy()[:, kept]
        pictures = self.sums["pictures"].cpu().numpy()[:, kept].transpose(0, 1, 3, 4, 2)
        for one, (rows, columns) in zip(rollout, (each["grid"] for each in self.about)):
            one[:, rows:], one[:, :, columns:] = np.nan, np.nan
        return AttentionRolloutResult(
            meta,
            rollout.reshape(-1, *rollout.shape[2:]),
            (255 * pictures).round().astype(np.uint8).reshape(-1, *pictures.shape[2:]),
            np.repeat(np.arange(len(self.maps)), kept.sum()),
        )


def measure(models: Any, images: Any = None, **options: Any) -> AttentionRolloutResult:
    """Attention rollouts of a few images through one model or several.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list.
        images: see ``open_images``; scikit-learn's photographs or digit scenes by default.
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: a model whose layers do not all attend among the same tokens (windows,
            pooling, no attention); unknown models or images.
    """
    return measure_one(AttentionRollout(), models, images, Options(**options))


def class_row(rollout: Tensor, order: Tensor, class_token: int | None) -> Tensor:
    """(images, rows, columns): the class token's row over the patches, or the mean of theirs.

    Args:
        rollout: (images, tokens, tokens).
        order: (rows, columns) which of the tokens is the patch there.
        class_token: which of them it is; None where there is none.
    """
    patches = order.flatten()
    row = rollout[:, patches].mean(1) if class_token is None else rollout[:, class_token]
    return row[:, patches].unflatten(1, order.shape)


def _class_token(ready: Session, m: int, found: AttentionMap) -> int | None:
    """Which of the tokens that attend is the class token, as the last layer of them has it."""
    tokens = found.layers[0].queries.shape[1]
    if np.isfinite(found.layers[0].queries).all():
        return None
    layers = [
        layer for layer in ready.layers(m).layers
        if layer.point == "output" and len(layer.shape) == 2 and tokens in layer.shape
    ]  # fmt: skip
    places = ready.places(m, layers)
    last = [one for one in places if isinstance(one, Places) and one.lengths == (tokens,)]
    return last[-1].class_token if last else None


def _one_set_of_tokens(found: AttentionMap) -> AttentionMap:
    found.require("attention rollout")
    first = found.layers[0]
    for one, layer in pairwise(found.layers):
        if one.ordinal not in layer.behind:
            raise NotApplicable(
                f"{found.model} has no attention rollout: {one.label} and {layer.label} attend "
                f"side by side, not one after the other.",
                found.model,
            )
    for layer in found.layers:
        for side in (layer.queries, layer.keys):
            if len(side) > 1 or not np.array_equal(side, first.queries, equal_nan=True):
                raise NotApplicable(
                    f"{found.model} has no attention rollout: {layer.label} attends within windows "
                    f"or among other tokens than {first.label}.",
                    found.model,
                )
    return found


def _order(found: AttentionMap) -> np.ndarray:
    """(rows, columns) which of the tokens is the patch there."""
    places = found.layers[0].queries[0]
    order = order_of(places[:, 0] + 1j * places[:, 1])
    if order is None:
        raise NotApplicable(
            f"{found.model} has no attention rollout: its patches form no grid.", found.model
        )
    return order


def _pictures(models: list[Model], images: Any, count: int | None, seed: int) -> Images:
    if images is None and all(m.input_size and m.input_size[1] >= PHOTOGRAPH_SIDE for m in models):
        from sklearn.datasets import load_sample_images

        photographs = np.stack(load_sample_images().images)
        opened = open_images(photographs, count, seed)
        return Images(
            "scikit-learn's photographs", opened.items, opened.order, opened.digest
        )  # fmt: skip
    opened = open_images(images, count or (PICTURES if images is None else None), seed)
    if count is None and len(opened) > PICTURES:
        opened = opened.choose(np.arange(PICTURES))
    return opened


def _visible(model: Model, inputs: Tensor) -> Tensor:
    """(n, 3, H, W) of what the model saw, in [0, 1].

    Normalisation is undone where the model's transform has one for so many channels; otherwise the
    image is scaled to fill the range. Of more than three channels these are the first three.
    """
    inputs = inputs.float()
    channels = inputs.shape[1]
    for part in reversed(getattr(model.transform, "transforms", [])):
        if hasattr(part, "mean") and hasattr(part, "std"):
            mean, std = (
                torch.as_tensor(v).reshape(-1, 1, 1).to(inputs) for v in (part.mean, part.std)
            )
            if len(mean) in (1, channels):
                return _of_three_channels(inputs * std + mean).clamp(0, 1)
    shown = _of_three_channels(inputs)
    low, high = (getattr(shown, name)((1, 2, 3), keepdim=True) for name in ("amin", "amax"))
    return (shown - low) / (high - low).clamp_min(1e-12)


def _of_three_channels(images: Tensor) -> Tensor:
    if images.shape[1] >= 3:
        return images[:, :3]
    return images.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.attention_rollout``."""
    return cli.command(AttentionRollout, measure, __doc__, argv, default_models=("vit_small_box",))


if __name__ == "__main__":
    sys.exit(main())
