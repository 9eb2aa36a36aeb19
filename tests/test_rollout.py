"""Attention rollout: rows, known attention, and the loop of the definition."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from matplotlib.text import Text
from torch import nn

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


class Attention(nn.Module):
    """Attention among patches with class tokens and registers before, amid and behind them."""

    def __init__(self, reads, before=1, amid=2, behind=1):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Conv2d(3, 8, 8, 8)
        self.extra = nn.ParameterList(torch.randn(1, n, 8) for n in (before, amid, behind))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.reads = reads

    def forward(self, x):
        x = self.project(x).flatten(2).mT
        before, amid, behind = (one.expand(len(x), -1, -1) for one in self.extra)
        x = torch.cat([before, x[:, :2], amid, x[:, 2:], behind], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.reads]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.scale = nn.Linear(8, 24), 3.0
        self.maps = []

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        attention = (q @ k.mT * self.scale).softmax(-1)
        self.maps.append(attention)
        return x + attention @ v


# Tokens: 0 before, 1 and 2 patches, 3 and 4 amid, 5 to 8 patches, 9 behind.
PATCHES = [1, 2, 5, 6, 7, 8]


@pytest.mark.parametrize("reads", [0, 4, 9, slice(None), PATCHES, 5])
def test_the_class_token_is_found_wherever_it_is_and_registers_are_never_taken_for_it(reads):
    module = Attention(reads).eval()
    images = torch.randn(2, 3, 16, 24)
    result = measure(wrap(module, "m"), images, num_images=2)
    for block in module.blocks:
        block.maps.clear()
    with torch.no_grad():
        module(images)
    rollout = torch.eye(10)
    for block in module.blocks:
        joint = block.maps[0] + torch.eye(10)
        rollout = joint / joint.sum(-1, keepdim=True) @ rollout
    # No class token: all tokens, the patches, or a patch is what the output reads.
    by_class = reads in (0, 4, 9)
    row = rollout[:, reads] if by_class else rollout[:, PATCHES].mean(1)
    assert result.meta["maps"][0]["class_token"] == (reads if by_class else None)
    order = np.random.default_rng(0).permutation(2)
    found = result.rollout[np.argsort(order)]
    np.testing.assert_allclose(found.reshape(2, -1), row[:, PATCHES], rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 12])
def test_images_of_any_number_of_channels_are_drawn(channels):
    module = timm.create_model("test_vit", img_size=32, in_chans=channels)
    images = torch.rand(1, channels, 32, 32)
    result = measure(wrap(module, "m", transform=lambda image: image), images, num_images=1)
    shown = images[0] if channels >= 3 else images[0].mean(0, keepdim=True).expand(3, -1, -1)
    shown = shown[:3] - shown[:3].min()
    expected = (shown / shown.max()).permute(1, 2, 0)
    np.testing.assert_allclose(result.pictures[0] / 255, expected, atol=1 / 255)
    caption = " ".join(text.get_text() for text in result.plot().findobj(Text))
    caption = " ".join(caption.split())
    assert ("the first three are shown" in caption) == (channels > 3)
    assert ("their mean is shown" in caption) == (channels == 2)


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
    assert any("The first 2 of 5 images" in text.get_text() for text in figure.findobj(Text))


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
