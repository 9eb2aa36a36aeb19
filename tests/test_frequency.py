"""Amplitudes and variance of maps: noise, blur, and numpy's transforms of the same tensors."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitprobe.errors import VitprobeError
from vitprobe.frequency import measure
from vitprobe.models.loading import wrap
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.statistics.frequency import below_nyquist, diagonal, log_amplitudes


def tokens(maps):
    """(n, C, H, W) -> (n, places, C)."""
    return torch.as_tensor(maps).flatten(2).mT


def slow(maps):
    """Δ on the diagonal, (n, frequencies), and V (n,), from numpy's transform in float64."""
    maps = np.asarray(maps, np.float64)
    n, _, rows, columns = maps.shape
    size = min(rows, columns)
    amplitude = np.abs(np.fft.fft2(maps))
    found = np.full((n, size // 2 + 1), np.nan)
    for k in range(size // 2 + 1):
        y, x = (int(np.floor(k * side / size + 0.5)) for side in (rows, columns))
        there = (amplitude[..., y, x] > 1e-9) & (amplitude[..., 0, 0] > 1e-9)
        logs = np.log(amplitude[..., y, x], where=there, out=np.zeros_like(amplitude[..., 0, 0]))
        logs -= np.log(amplitude[..., 0, 0], where=there, out=np.zeros_like(logs))
        found[:, k] = np.nanmean(np.where(there, logs, np.nan), 1)
    return found, maps.var((2, 3)).mean(1)


class TestReferenceValues:
    @pytest.mark.parametrize("side", [(14, 14), (16, 16), (12, 24)])
    def test_white_noise(self, side):
        maps = torch.randn(40, 500, *side, generator=torch.Generator().manual_seed(0))
        delta, variance, zeros = log_amplitudes(tokens(maps), *side)
        mean = delta.mean(0).numpy()
        error = 1.6 / np.sqrt(40 * 500)
        assert mean[0] == 0 and not zeros.any()
        # Complex amplitudes in between, real ones at 0 and at Nyquist.
        assert np.abs(mean[1:-1] - 0.5 * np.log(2)).max() < 4 * error
        assert abs(mean[-1]) < 4 * error
        assert variance.mean() == pytest.approx(1 - 1 / np.prod(side), rel=5e-3)

    def test_a_circular_box_blur_adds_what_it_must(self):
        side, generator = 16, torch.Generator().manual_seed(0)
        maps = torch.randn(3, 20, side, side, generator=generator, dtype=torch.float64)
        blurred = sum(maps.roll((i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
        one, other = (log_amplitudes(tokens(x), side, side)[0] for x in (maps, blurred))
        omega = np.pi * diagonal(side, side)
        expected = 2 * np.log(np.abs(1 + 2 * np.cos(omega)) / 3)
        assert expected[-1] == pytest.approx(-2.197, abs=5e-4)
        np.testing.assert_allclose(other - one, np.tile(expected, (3, 1)), atol=1e-9)

    def test_one_wave_is_all_at_its_frequency(self):
        y, x = np.mgrid[:8, :8]
        wave = 5 + np.cos(2 * np.pi * 3 * (x + y) / 8)
        delta, variance, zeros = log_amplitudes(tokens(wave[None, None]), 8, 8)
        # Half of the amplitude is at the frequency, half at its mirror image; elsewhere none.
        assert delta[0, 3] == pytest.approx(np.log(0.5 / 5))
        assert torch.isnan(delta[0, [1, 2, 4]]).all() and zeros.tolist() == [1]
        assert variance[0] == pytest.approx(0.5)


@pytest.mark.parametrize("side", [(7, 7), (14, 14), (6, 9), (10, 4), (1, 1), (2, 3)])
def test_numpys_transform_of_the_same_maps(side):
    maps = torch.randn(4, 5, *side, dtype=torch.float64) + 0.3
    delta, variance, _ = log_amplitudes(tokens(maps), *side)
    expected, spread = slow(maps)
    np.testing.assert_allclose(delta, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(variance, spread, rtol=1e-12, atol=1e-15)
    assert delta.shape[1] == len(diagonal(*side))
    assert diagonal(*side)[below_nyquist(*side)] < 1


def test_digits_are_kept_where_the_mean_is_far_above_the_deviation():
    maps = torch.randn(2, 8, 14, 14, dtype=torch.float64) + 1000
    delta, variance, zeros = log_amplitudes(tokens(maps.float()), 14, 14)
    expected, spread = slow(maps.float())
    np.testing.assert_allclose(delta, expected, atol=2e-3)
    np.testing.assert_allclose(variance, spread, rtol=1e-4)
    assert not zeros.any()


def test_constant_channels_are_left_out_and_counted():
    maps = torch.randn(3, 6, 8, 8)
    with_constants = torch.cat([maps, torch.full((3, 2, 8, 8), 0.1), torch.zeros(3, 1, 8, 8)], 1)
    delta, variance, zeros = log_amplitudes(tokens(with_constants), 8, 8)
    expected, spread, none = log_amplitudes(tokens(maps), 8, 8)
    torch.testing.assert_close(delta, expected)
    torch.testing.assert_close(variance * 9, spread * 6)
    assert zeros.tolist() == [3, 3, 3] and not none.any()


def test_channels_whose_mean_is_nothing_are_left_out_and_counted():
    """There is nothing to compare their other amplitudes with."""
    maps = torch.randn(3, 6, 8, 8) + 0.5
    stripes = torch.ones(3, 1, 8, 8)
    stripes[..., 1::2, :] = -1
    stripes[..., ::4] *= 3
    assert (stripes.sum((2, 3)) == 0).all()
    delta, _, zeros = log_amplitudes(tokens(torch.cat([maps, stripes], 1)), 8, 8)
    torch.testing.assert_close(delta, log_amplitudes(tokens(maps), 8, 8)[0])
    assert delta.isfinite().all() and zeros.tolist() == [1, 1, 1]


def test_moved_around_maps_stay_the_same_and_shuffled_ones_do_not():
    maps = torch.randn(2, 4, 8, 8).cumsum(2).cumsum(3)
    delta, variance, _ = log_amplitudes(tokens(maps), 8, 8)
    moved = log_amplitudes(tokens(maps.roll((3, 5), (2, 3))[:, [2, 0, 3, 1]]), 8, 8)
    torch.testing.assert_close(moved[0], delta, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(moved[1], variance)
    torch.testing.assert_close(log_amplitudes(tokens(-3 * maps), 8, 8)[0], delta)
    shuffled = tokens(maps)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    other = log_amplitudes(shuffled, 8, 8)
    torch.testing.assert_close(other[1], variance)
    assert (other[0] - delta)[:, 1:].abs().max() > 0.5


def outputs(module, name, images):
    module, found = module.double(), []
    handle = module.get_submodule(name).register_forward_hook(
        lambda _m, _a, output: found.append(output)
    )
    with torch.no_grad():
        module(images.double())
    handle.remove()
    module.float()
    return found[0]


def vit(size=(32, 32), **options):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=8, depth=2, num_heads=2, embed_dim=12,
        num_classes=2, **options,
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("size", "registers"), [((32, 32), 0), ((24, 48), 2)])
def test_a_vits_stream_before_and_after_every_sublayer(size, registers):
    module = vit(size, reg_tokens=registers)
    images = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(1))
    result = measure(wrap(module, "net"), images, batch_size=2)
    assert result.layers.tolist() == ["blocks.0 sum 1 before", "blocks.0 sum 1", "blocks.0",
                                      "blocks.1 sum 1", "blocks.1"]  # fmt: skip
    assert result.kind.tolist() == ["", "attention", "MLP", "attention", "MLP"]
    rows, columns = size[0] // 8, size[1] // 8
    assert (result.grid == (rows, columns)).all()
    stream = {
        "blocks.0 sum 1 before": outputs(module, "norm_pre", images),
        "blocks.0": outputs(module, "blocks.0", images),
        "blocks.1": outputs(module, "blocks.1", images),
    }
    # In the middle of a block: its input, and what attention adds.
    for i in (0, 1):
        given = stream[["blocks.0 sum 1 before", "blocks.0"][i]]
        stream[f"blocks.{i} sum 1"] = given + outputs(module, f"blocks.{i}.attn", images)
    high = below_nyquist(rows, columns)
    seen = []
    for row, name in enumerate(result.layers):
        patches = stream[name][:, module.num_prefix_tokens :]
        maps = patches.mT.unflatten(2, (rows, columns)).numpy()
        delta, variance = slow(maps)
        np.testing.assert_allclose(result.delta[row], delta.mean(0), atol=2e-4)
        error = delta.std(0, ddof=1) / np.sqrt(5)
        np.testing.assert_allclose(result.delta_se[row], error, atol=2e-4)
        assert result.variance[row] == pytest.approx(variance.mean(), rel=1e-4)
        seen.append((delta[:, high], np.log(variance)))
    for k, steps in enumerate([(1, 3), (2, 4)]):
        for value, error, part in (
            (result.step_delta, result.step_delta_se, 0),
            (result.step_variance, result.step_variance_se, 1),
        ):
            change = np.mean([seen[i][part] - seen[i - 1][part] for i in steps], 0)
            assert value[0, k] == pytest.approx(change.mean(), abs=3e-4)
            assert error[0, k] == pytest.approx(change.std(ddof=1) / np.sqrt(5), abs=3e-4)
    assert np.isnan(result.step_delta[0, 2])


def test_a_resnets_blocks_after_their_activation_within_each_stage():
    torch.manual_seed(0)
    module = timm.create_model("resnet18", num_classes=2, zero_init_last=False).eval()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    result = measure(wrap(module, "net"), images, batch_size=2)
    names = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert result.layers.tolist() == ["layer1.0 sum before", *names]
    # A block that changes the size of the map begins a stage.
    expected = ["", "convolution", "convolution", *["", "convolution"] * 3]
    assert result.kind.tolist() == expected
    assert result.grid[:, 0].tolist() == [16, 16, 16, 8, 8, 4, 4, 2, 2]
    for row, name in enumerate(["maxpool", *names]):
        delta, variance = slow(outputs(module, name, images).numpy())
        at = np.isfinite(result.delta[row])
        np.testing.assert_allclose(result.omega[at], diagonal(*result.grid[row]), atol=1e-8)
        np.testing.assert_allclose(result.delta[row, at], delta.mean(0), atol=1e-3)
        assert result.variance[row] == pytest.approx(variance.mean(), rel=1e-3)


def test_networks_of_windows_and_of_convolutional_blocks_know_their_sublayers():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(2, 2),
        num_heads=(1, 2), embed_dim=8, num_classes=2,
    ).eval()  # fmt: skip
    convnext = timm.create_model("test_convnext", num_classes=2).eval()
    images = torch.randn(4, 3, 32, 32)
    result = measure([wrap(swin, "swin"), wrap(convnext, "convnext")], images)
    kinds = result.kind[result.rows_of("swin")].tolist()
    four = ["", *["attention", "MLP"] * 2]
    assert kinds == four * 2
    assert set(result.kind[result.rows_of("convnext")]) == {"", "convolution"}


def test_a_network_without_skips_has_its_blocks_and_no_steps():
    module = nn.Sequential(*(nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.ReLU())
                             for c in (3, 4, 4)))  # fmt: skip
    result = measure(wrap(module, "net"), torch.randn(3, 3, 8, 8) + 1)
    assert len(result.layers) == 3 and set(result.kind.flat) == {""}
    assert np.isnan(result.step_delta).all() and not result.findings()


def test_a_layer_that_is_not_finite_is_named():
    module = vit()
    with torch.no_grad():
        module.blocks[1].mlp.fc2.bias[0] = float("inf")
    with pytest.raises(VitprobeError, match=r"blocks\.1 of net is not finite"):
        measure(wrap(module, "net"), torch.randn(2, 3, 32, 32))


def test_findings_say_what_smooths_and_what_sharpens(tmp_path):
    result = measure(wrap(vit(), "net"), torch.randn(6, 3, 32, 32))
    for name, value in (("delta", (-1, 1, np.nan)), ("variance", (-1, 1, np.nan))):
        getattr(result, f"step_{name}")[0] = value
        getattr(result, f"step_{name}_se")[0] = 0.1
    assert [one.verdict for one in result.findings()] == [HOLDS, HOLDS]
    result.step_variance[0] = 1, -1, np.nan
    assert [one.verdict for one in result.findings()] == [FAILS, FAILS]
    ax = result.plot(result.figure().subplots())
    np.testing.assert_allclose(ax.lines[0].get_ydata(), result.delta[:, 1])
    result.save(tmp_path / "x")
    load_result(tmp_path / "x.npz").to_csv(tmp_path / "x.csv")
    result.meta["models"][0]["weights"] = "random, seed 0"
    assert not result.findings()
