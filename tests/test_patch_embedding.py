"""Patch-embedding filters: components against scikit-learn's, and stems of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from sklearn.decomposition import PCA
from torch import nn

from vitprobe import patch_embedding
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.patch_embedding import measure, principal_components, smoothness, stem_filters
from vitprobe.results.result import FAILS, HOLDS, load_result


def test_components_are_scikit_learns():
    filters = np.random.default_rng(0).normal(size=(60, 48)) * np.linspace(1, 3, 48)
    components, ratio = principal_components(filters, 28)
    pca = PCA(28, svd_solver="full").fit(filters)
    np.testing.assert_allclose(ratio, pca.explained_variance_ratio_, rtol=1e-8)
    signs = np.sign((components * pca.components_).sum(1))
    np.testing.assert_allclose(components * signs[:, None], pca.components_, atol=1e-8)


def test_sign_is_fixed_and_missing_components_are_nan():
    filters = np.random.default_rng(0).normal(size=(5, 12))
    components, ratio = principal_components(filters, 28)
    assert np.isfinite(ratio).sum() == np.isfinite(components).all(1).sum() == 4
    assert ratio[:4].sum() == pytest.approx(1)
    largest = np.abs(components[:4]).argmax(1)
    assert (components[np.arange(4), largest] > 0).all()
    np.testing.assert_allclose(principal_components(-filters, 28)[0], components, atol=1e-9)


def test_smoothness_of_waves_and_noise():
    x = np.linspace(0, np.pi, 16)
    wave = np.cos(x)[:, None, None] * np.ones((1, 16, 3))
    assert smoothness(wave) > 0.9
    assert abs(smoothness(np.random.default_rng(0).normal(size=(64, 64, 3)))) < 0.05
    checkers = 2 * (np.indices((8, 8)).sum(0)[..., None] % 2) - np.ones(3)
    assert smoothness(checkers) == -1


def test_one_colour_is_smooth_and_small_tiles_of_noise_have_no_bias():
    generator = np.random.default_rng(0)
    blue = np.broadcast_to([-0.1, 0.0, 0.9], (3, 3, 3))
    assert smoothness(blue) == pytest.approx(1)
    assert smoothness(blue + generator.normal(scale=0.01, size=blue.shape)) > 0.99
    noise = [smoothness(generator.normal(size=(3, 3, 3))) for _ in range(2000)]
    assert abs(np.mean(noise)) < 3 * np.std(noise) / np.sqrt(len(noise))


def test_a_stem_made_of_known_filters():
    module = timm.create_model("test_vit")
    weight = module.patch_embed.proj.weight
    wave = torch.cos(torch.linspace(0, torch.pi, weight.shape[-1]))
    with torch.no_grad():
        weight.mul_(1e-3).add_(torch.randn(len(weight), 1, 1, 1) * wave)
    result = measure(wrap(module, "made"))
    assert result.components.shape == (28, 16, 16, 3)
    assert result.explained_variance_ratio[0] > 0.99
    first = result.components[0]
    np.testing.assert_allclose(np.corrcoef(first[3, :, 1], wave)[0, 1] ** 2, 1, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "size"), [("test_resnet", 3), ("resnet18", 7), ("naflexvit_base_patch16_gap", 16)]
)
def test_stems_of_other_kinds(name, size):
    options = {"depth": 1} if "naflex" in name else {}
    result = measure(wrap(timm.create_model(name, **options), name))
    assert result.components.shape[1:] == (size, size, 3)
    assert np.nansum(result.explained_variance_ratio) <= 1 + 1e-9


def test_several_models_follow_each_other(tmp_path):
    result = measure(["test_vit@random", "test_resnet@random"])
    assert result.components.shape == (56, 16, 16, 3)
    assert result.of(1).shape[1:] == (3, 3, 3)
    again = load_result(result.save(tmp_path / "p")[-1])
    np.testing.assert_array_equal(again.components, result.components)
    drawn = again.plot().axes[0].images[0].get_array()[:16, :16]
    tile = result.of(0)[0]
    np.testing.assert_allclose(drawn, (tile - tile.min()) / np.ptp(tile))


def test_findings_on_a_trained_looking_and_an_untrained_stem():
    module = timm.create_model("test_vit")
    result = measure(wrap(module, "given"))
    assert result.findings()[0].verdict == FAILS
    assert measure("test_vit@random").findings()[0].verdict == HOLDS


def test_no_filters_on_pixels_gets_its_line():
    with pytest.raises(VitprobeError, match="blind has no layer of filters that look at pixels"):
        measure(wrap(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "blind"))


def test_command(tmp_path, capsys):
    assert patch_embedding.main(["--models", "test_vit@random", "--out", str(tmp_path)]) == 0
    assert "patch_embedding-test_vit-random.npz" in capsys.readouterr().out


def test_a_stem_of_several_convolutions_shows_the_first():
    from vitprobe import load_model
    from vitprobe.patch_embedding import stem_filters

    name, filters = stem_filters(load_model("resnet_box"))
    assert name == "conv1.0" and filters.shape[1:] == (3, 3, 3)


def test_depthwise_filters_are_not_taken_for_a_stem():
    class Folded(nn.Module):
        """Its stem looks at pixels that were folded into channels."""

        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(12, 8, 3)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)

    with pytest.raises(VitprobeError, match="no layer of filters that look at pixels"):
        stem_filters(wrap(Folded(), "folded"))


def test_a_later_layer_of_three_channels_is_not_taken_for_a_stem():
    module = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 3, 3), nn.Conv2d(3, 8, 3))
    with pytest.raises(VitprobeError, match="no layer of filters that look at pixels"):
        stem_filters(wrap(module, "folded"))
