"""Fields of a unit over the image, and which channels of which image they are sampled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vitprobe.statistics.hsic import half_sample_bias, jackknife

SHARES = (0.5, 0.9)
# A side of the image in as many cells when it is asked whether a field reaches its border.
BORDER_CELLS = 14


def area(gradient: Tensor, share: float) -> Tensor:
    """Smallest fraction of the pixels (..., H, W) that holds a share of the mass; NaN for none."""
    return areas(gradient, [share])[0]


def areas(gradient: Tensor, shares: Sequence[float] = SHARES) -> list[Tensor]:
    """``area`` for several shares, sorted once."""
    mass = gradient.flatten(-2).sort(-1, descending=True).values.cumsum(-1)
    needed = [(mass < share * mass[..., -1:]).sum(-1) + 1 for share in shares]
    fractions = [one.double() / mass.shape[-1] for one in needed]
    return [one.where(mass[..., -1] > 0, torch.nan) for one in fractions]


def centre_cell(gradient: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The centre cell of a grid over the image (H, W), as a fraction of the whole mass.

    Returns:
        its mass, and how much more that is than the mass of the largest other cell.
    """
    cells = F.adaptive_avg_pool2d(gradient[None], grid)[0].flatten()
    cells = cells / cells.sum()
    middle = grid[0] // 2 * grid[1] + grid[1] // 2
    others = torch.cat([cells[:middle], cells[middle + 1 :], cells.new_zeros(1)])
    return cells[middle], cells[middle] - others.max()


def reaches_border(gradient: Tensor, share: float) -> bool:
    """Whether the smallest area that holds a share of the mass (H, W) is cut off by the border.

    That is where the mean over a cell at the border (a fourteenth of a side) is above the least
    value within that area: the field would go on, had the image not ended.
    """
    values = gradient.flatten().double().sort(descending=True).values
    mass = values.cumsum(0)
    if not mass[-1] > 0:
        return False
    level = values[int((mass < share * mass[-1]).sum())]
    cells = F.adaptive_avg_pool2d(gradient[None].double(), BORDER_CELLS)[0]
    border = torch.cat([cells[0], cells[-1], cells[:, 0], cells[:, -1]])
    return bool((border >= level).any())


def channels_of_images(
    channels: int, images: int, each: int, groups: int, generator: torch.Generator
) -> Tensor:
    """Which channels are looked at in which image: (images, each).

    Every channel is as likely as any other, and the draws are stratified: the channels, in a circle
    with a random start, are cut into as many stretches as there are draws, with one draw in each.
    So all draws differ while there are channels enough, and no channel is drawn more than once more
    often than another. The draws of an image are spread over the circle, and so are those of a
    group (images whose positions are the same modulo ``groups``).
    """
    count = images * each
    start = count * torch.rand((), generator=generator, dtype=torch.float64)
    edges = ((start + torch.arange(count + 1)) * channels / count).long()
    width = (edges.diff()).clamp(min=1)
    inside = torch.rand(count, generator=generator, dtype=torch.float64)
    channel = ((edges[:-1] + (inside * width).long()) % channels).view(each, images)
    drawn = torch.empty(images, each, dtype=torch.long)
    rows = torch.arange(images).split(groups)
    for k in range(each):
        order = torch.randperm(len(rows), generator=generator).tolist()
        shuffled = [rows[i][torch.randperm(len(rows[i]), generator=generator)] for i in order]
        drawn[torch.cat(shuffled), k] = channel[k]
    return drawn


@dataclass(frozen=True)
class Summary:
    """What groups of images say of a model's layers; everything as (value, standard error).

    Attributes:
        field: (layers, H, W) means, float32; their errors to three digits.
        scalars: (3, layers): areas with 50 % and 90 % of the mass, share of the centre cell.
        trends: (5,) see ``ReceptiveFieldResult``.
        bias: (2, layers) what was taken off the areas.
    """

    field: tuple[np.ndarray, np.ndarray]
    scalars: tuple[np.ndarray, np.ndarray]
    trends: tuple[np.ndarray, np.ndarray]
    bias: np.ndarray


def summarise(
    groups: Tensor,
    side: tuple[int, int],
    grids: Sequence[tuple[int, int]],
    attention: Sequence[int],
    correct: bool,
) -> Summary:
    """Fields, areas and trends with standard errors, from sums over groups of images.

    Args:
        groups: (groups, layers, H·W + 1) sums of fields; the last column counts them.
        side: H, W.
        grids: rows and columns of each layer.
        attention: layers that are attention's branches; each is followed by its sum.
        correct: take the bias of few images off all that is not linear in the fields.
    """
    count, third = len(grids), max(1, len(grids) // 3)
    middle = max(0, (count + 1) // 2 - 1)

    def statistic(table: Tensor) -> Tensor:
        field = (table[:, :-1] / table[:, -1:]).unflatten(1, side)
        cells = [centre_cell(one, grid) for one, grid in zip(field, grids)]
        centre = torch.stack([share for share, _ in cells])
        held = areas(field)
        wide = held[-1]
        less = [centre[i + 1] - centre[i] for i in attention] or [centre.new_tensor(torch.nan)]
        trends = [wide[:third].mean(), wide[middle], wide[-third:].mean(), cells[middle][1],
                  torch.stack(less).mean()]  # fmt: skip
        return torch.cat([field.flatten(), *held, centre, torch.stack(trends)])

    used = (groups[..., -1] > 0).any(1)
    value, error = jackknife(statistic, groups, used)
    pixels = count * side[0] * side[1]
    bias = half_sample_bias(statistic, groups, used) if correct else np.zeros_like(value)
    bias[:pixels] = 0  # the mean field is linear
    value = value - bias
    ends = [pixels, pixels + 3 * count]
    parts = [np.split(one, ends) for one in (value, error)]
    fields = [part[0].reshape(count, *side).astype(np.float32) for part in parts]
    fields[1] = three_digits(fields[1])
    scalars = [part[1].reshape(3, count) for part in parts]
    scalars[0][:2] = scalars[0][:2].clip(0, 1)
    removed = bias[pixels : pixels + 2 * count].reshape(2, count)
    return Summary(
        (fields[0], fields[1]), (scalars[0], scalars[1]), (parts[0][2], parts[1][2]), removed
    )


def three_digits(values: np.ndarray) -> np.ndarray:
    """Float32 rounded to 11 bits, off by at most one part in 2,048: files of errors are smaller."""
    bits = np.ascontiguousarray(values).view(np.int32)
    rounded = (bits + (1 << 12)) & ~((1 << 13) - 1)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)
