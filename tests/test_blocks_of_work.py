"""Work that is cut into blocks gives what it gives at once, whatever their size.

The sizes are read off the package, so that a new one is tested from the day it is added.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import vitprobe
from vitprobe import measure_all
from vitprobe.models.loading import wrap
from vitprobe.statistics.neighbours import nearest, overlap

ROOT = Path(vitprobe.__file__).parent
# How many elements, or bytes, are worked on at a time.
SIZE = re.compile(r"^([A-Z_]*(?:BLOCK|PIECE|BLOCK_BYTES))(?:,.*)? = ", re.MULTILINE)
MEASURED = ["cka", "attention_distance", "attention_rollout", "attention_statistics",
            "head_subsets", "skip_ratio", "localization", "token_norms", "frequency", "neighbours",
            "patch_pca"]  # fmt: skip


def sizes():
    """(module, name) of every size of a block."""
    for path in sorted(ROOT.rglob("*.py")):
        for match in SIZE.finditer(path.read_text(encoding="utf-8")):
            module = ".".join(["vitprobe", *path.relative_to(ROOT).with_suffix("").parts])
            yield module, match[1]


def measured():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=48, num_classes=4, reg_tokens=1)
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight *= 20
    cnn = timm.create_model("test_resnet", num_classes=4)
    models = [wrap(vit.eval(), "vit"), wrap(cnn.eval(), "cnn")]
    images = torch.randn(9, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    options = {"batch_size": 5, "device": "cpu", "k": 3, "null": 5}
    return measure_all(MEASURED, models, images, **options)


def test_blocks_of_one_give_what_large_ones_do(monkeypatch):
    whole = measured()
    found = list(sizes())
    assert len(found) > 4
    for module, name in found:
        monkeypatch.setattr(import_module(module), name, 1)
    for name, result in measured().items():
        for key, array in result.arrays().items():
            expected = whole[name].arrays()[key]
            if array.dtype.kind == "f":
                np.testing.assert_allclose(array, expected, rtol=2e-5, atol=2e-6, err_msg=key)
            else:
                np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("block", [1, 130, 2**22])
def test_no_image_is_its_own_neighbour_in_any_block(monkeypatch, block):
    monkeypatch.setattr("vitprobe.statistics.neighbours.BLOCK", block)
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    found, _ = nearest(features, 5)
    assert not (found == torch.arange(40)[:, None]).any()
    assert overlap(torch.stack([found, found]))[0][0, 1] == 1
