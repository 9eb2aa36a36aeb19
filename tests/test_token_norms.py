"""Token norms: outliers put in by hand, against float64 norms of the same tensors."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import Block

from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.statistics import log_histogram
from vitprobe.token_norms import measure


class Added(Block):
    """A block that also adds a fixed vector to some of its tokens."""

    def forward(self, x, **options):
        return super().forward(x, **options) + self.extra


def vit(size=(32, 32), at=(), by=100.0, since=1, depth=3, seed=0, **options):
    """A small ViT whose stream gets a long vector at some patches, from a block on."""
    torch.manual_seed(seed)
    options = {"class_token": True, **options}
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=8, depth=depth, num_heads=2,
        embed_dim=16, num_classes=3, **options,
    ).eval()  # fmt: skip
    tokens = module.patch_embed.num_patches + module.num_prefix_tokens
    extra = torch.zeros(tokens, 16)
    extra[[module.num_prefix_tokens + k for k in at], 0] = by
    module.blocks[since].__class__ = Added
    module.blocks[since].register_buffer("extra", extra)
    return module


def slow_norms(module, name, images):
    """(n, tokens) float64 norms of a module's output, by hook and by hand."""
    module, found = module.double(), []
    handle = module.get_submodule(name).register_forward_hook(
        lambda _m, _a, output: found.append(output)
    )
    with torch.no_grad():
        module(images.double())
    handle.remove()
    module.float()
    return (found[0] ** 2).sum(-1).sqrt().numpy()


@pytest.fixture
def images():
    return torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((32, 32), {}),
        ((16, 48), {"reg_tokens": 2}),
        ((48, 16), {"class_token": False, "global_pool": "avg"}),
        ((32, 32), {"class_token": False, "global_pool": "avg", "reg_tokens": 3}),
    ],
)
def test_outliers_put_in_by_hand_are_those_that_are_found(size, options):
    images = torch.randn(10, 3, *size, generator=torch.Generator().manual_seed(1))
    at = (1, 5)
    module = vit(size, at, **options)
    prefix, patches = module.num_prefix_tokens, module.patch_embed.num_patches
    result = measure(wrap(module, "net"), images, batch_size=4)
    rows, columns = size[0] // 8, size[1] // 8
    assert result.mean_map.shape == (3, rows, columns)
    for row, name in enumerate(result.layers):
        true = slow_norms(module, name, images)
        spatial, others = true[:, prefix:], true[:, :prefix]
        np.testing.assert_allclose(result.norm_max[row], spatial.max(), rtol=1e-5)
        np.testing.assert_allclose(
            result.mean_map[row].ravel(), spatial.mean(0), rtol=1e-5
        )  # row by row
        for quantile, found in ((0.5, result.norm_median), (0.99, result.norm_p99)):
            np.testing.assert_allclose(found[row], np.quantile(spatial, quantile), rtol=0.011)
        above = (spatial > 5 * np.median(spatial)).mean()
        assert above == pytest.approx(len(at) / patches if row else 0)
        assert result.outlier_share[row] == pytest.approx(above, abs=1e-12)
        np.testing.assert_allclose(result.prefix_norm[row], others.mean(0), rtol=1e-5)
        np.testing.assert_allclose(
            result.prefix_norm_se[row], others.std(0, ddof=1) / np.sqrt(10), rtol=1e-3
        )
        assert result.histogram[row].sum() == spatial.size
        exact, _ = np.histogram(spatial, result.edges)
        # What rounding moves over an edge is in the bin beside it.
        assert np.abs(np.cumsum(result.histogram[row]) - np.cumsum(exact)).max() <= 1
    kinds = result.prefix_kind[-1].tolist()
    has_class = options.get("class_token", True)
    registers = options.get("reg_tokens", 0)
    assert kinds == ["class token"] * has_class + ["register"] * registers


def test_the_first_images_are_shown_with_their_norms(images):
    module = vit(at=(3,))
    result = measure(wrap(module, "net"), images, batch_size=3)
    assert result.last_map.shape == (1, 4, 4, 4) and result.pictures.shape == (4, 32, 32, 3)
    order = np.random.default_rng(0).permutation(10)[:4]
    true = slow_norms(module, "blocks.2", images[order])[:, 1:]
    np.testing.assert_allclose(result.last_map[0].reshape(4, -1), true, rtol=1e-5)


def test_locations_of_a_cnn_beside_tokens_each_on_its_own_grid(images):
    cnn = timm.create_model("resnet10t", num_classes=2).eval()
    result = measure([wrap(vit(), "vit"), wrap(cnn, "cnn")], images, batch_size=5)
    rows = result.rows_of("cnn")
    assert np.isnan(result.prefix_norm[rows]).all() and set(result.prefix_kind[rows].flat) == {""}
    for row in rows:
        found = []
        handle = cnn.get_submodule(result.layers[row]).register_forward_hook(
            lambda _m, _a, output: found.append(output)  # noqa: B023
        )
        with torch.no_grad():
            cnn(images)
        handle.remove()
        true = found[0].double().norm(dim=1)
        high, wide = true.shape[1:]
        np.testing.assert_allclose(result.mean_map[row, :high, :wide], true.mean(0), rtol=1e-4)
        assert np.isnan(result.mean_map[row, high:]).all()
        assert np.isfinite(result.mean_map[row]).sum() == high * wide


def test_norms_are_the_same_in_another_basis_and_order_but_not_at_another_scale(images):
    """Turning every layer's output is not possible in a network; turning a vector is."""
    vectors = torch.randn(6, 9, 12, dtype=torch.float64)
    turned, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    from vitprobe.statistics.norms import norms

    torch.testing.assert_close(norms(vectors @ turned), norms(vectors))
    one, other = (
        measure(wrap(vit(at=(2,)), "net"), x, batch_size=5) for x in (images, images.flip(0))
    )
    np.testing.assert_allclose(one.norm_median, other.norm_median, rtol=1e-6)
    np.testing.assert_allclose(one.outlier_share, other.outlier_share)
    scaled = vit(at=(2,))
    with torch.no_grad():
        scaled.blocks[1].extra *= 3
    more = measure(wrap(scaled, "net"), images, batch_size=5)
    assert more.norm_max[1] > 2.5 * one.norm_max[1]


def test_twice_the_threshold_finds_no_more_outliers(images):
    module = wrap(vit(at=(0, 7), by=40.0), "net")
    few = measure(module, images, times=1000.0).outlier_share
    assert not few.any()
    with pytest.raises(VitprobeError, match=r"--times must be above 0, not -1"):
        measure(module, images, times=-1.0)


def test_a_layer_that_is_not_finite_is_named(images):
    module = vit(at=(0,), by=float("nan"))
    with pytest.raises(VitprobeError, match=r"blocks\.1 of net is not finite"):
        measure(wrap(module, "net"), images)


def test_quantiles_are_numpys_to_within_a_bin():
    values = torch.from_numpy(np.random.default_rng(0).lognormal(2, 1, 5001))
    counts, sums = log_histogram.counts_and_sums(values)
    means = log_histogram.means_of_bins(counts, sums)
    for share in (0, 0.01, 0.5, 0.99, 1):
        found = float(log_histogram.quantile(counts, means, share))
        assert found == pytest.approx(np.quantile(values, share), rel=0.011)
    same, total = log_histogram.counts_and_sums(torch.full((6,), 7.25))
    means = log_histogram.means_of_bins(same, total)
    assert float(log_histogram.quantile(same, means, 0.5)) == pytest.approx(7.25)
    two, total = log_histogram.counts_and_sums(torch.tensor([1.0, 3.0]))
    means = log_histogram.means_of_bins(two, total)
    assert float(log_histogram.quantile(two, means, 0.5)) == pytest.approx(2.0)


def test_share_above_a_threshold_counts_its_own_bin_in_proportion():
    steps = torch.arange(-20, 21)
    values = torch.exp2(3 + (steps + 0.5) / log_histogram.PER_OCTAVE).double()
    counts, _ = log_histogram.counts_and_sums(values)
    for share, threshold in ((20.5, 0.5), (20.75, 0.25), (20, 1.0), (0, 21.0), (41, -20.0)):
        at = torch.tensor(2.0 ** (3 + threshold / log_histogram.PER_OCTAVE), dtype=torch.float64)
        assert float(log_histogram.share_above(counts, at)) == pytest.approx(share / 41)


def test_counts_in_units_of_their_own_come_back_in_the_unit_of_all():
    assert [log_histogram.octaves(2.0**power) for power in (-6, 0, 4, 14)] == [0] * 4
    assert [log_histogram.octaves(2.0**power) for power in (-80, 60)] == [-84, 56]
    assert [log_histogram.octaves(value) for value in (0.0, np.nan, np.inf)] == [0] * 3
    counts = torch.zeros(3, log_histogram.BINS)
    counts[:, 640] = torch.tensor([1.0, 2.0, 3.0])
    found = log_histogram.coarser(counts, 8, [0, 2, -84])
    assert found.nonzero().tolist() == [[0, 80], [1, 96], [2, 0]]
    assert found.sum(1).tolist() == [1, 2, 3]


class TestFindings:
    def findings(self, **options):
        images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        return measure(wrap(vit(**options), "net"), images, batch_size=4).findings()

    def test_outliers_in_the_last_of_three_blocks_hold(self):
        (one,) = self.findings(at=(4,), since=2)
        assert one.verdict == HOLDS and "6.25" in one.numbers

    def test_none_do_not(self):
        (one,) = self.findings()
        assert one.verdict == FAILS

    def test_outliers_all_the_way_do_not(self):
        (one,) = self.findings(at=(4,), since=0)
        assert one.verdict == FAILS

    @pytest.mark.parametrize(("register", "patch", "verdict"), [
        (80.0, 0.0, HOLDS), (0.0, 0.0, FAILS), (80.0, 80.0, FAILS),
    ])  # fmt: skip
    def test_registers_in_the_outliers_stead(self, register, patch, verdict):
        module = vit(reg_tokens=2, since=2)
        module.blocks[2].extra[1, 0] = register  # behind the class token
        module.blocks[2].extra[6, 0] = patch
        images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        (one,) = measure(wrap(module, "net"), images, batch_size=4).findings()
        assert one.verdict == verdict and "Fig. 7" in one.source

    def test_nothing_is_claimed_of_untrained_networks_or_cnns(self, tensors):
        assert not measure(["test_vit@random", "test_resnet@random"], tensors,
                           image_size=32).findings()  # fmt: skip


def test_the_figure_shows_the_arrays_and_is_drawn_again_from_the_file(images, tmp_path):
    result = measure([wrap(vit(at=(2,)), "a"), wrap(vit(reg_tokens=1), "b")], images)
    ax = result.plot(result.figure().subplots())
    lines = ax.containers
    np.testing.assert_array_equal(lines[0][0].get_ydata(), result.outlier_share[:3])
    result.save(tmp_path / "x")
    again = load_result(tmp_path / "x.npz")
    again.figure()
    again.to_csv(tmp_path / "x.csv")
    assert "\nnorm_median,blocks.0,a," in (tmp_path / "x.csv").read_text()
