"""Raghu et al. 2021, Figures E.1 and E.2: skip ratios and cosines of more ViTs.

Look for: whether the second ViT repeats the first, and at the lower right the cosine of skip and
branch (Figure E.2).

Nearest to the paper's, with IMAGENET a folder:
    --models vit_b32 vit_l16 vit_h14 --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import skip_ratio

FIGURE = Figure(__doc__, __file__, skip_ratio, models=["vit_small_box", "vit_gap_box"])

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
