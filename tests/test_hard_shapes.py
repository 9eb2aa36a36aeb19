"""Attention with logits of 300 in networks of many shapes, and of rows that patches get nothing of.

The references start from the queries and keys of the very pass that was measured, in float64, where
probabilities go down to 1e-308; float32 has none below 1e-38.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from vitprobe import attention_distance, attention_statistics, wrap
from vitprobe.errors import VitprobeError
from vitprobe.tracing import attention
from vitprobe.tracing.rounding import among_few

U = 2.0**-24
PATCH, N = 8, 4
# Heads, features of a head, blocks, rows, columns, and what else.
SHAPES = {
    "one head": (1, 8, 2, 4, 4, {}),
    "heads of 80, normalised, registers, oblong": (
        3, 80, 2, 3, 7, {"qk_norm": True, "reg_tokens": 4},
    ),
    "sixteen heads, no class token": (
        16, 8, 1, 6, 2, {"class_token": False, "global_pool": "avg"},
    ),
    "24 blocks": (3, 8, 24, 3, 3, {}),
}  # fmt: skip


class Hard:
    """A ViT whose logits reach a size, with the queries and keys of its passes."""

    def __init__(self, heads, width, depth, rows, columns, more, logits=300):
        torch.manual_seed(0)
        self.size, self.scale = (rows, columns), width**-0.5
        self.net = VisionTransformer(
            img_size=(PATCH * rows, PATCH * columns), patch_size=PATCH, embed_dim=heads * width,
            depth=depth, num_heads=heads, num_classes=3, **more,
        ).eval()  # fmt: skip
        self.images = torch.randn(N, 3, PATCH * rows, PATCH * columns)
        self.before = self.net.num_prefix_tokens
        self.seen = [{"q_norm": [], "k_norm": []} for _ in range(depth)]
        for block, seen in zip(self.net.blocks, self.seen):
            for name, kept in seen.items():
                getattr(block.attn, name).register_forward_hook(
                    lambda m, given, out, kept=kept: kept.append(out.detach().double())
                )
        with torch.no_grad():
            torch.nn.init.normal_(self.net.pos_embed)
            for i, block in enumerate(self.net.blocks):
                block.attn.qkv.weight *= 40
                self.net(self.images)
                factor = (logits / float(self._scores(i).abs().max())) ** 0.5
                if "qk_norm" in more:
                    block.attn.q_norm.weight *= factor
                    block.attn.k_norm.weight *= factor
                else:
                    block.attn.qkv.weight[: 2 * heads * width] *= factor

    def fuse(self, fused):
        for block in self.net.blocks:
            block.attn.fused_attn = fused

    def _scores(self, block):
        query, key = (kept[-1] for kept in self.seen[block].values())
        return self.scale * query @ key.mT

    def maps(self, block):
        """(images, heads, queries, keys) of patches of the last pass, and how far each is off."""
        query, key = (kept[-1] for kept in self.seen[block].values())
        maps = self._scores(block).softmax(-1)
        off = maps * (8 * U * self.scale * (query.abs() @ key.abs().mT) + 64 * U)
        return tuple(one[..., self.before :, self.before :] for one in (maps, off))

    def pixels(self):
        at = PATCH * np.indices(self.size).reshape(2, -1).T
        return torch.tensor([[math.dist(a, b) for b in at] for a in at]).double()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_distances_in_networks_of_many_shapes(shape, fused):
    made = Hard(*SHAPES[shape])
    made.fuse(fused)
    result = attention_distance.measure(wrap(made.net), made.images, batch_size=N, quiet=True)
    assert len(result.layers) == len(made.net.blocks)
    for block in range(len(result.layers)):
        maps, off = made.maps(block)
        assert maps.max() > 0.999
        each = (maps * made.pixels()).sum(-1).mean((0, 2))
        allowed = 2 * (off * made.pixels()).sum(-1).mean((0, 2)) + 64 * U * each
        assert (abs(result.distance_px[block] - each.numpy()) <= allowed.numpy()).all()


WRONG = {
    "another scale": lambda q, k, m, s: attention_joined(q, k, m, 1.01 * s),
    "heads in another order": lambda q, k, m, s: attention_joined(q.roll(1, 2), k.roll(1, 2), m, s),
    "queries for keys": lambda q, k, m, s: attention_joined(k, q, m, s),
    "a key hidden": lambda q, k, m, s: attention_joined(q, k, torch.arange(k.shape[-2]) != 5, s),
    "two rows exchanged": lambda q, k, m, s: attention_joined(q, k, m, s)[..., ORDER, :],
    "keys moved by one": lambda q, k, m, s: attention_joined(q, k, m, s).roll(1, -1),
    "a little sharper": lambda q, k, m, s: sharper(attention_joined(q, k, m, s)),
}
attention_joined = attention.joined
ORDER = [0, 2, 1, *range(3, 17)]


def sharper(rows):
    rows = rows**1.001
    return rows / rows.sum(-1, keepdim=True)


@pytest.mark.parametrize("logits", [1, 300])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_no_rounding(wrong, logits, monkeypatch):
    made = Hard(4, 8, 2, 4, 4, {}, logits)
    made.fuse(True)
    monkeypatch.setattr(attention, "joined", WRONG[wrong])
    with pytest.raises(VitprobeError, match="does not give what the layer put out"):
        attention_distance.measure(wrap(made.net), made.images, batch_size=N, quiet=True)


def all_to_the_class_token():
    """Patches are given e^-200 of each row, in shares that their own scores decide."""
    made = Hard(2, 16, 1, 4, 4, {}, 3)
    with torch.no_grad():
        block = made.net.blocks[0].attn
        # One feature of every query and key: 1, and of the class token's key far above.
        made.net.pos_embed[..., 31] = 0
        made.net.cls_token[..., 31] = 30
        made.net.patch_embed.proj.weight[31] = made.net.patch_embed.proj.bias[31] = 0
        for head in range(2):
            query, key = 16 * head, 32 + 16 * head
            block.qkv.weight[[query, key]] = 0
            block.qkv.bias[query] = 40
            block.qkv.weight[key, 31] = 4
    return made


@pytest.mark.parametrize("blocks", [None, 40])
def test_rows_that_give_next_to_nothing_to_patches(blocks, monkeypatch):
    made = all_to_the_class_token()
    made.fuse(True)
    if blocks:
        monkeypatch.setattr(attention, "_CPU_BLOCK", blocks)
    options = {"batch_size": N, "quiet": True}
    result = attention_distance.measure(wrap(made.net), made.images, renormalise=True, **options)
    maps, _ = made.maps(0)
    mass = maps.sum(-1, keepdim=True)
    assert 0 < float(mass.max()) < 1e-45
    rows = maps / mass
    each = (rows * made.pixels()).sum(-1).mean((0, 2))
    np.testing.assert_allclose(result.distance_px[0], each, rtol=1e-4)
    told = attention_statistics.measure(wrap(made.net), made.images, **options)
    entropy = -(rows * rows.log()).sum(-1).mean((0, 2)) / math.log(16)
    np.testing.assert_allclose(told.entropy[0], entropy, rtol=1e-4)
    np.testing.assert_allclose(told.class_mass[0], 1, rtol=1e-6)
    assert np.isfinite(told.nmi[0]).all()


def test_maps_of_float32_that_give_patches_nothing_have_no_distance_among_them():
    made = all_to_the_class_token()
    made.fuse(False)
    options = {"batch_size": N, "quiet": True}
    result = attention_distance.measure(wrap(made.net), made.images, renormalise=True, **options)
    assert np.isnan(result.distance_px).all()
    plain = attention_distance.measure(wrap(made.net), made.images, **options)
    assert (plain.distance_px == 0).all()
    told = attention_statistics.measure(wrap(made.net), made.images, **options)
    assert np.isnan(told.entropy).all() and np.allclose(told.class_mass, 1)


def test_rows_without_a_distance_are_no_distance_of_0():
    """Half of the queries see the class token alone: the others' distance is the mean."""
    made = Hard(1, 8, 1, 4, 4, {}, 1)
    made.fuse(False)
    block = made.net.blocks[0].attn
    hidden = torch.zeros(17, 17, dtype=torch.bool)
    hidden[9:, 1:] = True

    def forward(x, attn_mask=None, is_causal=False):
        q, k, v = block.qkv(x).unflatten(-1, (3, 1, 8)).permute(2, 0, 3, 1, 4)
        scores = block.q_norm(q) @ block.k_norm(k).mT * made.scale
        rows = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return block.proj((rows @ v).transpose(1, 2).flatten(2))

    block.forward = forward
    options = {"batch_size": N, "quiet": True}
    result = attention_distance.measure(wrap(made.net), made.images, renormalise=True, **options)
    maps, _ = made.maps(0)
    rows = (maps / maps.sum(-1, keepdim=True))[:, :, :8]
    each = (rows * made.pixels()[:8]).sum(-1).mean((0, 2))
    np.testing.assert_allclose(result.distance_px[0], each, rtol=1e-5)


@pytest.mark.parametrize("kind", ["none", "hidden", "added"])
def test_rows_among_some_keys_are_those_rows_brought_to_sum_1(kind, monkeypatch):
    """In windows, with a mask or without, and cut into pieces."""
    monkeypatch.setattr("vitprobe.tracing.rounding.PIECE", 5 * 7 * 4)
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 3, 5, 4), torch.randn(2, 3, 3, 7, 4)
    mask = None if kind == "none" else torch.rand(2, 3, 3, 5, 7) > 0.3
    if mask is not None:
        mask[..., 0] = True
    if kind == "added":
        mask = torch.randn(mask.shape).masked_fill(~mask, -torch.inf)
    rows, counted = torch.rand(2, 3, 3, 5) > 0.5, torch.rand(3, 7) > 0.4
    counted[:, 0] = True
    exact = attention_joined(query.double(), key.double(), mask, 0.5) * counted[:, None, None]
    found = among_few(query, key, mask, 0.5, rows, counted)
    torch.testing.assert_close(found, (exact / exact.sum(-1, keepdim=True))[rows])
