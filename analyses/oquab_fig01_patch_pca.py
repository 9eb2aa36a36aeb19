"""Oquab et al. 2023, Figure 1: the first principal components of patches as colours.

Look for: objects in other colours than their background, and parts of one kind in one colour
across images.

Nearest to the paper's, with IMAGES a folder of a class:
    --models vit_giant_patch14_dinov2.lvd142m --images IMAGES --foreground
"""

from gallery import Figure

from vitprobe import patch_pca

FIGURE = Figure(__doc__, __file__, patch_pca, models=["vit_small_box", "vit_gap_box", "resnet_box"])

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
