"""Principal components of patches, in a sign that a rule fixes."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from vitprobe.statistics.varying import ROUNDINGS, varying

COUNT = 3


def components(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first three principal components of patches, and the share of variance of each.

    Centred, in order of variance, of the features that vary by more than rounding. A component is
    positive on the side that holds fewer patches farther out: its third moment is positive. That
    rule knows nothing of the features' basis.

    Args:
        patches: (n, d).

    Returns:
        (n, 3) and (3,); NaN for components that there are not, and where patches do not vary.
    """
    scores = np.full((len(patches), COUNT), np.nan)
    shares = np.full(COUNT, np.nan)
    wide = patches.astype(np.float64)
    # Equal values do not vary, however their mean is rounded.
    spread = np.where(np.ptp(wide, axis=0) > 0, wide.std(0), 0)
    level = np.abs(wide.mean(0))
    rounding = ROUNDINGS * float(np.finfo(np.float32).eps)
    wide = wide[:, varying(torch.from_numpy(spread), torch.from_numpy(level), rounding).numpy()]
    count = min(COUNT, wide.shape[1], len(wide) - 1)
    if count < 1:
        return scores, shares
    fitted = PCA(count, svd_solver="full").fit(wide)
    found = fitted.transform(wide)
    scores[:, :count] = found * np.where((found**3).sum(0) < 0, -1, 1)
    shares[:count] = fitted.explained_variance_ratio_
    return scores, shares


def foreground_components(patches: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``components`` of the patches on the positive side of a first component; NaN elsewhere."""
    chosen = first > 0
    scores = np.full((len(patches), COUNT), np.nan)
    scores[chosen], shares = components(patches[chosen])
    return scores, shares


def area_under_curve(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """How well scores tell the patches of an object: AUC, and its standard error over images.

    Args:
        scores: (images, patches).
        truth: (images, patches) whether a patch is the object's.

    Returns:
        the area, 0.5 for chance, and the jackknife over images; NaN where it is not defined.
    """
    if np.isnan(scores).any() or truth.all() or not truth.any():
        return np.nan, np.nan
    value = float(roc_auc_score(truth.ravel(), scores.ravel()))
    n, left = len(scores), []
    for i in range(n):
        others = np.arange(n) != i
        if truth[others].any() and not truth[others].all():
            left.append(roc_auc_score(truth[others].ravel(), scores[others].ravel()))
    if len(left) < 2:
        return value, np.nan
    spread = np.square(np.array(left) - np.mean(left)).sum()
    return value, float(np.sqrt(spread * (len(left) - 1) / len(left)))
