"""Entropy and mutual information of attention: reference values, and slow float64 sums."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from vitprobe.attention_statistics import measure
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.papers import park2023
from vitprobe.results.result import FAILS, HOLDS, load_result
from vitprobe.statistics.attention_information import AttentionInformation, mixed


def information(rows, queries=None, keys=None, block=None):
    """Entropy and NMI of one head's rows (queries, keys), given in blocks of queries."""
    rows = torch.as_tensor(rows)[None, None, None]
    here = [torch.ones(1, n, dtype=torch.bool) if mask is None else torch.tensor([mask])
            for mask, n in ((queries, rows.shape[3]), (keys, rows.shape[4]))]  # fmt: skip
    found = AttentionInformation(*here)
    found.begin(1, 1, rows)
    for start in range(0, rows.shape[3], block or rows.shape[3]):
        part = slice(start, min(start + (block or rows.shape[3]), rows.shape[3]))
        found.add(rows[:, :, :, part], slice(0, 1), part)
    return float(found.entropy()), float(found.nmi())


class TestReferenceValues:
    count = 196

    def mixture(self, epsilon):
        uniform = torch.full((self.count, self.count), 1 / self.count, dtype=torch.float64)
        return epsilon * torch.eye(self.count) + (1 - epsilon) * uniform

    def test_uniform_attention(self):
        entropy, nmi = information(self.mixture(0.0))
        assert entropy == pytest.approx(1) and nmi == pytest.approx(0, abs=1e-12)

    def test_each_query_its_own_key(self):
        entropy, nmi = information(self.mixture(1.0))
        assert entropy == 0 and nmi == pytest.approx(1)

    @pytest.mark.parametrize(("epsilon", "expected"), [(0.1, 0.04198), (0.5, 0.37171)])
    def test_identity_and_uniform_mixed(self, epsilon, expected):
        for dtype in (torch.float64, torch.float32):
            entropy, nmi = information(self.mixture(epsilon).to(dtype), block=60)
            assert nmi == pytest.approx(expected, abs=5e-6)
            assert entropy == pytest.approx(1 - expected, abs=5e-6)
        assert mixed(epsilon, self.count) == pytest.approx(expected, abs=5e-6)

    def test_all_queries_alike_tell_nothing_however_sharp(self):
        rows = torch.softmax(5 * torch.randn(30, dtype=torch.float64), -1).expand(20, 30)
        entropy, nmi = information(rows)
        assert nmi == pytest.approx(0, abs=1e-12) and 0 < entropy < 0.9
        assert information(torch.eye(30)[3].expand(20, 30)) == (0, 0)


def slow(rows, queries, keys):
    """Entropy and NMI by loops over plain sums, in float64."""
    rows = np.asarray(rows, np.float64)[queries][:, keys]
    rows = rows / rows.sum(1, keepdims=True)
    entropies = [-sum(a * np.log(a) for a in row if a > 0) for row in rows]
    joint, of_keys = rows / len(rows), rows.mean(0)
    shared = sum(
        joint[q, k] * np.log(joint[q, k] / (of_keys[k] / len(rows)))
        for q in range(len(rows))
        for k in range(rows.shape[1])
        if joint[q, k] > 0
    )
    of_key = -sum(p * np.log(p) for p in of_keys if p > 0)
    return np.mean(entropies) / np.log(rows.shape[1]), shared / np.sqrt(np.log(len(rows)) * of_key)


def test_rows_and_keys_that_do_not_count_are_dropped_before_the_rest_sums_to_one():
    rows = torch.softmax(3 * torch.randn(9, 12, dtype=torch.float64), -1)
    queries, keys = [True] * 9, [True] * 12
    queries[2], keys[0], keys[7] = False, False, False
    expected = slow(rows, queries, keys)
    assert information(rows, queries, keys, block=4) == pytest.approx(expected, abs=1e-12)
    scaled = rows.clone()
    scaled[:, 0] *= 0.5  # what is dropped does not matter
    assert information(scaled, queries, keys) == pytest.approx(expected, abs=1e-12)


def test_permuted_keys_change_nothing_and_sharper_rows_do():
    rows = torch.softmax(torch.randn(9, 12, dtype=torch.float64), -1)
    one = information(rows)
    assert information(rows[:, torch.randperm(12)]) == pytest.approx(one)
    assert information(rows[torch.randperm(9)]) == pytest.approx(one)
    sharper = rows**3 / (rows**3).sum(-1, keepdim=True)
    assert information(sharper)[0] < one[0] - 0.05 and information(sharper)[1] > one[1] + 0.01


def vit(size=(32, 32), seed=0, **options):
    torch.manual_seed(seed)
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=8, depth=2, num_heads=3, embed_dim=12,
        num_classes=2, **options,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for block in module.blocks:
            block.attn.qkv.weight.mul_(40)
    return module


def attention_of(module, block, images):
    """(n, heads, tokens, tokens) float64 probabilities, computed from the weights by hand."""
    module, found = module.double(), []
    attn = module.blocks[block].attn
    handle = attn.register_forward_pre_hook(lambda _m, args: found.append(args[0]))
    with torch.no_grad():
        module(images.double())
        n, tokens, width = found[0].shape
        qkv = attn.qkv(found[0]).reshape(n, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].mT / (width // attn.num_heads) ** 0.5
    handle.remove()
    module.float()
    return torch.softmax(scores, -1).numpy()


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((16, 40), {"reg_tokens": 2}),
        ((32, 32), {}),
        ((40, 16), {"class_token": False, "global_pool": "avg"}),
        ((32, 32), {"class_token": False, "global_pool": "avg", "reg_tokens": 2}),
    ],
)
def test_a_vits_heads_one_by_one_in_float64(size, options):
    module = vit(size, **options)
    images = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(1))
    result = measure(wrap(module, "net"), images, batch_size=2)
    prefix = module.num_prefix_tokens
    has_class = options.get("class_token", True)
    registers = options.get("reg_tokens", 0)
    for block in range(2):
        true = attention_of(module, block, images)
        patches = np.arange(true.shape[-1]) >= prefix
        for head in range(3):
            each = np.array([slow(one[head], patches, patches) for one in true])
            mean, error = each.mean(0), each.std(0, ddof=1) / np.sqrt(len(each))
            assert result.entropy[block, head] == pytest.approx(mean[0], abs=2e-6)
            assert result.nmi[block, head] == pytest.approx(mean[1], abs=5e-6)
            assert result.entropy_se[block, head] == pytest.approx(error[0], abs=2e-6)
            assert result.nmi_se[block, head] == pytest.approx(error[1], abs=5e-6)
            given = true[:, head, prefix:].mean((0, 1))
            if has_class:
                assert result.class_mass[block, head] == pytest.approx(given[0], abs=1e-6)
            if registers:
                others = given[has_class:prefix].sum()
                assert result.register_mass[block, head] == pytest.approx(others, abs=1e-6)
    assert np.isnan(result.class_mass).all() == (not has_class)
    assert np.isnan(result.register_mass).all() == (not registers)


def test_windows_are_groups_of_their_own():
    module = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(2,), num_heads=(1,),
        embed_dim=12, num_classes=2,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for block in module.layers[0].blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
            block.attn.relative_position_bias_table.zero_()
    result = measure(wrap(module, "swin"), torch.randn(2, 3, 32, 32))
    # Uniform over the 16 patches of a window; shifted, those of other regions are masked out.
    assert result.entropy[0, 0] == pytest.approx(1) and result.nmi[0, 0] == pytest.approx(
        0, abs=1e-6
    )
    # Of 4 windows one is whole, two are halves, one is in quarters.
    regions = np.array([1, 2, 2, 4])
    assert result.entropy[1, 0] == pytest.approx(np.mean(np.log(16 / regions) / np.log(16)))
    nmi = np.log(regions) / np.log(16)
    assert result.nmi[1, 0] == pytest.approx(nmi.mean(), abs=1e-6)
    assert np.isnan(result.class_mass).all() and np.isnan(result.register_mass).all()


def test_models_with_other_numbers_of_heads_and_layers_in_one_result(tmp_path):
    one = vit()
    other = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, depth=1, num_heads=2, embed_dim=8,
        num_classes=2,
    ).eval()  # fmt: skip
    images = torch.randn(4, 3, 32, 32)
    result = measure([wrap(one, "a"), wrap(other, "b")], images)
    assert result.entropy.shape == (3, 3) and np.isnan(result.entropy[2, 2])
    assert np.isfinite(result.entropy[2, :2]).all()
    ax = result.plot(result.figure().subplots())
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), np.nanmean(result.nmi[2:], 1))
    result.save(tmp_path / "x")
    load_result(tmp_path / "x.npz").to_csv(tmp_path / "x.csv")


def test_a_network_without_attention_is_told_so():
    with pytest.raises(VitprobeError, match="no attention between places"):
        measure("test_resnet@random", torch.randn(2, 3, 32, 32), image_size=32)


def test_attention_that_is_not_finite_is_named():
    module = vit()
    module.blocks[1].attn.fused_attn = False
    with torch.no_grad():
        module.blocks[1].attn.qkv.weight[0, 0] = float("nan")
    with pytest.raises(VitprobeError, match=r"blocks\.1\.attn.* of net is not finite"):
        measure(wrap(module, "net"), torch.randn(2, 3, 32, 32))


class TestFindings:
    def result(self, names, heights):
        images = torch.randn(6, 3, 32, 32)
        result = measure([wrap(vit(), name) for name in names], images)
        for model, (name, height) in enumerate(zip(names, heights)):
            result.meta["models"][model]["timm_name"] = f"vit_base_patch16_224.{name}"
            result.nmi[result.rows_of(model)] = np.array(height)[:, None]
        return result

    def test_contrastive_beside_masked(self):
        falls, below = self.result(["dino", "mae"], [(0.5, 0.1), (0.5, 0.4)]).findings()
        assert falls.verdict == HOLDS and below.verdict == HOLDS
        falls, below = self.result(["dino", "mae"], [(0.1, 0.5), (0.5, 0.2)]).findings()
        assert falls.verdict == FAILS and below.verdict == FAILS

    def test_nothing_where_the_training_is_not_known(self):
        result = self.result(["net"], [(0.5, 0.1)])
        assert not result.findings()
        result = self.result(["dino"], [(0.5, 0.1)])
        result.meta["models"][0]["weights"] = "random, seed 0"
        assert not park2023.findings(result)
