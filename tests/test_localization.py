"""Localisation: networks whose answer is known, the estimator, grids, files and messages."""

import signal

import numpy as np
import pytest
import torch
from torch import nn

from vitprobe import localization
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.running import memory
from vitprobe.running.interrupts import Interrupted
from vitprobe.statistics import place_hsic as estimator
from vitprobe.statistics.hsic import gram, hsic
from vitprobe.statistics.place_hsic import input_patches, place_cka, place_hsic
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.places import CLASS_TOKEN, CONVOLUTION, MEAN_OF_TOKENS, find_places


class Copy(nn.Module):
    """Each location holds the pixels of its own patch."""

    def __init__(self, patch=8, last=False):
        super().__init__()
        self.cut = nn.PixelUnshuffle(patch)
        self.last = last
        self.out = nn.Identity()

    def forward(self, x):
        x = self.cut(x)
        return self.out(x.permute(0, 2, 3, 1) * 2 if self.last else x * 2)


class Pooled(nn.Module):
    """Each location holds the mean of them all."""

    def __init__(self):
        super().__init__()
        self.cut = nn.PixelUnshuffle(8)
        self.out = nn.Identity()

    def forward(self, x):
        x = self.cut(x)
        return self.out(x.mean((2, 3), keepdim=True) + 0 * x)


class Tokens(nn.Module):
    """A class token, a register, and a copy of each patch."""

    num_prefix_tokens = 2

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1))
        self.cut = nn.PixelUnshuffle(8)
        self.out = nn.Identity()

    def forward(self, x):
        x = self.cut(x).flatten(2).mT
        return self.out(torch.cat([x.mean(1, keepdim=True).expand(-1, 2, -1), x], 1))


@pytest.fixture
def noise():
    return torch.randn(96, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("module", [Copy(), Copy(last=True), Tokens()])
def test_a_network_that_copies_its_patch_is_1_there_and_0_elsewhere(module, noise):
    result = localization.measure(module, noise, layers="out")
    values = result.of(0).reshape(16, 16)
    np.testing.assert_allclose(np.diag(values), 1, atol=1e-6)
    assert abs(values[~np.eye(16, dtype=bool)].mean()) < 0.02
    assert result.contrast[0] == pytest.approx(1, abs=0.02)
    assert result.peak_share[0] == 1
    np.testing.assert_array_equal(
        result.tokens[:6], [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1]]
    )


def test_a_globally_pooled_network_is_flat(noise):
    result = localization.measure(Pooled(), noise, layers="out")
    values = result.of(0).reshape(16, 16)
    # Every token holds the same, so every token has the same map.
    np.testing.assert_allclose(values, np.broadcast_to(values[:1], (16, 16)), atol=1e-6)
    assert result.contrast[0] == pytest.approx(0, abs=1e-7)
    assert values.mean() == pytest.approx(1 / 16, abs=0.04)


def test_every_pair_equals_the_cka_of_core():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(12, 5, 7, generator=generator, dtype=torch.float64) + 3
    patches = torch.randn(12, 4, 9, generator=generator, dtype=torch.float64)
    patches[:, 1] += tokens[:, 2].sum(1, keepdim=True)
    found = place_hsic(tokens, patches)
    for t in range(5):
        for p in range(4):
            pair = hsic(torch.stack([gram(tokens[:, t]), gram(patches[:, p])]))
            assert found[t, p] == pytest.approx(float(pair[0, 1]), rel=1e-10, abs=1e-10)
            assert found[t, -1] == pytest.approx(float(pair[0, 0]), rel=1e-10)
            assert found[-1, p] == pytest.approx(float(pair[1, 1]), rel=1e-10)


def test_blocks_of_places_change_nothing(monkeypatch):
    tokens, patches = torch.randn(8, 7, 6).double(), torch.randn(8, 5, 12).double()
    whole = place_hsic(tokens, patches)
    monkeypatch.setattr(estimator, "BLOCK_BYTES", 8 * 8 * 8 * 2)
    torch.testing.assert_close(place_hsic(tokens, patches), whole)


@pytest.mark.parametrize(("n", "places", "features"), [(64, 49, 64), (32, 64, 64), (16, 49, 768)])
def test_the_memory_told_beforehand_is_what_it_takes(n, places, features):
    given = [torch.randn(n, places, features), torch.randn(n, places, 48)]
    taken = memory.fullest(lambda: place_hsic(*given), given)
    assert 0.6 < estimator.scratch_bytes(n, places, features) / taken < 1.4


def test_a_patch_that_does_not_vary_is_undefined_not_zero():
    patches = torch.randn(8, 3, 4)
    patches[:, 1] = 0.1
    values = place_cka(place_hsic(torch.randn(8, 2, 4), patches))
    assert values[:, 1].isnan().all()
    assert values[:, [0, 2]].isfinite().all()


def test_patches_are_cut_row_by_row_and_a_border_is_left_out_evenly():
    pixels = torch.arange(36.0).view(1, 1, 6, 6)
    cut = input_patches(pixels, 2, 3)
    assert cut.shape == (1, 6, 6)
    assert cut[0, 1].tolist() == [2, 3, 8, 9, 14, 15]
    assert cut[0, 3].tolist() == [18, 19, 24, 25, 30, 31]
    assert input_patches(pixels, 4, 4)[0, 0].tolist() == [7]
    two = torch.stack([pixels[0, 0], 100 + pixels[0, 0]])[None]
    assert input_patches(two, 2, 3)[0, 0].tolist() == [0, 1, 6, 7, 12, 13, *(
        100.0 + v for v in (0, 1, 6, 7, 12, 13)
    )]  # fmt: skip


@pytest.mark.parametrize("side, kept, step", [(16, 16, 1), (32, 16, 2), (50, 12, 4), (33, 11, 3)])
def test_wide_maps_are_thinned_to_the_middles_of_their_stretches(side, kept, step):
    module = nn.Sequential(nn.Identity(), nn.ReLU())
    example = torch.randn(2, 3, side, side)
    layer = map_layers("net", module, example).choose("1")[0]
    (places,) = find_places(module, [layer], example)
    places = places.thinned(16)
    assert (places.rows, places.columns, places.step) == (kept, kept, step)
    column = torch.arange(side).expand(1, 1, side, side)
    taken = places.spatial(column)[0, :kept, 0]
    assert taken.tolist() == [step // 2 + step * i for i in range(kept)]


def test_several_models_follow_each_other_and_smaller_grids_end_in_nan(noise):
    result = localization.measure([Copy(4), Copy(8)], noise[:32], layers=["out"], batch_size=8)
    assert result.cka.shape == (64 + 16, 8, 8)
    assert np.isnan(result.cka[64:, 4:]).all()
    assert np.isnan(result.cka[64:, :, 4:]).all()
    assert np.isfinite(result.cka[64:, :4, :4]).all()
    assert result.model_of_layer.tolist() == [0, 1]
    assert result.grids.tolist() == [[8, 8], [4, 4]]
    assert np.bincount(result.layer_of_token).tolist() == [64, 16]
    assert result.models == ["Copy", "Copy #2"]
    assert (result.contrast_se > 0).all()


def test_the_standard_error_is_that_of_a_jackknife_over_batches(noise):
    result = localization.measure(Copy(8), noise[:40], layers="out", batch_size=8)
    # Images come in a seeded order, which the session fixes: the same batches, drawn again.
    order = np.random.default_rng(0).permutation(40)
    parts = [noise[:40][order[8 * b : 8 * b + 8]] for b in range(5)]
    sums = [place_hsic(input_patches(p, 4, 4), input_patches(p, 4, 4)) for p in parts]
    left_out = [float(localization.contrast(place_cka(sum(sums) - one))) for one in sums]
    error = np.sqrt(4 / 5 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))
    assert result.contrast_se[0] == pytest.approx(error, rel=1e-3)


def test_contrast_and_peaks_by_hand():
    values = torch.tensor([[0.5, 0.1, 0.3], [0.2, 0.6, 0.0], [0.9, 0.1, 0.4]])
    assert float(localization.contrast(values)) == pytest.approx((0.3 + 0.5 - 0.1) / 3)
    maps = torch.rand(9, 9, generator=torch.Generator().manual_seed(0))
    maps[4] = torch.eye(9)[4]
    assert float(localization.peak_share(maps, 3, 3)) == 1  # the only interior token is number 4
    maps[4, 7] = 2
    assert float(localization.peak_share(maps, 3, 3)) == 0


def test_depth_is_the_share_of_blocks(noise):
    result = localization.measure("test_vit@random", None, layers="blocks", num_images=8,
                                  batch_size=4)  # fmt: skip
    assert result.depth.tolist() == pytest.approx(np.linspace(0, 1, len(result.layers)).tolist())
    one = localization.measure("test_vit@random", None, num_images=8, batch_size=4)
    assert one.layers.tolist() == result.layers[-1:].tolist()
    np.testing.assert_allclose(one.of(0), result.of(len(result.layers) - 1), atol=1e-6)
    assert one.depth.tolist() == [1]


def made(kinds, contrast, share, error=0.01):
    models = len(kinds)
    return localization.LocalizationResult(
        {"models": [{"name": f"m{i}", "weights": "w"} for i in range(models)], "kinds": kinds},
        cka=np.zeros((models, 1, 1)),
        tokens=np.zeros((models, 2), int),
        layer_of_token=np.arange(models),
        layers=np.array(["block"] * models),
        model_of_layer=np.arange(models),
        depth=np.ones(models),
        grids=np.ones((models, 2), int),
        contrast=np.array(contrast),
        contrast_se=np.full(models, error),
        peak_share=np.array(share),
        peak_share_se=np.full(models, error),
    )


def test_findings_follow_the_numbers():
    kinds = [CLASS_TOKEN, MEAN_OF_TOKENS, CONVOLUTION]
    result = made(kinds, [0.4, 0.1, 0.35], [0.9, 0, 0])
    assert [one.verdict for one in result.findings()] == [HOLDS, HOLDS, FAILS]
    assert "m1 is much less localised than that of m0" in result.findings()[1].claim
    assert made(["untrained"] * 3, [0.4, 0.1, 0.1], [1, 1, 1]).findings() == []


def test_a_layer_without_places_is_refused(noise):
    module = wrap(nn.Sequential(Copy(), nn.Flatten(), nn.Linear(3072, 5)), name="net")
    with pytest.raises(VitprobeError, match=r"layer 2 of net has no grid of places: .* 5"):
        localization.measure(module, noise[:8], layers="2")
    with pytest.raises(VitprobeError, match="at least 4 images"):
        localization.measure(module, noise[:8], batch_size=3)


def test_values_that_are_not_finite_are_named(noise):
    noise[3, 0, 0, 0] = torch.inf
    with pytest.raises(VitprobeError, match="layer out of Copy is not finite"):
        localization.measure(Copy(), noise[:8], layers="out")


def test_an_interrupted_run_goes_on_from_its_state(noise, tmp_path, monkeypatch):
    arguments = {"layers": "out", "batch_size": 16, "checkpoint": tmp_path / "state"}
    whole = localization.measure(Copy(), noise, layers="out", batch_size=16)
    calls = []

    def stopping(*given):
        calls.append(given)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return place_hsic(*given)

    monkeypatch.setattr(localization, "place_hsic", stopping)
    with pytest.raises(Interrupted, match="after batch 3 of 6"):
        localization.measure(Copy(), noise, **arguments)
    result = localization.measure(Copy(), noise, **arguments)
    assert len(calls) == 3 + 3
    np.testing.assert_allclose(result.cka, whole.cka, atol=1e-6)
    assert result.contrast_se[0] == pytest.approx(whole.contrast_se[0])
    assert not list(tmp_path.iterdir())


def test_the_command_draws_what_it_saves(tmp_path, pictures, capsys):
    arguments = ["--models", "test_vit@random", "test_resnet@random", "--images", str(pictures)]
    assert localization.main([*arguments, "--batch-size", "4", "--out", str(tmp_path)]) == 0
    stem = "localization-test_vit-random-test_resnet-random"
    assert (tmp_path / f"{stem}.png").stat().st_size > 0
    result = load_result(tmp_path / f"{stem}.npz")
    figure = result.plot()
    drawn = [image.get_array().data for ax in figure.axes for image in ax.images]
    spot = result.of(0)[0, 0]
    np.testing.assert_array_equal(drawn[0], spot)
    assert "random (seed 0)" in figure._supxlabel.get_text()
    assert not list(tmp_path.glob(".*partial"))


def test_the_share_of_peaks_is_that_of_tokens_that_have_a_cka_with_any_patch():
    values = torch.eye(25, dtype=torch.float64)
    assert localization.peak_share(values, 5, 5) == 1
    values[12] = torch.nan
    values[6] = values[7]
    assert localization.peak_share(values, 5, 5) == 7 / 8
    assert localization.peak_share(values * torch.nan, 5, 5).isnan()
