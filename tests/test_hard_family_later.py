"""The later measurements on networks made like trained ones, against slow float64 computations.

As in ``test_hard_family``, the references start from the activations of the very pass that was
measured, and tolerances are those of the measurement's own arithmetic, ``U`` the unit roundoff of
float32:

Amplitudes: a sum of N products is off by at most 8√N · U · max|x - mean|, that of the map itself
by 8 · U · Σ|x|, and their logarithms by that over the amplitude.
Variances: 8√N · U, relative, and what the rounding of a mean far above them adds.
Entropies: each share p of a row is off as in ``slow_maps``, -p ln p by (1 + |ln p|) times that.
Components: float64 from what was measured; float32 in the result.
Quantiles of norms: 1.1 %, the width of a bin.
"""

from __future__ import annotations

import numpy as np
import torch
from hard_family import BATCH, GRID, HEADS, N, Recorder, hard_vit, images
from test_hard_family import OPTIONS, QKV, U, cnns, hard_cnn, seen, slow_maps, vits

from vitprobe import (
    attention_statistics,
    frequency,
    neighbours,
    occlusion,
    patch_pca,
    token_norms,
    wrap,
)
from vitprobe.statistics.occlusion import cell_edges, order_of_cells

PLACES = GRID**2
LAYERS = ["blocks.0", "blocks.1"]


def amplitudes(x):
    """Of (n, channels, rows, columns): mean Δ over images, and how far it may be off.

    None where rounding decides whether a channel has an amplitude.
    """
    maps = x.numpy()
    found = np.abs(np.fft.fft2(maps))
    size = maps.shape[-1]
    diagonal = np.stack([found[..., k, k] for k in range(size // 2 + 1)], 0)
    places = size**2
    centred = np.abs(maps - maps.mean((2, 3), keepdims=True))
    # What the mean is off by is a constant, whose amplitude is 0.
    off = 8 * np.sqrt(places) * U * centred.max((2, 3))
    off_of_mean = 8 * U * np.abs(maps).sum((2, 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        delta = np.log(diagonal) - np.log(diagonal[0])
        allowed = off / diagonal + off_of_mean / diagonal[0]
    # What is no more than rounding of the map leaves is no amplitude: left out.
    mean = maps.mean((2, 3))
    least = 16 * U * places * np.sqrt(maps.var((2, 3)) + mean**2 / places)
    none = (diagonal <= least) | (mean == 0)
    none[0] = mean == 0
    near = np.abs(diagonal[1:] / np.where(least > 0, least, np.inf) - 1) < 0.01
    if near.any():
        return None
    if (allowed[1:][~none[1:]] > 0.1).any():
        return None
    allowed[0] = 0
    with np.errstate(invalid="ignore"):
        means = [np.nanmean(np.where(none, np.nan, one), 2).mean(1) for one in (delta, allowed)]
    return means[0], means[1] + 64 * U


@vits
def test_frequency(kind):
    net = hard_vit(kind)
    names = [f"blocks.{i}.norm{k}" for i in range(2) for k in (1, 2)]
    result, recorder = seen(
        net, [*names, "blocks.1"], lambda: frequency.measure(wrap(net), images(), **OPTIONS)
    )
    streams = [recorder.took(name)[:, 1:] for name in names] + [recorder.gave("blocks.1")[:, 1:]]
    assert len(result.layers) == len(streams)
    told = [amplitudes(x.mT.unflatten(2, (GRID, GRID))) for x in streams]
    assert sum(one is not None for one in told) > 2
    for row, one in enumerate(told):
        if one is not None:
            assert (np.abs(result.delta[row] - one[0]) <= one[1]).all(), result.layers[row]
    for row, x in enumerate(streams):
        each = x.var(1, correction=0)
        rounded = (U * x.mean(1).abs()) ** 2
        allowed = float((8 * np.sqrt(PLACES) * U * each + rounded).mean())
        assert abs(result.variance[row] - float(each.mean())) <= 2 * allowed
        np.testing.assert_allclose(
            result.variance_se[row],
            each.mean(1).numpy().std(ddof=1) / np.sqrt(N),
            rtol=1e-4,
            atol=2 * allowed,
        )


@cnns
def test_frequency_of_cnns(kind):
    net = hard_cnn(kind)
    result, recorder = seen(
        net, ["layer1.0"],
        lambda: frequency.measure(wrap(net), images(), layers="layer1.0", **OPTIONS),
    )  # fmt: skip
    x = recorder.gave("layer1.0")
    assert tuple(x.shape[2:]) == tuple(result.grid[0]) == (8, 8)
    expected, allowed = amplitudes(x)
    assert (np.abs(result.delta[0] - expected) <= allowed).all()
    variance = x.flatten(2).var(2, correction=0)
    np.testing.assert_allclose(result.variance[0], variance.mean(), rtol=1e-4)


@vits
def test_attention_statistics(kind):
    net = hard_vit(kind)
    result, recorder = seen(
        net, QKV, lambda: attention_statistics.measure(wrap(net), images(), **OPTIONS)
    )
    for layer, name in enumerate(QKV):
        maps, off = slow_maps(recorder.gave(name))
        patches, off = maps[..., 1:, 1:], off[..., 1:, 1:]
        mass = patches.sum(-1, keepdim=True)
        rows, off = patches / mass, off / mass
        logs = rows.clamp_min(1e-300).log()
        entropies = -(rows * logs).sum(-1)
        entropy = entropies.mean(-1) / np.log(PLACES)
        # A share as small as float32 has none is off by itself.
        doubt = (off * (1 + logs.abs())).sum(-1).mean(-1) + 64 * U
        allowed = 2 * doubt.mean(0) / np.log(PLACES)
        assert (abs(result.entropy[layer] - entropy.mean(0).numpy()) <= allowed.numpy()).all()
        keys = rows.mean(-2)
        of_keys = -(keys * keys.clamp_min(1e-300).log()).sum(-1)
        scale = (np.log(PLACES) * of_keys).sqrt()
        shared = of_keys - entropies.mean(-1)
        nmi = (shared / scale).where(of_keys > 1e-6, 0)
        # Both entropies, and the one in the divisor.
        doubt = 2 * doubt / scale.clamp_min(1e-3) + shared.abs() / of_keys.clamp_min(1e-6) * doubt
        allowed = 2 * doubt.mean(0)
        assert (abs(result.nmi[layer] - nmi.mean(0).numpy()) <= allowed.numpy()).all()
        given = maps[..., 1:, 0].mean(-1)
        bound = 2 * float(off.sum(-1).max()) + 64 * U
        np.testing.assert_allclose(result.class_mass[layer], given.mean(0), atol=bound)
    assert result.entropy.shape == (2, HEADS) and np.isnan(result.register_mass).all()


@vits
def test_neighbours(kind):
    net = hard_vit(kind)
    k = 4
    result, recorder = seen(
        net, LAYERS, lambda: neighbours.measure(wrap(net), images(), k=k, null=0, **OPTIONS)
    )
    member = []
    for name in LAYERS:
        x = recorder.gave(name)[:, 1:].mean(1)
        unit = x / x.norm(dim=1, keepdim=True)
        unit = unit - unit.mean(0)
        distance = torch.cdist(unit, unit).fill_diagonal_(torch.inf)
        near = distance.argsort(1)[:, :k]
        member.append(torch.zeros(N, N).scatter_(1, near, 1.0))
    shared = torch.einsum("anm,bnm->abn", *2 * [torch.stack(member)]) / k
    np.testing.assert_allclose(result.alignment, shared.mean(-1), atol=1e-6)
    np.testing.assert_allclose(result.alignment_se, shared.std(-1) / np.sqrt(N), atol=1e-6)


@vits
def test_patch_pca(kind):
    net = hard_vit(kind)
    result, recorder = seen(
        net, ["blocks.1"], lambda: patch_pca.measure(wrap(net), images(), num_images=N, **OPTIONS)
    )
    x = recorder.gave("blocks.1")[:, 1:].reshape(N * PLACES, -1).numpy()
    left, values, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    shares = values**2 / (values**2).sum()
    np.testing.assert_allclose(result.explained_variance_ratio[0], shares[:3], atol=64 * U)
    found = result.components[0].reshape(N * PLACES, 3)
    expected = left[:, :3] * values[:3]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-5 * np.abs(expected).max())
    lengths = np.linalg.norm(x, axis=1)
    assert result.outlier_share[0] == (lengths > 5 * np.median(lengths)).mean()


@vits
def test_token_norms_in_bins(kind):
    net = hard_vit(kind)
    result, recorder = seen(
        net, LAYERS, lambda: token_norms.measure(wrap(net), images(), times=1.5, **OPTIONS)
    )
    for layer, name in enumerate(LAYERS):
        lengths = np.linalg.norm(recorder.gave(name)[:, 1:].numpy(), axis=-1)
        for shown, share in ((result.norm_median, 0.5), (result.norm_p99, 0.99)):
            np.testing.assert_allclose(shown[layer], np.quantile(lengths, share), rtol=0.012)
        bounds = [(lengths > 1.5 * w * np.median(lengths)).mean() for w in (1.025, 0.975)]
        assert bounds[0] - 1e-9 <= result.outlier_share[layer] <= bounds[1] + 1e-9
        np.testing.assert_allclose(result.mean_map[layer].ravel(), lengths.mean(0), rtol=1e-5)
        assert result.histogram[layer].sum() == lengths.size


@vits
def test_occlusion(kind):
    net = hard_vit(kind)
    recorder = Recorder(net, [""], BATCH)
    with recorder.running():
        result = occlusion.measure(
            wrap(net), images(), levels=[0.5], shuffle=[2], **OPTIONS
        )  # fmt: skip
    order = np.random.default_rng(0).permutation(N)
    dtype = next(net.parameters()).dtype
    pixels = images()[order].to(dtype).double()
    given, out = recorder.inputs[""], recorder.outputs[""]
    assert len(given) == 3 * N // BATCH
    edges, agree = cell_edges(32, 14), np.zeros(3)
    for batch in range(N // BATCH):
        clean, dropped, shuffled = given[3 * batch : 3 * batch + 3]
        part = slice(batch * BATCH, (batch + 1) * BATCH)
        assert torch.equal(clean, pixels[part])
        for i, image in enumerate(order[part]):
            expected = clean[i].clone()
            for cell in order_of_cells(0, int(image), "drop", 196)[:98]:
                r, c = divmod(int(cell), 14)
                expected[:, edges[r] : edges[r + 1], edges[c] : edges[c + 1]] = 0
            assert torch.equal(dropped[i], expected)
            moved = order_of_cells(0, int(image), "shuffle 2", 4)
            halves = [slice(0, 16), slice(16, 32)]
            for place, cell in enumerate(moved):
                (r, c), (s, d) = divmod(place, 2), divmod(int(cell), 2)
                found = shuffled[i, :, halves[r], halves[c]]
                assert torch.equal(found, clean[i, :, halves[s], halves[d]])
        told = [one.argmax(1) for one in out[3 * batch : 3 * batch + 3]]
        agree += [float((one == told[0]).double().mean()) for one in told]
    np.testing.assert_allclose(result.agreement[0], agree / (N // BATCH))
