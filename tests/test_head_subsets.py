"""Head subsets: windows, the bilinear shortcut against CKA itself, and wrong models."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from vitprobe import head_subsets
from vitprobe.attention_distance import measure as measure_distance
from vitprobe.errors import VitprobeError
from vitprobe.head_subsets import measure, subset_cka, windows
from vitprobe.models.loading import wrap
from vitprobe.results.result import load_result
from vitprobe.statistics.hsic import cka, gram, hsic
from vitprobe.tracing.attention import map_attention, observe


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_heads=8, embed_dim=64)
    cnn = timm.create_model("test_resnet")
    return [wrap(vit.eval(), "vit"), wrap(cnn.eval(), "cnn")]


def test_windows_are_a_quarter_of_the_heads_wide():
    assert windows(3) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert len(windows(12)) == 10 and windows(12)[0] == slice(0, 3)


def test_subset_cka_is_that_of_the_heads_side_by_side():
    heads, layer = torch.randn(4, 20, 6).double(), torch.randn(20, 9).double()
    sums = hsic(torch.stack([gram(one) for one in [*heads, layer]]))
    subsets = np.array([[0, 2], [3, 1]])
    values = subset_cka(sums, subsets)
    for subset, value in zip(subsets, values[0]):
        together = torch.cat([heads[head] for head in subset], 1)
        assert float(value) == pytest.approx(cka(together, layer), rel=1e-9)


def test_through_models(pair):
    images = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    result = measure(pair, images, batch_size=24)
    assert result.cka.shape == (4, 7) and result.heads.shape == (7, 2)
    distance = measure_distance(pair[0], images, batch_size=24).distance_px[0]
    np.testing.assert_allclose(result.distance_px, distance[result.heads].mean(1), rtol=1e-5)
    assert (np.diff(result.distance_px) >= 0).all()
    outputs, lowest = [], []
    module, cnn = pair[0].module, pair[1].module
    found = map_attention("vit", module, images[:2])
    hook = cnn.layer1[0].register_forward_hook(lambda m, a, out: lowest.append(out))
    with torch.no_grad(), observe(module, found, outputs=lambda i, t: outputs.append(t)):
        module(images)
        cnn(images)
    hook.remove()
    chosen = outputs[0][:, 0, list(result.heads[0])]
    assert result.cka[0, 0] == pytest.approx(cka(chosen, lowest[0]), abs=1e-5)


def test_batches_give_errors_and_a_correlation(pair, tmp_path):
    images = torch.randn(26, 3, 64, 64)
    result = measure(pair, images, batch_size=8)
    # Batches are even: none of two images is left that would be too few.
    assert result.meta["n"] == 26
    assert np.isfinite(result.cka_se).all() and np.isfinite(result.rho).all()
    again = load_result(result.save(tmp_path / "heads")[-1])
    drawn = again.plot().axes[0].lines[0]
    np.testing.assert_array_equal(drawn.get_xdata(), result.distance_px)
    np.testing.assert_array_equal(drawn.get_ydata(), result.cka[0])
    assert len(result.findings()) == 4


def test_wrong_models_get_their_line(pair):
    images = torch.randn(8, 3, 64, 64)
    for models, message in (
        (pair[:1], "not 1 models"),
        ([pair[0], pair[0]], "one with attention and one without|one model with attention"),
        (pair[::-1], "first: vit cnn"),
    ):
        with pytest.raises(VitprobeError, match=message):
            measure(models, images)
    with pytest.raises(VitprobeError, match="at least 4"):
        measure(pair, images, batch_size=2)


def test_command(pictures, tmp_path, capsys):
    code = head_subsets.main(
        ["--models", "test_vit@random", "test_resnet@random", "--images", str(pictures), "--out",
         str(tmp_path), "--quiet", "--image-size", "64"]
    )  # fmt: skip
    assert code == 0
    assert "head_subsets-test_vit-random-test_resnet-random.npz" in capsys.readouterr().out
