"""What is masked, the operation's own mask says, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.nn import functional as F

from vitprobe.attention_distance import uniform_distance
from vitprobe.tracing.attention import map_attention, observe

TOKENS, HEADS = 6, 2
# Tokens see themselves and those at most one before or after.
HIDDEN = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs() > 1
NEVER = torch.finfo(torch.float32).min


def added(low):
    return torch.zeros(TOKENS, TOKENS).masked_fill(HIDDEN, low)


class Attending(nn.Module):
    """Six patches of 4 px attend by ``how(self, q, k, v)``."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.qkv = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24)
        self.how = how
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.local = nn.Parameter(added(-1000.0))
        self.register_buffer("by_head", torch.stack([added(-1000.0), added(0.0)]))
        self.register_buffer("slope", -100.0 * HIDDEN * torch.arange(1, 7))
        self.register_buffer("mask", added(-100.0))

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, 4)).permute(2, 0, 3, 1, 4)
        return self.how(self, q, k, v)


def fused(**options):
    return lambda _, q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def inline(change):
    def how(self, q, k, v):
        return F.dropout(change(self, q @ k.mT).softmax(-1), 0.1, False) @ v

    return how


def assigned(self, scores):
    scores[:, :, HIDDEN] = -torch.inf
    return scores


def windows_of_swin(self, scores):
    scores = scores + self.bias
    scores = scores.unflatten(0, (1, -1)) + self.mask[None, None, None]
    return scores.flatten(0, 1)


MASKED = {
    "boolean": fused(attn_mask=~HIDDEN),
    "minus infinity": fused(attn_mask=added(-torch.inf)),
    "a hundred": fused(attn_mask=added(-100.0)),
    "the smallest number": fused(attn_mask=added(NEVER)),
    "with a bias": lambda self, q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=self.bias[None] + self.mask
    ),
    "with a bias, in place": lambda self, q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=self.bias.clone()[None].masked_fill_(HIDDEN, NEVER)
    ),
    "filled": inline(lambda self, scores: scores.masked_fill(HIDDEN, -1e9)),
    "where": inline(lambda self, scores: torch.where(HIDDEN, torch.tensor(NEVER), scores)),
    "where, turned": inline(lambda self, scores: scores.where(~HIDDEN, -1e4)),
    "assigned": inline(assigned),
    "added": inline(lambda self, scores: scores + (1 - (~HIDDEN).float()) * -10000.0),
    "windows": inline(windows_of_swin),
    "made elsewhere": inline(lambda self, scores: scores - torch.where(HIDDEN, torch.inf, 0.0)),
    "values first": lambda self, q, k, v: (
        (v.mT @ (q @ k.mT + added(-torch.inf)).softmax(-1).transpose(-2, -1)).mT
    ),
}
SEEN = {
    "nothing": fused(),
    "one parameter for all heads": inline(lambda self, scores: scores + self.local),
    "one parameter, fused": lambda self, q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=self.local.view(1, TOKENS, TOKENS) * 2
    ),
    "unlike heads": inline(lambda self, scores: scores + self.by_head),
    "by distance": inline(lambda self, scores: scores + self.slope),
    "large logits": inline(lambda self, scores: 1e4 * scores),
    "filled with zeros": inline(lambda self, scores: scores.masked_fill(HIDDEN, 0.0)),
}


def layer_of(module):
    (layer,) = map_attention("model", module.eval(), torch.randn(2, 3, 8, 12)).layers
    return layer


@pytest.mark.parametrize("way", MASKED)
def test_masks_however_written(way):
    np.testing.assert_array_equal(layer_of(Attending(MASKED[way])).masked[0], HIDDEN)


@pytest.mark.parametrize("way", SEEN)
def test_small_probabilities_are_not_masked(way):
    layer = layer_of(Attending(SEEN[way]))
    assert layer.masked is None or not layer.masked.any()


@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_a_row_that_is_all_hidden_attends_to_nothing(kind):
    hidden = HIDDEN.clone()
    hidden[2] = True
    mask = (
        ~hidden
        if kind == "boolean"
        else torch.zeros(TOKENS, TOKENS).masked_fill(hidden, -torch.inf)
    )
    module, images = Attending(fused(attn_mask=mask)).eval(), torch.randn(2, 3, 8, 12)
    found, rows = map_attention("model", module, images), []
    with torch.no_grad(), observe(module, found, lambda i, block, *_: rows.append(block.sum(-1))):
        module(images)
    expected = torch.ones(2, 1, HEADS, TOKENS)
    expected[..., 2] = 0
    torch.testing.assert_close(torch.cat(rows), expected)


def test_causal_flag():
    layer = layer_of(Attending(fused(is_causal=True)))
    np.testing.assert_array_equal(layer.masked[0], ~np.tri(TOKENS, dtype=bool))


def test_what_only_some_heads_hide_can_be_attended_to():
    heads = torch.stack([added(-torch.inf), added(0.0)])
    layer = layer_of(Attending(inline(lambda self, scores: scores + heads)))
    assert not layer.masked.any()


class Own(nn.Module):
    """PyTorch's own attention with masks as its callers give them."""

    def __init__(self, **masks):
        super().__init__()
        self.patch, self.masks = nn.Conv2d(3, 8, 4, 4), masks
        self.own = nn.MultiheadAttention(8, HEADS, batch_first=True)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        masks = {
            name: mask.expand(len(x), TOKENS) if name == "key_padding_mask" else mask
            for name, mask in self.masks.items()
        }
        return self.own(x, x, x, need_weights=False, **masks)[0]


def test_pytorchs_own_attention():
    for mask in (HIDDEN, added(-torch.inf)):
        np.testing.assert_array_equal(layer_of(Own(attn_mask=mask)).masked[0], HIDDEN)
    padding = torch.arange(TOKENS) > 3
    layer = layer_of(Own(attn_mask=HIDDEN, key_padding_mask=padding))
    np.testing.assert_array_equal(layer.masked[0], HIDDEN | padding)


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swin_tiny_patch4_window7_224", {"window_size": 4}),
        ("swinv2_tiny_window8_256", {"window_size": 4}),
    ],
)
def test_shifted_windows(name, options, is_fused):
    set_fused_attn(is_fused)
    try:
        module = timm.create_model(
            name, img_size=32, depths=(2,), num_heads=(2,), embed_dim=16, **options
        ).eval()
    finally:
        set_fused_attn(True)
    first, second = map_attention(name, module, torch.randn(2, 3, 32, 32)).layers
    assert first.masked is None
    # Rows and columns that the shift brought over the border stay apart from the others: of 16
    # tokens of a window a pair is apart if either its rows or its columns are.
    share = second.masked.reshape(2, 2, -1).mean(-1)
    np.testing.assert_allclose(share, [[0, 0.5], [0.5, 0.75]])


def test_uniform_attention_leaves_out_what_is_masked():
    line = np.arange(4.0)
    distances = np.abs(line[:, None] - line)[None]
    masked = distances > 1
    # Ends see themselves and one neighbour: 1/2; the two inside see two neighbours: 2/3.
    assert uniform_distance(distances, masked) == pytest.approx((1 / 2 + 2 / 3) / 2)
