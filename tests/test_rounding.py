"""What two right computations of attention may differ by, and what they may not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitprobe.tracing import rounding
from vitprobe.tracing.rounding import decide, row_tolerance, same_twice, suspects

WIDE = [torch.float64, torch.float32]
DTYPES = [*WIDE, torch.bfloat16, torch.float16]
TOKENS = 33


def operands(kind, seed=0, dtype=torch.float32, features=32):
    """Queries, keys and values (2 images, 1 group, 3 heads, tokens, features), as trained."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 2, 1, 3, TOKENS, features, generator=generator)
    # Of unit norm times this, scores have the size that the name says.
    size = {"logits of 1": 1, "logits of 100": 100, "logits of 1000": 1000}.get(kind, 10)
    q, k = F.normalize(q, dim=-1) * size * features**0.25, F.normalize(k, dim=-1) * features**0.25
    if kind == "massive channels":
        v[..., :3] *= 1000
        k[..., 0] += 30
    elif kind == "massive tokens":
        for one in (q, k, v):
            one[..., 5, :] *= 50
    elif kind == "small values":
        v *= 1e-6
    elif kind == "biases far above":
        k += 20
        v += 1000
    return tuple(one.to(dtype) for one in (q, k, v))


KINDS = [
    "logits of 1", "logits of 100", "logits of 1000", "massive channels", "massive tokens",
    "small values", "biases far above",
]  # fmt: skip

# Of 1000 ± 1 bfloat16 keeps no difference, and float16 none of 1e-6.
TOO_FINE = {"small values", "biases far above"}
SHOWN = [
    (kind, dtype)
    for kind in KINDS
    for dtype in DTYPES
    if kind != "logits of 1000" and (dtype in WIDE or kind not in TOO_FINE)
]


def wide(*tensors):
    return [one if one.dtype == torch.float64 else one.float() for one in tensors]


def written_out(q, k, v, mask=None, scale=None):
    q, k, v = wide(q, k, v)
    return rounding.joined(q, k, mask, scale or q.shape[-1] ** -0.5) @ v


def judged(out, q, k, v, mask=None, everywhere=False):
    """What the check says of an output, and how many rows it computed in float64."""
    scale = q.shape[-1] ** -0.5
    own = written_out(q, k, v, mask)
    rows = suspects(own, out, q, k, v, scale)
    if everywhere:
        rows = torch.ones(q.shape[:-1], dtype=torch.bool)
    if rows is None:
        return None, 0
    whole = None if mask is None else mask.expand(*q.shape[:-1], k.shape[-2])
    return decide(rows, own, out, q, k, v, whole, scale), int(rows.sum())


def window():
    """Each token sees those at most 8 before or after it."""
    at = torch.arange(TOKENS)
    return (at[:, None] - at).abs() <= 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_right_outputs_pass_whatever_their_size(kind, dtype, mask):
    hidden = {None: None, "bool": window(), "float": torch.randn(TOKENS, TOKENS).to(dtype)}[mask]
    q, k, v = operands(kind, dtype=dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=hidden)
    assert judged(out, q, k, v, hidden)[0] is None
    # Each row also by its own bound, not only where the quick look finds it off.
    assert judged(out, q, k, v, hidden, everywhere=True)[0] is None


def wrong(how, q, k, v, by):
    """What a layer puts out whose arguments say something else."""
    scale = q.shape[-1] ** -0.5
    if how == "mask":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=window())
    if how == "scale":
        return F.scaled_dot_product_attention(q, k, v, scale=(1 + by) * scale)
    if how == "head order":
        return F.scaled_dot_product_attention(q, k, v).flip(2)
    if how == "keys":
        return F.scaled_dot_product_attention(q, k.roll(1, -2), v)
    assert how == "map"
    changed = (1 - by) * rounding.joined(*wide(q, k), None, scale) + by / k.shape[-2]
    return (changed @ wide(v)[0]).to(v.dtype)


@pytest.mark.parametrize(("kind", "dtype"), SHOWN)
@pytest.mark.parametrize("how", ["mask", "scale", "head order", "keys", "map"])
def test_wrong_outputs_are_refused_whatever_their_size(how, kind, dtype):
    q, k, v = operands(kind, dtype=dtype)
    by = 0.01 if dtype in WIDE else 0.2
    off, allowed = judged(wrong(how, q, k, v, by), q, k, v)[0]
    assert off > allowed > 0


def test_one_row_of_many_is_found():
    q, k, v = operands("logits of 100")
    out = F.scaled_dot_product_attention(q, k, v)
    out[1, 0, 2, 7] = out[1, 0, 2, 8]
    (off, _), looked_at = judged(out, q, k, v)
    assert looked_at == 1
    exact = written_out(q.double(), k.double(), v.double())
    assert (off - (out[1, 0, 2, 7] - exact[1, 0, 2, 7]).abs()).abs().min() < 1e-9


def test_what_is_not_finite_is_told_apart():
    q, k, v = operands("logits of 1")
    v[0, 0, 0, 3, 0] = torch.inf
    off, _ = judged(F.scaled_dot_product_attention(q, k, v), q, k, v)[0]
    assert off != off


def test_the_bound_of_one_hot_rows_is_that_of_their_value():
    # With all attention on one key, blurred scores move nothing: what remains is a few roundings.
    q, k, v = (one.double() for one in operands("logits of 1"))
    k = F.normalize(k, dim=-1) * 100
    q = 100 * k
    exact, allowed = rounding._bounded(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0], None, 1.0, torch.float32)
    torch.testing.assert_close(exact, v[0, 0, 0])
    assert (allowed <= 200 * 2.0**-24 * exact.abs() + 1e-30).all()


def test_coarser_products_widen_the_bound(monkeypatch):
    assert rounding.units(torch.float32)[0] == 2.0**-24
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert rounding.units(torch.float32)[0] == 2.0**-11
    assert rounding.units(torch.bfloat16)[0] == 2.0**-24


class TestTwice:
    def exactly(self, x):
        return lambda: x.double()

    def test_alike(self):
        x = torch.randn(5, 7)
        assert same_twice(x, x + 1e-7, self.exactly(x)) is None

    def test_as_far_from_the_truth_as_the_other(self):
        x, noise = torch.randn(5, 7), 1e-4 * torch.randn(2, 5, 7)
        assert same_twice(x + noise[0], x + noise[1], self.exactly(x)) is None

    def test_further_from_the_truth(self):
        x = torch.randn(5, 7)
        off, allowed = same_twice(x + 1e-4, x, self.exactly(x))
        assert off == pytest.approx(1e-4, rel=0.1) and allowed < 1e-4

    def test_not_finite(self):
        x = torch.full((5, 7), torch.nan)
        off, _ = same_twice(x, x, self.exactly(x))
        assert off != off


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_softmax_sum_to_one_within_its_tolerance(dtype):
    scores = 10 * torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    rows = wide(scores.to(dtype).softmax(-1))[0]
    assert (rows.sum(-1) - 1).abs().max() <= row_tolerance(dtype, 1000) < 0.05
