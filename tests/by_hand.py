"""A small ViT, a pass of it written out in float64, and the statistics, without the package.

``reference`` marks what a measurement must equal; ``test_references`` runs each alone, with the
others, stopped and resumed, in two processes, and at two batch sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

N, GRID, PATCH, HEADS, WIDTH = 18, 4, 8, 4, 32
ORDER = np.random.default_rng(0).permutation(N)  # in which the images are measured
INSIDE = [r * GRID + c for r in range(1, GRID - 1) for c in range(1, GRID - 1)]


def vit():
    torch.manual_seed(0)
    net = VisionTransformer(
        img_size=GRID * PATCH, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=HEADS,
        init_values=0.5, num_classes=3,
    )  # fmt: skip
    for block in net.blocks:
        block.attn.qkv.weight.data *= 40  # heads that differ
    torch.nn.init.normal_(net.pos_embed)
    return net.eval()


def cnn():
    torch.manual_seed(1)
    return timm.create_model("test_resnet").eval()


def images():
    return torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@dataclass
class Seen:
    """What a pass of the ViT holds, for the images in the order in which they are measured.

    Attributes:
        parts: the images of each batch.
        attention: of each block, (n, heads, queries, keys).
        heads: of each block and head, (n, tokens, features) before the projection.
        skip: of each addition, what the skip carries, (n, tokens, features).
        branch: of each addition, what the branch adds.
        block: of each block, its output.
        patches: (n, patches, pixels) of the images.
        pixels: (n, 3, H, W), with gradients.
    """

    parts: list[slice]
    pixels: torch.Tensor
    patches: torch.Tensor
    attention: list = field(default_factory=list)
    heads: list = field(default_factory=list)
    skip: list = field(default_factory=list)
    branch: list = field(default_factory=list)
    block: list = field(default_factory=list)


def batches(size: int) -> list[slice]:
    """Even ones, none larger than that."""
    ends = np.cumsum([0, *(len(part) for part in np.array_split(np.arange(N), -(-N // size)))])
    return [slice(int(a), int(b)) for a, b in pairwise(ends)]


def slow_pass(net, pixels, parts=(), without=None) -> Seen:
    """Attention, heads' outputs, skips and branches of every block, from weights alone."""

    def affine(layer, x):
        return x @ layer.weight.double().T + layer.bias.double()

    def norm(layer, x):
        spread = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
        x = (x - x.mean(-1, keepdim=True)) / (spread + layer.eps).sqrt()
        return x * layer.weight.double() + layer.bias.double()

    n = len(pixels)
    patches = torch.stack(
        [
            pixels[:, :, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)].flatten(1)
            for r in range(GRID)
            for c in range(GRID)
        ],
        1,
    )
    stem = net.patch_embed.proj
    x = patches @ stem.weight.double().flatten(1).T + stem.bias.double()
    x = torch.cat([net.cls_token.double().expand(n, -1, -1), x], 1) + net.pos_embed.double()
    found = Seen(list(parts), pixels, patches)
    for index, block in enumerate(net.blocks):
        query, key, value = affine(block.attn.qkv, norm(block.norm1, x)).chunk(3, -1)
        maps, heads = [], []
        for h in range(HEADS):
            own = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
            scores = query[..., own] @ key[..., own].mT / math.sqrt(WIDTH // HEADS)
            maps.append(torch.exp(scores - scores.amax(-1, keepdim=True)))
            maps[-1] = maps[-1] / maps[-1].sum(-1, keepdim=True)
            heads.append(maps[-1] @ value[..., own])
        found.attention.append(torch.stack(maps, 1))
        found.heads.append(heads)
        branch = affine(block.attn.proj, torch.cat(heads, -1)) * block.ls1.gamma.double()
        for second in (False, True):
            if second:
                hidden = affine(block.mlp.fc1, norm(block.norm2, x))
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
                branch = affine(block.mlp.fc2, hidden) * block.ls2.gamma.double()
            found.skip.append(x)
            found.branch.append(branch)
            x = branch if index == without else x + branch
        found.block.append(x)
    return found


def slow_hsic(x, y):
    """Song et al.'s estimator with its traces and sums written out."""
    n = len(x)
    k, m = (np.asarray((v.flatten(1) @ v.flatten(1).T).detach()) for v in (x, y))
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    trace, cross = np.trace(k @ m), (k @ m).sum()
    return (trace + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def slow_cka(xs, ys, parts):
    """CKA (len(xs), len(ys)) of some parts: sums over batches first, one ratio at the end."""
    own = [{p.start: [slow_hsic(v[p], v[p]) for v in side] for p in parts} for side in (xs, ys)]
    both = {p.start: [[slow_hsic(x[p], y[p]) for y in ys] for x in xs] for p in parts}

    def of(some):
        sums = [sum(np.array(table[p.start]) for p in some) for table in (both, *own)]
        return sums[0] / np.sqrt(np.outer(*sums[1:]))

    return of


def jackknife(statistic, parts):
    """A statistic of batches, and its standard error by leaving one out."""
    left = np.array([statistic([p for p in parts if p != out]) for out in parts])
    return statistic(parts), np.sqrt((len(parts) - 1) * left.var(0))


def bootstrap(statistic, parts):
    """Standard errors over every way to draw as many batches with replacement."""
    drawn = [statistic(list(some)) for some in product(parts, repeat=len(parts))]
    return np.std(drawn, axis=0) * np.sqrt(len(parts) / (len(parts) - 1))


def slow_probe(features, rows, labels):
    """Accuracy on images 24 to 59, the penalty chosen by fitting again without each image."""
    x = (features - features[rows].mean(0)) / (features[rows].std(0) + 1e-5)
    x = np.hstack([x, np.ones((len(x), 1))])
    fitted, targets = x[rows], 2 * np.eye(3)[labels[rows]] - 1

    def weights(penalty):
        kernel = fitted @ fitted.T + penalty * np.eye(len(fitted))
        return fitted.T @ np.linalg.solve(kernel, targets)

    def left_out(i, penalty):
        """What is told of an image by fits on the others, about their own means."""
        kept = np.delete(everything, i)
        about, level = fitted[kept, :-1].mean(0), targets[kept].mean(0)
        rest = fitted[kept, :-1] - about
        kernel = rest @ rest.T + penalty * np.eye(len(kept))
        found = rest.T @ np.linalg.solve(kernel, targets[kept] - level)
        return (fitted[i, :-1] - about) @ found + level

    everything = np.arange(len(rows))
    missed = {}
    for penalty in 10.0 ** np.arange(-2, 7):
        left = [left_out(i, penalty) for i in everything]
        missed[penalty] = ((np.array(left) - targets) ** 2).mean()
    best = min(missed, key=missed.get)
    return ((x[24:] @ weights(best)).argmax(1) == labels[24:]).mean()


def error_of_mean(values):
    return values.std(0, ddof=1) / math.sqrt(len(values))


@dataclass(frozen=True)
class Equal:
    """What two numbers or arrays that must be equal may differ by."""

    value: Any
    expected: Any
    rtol: float = 1e-4
    atol: float = 2e-5

    def check(self) -> None:
        expected = self.expected
        if isinstance(expected, torch.Tensor):
            expected = expected.detach()
        np.testing.assert_allclose(self.value, np.asarray(expected), self.rtol, self.atol)


@dataclass(frozen=True)
class Reference:
    """A measurement with its options, and what its result must equal."""

    options: dict[str, Any]
    models: tuple[str, ...]
    equals: Callable[[Any, Seen], Iterator[Equal]]


REFERENCES: dict[str, Reference] = {}


def reference(name: str, models: tuple[str, ...] = ("vit",), **options: Any) -> Any:
    """Mark a function of (result, seen) that gives what the result must equal, ``Equal`` by one."""

    def mark(function: Any) -> Any:
        REFERENCES[name] = Reference(options, models, function)
        return function

    return mark
