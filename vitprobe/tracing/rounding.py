"""How far two right computations of softmax(s · qkᵀ + mask)v may be from each other.

With unit roundoff u, scores of d products are off by about √d · u · s|q||k|, however small the
score itself; a score that is off by e scales its probability by exp(e), and sums over n keys are
off by √n · u. So the error of an output grows with the size of queries and keys, and where one
key has all of a row's attention it vanishes again.

``suspects`` looks for rows beyond what rounding usually comes to, at the price of a few passes over
queries, keys, values and outputs. ``decide`` computes these rows in float64, with a bound for each
of their elements. Sums are bounded as Higham and Mary 2019 (SIAM J. Sci. Comput.
41(5)) do: not n · u but ``SURE`` · √n · u, which fails with a probability below 1e-13.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, nan, sqrt

import torch
from torch import Tensor

from vitprobe.tracing.attention_operations import joined

SURE = 8.0
# Unit roundoffs that a kernel leaves alone: an exponential, a division, a running maximum.
STEPS = 32
# Elements of a piece of float64 work.
PIECE = 2**21
_HALVES = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# What torch multiplies float32 matrices with when it was told that less than all digits will do.
_PRODUCTS = {"high": 2.0**-11, "medium": 2.0**-8}


def units(dtype: torch.dtype) -> tuple[float, float, float]:
    """Unit roundoff of products of scores, of sums, and of stored probabilities and outputs.

    Fused kernels add up in float32 whatever they are given, and round to half precision what they
    multiply the values with and what they put out.
    """
    if dtype == torch.float64:
        return 2.0**-53, 2.0**-53, 0.0
    if dtype in _HALVES:
        return 2.0**-24, 2.0**-24, _HALVES[dtype]
    coarse = _PRODUCTS.get(torch.get_float32_matmul_precision(), 0.0)
    return max(coarse, 2.0**-24), 2.0**-24, coarse


def suspects(
    own: Tensor, out: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor | None:
    """Rows where the two differ by more than rounding usually comes to: (..., queries), or None.

    Args:
        own: (..., queries, features) computed here, in float32 or float64.
        out: what the layer put out.
        query, key, value: (..., tokens, features) of the same heads.
    """
    scores, sums, stored = units(out.dtype)
    top, bottom = value.amax(-2), value.amin(-2)
    share = (64 + sqrt(key.shape[-2])) * sums + 2 * stored
    allowed = share * torch.maximum(top, -bottom) + torch.finfo(out.dtype).tiny
    off = (own - out).abs_()
    largest = off.amax(-2)
    if bool((largest <= allowed).all()):
        return None
    # Sums are off by a share of their size; scores that are off move outputs between the values.
    reach = _longest(query) * _longest(key) * abs(scale)
    allowed = allowed + (2 * scores * reach)[..., None] * (top - bottom)
    if bool((largest <= allowed).all()):
        return None
    # NaN is suspect, too.
    return ~(off <= allowed[..., None, :]).all(-1)


def _longest(tokens: Tensor) -> Tensor:
    """(...) the largest norm of a token's features, float32 or float64."""
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    return torch.linalg.vector_norm(wide, dim=-1).amax(-1)


def decide(
    suspect: Tensor,
    own: Tensor,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[float, float] | None:
    """Both what was computed here and what a layer put out, against the same in float64.

    Args:
        suspect: (images, groups, heads, queries) which rows to look at.
        own, out, query, key, value: (images, groups, heads, tokens, features).
        mask: (images, groups, heads, queries, keys), or None.
        scale: s.

    Returns:
        how far off the worst element is and how far rounding could put it; None where all are in
        reach of rounding. Both are NaN where something is not finite.
    """
    worst, most = None, 1.0
    for at in suspect.any(-1).nonzero().tolist():
        head = tuple(at)
        k, v = _exact(key[head]), _exact(value[head])
        for rows in suspect[head].nonzero()[:, 0].split(max(1, PIECE // v.numel())):
            hidden = None if mask is None else mask[head][rows].to(v.device)
            if hidden is not None and hidden.dtype != torch.bool:
                hidden = hidden.double()
            q = _exact(query[head][rows])
            for one in (own, out):
                exact, allowed = _bounded(q, k, v, hidden, scale, one.dtype)
                off = (_exact(one[head][rows]) - exact).abs()
                if not off.isfinite().all():
                    return nan, nan
                times = (off / allowed).flatten()
                place = int(times.argmax())
                if float(times[place]) > most:
                    most = float(times[place])
                    worst = float(off.flatten()[place]), float(allowed.flatten()[place])
    return worst


def _bounded(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """float64 outputs of rows of a head, and how far from them a computation in ``dtype`` may be.

    Both are (rows, features).
    """
    scores, sums, stored = units(dtype)
    probabilities = joined(query, key, mask, scale)
    exact = probabilities @ value
    size = (scale * query) @ key.mT
    if mask is not None and mask.dtype != torch.bool:
        size = size + mask
    seen = probabilities > 0
    top = size.where(seen, -torch.inf).amax(-1, keepdim=True)
    # Of each score: its products, what the mask adds, and the argument of the exponential.
    blurred = _sum_error(query.shape[-1], scores) * (abs(scale) * (query.abs() @ key.abs().mT))
    blurred += sums * (STEPS + 2 * (size.abs() + (size - top).abs()))
    weight = torch.where(seen, probabilities * blurred.clamp_max(50).expm1(), 0)
    # Probabilities go on summing to 1, so that a value counts by its distance from the output.
    # Twice: once for the probabilities, once for the sum that they are divided by.
    moved = 2 * (weight[..., None] * (value - exact[:, None]).abs()).sum(1)
    level = probabilities @ value.abs()
    allowed = moved + (_sum_error(len(key), sums) + STEPS * sums + stored) * level
    allowed += stored * exact.abs()
    # What is too small for the type is lost altogether.
    return exact, allowed + torch.finfo(dtype).tiny * (1 + value.abs().sum(0))


def among_few(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, rows: Tensor, counted: Tensor
) -> Tensor:
    """Rows of attention among some of the keys alone, in float64, however little these get.

    Args:
        query, key: (images, groups, heads, tokens, features).
        mask: (images, groups, heads, queries, keys), or None.
        scale: s.
        rows: (images, groups, heads, queries) which rows, R of them.
        counted: (groups, keys) among which.

    Returns:
        (R, keys); 0 for other keys, and where the mask hides all of these.
    """
    image, group, head, row = rows.nonzero(as_tuple=True)
    hidden, found = ~counted, []
    pieces = max(1, PIECE // (key.shape[-2] * key.shape[-1]))
    for n, g, h, q in zip(*(one.split(pieces) for one in (image, group, head, row))):
        product = _exact(key[n, g, h]) @ _exact(query[n, g, h, q])[..., None]
        scores = (scale * product)[..., 0]
        without = hidden[g].to(scores.device)
        if mask is not None:
            own = mask[n, g, h, q].to(scores.device)
            if own.dtype == torch.bool:
                without = without | ~own
            else:
                scores = scores + own.double()
        found.append(scores.masked_fill(without, -torch.inf).softmax(-1).nan_to_num(0))
    return torch.cat(found)


def same_twice(
    out: Tensor, again: Tensor, exactly: Callable[[], Tensor]
) -> tuple[float, float] | None:
    """Two computations of one output, one fused and one written out; as ``decide``.

    Where they differ by more than rounding usually comes to, the first may be as far from the
    float64 one as the second is.
    """
    _, sums, stored = units(out.dtype)
    usual = (64 * sums + 8 * stored) * float(again.abs().max())
    if float((out - again).abs().max()) <= usual:
        return None
    exact = exactly()
    off, other = (float((_exact(one) - exact).abs().max()) for one in (out, again))
    if not isfinite(off + other):
        return nan, nan
    allowed = 8 * other + usual
    return None if off <= allowed else (off, allowed)


def row_tolerance(dtype: torch.dtype, keys: int) -> float:
    """How far the sum of a row of probabilities may be from 1 after a few operations on them."""
    _, sums, stored = units(dtype)
    return STEPS * sums + _sum_error(keys, sums) + 8 * stored


def _sum_error(count: int, unit: float) -> float:
    """Of a sum of so many products, relative to the sum of their sizes."""
    return (min(count, SURE * sqrt(count)) + 2) * unit


def _exact(tensor: Tensor) -> Tensor:
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
