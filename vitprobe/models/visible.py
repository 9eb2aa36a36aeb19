"""What a model saw, as an image that people can look at."""

from __future__ import annotations

import torch
from torch import Tensor

from vitprobe.models.model import Model


def visible(model: Model, inputs: Tensor) -> Tensor:
    """Inputs (n, C, H, W) as images (n, 3, H, W) in [0, 1].

    The transform's normalisation is undone where it is known; elsewhere each image is scaled to
    fill the range.
    """
    inputs = inputs.float()
    for part in reversed(getattr(model.transform, "transforms", [])):
        if hasattr(part, "mean") and hasattr(part, "std"):
            mean, std = (
                torch.as_tensor(v).reshape(-1, 1, 1).to(inputs) for v in (part.mean, part.std)
            )
            return (inputs * std + mean).clamp(0, 1)
    low, high = (getattr(inputs, name)((1, 2, 3), keepdim=True) for name in ("amin", "amax"))
    shown = (inputs - low) / (high - low).clamp_min(1e-12)
    return shown if shown.shape[1] == 3 else shown.mean(1, keepdim=True).expand(-1, 3, -1, -1)
