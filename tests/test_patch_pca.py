"""Principal components of patches: scikit-learn's on the same tokens, signs, scenes' truth."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from vitprobe import measure_all
from vitprobe.data.scenes import scenes
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.patch_pca import measure
from vitprobe.results.result import FAILS, HOLDS, OPEN, load_result
from vitprobe.statistics.patch_components import (
    area_under_curve,
    components,
    foreground_components,
)


def cloud(n=200, d=7, seed=0):
    generator = np.random.default_rng(seed)
    return generator.gamma(1.0, 1.0, (n, d)) * np.arange(d, 0, -1) ** 2


def test_scikit_learns_components_up_to_a_sign_that_the_rule_fixes():
    x = cloud()
    scores, shares = components(x)
    fitted = PCA(3).fit(x)
    expected = fitted.transform(x)
    np.testing.assert_allclose(shares, fitted.explained_variance_ratio_, atol=1e-9)
    np.testing.assert_allclose(np.abs(scores), np.abs(expected), rtol=1e-6, atol=1e-6)
    assert ((scores**3).sum(0) > 0).all()
    assert ((components(-x)[0] ** 3).sum(0) > 0).all()


def test_turned_and_moved_patches_have_the_same_components_and_stretched_ones_do_not():
    x = cloud()
    turned, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((7, 7)))
    scores, shares = components(x)
    for same in (components(x @ turned), components(x + 5)):
        np.testing.assert_allclose(same[0], scores, atol=1e-8)
        np.testing.assert_allclose(same[1], shares)
    order = np.random.default_rng(2).permutation(200)
    np.testing.assert_allclose(components(x[order])[0], scores[order], atol=1e-8)
    stretched = components(x * np.array([1, 1, 1, 1, 1, 1, 90]))[0]
    assert abs(np.corrcoef(stretched[:, 0], scores[:, 0])[0, 1]) < 0.5


def test_few_or_constant_patches_leave_components_undefined():
    scores, shares = components(cloud(n=3))
    assert np.isfinite(shares[:2]).all() and np.isnan(shares[2])
    assert np.isnan(scores[:, 2]).all()
    for flat in (np.full((9, 4), 0.1, np.float32), cloud(n=1)):
        scores, shares = components(flat)
        assert np.isnan(scores).all() and np.isnan(shares).all()


def test_the_foreground_has_a_basis_of_its_own():
    x = cloud()
    first = components(x)[0][:, 0]
    scores, shares = foreground_components(x, first)
    np.testing.assert_array_equal(np.isnan(scores[:, 0]), first <= 0)
    np.testing.assert_allclose(shares, PCA(3).fit(x[first > 0]).explained_variance_ratio_)


def test_area_under_the_curve_and_its_error_by_leaving_images_out():
    generator = np.random.default_rng(0)
    truth = generator.random((12, 16)) < 0.3
    scores = generator.standard_normal((12, 16)) + truth
    value, error = area_under_curve(scores, truth)
    assert value == roc_auc_score(truth.ravel(), scores.ravel())
    left = [roc_auc_score(np.delete(truth, i, 0).ravel(), np.delete(scores, i, 0).ravel())
            for i in range(12)]  # fmt: skip
    assert error == pytest.approx(np.sqrt(11 / 12 * np.square(left - np.mean(left)).sum()))
    assert area_under_curve(np.where(truth, 2.0, 1.0), truth)[0] == 1
    for nothing in (truth | True, truth & False):
        assert np.isnan(area_under_curve(scores, nothing)).all()


def vit(size=(32, 32), **options):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=8, depth=2, num_heads=2, embed_dim=12,
        num_classes=2, **options,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_a_vits_patches_and_a_cnns_locations_one_basis_for_all_images(size):
    one, other = vit(size, reg_tokens=2), timm.create_model("resnet10t", num_classes=2).eval()
    images = torch.randn(9, 3, *size, generator=torch.Generator().manual_seed(1))
    names = "blocks.0", "layer2.*"
    result = measure([wrap(one, "vit"), wrap(other, "cnn")], images, batch_size=4, layers=names)
    assert result.layers[0] == "blocks.0" and result.layers[1].startswith("layer2.")
    order = np.random.default_rng(0).permutation(9)
    for m, module in enumerate((one, other)):
        found = []
        handle = module.get_submodule(result.layers[m]).register_forward_hook(
            lambda _m, _a, output, found=found: found.append(output)
        )
        with torch.no_grad():
            module(images[order])
        handle.remove()
        patches = found[0].permute(0, 2, 3, 1) if m else found[0][:, 3:]
        rows, columns = patches.shape[1:3] if m else (size[0] // 8, size[1] // 8)
        flat = patches.reshape(-1, patches.shape[-1]).double().numpy()
        expected, shares = components(flat)
        fitted = PCA(min(3, *flat.shape)).fit(flat)
        known = np.isfinite(shares)
        np.testing.assert_allclose(shares[known], fitted.explained_variance_ratio_[: known.sum()],
                                   atol=1e-6)  # fmt: skip
        shown = result.components[m]
        assert np.isfinite(shown[..., 0]).sum() == 9 * rows * columns
        np.testing.assert_allclose(
            shown[:, :rows, :columns].reshape(-1, 3), expected, rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(result.explained_variance_ratio[m], shares, atol=1e-5)
        colours = result.colours(m)
        assert colours.shape == (9, rows, columns, 4)
        assert colours.min() == 0 and colours.max() == 1
    assert np.isnan(result.auc).all() and not result.findings()


def test_scenes_tell_how_well_the_first_component_finds_the_object():
    result = measure("vit_small_box", num_images=12, batch_size=5)
    order = np.random.default_rng(0).permutation(12)
    drawn = scenes(12)
    cells = drawn.mask[order].reshape(12, 8, 4, 8, 4).mean((2, 4)) / 255 > 0.5
    scores = result.components[0, ..., 0]
    expected = roc_auc_score(cells.ravel(), scores.ravel())
    assert result.auc[0] == pytest.approx(expected, abs=1e-6) and 0 < result.auc_se[0] < 0.2
    np.testing.assert_array_equal(result.pictures, drawn.images[order])
    (finding,) = result.findings()
    assert finding.over == "blocks.5"
    for auc, error, verdict in ((0.95, 0.01, HOLDS), (0.05, 0.01, HOLDS), (0.6, 0.01, FAILS),
                                (0.8, 0.2, OPEN)):  # fmt: skip
        result.auc[0], result.auc_se[0] = auc, error
        assert result.findings()[0].verdict == verdict
    assert not measure("vit_small_box@random", num_images=4).findings()


def test_foreground_and_outliers_are_said(tmp_path):
    module = vit()
    with torch.no_grad():
        module.pos_embed[0, 4, 0] += 80  # the third patch, behind the class token
    images = torch.randn(20, 3, 32, 32)
    result = measure(wrap(module, "net"), images, foreground=True)
    assert len(result.pictures) == 16 and result.meta["n"] == 16
    assert result.outlier_share[0] == pytest.approx(1 / 16)
    assert "6.25% of the patches of net" in result._caption()
    # The long tokens are the positive side, all of it.
    there = np.isfinite(result.components[0, ..., 0]).reshape(16, -1)
    assert there[:, 3].all() and there.sum() == 16
    assert (result.colours(0)[..., 3].reshape(16, -1) == there).all()
    ax = result.plot(result.figure().subplots())
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), result.colours(0)[0])
    result.save(tmp_path / "x")
    load_result(tmp_path / "x.npz").to_csv(tmp_path / "x.csv")


def test_beside_others_as_many_images_are_looked_at_as_alone():
    images = torch.randn(20, 3, 32, 32)
    alone = measure(wrap(vit(), "net"), images)
    beside = measure_all(["patch_pca"], wrap(vit(), "net"), images)["patch_pca"]
    assert len(alone.pictures) == len(beside.pictures) == beside.meta["n"] == 16
    np.testing.assert_array_equal(alone.components, beside.components)


def test_colours_are_not_those_of_one_patch_far_out():
    result = measure(wrap(vit(), "net"), torch.randn(20, 3, 32, 32))
    scores = np.random.default_rng(0).random(result.components.shape)
    result.components[:] = scores
    plain = result.colours(0)[..., :3]
    result.components[0, 0, 0, 0] = 1e3
    far = result.colours(0)[..., :3]
    assert (far[0, 0, 0] == 1).all()
    assert np.abs(far - plain).reshape(-1, 3)[1:].max() < 0.05
    assert far.min() == 0 and far.max() == 1


def test_what_cannot_be_is_told():
    images = torch.randn(3, 3, 32, 32)
    with pytest.raises(VitprobeError, match=r"has no layer 'block\.9'"):
        measure(wrap(vit(), "net"), images, layers="block.9")
    with pytest.raises(VitprobeError, match="no grid of places"):
        measure(wrap(vit(), "net"), images, layers="head")
