"""Skip ratios: by hand on known branches, through every kind of addition, over images."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath, LayerScale
from torch import nn

from vitprobe import skip_ratio
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.results.result import load_result
from vitprobe.statistics.norms import norms


class Scaled(nn.Module):
    """x + scale · (a linear branch that gives ``weight`` times its input)."""

    def __init__(self, weight, scale=1.0, channels=4, in_place=False):
        super().__init__()
        self.first = nn.Linear(channels, channels, bias=False)
        self.second = nn.Linear(channels, channels, bias=False)
        self.scale = LayerScale(channels, scale)
        self.drop = DropPath(0.9)
        self.in_place = in_place
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(channels))
            self.second.weight.copy_(weight * torch.eye(channels))

    def forward(self, x):
        branch = self.drop(self.scale(self.second(self.first(x))))
        if self.in_place:
            return branch.add_(x)
        return x + branch


class Tokens(nn.Module):
    """The image's pixels as tokens, then the blocks."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images):
        return self.blocks(images.flatten(2).mT)


def images(count=6, channels=4, side=3):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("in_place", [False, True])
def test_ratio_and_cosine_of_known_branches(in_place):
    net = Tokens(
        Scaled(0.5, in_place=in_place),
        Scaled(-2.0, scale=0.1, in_place=in_place),  # layer scale counts
    )
    result = skip_ratio.measure(net, images())
    assert result.ratio.shape == (2, 9)
    np.testing.assert_allclose(result.ratio[0], 2.0, rtol=1e-6)
    np.testing.assert_allclose(result.ratio[1], 5.0, rtol=1e-5)
    np.testing.assert_allclose(result.cosine[0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(result.cosine[1], -1.0, rtol=1e-6)
    np.testing.assert_allclose(result.ratio_se, 0.0, atol=1e-5)
    assert not result.zeros.any()


def test_each_token_is_the_mean_over_images_with_its_error():
    net = Tokens(Scaled(1.0))
    with torch.no_grad():
        net.blocks[0].second.weight.copy_(torch.randn(4, 4))
    x = images(7)
    with torch.no_grad():
        z = x.double().flatten(2).mT
        branch = z @ net.blocks[0].second.weight.double().T
    ratio = (z.norm(dim=-1) / branch.norm(dim=-1)).numpy()
    cosine = torch.cosine_similarity(z, branch, dim=-1).numpy()
    result = skip_ratio.measure(net, x, batch_size=3)
    order = np.arange(7)
    np.testing.assert_allclose(result.ratio[0], ratio[order].mean(0), rtol=1e-5)
    np.testing.assert_allclose(result.ratio_se[0], ratio.std(0, ddof=1) / 7**0.5, rtol=1e-4)
    np.testing.assert_allclose(result.cosine[0], cosine.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.cosine_se[0], cosine.std(0, ddof=1) / 7**0.5, rtol=1e-4)
    spatial = ratio.mean(1)
    np.testing.assert_allclose(result.spatial, [spatial.mean()], rtol=1e-5)
    np.testing.assert_allclose(result.spatial_se, [spatial.std(ddof=1) / 7**0.5], rtol=1e-4)


class Bottleneck(nn.Module):
    """A block with a projection shortcut, after or before its activation."""

    def __init__(self, pre_activation):
        super().__init__()
        self.pre_activation = pre_activation
        self.project = nn.Conv2d(4, 6, 1, stride=2)
        self.first, self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 1)
        self.relu = nn.ReLU(inplace=not pre_activation)

    def parts(self, x):
        x = torch.relu(x) if self.pre_activation else x
        return self.project(x), self.second(torch.relu(self.first(x)))

    def forward(self, x):
        skip, branch = self.parts(x)
        branch += skip
        return branch if self.pre_activation else self.relu(branch)


@pytest.mark.parametrize("pre_activation", [False, True])
def test_projection_shortcuts_of_maps(pre_activation):
    torch.manual_seed(0)
    block, x = Bottleneck(pre_activation), images(5, side=8)
    result = skip_ratio.measure(nn.Sequential(block), x)
    with torch.no_grad():
        skip, branch = block.parts(x)
    ratio = (skip.norm(dim=1) / branch.norm(dim=1)).mean((1, 2))
    assert result.ratio.shape == (1, 1) and result.kind.tolist() == ["convolution"]
    np.testing.assert_allclose(result.ratio[0, 0], ratio.mean(), rtol=1e-5)
    cosine = torch.cosine_similarity(skip, branch, dim=1).mean()
    np.testing.assert_allclose(result.cosine[0, 0], cosine, rtol=1e-4, atol=1e-6)


def test_maps_with_channels_last_and_first():
    for permute in (False, True):

        class Map(nn.Module):
            def __init__(self, last):
                super().__init__()
                self.last = last
                self.block = Scaled(0.25, channels=4)

            def forward(self, x):
                rows = self.block(x.permute(0, 2, 3, 1))
                return rows if self.last else rows.permute(0, 3, 1, 2)

        result = skip_ratio.measure(Map(permute), images(4, side=8))
        np.testing.assert_allclose(result.ratio, [[4.0]], rtol=1e-5)
        np.testing.assert_allclose(result.cosine, [[1.0]], rtol=1e-5)


def test_zero_branches_have_no_ratio():
    net = timm.create_model("test_resnet").eval()
    result = skip_ratio.measure(net, torch.randn(4, 3, 32, 32))
    assert np.isnan(result.ratio).all() and np.isnan(result.spatial).all()
    assert (result.zeros == 4).all()
    result.plot()
    assert "16 cases of a branch of exactly 0 (in 4 cells)" in result._caption()


def test_a_zero_branch_of_some_images_is_left_out():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = Scaled(0.5)

        def forward(self, x):
            return self.f(x) * 1.0

    x = images(4)
    x[0] = 0.0
    net = Tokens(Gate())
    result = skip_ratio.measure(net, x)
    np.testing.assert_allclose(result.ratio, 2.0, rtol=1e-6)
    assert (result.zeros == 1).all()
    np.testing.assert_allclose(result.cosine, 1.0, rtol=1e-6)


def test_vit_against_its_own_drop_path_branches():
    torch.manual_seed(0)
    net = timm.create_model("test_vit", img_size=32, init_values=0.5).eval()
    x = torch.randn(3, 3, 32, 32)
    result = skip_ratio.measure(net, x)
    assert result.ratio.shape == (12, 5)
    assert result.kind.tolist() == ["attention", "MLP"] * 6
    assert result.meta["layouts"] == [
        {
            "tokens": 5, "without_place": [0], "class_token": 0, "has_class": True,
            "attends": True,
        }
    ]  # fmt: skip
    with torch.no_grad():
        z = net._pos_embed(net.patch_embed(x))
        for i, block in enumerate(net.blocks):
            for row, f in (
                (2 * i, lambda z, b=block: b.ls1(b.attn(b.norm1(z)))),
                (2 * i + 1, lambda z, b=block: b.ls2(b.mlp(b.norm2(z)))),
            ):
                branch = f(z)
                expected = (z.norm(dim=-1) / branch.norm(dim=-1)).mean(0)
                np.testing.assert_allclose(result.ratio[row], expected, rtol=1e-4)
                z = z + branch


def test_several_models_pad_with_nan_and_round_trip(tmp_path, tensors):
    vit = wrap(timm.create_model("test_vit", img_size=32), "vit")
    cnn = wrap(timm.create_model("test_convnext"), "cnn")
    result = skip_ratio.measure([vit, cnn], tensors[:6], batch_size=2)
    assert result.ratio.shape[1] == 5 and np.isnan(result.ratio[12:, 1:]).all()
    assert np.isfinite(result.ratio[:12]).all() and np.isfinite(result.ratio[12:, 0]).all()
    assert result.model_of_layer.tolist() == [0] * 12 + [1] * (len(result.layers) - 12)
    claims = [finding.claim for finding in result.findings()]
    assert "the ratios of vit are above those of cnn" in claims and len(claims) == 2
    result.save(tmp_path / "x")
    again = load_result(tmp_path / "x.npz")
    for name, array in result.arrays().items():
        np.testing.assert_array_equal(getattr(again, name), array)
    assert again.findings() == result.findings()


def test_batches_of_any_size_and_a_resumed_run_agree(tensors, tmp_path, monkeypatch):
    net = timm.create_model("test_vit", img_size=32)
    whole = skip_ratio.measure(net, tensors)
    parts = skip_ratio.measure(net, tensors, batch_size=3)
    np.testing.assert_allclose(whole.ratio, parts.ratio, rtol=1e-5)
    np.testing.assert_allclose(whole.ratio_se, parts.ratio_se, rtol=1e-3)
    real, calls = skip_ratio._Watch.end, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        real(*args)

    from vitprobe.running.interrupts import Interrupted

    monkeypatch.setattr(skip_ratio._Watch, "end", stops)
    options = {"batch_size": 3, "checkpoint": tmp_path / "state"}
    with pytest.raises(Interrupted):
        skip_ratio.measure(net, tensors, **options)
    calls[:] = [1] * 10
    resumed = skip_ratio.measure(net, tensors, **options)
    assert len(calls) == 10 + 4  # seven batches, of which three were done
    np.testing.assert_array_equal(resumed.ratio, parts.ratio)


def test_the_drawn_heat_maps_are_the_data(tensors):
    result = skip_ratio.measure(timm.create_model("test_vit", img_size=32), tensors)
    figure = result.plot()
    drawn = {
        axes.get_title(): axes.images[0].get_array()
        for axes in figure.axes
        if axes.images and axes.get_title()
    }
    (attention,) = (array for title, array in drawn.items() if title.endswith("attention"))
    np.testing.assert_array_equal(attention, np.log10(result.ratio[::2]))
    line = result.plot(figure.add_subplot()).lines[0]
    np.testing.assert_array_equal(line.get_ydata(), result.spatial[::2])


def test_errors_name_the_model_and_the_layer():
    with pytest.raises(VitprobeError, match="Plain has no residual additions"):
        skip_ratio.measure(
            wrap(nn.Sequential(nn.Conv2d(3, 4, 3)), "Plain"), torch.randn(4, 3, 8, 8)
        )
    net = Tokens(Scaled(1.0), Scaled(torch.inf))
    with pytest.raises(VitprobeError, match=r"blocks\.1 sum of Broken is not finite"):
        skip_ratio.measure(wrap(net, "Broken"), images())


def test_command(tmp_path, capsys):
    arguments = ["--models", "test_vit@random", "--image-size", "32", "--num-images", "4"]
    assert skip_ratio.main([*arguments, "--out", str(tmp_path), "--stem", "s", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "s.png" in out and "s.npz" in out and "the class token's ratio" in out


@pytest.mark.parametrize("scale", [2.0**-90, 2.0**-70, 1.0, 2.0**70])
def test_no_scale_costs_digits(scale):
    generator = torch.Generator().manual_seed(0)
    skip, branch = torch.randn(2, 3, 5, 8, generator=generator)
    branch[0, 0] = 0
    found = skip_ratio.norms_and_product(scale * skip, scale * branch, -1)
    expected = skip_ratio.norms_and_product(skip.double(), branch.double(), -1)
    for part, other, power in zip(found, expected, (1, 1, 2)):
        torch.testing.assert_close(part.double() / scale**power, other, rtol=1e-5, atol=1e-6)
    assert norms(scale * skip).double() == pytest.approx(scale * expected[0], rel=1e-6)
