"""Entropy of attention, and how much a query tells of where it attends: from blocks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor


def faint(dtype: torch.dtype) -> float:
    """Sums of probabilities below this have too few digits to tell how they are shared out."""
    return float(torch.finfo(dtype).tiny ** 0.5)


@dataclass
class AttentionInformation:
    """Adds up the rows of one attention layer, block by block, for a batch of images.

    Rows and keys that do not count (class tokens, registers, padding) are dropped, and what is
    left of a row is brought back to sum 1. Rows that give the keys that count next to nothing
    (``faint``) are left out.

    Args:
        queries: (groups, queries) which count; groups attend each among themselves.
        keys: (groups, keys) which count.
    """

    queries: Tensor
    keys: Tensor

    def begin(self, images: int, heads: int, like: Tensor) -> None:
        """Forget what was added."""
        groups, keys = self.keys.shape
        self.entropies = like.new_zeros(images, groups, heads)
        self.rows = like.new_zeros(images, groups, heads)
        self.to_keys = like.new_zeros(images, groups, heads, keys)

    def add(self, block: Tensor, images: slice, queries: slice) -> bool:
        """Rows (images, groups, heads, queries, keys); whether they are finite."""
        counted = self.keys.to(block.dtype)[:, None, :, None]
        logs = block.clamp_min(torch.finfo(block.dtype).tiny).log_().mul_(block)
        mass = (block @ counted)[..., 0]
        kept = self.queries[:, None, queries] & (mass >= faint(block.dtype))
        # With a = A / S: -sum a ln a = ln S - sum A ln A / S.
        safe = mass.where(kept, 1)
        entropy = safe.log() - (logs @ counted)[..., 0] / safe
        self.entropies[images] += entropy.where(kept, 0).sum(-1)
        self.rows[images] += kept.sum(-1)
        weights = kept.to(block.dtype) / safe
        self.to_keys[images] += (weights[..., None, :] @ block)[..., 0, :]
        return bool(torch.isfinite(mass).all())

    def entropy(self) -> Tensor:
        """(images, heads) mean entropy of a row over that of uniform attention; NaN for one key."""
        most = self._log_count(self.keys.sum(-1).to(self.rows))
        return (self._rows_entropy() / most[:, None]).nanmean(1)

    def nmi(self) -> Tensor:
        """(images, heads) I(q; k) / √(H(q) H(k)), q uniform; mean over groups.

        Where all attention is on one key it is 0: the limit of what goes there.
        """
        to_keys = self.to_keys * self.keys[:, None].to(self.to_keys)
        shares = to_keys / self.rows.where(self.rows > 0, torch.nan)[..., None]
        of_keys = -(shares * shares.clamp_min(torch.finfo(shares.dtype).tiny).log()).sum(-1)
        information = of_keys - self._rows_entropy()
        of_queries = self._log_count(self.rows)
        found = information / (of_queries * of_keys.clamp_min(0)).sqrt()
        return found.where(of_keys > 1e-6, 0 * of_queries).nanmean(1)

    def _rows_entropy(self) -> Tensor:
        return self.entropies / self.rows.where(self.rows > 0, torch.nan)

    @staticmethod
    def _log_count(count: Tensor) -> Tensor:
        """ln of a number of tokens; NaN under 2, among which there is nothing to tell."""
        return count.where(count > 1, torch.nan).log()


def mixed(epsilon: float, count: int) -> float:
    """NMI of attention that is identity with weight ``epsilon`` and uniform otherwise."""
    own, other = epsilon + (1 - epsilon) / count, (1 - epsilon) / count
    row = -own * log(own) - (count - 1) * other * log(other) if other else 0.0
    return 1 - row / log(count)
