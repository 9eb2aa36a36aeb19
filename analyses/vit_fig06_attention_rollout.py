"""Dosovitskiy et al. 2021, Figures 6 and 14: what the class token attends to through all layers.

Look for: the map lights the digit, not the background.

Nearest to the paper's, with IMAGENET a folder:
    --models vit_l16 --images IMAGENET --num-images 8
"""

from gallery import Figure

from vitprobe import attention_rollout

FIGURE = Figure(__doc__, __file__, attention_rollout, models=["vit_small_box"], num_images=8)

if __name__ == "__main__":
    raise SystemExit(FIGURE.main())
