"""A Vision Transformer block without its two skip connections (Raghu et al. 2021, section 4)."""

from __future__ import annotations

from timm.models.vision_transformer import Block
from torch import Tensor, nn


class SkiplessBlock(Block):
    """timm's block with the same parameters, of which each half passes on its branch alone."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        x = self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
        return self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def check_plain(block: nn.Module) -> None:
    """ValueError unless the block is timm's plain one, whose two halves run one after the other."""
    if type(block) is not Block:
        raise ValueError(f"{type(block).__name__} is not timm's plain Vision Transformer block")
