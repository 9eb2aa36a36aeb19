"""No scale costs digits, and no constant hides what varies: in every measurement over layers.

A network of ReLUs whose first weights are multiplied by a power of two puts out exactly that many
times what it put out before, in float32 as long as no number leaves its range.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import nn

from vitprobe import measure_all
from vitprobe.models.loading import wrap
from vitprobe.statistics.frequency import log_amplitudes
from vitprobe.statistics.neighbours import nearest
from vitprobe.statistics.patch_components import components

# By how many of the scale's powers an array grows; not at all where it is not named.
GROWS = {
    "token_norms": {"norm_median": 1, "norm_p99": 1, "norm_max": 1, "mean_map": 1, "last_map": 1},
    "frequency": {"variance": 2, "variance_se": 2},
    "patch_pca": {"components": 1},
}
# In bins that are the same for all; the unit of the file.
OF_THE_SCALE = {"histogram", "edges"}
MEASURED = ["cka", "localization", "skip_ratio", "token_norms", "frequency", "neighbours",
            "patch_pca", "occlusion"]  # fmt: skip


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.scale = scale
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.mix = nn.ModuleList(nn.Conv2d(12, 12, 3, padding=1, bias=False) for _ in range(3))
        self.head = nn.Linear(12, 5)
        with torch.no_grad():
            self.stem.weight *= scale
            self.stem.bias *= scale

    def forward(self, x):
        x = self.stem(x)
        for mix in self.mix:
            x = x + torch.relu(mix(x))
        return self.head((x / self.scale).mean((2, 3)))


def measured(scale):
    images = torch.randn(15, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    # A few locations stand out.
    images[:, :, 8:12, 4:8] *= 30
    options = {"batch_size": 5, "device": "cpu", "k": 3, "null": 4, "layers": "all",
               "times": 3.0, "levels": (0.5,), "shuffle": (2,)}  # fmt: skip
    measurements = [name for name in MEASURED if name not in ("frequency", "patch_pca")]
    found = measure_all(measurements, wrap(Scaled(scale).eval(), "net"), images, **options)
    del options["layers"]
    few = {name: options[name] for name in ("batch_size", "device")}
    return {**found, **measure_all(["frequency", "patch_pca"], found_model(scale), images, **few)}


def found_model(scale):
    return wrap(Scaled(scale).eval(), "net")


@pytest.fixture(scope="module")
def plain():
    return measured(1.0)


@pytest.mark.parametrize("scale", [2.0**-73, 2.0**-100, 2.0**66])
def test_no_scale_costs_digits(plain, scale):
    found = measured(scale)
    assert list(found) == list(plain) and len(found) == len(MEASURED)
    for name, result in found.items():
        for key, array in result.arrays().items():
            expected = plain[name].arrays()[key]
            if key in OF_THE_SCALE or array.dtype.kind != "f":
                continue
            power = GROWS.get(name, {}).get(key, 0)
            shown = array.astype(np.float64) / scale**power
            top = np.nanmax(np.abs(expected), initial=1e-300)
            np.testing.assert_allclose(shown / top, expected / top, rtol=3e-5, atol=3e-6,
                                       err_msg=f"{name} {key}")  # fmt: skip
    assert 0 < plain["token_norms"].outlier_share.max() < 0.1
    total = found["token_norms"].histogram.sum(1)
    np.testing.assert_array_equal(total, plain["token_norms"].histogram.sum(1))


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1.0, 1e20, 1e30])
def test_frequencies_at_any_scale_and_beside_constants(scale):
    maps = torch.randn(3, 36, 5, generator=torch.Generator().manual_seed(0)) * scale + scale
    maps[..., 4] = 1e4 * scale
    delta, variance, zeros = log_amplitudes(maps, 6, 6)
    wide = maps.double()
    amplitude = np.abs(np.fft.fft2(wide.mT.unflatten(2, (6, 6)).numpy()))[:, :4]
    logs = np.log(amplitude) - np.log(amplitude[..., :1, :1])
    expected = np.stack([logs[..., k, k].mean(1) for k in range(4)], 1)
    expected[:, 0] = 0
    np.testing.assert_allclose(delta, expected, atol=1e-5)
    np.testing.assert_allclose(variance, wide.var(1, correction=0).mean(1), rtol=1e-5)
    assert zeros.tolist() == [1] * 3


@pytest.mark.parametrize("constants", [1, 40])
@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e20])
def test_neighbours_beside_constants_and_at_any_scale(constants, scale):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    beside = torch.cat([torch.full((50, constants), 1e4), 1e-3 * x], 1) * scale
    # So far from 0 all have nearly one direction: what is left is their distance.
    found = NearestNeighbors(n_neighbors=6).fit(x.double().numpy()).kneighbors()[1]
    indices, cosines = nearest(beside.float(), 6)
    assert [set(row) for row in indices.tolist()] == [set(row) for row in found.tolist()]
    assert cosines.isfinite().all()
    lengths = torch.rand(50, 1) + 0.5
    assert (nearest(lengths * torch.rand(1, 8), 3)[0] == -1).all()
    assert (nearest(torch.full((50, 3), 7.1) * scale, 3)[0] == -1).all()


@pytest.mark.parametrize("constants", [1, 40])
@pytest.mark.parametrize("scale", [1e-22, 1.0, 1e20])
def test_components_beside_constants_and_at_any_scale(constants, scale):
    generator = np.random.default_rng(0)
    x = (generator.gamma(1.0, 1.0, (200, 5)) * [5, 4, 3, 2, 1]).astype(np.float32)
    scores, shares = components(x)
    far = np.full((200, constants), 1e4, np.float32)
    beside = (np.hstack([far, 1e-3 * x]) * np.float32(scale)).astype(np.float32)
    found, told = components(beside)
    np.testing.assert_allclose(told, shares, atol=1e-6)
    np.testing.assert_allclose(found / (1e-3 * scale), scores, atol=1e-4)
    assert np.isnan(components(far)[0]).all()
