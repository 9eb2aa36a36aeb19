"""Shared neighbours and the k-NN classifier: scikit-learn on the same features, and chance."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.neighbours import measure
from vitprobe.results import chance
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.statistics.neighbours import nearest, overlap, permuted_overlap, votes


def features(n=60, d=12, seed=0, offset=0.0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((n, d)) + offset


def sets(x, k):
    """Neighbours by scikit-learn, an image itself left out."""
    found = NearestNeighbors(n_neighbors=k + 1, metric="cosine", algorithm="brute").fit(x)
    return [set(row) - {i} for i, row in enumerate(found.kneighbors(x)[1])]


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("k", [1, 10])
def test_scikit_learns_neighbours(k, offset):
    x = features(offset=offset)
    indices, cosines = nearest(torch.from_numpy(x), k)
    assert [set(row) for row in indices.tolist()] == sets(x, k)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = np.take_along_axis(unit @ unit.T, indices.numpy(), 1)
    np.testing.assert_allclose(cosines, expected, atol=1e-9)
    assert (np.diff(cosines, axis=1) <= 1e-12).all()  # nearest first


@pytest.mark.parametrize("voters", [3, 20])
def test_scikit_learns_classifier_leaving_one_out(voters):
    x, labels = features(d=4), np.random.default_rng(1).integers(0, 3, 60)
    x[np.arange(60), labels] += 1.5
    found = votes(*nearest(torch.from_numpy(x), voters), labels)
    weights = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    for i in range(60):
        others = np.arange(60) != i
        known = KNeighborsClassifier(
            voters, metric="cosine", algorithm="brute", weights=weights
        ).fit(x[others], labels[others])
        assert (known.predict(x[[i]])[0] == labels[i]) == found[i]
    assert 0.5 < found.mean() < 1


def test_alignment_is_the_mean_share_of_common_neighbours():
    x, y, k = features(), features(seed=0) + 0.7 * features(seed=1), 7
    both = torch.stack([nearest(torch.from_numpy(one), k)[0] for one in (x, y)])
    shares = [len(a & b) / k for a, b in zip(sets(x, k), sets(y, k))]
    value, error = overlap(both)
    assert value[0, 1] == pytest.approx(np.mean(shares)) and 0.2 < value[0, 1] < 0.9
    assert error[0, 1] == pytest.approx(np.std(shares, ddof=1) / np.sqrt(60))
    np.testing.assert_allclose(value.diagonal(), 1)
    np.testing.assert_array_equal(value, value.T)


def test_turned_scaled_and_reordered_features_have_the_same_neighbours_and_moved_ones_do_not():
    x = torch.from_numpy(features())
    turned, _ = torch.linalg.qr(torch.from_numpy(features(12, 12, seed=3)))
    scale = torch.rand(60, 1, dtype=torch.float64) + 0.5
    order = torch.randperm(60)
    one = [nearest(y, 5)[0] for y in (x, scale * (x @ turned), x + 1.0)]
    value, _ = overlap(torch.stack(one))
    assert value[0, 1] == 1 and value[0, 2] < 0.95
    moved = nearest(x[order], 5)[0]
    assert all(set(order[moved[j]].tolist()) == set(one[0][order[j]].tolist()) for j in range(60))


def test_chance_is_k_over_n_minus_one():
    n, k = 512, 10
    generator = torch.Generator().manual_seed(0)
    unrelated = torch.stack(
        [nearest(torch.randn(n, 8, generator=generator), k)[0] for _ in range(6)]
    )
    value, error = overlap(unrelated)
    off = ~np.eye(6, dtype=bool)
    assert k / (n - 1) == pytest.approx(0.0196, abs=5e-5)
    assert np.abs(value - k / (n - 1))[off].max() < 4 * error[off].mean()
    assert error[off].mean() < 0.003
    draws = np.array(list(permuted_overlap(unrelated, 40, 0)))
    assert draws.mean() == pytest.approx(k / (n - 1), abs=2e-4)
    # What a permutation does to sets is what it does to features.
    moved = np.random.default_rng(0).permutation(n)
    back = np.empty((n, k), dtype=int)
    back[moved] = moved[unrelated[0].numpy()]
    shared = overlap(torch.stack([torch.from_numpy(back), unrelated[1]]))[0][0, 1]
    assert draws[0, 0, 1] == pytest.approx(shared, abs=1e-6)


def test_unrelated_layers_are_above_the_95_per_cent_of_permutations_about_1_in_20_times():
    above = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        layers = [torch.randn(150, d, generator=generator) for d in (5, 50, 5, 50)]
        found = torch.stack([nearest(layer, 10)[0] for layer in layers])
        owner = np.arange(4)
        each, _ = chance.quantiles(np.array(list(permuted_overlap(found, 100, seed))), owner)
        value, _ = overlap(found)
        above += (value > each)[np.triu_indices(4, 1)].tolist()
    assert 0.01 < np.mean(above) < 0.11


def test_quantiles_of_chance_are_symmetric_and_largest_over_each_pair_of_models():
    draws = np.random.default_rng(0).random((500, 5, 5))
    draws[:, 4] = np.nan
    draws[:, :, 4] = np.nan
    owner = np.array([0, 0, 1, 1, 1])
    each, largest = chance.quantiles(draws, owner)
    np.testing.assert_array_equal(each, each.T)
    assert each[0, 3] == np.quantile(draws[:, 0, 3], 0.95)
    block = draws[:, :2, 2:4].reshape(500, -1)
    assert largest[0, 1] == largest[1, 0] == np.quantile(block.max(1), 0.95)
    assert np.isnan(each[4]).all()
    none = chance.quantiles(draws[:0], owner)
    assert np.isnan(none[0]).all() and np.isnan(none[1]).all()


def test_calibration_is_zero_up_to_chance_and_one_at_one():
    values, level = np.array([0.1, 0.2, 0.6, 1.0, np.nan]), np.full(5, 0.2)
    np.testing.assert_allclose(chance.calibrated(values, level), [0, 0, 0.5, 1, np.nan])


def test_features_that_do_not_vary_have_no_neighbours():
    same = torch.full((30, 4), 0.3)
    found = torch.stack([nearest(x, 4)[0] for x in (same, torch.randn(30, 4))])
    value, error = overlap(found)
    assert np.isnan(value[0]).all() and np.isnan(error[:, 0]).all() and value[1, 1] == 1
    (draw,) = permuted_overlap(found, 1, 0)
    assert np.isnan(draw[0]).all() and np.isfinite(draw[1, 1])


def vit(size=(32, 32), **options):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=8, depth=3, num_heads=2, embed_dim=12,
        num_classes=2, **options,
    ).eval()  # fmt: skip


def outputs(module, name, images):
    found = []
    handle = module.get_submodule(name).register_forward_hook(
        lambda _m, _a, output: found.append(output)
    )
    with torch.no_grad():
        module(images)
    handle.remove()
    return found[0].double()


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_a_vits_and_a_cnns_layers_by_scikit_learn(size):
    one, other = vit(size, reg_tokens=2), timm.create_model("resnet10t", num_classes=2).eval()
    images = torch.randn(40, 3, *size, generator=torch.Generator().manual_seed(1))
    models = [wrap(one, "vit"), wrap(other, "cnn")]
    result = measure(models, images, batch_size=16, k=4, null=3)
    by_class = measure(models, images, batch_size=16, k=4, null=0, readout="class")
    order = np.random.default_rng(0).permutation(40)
    neighbours, of_class = [], []
    for name, owner in zip(result.layers, result.model_of_layer):
        out = outputs((one, other)[owner], name, images[order])
        mean = out.mean((2, 3)) if owner else out[:, 3:].mean(1)
        neighbours.append(sets(mean.numpy(), 4))
        of_class.append(sets((mean if owner else out[:, 0]).numpy(), 4))
    for found, expected in ((result, neighbours), (by_class, of_class)):
        for i, a in enumerate(expected):
            for j, b in enumerate(expected):
                share = np.mean([len(x & y) / 4 for x, y in zip(a, b)])
                assert found.alignment[i, j] == pytest.approx(share, abs=1e-6)
    assert set(result.readout) == {"mean of places"}
    assert by_class.readout[by_class.rows_of("vit")].tolist() == ["class token"] * 3
    assert set(by_class.readout[by_class.rows_of("cnn")]) == {"mean of places"}
    assert "vit: class token; cnn: mean of places" in by_class._caption()
    assert result.chance == pytest.approx(4 / 39) and np.isfinite(result.null_q95).all()
    assert np.isnan(by_class.null_q95).all() and np.isnan(result.accuracy).all()


def test_labels_give_accuracy(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pixels = generator.integers(0, 80, (60, 32, 32, 3)).astype(np.uint8)
    pixels[np.arange(60), :, :, labels] += 150  # a class a colour
    np.savez(tmp_path / "x.npz", images=pixels, labels=labels)
    result = measure(wrap(vit(), "net"), str(tmp_path / "x.npz"), null=2)
    assert (result.accuracy == 1).all() and (result.accuracy_se == 0).all()
    labels[:12] = (labels[:12] + 1) % 3  # a fifth of them wrong
    np.savez(tmp_path / "y.npz", images=pixels, labels=labels)
    mixed = measure(wrap(vit(), "net"), str(tmp_path / "y.npz"), null=2, readout="class")
    np.testing.assert_allclose(mixed.accuracy, 0.8)
    np.testing.assert_allclose(mixed.accuracy_se, np.sqrt(0.8 * 0.2 / 59))


def test_what_cannot_be_is_told(tensors):
    for options, line in (
        ({"k": 20}, "20 images of a tensor are too few for --k 20"),
        ({"k": 0}, "--k must be at least 1, not 0"),
        ({"null": -1}, "--null must be at least 0, not -1"),
        ({"readout": "last"}, "--readout must be mean or class, not 'last'"),
        ({"calibrated": True, "null": 0}, "--calibrated needs a chance level"),
        ({"readout": "class"}, "no class token to read out"),
    ):
        with pytest.raises(VitprobeError, match=line):
            measure("test_resnet@random", tensors, image_size=32, **options)


def test_findings_and_figures(tmp_path, tensors):
    one, other = wrap(vit(), "a"), wrap(timm.create_model("resnet10t").eval(), "b")
    result = measure([one, other], tensors, k=3, null=20)
    for block, level, verdict in ((0.9, 0.5, HOLDS), (0.9, 0.95, FAILS), (0.1, 0.05, FAILS)):
        result.alignment[np.ix_(result.rows_of(0), result.rows_of(1))] = block
        result.alignment_se[:] = 0.001
        result.null_max_q95[:] = level
        (finding,) = result.findings()
        assert finding.verdict == verdict
    ax = result.plot(result.figure().subplots())
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), result.alignment)
    result.save(tmp_path / "x")
    load_result(tmp_path / "x.npz").to_csv(tmp_path / "x.csv")
    assert "\nchance," in (tmp_path / "x.csv").read_text()
    shown = measure([one, other], tensors, k=3, null=20, calibrated=True)
    ax = shown.plot(shown.figure().subplots())
    expected = chance.calibrated(shown.alignment, shown.null_q95)
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), expected)
    assert not measure(["test_vit@random", "test_resnet@random"], tensors, image_size=32,
                       null=0).findings()  # fmt: skip


def test_class_tokens_that_gain_late():
    result = measure(wrap(vit(), "net"), torch.randn(20, 3, 32, 32), k=3, null=0, readout="class")
    result.accuracy_se[:] = 0.01
    for accuracy, verdict in (((0.1, 0.2, 0.9), HOLDS), ((0.1, 0.8, 0.9), FAILS)):
        result.accuracy[:] = accuracy
        assert [one.verdict for one in result.findings()] == [verdict]
