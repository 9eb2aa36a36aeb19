"""Attention written in other ways: read with the right numbers, or told to be unreadable."""

import pytest
import torch
from test_attention import Attending, collected, mapped, softmaxed
from torch import nn
from torch.nn import functional as F

from vitprobe.errors import VitprobeError


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_flexible_attention_with_changed_and_hidden_scores():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    near = flex.create_block_mask(
        lambda b, h, i, j: (i - j).abs() < 3, None, None, 6, 6, device="cpu"
    )

    def how(q, k, v):
        change = lambda s, b, h, i, j: s - 0.3 * h * (i - j).abs()  # noqa: E731
        return flex.flex_attention(q, k, v, score_mod=change, block_mask=near, scale=1.0)

    module, images = Attending(how).eval(), torch.randn(3, 3, 8, 12)
    (block,) = collected(module, mapped(module, 8, 12), images)
    with torch.no_grad():
        x = module.patch(images).flatten(2).mT
        q, k, _ = module.qkv(x).reshape(3, 6, 3, 2, -1).permute(2, 0, 3, 1, 4)
    apart = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    scores = q @ k.mT - 0.3 * torch.arange(2)[:, None, None] * apart
    expected = scores.masked_fill(apart >= 3, -torch.inf).softmax(-1)
    torch.testing.assert_close(block[:, 0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        lambda q, k, v: (s := (q @ k.mT).exp()) / s.sum(-1, keepdim=True) @ v,
        lambda q, k, v: (softmaxed(q, k)[..., None] * v[..., None, :, :]).sum(-2),
        lambda q, k, v: torch.einsum("bhid,bhjd->bhij", q, k).relu() @ v,
    ],
)
def test_attention_that_cannot_be_read_is_told_as_that(how):
    found = mapped(Attending(how), 8, 12)
    with pytest.raises(VitprobeError, match="attends, if at all, in a way that cannot be read"):
        found.require("distance")


def test_images_that_see_each_other_and_random_passes_are_told():
    mixing = Attending(lambda q, k, v: softmaxed(q, k) @ v.roll(1, 0))
    with pytest.raises(VitprobeError, match="images of a batch see each other in model"):
        mapped(nn.Sequential(mixing, nn.Identity()), 8, 12)
    random = Attending(lambda q, k, v: F.dropout(softmaxed(q, k), 0.3, True) @ v)
    with pytest.raises(VitprobeError, match="other values for the same images each time"):
        mapped(random, 8, 12)
