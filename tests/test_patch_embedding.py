"""Patch-embedding filters: components against scikit-learn's, and stems of every kind."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from matplotlib.text import Text
from sklearn.decomposition import PCA
from torch import nn

from vitprobe import patch_embedding
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import load_model, wrap
from vitprobe.patch_embedding import measure, principal_components
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.statistics.grids import smoothness
from vitprobe.tracing.stem import stem_filters


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
    blind = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(VitprobeError, match="blind has no layer of filters that look at pixels"):
        measure(wrap(blind, "blind", input_size=(3, 8, 8)))
    with pytest.raises(VitprobeError, match="odd does not say what images it takes"):
        measure(wrap(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), "odd"))


def test_command(tmp_path, capsys):
    assert patch_embedding.main(["--models", "test_vit@random", "--out", str(tmp_path)]) == 0
    assert "patch_embedding-test_vit-random.npz" in capsys.readouterr().out


def filters_of(module, *size):
    """Name and filters, or None, of a module on images of some size."""
    return stem_filters(module.eval(), torch.randn(1, *size))


def test_a_stem_of_several_convolutions_shows_the_first():
    name, filters = filters_of(load_model("resnet_box").module, 3, 32, 32)
    assert name == "conv1.0" and filters.shape[1:] == (3, 3, 3)


def test_later_and_depthwise_layers_are_not_taken_for_a_stem():
    # Of three channels each, but of none of the image's.
    module = nn.Sequential(nn.Conv2d(3, 3, 1, groups=3), nn.Conv2d(3, 3, 5), nn.Conv2d(3, 8, 7))
    assert filters_of(module, 3, 32, 32) is None
    module = nn.Sequential(nn.Conv2d(3, 3, 2), nn.Conv2d(3, 8, 7), nn.Flatten(2), nn.Linear(625, 9))
    name, filters = filters_of(module, 3, 32, 32)
    assert name == "0" and filters.shape[1:] == (2, 2, 3)


def test_of_parallel_branches_the_largest_filters_are_shown():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            return self.small(x) + self.large(x)

    assert filters_of(Parallel(), 3, 8, 8)[0] == "large"


class Patches(nn.Module):
    """The same patch embedding as a convolution, in ways that flatten pixels first."""

    def __init__(self, convolution, way):
        super().__init__()
        weight = convolution.weight.detach()  # (filters, channels, side, side)
        self.way, self.side, self.bias = way, weight.shape[-1], convolution.bias
        flat = {
            "unfold": weight.flatten(1),
            "rows": weight.permute(0, 2, 3, 1).flatten(1),
            "matmul": weight.permute(0, 2, 3, 1).flatten(1),
            "turned": weight.flip(1).permute(0, 3, 2, 1).flatten(1),  # columns, rows, channels
        }
        if way in flat:
            self.embedding = nn.Linear(flat[way].shape[1], len(weight))
            self.embedding.weight = nn.Parameter(flat[way].clone())
            self.embedding.bias = nn.Parameter(convolution.bias.detach().clone())
        else:
            self.embedding = nn.Conv2d(weight[0].numel(), len(weight), 1)
            self.embedding.weight = nn.Parameter(weight.flatten(1)[..., None, None].clone())
            self.embedding.bias = convolution.bias

    def forward(self, x):
        p = self.side
        if self.way == "unfold":
            return self.embedding(nn.functional.unfold(x, p, stride=p).mT)
        if self.way == "folded":
            return self.embedding(nn.functional.pixel_unshuffle(x, p)).flatten(2).mT
        if self.way == "einsum":
            x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))
            weight = self.embedding.weight.unflatten(1, (-1, p, p))[..., 0, 0]
            return torch.einsum("nchpwq,dcpq->nhwd", x, weight).flatten(1, 2) + self.bias
        if self.way == "turned":
            x = x.flip(1)
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1)
        if self.way == "turned":
            x = x.transpose(3, 4)
        x = x.flatten(3).flatten(1, 2)
        if self.way == "matmul":
            return (x - 0.5) @ self.embedding.weight.T + self.embedding.bias
        return self.embedding(x)


@pytest.mark.parametrize("channels", [1, 3, 4, 12])
@pytest.mark.parametrize("way", ["unfold", "rows", "turned", "folded", "matmul", "einsum"])
def test_flattened_patches_have_the_filters_of_the_convolution_that_does_the_same(way, channels):
    convolution = nn.Conv2d(channels, 40, 4, 4)
    module = Patches(convolution, way)
    x = torch.randn(2, channels, 16, 24)
    expected = convolution(x - 0.5 * (way == "matmul")).flatten(2).mT
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    name, filters = filters_of(module, channels, 16, 24)
    assert name == ("output" if way in ("matmul", "einsum") else "embedding")
    torch.testing.assert_close(filters, convolution.weight.detach().permute(0, 2, 3, 1))


def test_a_convolution_on_folded_pixels_has_filters_as_wide_as_they_reach():
    module = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 5, 3, padding=1), nn.Conv2d(5, 8, 3))
    name, filters = filters_of(module, 3, 16, 16)
    assert name == "1" and filters.shape == (5, 6, 6, 3)
    weight = module[1].weight.detach()  # channel 4 c + 2 dy + dx of the folded map
    torch.testing.assert_close(filters[:, 2 * 2 + 1, 2 * 0 + 0, 2], weight[:, 4 * 2 + 2, 2, 0])


@pytest.mark.parametrize("channels", [4, 12])
def test_filters_of_many_channels_are_drawn_and_said(channels):
    module = timm.create_model("test_vit", img_size=32, in_chans=channels)
    result = measure([wrap(module, "many"), "test_vit@random"])
    assert result.of(0).shape == (28, 16, 16, channels)
    assert result.of(1).shape == (28, 16, 16, 3)
    expected, _ = principal_components(
        module.patch_embed.proj.weight.detach().permute(0, 2, 3, 1).flatten(1).numpy(), 28
    )
    np.testing.assert_allclose(result.of(0).reshape(28, -1), expected, atol=1e-6)
    texts = " ".join(text.get_text() for text in result.plot().findobj(Text))
    assert f"{channels} channels (many) are shown by the mean" in " ".join(texts.split())


def test_standardised_and_padded_convolutions_are_seen_as_they_are_used():
    module = timm.create_model("resnetv2_50x1_bit")
    name, filters = filters_of(module, 3, 64, 64)
    assert name == "stem.conv" and filters.shape[1:] == (7, 7, 3)
    # Each filter is used with mean 0 and variance 1.
    flat = filters.flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(len(flat)), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.var(1, correction=0), torch.ones(len(flat)), rtol=1e-2, atol=0)
    padded = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 8, 3, 2))
    _, filters = filters_of(padded, 3, 16, 16)
    torch.testing.assert_close(filters, padded[1].weight.detach().permute(0, 2, 3, 1))
    resized = nn.Sequential(nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.Conv2d(3, 8, 4, 4))
    _, filters = filters_of(resized, 3, 16, 16)
    torch.testing.assert_close(filters, resized[1].weight.detach().permute(0, 2, 3, 1))


class InTwoTypes(nn.Module):
    """Its first parameter is in float32, and the first layer that sees the image is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(8, 3)
        self.stem = nn.Conv2d(3, 8, 4, 4).bfloat16()

    def forward(self, x):
        return self.head(self.stem(x).float().mean((2, 3)))


def test_the_image_has_the_type_that_the_first_layer_wants():
    mixed = InTwoTypes().eval()
    found = measure(wrap(mixed, "mixed", input_size=(3, 16, 16)))
    mixed.stem.float()
    whole = measure(wrap(mixed, "whole", input_size=(3, 16, 16)))
    np.testing.assert_array_equal(found.components, whole.components)
