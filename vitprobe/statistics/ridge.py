"""Many ridge regressions side by side, each with its penalty chosen by leaving one row out.

With rows X (n, d), targets Y (n, c) and penalty λ, the weights are W = (XᵀX + λI)⁻¹XᵀY, or
Xᵀ(XXᵀ + λI)⁻¹Y where there are more features than rows. The last column of X is the constant
feature 1, penalised like all; the others have mean 0, so that it stands by itself: its weight is
nȳ / (n + λ) and its part of the Gram is 1 everywhere.

A row that is left out must be left out of the mean too. Else the other rows sum to its negative,
and what they say of it is turned round: the leave-one-out error of a good fit came out above that
of none. Rows of another mean ask for another constant, so none is held against it: the fits that
are compared have a free constant. One eigendecomposition of the smaller matrix gives the errors of
all n of them for every λ at once:

    primal: e_i = (y_i - ȳ - x_iᵀw) / (1 - 1/n - x_iᵀ(XᵀX + λI)⁻¹x_i);
    dual:   e_i = [G⁻¹(Y - ȳ)]_i / ([G⁻¹]_ii - 1/(nλ)),     with G = XXᵀ + λI,

x, w, X without the constant. The λ of the smallest mean square error is taken: the one that
scikit-learn's ``RidgeCV`` takes with its intercept. The deviation by which features were divided is
that of all rows throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

# From next to nothing to next to no fit, for standardised features by the hundred or ten thousand.
PENALTIES = torch.logspace(-2, 6, 9, dtype=torch.float64)
SCALE_FLOOR = 1e-5


def standardise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., n, d), in place; returns their mean and deviation (+1e-5), (..., d).

    In two passes, of which torch's sum is much faster than its ``var_mean`` over this axis.
    """
    mean = rows.mean(-2)
    rows -= mean[..., None, :]
    scale = rows.square().mean(-2).sqrt() + SCALE_FLOOR
    rows /= scale[..., None, :]
    return mean, scale


def signed_targets(labels: Tensor, classes: int) -> Tensor:
    """(n,) class indices -> (n, classes) float64, 1 for the class and -1 for the others."""
    return 2 * torch.nn.functional.one_hot(labels, classes).double() - 1


def ridge(
    rows: Tensor, targets: Tensor, penalties: Tensor = PENALTIES, form: str | None = None
) -> tuple[Tensor, Tensor]:
    """Weights and chosen penalty of every regression.

    Args:
        rows: (..., n, d) float64; columns of mean 0 and, last, the constant 1.
        targets: (n, c) float64, the same for all.
        penalties: (p,) to choose from; one is taken as it is.
        form: ``primal`` or ``dual``; by default that of the smaller matrix.

    Returns:
        (..., d, c) and (...).
    """
    n, d = rows.shape[-2:]
    if (form or ("dual" if n <= d else "primal")) == "dual":
        coefficients, chosen = dual(rows @ rows.mT, targets, penalties)
        return rows.mT @ coefficients, chosen
    moment = rows.mT @ rows
    errors = primal_errors(rows, moment, targets, penalties.to(rows))
    chosen = penalties.to(rows)[errors.argmin(-1)]
    return _solve(moment, rows.mT @ targets, chosen), chosen


def dual(grams: Tensor, targets: Tensor, penalties: Tensor = PENALTIES) -> tuple[Tensor, Tensor]:
    """Grams (..., n, n) of such rows -> coefficients (..., n, c), and penalties chosen (...)."""
    solved, errors = _solved(grams, targets, penalties.to(grams))
    best = errors.argmin(-1)
    coefficients = solved.take_along_dim(best[..., None, None, None], -2).squeeze(-2)
    return coefficients, penalties.to(grams)[best]


def dual_errors(grams: Tensor, targets: Tensor, penalties: Tensor) -> Tensor:
    """(..., p) mean square leave-one-out errors from Grams."""
    return _solved(grams, targets, penalties)[1]


def _solved(grams: Tensor, targets: Tensor, penalties: Tensor) -> tuple[Tensor, Tensor]:
    """G⁻¹Y (..., n, p, c) of every penalty, and the leave-one-out errors (..., p)."""
    values, vectors = torch.linalg.eigh(grams)
    shrunk = 1 / (values.clamp_min(0)[..., None] + penalties)  # (..., n, p)
    diagonal = vectors.square() @ shrunk
    rotated = shrunk[..., None] * (vectors.mT @ targets)[..., None, :]
    solved = (vectors @ rotated.flatten(-2)).unflatten(-1, rotated.shape[-2:])
    # What the constant, an eigenvector of eigenvalue n, has in both.
    n = len(targets)
    above = solved - targets.mean(0) / (n + penalties)[:, None]
    squares = above.square().mean(-1) / (diagonal - 1 / (n * (n + penalties))).square()
    return solved, squares.mean(-2)


def primal_errors(rows: Tensor, moment: Tensor, targets: Tensor, penalties: Tensor) -> Tensor:
    """(..., p) mean square leave-one-out errors from such rows (..., n, d) and their XᵀX."""
    n, mean = len(targets), targets.mean(0)
    features = rows[..., :-1]
    values, vectors = torch.linalg.eigh(moment[..., :-1, :-1])
    scores = features @ vectors
    shrunk = 1 / (values.clamp_min(0)[..., None] + penalties)  # (..., d - 1, p)
    rest = 1 - 1 / n - scores.square() @ shrunk
    rotated = scores.mT @ targets
    errors = [
        ((targets - mean - scores @ (shrunk[..., p, None] * rotated)) / rest[..., p, None])
        .square()
        .mean((-2, -1))
        for p in range(len(penalties))
    ]
    return torch.stack(errors, -1)


def _solve(matrix: Tensor, right: Tensor, penalty: Tensor) -> Tensor:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.cholesky(matrix + penalty[..., None, None] * eye)
    return torch.cholesky_solve(right, factor)
