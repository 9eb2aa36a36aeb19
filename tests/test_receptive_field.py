"""Receptive fields: against finite differences, theoretical fields, and networks known by hand."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import timm
import torch
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from torch import nn

from vitprobe import receptive_field
from vitprobe.errors import VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.models.loading import wrap
from vitprobe.results.result import load_result
from vitprobe.running import memory
from vitprobe.statistics.fields import channels_of_images, reaches_border, three_digits
from vitprobe.tracing.centre_gradients import rows_of_jacobian
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.theoretical_field import theoretical_fields


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def small_net():
    """In-place activations and an in-place addition after the layer that is looked at."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
            self.act = nn.SELU(inplace=True)

        def forward(self, x):
            y = self.second(self.act(self.first(x)))
            y += x
            return self.act(y)

    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), Block(), Block()).double().eval()


def test_gradients_against_finite_differences():
    net, x = small_net(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    result = receptive_field.measure(net, x, layers=["0", "1", "2"], channels="all")
    assert result.layers.tolist() == ["0", "1", "2"] and result.gradient.shape == (3, 12, 12)
    step = 1e-6
    for layer, part in enumerate((net[:1], net[:2], net)):
        expected = torch.zeros(12, 12, dtype=torch.float64)
        with torch.no_grad():
            for row in range(12):
                for column in range(12):
                    for colour in range(3):
                        moved = torch.zeros_like(x)
                        moved[:, colour, row, column] = step
                        change = part(x + moved)[:, :, 3, 3] - part(x - moved)[:, :, 3, 3]
                        expected[row, column] += (change / (2 * step)).abs().mean() / 3
        np.testing.assert_allclose(result.gradient[layer], expected, atol=1e-6)
    assert (result.gradient_se >= 0).all()


def test_signed_is_the_mean_before_the_absolute_value():
    net, x = small_net(), torch.randn(1, 3, 12, 12, dtype=torch.float64)
    result = receptive_field.measure(net, x, layers=["2"], signed=True)
    wanted = torch.autograd.functional.jacobian(lambda x: net(x)[0, :, 3, 3], x)
    np.testing.assert_allclose(
        result.gradient[0], wanted[:, 0].mean(0).abs().mean(0), rtol=1e-5, atol=1e-8
    )
    assert "Signed" in result._caption()


def test_batched_products_equal_single_ones():
    net, x = small_net(), torch.randn(3, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    centre = net(x.clone())[:, :, 3, 3]
    one = list(rows_of_jacobian(centre, x, torch.eye(6)))
    batched = list(rows_of_jacobian(centre, x, torch.eye(6), together=4))
    assert len(one) == len(batched) == 6
    torch.testing.assert_close(torch.stack(one), torch.stack(batched))


STAGES = {"conv1": 7, "maxpool": 11, "layer1": 35, "layer2": 91, "layer3": 267, "layer4": 427}


def test_gradient_is_zero_outside_the_theoretical_fields_of_resnet50():
    # Few channels: the field does not depend on them. timm starts the last normalisation of every
    # branch at 0, and would then see through the shortcuts only.
    net = timm.create_model("resnet50", channels=(4, 4, 4, 4), zero_init_last=False).eval()
    assert [len(layer) for layer in (net.layer1, net.layer2, net.layer3, net.layer4)] == [
        3,
        4,
        6,
        3,
    ]
    # At 448 px the centre of every stage has its whole field within the picture.
    x = torch.randn(1, 3, 448, 448)
    result = receptive_field.measure(net, x, layers=list(STAGES), channels=4)
    assert result.layers.tolist() == list(STAGES)
    for layer, size in enumerate(STAGES.values()):
        top, left, bottom, right = result.box[layer].astype(int)
        assert bottom - top + 1 == right - left + 1 == size
        field = result.field(layer).copy()
        assert field[top : bottom + 1, left : right + 1].max() > 0
        field[top : bottom + 1, left : right + 1] = 0
        assert not field.any()


def test_an_untrained_resnet_as_timm_starts_it_sees_through_its_shortcuts_only():
    net = timm.create_model("test_resnet").eval()
    result = receptive_field.measure(net, torch.randn(2, 3, 64, 64), channels=4)
    reached = (result.gradient[0] > 0).any(0).sum()
    top, _, bottom, _ = result.box[0]
    assert 0 < reached < bottom - top + 1


def test_no_theoretical_field_through_attention_or_gates():
    for name, layer in (
        ("test_vit", "blocks.0"),
        ("resnet18", "layer1.0"),
        ("seresnet18", "layer1.0"),
    ):
        net = timm.create_model(name).eval()
        x = torch.randn(2, 3, 160, 160)
        layers = map_layers(name, net, x).choose(layer)
        (box,) = theoretical_fields(net, layers, [(4, 4)], x[:1])
        assert (box is None) == (name != "resnet18")


def vit(**options):
    return timm.create_model("test_vit", img_size=64, **options).eval()


def test_a_patch_embedding_sees_exactly_its_patch():
    result = receptive_field.measure(
        vit(), torch.randn(2, 3, 64, 64), layers=["patch_embed.proj", "patch_embed"], channels=8
    )
    assert len(result.layers) == 2
    for field in result.gradient:
        rows, columns = np.nonzero(field)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (32, 47, 32, 47)
        assert (field > 0).sum() == 16 * 16
    np.testing.assert_array_equal(result.box[0], [32, 32, 47, 47])
    np.testing.assert_allclose(result.centre, 1.0)


def test_without_attention_a_vit_sees_one_patch_at_every_depth():
    net = vit()
    for block in net.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.attn.proj.bias)
    result = receptive_field.measure(net, torch.randn(2, 3, 64, 64), channels=4)
    assert len(result.layers) == 6
    inside = result.gradient[:, 32:48, 32:48]
    assert (inside > 0).all()
    np.testing.assert_allclose(inside.sum((1, 2)), result.gradient.sum((1, 2)), rtol=1e-6)
    assert (result.area90 < 16 * 16 / 64**2).all()


def test_pre_residual_is_the_branch_alone():
    net, x = vit(), torch.randn(2, 3, 64, 64)
    result = receptive_field.measure(net, x, channels="all", layers=["blocks.1"], pre_residual=True)
    assert result.layers.tolist() == [
        "blocks.1 branch 1", "blocks.1 sum 1", "blocks.1 branch 2", "blocks.1 sum 2",
    ]  # fmt: skip
    block = net.blocks[1]
    start = net.blocks[0](net._pos_embed(net.patch_embed(x.requires_grad_())))
    branch = block.attn(block.norm1(start))
    expected = torch.zeros(64, 64)
    for channel in range(64):
        (row,) = torch.autograd.grad(branch[:, 1 + 10, channel].sum(), x, retain_graph=True)
        expected += row.abs().mean((0, 1)) / 64
    np.testing.assert_allclose(result.gradient[0], expected, rtol=1e-3, atol=1e-9)
    assert np.isfinite(result.trends[0, 4])
    assert any("attention alone" in finding.claim for finding in result.findings())


def test_areas_and_centre_cells_by_hand():
    field = torch.zeros(2, 4, 4)
    field[0] = 1.0
    field[1, 2, 2], field[1, 0, 0] = 6.0, 4.0
    torch.testing.assert_close(
        receptive_field.area(field, 0.5), torch.tensor([8 / 16, 1 / 16]).double()
    )
    torch.testing.assert_close(
        receptive_field.area(field, 0.9), torch.tensor([15 / 16, 2 / 16]).double()
    )
    assert receptive_field.area(torch.zeros(1, 4, 4), 0.5).isnan().all()
    share, over = receptive_field.centre_cell(field[1].double(), (2, 2))
    assert share == pytest.approx(0.6) and over == pytest.approx(0.2)


def test_errors_of_maps_keep_three_digits():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)).numpy() * 1e-6
    values[:3] = 0, np.nan, np.inf
    kept = three_digits(values)
    np.testing.assert_allclose(kept, values, rtol=2**-11)
    assert not (kept[3:].view(np.int32) & (2**13 - 1)).any() and (kept[3:] != values[3:]).any()


def test_a_subset_of_channels_estimates_the_mean_and_tells_its_error():
    net, x = vit(), torch.randn(6, 3, 64, 64)
    whole = receptive_field.measure(net, x, layers=["blocks.2"], channels="all")
    part = receptive_field.measure(net, x, layers=["blocks.2"], channels=2)
    distance = abs(part.centre - whole.centre) / np.hypot(part.centre_se, whole.centre_se)
    assert 0 < whole.centre_se[0] < part.centre_se[0] and distance < 3
    assert receptive_field.measure(net, x[:1], layers=["blocks.2"]).area90_se.shape == (1,)


def test_batches_agree_and_parameters_get_back_what_they_had(tensors, tmp_path):
    net = timm.create_model("test_vit", img_size=32)
    net.head.weight.requires_grad_(False)
    asking = [p.requires_grad for p in net.parameters()]
    whole = receptive_field.measure(net, tensors, channels=4, batch_size=20)
    parts = receptive_field.measure(net, tensors, channels=4, batch_size=3)
    np.testing.assert_allclose(whole.gradient, parts.gradient, rtol=1e-4)
    np.testing.assert_allclose(whole.area90_se, parts.area90_se, rtol=1e-3)
    with pytest.raises(VitprobeError, match="no layer 'nothing'"):
        receptive_field.measure(net, tensors, layers=["nothing"])
    assert [p.requires_grad for p in net.parameters()] == asking
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_models_of_several_sizes_and_round_trip(tmp_path):
    torch.manual_seed(0)
    nets = [
        wrap(timm.create_model("test_vit", img_size=32), "vit", input_size=(3, 32, 32)),
        wrap(timm.create_model("test_resnet", zero_init_last=False), "cnn", input_size=(3, 48, 48)),
    ]
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    result = receptive_field.measure(nets, pictures, channels=2)
    assert result.gradient.shape == (10, 48, 48)
    assert np.isnan(result.gradient[:6, 32:]).all() and np.isfinite(result.gradient[6:]).all()
    assert result.field(0).shape == (32, 32)
    result.save(tmp_path / "x")
    again = load_result(tmp_path / "x.npz")
    for name, array in result.arrays().items():
        np.testing.assert_array_equal(getattr(again, name), array)
    assert len(again.findings()) == 3
    figure = again.plot()
    drawn = next(axes for axes in figure.axes if axes.get_title() == "blocks.0").images[0]
    field = result.field(0)
    np.testing.assert_array_equal(drawn.get_array(), field / field.max())
    areas = again.plot(figure.add_subplot())
    np.testing.assert_array_equal(areas.lines[0].get_ydata(), result.area50[:6])


def test_channels_are_spread_over_images_and_each_is_as_likely():
    draw = partial(channels_of_images, groups=4)
    generator = torch.Generator().manual_seed(0)
    # One for each image: all different where there are enough, each equally often where not.
    assert draw(40, 32, 1, generator=generator).unique().numel() == 32
    assert (draw(8, 32, 1, generator=generator).flatten().bincount() == 4).all()
    assert draw(60, 16, 3, generator=generator).unique().numel() == 48
    # Those of a group of images leave no half of the channels out.
    for group in range(4):
        mine = draw(60, 16, 1, generator=generator)[group::4, 0].sort().values
        assert torch.cat([mine.diff(), mine[:1] + 60 - mine[-1:]]).max() <= 30
    # In every image every channel is as likely.
    drawn = torch.stack([draw(5, 3, 1, generator=generator)[:, 0] for _ in range(3000)])
    shares = torch.stack([column.bincount(minlength=5) / 3000 for column in drawn.T])
    torch.testing.assert_close(shares, torch.full((3, 5), 0.2), atol=0.03, rtol=0)


def test_each_image_is_differentiated_in_its_own_channel():
    net, x = small_net(), torch.randn(5, 3, 12, 12, dtype=torch.float64)
    result = receptive_field.measure(net, x, layers=["2"], channels=2, seed=3)
    generator = torch.Generator().manual_seed(3)
    drawn = channels_of_images(6, 5, 2, receptive_field.GROUPS, generator)
    order = open_images(x, None, 3).order
    expected = torch.zeros(12, 12, dtype=torch.float64)
    for position, image in enumerate(order):
        jacobian = torch.autograd.functional.jacobian(lambda x: net(x)[0, :, 3, 3], x[image][None])
        expected += jacobian[drawn[position], 0].abs().mean((0, 1)) / 5
    np.testing.assert_allclose(result.gradient[0], expected, rtol=1e-5, atol=1e-9)


def test_pieces_of_a_batch_as_memory_allows_give_the_same(monkeypatch):
    net, x = vit(), torch.randn(5, 3, 64, 64)
    whole = receptive_field.measure(net, x)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    pieces = []
    forward = type(net).forward
    monkeypatch.setattr(
        type(net), "forward", lambda self, x: (pieces.append(len(x)), forward(self, x))[1]
    )
    again = receptive_field.measure(net, x)
    assert pieces[-5:] == [1] * 5
    np.testing.assert_allclose(whole.gradient, again.gradient, rtol=1e-4, atol=1e-9)


def test_whether_a_field_reaches_the_border():
    field = torch.zeros(28, 28)
    field[12:18, 12:18] = 1
    assert not reaches_border(field, 0.9)
    field[12:18, :] = 1
    assert reaches_border(field, 0.9)
    field[12:18, :3] = field[12:18, -3:] = 0.2  # it fades out before
    assert not reaches_border(field, 0.9)
    assert not reaches_border(torch.zeros(28, 28), 0.9)


def wide_and_narrow(vit_width, cnn_width):
    """A result of two models with one layer each: squares of so many of 28 pixels."""
    gradient = np.zeros((2, 28, 28), dtype=np.float32)
    for field, width in zip(gradient, (vit_width, cnn_width)):
        start = 14 - width // 2
        field[start : start + width, start : start + width] = 1
    areas = 0.9 * np.array([vit_width, cnn_width]) ** 2 / 28**2
    small, none = np.full(2, 1e-3), np.full((2, 4), np.nan)
    trends = np.stack([areas, areas, areas, areas, [np.nan] * 2], axis=1)
    meta = {
        "models": [{"name": "v", "weights": "file"}, {"name": "c", "weights": "file"}],
        "attends": [True, False], "sides": [[28, 28]] * 2, "replicates": 16,
        "channels": 1, "signed": False, "pre_residual": False,
    }  # fmt: skip
    return receptive_field.ReceptiveFieldResult(
        meta, gradient, gradient, areas, small, areas, small, areas, small, none,
        trends, np.full((2, 5), 1e-3), np.array(["a", "b"]), np.array([0, 1]),
    )  # fmt: skip


@pytest.mark.parametrize(
    "widths, verdict, remark",
    [
        ((16, 8), "holds", None),
        ((8, 16), "does not hold", None),
        ((28, 16), "holds", "the wider field reaches the border of the image and is at least so"),
        ((28, 28), "inconclusive", "both fields reach the border of the image, so their widths"),
        ((16, 28), "inconclusive", "the narrower field reaches the border of the image, so their"),
    ],
)
def test_widths_are_not_compared_where_the_border_cuts_them_off(widths, verdict, remark):
    result = wide_and_narrow(*widths)
    (found,) = [f for f in result.findings() if "look farther" in f.claim]
    assert found.verdict == verdict
    assert remark in found.numbers if remark else "border" not in found.numbers
    (grows,) = [f for f in result.findings() if "grows" in f.claim]
    assert grows.verdict == ("inconclusive" if widths[1] == 28 else "does not hold")
    figure = Figure()
    axes = result.plot(figure.add_subplot())
    marks = [c for c in axes.collections if isinstance(c, PathCollection)]
    hollow = sum(len(c.get_offsets()) for c in marks)
    assert hollow == 2 * sum(width == 28 for width in widths)
    assert ("Hollow marks" in result._caption()) == (28 in widths)


def test_areas_of_few_images_are_corrected_and_their_errors_are_the_spread():
    torch.manual_seed(0)
    net, images = vit(), torch.randn(160, 3, 64, 64).cumsum(2).cumsum(3) / 64
    for block in net.blocks:
        block.attn.qkv.weight.data *= 6  # attention that differs between images
    options = {"layers": ["blocks.1", "blocks.5"], "workers": 0}
    few = [
        receptive_field.measure(net, images, num_images=16, batch_size=16, seed=seed, **options)
        for seed in range(20)
    ]
    many = receptive_field.measure(net, images, num_images=160, batch_size=40, **options)
    for name in ("area50", "area90"):
        values, errors = (np.stack([getattr(r, name + e) for r in few]) for e in ("", "_se"))
        bias = np.array([r.meta["bias"][name] for r in few]).mean(0)
        spread, truth = values.std(0, ddof=1), getattr(many, name)
        off = np.hypot(spread / np.sqrt(len(few)), getattr(many, f"{name}_se"))
        ratio = np.sqrt((errors**2).mean(0)) / spread
        np.testing.assert_allclose(ratio, 1, atol=0.25)
        corrected, plain = (abs(mean - truth) for mean in (values.mean(0), values.mean(0) + bias))
        assert (bias < 0).all() and (corrected < 3 * off).all()
        assert (corrected < plain).all() or name == "area50"


def test_errors():
    net = timm.create_model("test_vit", img_size=32)
    with pytest.raises(VitprobeError, match="--channels: expected all or a number above 0"):
        receptive_field.measure(net, torch.randn(2, 3, 32, 32), channels=0)
    with pytest.raises(
        VitprobeError, match="none of these layers of VisionTransformer has a centre"
    ):
        receptive_field.measure(net, torch.randn(2, 3, 32, 32), layers=["head"])


def test_command(tmp_path, capsys):
    arguments = ["--models", "test_vit@random", "--image-size", "32", "--num-images", "2"]
    arguments += ["--channels", "2", "--out", str(tmp_path), "--stem", "s", "--quiet"]
    assert receptive_field.main(arguments) == 0
    out = capsys.readouterr().out
    assert "s.png" in out and "is global by half depth" in out
