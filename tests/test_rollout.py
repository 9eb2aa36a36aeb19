"""Attention rollout: rows, known attention, and the loop of the definition."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from matplotlib.text import Text

from vitprobe import attention_rollout
from vitprobe.attention_rollout import Rollout, measure
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.results.result import load_result
from vitprobe.tracing.attention import map_attention, observe


def whole(n):
    return slice(0, n)


def test_identity_attention_gives_the_identity():
    work = Rollout(2, 5, torch.zeros(1))
    for i in range(3):
        work.update(i, torch.eye(5).expand(2, 1, 4, 5, 5), whole(2), whole(5))
    torch.testing.assert_close(work.rollout, torch.eye(5).expand(2, 5, 5))


def test_rows_sum_to_one_and_blocks_make_up_the_whole():
    maps = torch.randn(3, 2, 1, 4, 6, 6).softmax(-1)
    one, other = Rollout(2, 6, maps), Rollout(2, 6, maps)
    for i, block in enumerate(maps):
        one.update(i, block, whole(2), whole(6))
        for image in range(2):
            for start in (0, 4):
                rows = slice(start, min(start + 4, 6))
                part = block[image : image + 1, :, :, rows]
                other.update(i, part, slice(image, image + 1), rows)
    torch.testing.assert_close(one.rollout.sum(-1), torch.ones(2, 6))
    torch.testing.assert_close(other.rollout, one.rollout)
    expected = torch.eye(6).double()
    for block in maps[:, 0, 0].double():
        joint = block.mean(0) + torch.eye(6)
        expected = joint / joint.sum(-1, keepdim=True) @ expected
    torch.testing.assert_close(one.rollout[0].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("class_token", [True, False])
def test_a_model_gives_the_row_of_its_class_token(class_token):
    options = {} if class_token else {"class_token": False, "global_pool": "avg"}
    module = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=3, **options).eval()
    images = torch.randn(3, 3, 32, 48)
    result = measure(wrap(module, "m"), images, batch_size=2)
    found = map_attention("m", module, images[:2])
    joint = torch.eye(6 + class_token)
    maps = []
    with torch.no_grad(), observe(module, found, lambda i, b, *_: maps.append(b[0, 0].mean(0) / 2)):
        module(images[:1])
    for one in maps:
        joint = (one + torch.eye(len(one)) / 2) @ joint
    row = joint[0, 1:] if class_token else joint.mean(0)
    assert result.rollout.shape == (3, 2, 3)
    order = np.random.default_rng(0).permutation(3)
    at = int(np.flatnonzero(order == 0)[0])
    np.testing.assert_allclose(result.rollout[at].ravel(), row, rtol=1e-5)


def test_several_models_saved_and_loaded(tmp_path):
    models = ["test_vit@random", wrap(timm.create_model("vit_tiny_patch16_224", depth=1), "tiny")]
    result = measure(models, num_images=1)
    assert result.meta["images"]["source"] == "scikit-learn's photographs"
    assert result.pictures.shape == (2, 224, 224, 3) and result.rollout.shape == (2, 14, 14)
    picture, shown = result.of(0)
    assert picture.shape == (160, 160, 3) and shown.shape == (10, 10)
    again = load_result(result.save(tmp_path / "r")[-1])
    np.testing.assert_array_equal(again.plot().axes[1].images[0].get_array(), shown)


def test_a_figure_of_many_pictures_shows_the_first_of_every_model(monkeypatch):
    monkeypatch.setattr(attention_rollout, "MAX_SHOWN", 4)
    models = ["test_vit@random", wrap(timm.create_model("test_vit"), "other")]
    result = measure(models, torch.rand(5, 3, 160, 160), num_images=5)
    assert len(result.rollout) == 10
    figure = result.plot()
    shown = [ax.images[0].get_array() for ax in figure.axes if ax.images][1::3]
    expected = [result.of(index)[1] for index in (0, 1, 5, 6)]
    np.testing.assert_array_equal(shown, expected)
    assert any("The first 2 of 5 pictures" in text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize(
    ("name", "message"), [("test_maxvit", "windows"), ("test_resnet", "has no attention between")]
)
def test_other_layouts_get_their_line(name, message):
    with pytest.raises(VitprobeError, match=message):
        measure(f"{name}@random", torch.randn(1, 3, 64, 64), image_size=64)


def test_command(pictures, tmp_path, capsys):
    arguments = ["--models", "test_vit@random", "--images", str(pictures), "--out", str(tmp_path)]
    assert attention_rollout.main([*arguments, "--quiet", "--image-size", "32"]) == 0
    assert "attention_rollout-test_vit-random.npz" in capsys.readouterr().out
    written = load_result(tmp_path / "attention_rollout-test_vit-random.npz")
    assert len(written.rollout) == 4
