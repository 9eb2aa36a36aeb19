"""Raghu et al. 2021, Figure 3: attention distance of the heads in low and high blocks.

Look for: the lowest blocks hold local and global heads side by side, the highest are mostly
global, near the dashed line of uniform attention.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_l16 vit_h14 --images IMAGENET --num-images 5000
"""

from gallery import Figure

from vitprobe import attention_distance

FIGURE = Figure(
    __doc__, __file__, attention_distance, models=["vit_small_box", "vit_gap_box"], num_images=1024
)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
