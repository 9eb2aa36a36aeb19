"""Images through every model's transform, in batches, the broken ones told apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitprobe.images.decoding import GoneError
from vitprobe.images.sources import Images
from vitprobe.models.loading import Model


@dataclass(frozen=True)
class Failure:
    """An image without pixels.

    Attributes:
        reason: in one line.
        gone: it was there when the run began; nothing is known about the picture itself.
    """

    reason: str
    gone: bool = False


class TransformedImages(Dataset):
    """Position -> the image through every distinct transform, or why it cannot be read."""

    def __init__(self, models: list[Model], images: Images) -> None:
        self.images = images
        # What a given transform does is not known: only the very same one counts as equal.
        keys = [
            "" if images.are_tensors else model.transform_key or str(id(model.transform))
            for model in models
        ]
        groups = list(dict.fromkeys(keys))
        self.group_of_model = [groups.index(key) for key in keys]
        self.transforms = [models[keys.index(group)].transform for group in groups]

    def __getitem__(self, position: int) -> list[Tensor] | Failure:
        try:
            image = self.images.open(position)
        except GoneError as error:
            return Failure(str(error), gone=True)
        except Exception as error:
            # Decoders of damaged pictures raise anything; it is told, and too many stop the run.
            return Failure(f"{type(error).__name__}: {error}".splitlines()[0])
        if isinstance(image, Tensor):
            return [image]
        return [transform(image) for transform in self.transforms if transform is not None]

    def __getitems__(self, positions: list[int]) -> list[tuple[int, list[Tensor] | Failure]]:
        return [(position, self[position]) for position in positions]


def collate(items: list[tuple[int, list[Tensor] | Failure]]) -> Any:
    good = [(position, item) for position, item in items if not isinstance(item, Failure)]
    failures = [(position, item) for position, item in items if isinstance(item, Failure)]
    columns = [torch.stack(column) for column in zip(*(item for _, item in good))]
    return columns, np.array([position for position, _ in good], dtype=np.int64), failures
