"""The measurements' definitions: each beside the slow float64 lines that it must equal."""

from __future__ import annotations

import math

import by_hand as hand
import numpy as np
import torch
from by_hand import GRID, INSIDE, PATCH, WIDTH, Equal, N, reference, slow_cka
from scipy.stats import spearmanr

PLACES = [(PATCH * r, PATCH * c) for r in range(GRID) for c in range(GRID)]
PIXELS = np.array([[math.dist(a, b) for b in PLACES] for a in PLACES])


def array(tensors):
    return torch.stack(tensors, 1).detach().numpy()


@reference("cka")
def cka(result, seen):
    value, error = hand.jackknife(slow_cka(seen.block, seen.block, seen.parts), seen.parts)
    yield Equal(result.cka, value)
    yield Equal(result.cka_se, error)


@reference("attention_distance", renormalise=True)
def attention_distance(result, seen):
    maps = array(seen.attention)[..., 1:, 1:]
    each = (maps / maps.sum(-1, keepdims=True) * PIXELS).sum(-1).mean(-1)
    yield Equal(result.distance_px, each.mean(0))
    yield Equal(result.distance_se, hand.error_of_mean(each))
    yield Equal(result.uniform_px, [PIXELS.mean()] * 2)


@reference("attention_statistics")
def attention_statistics(result, seen):
    whole = array(seen.attention)[..., 1:, :]
    maps = whole[..., 1:] / whole[..., 1:].sum(-1, keepdims=True)
    entropy = -(maps * np.log(maps)).sum(-1).mean(-1) / math.log(GRID**2)
    of_keys = maps.mean(-2)
    keys = -(of_keys * np.log(of_keys)).sum(-1)
    # I(q; k) = H(k) - H(k | q), over the geometric mean of H(q) = ln N and H(k).
    nmi = (keys - entropy * math.log(GRID**2)) / np.sqrt(math.log(GRID**2) * keys)
    for name, each in ("entropy", entropy), ("nmi", nmi), ("class_mass", whole[..., 0].mean(-1)):
        yield Equal(getattr(result, name), each.mean(0))
        yield Equal(getattr(result, f"{name}_se"), hand.error_of_mean(each))


@reference("attention_rollout", first=4)
def attention_rollout(result, seen):
    rolled = torch.eye(1 + GRID**2).double()
    for maps in seen.attention:
        joint = maps.mean(1) + torch.eye(1 + GRID**2)
        rolled = joint / joint.sum(-1, keepdim=True) @ rolled
    count = len(result.rollout)
    yield Equal(count >= 4, True)
    yield Equal(result.rollout, rolled[:count, 0, 1:].reshape(count, GRID, GRID))


@reference("head_subsets", models=("vit", "cnn"))
def head_subsets(result, seen):
    stored, net = [], hand.cnn().double()
    low = dict(net.named_modules())[str(result.layers[0])]
    low.register_forward_hook(lambda m, a, out: stored.append(out.clone()))
    with torch.no_grad():
        net(seen.pixels)
    heads = [seen.heads[0][int(h)] for (h,) in result.heads]
    similarity = slow_cka(stored, heads, seen.parts)

    def statistic(parts):
        line = similarity(parts)[0]
        return np.array([*line, spearmanr(line, result.distance_px).statistic])

    value, error = hand.jackknife(statistic, seen.parts)
    yield Equal([*result.cka[0], result.rho[0]], value)
    yield Equal(result.cka_se[0], error[:-1])
    # The package draws 200 times: its own error is off by one part in 20 or so.
    yield Equal(result.rho_se[0], hand.bootstrap(statistic, seen.parts)[-1], rtol=0.15)
    yield Equal((np.diff(result.distance_px) > 0).all(), True)


@reference("skip_ratio")
def skip_ratio(result, seen):
    skip, branch = array(seen.skip), array(seen.branch)
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
        yield Equal(getattr(result, name), each.mean(0))
        yield Equal(getattr(result, f"{name}_se"), hand.error_of_mean(each))


@reference("skip_ablation", layers=["blocks.0", "blocks.1"], blocks=[1])
def skip_ablation(result, seen):
    bare = hand.slow_pass(hand.vit(), seen.pixels, without=1).block

    both = [slow_cka(found, found, seen.parts) for found in (seen.block, bare)]

    def statistic(parts):
        with_skips, without = (similarity(parts)[0, 1] for similarity in both)
        return np.array([without, with_skips, with_skips - without])

    value, error = hand.jackknife(statistic, seen.parts)
    yield Equal([*result.means[1, [0, 2]], result.loss[1, 0]], value)
    yield Equal([*result.means_se[1, [0, 2]], result.loss[1, 1]], error)


@reference("localization")
def localization(result, seen):
    tokens, patches = seen.block[1][:, 1:].unbind(1), seen.patches.unbind(1)
    similarity = slow_cka(tokens, patches, seen.parts)

    def statistic(parts):
        values = similarity(parts)
        own = np.diag(values)
        contrast = (own - (values.sum(1) - own) / (len(own) - 1)).mean()
        peaks = np.mean([values[token].argmax() == token for token in INSIDE])
        return np.array([*values.ravel(), contrast, peaks])

    value, error = hand.jackknife(statistic, seen.parts)
    yield Equal(result.cka.ravel(), value[:-2])
    yield Equal([result.contrast[0], result.peak_share[0]], value[-2:])
    yield Equal(result.contrast_se[0], error[-2])
    expected = hand.bootstrap(statistic, seen.parts)[-1]
    yield Equal(result.peak_share_se[0], expected, rtol=0.15)


@reference("token_norms", times=1.1)
def token_norms(result, seen):
    norm = np.sqrt((array(seen.block) ** 2).sum(-1))  # images, layers, tokens
    patches = norm[..., 1:]
    # A histogram's bins are 1 % wide.
    middle = np.median(patches.transpose(1, 0, 2).reshape(2, -1), 1)
    yield Equal(result.norm_median, middle, rtol=0.01)
    yield Equal(result.norm_max, patches.max((0, 2)))
    yield Equal(result.prefix_norm[:, 0], norm[..., 0].mean(0))
    yield Equal(result.mean_map, patches.mean(0).reshape(2, GRID, GRID))
    share = (patches > 1.1 * middle[None, :, None]).mean((0, 2))
    yield Equal(result.outlier_share, share, atol=0.02)


@reference("frequency", layers="blocks")
def frequency(result, seen):
    maps = array(seen.block)[:, :, 1:].reshape(N, 2, GRID, GRID, WIDTH)
    rows = np.exp(-2j * np.pi * np.outer(np.arange(GRID), np.arange(GRID)) / GRID)
    spectrum = np.abs(np.einsum("kr,lc,ndrcf->ndklf", rows, rows, maps))
    logs = np.log(spectrum[:, :, range(GRID // 2 + 1), range(GRID // 2 + 1)]).mean(-1)
    delta = logs - logs[..., :1]
    variance = maps.reshape(N, 2, -1, WIDTH).var(2).mean(-1)
    yield Equal(result.omega, [0, 0.5, 1])
    for name, each in ("delta", delta), ("variance", variance):
        yield Equal(getattr(result, name), each.mean(0))
        yield Equal(getattr(result, f"{name}_se"), hand.error_of_mean(each))


@reference("neighbours", k=3, null=5)
def neighbours(result, seen):
    features = array(seen.block)[:, :, 1:].mean(2)
    features /= np.sqrt((features**2).sum(-1, keepdims=True))
    near = []
    for layer in features.transpose(1, 0, 2):
        cosine = layer @ layer.T
        near.append([set(np.argsort(-row)[1:4]) for row in cosine])
    shared = np.array([[[len(a & b) / 3 for a, b in zip(x, y)] for y in near] for x in near])
    yield Equal(result.alignment, shared.mean(-1))
    yield Equal(result.chance, 3 / (N - 1))


@reference("patch_pca")
def patch_pca(result, seen):
    # The first 16 images, as said; of a pass that others share, up to the end of a batch.
    count = result.components.shape[1]
    yield Equal(count, 16)
    tokens = array(seen.block[1:])[:count, 0, 1:].reshape(-1, WIDTH)
    tokens = tokens - tokens.mean(0)
    variance = np.linalg.svd(tokens, compute_uv=False) ** 2
    yield Equal(result.explained_variance_ratio[0], variance[:3] / variance.sum())


@reference("receptive_field", channels="all", layers=["blocks.1"])
def receptive_field(result, seen):
    pixels = seen.pixels.detach().requires_grad_()
    centre = hand.slow_pass(hand.vit(), pixels).block[1][:, 1 + GRID // 2 * GRID + GRID // 2]
    each = torch.stack(
        [
            torch.autograd.grad(centre[:, k].sum(), pixels, retain_graph=True)[0]
            for k in range(WIDTH)
        ],
        1,
    )
    each = each.abs().mean((1, 2)).numpy()  # images, rows, columns
    # Images are dealt out into groups by their position.
    groups = [list(range(g, N, 16)) for g in range(16)]

    def statistic(some):
        field = each[sorted(i for group in some for i in group)].mean(0)
        mass = np.sort(field.ravel())[::-1].cumsum()
        areas = [(np.flatnonzero(mass >= s * mass[-1])[0] + 1) / mass.size for s in (0.5, 0.9)]
        middle = field[16:24, 16:24].sum() / field.sum()
        return np.array([*field.ravel(), *areas, middle])

    value, error = hand.jackknife(statistic, groups)
    for end, expected in ("", value), ("_se", error):
        yield Equal(getattr(result, f"gradient{end}").ravel(), expected[:-3], rtol=1e-3)
        for name, one in zip(("area50", "area90", "centre"), expected[-3:]):
            yield Equal(getattr(result, f"{name}{end}"), [one], rtol=1e-3)
