"""Gröger et al. 2026: CKA beside what unrelated networks would give.

Look for: cells that are not above 95 % of the permutations (outlined), and the line on the colour
bar that the most alike pair of layers must beat.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_l16 resnet50 --images IMAGENET --num-images 1024
"""

from gallery import Figure

from vitprobe import cka

FIGURE = Figure(
    __doc__, __file__, cka, models=["vit_small_box", "resnet_box"], num_images=512, null=200
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
