"""Whole measurements of a small ViT against a forward pass and statistics written out in float64.

Every number and standard error of a result is compared, over batches of different size. Nothing
of the package but the measurements themselves is used.
"""

import math
from itertools import product

import numpy as np
import pytest
import timm
import torch
from scipy.stats import spearmanr
from timm.models.vision_transformer import VisionTransformer

from vitprobe import (
    attention_distance,
    attention_rollout,
    cka,
    head_subsets,
    linear_probe,
    localization,
    receptive_field,
    skip_ablation,
    skip_ratio,
    wrap,
)
from vitprobe.images.sources import Images, TensorSource

N, BATCH, GRID, PATCH, HEADS, WIDTH = 18, 7, 4, 8, 4, 32
PARTS = [slice(0, 6), slice(6, 12), slice(12, 18)]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def images():
    return torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def seen(vit, images):
    """What a pass holds, for the images in the order in which they are measured."""
    order = np.random.default_rng(0).permutation(N)
    return slow_pass(vit, images[order].double())


def slow_pass(net, pixels, without=None):
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
    found = {
        "patches": patches,
        "attention": [],
        "heads": [],
        "skip": [],
        "branch": [],
        "block": [],
    }
    for index, block in enumerate(net.blocks):
        query, key, value = affine(block.attn.qkv, norm(block.norm1, x)).chunk(3, -1)
        maps, heads = [], []
        for h in range(HEADS):
            own = slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS)
            scores = query[..., own] @ key[..., own].mT / math.sqrt(WIDTH // HEADS)
            maps.append(torch.exp(scores - scores.amax(-1, keepdim=True)))
            maps[-1] = maps[-1] / maps[-1].sum(-1, keepdim=True)
            heads.append(maps[-1] @ value[..., own])
        found["attention"].append(torch.stack(maps, 1))
        found["heads"].append(heads)
        branch = affine(block.attn.proj, torch.cat(heads, -1)) * block.ls1.gamma.double()
        for second in (False, True):
            if second:
                hidden = affine(block.mlp.fc1, norm(block.norm2, x))
                hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
                branch = affine(block.mlp.fc2, hidden) * block.ls2.gamma.double()
            found["skip"].append(x)
            found["branch"].append(branch)
            x = branch if index == without else x + branch
        found["block"].append(x)
    return found


def slow_hsic(x, y):
    """Song et al.'s estimator with its traces and sums written out."""
    n = len(x)
    k, m = (np.asarray((v.flatten(1) @ v.flatten(1).T).detach()) for v in (x, y))
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    trace, cross = np.trace(k @ m), (k @ m).sum()
    return (trace + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def slow_cka(xs, ys, parts=PARTS):
    """(len(xs), len(ys)): sums over batches first, one ratio at the end."""
    own = [[sum(slow_hsic(v[p], v[p]) for p in parts) for v in side] for side in (xs, ys)]
    both = [[sum(slow_hsic(x[p], y[p]) for p in parts) for y in ys] for x in xs]
    return np.array(both) / np.sqrt(np.outer(*own))


def jackknife(statistic, parts=PARTS):
    """A statistic of batches, and its standard error by leaving one out."""
    left = np.array([statistic([p for p in parts if p != out]) for out in parts])
    return statistic(parts), np.sqrt((len(parts) - 1) * left.var(0))


def error_of_mean(values):
    return values.std(0, ddof=1) / math.sqrt(len(values))


def close(value, expected, rtol=1e-4, atol=2e-5):
    np.testing.assert_allclose(value, np.asarray(expected), rtol=rtol, atol=atol)


def test_cka(vit, images, seen):
    result = cka.measure(wrap(vit), images, batch_size=BATCH)
    value, error = jackknife(lambda parts: slow_cka(seen["block"], seen["block"], parts))
    close(result.cka, value)
    close(result.cka_se, error)


def bootstrap(statistic):
    """Standard errors over every way to draw three batches with replacement.

    The package draws 200 times: its own errors are off by one part in 20 or so.
    """
    drawn = [statistic(list(parts)) for parts in product(PARTS, repeat=3)]
    return np.std(drawn, axis=0) * np.sqrt(3 / 2)


def test_attention_distance_and_rollout(vit, images, seen):
    place = [(PATCH * r, PATCH * c) for r in range(GRID) for c in range(GRID)]
    pixels = torch.tensor([[math.dist(a, b) for b in place] for a in place]).double()
    to_patches = torch.stack(seen["attention"], 1)[..., 1:, 1:].detach()
    for renormalise in (False, True):
        maps = to_patches / (to_patches.sum(-1, keepdim=True) if renormalise else 1)
        each = (maps * pixels).sum(-1).mean(-1).numpy()
        result = attention_distance.measure(
            wrap(vit), images, batch_size=BATCH, renormalise=renormalise
        )
        close(result.distance_px, each.mean(0))
        close(result.distance_se, error_of_mean(each))
        close(result.uniform_px, [pixels.mean()] * 2)
    rolled = torch.eye(1 + GRID**2).double()
    for maps in seen["attention"]:
        joint = maps.mean(1) + torch.eye(1 + GRID**2)
        rolled = joint / joint.sum(-1, keepdim=True) @ rolled
    result = attention_rollout.measure(wrap(vit), images, num_images=N, batch_size=BATCH)
    close(result.rollout, rolled[:, 0, 1:].reshape(N, GRID, GRID).detach())


def test_head_subsets(vit, images, seen):
    cnn = timm.create_model("test_resnet").eval()
    result = head_subsets.measure([wrap(vit), wrap(cnn, "cnn")], images, batch_size=BATCH)
    stored = []
    low = dict(cnn.double().named_modules())[str(result.layers[0])]
    low.register_forward_hook(lambda m, a, out: stored.append(out.clone()))
    with torch.no_grad():
        cnn(images[np.random.default_rng(0).permutation(N)].double())
    heads = [seen["heads"][0][int(h)] for (h,) in result.heads]

    def statistic(parts):
        line = slow_cka(stored, heads, parts)[0]
        return np.array([*line, spearmanr(line, result.distance_px).statistic])

    value, error = jackknife(statistic)
    close([*result.cka[0], result.rho[0]], value)
    close(result.cka_se[0], error[:-1])
    assert result.rho_se[0] == pytest.approx(bootstrap(statistic)[-1], rel=0.15)
    assert (np.diff(result.distance_px) > 0).all()


def test_skip_ratio(vit, images, seen):
    result = skip_ratio.measure(wrap(vit), images, batch_size=BATCH)
    skip, branch = (torch.stack(seen[name], 1).detach().numpy() for name in ("skip", "branch"))
    length = [np.sqrt((part**2).sum(-1)) for part in (skip, branch)]
    ratio = length[0] / length[1]
    spatial = ratio[..., 1:].mean(-1)
    gap = np.log(ratio[..., 0] / spatial)
    logs = np.stack([gap[:, :2].mean(1), gap[:, 2:].mean(1), np.log(spatial).mean(1)], 1)
    for name, each in (
        ("ratio", ratio),
        ("cosine", (skip * branch).sum(-1) / length[0] / length[1]),
        ("spatial", spatial),
        ("log_ratio", logs[:, None]),
    ):
        close(getattr(result, name), each.mean(0))
        close(getattr(result, f"{name}_se"), error_of_mean(each))


def test_skip_ablation(vit, images, seen):
    order = np.random.default_rng(0).permutation(N)
    bare = slow_pass(vit, images[order].double(), without=1)["block"]
    result = skip_ablation.measure(
        wrap(vit), images, batch_size=BATCH, layers=["blocks.0", "blocks.1"], blocks=[1]
    )

    def statistic(parts):
        with_skips, without = (
            slow_cka(found, found, parts)[0, 1] for found in (seen["block"], bare)
        )
        return np.array([without, with_skips, with_skips - without])

    value, error = jackknife(statistic)
    close([*result.means[1, [0, 2]], result.loss[1, 0]], value)
    close([*result.means_se[1, [0, 2]], result.loss[1, 1]], error)


def test_localization(vit, images, seen):
    result = localization.measure(wrap(vit), images, batch_size=BATCH)
    tokens, patches = seen["block"][1][:, 1:].unbind(1), seen["patches"].unbind(1)
    inside = [r * GRID + c for r in range(1, GRID - 1) for c in range(1, GRID - 1)]

    def statistic(parts):
        values = slow_cka(tokens, patches, parts)
        own = np.diag(values)
        contrast = (own - (values.sum(1) - own) / (len(own) - 1)).mean()
        peaks = np.mean([values[token].argmax() == token for token in inside])
        return np.array([*values.ravel(), contrast, peaks])

    value, error = jackknife(statistic)
    close(result.cka.ravel(), value[:-2])
    close([result.contrast[0], result.peak_share[0]], value[-2:])
    close(result.contrast_se[0], error[-2])
    assert result.peak_share_se[0] == pytest.approx(bootstrap(statistic)[-1], rel=0.15)


def test_receptive_field(vit, images):
    order = np.random.default_rng(0).permutation(N)[:5]
    result = receptive_field.measure(
        wrap(vit), images, num_images=5, batch_size=2, channels="all", layers="blocks.1"
    )
    pixels = images[order].double().requires_grad_()
    centre = slow_pass(vit, pixels)["block"][1][:, 1 + GRID // 2 * GRID + GRID // 2]
    each = torch.stack(
        [
            torch.autograd.grad(centre[:, k].sum(), pixels, retain_graph=True)[0]
            for k in range(WIDTH)
        ],
        1,
    )
    each = each.abs().mean(2).numpy()  # images, channels, rows, columns

    def statistic(some):
        field = some.mean((0, 1))
        mass = np.sort(field.ravel())[::-1].cumsum()
        areas = [(np.flatnonzero(mass >= s * mass[-1])[0] + 1) / mass.size for s in (0.5, 0.9)]
        middle = field[16:24, 16:24].sum() / field.sum()
        return np.array([*field.ravel(), *areas, middle])

    left = np.array([statistic(np.delete(each, i, 0)) for i in range(5)])
    for end, expected in (("", statistic(each)), ("_se", np.sqrt(4 * left.var(0)))):
        close(getattr(result, f"gradient{end}").ravel(), expected[:-3], rtol=1e-3)
        for name, one in zip(("area50", "area90", "centre"), expected[-3:]):
            close(getattr(result, f"{name}{end}"), [one], rtol=1e-3)


def test_linear_probe(vit):
    generator = torch.Generator().manual_seed(3)
    labels = np.arange(60) % 3
    pixels = torch.randn(60, 3, 32, 32, generator=generator)
    pixels[:, 0] += 0.3 * torch.from_numpy(labels - 1)[:, None, None]
    source = Images(
        "made", TensorSource(pixels), np.arange(60), "", labels=labels, classes=("a", "b", "c")
    )
    fit, test = (source.choose(np.arange(*ends)) for ends in ((0, 24), (24, 60)))
    result = linear_probe.measure(
        wrap(vit), fit, test_images=test, layers="blocks.1", shots=4, draws=2, batch_size=BATCH
    )
    tokens = slow_pass(vit, pixels.double())["block"][1].detach().numpy()
    reads = {str(name): None for name in result.readouts}
    reads["CLS"], reads["first patch"] = tokens[:, :1], tokens[:, 1:2]
    reads["mean"], reads["tokens"] = tokens[:, 1:].mean(1, keepdims=True), tokens[:, 1:]
    reads["all"] = tokens.reshape(60, 1, -1)
    shown = []
    for draw in range(2):
        # The first four of each class in the first draw, the next four in the second.
        rows = np.concatenate([np.flatnonzero(labels[:24] == c)[4 * draw :][:4] for c in range(3)])
        shown.append(
            [
                np.mean([slow_probe(one[:, i], rows, labels) for i in range(one.shape[1])])
                for one in reads.values()
            ]
        )
    accuracy = np.mean(shown, 0)
    close(result.accuracy_of_draw[:, 0], shown, atol=1e-9)
    tests = accuracy * (1 - accuracy) / 36
    close(result.accuracy_se[0], np.sqrt(np.var(shown, 0, ddof=1) / 2 + tests), atol=1e-9)


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
