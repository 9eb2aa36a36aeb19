"""The chance level of CKA: permuted images, unrelated features, and what is drawn of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from vitprobe.cka import measure
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.results import chance, drawing
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.statistics.hsic import gram, hsic, normalise
from vitprobe.statistics.permuted_hsic import affordable, normalise_by, permuted_hsic


def grams(features):
    return torch.stack([gram(x) for x in features])


def test_a_permutation_of_grams_is_one_of_images():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(12, d, generator=generator, dtype=torch.float64) for d in (3, 8, 30)]
    draws = permuted_hsic(grams(features), 3, [5, 7])
    orders = np.random.default_rng([5, 7])
    for draw in draws:
        order = torch.from_numpy(orders.permutation(12))
        expected = hsic(grams([x[order] for x in features]), grams(features))
        torch.testing.assert_close(draw, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
    other = permuted_hsic(grams(features), 3, [5, 8])
    assert not torch.allclose(other, draws)
    # Diagonal included: a layer's own images in another order are unrelated, too.
    own = hsic(grams(features)).diagonal()
    assert (draws.diagonal(dim1=1, dim2=2).abs() < 0.6 * own).all()


def test_permuting_both_networks_alike_changes_nothing():
    features = [torch.randn(10, d, dtype=torch.float64) for d in (4, 9)]
    order = torch.randperm(10)
    one, other = (normalise(hsic(grams(x))) for x in (features, [x[order] for x in features]))
    torch.testing.assert_close(one, other)


def test_unrelated_features_of_any_width_are_above_95_per_cent_about_1_in_20_times():
    above, means = [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        shapes = (50, 5000, 50, 5000)
        batches = [
            grams([torch.randn(32, d, generator=generator) for d in shapes]) for _ in range(3)
        ]
        sums = sum(hsic(one) for one in batches)
        draws = sum(permuted_hsic(one, 100, [seed, b]) for b, one in enumerate(batches))
        values = normalise_by(draws, sums).numpy()
        each, largest = chance.quantiles(values, np.array([0, 0, 1, 1]))
        cka = normalise(sums).numpy()
        pairs = np.ix_([0, 1], [2, 3])
        above += (cka[pairs] > each[pairs]).ravel().tolist()
        means.append(values.mean(0))
        assert largest[0, 1] >= each[pairs].max() - 1e-12
    assert 0.005 < np.mean(above) < 0.12
    # Unbiased: 0 on average whatever the width.
    assert np.abs(np.mean(means, 0)).max() < 0.005


def test_layers_that_do_not_vary_have_no_chance_level():
    same = grams([torch.ones(8, 3), torch.randn(8, 3), torch.randn(8, 5)])
    values = normalise_by(permuted_hsic(same, 4, [0]), hsic(same))
    assert values[:, 0].isnan().all() and values[:, :, 0].isnan().all()
    assert values[:, 1:, 1:].isfinite().all()


def test_many_layers_or_large_batches_have_fewer_permutations():
    assert affordable(200, 28, 32) == 200
    assert affordable(200, 300, 128) == 69
    assert affordable(200, 2000, 1024) == 20 and affordable(5, 2000, 1024) == 5


class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(48, 20), nn.Linear(20, 6)

    def forward(self, x):
        return self.b(torch.relu(self.a(x.flatten(1))))


@pytest.fixture
def images():
    return torch.randn(60, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def nets():
    return [wrap(Net(seed).eval(), name) for seed, name in ((0, "x"), (1, "y"))]


def test_the_command_tells_it_beside_the_estimate_which_stays_as_it_was(images, tmp_path):
    plain = measure(nets(), images, batch_size=15, layers="all")
    told = measure(nets(), images, batch_size=15, layers="all", null=40)
    np.testing.assert_array_equal(plain.cka, told.cka)
    assert np.isnan(plain.null_q95).all() and np.isnan(plain.null_max_q95).all()
    size = len(told.layers)
    assert told.null_q95.shape == (size, size) and told.null_max_q95.shape == (2, 2)
    np.testing.assert_array_equal(told.null_q95, told.null_q95.T)
    assert 0 < np.nanmedian(told.null_q95) < 0.2
    assert told.null_max_q95[0, 1] > np.nanmax(told.null_q95[np.ix_(*map(told.rows_of, "xy"))])
    again = measure(nets(), images, batch_size=15, layers="all", null=40)
    np.testing.assert_array_equal(again.null_q95, told.null_q95)
    other = measure(nets(), images, batch_size=15, layers="all", null=40, seed=1)
    assert not np.allclose(other.null_q95, told.null_q95)
    # Linear readings of the same pixels are alike beyond chance.
    (finding,) = [one for one in told.findings() if "unrelated" in one.claim]
    assert finding.verdict == HOLDS and "40 permutations" in finding.numbers
    assert not [one for one in plain.findings() if "unrelated" in one.claim]
    told.save(tmp_path / "x")
    load_result(tmp_path / "x.npz").figure()
    told.null_max_q95[:] = 0.99
    assert [one.verdict for one in told.findings() if "unrelated" in one.claim] == [FAILS]


def test_a_file_without_chance_levels_is_still_read(images, tmp_path):
    measure(nets(), images, batch_size=15).save(tmp_path / "x")
    with np.load(tmp_path / "x.npz") as file:
        arrays = {name: file[name] for name in file.files if not name.startswith("null")}
    np.savez(tmp_path / "old.npz", **arrays)
    old = load_result(tmp_path / "old.npz")
    assert np.isnan(old.null_q95).all() and old.null_max_q95.shape == (2, 2)
    old.figure()
    old.to_csv(tmp_path / "old.csv")


def test_calibrated_values_are_drawn_and_said(images):
    told = measure(nets(), images, batch_size=15, null=20, calibrated=True)
    ax = told.plot(told.figure().subplots())
    expected = chance.calibrated(told.cka, told.null_q95)
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), expected)
    assert "(s − τ) / (1 − τ)" in told._caption()
    for options, line in (
        ({"null": -1}, "--null must be at least 0, not -1"),
        ({"calibrated": True}, "--calibrated needs a chance level"),
    ):
        with pytest.raises(VitprobeError, match=line):
            measure(nets(), images, **options)


def test_outlines_go_around_cells_and_not_through_them():
    ax = drawing.new_figure(3, 3).subplots()
    cells = np.zeros((3, 4), dtype=bool)
    cells[1, 1:3] = True
    chance.outline(ax, cells)
    lines = {tuple(map(tuple, line)) for line in ax.collections[0].get_segments()}
    sides = {((c - 0.5, r), (c + 0.5, r)) for c in (1, 2) for r in (0.5, 1.5)}
    sides |= {((c, 0.5), (c, 1.5)) for c in (0.5, 2.5)}
    assert lines == sides
