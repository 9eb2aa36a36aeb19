"""Darcet et al. 2024, Figure 4: norms of the patch tokens at every block.

Look for: a few patches far above the others in late blocks (in large or long-trained networks
without registers; small ones have none), or registers that have the large norms in their stead.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_giant_patch14_dinov2 vit_giant_patch14_reg4_dinov2 --images IMAGENET
"""

from gallery import Figure

from vitprobe import token_norms

FIGURE = Figure(
    __doc__, __file__, token_norms, models=["vit_small_box", "resnet_box"], num_images=512
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
