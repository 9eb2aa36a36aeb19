"""Masked-image pretraining (MAE: He et al. 2022, arXiv 2111.06377), a stage of ``train_family.py``.

Three in four of an image's patches are left out. The network sees the others alone, and a small
decoder, which is not kept, predicts the pixels of those left out from what the network made of
them. An image so gives as many targets as it has pixels, where its label is one of ten.

Departures from the paper: the network keeps timm's initial weights and its learned position table
(the decoder's is sines and cosines, as there), and gradients are clipped as in the other stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import PatchDropoutWithIndices, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import mse_loss, unfold
from training_pictures import Pictures, normalised

MASKED = 0.75
WIDTH, DEPTH, HEADS = 64, 2, 4
BETAS = (0.9, 0.95)


class Masking(PatchDropoutWithIndices):
    """timm's patch dropout as a part of a network: it remembers the patches that it kept.

    kept: (n, patches kept) int64 of the last pass, in the order in which their tokens went on.
    """

    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x, self.kept = super().forward(x)
        return x


@contextmanager
def masking(network: Any, share: float = MASKED) -> Iterator[None]:
    """Let a timm Vision Transformer see only some patches of each image, others at each pass."""
    before = network.patch_drop
    network.patch_drop = Masking(share, network.num_prefix_tokens)
    try:
        yield
    finally:
        network.patch_drop = before


class Decoder(nn.Module):
    """Predicts the pixels of every patch from the tokens of those that the network saw.

    Args:
        network: a timm Vision Transformer.
    """

    places: Tensor

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(network.embed_dim, WIDTH)
        self.mask_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        places = build_sincos2d_pos_embed(list(network.patch_embed.grid_size), WIDTH)
        self.register_buffer("places", places, persistent=False)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, qkv_bias=True) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.pixels = nn.Linear(WIDTH, network.patch_embed.proj.weight[0].numel())
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """(n, patches, pixels of a patch) out of the network's tokens (n, prefix + kept, width)."""
        tokens = self.embed(tokens)
        prefix, seen = tokens.tensor_split([tokens.shape[1] - kept.shape[1]], dim=1)
        patches = self.mask_token.to(seen.dtype).expand(len(seen), len(self.places), -1)
        patches = patches.scatter(1, kept[..., None].expand_as(seen), seen) + self.places
        tokens = self.blocks(torch.cat([prefix, patches.to(seen.dtype)], 1))
        return self.pixels(self.norm(tokens[:, prefix.shape[1] :]))


def targets(images: Tensor, patch_px: tuple[int, int]) -> Tensor:
    """(n, patches, pixels of a patch): each patch's pixels at mean 0 and variance 1."""
    pixels = unfold(images, patch_px, stride=patch_px).transpose(1, 2)
    variance, mean = torch.var_mean(pixels, -1, keepdim=True)
    return (pixels - mean) / (variance + 1e-6).sqrt()


def masked_loss(network: Any, decoder: Decoder, images: Tensor) -> Tensor:
    """Mean squared error over the patches that the network, under ``masking``, did not see."""
    # timm names the last normalisation after what it normalises, the tokens or their mean; the
    # other one is the identity.
    tokens = network.fc_norm(network.forward_features(images))
    kept = network.patch_drop.kept
    predicted = decoder(tokens, kept).float()
    unseen = torch.ones(predicted.shape[:2], dtype=torch.bool, device=images.device)
    unseen.scatter_(1, kept, False)
    return mse_loss(predicted[unseen], targets(images, network.patch_embed.patch_size)[unseen])


def masked_test_loss(
    network: nn.Module, decoder: Decoder, pictures: Pictures, device: torch.device
) -> float:
    """The loss on test images, the same patches left out each time, in float32."""
    loss, images = 0.0, pictures[0]
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        for first in range(0, len(images), 250):
            batch = images[first : first + 250]
            loss += len(batch) * masked_loss(network, decoder, normalised(batch, device)).item()
    return loss / len(images)
