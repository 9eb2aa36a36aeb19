"""Attention distance: the papers' values for known attention, through real timm models."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitprobe import attention_distance
from vitprobe.attention_distance import measure, uniform_distance
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.tracing.attention import map_attention

SHARP = 1e3


def grid(rows, columns, stride):
    y, x = np.mgrid[:rows, :columns] * stride
    return np.stack([x.ravel(), y.ravel()], -1).astype(float)


def between(places):
    return np.linalg.norm(places[:, None] - places[None], axis=-1)[None]


def vit(rows, columns, patch, kind, name="vit_tiny_patch16_224", **options):
    """A ViT of two blocks whose queries and keys are set so that attention is ``kind``.

    The stream is the position table, whose row for a patch is its one-hot code; the first block's
    keys read it, and its queries read it moved by ``kind``.
    """
    tokens = rows * columns
    module = timm.create_model(
        name, img_size=(rows * patch, columns * patch), patch_size=patch, depth=1, num_heads=1,
        embed_dim=tokens + 8, num_classes=0, **options,
    ).eval()  # fmt: skip
    width = tokens + 8
    prefix = module.num_prefix_tokens
    attention = module.blocks[0].attn
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        code = torch.eye(tokens, width)
        table = module.pos_embed[0]
        table[len(table) - tokens :] = code
        module.blocks[0].norm1 = nn.Identity()
        if kind != "uniform":
            onto = torch.zeros(width, width)
            target = torch.arange(tokens)
            if kind == "right":
                edge = target % columns == columns - 1
                target = torch.where(edge, target, target + 1)
            onto[target, torch.arange(tokens)] = 1
            attention.qkv.weight[:width] = SHARP * onto
            attention.qkv.weight[width : 2 * width] = torch.eye(width) * width**0.5
    return module, prefix


def distance(module, rows, columns, patch, **options):
    images = torch.randn(3, 3, rows * patch, columns * patch)
    return measure(wrap(module, "model"), images, batch_size=2, **options).distance_px[0, 0]


class TestReferenceValues:
    @pytest.mark.parametrize(
        ("side", "patch", "expected"), [(14, 16, 116.492), (7, 32, 115.503), (16, 14, 116.565)]
    )
    def test_uniform(self, side, patch, expected):
        assert uniform_distance(between(grid(side, side, patch))) == pytest.approx(
            expected, abs=5e-4
        )

    def test_uniform_of_the_papers_grid_through_a_model(self):
        module, _ = vit(14, 14, 16, "uniform", class_token=False, global_pool="avg")
        assert distance(module, 14, 14, 16) == pytest.approx(116.492, abs=1e-3)

    @pytest.mark.parametrize("shape", [(3, 3), (2, 5), (5, 2)])
    @pytest.mark.parametrize("registers", [None, 0, 4])
    def test_known_attention_on_any_grid_with_any_prefix(self, shape, registers):
        rows, columns = shape
        options = (
            {"class_token": False, "global_pool": "avg"}
            if registers is None
            else {"reg_tokens": registers}
        )
        uniform = between(grid(rows, columns, 8)).mean()
        module, prefix = vit(rows, columns, 8, "uniform", **options)
        patches = rows * columns
        # Not renormalised, what goes to class token and registers counts as no distance.
        left = patches / (patches + prefix)
        assert distance(module, rows, columns, 8) == pytest.approx(left * uniform, rel=1e-5)
        whole = distance(module, rows, columns, 8, renormalise=True)
        assert whole == pytest.approx(uniform, rel=1e-5)

        module, _ = vit(rows, columns, 8, "identity", **options)
        assert distance(module, rows, columns, 8) == pytest.approx(0, abs=1e-4)

        module, _ = vit(rows, columns, 8, "right", **options)
        expected = 8 * (columns - 1) / columns
        assert distance(module, rows, columns, 8) == pytest.approx(expected, rel=1e-4)

    def test_swin_with_shift_by_brute_force(self):
        window, side = 4, 8
        module = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=window, depths=(2,),
            num_heads=(1,), embed_dim=12, num_classes=0,
        ).eval()  # fmt: skip
        with torch.no_grad():
            for block in module.layers[0].blocks:
                block.attn.qkv.weight.zero_()
                block.attn.qkv.bias.zero_()
                block.attn.relative_position_bias_table.zero_()
        result = measure(wrap(module, "swin"), torch.randn(2, 3, 32, 32))
        for row, shift in enumerate((0, window // 2)):
            # After the shift, tokens see those of their window that come from the same region.
            total, count = 0.0, 0
            for y in range(side):
                for x in range(side):
                    seen = [
                        np.hypot(y - v, x - u) * 4
                        for v in range(side)
                        for u in range(side)
                        if _window(y, shift, side, window) == _window(v, shift, side, window)
                        and _window(x, shift, side, window) == _window(u, shift, side, window)
                    ]
                    total, count = total + np.mean(seen), count + 1
            assert result.distance_px[row, 0] == pytest.approx(total / count, rel=1e-5)
            assert result.uniform_px[row] == pytest.approx(total / count, rel=1e-6)
        assert result.meta["global"] == [False]


def _window(place, shift, side, window):
    """Which window a row or column falls into; what is rolled over the edge stays apart."""
    moved = (place - shift) % side
    return moved // window, place < shift


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    images = torch.randn(5, 3, 64, 64)
    models = [
        wrap(timm.create_model(name, img_size=64).eval(), name)
        for name in ("test_vit", "test_coatnet")
    ]
    return measure(models, images, batch_size=2)


class TestResult:
    def test_shapes_and_padding(self, result):
        assert result.distance_px.shape == result.distance_se.shape == (9, 3)
        heads = np.isfinite(result.distance_px).sum(1)
        assert heads.tolist() == [2] * 6 + [2, 3, 3]
        np.testing.assert_array_equal(result.model_of_layer, [0] * 6 + [1] * 3)
        assert str(result.layers[0]) == "blocks.0.attn"

    def test_standard_error_is_over_images(self):
        module = timm.create_model("test_vit", img_size=64).eval()
        images = torch.randn(6, 3, 64, 64)
        together = measure(wrap(module, "m"), images, batch_size=4)
        alone = np.stack(
            [measure(wrap(module, "m"), images[i : i + 1]).distance_px for i in range(6)]
        )
        np.testing.assert_allclose(together.distance_px, alone.mean(0), rtol=1e-5)
        np.testing.assert_allclose(
            together.distance_se, alone.std(0, ddof=1) / 6**0.5, rtol=1e-2, atol=1e-5
        )

    def test_the_drawn_points_are_the_data(self, result):
        figure = result.plot()
        left, right = figure.axes[:2]
        drawn = np.concatenate([line.get_ydata() for line in right.lines[:1]])
        np.testing.assert_array_equal(drawn, result.distance_px[:6].ravel())
        np.testing.assert_array_equal(left.lines[0].get_ydata(), np.sort(result.distance_px[0, :2]))

    def test_saved_and_loaded(self, result, tmp_path):
        paths = result.save(tmp_path / "distance")
        again = load_result(paths[-1])
        np.testing.assert_array_equal(again.distance_px, result.distance_px)
        assert again.plot() is not None
        assert [str(f) for f in again.findings()] == [str(f) for f in result.findings()]

    def test_findings_on_made_up_distances(self, result):
        local = np.tile([5.0, 95.0, np.nan], (4, 1))
        meta = {**result.meta, "models": result.meta["models"][:1], "global": [True]}
        made = attention_distance.AttentionDistanceResult(
            meta,
            local,
            np.ones((4, 3)),
            np.full(4, 100.0),
            np.array(list("abcd")),
            np.zeros(4, int),
        )
        assert [finding.verdict for finding in made.findings()] == [HOLDS, FAILS]
        # Two heads of 5 and two of 95 px in the highest blocks: the median is between them.
        assert "median head 0.500 ± 0.010" in made.findings()[1].numbers
        all_near = attention_distance.AttentionDistanceResult(
            meta, local / 100, np.ones((4, 3)), np.full(4, 100.0), made.layers, made.model_of_layer
        )
        assert [finding.verdict for finding in all_near.findings()] == [FAILS, FAILS]

    def test_a_cnn_gets_its_line(self):
        with pytest.raises(VitprobeError, match=r"test_resnet \(random\) has no attention"):
            measure("test_resnet@random", torch.randn(2, 3, 64, 64))

    def test_attention_that_is_not_finite(self):
        module = timm.create_model("test_vit", img_size=64).eval()
        found = map_attention("m", module, torch.randn(2, 3, 64, 64))
        images = torch.randn(4, 3, 64, 64)
        images[3] = torch.nan
        assert found.layers
        with pytest.raises(VitprobeError, match=r"blocks\.0\.attn of m is not finite"):
            measure(wrap(module, "m"), images, batch_size=4)

    def test_command(self, pictures, tmp_path, capsys):
        code = attention_distance.main(
            ["--models", "test_vit@random", "--images", str(pictures), "--renormalise", "--out",
             str(tmp_path / "out"), "--quiet", "--image-size", "64"]
        )  # fmt: skip
        assert code == 0
        out = capsys.readouterr().out
        assert "attention_distance-test_vit-random.npz" in out and "Fig. 3" in out
