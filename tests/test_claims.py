"""Claims are not decided by noise, and say whose weights are random."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitprobe import attention_distance, patch_embedding, position_embedding, skip_ratio, wrap
from vitprobe.results.result import HOLDS
from vitprobe.statistics.grids import axis_gain, decay

DRAWS = 20


def held(findings):
    return [one.claim for one in findings if one.verdict == HOLDS]


@pytest.mark.parametrize(("side", "width"), [(4, 16), (4, 192), (7, 64), (10, 192)])
def test_no_random_table_of_positions_has_a_structure(side, width):
    generator = torch.Generator().manual_seed(0)
    module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16 * side, embed_dim=width, num_heads=1, depth=1
    )
    for _ in range(DRAWS):
        with torch.no_grad():
            module.pos_embed.copy_(torch.randn(module.pos_embed.shape, generator=generator))
        findings = position_embedding.measure(wrap(module, "made")).findings()
        assert len(findings) == 2 and not held(findings)


def similarities(draws, side, width):
    generator = np.random.default_rng(0)
    for _ in range(draws):
        table = generator.normal(size=(side * side, width))
        table /= np.linalg.norm(table, axis=1, keepdims=True)
        yield (table @ table.T).reshape((side,) * 4)


@pytest.mark.parametrize("statistic", [decay, axis_gain])
@pytest.mark.parametrize(("side", "width"), [(3, 64), (6, 16)])
def test_errors_without_structure_are_what_random_tables_vary_by(statistic, side, width):
    found = np.array([statistic(values) for values in similarities(300, side, width)])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.15)


class Stem(nn.Module):
    def __init__(self, filters, side, generator):
        super().__init__()
        self.stem = nn.Conv2d(3, filters, side, side)
        with torch.no_grad():
            self.stem.weight.copy_(torch.randn(self.stem.weight.shape, generator=generator))
        self.head = nn.Conv2d(filters, 4, 1)

    def forward(self, x):
        return self.head(self.stem(x)).mean((2, 3))


@pytest.mark.parametrize(("filters", "side"), [(8, 3), (32, 3), (64, 7), (192, 16)])
def test_no_random_filters_are_smooth(filters, side):
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        # Nothing tells that these are random: the claim is the one about trained weights.
        result = patch_embedding.measure(wrap(Stem(filters, side, generator), "made"))
        findings = result.findings()
        assert len(findings) == 1 and not held(findings)


def test_untrained_networks_are_named_so_under_any_name(tensors):
    models = ["test_vit@random", "test_resnet@random"]
    result = skip_ratio.measure(models, tensors, image_size=32, names=["A", "B"])
    assert len(result.findings()) == 2
    assert "in A (untrained) the class token" in result.findings()[0].claim
    assert "of A (untrained) are above those of B (untrained)" in result.findings()[1].claim
    assert result.models == ["A", "B"]
    result = skip_ratio.measure(
        models, tensors, image_size=32, names=["random crops", "random crops of an untrained net"]
    )
    claims = " ".join(one.claim for one in result.findings())
    assert claims.count("(untrained)") == claims.count("random crops (untrained)") == 2
    # By default the name itself says it, once.
    claims = [one.claim for one in skip_ratio.measure(models[0], tensors).findings()]
    assert all("test_vit (random)" in claim and "untrained" not in claim for claim in claims)
    stem = patch_embedding.measure("test_vit@random", names=["a stem"], image_size=64)
    assert [one.claim.count("untrained") for one in stem.findings()] == [1]
    table = position_embedding.measure("test_vit@random", names=["a table"], image_size=64)
    assert all("(untrained)" in one.claim for one in table.findings())


def test_trained_networks_are_named_as_they_are(tensors):
    module = timm.create_model("test_vit", img_size=32).eval()
    claims = [
        one.claim for one in attention_distance.measure(wrap(module, "A"), tensors).findings()
    ]
    assert claims and not any("untrained" in claim for claim in claims)
